"""Rectified Flow's checkpoints: parity with PyTorch, key map, time and sign, the average.

No output of the original code is stored here. Two anchors stand outside this code:

- The count of parameters of the CIFAR-10 network, 61,804,419, is in arXiv 2509.15591.
- tests/networks/test_networks.py compares our network itself.

The public source (gnobitab/RectifiedFlow, yang-song/score_sde_pytorch) was read for these:

- order and names of the modules;
- epsilon of the norms, and scale of the attention.

The key list was written down from that reading, not from the converter.
Two public loaders of the released file show two facts more. A state dict of these names loads
strictly, and the average has one tensor for each parameter. The file itself was not there.
"""

import math

import jax
import numpy as np
import pytest

from dmf.convert import audit
from dmf.convert.rules import relative_l2
from dmf.convert.score_sde import RECTIFIED_FLOW
from dmf.errors import DmfError
from dmf.networks import UNetConfig, build
from dmf.storage.readers import read
from tests import GOLDEN
from tests.conversion import (
    check_names,
    convert_arrays,
    export_arrays,
    key_list,
    needs_torch,
    tensors_of,
)

FULL = key_list(GOLDEN / "keys_rectified_flow.txt")
SMALL = UNetConfig(
    channels=8,
    channel_mult=(1, 2),
    blocks=2,
    attention_resolutions=(4,),
    dropout=0.15,
    augment_dim=0,
    resample="box",
    embedding_mult=1,
    time_scale=999.0,
)
SHAPE = (8, 8, 3)
GIVEN = {"image_size": 8}


def shapes_of(config, shape):
    """Names and shapes of a file of that network; its one buffer comes first."""
    leaves, found = audit.leaf_shapes(build(config, shape)), {}
    for rule in RECTIFIED_FLOW.rules(config, shape, None):
        made = rule.backward(
            *(np.broadcast_to(np.float32(0), leaves[leaf]) for leaf in rule.leaves)
        )
        found |= {name: x.shape for name, x in zip(rule.tensors, made, strict=True)}
    del found["interval.weight"]
    return {"sigmas": found.pop("sigmas"), **found}


def weights(seed=0, dtype=np.float32):
    """Random weights of the small network under a file's names, scaled by the fan-in."""
    rng, found = np.random.default_rng(seed), {}
    for name, shape in shapes_of(SMALL, SHAPE).items():
        fan_in = math.prod(shape) // (shape[1] if name.endswith("W") else shape[0])
        x = rng.standard_normal(shape) / math.sqrt(fan_in)
        found[name] = (
            x if len(shape) > 1 else 0.2 * x + ("GroupNorm" in name and "weight" in name)
        ).astype(dtype)
    return {**found, "sigmas": np.exp(np.linspace(math.log(50), math.log(0.01), 1000))}


def checkpoint(model, shadows):
    """The tree of a training checkpoint from the reader: modules wrapped, lists by number."""
    return {
        "optimizer": {"state": {}, "param_groups": {0: {"lr": 2e-4}}},
        "model": {f"module.{name}": x for name, x in model.items()},
        "ema": {"decay": 0.999999, "num_updates": 3, "shadow_params": dict(enumerate(shadows))},
        "step": 3,
    }


def parameters(model):
    return [x for name, x in model.items() if name != "sigmas"]


def double_params(model):
    """Our parameters of the small network in float64, through the key map alone."""
    leaves = {}
    for rule in RECTIFIED_FLOW.rules(SMALL, SHAPE, None):
        if all(name in model for name in rule.tensors):
            leaves |= zip(
                rule.leaves, rule.forward(*(model[name] for name in rule.tensors)), strict=True
            )
    return audit.nested({"interval/kernel": np.zeros((8, 32)), **leaves})


def outputs(params, arrays):
    """Our outputs, compiled without LLVM's optimisations to save seconds."""
    network = build(SMALL, SHAPE)
    fast = jax.jit(network.apply, compiler_options={"xla_backend_optimization_level": 0})
    return RECTIFIED_FLOW.outputs(network._replace(apply=fast), params, arrays)


def torch_outputs(model, arrays):
    import torch

    return RECTIFIED_FLOW.torch_outputs(
        {name: torch.from_numpy(x) for name, x in model.items()}, arrays
    )


@needs_torch
@pytest.mark.parametrize("interval", [False, True], ids=["flow", "trained interval"])
def test_the_network_agrees_with_pytorch_in_float64(interval):
    # In float32, angles up to 999 leave only four digits of the features.
    model = weights(dtype=np.float64)
    if interval:
        model["interval.weight"] = np.random.default_rng(1).standard_normal((32, 8))
    arrays = {name: x.astype(np.float64) for name, x in RECTIFIED_FLOW.probe(SMALL, SHAPE).items()}
    with jax.enable_x64(True):
        ours = outputs(double_params(model), arrays)["v"]
    assert relative_l2(ours, torch_outputs(model, arrays)["v"]) < 1e-12


@needs_torch
def test_the_network_agrees_with_pytorch_in_float32():
    model = weights()
    config, shape, _, params = convert_arrays(RECTIFIED_FLOW, model, GIVEN)
    assert config == SMALL and shape == SHAPE
    arrays = RECTIFIED_FLOW.probe(config, shape)
    ours = outputs(params, arrays)["v"]
    assert relative_l2(ours, torch_outputs(model, arrays)["v"]) < 5e-6


def test_the_fold_reverses_time():
    weight = np.random.default_rng(0).standard_normal((5, 12))
    rule = next(
        rule
        for rule in RECTIFIED_FLOW.rules(SMALL, SHAPE, None)
        if "all_modules.0.weight" in rule.tensors
    )
    (kernel,) = rule.forward(weight)

    def features(t):  # log-spaced from 1 to 1e-4, the sines first
        angle = 999 * t[:, None] * np.exp(-math.log(1e4) * np.arange(6) / 5)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    t = np.array([0.0, 0.001, 0.3, 0.9999, 1.0])
    assert np.abs(features(t) @ kernel - features(1 - t) @ weight.T).max() < 1e-11
    assert np.abs(rule.backward(kernel)[0] - weight).max() < 1e-13


def test_the_last_layer_alone_is_negated():
    model = weights()
    _, _, _, params = convert_arrays(RECTIFIED_FLOW, model, GIVEN)
    last = max(int(name.split(".")[1]) for name in model if name != "sigmas")
    found = params["dec"]["8x8_aux_conv"]
    assert np.array_equal(
        found["kernel"], -model[f"all_modules.{last}.weight"].transpose(2, 3, 1, 0)
    )
    assert np.array_equal(found["bias"], -model[f"all_modules.{last}.bias"])
    assert np.array_equal(
        params["enc"]["8x8_conv"]["kernel"], model["all_modules.2.weight"].transpose(2, 3, 1, 0)
    )


def test_the_released_network_is_used_up_tensor_by_tensor():
    config, shape = check_names(RECTIFIED_FLOW, FULL)
    assert len(FULL) == 565 and shape == (32, 32, 3)
    assert (config.channels, config.channel_mult, config.blocks, config.attention_resolutions) == (
        128,
        (1, 2, 2, 2),
        4,
        (16,),
    )
    assert (config.time_scale, config.embedding_mult, config.resample) == (999.0, 1, "box")
    published = 61_804_419
    assert (
        sum(math.prod(shape) for name, shape in FULL.items() if name != "module.sigmas")
        == published
    )
    leaves = audit.leaf_shapes(build(config, shape))
    assert (
        sum(math.prod(x) for x in leaves.values()) - math.prod(leaves["interval/kernel"])
        == published
    )


def test_names_stand_in_the_order_of_the_model():
    config, shape = check_names(RECTIFIED_FLOW, FULL)
    made = [name for rule in RECTIFIED_FLOW.rules(config, shape, None) for name in rule.tensors]
    wanted = [name.removeprefix("module.") for name in FULL]
    # For query, key and value a key map has the weights first; in the file they alternate.
    assert sorted(made) == sorted([*wanted, "interval.weight"])
    assert [n for n in made if "NIN" not in n][:-2] == [n for n in wanted if "NIN" not in n][1:]


def test_a_file_comes_back_bit_for_bit():
    model = weights()
    config, shape, network, params = convert_arrays(RECTIFIED_FLOW, model, GIVEN)
    back = export_arrays(RECTIFIED_FLOW, config, shape, network, params)
    assert set(back) == set(model)
    for name, x in model.items():
        if name in ("all_modules.0.weight", "sigmas"):
            assert relative_l2(back[name], x) < 1e-6
        else:
            assert np.array_equal(back[name], x), name


def test_the_interval_is_zero_until_it_is_trained_and_then_exported():
    config, shape, network, params = convert_arrays(RECTIFIED_FLOW, weights(), GIVEN)
    assert not np.any(params["interval"]["kernel"])
    params["interval"]["kernel"] = params["interval"]["kernel"] + 0.5
    back = export_arrays(RECTIFIED_FLOW, config, shape, network, params)
    assert np.array_equal(back["interval.weight"], np.full((32, 8), 0.5))


def select(tree, which=""):
    """The arrays of a copy, and its name.

    It keeps the order of the keys, which jax.tree.map does not, for the average depends on it.
    """

    def lazy(node):
        if isinstance(node, dict):
            return {key: lazy(x) for key, x in node.items()}
        return tensors_of({"": node})[""] if isinstance(node, np.ndarray) else node

    tensors, copy = RECTIFIED_FLOW.select(lazy(tree), which)
    return {name: x.read() for name, x in tensors.items()}, copy


@pytest.mark.parametrize(("which", "copy"), [("", "ema"), ("ema", "ema"), ("model", "model")])
def test_the_average_is_matched_by_its_order(which, copy):
    model, average = weights(0), weights(1)
    found, name = select(checkpoint(model, parameters(average)), which)
    wanted = {"ema": average, "model": model}[copy]
    assert name == copy and list(found) == list(model)
    assert all(np.array_equal(found[name], x) for name, x in wanted.items())


@needs_torch
def test_a_saved_checkpoint_keeps_the_order(tmp_path):
    import torch

    model, average = (
        {name: torch.from_numpy(x) for name, x in weights(seed).items()} for seed in (0, 1)
    )
    tree = checkpoint(model, parameters(average))
    tree["ema"]["shadow_params"] = list(tree["ema"]["shadow_params"].values())
    torch.save(tree, tmp_path / "checkpoint_8.pth")
    tensors, copy = RECTIFIED_FLOW.select(read.open_file(tmp_path / "checkpoint_8.pth").tree, "")
    assert copy == "ema" and list(tensors) == list(model)
    assert all(np.array_equal(tensors[name].read(), x.numpy()) for name, x in average.items())


def test_bare_weights_are_taken_as_they_are():
    model = weights()
    found, copy = select(model)
    assert copy == "model" and all(np.array_equal(found[name], x) for name, x in model.items())


def test_an_average_that_does_not_fit_is_refused():
    model = weights()
    shadows = parameters(model)
    with pytest.raises(
        DmfError, match=f"holds {len(shadows) - 1} tensors: expected {len(shadows)}"
    ):
        select(checkpoint(model, shadows[:-1]))
    with pytest.raises(
        DmfError,
        match=r"shadow_params\[0\] has shape \[32\]: expected \[32, 8\], the shape of all_modul",
    ):
        select(checkpoint(model, [shadows[1], shadows[0], *shadows[2:]]))
    with pytest.raises(DmfError, match="--copy=ema is not in this file: expected model"):
        select(model, "ema")
    with pytest.raises(DmfError, match="--copy=raw is not in this file: expected ema or model"):
        select(checkpoint(model, shadows), "raw")


def without(model, prefix):
    return {name: x for name, x in model.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("left_out", "changes", "message"),
    [
        (
            "",
            {"all_modules.0.weight": (32,)},
            r"all_modules.0.weight has shape \[32\]: expected 2 axes",
        ),
        ("", {"all_modules.2.bias": (4,)}, r"all_modules.2.bias has shape \[4\]: expected \[8\]"),
        ("", {"label_emb.weight": (10, 32)}, r"label_emb.weight \[10, 32\] has no place"),
        ("", {"sigmas": (1000,)}, "sigmas: other values"),
        ("all_modules.3.", {}, "residual blocks, 2 of them resampling: expected a U-Net"),
        ("all_modules.3.Conv_0.bias", {}, "all_modules.3.Conv_0.bias is missing"),
        (
            "all_modules.",
            {"patch_embed.weight": (4, 4)},
            "no tensor all_modules.0.weight .* kind rectified_flow",
        ),
        # The same code builds networks of sigma with Fourier features.
        ("all_modules.0.", {"all_modules.0.W": (8,)}, "no tensor all_modules.0.weight"),
    ],
)
def test_files_of_another_kind_are_refused(left_out, changes, message):
    model = without(weights(), left_out) if left_out else weights()
    with pytest.raises(DmfError, match=message):
        convert_arrays(
            RECTIFIED_FLOW,
            model | {name: np.ones(shape, np.float32) for name, shape in changes.items()},
            GIVEN,
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"heads": 4},
            "--set=heads=4: expected image_size or dropout for kind rectified_flow",
        ),
        ({"image_size": "wide"}, "image_size is 'wide': expected the side of the images in pixels"),
        ({"image_size": 9}, "divisible by 2; got 9"),
        ({"dropout": "much"}, "dropout is 'much': expected a number"),
    ],
)
def test_fields_that_do_not_fit_are_refused(given, message):
    with pytest.raises(DmfError, match=message):
        convert_arrays(RECTIFIED_FLOW, weights(), given)
