"""EDM's and MeanFlow's U-Nets: equal to the references, full-size key lists, the way back."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.convert.edm import EDM
from dmf.convert.meanflow_unet import MEANFLOW_UNET
from dmf.convert.rules import relative_l2
from dmf.networks import Condition, UNetConfig, build
from tests.conversion import (
    convert_arrays,
    export_arrays,
    needs_torch,
)
from tests.convert.unets import (
    CASES,
    LABEL,
    LAYER0,
    OUTPUTS,
    PARITY,
    VP,
    converted,
    fast,
    stored,
    torch_outputs,
)


def single_time():
    """The MeanFlow weights of a flow model: no columns for t - r."""
    _, _, weights = stored("meanflow")
    width = weights[LAYER0].shape[1] // 2
    return weights | {LAYER0: weights[LAYER0][:, :width], LABEL: weights[LABEL][:width]}


@pytest.mark.parametrize("case", CASES)
def test_the_converted_network_equals_the_reference(case):
    """MeanFlow: u with and without label, and du/dt. EDM: D = z - t v, with and without label.

    The case edm_classes is given classes, and in one row none.
    """
    kind, data, _ = stored(case)
    _, _, network, params = converted(case)
    got = kind.outputs(network, params, data)
    assert set(got) == OUTPUTS[case]
    for name, value in got.items():
        assert relative_l2(value, data[name]) <= PARITY, name
    assert relative_l2(*(got[name] for name in list(got)[:2])) > 1e-3


@needs_torch
@pytest.mark.parametrize("case", CASES)
def test_the_pytorch_network_equals_the_reference(case):
    kind, data, weights = stored(case)
    got = torch_outputs(kind, weights, data)
    assert set(got) == OUTPUTS[case] | ({"F_raw"} if case == "edm" else set())
    for name, value in got.items():
        assert relative_l2(value, data[name]) <= PARITY, name


def test_edm_network_inside_its_wrapper():
    """F(x, c_noise) is our U-Net without the wrapper, at the t with ln(sigma) / 4 = c_noise."""
    _, data, _ = stored("edm")
    config, shape, _, params = converted("edm")
    sigma = np.exp(4 * data["c_noise"].astype(np.float64))
    t = (sigma / (1 + sigma)).astype(np.float32)
    network = fast(dataclasses.replace(config, precond="none"), shape)
    got = network.apply(params, data["F_in"].transpose(0, 2, 3, 1), t, t)
    # Fourier features of frequencies up to 40 enlarge the rounding of t:
    # 6e-8 / 4 t (1 - t) * 2 pi * 40.
    assert relative_l2(np.asarray(got).transpose(0, 3, 1, 2), data["F_raw"]) <= 2e-5


def test_edm_velocity_is_the_reference_denoiser_and_regular():
    """v = (z - D) / t of the stored D, where t does not enlarge the rounding of D.

    v and its JVP are finite at and near both ends.
    """
    _, data, _ = stored("edm")
    _, _, network, params = converted("edm")
    sigma = data["sigma"][:, None, None, None].astype(np.float64)
    t, z = sigma / (1 + sigma), data["x"] / (1 + sigma)
    times, rows = t.astype(np.float32)[:, 0, 0, 0], z.astype(np.float32).transpose(0, 2, 3, 1)
    v = np.asarray(network.apply(params, rows, times, times)).transpose(0, 3, 1, 2)
    large = data["sigma"] > 0.1
    assert large.sum() == 3
    assert relative_l2(v[large], ((z - data["D"]) / t)[large]) <= PARITY
    for ends in ([0, 1e-6, 0.5, 1 - 1e-6], [1.0] * 4):
        t = jnp.asarray(ends, jnp.float32)
        value, slope = jax.jvp(
            lambda z, t: network.apply(params, z, t, t), (rows, t), (rows, jnp.ones_like(t))
        )
        assert np.isfinite(value).all() and np.isfinite(slope).all()
        assert np.abs(value).max() < 1e3


@pytest.mark.parametrize("case", ["single_time", "edm"])
def test_a_network_of_one_time_ignores_r(case):
    """u(z, r, t) = v(z, t) bit for bit, with and without label.

    A flow model is MeanFlow's network with the first layer [W_t | 0].
    """
    if case == "edm":
        _, data, _ = stored("edm")
        (_, _, network, params), z, label = converted("edm"), data["x"], data["augment_labels"]
    else:
        _, data, weights = stored("meanflow")
        _, _, _, params = convert_arrays(MEANFLOW_UNET, single_time())
        (_, _, network, whole), z, label = converted("meanflow"), data["z"], data["aug_cond"]
        columns = params["map_layer0"]["kernel"], whole["map_layer0"]["kernel"]
        assert np.array_equal(*columns) and np.array_equal(
            params["map_augment"]["kernel"][:, :64], weights[LABEL][:64].T
        )
    assert not np.any(params["interval"]["kernel"])
    z, t = z.transpose(0, 2, 3, 1), np.float32([1, 0.7, 0.5, 0.05])
    for kwargs in ({}, {"condition": Condition(augment=label)}):
        at_t = network.apply(params, z, t, t, **kwargs)
        assert np.array_equal(network.apply(params, z, t * np.float32(0.3), t, **kwargs), at_t)
        assert np.std(at_t) > 0.05


@needs_torch
def test_single_time_flow_equals_pytorch():
    _, data, _ = stored("meanflow")
    _, _, _, params = convert_arrays(MEANFLOW_UNET, single_time())
    got = MEANFLOW_UNET.outputs(converted("meanflow")[2], params, data)
    want = torch_outputs(MEANFLOW_UNET, single_time(), data)
    for name in ("u_noaug", "u_aug", "dudt_aug"):
        assert relative_l2(got[name], want[name]) <= PARITY


@pytest.mark.parametrize("case", CASES)
def test_the_way_back_is_exact(case):
    """Every tensor comes back bit for bit under its name, the filters made anew.

    A label layer comes back up to the rounding of its table.
    """
    kind, _, weights = stored(case)
    config, shape, network, params = converted(case)
    back = export_arrays(kind, config, shape, network, params)
    assert {name: x.shape for name, x in back.items()} == {
        name: x.shape for name, x in weights.items()
    }
    folded = {"model.map_label.weight"}
    assert all(np.array_equal(back[name], weights[name]) for name in set(weights) - folded)


def test_edms_label_layer_becomes_a_table_with_a_row_for_no_class():
    kind, data, weights = stored("edm_classes")
    config, shape, network, params = converted("edm_classes")
    table = np.asarray(params["map_label"]["embedding_table"]["embedding"])
    layer, bias = (weights[f"model.map_label.{part}"] for part in ("weight", "bias"))
    assert config.num_classes == 5 and table.shape == (6, 8)
    np.testing.assert_allclose(table[:5], math.sqrt(5) * layer.T + bias, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(table[5], bias)
    exported = export_arrays(kind, config, shape, network, params)
    np.testing.assert_allclose(exported["model.map_label.weight"], layer, rtol=1e-5, atol=1e-6)
    # Without a class the denoiser is another one, so the comparison above sees the table.
    some, none = (
        kind.outputs(network, params, data | {"class_labels": hot})["D"][:3]
        for hot in (data["class_labels"], 0 * data["class_labels"])
    )
    assert relative_l2(some, none) > 0.05


def test_query_key_value_are_interleaved_in_edm_alone():
    name = "model.enc.8x8_block0.qkv"
    _, _, weights = stored("edm")
    kernel = converted("edm")[3]["enc"]["8x8_block0"]["qkv"]["kernel"]
    channels = kernel.shape[-1] // 3
    for j in range(3):
        want = weights[f"{name}.weight"][j::3, :, 0, 0].T
        assert np.array_equal(kernel[0, 0, :, j * channels : (j + 1) * channels], want)
    plain = converted("meanflow")[3]["enc"]["8x8_block0"]["qkv"]["kernel"]
    assert np.array_equal(
        plain[0, 0].T, stored("meanflow")[2]["enc.8x8_block0.qkv.weight"][:, :, 0, 0]
    )


# At three resolutions, the second image of the residual encoder is made from the first sum.
VE = UNetConfig(
    channels=8,
    channel_mult=(1, 2, 2),
    blocks=1,
    attention_resolutions=(4,),
    dropout=0.13,
    augment_dim=9,
    residual_encoder=True,
    embedding="fourier",
    time_input="log_sigma",
    precond="edm",
)


def drawn(config, shape, silent=()):
    """A network and dense random values for all its leaves, zero under the `silent` modules."""
    network, rng = build(config, shape), np.random.default_rng(5)
    shapes = jax.eval_shape(network.init, jax.random.key(0))

    def draw(path, leaf):
        scale = 0 if path[0].key in silent else 1 / math.sqrt(max(1, math.prod(leaf.shape[:-1])))
        return scale * rng.standard_normal(leaf.shape).astype(np.float32)

    return network, jax.tree_util.tree_map_with_path(draw, shapes)


@needs_torch
@pytest.mark.parametrize("trained", [False, True], ids=["denoiser", "trained interval"])
@pytest.mark.parametrize("form", [VP, VE], ids=["vp", "ve"])
def test_edm_equals_pytorch_there_and_back(form, trained):
    """Exported, run by PyTorch, and read again: DDPM++ with sigma_data = 0.7, and NCSN++.

    So are networks that were trained with an interval.
    """
    network, params = drawn(form, (16, 16, 3), () if trained else ("interval",))
    if not trained:
        params["map_augment"]["kernel"][:, form.noise_width :] = 0
    weights = export_arrays(EDM, form, (16, 16, 3), network, params)
    assert ("model.interval.weight" in weights) == trained
    assert weights["model.map_augment.weight"].shape == ((1 + trained) * form.noise_width, 9)
    config, shape, _, again = convert_arrays(EDM, weights, {"sigma_data": form.sigma_data})
    assert (config, shape) == (form, (16, 16, 3))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
    arrays = EDM.probe(config, shape)
    got, want = EDM.outputs(fast(config, shape), again, arrays), torch_outputs(EDM, weights, arrays)
    for name in ("D", "D_aug"):
        assert relative_l2(got[name], want[name]) <= PARITY


@needs_torch
def test_probes_are_read_by_both():
    """As in the command: both give the same names. t is exact, which Fourier features need."""
    for case in CASES:
        kind, _, weights = stored(case)
        config, shape, network, params = converted(case)
        arrays = kind.probe(config, shape)
        got, want = kind.outputs(network, params, arrays), torch_outputs(kind, weights, arrays)
        assert set(got) == set(want) and len(got) >= 2
        assert max(relative_l2(got[name], want[name]) for name in got) <= PARITY
