"""Stable Diffusion's autoencoder: equal to diffusers, three spellings, parts, scales, errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dmf import pretrained, sharding
from dmf.convert.audit import flat, leaf_shapes
from dmf.convert.command import convert
from dmf.convert.rules import relative_l2
from dmf.convert.vae import SD_VAE
from dmf.errors import DmfError
from dmf.evaluation.sampling import make_decoder
from dmf.networks.frozen.vae import VAEConfig, build_vae, sample_latent, unscaled
from tests import GOLDEN
from tests.conversion import (
    check_names,
    convert_arrays,
    export_arrays,
    hollow,
    key_list,
    needs_torch,
    recipe_weights,
)

# Relative L2, float32: round-off of two implementations; the decoder is twice as deep.
BOUNDS = {"moments": 5e-6, "enc_mean": 5e-6, "enc_logvar": 5e-6, "sample_scaled": 5e-6, "dec": 2e-5}
TINY = VAEConfig(channels=(4, 8), blocks=1, groups=2)
ENCODER = ("encoder.", "quant_conv.")


@functools.cache
def reference():
    """(arrays of the reference, its weights)."""
    with np.load(GOLDEN / "sd_vae_tiny_io.npz", allow_pickle=False) as data:
        arrays = dict(data)
    return arrays, recipe_weights(arrays)


@functools.cache
def converted():
    return convert_arrays(SD_VAE, reference()[1], {"groups": 8})


def fast(function):
    """Jit without LLVM's optimisations, which cost seconds and save milliseconds."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def decoder_weights():
    return {name: x for name, x in reference()[1].items() if not name.startswith(ENCODER)}


def old_attention(name):
    """diffusers' earlier name of a tensor."""
    for new, old in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ):
        name = name.replace(f".{new}.", f".{old}.")
    return name


def ldm(name, levels=4):
    """The original LDM name of a tensor, part by part."""
    side, *rest, last = name.split(".")
    if side not in ("encoder", "decoder"):
        return name
    match rest:
        case ["mid_block", "resnets", i, layer]:
            return f"{side}.mid.block_{int(i) + 1}.{layer}.{last}"
        case ["mid_block", "attentions", "0", layer, *_]:
            short = {
                "group_norm": "norm",
                "to_q": "q",
                "to_k": "k",
                "to_v": "v",
                "to_out": "proj_out",
            }[layer]
            return f"{side}.mid.attn_1.{short}.{last}"
        case ["down_blocks", i, "resnets", j, layer]:
            return (
                f"{side}.down.{i}.block.{j}.{layer.replace('conv_shortcut', 'nin_shortcut')}.{last}"
            )
        case ["up_blocks", i, "resnets", j, layer]:
            layer = layer.replace("conv_shortcut", "nin_shortcut")
            return f"{side}.up.{levels - 1 - int(i)}.block.{j}.{layer}.{last}"
        case ["down_blocks", i, "downsamplers", "0", "conv"]:
            return f"{side}.down.{i}.downsample.conv.{last}"
        case ["up_blocks", i, "upsamplers", "0", "conv"]:
            return f"{side}.up.{levels - 1 - int(i)}.upsample.conv.{last}"
        case ["conv_norm_out"]:
            return f"{side}.norm_out.{last}"
    return name


def ldm_weights(weights):
    """The LDM file of the same weights: its names, and 1x1 convolutions in the attention."""
    window = {
        name: x[:, :, None, None] if ".attentions.0.to_" in name and x.ndim == 2 else x
        for name, x in weights.items()
    }
    return {ldm(name): x for name, x in window.items()}


def same_leaves(params, others):
    ours, theirs = flat(params), flat(others)
    return set(ours) == set(theirs) and all(
        np.array_equal(ours[path], theirs[path]) for path in ours
    )


def check_outputs(found, wanted, names):
    for name in names:
        assert found[name].shape == wanted[name].shape
        assert relative_l2(found[name], wanted[name]) <= BOUNDS[name], name


def test_parity_with_diffusers():
    arrays, _ = reference()
    config, shape, network, params = converted()
    assert config == VAEConfig(channels=(16, 32, 32, 32), groups=8) and shape == ()
    check_outputs(SD_VAE.outputs(network, params, arrays), arrays, BOUNDS)


SD3 = {"groups": 4, "scale": 1.5305, "shift": 0.0609}


@functools.cache
def shifted():
    """The same of an autoencoder of 16 channels with a shift, without quant layers."""
    with np.load(GOLDEN / "vae16_tiny_io.npz", allow_pickle=False) as data:
        arrays = dict(data)
    return arrays, recipe_weights(arrays)


def test_parity_with_diffusers_of_an_autoencoder_with_a_shift_and_without_quant_layers(tmp_path):
    arrays, weights = shifted()
    file = tmp_path / "vae.safetensors"
    safetensors.numpy.save_file(weights, file)
    report = convert("sd_vae", file, tmp_path / "vae", given=SD3, check="none")
    assert (report["network"]["shift"], report["network"]["quant"]) == (0.0609, False)
    network, params = pretrained.load(tmp_path / "vae")
    assert report["network"]["latent_channels"] == 16 and network.shift == 0.0609
    found = SD_VAE.outputs(network, params, arrays)
    check_outputs(found, arrays, ("moments", "sample_scaled"))
    # What training and sampling do with the directory: the shift is undone before the decoder.
    trained = {"scale": 1.5305, "shift": 0.0609}
    z, mesh = arrays["sample_scaled"].transpose(0, 2, 3, 1), sharding.make_mesh()
    images = make_decoder(str(tmp_path / "vae"), z.shape[1:], mesh, trained)(z)
    assert relative_l2(images.transpose(0, 3, 1, 2), arrays["dec"]) <= BOUNDS["dec"]
    with pytest.raises(
        DmfError, match=r"\(scale, shift\) = \(1.5305, 0.0609\); expected \(1.5305, 0"
    ):
        make_decoder(str(tmp_path / "vae"), z.shape[1:], mesh, {"scale": 1.5305})


@needs_torch
def test_the_pytorch_forward_of_a_shift_is_the_reference():
    import torch

    arrays, weights = shifted()
    tensors = {name: torch.from_numpy(x) for name, x in weights.items()}
    given = {name: np.array(x) for name, x in SD3.items()}
    found = SD_VAE.torch_outputs(tensors, arrays | given)
    check_outputs(found, arrays, ("moments", "sample_scaled"))


@needs_torch
def test_the_pytorch_forward_is_the_reference():
    import torch

    arrays, weights = reference()
    tensors = {name: torch.from_numpy(x) for name, x in weights.items()}
    check_outputs(SD_VAE.torch_outputs(tensors, arrays | {"groups": np.array(8)}), arrays, BOUNDS)


@needs_torch
def test_the_probe_agrees_with_pytorch_on_oblong_images():
    import torch

    weights = reference()[1]
    config, shape, network, params = convert_arrays(SD_VAE, weights, {"groups": 4, "scale": 0.5})
    probe = SD_VAE.probe(config, shape)
    ours = SD_VAE.outputs(network, params, probe)
    theirs = SD_VAE.torch_outputs({name: torch.from_numpy(x) for name, x in weights.items()}, probe)
    assert set(ours) == set(theirs) == set(BOUNDS)
    check_outputs(ours, theirs, ours)
    assert ours["dec"].shape == (2, 3, 32, 48)


def test_every_tensor_of_the_released_files_has_its_place():
    names = key_list(GOLDEN / "keys_sd_vae.txt")
    assert len(names) == 248 and sum(map(math.prod, names.values())) == 83_653_863
    assert check_names(SD_VAE, names) == (VAEConfig(), ())
    assert sum(map(math.prod, leaf_shapes(build_vae(VAEConfig())).values())) == 83_653_863

    decoder = {name: shape for name, shape in names.items() if not name.startswith(ENCODER)}
    assert sum(map(math.prod, decoder.values())) == 49_490_199
    assert check_names(SD_VAE, decoder) == (VAEConfig(part="decoder"), ())
    assert check_names(SD_VAE, names, {"part": "decoder"}) == (VAEConfig(part="decoder"), ())

    windows = {
        name: (*s, 1, 1) if ".attentions.0.to_" in name and len(s) == 2 else s
        for name, s in names.items()
    }
    assert check_names(SD_VAE, {ldm(name): s for name, s in windows.items()}) == (VAEConfig(), ())


def test_every_tensor_of_sd3_and_flux_has_its_place():
    # Their files are Stable Diffusion's with 16 channels in the place of 4, less the quant layers.
    names = key_list(GOLDEN / "keys_sd_vae.txt")
    names = {name: shape for name, shape in names.items() if "quant_conv" not in name}
    names["encoder.conv_out.weight"], names["encoder.conv_out.bias"] = (32, 512, 3, 3), (32,)
    names["decoder.conv_in.weight"] = (512, 16, 3, 3)
    wanted = VAEConfig(latent_channels=16, quant=False, scale=0.3611, shift=0.1159)
    given = {"scale": 0.3611, "shift": 0.1159}
    assert check_names(SD_VAE, names, given) == (wanted, ())
    windows = {n: (*s, 1, 1) if ".to_" in n and len(s) == 2 else s for n, s in names.items()}
    assert check_names(SD_VAE, {ldm(n): s for n, s in windows.items()}, given) == (wanted, ())
    for part in ({}, {"scale": 0.3611}, {"shift": 0.1159}):
        with pytest.raises(DmfError, match="expected --set=scale=.* 1.5305 and 0.0609 for SD3"):
            check_names(SD_VAE, names, part)


def test_known_names_of_the_original_checkpoints():
    shortcut = "encoder.down_blocks.2.resnets.0.conv_shortcut.weight"
    known = {
        "encoder.down.2.block.0.nin_shortcut.weight": shortcut,
        "encoder.down.0.downsample.conv.bias": "encoder.down_blocks.0.downsamplers.0.conv.bias",
        "encoder.mid.attn_1.proj_out.weight": "encoder.mid_block.attentions.0.to_out.0.weight",
        "decoder.mid.block_2.norm1.weight": "decoder.mid_block.resnets.1.norm1.weight",
        "decoder.mid.attn_1.norm.bias": "decoder.mid_block.attentions.0.group_norm.bias",
        "decoder.up.3.upsample.conv.bias": "decoder.up_blocks.0.upsamplers.0.conv.bias",
        "decoder.up.3.block.2.conv2.bias": "decoder.up_blocks.0.resnets.2.conv2.bias",
        "decoder.up.0.block.2.norm2.bias": "decoder.up_blocks.3.resnets.2.norm2.bias",
        "decoder.norm_out.weight": "decoder.conv_norm_out.weight",
        "post_quant_conv.weight": "post_quant_conv.weight",
    }
    tensors, _ = SD_VAE.select(hollow({f"first_stage_model.{name}": (1,) for name in known}), "")
    assert list(tensors) == list(known.values())


@pytest.mark.parametrize(
    "spelling", ["old attention", "LDM", "whole checkpoint", "autoencoder's training"]
)
def test_other_spellings_give_the_same_leaves(spelling):
    weights = reference()[1]
    original = ldm_weights(weights)
    file = {
        "old attention": {old_attention(name): x for name, x in weights.items()},
        "LDM": original,
        "whole checkpoint": {
            "state_dict": {
                **{f"first_stage_model.{name}": x for name, x in original.items()},
                "model.diffusion_model.out.2.bias": np.ones(4, np.float32),
                "model_ema.decay": np.ones((), np.float32),
            }
        },
        "autoencoder's training": {
            "state_dict": {**original, "loss.logvar": np.ones((), np.float32)}
        },
    }[spelling]
    assert set(file) != set(weights)
    config, _, _, params = convert_arrays(SD_VAE, file, {"groups": 8})
    assert config == converted()[0]
    assert same_leaves(params, converted()[3])


def test_export_gives_the_tensors_back_bit_for_bit():
    weights = reference()[1]
    config, shape, network, params = converted()
    exported = export_arrays(SD_VAE, config, shape, network, params)
    assert set(exported) == set(weights)
    for name, x in weights.items():
        assert np.array_equal(exported[name], x), name


def test_an_ldm_file_comes_back_from_its_own_rules():
    tensors, _ = SD_VAE.select(
        hollow({name: x.shape for name, x in ldm_weights(reference()[1]).items()}), ""
    )
    config, shape = SD_VAE.describe(tensors, {"groups": 8})
    rng = np.random.default_rng(0)
    windows = 0
    for rule in SD_VAE.rules(config, shape, tensors):
        values = [
            rng.standard_normal(tensors[name].shape).astype(np.float32) for name in rule.tensors
        ]
        windows += bool(rule.note)
        for x, back in zip(values, rule.backward(*rule.forward(*values)), strict=True):
            assert np.array_equal(x, back)
    assert windows == 8


@pytest.mark.parametrize("source", ["decoder file", "given"])
def test_a_decoder_alone_decodes_the_same(source):
    weights, given = (
        (decoder_weights(), {})
        if source == "decoder file"
        else (reference()[1], {"part": "decoder"})
    )
    config, shape, network, params = convert_arrays(SD_VAE, weights, {"groups": 8, **given})
    assert config.part == "decoder"
    both = converted()
    assert same_leaves(params, {name: both[3][name] for name in ("decoder", "post_quant_conv")})
    z = {"z": reference()[0]["z"]}
    ours, theirs = SD_VAE.outputs(network, params, z), SD_VAE.outputs(both[2], both[3], z)
    assert np.array_equal(ours["dec"], theirs["dec"])
    assert set(export_arrays(SD_VAE, config, shape, network, params)) == set(decoder_weights())
    assert "x" not in SD_VAE.probe(config, shape)
    with pytest.raises(DmfError, match="no encoder"):
        network.encode(params, jnp.zeros((1, 8, 8, 3)))


def test_the_log_variance_is_clamped(rng):
    network = build_vae(TINY)
    params = fast(network.init)(jax.random.key(0))
    bias = np.zeros(8, np.float32)
    bias[4:6], bias[6:] = 1000, -1000
    params = params | {"quant_conv": {**params["quant_conv"], "bias": jnp.asarray(bias)}}
    mean, logvar = fast(network.encode)(params, rng.uniform(-1, 1, (1, 4, 6, 3)).astype(np.float32))
    assert mean.shape == logvar.shape == (1, 2, 3, 4) and 0 < np.std(mean) < 10
    assert np.all(logvar[..., :2] == 20) and np.all(logvar[..., 2:] == -30)


def test_scaled_and_unscaled_latents():
    mean, logvar = jnp.array([1.0, -2.0]), jnp.log(jnp.array([4.0, 9.0]))
    scaled = sample_latent(mean, logvar, jnp.array([1.0, -1.0]), 0.5)
    np.testing.assert_allclose(scaled, [0.5 * (1 + 2), 0.5 * (-2 - 3)], rtol=1e-6)
    np.testing.assert_allclose(unscaled(scaled, 0.5), [3, -5], rtol=1e-6)
    moved = sample_latent(mean, logvar, jnp.array([1.0, -1.0]), 0.5, 0.25)
    np.testing.assert_allclose(moved, scaled - 0.125, rtol=1e-6)
    np.testing.assert_allclose(unscaled(moved, 0.5, 0.25), [3, -5], rtol=1e-6)
    assert build_vae(VAEConfig()).scale == 0.18215


def test_every_product_takes_its_precision_from_the_caller():
    network = build_vae(TINY)
    params = jax.eval_shape(network.init, jax.random.key(0))
    x, z = (
        jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32),
        jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float32),
    )
    for function, like in ((network.encode, x), (network.decode, z)):
        with jax.default_matmul_precision("highest"):
            lines = jax.jit(function).lower(params, like).as_text().splitlines()
        products = [
            line
            for line in lines
            if "stablehlo.convolution" in line or "stablehlo.dot_general" in line
        ]
        assert len(products) > 15 and all(line.count("HIGHEST") == 2 for line in products)


def test_bfloat16_computes_coarsely_and_answers_in_float32(rng):
    exact, coarse = build_vae(TINY), build_vae(TINY, jnp.bfloat16)
    shapes = jax.eval_shape(exact.init, jax.random.key(0))
    params = jax.tree.map(lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32), shapes)
    z = rng.standard_normal((1, 2, 3, 4)).astype(np.float32)
    ours, theirs = fast(coarse.decode)(params, z), fast(exact.decode)(params, z)
    assert ours.dtype == np.float32
    # bfloat16 rounds by 2^-9 in each of some tens of layers.
    assert 2**-9 < relative_l2(ours, theirs) < 16 * 2**-9
    moments = jax.eval_shape(coarse.encode, params, jnp.zeros((1, 4, 4, 3)))
    assert [x.dtype for x in moments] == [np.float32, np.float32]


def test_float64_passes_through(float64):
    network = build_vae(TINY)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float64),
        jax.eval_shape(network.init, jax.random.key(0)),
    )
    image = jax.eval_shape(network.decode, params, jnp.zeros((1, 2, 2, 4), jnp.float64))
    assert image.dtype == jnp.float64


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        (None, {}, "no tensor decoder.up_blocks.0.resnets.0.conv1.weight .* kind sd_vae"),
        ({}, {}, "groups is 32, but a level has 16 channels: expected --set=groups=N"),
        ({}, {"groups": 0}, "groups is 0"),
        ({}, {"heads": 4}, "--set=heads=4: expected groups or scale or shift or part for"),
        ({}, {"groups": 8, "part": "encoder"}, "part is 'encoder'"),
        ({}, {"groups": 8, "scale": 0.0}, "scale is 0.0"),
        (
            {"decoder.conv_in.weight": (32, 5, 3, 3)},
            {"groups": 8},
            "decoder.conv_in.weight has shape",
        ),
        ({"encoder.conv_out.bias": ()}, {"groups": 8}, "encoder.conv_out.bias has shape"),
        (
            {"decoder.conv_out.weight": (3,)},
            {"groups": 8},
            "decoder.conv_out.weight has shape .* expected 4 axes",
        ),
        (
            {"encoder.mid_block.attentions.0.to_q.weight": (32, 32, 3, 3)},
            {"groups": 8},
            "to_q.weight has shape",
        ),
        (
            {"encoder.mid_block.attentions.0.query.weight": (32, 32)},
            {"groups": 8},
            "to_q.weight is there twice",
        ),
        (
            {"decoder.up_blocks.1.attentions.0.to_q.bias": (32,)},
            {"groups": 8},
            "up_blocks.1.attentions.0.to_q.bias",
        ),
    ],
)
def test_errors_of_a_file(change, given, message):
    shapes = {name: x.shape for name, x in reference()[1].items()}
    shapes = {"net.weight": (2, 2)} if change is None else shapes | change
    with pytest.raises(DmfError, match=message):
        check_names(SD_VAE, shapes, given)


def test_a_decoder_file_cannot_be_both():
    shapes = {name: x.shape for name, x in decoder_weights().items()}
    with pytest.raises(DmfError, match="no encoder among the tensors"):
        check_names(SD_VAE, shapes, {"groups": 8, "part": "both"})
    with pytest.raises(DmfError, match="--copy=ema is not in this file: expected weights"):
        SD_VAE.select({}, "ema")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": ()}, "channels is empty"),
        ({"channels": (4, 7)}, "channels has a level of 7"),
        ({"blocks": 0}, "blocks is 0"),
        ({"part": "encoder"}, "part is 'encoder'"),
        ({"scale": "1"}, "scale is '1'"),
        ({"scale": math.inf}, "scale is inf"),
        ({"shift": "a"}, "shift is 'a'"),
        ({"shift": math.nan}, "shift is nan"),
    ],
)
def test_errors_of_a_config(fields, message):
    with pytest.raises(DmfError, match=message):
        build_vae(VAEConfig(**{"channels": (4, 8), "groups": 2, **fields}))


def test_errors_of_an_input():
    network = build_vae(TINY)
    params = jax.eval_shape(network.init, jax.random.key(0))
    with pytest.raises(DmfError, match="multiples of 2"):
        network.encode(params, jnp.zeros((1, 5, 4, 3)))
    with pytest.raises(DmfError, match="latent has shape"):
        network.decode(params, jnp.zeros((1, 4, 4, 3)))
    with pytest.raises(DmfError, match="dtype is float16"):
        build_vae(TINY, jnp.float16)
