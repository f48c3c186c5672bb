"""SiT and MeanFlow transformers: equal to other implementations, the fold and its inverse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.convert.direction import Direction, turned
from dmf.convert.meanflow_dit import MEANFLOW_DIT
from dmf.convert.meanflow_sit import MEANFLOW_SIT
from dmf.convert.rules import relative_l2
from dmf.convert.sit import SIT
from dmf.errors import DmfError
from dmf.networks.layers import frequencies
from tests import conversion
from tests.conversion import needs_torch
from tests.convert.dits import PARITY, SILENT, converted, reference

ALL = (SIT, MEANFLOW_DIT, MEANFLOW_SIT)
FOLDED = {"t_embedder.mlp.0.weight", "final_layer.linear.weight", "final_layer.linear.bias"}


def torch_outputs(kind, weights, arrays):
    import torch

    return kind.torch_outputs({name: torch.from_numpy(x) for name, x in weights.items()}, arrays)


def with_interval(weights):
    """SiT's weights with an interval embedder: the time embedder's shapes, other values."""
    return weights | {name: 0.5 * weights[name.replace("h_", "t_")][::-1].copy() for name in SILENT}


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_converted_network_equals_the_reference(kind):
    """Outputs of SiT at its time and sign, and of MeanFlow's network at intervals from 0 to 1."""
    _, io = reference(kind)
    _, _, network, params = converted(kind)
    ((name, ours),) = kind.outputs(network, params, io).items()
    assert ours.shape == io[name].shape
    assert relative_l2(ours, io[name]) <= PARITY
    assert kind.outputs(network, params, {"out": io[name]}) == {}


@needs_torch
@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_torch_forward_equals_the_reference(kind):
    weights, io = reference(kind)
    ((name, theirs),) = torch_outputs(kind, weights, io).items()
    assert relative_l2(theirs, io[name]) <= PARITY


@needs_torch
@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
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


@pytest.mark.parametrize("name", ["r_embedder", "h_embedder"])
def test_meanflows_second_embedder_sees_the_interval_or_r_itself(name):
    """Either name; with second = r the same weights see r, which is another network."""
    weights, io = reference(MEANFLOW_SIT)
    weights = {key.replace("r_embedder", name): x for key, x in weights.items()}
    config, shape, network, params = conversion.convert_arrays(MEANFLOW_SIT, weights, {"heads": 4})
    assert (config.interval_input, config.num_classes, shape) == ("t-r", 5, (8, 8, 4))
    given = {"heads": 4, "second": "r"}
    other, _, sees_r, same = conversion.convert_arrays(MEANFLOW_SIT, weights, given)
    assert other.interval_input == "r" and jax.tree.all(jax.tree.map(np.array_equal, same, params))
    mirrored = MEANFLOW_SIT.outputs(sees_r, params, io | {"r": io["t"] - io["r"]})["u"]
    assert relative_l2(mirrored, io["u"]) <= PARITY
    assert relative_l2(MEANFLOW_SIT.outputs(sees_r, params, io)["u"], io["u"]) > 0.01


@needs_torch
def test_pytorch_sees_r_where_our_network_does():
    weights, _ = reference(MEANFLOW_SIT)
    given = {"heads": 4, "second": "r"}
    config, shape, network, params = conversion.convert_arrays(MEANFLOW_SIT, weights, given)
    arrays = MEANFLOW_SIT.probe(config, shape)
    theirs = torch_outputs(MEANFLOW_SIT, weights, arrays)["u"]
    assert relative_l2(MEANFLOW_SIT.outputs(network, params, arrays)["u"], theirs) <= PARITY


def test_meanflows_transformer_and_its_second_embedder_are_told_apart():
    weights, _ = reference(MEANFLOW_SIT)
    flow = {name: x for name, x in weights.items() if not name.startswith("r_")}
    both = weights | {name.replace("r_embedder", "h_embedder"): x for name, x in weights.items()}
    cases = [
        (MEANFLOW_SIT, flow, {}, "second embedders in the file: none; expected one of r_embedder"),
        (MEANFLOW_SIT, both, {}, "in the file: r_embedder and h_embedder; expected one of"),
        (MEANFLOW_SIT, weights, {"second": "s"}, "--set=second is 's'; expected"),
        (MEANFLOW_SIT, weights, {"depth": 2}, "--set=depth=2: expected heads or resolution or sec"),
        (SIT, weights, {}, "has an r_embedder, as MeanFlow's: expected --kind=meanflow_sit"),
    ]
    for kind, file, given, message in cases:
        with pytest.raises(DmfError, match=message):
            conversion.convert_arrays(kind, file, {"heads": 4, **given})
    config, shape, _, _ = conversion.convert_arrays(
        MEANFLOW_SIT, weights, {"heads": 4, "second": "r"}
    )
    reversed_time = Direction("noise_at_0", "noise_minus_data", other_time=True)
    with pytest.raises(DmfError, match="second=r,time=noise_at_0: expected second=t-r or the oth"):
        turned(MEANFLOW_SIT.rules(config, shape, None), config, reversed_time)
    for kind in (SIT, MEANFLOW_DIT):  # whose programs know no such network
        with pytest.raises(DmfError, match="network.interval_input is 'r': expected 't-r'"):
            kind.rules(config, shape, None)


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
