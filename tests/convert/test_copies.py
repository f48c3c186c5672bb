"""Copies of weights behind any prefix, in lists and in modules; names that are left out."""

import numpy as np
import pytest

from dmf.convert.copies import Copies, dropped
from dmf.errors import DmfError
from dmf.storage.readers import read
from dmf.storage.readers.tree import float32
from tests.conversion import tensors_of

KIND = Copies(r"in\.weight", (("ema", "ema"), ("model", "model")), "flat", ("table",))


def net(value, prefix=""):
    named = {"table": (3,), "in.weight": (2, 2), "out.bias": (2,)}
    arrays = {f"{prefix}{name}": np.full(shape, value, np.float32) for name, shape in named.items()}
    return tensors_of(arrays)


def row(*shapes):
    return dict(
        enumerate(
            tensors_of({str(i): np.ones(s, np.float32) for i, s in enumerate(shapes)}).values()
        )
    )


ONE = tensors_of({"": np.int64(1)})[""]
FILES = {  # (tree, the copy that is taken); its values are 1
    "flat": (net(1), "flat"),
    "DDP": (net(1, "module."), "flat"),
    "average of PyTorch": ({"n_averaged": ONE, **net(1, "module.")}, "flat"),
    "Lightning": ({"state_dict": net(1, "model."), "epoch": 3}, "model"),
    "params": ({"params": net(1)}, "params"),
    "two names": ({"net": net(0), "ema_net": net(1)}, "ema_net"),
    "average within": ({"model": net(0), "ema": {"model": net(1)}}, "ema.model"),
    "compiled": ({"model": net(0), "ema": net(1, "module._orig_mod.")}, "ema"),
    "sharded": (net(1, "_fsdp_wrapped_module._checkpoint_wrapped_module."), "flat"),
    "no average": ({"ema": None, "model": net(1)}, "model"),
    "ema_pytorch": (
        {**net(0, "online_model."), **net(1, "ema_model."), "initted": ONE, "step": ONE},
        "ema_model",
    ),
    "ema_pytorch beside": (
        {"model": net(0), "ema": {**net(0, "online_model."), **net(1, "ema_model.")}},
        "ema.ema_model",
    ),
    "list": ({"model": net(0), "ema": {"shadow_params": row((3,), (2, 2), (2,))}}, "ema"),
    "counted": ({"model": net(0), "other": {"n_averaged": ONE, **net(1, "module.")}}, "other"),
    "moments": ({"opt": net(0), "weights": net(1)}, "weights"),
}


@pytest.mark.parametrize(("tree", "copy"), FILES.values(), ids=FILES)
def test_the_average_is_found_behind_any_prefix(tree, copy, capsys):
    tensors, taken = KIND.select(tree, "")
    assert taken == copy and list(tensors) == list(net(1))
    assert all((x.read() == 1).all() for x in tensors.values())
    assert KIND.select(tree, copy)[1] == copy
    assert f"copy {copy!r}" in capsys.readouterr().out or copy == "flat"


def test_a_list_may_lack_what_is_no_parameter_and_must_fit():
    model = net(0)
    tensors, _ = KIND.select({"model": model, "shadow_params": row((2, 2), (2,))}, "")
    assert tensors["table"] is model["table"] and tensors["out.bias"].read()[0] == 1
    with pytest.raises(DmfError, match=r"shadow_params\[0\] has shape \[2\]: expected \[2, 2\]"):
        KIND.select({"model": model, "shadow_params": row((2,), (2, 2))}, "")


def test_a_place_names_a_copy():
    tree = {"a": {"model": net(1)}, "b": {"model": net(2)}}
    assert KIND.select(tree, "b.model")[0]["table"].read()[0] == 2
    with pytest.raises(DmfError, match="--copy=c is not in this file: expected a.model or b.model"):
        KIND.select(tree, "c")


def test_tensors_are_left_out_by_name():
    tensors = {**net(1), **tensors_of({"loss.a": np.ones(1), "loss.b": np.ones(1)})}
    kept, gone = dropped(tensors, ["loss.*"])
    assert list(kept) == list(net(1)) and gone == ["loss.a", "loss.b"]
    with pytest.raises(DmfError, match=r"--drop=x\* matches none of 5 tensors"):
        dropped(tensors, ["x*"])


def test_values_beyond_float32_are_refused():
    with pytest.raises(DmfError, match="tensor w: 1 of its 2 values are not finite in float32"):
        float32("w", np.array([1, 1e300]))


def test_names_of_a_file_cannot_forge_a_line():
    text = str(DmfError("tensor a\nERROR: all good\x1b[31m\ud800" + "n" * 900))
    assert text.isprintable() and len(text) < 400 and text.startswith("tensor a?ERROR")


def test_a_folder_names_its_one_weight_file(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DmfError, match="is a directory with no weight files; it holds notes.txt"):
        read.open_file(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.pkl").write_bytes(b"\x80\x02N.")
        if name == "a":
            assert read.open_file(tmp_path).path == tmp_path / "a.pkl"
            assert "a.pkl, the one weight file" in capsys.readouterr().out
    with pytest.raises(DmfError, match="with 2 weight files; it holds a.pkl, b.pkl"):
        read.open_file(tmp_path)
