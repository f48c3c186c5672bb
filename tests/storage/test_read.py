"""Reading weight files: the values that were put in come out."""

import argparse
import collections
import hashlib
import json
import pathlib
import pickle
import struct
import sys
import types

import ml_dtypes
import numpy as np
import orbax.checkpoint as checkpoint_v0
import pytest
from flax import serialization

from dmf.errors import DmfError
from dmf.storage.readers import read
from tests.conversion import needs_torch

BF16 = ml_dtypes.bfloat16
F32 = (np.arange(24, dtype=np.float32) / 7).reshape(4, 6)
MODEL = {
    "f32": F32,
    "transposed": F32.T,
    "sliced": F32[1:3, ::2],
    "shared": F32.reshape(-1)[5:11],
    "f16": F32.astype(np.float16),
    "bf16": F32.astype(BF16),
    "f64": np.linspace(0, 1, 5),
    "i64": np.array([2**40, -1]),
    "u8": np.arange(3, dtype=np.uint8),
    "bool": np.array([[True, False, True]]),
    "parameter": F32[0] + 1,
    "scalar": np.float32(3.5),
    "empty": np.zeros((0, 3), np.float32),
    "channels_last": np.arange(48, dtype=np.float32).reshape(2, 2, 3, 4),
}
NETWORK = {
    "layers.a.weight": F32[:2, :3],
    "layers.a.bias": F32[0, :2],
    "blocks.0.weight": F32[:3, 2],
    "freqs": F32[2],
}


def module(name, **members):
    """A module with the name that a pickle holds."""
    made = types.ModuleType(name)
    for key, value in members.items():
        value.__module__, value.__qualname__ = name, key
        setattr(made, key, value)
    sys.modules[name] = made


def edm_network(torch):
    """A module whose pickle, as in EDM, is a call with its source and its fields."""

    def reconstruct(meta):
        raise AssertionError("a reader must not call this")

    class EasyDict(dict):
        pass

    class Loss:
        def __init__(self):
            self.t_to_r = self.sigmoid  # a bound method: getattr(self, "sigmoid") in a pickle

        def sigmoid(self):
            raise AssertionError("a reader must not call this")

        def __reduce__(self):
            return reconstruct, ({"class_name": "Loss", "state": self.__dict__},)

    class Net(torch.nn.Module):
        def __reduce__(self):
            source = "raise SystemExit('the source in the file was run')"
            meta = {
                "type": "class",
                "version": 6,
                "module_src": source,
                "class_name": "Net",
                "state": dict(self.__dict__),
            }
            return reconstruct, (meta,)

    module("torch_utils")
    module("torch_utils.persistence", _reconstruct_persistent_obj=reconstruct)
    module("dnnlib")
    module("dnnlib.util", EasyDict=EasyDict)
    inner, outer = Net(), Net()
    inner.weight = torch.nn.Parameter(torch.tensor(NETWORK["blocks.0.weight"]))
    linear = torch.nn.Linear(3, 2)
    linear.weight.data, linear.bias.data = (
        torch.tensor(NETWORK[f"layers.a.{x}"]) for x in ("weight", "bias")
    )
    outer.layers, outer.blocks = torch.nn.ModuleDict({"a": linear}), torch.nn.ModuleList([inner])
    outer.register_buffer("freqs", torch.tensor(NETWORK["freqs"]))
    outer.register_buffer("scratch", torch.ones(2), persistent=False)
    outer.sigma_min, outer.shape = np.float64(0.25), np.arange(3)
    return {
        "ema": outer,
        "loss_fn": Loss(),
        "dataset_kwargs": EasyDict(path="x.zip", size=EasyDict(side=32)),
    }


def write_golden(folder):
    """Writes read_{zip,legacy,edm}.pt; torch 2.13 made those of tests/golden with it."""
    import torch

    numbers = {
        name: torch.tensor(x.astype(np.float32)).bfloat16() if x.dtype == BF16 else torch.tensor(x)
        for name, x in MODEL.items()
    }
    model = collections.OrderedDict(numbers)
    model["transposed"], model["sliced"], model["shared"] = (
        model["f32"].T,
        model["f32"][1:3, ::2],
        model["f32"].view(-1)[5:11],
    )
    model["parameter"] = torch.nn.Parameter(model["parameter"])
    model["channels_last"] = model["channels_last"].to(memory_format=torch.channels_last)
    model._metadata = {"": {"version": 1}}
    saved = {
        "model": model,
        "ema": {"shadow_params": [torch.tensor(F32[0]), torch.tensor(F32[1])], "decay": 0.999},
        "args": argparse.Namespace(
            lr=1e-4, betas=(0.9, 0.95), name="run", device=torch.device("cpu")
        ),
        "numpy": np.asfortranarray(F32),
        "mean": np.float32(2.5),
        "step": 2**40,
        "last": None,
        "dtype": torch.float32,
        "size": torch.Size([2, 3]),
        "skip": {"b", "a"},
    }
    torch.save(saved, folder / "read_zip.pt")
    torch.save(saved, folder / "read_legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "read_edm.pt").write_bytes(pickle.dumps(edm_network(torch)))


@pytest.fixture(params=["stored", pytest.param("written now", marks=needs_torch)])
def folder(request, tmp_path, pytestconfig):
    """Golden files of torch 2.13, and the same from the torch that is installed."""
    if request.param == "stored":
        return pytestconfig.rootpath / "tests" / "golden"
    write_golden(tmp_path)
    return tmp_path


def same(tensor, wanted):
    got = tensor.read()
    wanted = np.asarray(wanted)
    assert (
        got.flags.c_contiguous
        and got.shape == wanted.shape == tensor.shape
        and got.dtype == wanted.dtype == tensor.dtype
    )
    assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_torch_files_give_back_what_was_put_in(folder, kind):
    weights = read.open_file(folder / f"read_{kind}.pt")
    assert weights.format == f"torch {kind}" and weights.path == folder / f"read_{kind}.pt"
    found = weights.tree
    assert list(found["model"]) == list(MODEL)
    for name, wanted in MODEL.items():
        same(found["model"][name], wanted)
    assert list(found["ema"]["shadow_params"]) == [0, 1] and found["ema"]["decay"] == 0.999
    same(found["ema"]["shadow_params"][1], F32[1])
    assert found["numpy"] == read.Inert("numpy.ndarray", {})  # not row-major
    args = {
        "lr": 1e-4,
        "betas": {0: 0.9, 1: 0.95},
        "name": "run",
        "device": read.Inert("torch.device", {0: "cpu"}),
    }
    assert found["args"] == read.Inert("argparse.Namespace", args)
    assert (found["mean"], found["step"], found["last"], found["size"]) == (
        2.5,
        2**40,
        None,
        {0: 2, 1: 3},
    )
    assert found["dtype"] == read.Inert("torch.float32", {}) and found["skip"] == {"a", "b"}


def test_an_edm_pickle_gives_its_tensors_and_not_its_source(folder):
    weights = read.open_file(folder / "read_edm.pt")
    net = weights.tree["ema"]
    assert weights.format == "pickle" and net.class_name == "Net" and "module_src" not in net.state
    tensors = read.module_tensors(net)
    assert tensors.keys() == NETWORK.keys()
    for name, wanted in NETWORK.items():
        same(tensors[name], wanted)
    same(net.state["shape"], np.arange(3))
    assert net.state["sigma_min"] == 0.25 and net.state["_buffers"]["scratch"].shape == (2,)
    assert weights.tree["loss_fn"] == read.Inert(
        "Loss", {"t_to_r": read.Inert("method", {0: "sigmoid"})}
    )
    size = read.Inert("dnnlib.util.EasyDict", {"side": 32})
    assert weights.tree["dataset_kwargs"] == read.Inert(
        "dnnlib.util.EasyDict", {"path": "x.zip", "size": size}
    )


@needs_torch
def test_an_ect_training_state_is_a_zip_with_a_network(tmp_path):
    import torch

    network = edm_network(torch)["ema"]
    torch.save(
        {"net": network, "optimizer_state": {"state": {0: {"step": torch.tensor(3.0)}}}},
        tmp_path / "state.pt",
    )
    weights = read.open_file(tmp_path / "state.pt")
    tensors = read.module_tensors(weights.tree["net"])
    assert weights.format == "torch zip" and list(tensors) == list(network.state_dict())
    for name, wanted in network.state_dict().items():
        same(tensors[name], wanted.numpy())
    assert list(read.flatten(weights.tree)) == ["optimizer_state.state.0.step"]


@needs_torch
def test_tensors_of_other_makes(tmp_path):
    import torch

    numbers = torch.tensor([0.5, 2.0])
    noted = torch.nn.Parameter(numbers), numbers.clone()
    noted[0].note = noted[1].note = "an attribute"
    callback = type("ModelCheckpoint", (), {})
    module("pytorch_lightning")
    module("pytorch_lightning.callbacks")
    module("pytorch_lightning.callbacks.model_checkpoint", ModelCheckpoint=callback)
    state = {
        "callbacks": {callback: {"best_model_score": numbers}},
        "wide": numbers[:1].expand(3, 64),
    }
    numbers = {
        "f8": numbers.to(torch.float8_e4m3fn),
        "u16": numbers.to(torch.uint16),
        "noted": noted,
        **state,
    }
    torch.save(numbers, tmp_path / "x.pt")
    found = read.open_file(tmp_path / "x.pt").tree
    for tensor in found["noted"].values():
        same(tensor, np.array([0.5, 2.0], np.float32))
    same(found["f8"], np.array([0.5, 2.0]).astype(ml_dtypes.float8_e4m3fn))
    same(found["u16"], np.array([0, 2], np.uint16))
    same(found["wide"], np.full((3, 64), 0.5, np.float32))
    same(
        found["callbacks"][f"{callback.__module__}.ModelCheckpoint"]["best_model_score"],
        np.array([0.5, 2.0], np.float32),
    )


@needs_torch
def test_data_parallel_is_a_module(tmp_path):
    import torch

    torch.save(torch.nn.DataParallel(torch.nn.Linear(3, 2)), tmp_path / "x.pt")
    assert list(read.module_tensors(read.open_file(tmp_path / "x.pt").tree)) == [
        "module.weight",
        "module.bias",
    ]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_else_stands_beside_weights(tmp_path, protocol):
    odd = {
        "big": F32.astype(">f4"),
        "columns": np.asfortranarray(F32),
        "texts": np.array(["a"]),
        "objects": np.array([None]),
    }
    plain = {
        "none": b"",
        "array": bytearray(),
        "count": collections.Counter(a=2),
        "lists": collections.defaultdict(list, a=F32),
    }
    kept = {"range": range(3), "type": np.float32, "path": pathlib.PurePosixPath("a")}
    saved = {**odd, **plain, **kept, "empty": np.zeros((0, 3)), "bytearray": bytearray(b"xy")}
    (tmp_path / "x").write_bytes(pickle.dumps(saved, protocol))
    found = read.open_file(tmp_path / "x").tree
    assert all(isinstance(found[name], read.Inert) for name in [*odd, *kept]) and found[
        "count"
    ] == {"a": 2}
    assert found["none"] == b"" and (protocol == 5 or found["array"] == b"")
    if protocol < 5:
        same(found["empty"], np.zeros((0, 3)))
        same(found["lists"]["a"], F32)


def test_an_ordered_dict_of_python_2(tmp_path):
    call = b"ccollections\nOrderedDict\n" + pickle.dumps([["w", 5], ["v", 6]], 2)[2:-1] + b"\x85R."
    (tmp_path / "x").write_bytes(b"\x80\x02" + call)
    assert read.open_file(tmp_path / "x").tree == {"w": 5, "v": 6}


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


SAFE = safetensors_bytes(
    {
        "__metadata__": {"format": "pt"},
        "b": entry("BF16", [4, 6], 100, 148),
        "a": entry("F32", [4, 6], 0, 96),
        "e": entry("F32", [0, 3], 148, 148),
        "s": entry("I32", [], 96, 100),
    },
    F32.tobytes() + struct.pack("<i", -5) + F32.astype(BF16).tobytes(),
)


def test_safetensors(tmp_path):
    (tmp_path / "x.bin").write_bytes(SAFE)
    weights = read.open_file(tmp_path / "x.bin")
    assert weights.format == "safetensors" and weights.metadata == {"format": "pt"}
    for name, wanted in {
        "a": F32,
        "b": F32.astype(BF16),
        "s": np.int32(-5),
        "e": np.zeros((0, 3), np.float32),
    }.items():
        same(weights.tree[name], wanted)


def test_safetensors_as_the_library_writes_them(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    arrays = {name: np.array(x, order="C") for name, x in MODEL.items()}
    library.save_file(arrays, tmp_path / "x", metadata={"a": "b"})
    weights = read.open_file(tmp_path / "x")
    assert weights.tree.keys() == MODEL.keys() and weights.metadata == {"a": "b"}
    for name, wanted in MODEL.items():
        same(weights.tree[name], wanted)


FLAX = {
    "step": 5,
    "ema_params": {"net": {"kernel": F32, "half": F32.astype(BF16), "one": np.array(3, np.int32)}},
    "rate": np.float64(0.25),
    "flags": [True, None, -7, "text" * 20, 1.5, 2**40],
}


@pytest.mark.parametrize("limit", [2**30, 40])
def test_flax_checkpoints_with_whole_and_with_chunked_arrays(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", limit)
    (tmp_path / "checkpoint_5").write_bytes(serialization.msgpack_serialize(FLAX))
    weights = read.open_file(tmp_path / "checkpoint_5")
    assert weights.format == "flax msgpack" and weights.tree["step"] == 5
    assert weights.tree["rate"] == read.Inert("scalar", {})
    assert list(weights.tree["flags"].values()) == FLAX["flags"]
    assert set(read.flatten(weights.tree)) == {
        f"ema_params.net.{name}" for name in ("kernel", "half", "one")
    }
    for name, wanted in FLAX["ema_params"]["net"].items():
        same(weights.tree["ema_params"]["net"][name], wanted)


def test_orbax_directories_of_a_manager_and_lists_in_them(tmp_path):
    with checkpoint_v0.CheckpointManager(tmp_path) as manager:
        manager.save(
            3, args=checkpoint_v0.args.StandardSave({"params": {"w": F32}, "layers": [F32[0]]})
        )
    for path in (tmp_path / "3", tmp_path / "3" / "default"):
        weights = read.open_file(path)
        assert (
            weights.format == "orbax"
            and weights.path == path
            and weights.tree["layers"] == read.Inert("list", {})
        )
        same(weights.tree["params"]["w"], F32)


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(SAFE)
    assert read.sha256(tmp_path / "x") == (digest := hashlib.sha256(SAFE).hexdigest())
    (tmp_path / "empty").touch()
    lines = f"{hashlib.sha256(b'').hexdigest()}  empty\n{digest}  x\n"
    assert read.sha256(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()
    with pytest.raises(DmfError, match="none: cannot be read .*; expected a readable file"):
        read.sha256(tmp_path / "none")
