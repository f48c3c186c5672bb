"""TorchCFM's ADM U-Net: equal to the source's module, names, the way back, refused files."""

import jax
import numpy as np
import pytest

from dmf import pretrained
from dmf.convert import audit
from dmf.convert.adm import TORCHCFM
from dmf.convert.rules import relative_l2
from dmf.errors import DmfError
from dmf.networks import ADMConfig
from tests import GOLDEN
from tests.conversion import (
    check_names,
    convert_arrays,
    export_arrays,
    hollow,
    key_list,
    needs_torch,
    recipe_weights,
    small_noise,
)

PARITY = 5e-6  # relative L2: float32 round-off between two implementations of the same network
TINY = {"head_channels": 32, "resolution": 16}
FOLDED = "time_embed.0.weight"


@pytest.fixture(scope="module")
def tiny():
    """(weights, data, config, image shape, network, params) of a small network.

    The data are outputs of TorchCFM 1.0.4's UNetModelWrapper at 16 pixels, in PyTorch.
    """
    data = np.load(GOLDEN / "torchcfm_tiny_io.npz")
    weights = recipe_weights(data)
    return weights, data, *convert_arrays(TORCHCFM, weights, TINY)


def without(tree, name):
    return {k: v for k, v in tree.items() if k != name}


def test_the_network_equals_torchcfm(tiny):
    _, data, config, shape, network, params = tiny
    assert config == ADMConfig(
        channels=64, channel_mult=(1, 2, 2), attention_resolutions=(8,), head_channels=32
    )
    assert shape == (16, 16, 3)
    v = TORCHCFM.outputs(network, params, data)["v"]
    assert relative_l2(v, data["v"]) <= PARITY
    assert relative_l2(v[::-1], data["v"]) > 0.1
    later = TORCHCFM.outputs(network, params, {"x": data["x"], "t": data["t"][::-1]})["v"]
    assert relative_l2(later, data["v"]) > 0.03


def test_the_network_equals_torchcfm_in_float64(tiny):
    """The bound is far below the effect of another epsilon in the norms.

    An epsilon of 1e-6 for 1e-5 is an error of 7e-6.
    """
    _, data, _, _, network, params = tiny
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        v = TORCHCFM.outputs(network, params, {k: data[k].astype(np.float64) for k in ("x", "t")})[
            "v"
        ]
    # Two roundings to float32, 6e-8 each: the folded layer, and the source's frequencies.
    assert relative_l2(v, data["v_f64"]) <= 2e-7


@needs_torch
def test_the_check_against_pytorch_equals_torchcfm(tiny):
    import torch

    weights, data, config, shape, network, params = tiny
    tensors = {name: torch.from_numpy(x) for name, x in weights.items()}
    v = TORCHCFM.torch_outputs(
        tensors, {"x": data["x"], "t": data["t"], "head_channels": np.array(32)}
    )["v"]
    assert relative_l2(v, data["v"]) <= PARITY
    probe = TORCHCFM.probe(config, shape)
    ours, theirs = TORCHCFM.outputs(network, params, probe), TORCHCFM.torch_outputs(tensors, probe)
    assert list(ours) == list(theirs) == ["v"]
    assert relative_l2(ours["v"], theirs["v"]) <= PARITY


def test_our_velocity_is_theirs_with_time_and_sign_reversed(tiny):
    """v(z, t) = -v_source(z, 1 - t); for every r, as the new branch starts silent."""
    _, data, _, _, network, params = tiny
    z, t = data["x"].transpose(0, 2, 3, 1), 1 - data["t"]
    u = jax.jit(network.apply)
    at_t = u(params, z, t, t)
    assert relative_l2(at_t, -data["v"].transpose(0, 2, 3, 1)) <= PARITY
    assert np.array_equal(u(params, z, 0 * t, t), at_t)
    # With zeros here the branch could never learn.
    assert np.std(params["interval"]["time_embed_0"]["kernel"]) > 0.05


def test_every_name_of_the_released_file_has_its_place():
    """The state dict of TorchCFM's train_cifar10.py: 304 tensors, 35,746,307 values."""
    names = key_list(GOLDEN / "keys_torchcfm.txt")
    assert sum(int(np.prod(shape)) for shape in names.values()) == 35_746_307 and len(names) == 304
    assert check_names(TORCHCFM, names) == (ADMConfig(), (32, 32, 3))
    parallel = {f"module.{name}": shape for name, shape in names.items()}
    assert check_names(TORCHCFM, parallel, {"dropout": 0}) == (ADMConfig(dropout=0.0), (32, 32, 3))


def test_the_way_back_is_exact(tiny):
    """Copies come back exactly, the folded layer to round-off.

    The interval branch is exported once it is trained.
    """
    weights, _, config, shape, network, params = tiny
    back = export_arrays(TORCHCFM, config, shape, network, params)
    assert set(back) == set(weights)
    for name, x in back.items():
        if name == FOLDED:
            assert relative_l2(x, weights[name]) <= 1e-7 and not np.array_equal(x, weights[name])
        else:
            assert np.array_equal(x, weights[name]), name
    trained = small_noise(params)
    back = export_arrays(TORCHCFM, config, shape, network, trained)
    assert set(back) - set(weights) == {
        f"interval.time_embed.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")
    }
    again = convert_arrays(TORCHCFM, back, TINY)[-1]
    for (path, x), (_, y) in zip(
        *(sorted(audit.flat(p).items()) for p in (trained, again)), strict=True
    ):
        if path == "time_embed_0/kernel":
            assert relative_l2(y, x) <= 1e-7
        else:
            assert np.array_equal(x, y), path


def test_copies_are_taken_by_name():
    names = key_list(GOLDEN / "keys_torchcfm.txt")
    ema, raw = hollow(names), hollow(names)
    tree = {
        "net_model": raw,
        "ema_model": ema,
        "sched": {"last_epoch": 400001},
        "optim": {"state": {}},
        "step": 400000,
    }
    for which, name, want in (
        ("", "ema_model", ema),
        ("ema_model", "ema_model", ema),
        ("net_model", "net_model", raw),
    ):
        tensors, taken = TORCHCFM.select(tree, which)
        assert taken == name and tensors[FOLDED] is want[FOLDED] and set(tensors) == set(names)
    assert TORCHCFM.select(without(tree, "ema_model"), "")[1] == "net_model"
    assert TORCHCFM.select(raw, "")[1] == "flat"
    with pytest.raises(
        DmfError, match="--copy=ema is not in this file: expected ema_model or net_model"
    ):
        TORCHCFM.select(tree, "ema")
    with pytest.raises(DmfError, match="--copy=ema_model is not in this file: expected flat"):
        TORCHCFM.select(raw, "ema_model")


def renamed(names, old, new):
    return {name.replace(old, new): shape for name, shape in names.items()}


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        (
            lambda n: without(n, FOLDED),
            {},
            r"no tensor time_embed\.0\.weight among 303 .* of kind torchcfm",
        ),
        (lambda n: n | {FOLDED: (512,)}, {}, r"tensor time_embed\.0\.weight has shape \[512\]"),
        (
            lambda n: n | {"label_emb.weight": (10, 512)},
            {},
            r"label_emb\.weight: .* without classes",
        ),
        (
            lambda n: n | {"input_blocks.2.0.in_layers.2.weight": (96, 128, 3, 3)},
            {},
            r"widths \[\[128, 96\], .*equal blocks",
        ),
        (
            lambda n: renamed(n, "input_blocks.3.0.op", "input_blocks.3.0.in_layers.2"),
            {},
            r"equal numbers of equal blocks",
        ),
        (
            lambda n: n | {"out.2.weight": (6, 128, 3, 3)},
            {},
            r"out\.2\.weight has shape \[6, .*: expected \[3, 128, 3, 3\]",
        ),
        (lambda n: without(n, "out.2.bias"), {}, r"tensor out\.2\.bias is missing"),
        (lambda n: n | {"out.3.bias": (3,)}, {}, r"tensor out\.3\.bias \[3\] has no place"),
        (
            lambda n: n,
            {"heads": 4},
            "--set=heads=4: expected head_channels or resolution or dropout for kind torchcfm",
        ),
        (
            lambda n: n,
            {"head_channels": 96},
            r"head_channels is 96; expected a divisor of the 256 channels",
        ),
        (lambda n: n, {"resolution": "32x32"}, r"resolution is '32x32'; expected an integer"),
        (lambda n: n, {"dropout": "none"}, r"dropout is 'none': expected a number"),
    ],
)
def test_what_is_no_torchcfm_network_is_refused(change, given, message):
    with pytest.raises(DmfError, match=message):
        check_names(TORCHCFM, change(key_list(GOLDEN / "keys_torchcfm.txt")), given)


@pytest.mark.parametrize("field", TINY)
def test_of_another_size_the_user_is_asked_for_what_no_shape_tells(tiny, field):
    with pytest.raises(DmfError, match=rf"{field} is unknown.*--set={field}="):
        convert_arrays(TORCHCFM, tiny[0], without(TINY, field))


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (ADMConfig(), (32, 16, 3), r"image_shape.*square"),
        (ADMConfig(), (20, 20, 3), r"channel_mult.*divisible by 8; got 20"),
        (ADMConfig(channel_mult=()), (32, 32, 3), r"channel_mult is empty"),
        (ADMConfig(blocks=0), (32, 32, 3), r"network\.blocks is 0"),
        (
            ADMConfig(channels=48),
            (32, 32, 3),
            r"network\.channels is 48.*multiple of 32.*times 1 it does not",
        ),
        (ADMConfig(dropout=-0.1), (32, 32, 3), r"network\.dropout is -0\.1"),
        (ADMConfig(interval_init="off"), (32, 32, 3), r"interval_init is 'off'"),
    ],
)
def test_build_names_the_field_that_does_not_fit(config, shape, message):
    with pytest.raises(DmfError, match=message):
        pretrained.build(config, shape)
