"""SiT and MeanFlow transformers: equal to other implementations, the fold and its inverse."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.convert.meanflow_dit import MEANFLOW_DIT
from dmf.convert.rules import relative_l2
from dmf.convert.sit import SIT
from dmf.errors import DmfError
from dmf.networks import DIT_SIZES, DiTConfig
from dmf.networks.layers import frequencies
from tests import GOLDEN, conversion
from tests.conversion import needs_torch

PARITY = 5e-6  # relative L2: float32 round-off between two implementations of the same network
FOLDED = {"t_embedder.mlp.0.weight", "final_layer.linear.weight", "final_layer.linear.bias"}
SILENT = [f"h_embedder.mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")]


@functools.cache
def reference(kind):
    """(weights, inputs and outputs) of the reference network of a kind."""
    name = {SIT: "sit_tiny_io.npz", MEANFLOW_DIT: "meanflow_dit_tiny_io.npz"}[kind]
    with np.load(GOLDEN / name) as data:
        io = {key: data[key] for key in data.files if "/" not in key}
        return conversion.recipe_weights(data), {"heads": np.array(4)} | io


@functools.cache
def converted(kind):
    """(config, image shape, network, params) of the reference network."""
    weights, io = reference(kind)
    given = {"heads": int(io["heads"])} | ({"resolution": 8} if kind is MEANFLOW_DIT else {})
    return conversion.convert_arrays(kind, weights, given)


def torch_outputs(kind, weights, arrays):
    import torch

    return kind.torch_outputs({name: torch.from_numpy(x) for name, x in weights.items()}, arrays)


def with_interval(weights):
    """SiT's weights with an interval embedder: the time embedder's shapes, other values."""
    return weights | {name: 0.5 * weights[name.replace("h_", "t_")][::-1].copy() for name in SILENT}


@pytest.mark.parametrize("kind", [SIT, MEANFLOW_DIT], ids=lambda kind: kind.name)
def test_converted_network_equals_the_reference(kind):
    """Outputs of SiT at its time and sign, and of MeanFlow's network at intervals from 0 to 1."""
    _, io = reference(kind)
    _, _, network, params = converted(kind)
    ((name, ours),) = kind.outputs(network, params, io).items()
    assert ours.shape == io[name].shape
    assert relative_l2(ours, io[name]) <= PARITY
    assert kind.outputs(network, params, {"out": io[name]}) == {}


@needs_torch
@pytest.mark.parametrize("kind", [SIT, MEANFLOW_DIT], ids=lambda kind: kind.name)
def test_torch_forward_equals_the_reference(kind):
    weights, io = reference(kind)
    ((name, theirs),) = torch_outputs(kind, weights, io).items()
    assert relative_l2(theirs, io[name]) <= PARITY


@needs_torch
@pytest.mark.parametrize("kind", [SIT, MEANFLOW_DIT], ids=lambda kind: kind.name)
def test_forward_check_on_the_probe(kind):
    weights, _ = reference(kind)
    config, shape, network, params = converted(kind)
    arrays = kind.probe(config, shape)
    theirs = torch_outputs(kind, weights, arrays)
    ours = kind.outputs(network, params, arrays)
    assert ours.keys() == theirs.keys() and all(
        relative_l2(ours[k], theirs[k]) <= PARITY for k in ours
    )
    assert len(set(arrays["t"])) == len(arrays["t"]) and config.num_classes in arrays["y"]


@needs_torch
def test_sit_with_an_interval_embedder_and_without_sigma_table_or_labels():
    """Our exports may hold h_embedder and velocity rows alone, and lack both tables."""
    weights, _ = reference(SIT)
    weights = with_interval(
        {k: x for k, x in weights.items() if k != "pos_embed" and not k.startswith("y_")}
    )
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[name] = np.concatenate([weights[name][8 * i : 8 * i + 4] for i in range(4)])
    config, shape, network, params = conversion.convert_arrays(
        SIT, weights, {"heads": 4, "resolution": 12}
    )
    assert shape == (12, 12, 4) and config.num_classes == 0
    arrays = SIT.probe(config, shape)
    ours, theirs = SIT.outputs(network, params, arrays), torch_outputs(SIT, weights, arrays)
    assert relative_l2(ours["out"], theirs["out"]) <= PARITY
    assert (
        relative_l2(
            SIT.outputs(network, params, arrays | {"h": 0 * arrays["h"]})["out"], ours["out"]
        )
        > 1e-3
    )


def test_converted_sit_is_a_flow_model_with_a_living_interval_branch():
    """u(z, r, t) has the same bits for every r; a gradient step wakes both layers of the branch."""
    _, io = reference(SIT)
    _, _, network, params = converted(SIT)
    z, y, t = (
        io["x"].transpose(0, 2, 3, 1),
        io["y"].astype(np.int32),
        np.float32([1, 0.9, 0.4, 0.2]),
    )

    @jax.jit
    def loss(params, r):
        def square(params):
            u = network.apply(params, z, r, t, label=y)
            return jnp.mean((u - 1) ** 2), u

        (_, u), gradient = jax.value_and_grad(square, has_aux=True)(params)
        return u, gradient["interval"]

    u, _ = loss(params, t)
    assert (
        relative_l2(
            u, -SIT.outputs(network, params, io | {"t": 1 - t})["out"].transpose(0, 2, 3, 1)
        )
        <= PARITY
    )
    for r in (0 * t, t / 3):
        here, gradient = loss(params, r)
        assert np.array_equal(here, u)
    assert not np.any(params["interval"]["mlp_2"]["kernel"]) and not np.any(
        params["interval"]["mlp_2"]["bias"]
    )
    assert np.abs(gradient["mlp_2"]["kernel"]).max() > 1e-4
    stepped = params | {"interval": jax.tree.map(lambda p, g: p - g, params["interval"], gradient)}
    awake, gradient = loss(stepped, t / 3)
    assert relative_l2(awake, u) > 1e-4
    assert np.abs(gradient["mlp_0"]["kernel"]).max() > 1e-6


def test_time_is_reversed_exactly():
    """In float64: folded layer on features of t = the file's layer on features of 1 - t.

    Folding twice gives the file's layer back.
    """
    config, shape, _, _ = converted(SIT)
    (rule,) = (
        r for r in SIT.rules(config, shape, None) if r.tensors == ("t_embedder.mlp.0.weight",)
    )
    rng = np.random.default_rng(0)
    weight, t = rng.standard_normal((96, 256)), rng.uniform(size=(50, 1))

    def features(t):
        return np.concatenate(
            (
                np.cos(t * frequencies(128, endpoint=False)),
                np.sin(t * frequencies(128, endpoint=False)),
            ),
            1,
        )

    (kernel,) = rule.forward(weight)
    np.testing.assert_allclose(features(t) @ kernel, features(1 - t) @ weight.T, atol=1e-12)
    np.testing.assert_allclose(rule.backward(kernel)[0], weight, atol=1e-12)


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


def test_sit_comes_back_from_an_export():
    """The same names come back, and no tensor of a silent branch.

    Copies are exact, folded layers within 1e-6, and the variance half is zero.
    """
    weights, _ = reference(SIT)
    back = conversion.export_arrays(SIT, *converted(SIT))
    assert back.keys() == weights.keys()
    for name, x in weights.items():
        if name in FOLDED and name.startswith("final"):
            rows, zeros = x.reshape(4, 8, -1).copy(), back[name].reshape(4, 8, -1)[:, 4:]
            rows[:, 4:] = 0
            assert not np.any(zeros) and np.array_equal(back[name], rows.reshape(x.shape)), name
        elif name in FOLDED | {"pos_embed"}:
            assert relative_l2(back[name], x) <= 1e-6, name
        else:
            assert np.array_equal(back[name], x), name


def test_trained_interval_branch_is_exported_and_read_back():
    config, shape, network, params = converted(SIT)
    params = conversion.small_noise(params)
    back = conversion.export_arrays(SIT, config, shape, network, params)
    assert set(SILENT) <= back.keys()
    again = conversion.convert_arrays(SIT, back, {"heads": config.heads})
    assert again[:2] == (config, shape)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), again[3], params)


def test_meanflow_comes_back_bit_for_bit():
    weights, _ = reference(MEANFLOW_DIT)
    back = conversion.export_arrays(MEANFLOW_DIT, *converted(MEANFLOW_DIT))
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], x) for name, x in weights.items())


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


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_file_keeps_its_weights_and_its_rounded_position_table_passes(dtype):
    """A table of another layout does not pass."""
    weights = {name: x.astype(dtype) for name, x in reference(SIT)[0].items()}
    config, shape, network, params = conversion.convert_arrays(SIT, weights, {"heads": 4})
    assert np.array_equal(
        params["x_embedder"]["proj"]["bias"], weights["x_embedder.proj.bias"].astype(np.float32)
    )
    back = conversion.export_arrays(SIT, config, shape, network, params)
    assert relative_l2(back["pos_embed"], weights["pos_embed"]) > 1e-5
    weights["pos_embed"] = np.roll(weights["pos_embed"], 1, axis=1)
    with pytest.raises(DmfError, match="tensor pos_embed: other values"):
        conversion.convert_arrays(SIT, weights, {"heads": 4})


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
    ({}, {"width": 96}, "--set=width=96: expected one of heads, resolution"),
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
        ({}, {"depth": 2}, "--set=depth=2: expected one of heads, resolution"),
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
