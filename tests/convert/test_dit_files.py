"""Files of SiT and MeanFlow: copies, key lists of the public sizes, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from dmf.convert.meanflow_dit import MEANFLOW_DIT
from dmf.convert.rules import relative_l2
from dmf.convert.sit import SIT
from dmf.errors import DmfError
from dmf.networks import DIT_SIZES, DiTConfig
from tests import GOLDEN, conversion
from tests.convert.dits import PARITY, SILENT, reference


def test_copies_of_a_training_checkpoint():
    """The EMA is the default; a bare state dict is one copy; prefixes of wrappers go."""
    weights, _ = reference(SIT)
    ema = conversion.tensors_of(weights)
    model = conversion.tensors_of({f"module.{name}": x + 1 for name, x in weights.items()})
    checkpoint = {
        "model": model,
        "ema": ema,
        "opt": {"state": {0: {"step": 1}}},
        "args": "Namespace",
    }

    def bias(tree, which=""):
        tensors, copy = SIT.select(tree, which)
        assert tensors.keys() == weights.keys()
        return copy, float(
            tensors["x_embedder.proj.bias"].read()[0] - weights["x_embedder.proj.bias"][0]
        )

    assert bias(checkpoint) == ("ema", 0) and bias(checkpoint, "ema") == ("ema", 0)
    assert bias(checkpoint, "model") == ("model", pytest.approx(1, abs=1e-6))
    assert bias({"model": model}) == ("model", pytest.approx(1, abs=1e-6))
    assert bias(ema) == ("flat", 0) and bias(ema, "flat") == ("flat", 0)
    with pytest.raises(DmfError, match=r"copy=ema is not in this file: expected flat"):
        SIT.select(ema, "ema")
    with pytest.raises(DmfError, match=r"copy=flat is not in this file: expected ema or model"):
        SIT.select(checkpoint, "flat")


def test_each_copy_gives_its_own_outputs():
    """Outputs of the reference for both copies; the raw weights come from another seed."""
    weights, io = reference(SIT)
    with (
        np.load(GOLDEN / "sit_tiny_io.npz") as data,
        np.load(GOLDEN / "sit_tiny_model_io.npz") as other,
    ):
        want = {"ema": io["out"], "model": other["out"]}
        model = conversion.recipe_weights(dict(data) | dict(other))
    for which, out in want.items():
        _, _, network, params = conversion.convert_arrays(
            SIT, {"model": model, "ema": weights}, {"heads": 4}, which
        )
        assert relative_l2(SIT.outputs(network, params, io)["out"], out) <= PARITY


def test_copies_of_a_flax_train_state():
    weights, _ = reference(MEANFLOW_DIT)

    def tree(offset):
        nested = {}
        for name, x in weights.items():
            *rooms, leaf = name.split(".")
            node = nested
            for room in rooms:
                node = node.setdefault(room, {})
            node[leaf] = conversion.tensors_of({"": x + offset})[""]
        return nested

    state = {
        "step": 7,
        "params": tree(1),
        "ema_params": tree(0),
        "opt_state": {"0": {"mu": tree(2)}},
    }
    name = "net.blocks.layers_1.attn.qkv._flax_linear.bias"
    for found, which, copy, offset in (
        (state, "", "ema", 0),
        (state, "params", "params", 1),
        (tree(0), "", "flat", 0),
        (conversion.tensors_of(weights), "", "flat", 0),
    ):
        tensors, taken = MEANFLOW_DIT.select(found, which)
        assert taken == copy and tensors.keys() == weights.keys()
        np.testing.assert_allclose(tensors[name].read() - weights[name], offset, atol=1e-6)


def halved(shapes):
    """The key list of B/2 at the width of S/2: halves every axis that grows with the width."""
    return {
        name: tuple(n // 2 if n % 768 == 0 else n for n in shape) for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("kind", "keys", "change", "size", "patch", "tensors"),
    [
        (SIT, "keys_sit-b-2.txt", halved, "S", 2, 132),
        (SIT, "keys_sit-b-2.txt", dict, "B", 2, 132),
        (SIT, "keys_sit-xl-2.txt", dict, "XL", 2, 292),
        (MEANFLOW_DIT, "keys_meanflow-b-4.txt", dict, "B", 4, 135),
    ],
)
def test_every_tensor_and_every_leaf_of_the_public_sizes_has_one_place(
    kind, keys, change, size, patch, tensors
):
    shapes = change(conversion.key_list(GOLDEN / keys))
    config, shape = conversion.check_names(kind, shapes)
    assert (config, shape) == (
        DiTConfig(**DIT_SIZES[size], patch=patch, num_classes=1000),
        (32, 32, 4),
    )
    exported = [name for rule in kind.rules(config, shape, None) for name in rule.tensors]
    assert len(shapes) == tensors and set(exported) - set(SILENT) == set(shapes)


@pytest.mark.parametrize("resolution", [32, 64])
def test_image_size_is_read_off_the_position_table(resolution):
    shapes = conversion.key_list(GOLDEN / "keys_sit-b-2.txt") | {
        "pos_embed": (1, (resolution // 2) ** 2, 768)
    }
    assert conversion.check_names(SIT, shapes)[1] == (resolution, resolution, 4)
    del shapes["pos_embed"]
    assert conversion.check_names(SIT, shapes, {"resolution": resolution})[1] == (
        resolution,
        resolution,
        4,
    )


SIT_ERRORS = [
    (
        {"pos_embed": (1, 64, 96)},
        {},
        "no tensor x_embedder.proj.weight among 1 .*pos_embed.*kind sit",
    ),
    (
        {"x_embedder.proj.weight": (96, 4)},
        {},
        r"x_embedder.proj.weight has shape \[96, 4\]: expected 4 axes",
    ),
    (
        {"x_embedder.proj.weight": (0, 4, 2, 2)},
        {},
        r"x_embedder.proj.weight has shape \[0, 4, 2, 2\]: expected .* none empty",
    ),
    ({"blocks.9.attn.proj.bias": (96,)}, {}, r"tensor blocks.9.attn.proj.bias \[96\] has no place"),
    (
        {"final_layer.linear.weight": (48, 96)},
        {},
        "final_layer.linear.weight has 48 rows: expected 16 .*2x2.*twice",
    ),
    ({"pos_embed": (1, 60, 96)}, {}, "pos_embed has 60 rows: expected a square number"),
    ({"pos_embed": None}, {}, "no tensor pos_embed.*--set=resolution=N"),
    ({"y_embedder.embedding_table.weight": (1, 96)}, {}, "embedding_table.weight has 1 row"),
    (
        {"blocks.1.attn.q_norm.weight": (24,)},
        {},
        "blocks.1.attn.q_norm.weight normalises queries or keys",
    ),
    (
        {},
        {"heads": None},
        "number of attention heads, and width 96 with depth 3 .*S, B, M, L, XL.*--set=heads=N",
    ),
    ({}, {"heads": 0}, "--set=heads is 0; expected an integer of at least 1"),
    ({}, {"heads": "four"}, "--set=heads is 'four'; expected an integer"),
    ({}, {"resolution": 32}, "--set=resolution=32: expected 16: pos_embed has 64 rows"),
    ({}, {"width": 96}, "--set=width=96: expected heads or resolution for kind sit"),
    (
        {"blocks.1.mlp.fc1.weight": (300, 96)},
        {},
        r"blocks.1.mlp.fc1.weight has shape \[300, 96\]: expected \[384, 96\]",
    ),
    ({"pos_embed": (1, 64, 48)}, {}, r"pos_embed has shape \[1, 64, 48\]: expected \[1, 64, 96\]"),
    ({"blocks.1.attn.proj.bias": None}, {}, "tensor blocks.1.attn.proj.bias is missing"),
    ({"h_embedder.mlp.0.weight": (96, 256)}, {}, "no tensor h_embedder.mlp.0.bias"),
    ({"repa.0.weight": (8, 8)}, {}, r"tensor repa.0.weight \[8, 8\] has no place"),
]


@pytest.mark.parametrize(("changes", "given", "message"), SIT_ERRORS)
def test_errors_of_sit_name_the_tensor_or_the_field(changes, given, message):
    shapes = {name: x.shape for name, x in reference(SIT)[0].items()}
    shapes = (
        changes
        if "among 1" in message
        else {k: v for k, v in (shapes | changes).items() if v is not None}
    )
    given = {k: v for k, v in ({"heads": 4} | given).items() if v is not None}
    with pytest.raises(DmfError, match=message):
        conversion.check_names(SIT, shapes, given)


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        (
            {"net.x_embedder.proj.kernel": None},
            {},
            "no tensor net.x_embedder.proj.kernel .*kind meanflow_dit",
        ),
        (
            {"net.x_embedder.proj.kernel": (16, 48)},
            {},
            r"proj.kernel has shape \[16, 48\]: expected 4 axes",
        ),
        ({}, {"heads": None}, "width 48 with depth 2 .*--set=heads=N"),
        ({}, {"depth": 2}, "--set=depth=2: expected heads or resolution for kind meanflow_dit"),
        (
            {"net.h_embedder.mlp.layers_2._flax_linear.bias": None},
            {},
            "h_embedder.mlp.layers_2._flax_linear.bias is missing",
        ),
    ],
)
def test_errors_of_meanflow_name_the_tensor_or_the_field(changes, given, message):
    shapes = {name: x.shape for name, x in reference(MEANFLOW_DIT)[0].items()}
    shapes = {k: v for k, v in (shapes | changes).items() if v is not None}
    with pytest.raises(DmfError, match=message):
        conversion.check_names(
            MEANFLOW_DIT, shapes, {k: v for k, v in ({"heads": 3} | given).items() if v is not None}
        )


def test_weights_of_the_other_kind_are_refused():
    for kind, other in ((SIT, MEANFLOW_DIT), (MEANFLOW_DIT, SIT)):
        with pytest.raises(DmfError, match=f"no tensor .*expected the weights of kind {kind.name}"):
            conversion.convert_arrays(kind, reference(other)[0], {"heads": 4})
