"""EDM's and MeanFlow's U-Nets: equal to the references, full-size key lists, the way back."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.convert.edm import EDM
from dmf.convert.meanflow_unet import MEANFLOW_UNET
from dmf.convert.rules import relative_l2
from dmf.errors import DmfError
from dmf.networks import Condition, UNetConfig, build
from dmf.storage.readers.read import Inert
from tests import GOLDEN
from tests.conversion import (
    check_names,
    convert_arrays,
    export_arrays,
    key_list,
    needs_torch,
    recipe_weights,
    tensors_of,
)

PARITY = 5e-6  # relative L2: float32 round-off between two implementations of the same network
CASES = {"meanflow": (MEANFLOW_UNET, "pymf_tiny_io.npz"), "edm": (EDM, "edm_tiny_ncsnpp_io.npz")}
LAYER0, LABEL = "map_layer0.weight", "map_augment.weight"


@functools.cache
def stored(case):
    """(kind, arrays of the reference, its weights)."""
    kind, name = CASES[case]
    data = dict(np.load(GOLDEN / name))
    return kind, data, recipe_weights(data)


@functools.cache
def fast(config, shape):
    """The network compiled without LLVM's optimisations to save seconds."""
    network = build(config, shape)
    return network._replace(
        apply=jax.jit(network.apply, compiler_options={"xla_backend_optimization_level": 0})
    )


@functools.cache
def converted(case):
    kind, _, weights = stored(case)
    config, shape, _, params = convert_arrays(kind, weights)
    return config, shape, fast(config, shape), params


def torch_outputs(kind, weights, arrays):
    import torch

    return kind.torch_outputs(
        {name: torch.from_numpy(np.array(x)) for name, x in weights.items()}, arrays
    )


def single_time():
    """The MeanFlow weights of a flow model: no columns for t - r."""
    _, _, weights = stored("meanflow")
    width = weights[LAYER0].shape[1] // 2
    return weights | {LAYER0: weights[LAYER0][:, :width], LABEL: weights[LABEL][:width]}


@pytest.mark.parametrize("case", CASES)
def test_the_converted_network_equals_the_reference(case):
    """MeanFlow: u with and without label, and du/dt. EDM: D = z - t v, with and without label."""
    kind, data, _ = stored(case)
    _, _, network, params = converted(case)
    got = kind.outputs(network, params, data)
    assert set(got) == {"meanflow": {"u_noaug", "u_aug", "dudt_aug"}, "edm": {"D", "D_aug"}}[case]
    for name, value in got.items():
        assert relative_l2(value, data[name]) <= PARITY, name
    assert relative_l2(*(got[name] for name in list(got)[:2])) > 1e-3


@needs_torch
@pytest.mark.parametrize("case", CASES)
def test_the_pytorch_network_equals_the_reference(case):
    kind, data, weights = stored(case)
    got = torch_outputs(kind, weights, data)
    assert (
        set(got)
        == {"meanflow": {"u_noaug", "u_aug", "dudt_aug"}, "edm": {"D", "D_aug", "F_raw"}}[case]
    )
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
    """Every tensor comes back bit for bit under its name, the filters made anew."""
    kind, _, weights = stored(case)
    config, shape, network, params = converted(case)
    back = export_arrays(kind, config, shape, network, params)
    assert {name: x.shape for name, x in back.items()} == {
        name: x.shape for name, x in weights.items()
    }
    assert all(np.array_equal(back[name], weights[name]) for name in weights)


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


VP = UNetConfig(
    channels=8,
    channel_mult=(1, 2),
    blocks=1,
    attention_resolutions=(8,),
    dropout=0.13,
    augment_dim=9,
    resample="box",
    embedding_mult=1,
    time_input="log_sigma",
    precond="edm",
    sigma_data=0.7,
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


FULL = {
    "pymf_unet": (MEANFLOW_UNET, UNetConfig(), 0),
    "edm_vp_ddpmpp": (
        EDM,
        UNetConfig(
            dropout=0.13,
            augment_dim=9,
            resample="box",
            embedding_mult=1,
            time_input="log_sigma",
            precond="edm",
        ),
        55_733_891,
    ),
    "edm_ve_ncsnpp": (
        EDM,
        UNetConfig(
            dropout=0.13,
            augment_dim=9,
            residual_encoder=True,
            embedding="fourier",
            time_input="log_sigma",
            precond="edm",
        ),
        56_397_827,
    ),
}


@pytest.mark.parametrize("name", FULL)
def test_every_tensor_of_the_published_networks_has_its_place(name):
    """Full size, by names and shapes, with the published counts of parameters.

    These leave out filters and frequencies.
    """
    kind, config, count = FULL[name]
    shapes = key_list(GOLDEN / f"keys_{name}.txt")
    assert check_names(kind, shapes) == (config, (32, 32, 3))
    trained = [
        shape for key, shape in shapes.items() if not key.endswith(("resample_filter", "freqs"))
    ]
    assert sum(map(math.prod, trained)) == (count or 55_932_419)


def test_the_best_copy_is_taken_by_default():
    tree = {
        "epoch": 3,
        "model": tensors_of(
            {f"{c}.w": np.float32([i]) for i, c in enumerate(("net", "net_ema", "net_ema1"))}
        ),
    }
    tree["model"]["num_updates"] = tensors_of({"": np.int64(5)})[""]
    for which, copy, value in (("", "net_ema1", 2), ("net", "net", 0), ("net_ema", "net_ema", 1)):
        tensors, taken = MEANFLOW_UNET.select(tree, which)
        assert taken == copy and list(tensors) == ["w"] and tensors["w"].read() == value
    with pytest.raises(DmfError, match="--copy=net_ema2 .*expected net_ema1 or net_ema or net"):
        MEANFLOW_UNET.select(tree, "net_ema2")
    bare = tensors_of({"net_ema2.w": np.float32([1])})
    assert MEANFLOW_UNET.select(bare, "")[1] == "net_ema2"
    assert list(MEANFLOW_UNET.select(tensors_of({"w": np.float32([1])}), "")[0]) == ["w"]


def module(tensors, class_name="SongUNet", **fields):
    return Inert(class_name, {"_parameters": tensors, "_buffers": {}, "_modules": {}, **fields})


def pickled(class_name, **fields):
    inner = module(tensors_of({"w": np.float32([1])}))
    return Inert(
        class_name, {"_parameters": {}, "_buffers": {}, "_modules": {"model": inner}, **fields}
    )


def test_pickles_and_state_dicts_of_edm():
    tensors, copy = EDM.select({"ema": pickled("EDMPrecond", sigma_data=0.6), "loss_fn": None}, "")
    assert (
        copy == "ema"
        and set(tensors) == {"model.w", "sigma_data"}
        and tensors["sigma_data"].read() == 0.6
    )
    tensors, copy = EDM.select({"net": pickled("ECMPrecond"), "optimizer_state": {}}, "")
    assert copy == "net" and tensors["sigma_data"].read() == 0.5
    for name in ("w", "model.w", "module.model.w"):
        assert list(EDM.select(tensors_of({name: np.float32([1])}), "")[0]) == ["model.w"]
    for name in ("VPPrecond", "VEPrecond", "iDDPMPrecond"):
        with pytest.raises(
            DmfError, match=f"the network is a {name}: expected EDMPrecond or ECMPrecond"
        ):
            EDM.select({"ema": pickled(name)}, "")
    with pytest.raises(DmfError, match="--copy=net is not in this file: expected ema"):
        EDM.select({"ema": pickled("EDMPrecond")}, "net")
    with pytest.raises(DmfError, match="sigma_data of the network is 'half': expected a number"):
        EDM.select({"ema": pickled("EDMPrecond", sigma_data="half")}, "")


def test_sigma_data_is_the_pickles_own():
    """The wrapper's attribute sets the field unless it is given; no tensor is left over."""
    _, _, weights = stored("edm")
    inner = tensors_of({name.removeprefix("model."): x for name, x in weights.items()})
    held = Inert(
        "EDMPrecond",
        {
            "_parameters": {},
            "_buffers": {},
            "_modules": {"model": module(inner)},
            "sigma_data": 0.6,
        },
    )
    for given, want in (({}, 0.6), ({"sigma_data": 0.4}, 0.4)):
        tensors, _ = EDM.select({"ema": held}, "")
        config, shape = EDM.describe(tensors, given)
        assert config.sigma_data == want
        named = {
            name
            for rule in EDM.rules(config, shape, tensors)
            if not rule.missing
            for name in rule.tensors
        }
        assert named == set(tensors)


FLAT = np.full((1, 1, 4, 4), 1 / 16, np.float32)
KEY = "model.enc.8x8_down.conv0.resample_filter"


@pytest.mark.parametrize(
    ("case", "changes", "given", "message"),
    [
        (
            "meanflow",
            {LAYER0: None},
            {},
            r"no tensor map_layer0\.weight among 196.*kind meanflow_unet",
        ),
        (
            "meanflow",
            {LAYER0: np.zeros((128, 96))},
            {},
            "map_layer0.weight has 96 columns: expected 128.*or 64",
        ),
        (
            "meanflow",
            {LAYER0: np.zeros(128)},
            {},
            r"map_layer0\.weight has shape \[128\]: expected 2 axes",
        ),
        (
            "meanflow",
            {"enc.8x8_block1.conv0.weight": None},
            {},
            "blocks of the encoder: 2 at 16x16, 1 at 8x8; expected",
        ),
        (
            "meanflow",
            {"enc.8x8_block0.conv0.weight": np.zeros((48, 32, 3, 3))},
            {},
            "32, 48 channels: expected multiples of 32",
        ),
        (
            "meanflow",
            {"enc.16x16_block1.conv1.weight": np.zeros((32, 3, 3, 32))},
            {},
            r"32, 3, 3, 32\]: expected \[32, 32, 3, 3\]",
        ),
        (
            "meanflow",
            {"enc.16x16_block0.norm9.weight": np.zeros(3)},
            {},
            r"norm9\.weight \[3\] has no place",
        ),
        (
            "meanflow",
            {"enc.16x16_block0.conv1.bias": None},
            {},
            r"tensor enc\.16x16_block0\.conv1\.bias is missing",
        ),
        (
            "meanflow",
            {},
            {"heads": 4},
            "--set=heads=4: expected dropout for kind meanflow_unet",
        ),
        ("meanflow", {}, {"dropout": "low"}, "dropout is 'low': expected a number"),
        (
            "edm",
            {},
            {"sigma": 0.5},
            "--set=sigma=0.5: expected dropout or sigma_data for kind edm",
        ),
        (
            "edm",
            {"model.map_layer0.weight": None},
            {},
            r"no tensor model\.map_layer0\.weight among 200.*kind edm",
        ),
        (
            "edm",
            {"model.map_layer0.weight": np.zeros((128, 65))},
            {},
            "has 65 columns: expected a multiple of 32",
        ),
        (
            "edm",
            {"model.map_label.weight": np.zeros((64, 10))},
            {},
            "conditioned on 10 classes: expected an unconditional",
        ),
        ("edm", {KEY: FLAT}, {}, f"tensor {KEY}: other values than this network computes"),
    ],
)
def test_what_is_refused(case, changes, given, message):
    kind = stored(case)[0]
    weights = {name: x for name, x in (stored(case)[2] | changes).items() if x is not None}
    with pytest.raises(DmfError, match=message):
        convert_arrays(
            kind, {name: np.asarray(x, np.float32) for name, x in weights.items()}, given
        )


def test_files_without_their_filters_are_refused():
    kind, _, weights = stored("edm")
    filters = [name for name in weights if name.endswith("resample_filter")]
    with pytest.raises(
        DmfError, match="no tensor resample_filter among 196: expected the buffers of kind edm"
    ):
        convert_arrays(kind, {name: x for name, x in weights.items() if name not in filters})
    with pytest.raises(
        DmfError,
        match=r"resample_filter has shape \[1, 1, 3, 3\]: expected a filter of 2 x 2 or 4 x 4",
    ):
        convert_arrays(kind, weights | {name: FLAT[..., :3, :3] for name in filters})
    with pytest.raises(DmfError, match=rf"tensor {KEY} is missing"):
        convert_arrays(kind, {name: x for name, x in weights.items() if name != KEY})


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (
            MEANFLOW_UNET,
            VP,
            r"network\.embedding_mult is 1: expected 2, as in weights of kind meanflow_unet",
        ),
        (
            EDM,
            UNetConfig(),
            r"network\.time_input is 't': expected 'log_sigma', as in weights of kind edm",
        ),
    ],
)
def test_a_network_of_another_kind_is_not_exported(kind, config, message):
    with pytest.raises(DmfError, match=message):
        kind.rules(config, (32, 32, 3), None)
