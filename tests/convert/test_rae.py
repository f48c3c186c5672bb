"""The representation autoencoder: its public code's latents and images, files, and its seat.

The stored arrays come from bytetriper/RAE at commit a4d18c4 and, for the encoder, transformers
5.24, run by PyTorch on a CPU: two blocks each, latents of 3 x 3 x 32, images of 12 x 12.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dmf import pretrained, sharding
from dmf.convert.command import convert
from dmf.convert.encode import encode
from dmf.convert.rae_decoder import RAE_DECODER
from dmf.convert.rules import relative_l2
from dmf.data import latents
from dmf.errors import DmfError
from dmf.evaluation.sampling import make_decoder
from dmf.export.weights import export
from dmf.networks.frozen.rae import RAEConfig, unpatchified
from dmf.storage.readers.read import Several
from tests import GOLDEN, conversion
from tests.conversion import needs_torch

PARITY = {"latent": 5e-6, "image": 2e-5}  # relative L2 in float32
GIVEN = {"heads": 3, "encoder_heads": 2}


@functools.cache
def reference():
    """(weights of each file, inputs and outputs) of the public code."""
    with np.load(GOLDEN / "rae_tiny_io.npz") as data:
        io = {key: data[key] for key in data.files if not key.startswith(("recipe/", "fixed/"))}
        weights = conversion.recipe_weights(data)
    files = {"decoder": {}, "stat": {}, "encoder": {}}
    for name, x in weights.items():
        part = "stat" if name in ("mean", "var") else "encoder"
        files["decoder" if name.startswith(("decoder", "trainable")) else part][name] = x
    return files, io


@functools.cache
def converted():
    return conversion.convert_arrays(RAE_DECODER, Several(reference()[0]), GIVEN)


def test_latents_and_images_are_the_public_code_s():
    _, io = reference()
    config, shape, network, params = converted()
    assert config == RAEConfig(
        **dict(depth=2, width=48, heads=3, hidden=80, patch=4, grid=3, latent_channels=32),
        **dict(encoder_depth=2, encoder_heads=2, encoder_grid=5),
    )
    found = RAE_DECODER.outputs(network, params, io)
    for name, bound in PARITY.items():
        assert relative_l2(found[name], io[name]) <= bound, name


@needs_torch
def test_the_forward_check_in_pytorch_is_the_public_network():
    import torch

    files, io = reference()
    files = {name: conversion.tensors_of(file) for name, file in files.items()}
    tensors, _ = RAE_DECODER.select(Several(files), "")
    tensors = {name: torch.from_numpy(x.read()) for name, x in tensors.items()}
    heads = {name: np.array(x) for name, x in GIVEN.items()}
    found = RAE_DECODER.torch_outputs(tensors, io | heads)
    for name, bound in PARITY.items():
        assert relative_l2(found[name], io[name]) <= bound, name


def test_the_way_back_gives_the_files_bit_for_bit():
    files, _ = reference()
    named = {name: x for file in files.values() for name, x in file.items()}
    back = conversion.export_arrays(RAE_DECODER, *converted())
    new = {".q_proj.": "query", ".k_proj.": "key", ".v_proj.": "value"}
    for name, x in named.items():
        for short, word in new.items():
            name = name.replace(f".attention{short}", f".attention.attention.{word}.")
        found = back.pop(name.replace(".o_proj.", ".output.dense."))
        if name.startswith("layernorm.") or "mask_token" in name:  # RAE reads neither
            assert set(np.unique(found)) <= {0, 1}
        else:
            np.testing.assert_array_equal(found, x)
    assert not back


def test_every_name_of_the_published_size_is_used():
    """Of the decoder; the encoder has the names of its released file."""
    names = conversion.key_list(GOLDEN / "keys_rae_decoder_xl.txt")
    assert (len(names), sum(int(np.prod(s)) for s in names.values())) == (456, 415_352_704)
    stat = dict.fromkeys(("mean", "var"), (768, 16, 16))
    config, shape = conversion.check_names(RAE_DECODER, names | stat)
    assert config == RAEConfig(grid=16, part="decoder") and shape == ()
    rules = RAE_DECODER.rules(RAEConfig(grid=16), (), None)
    used = {name for rule in rules for name in rule.tensors}
    assert "encoder.layer.11.attention.attention.query.weight" in used
    assert len(used) == 456 + 2 + 8 + 12 * 18


def test_un_patchify_inverts_patchify():
    x = np.arange(2 * 12 * 12 * 3, dtype=np.float32).reshape(2, 12, 12, 3)
    patches = [
        x[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].reshape(2, -1)
        for i in range(3)
        for j in range(3)
    ]
    np.testing.assert_array_equal(unpatchified(jnp.stack(patches, axis=1), 4), x)


def written(folder):
    for name, tensors in reference()[0].items():
        safetensors.numpy.save_file(tensors, folder / f"{name}.safetensors")
    return [folder / f"{name}.safetensors" for name in reference()[0]]


def test_it_takes_the_place_of_an_autoencoder(tmp_path):
    """Three files make one; images become latents in shards, and latents become images."""
    _, io = reference()
    source = ",".join(map(str, written(tmp_path)))
    out = tmp_path / "rae"
    report = convert("rae_decoder", source, out, given=GIVEN, check="none")
    assert report["source"]["file"] == "decoder.safetensors, stat.safetensors, encoder.safetensors"
    pixels = np.round(255 * io["x"].transpose(0, 2, 3, 1)).astype(np.uint8)
    np.savez(tmp_path / "images.npz", pixels)
    folder = encode(out, str(tmp_path / "images.npz"), tmp_path / "latents", size=12, batch=2)
    stored = latents.read(str(folder), "train", flip=False)
    rows = stored.rows(np.arange(2), np.zeros(2, int))
    assert stored.image_shape == (3, 3, 32) and not rows["std"].any()
    given = {"x": pixels.transpose(0, 3, 1, 2) / np.float32(255)}
    want = RAE_DECODER.outputs(*converted()[2:], given)["latent"].transpose(0, 2, 3, 1)
    assert relative_l2(rows["x"], want) <= PARITY["latent"]
    z, mesh = io["z"].transpose(0, 2, 3, 1), sharding.make_mesh()
    images = make_decoder(str(out), (3, 3, 32), mesh, stored.origin())(z)
    assert relative_l2((images + 1) / 2, io["image"].transpose(0, 2, 3, 1)) <= PARITY["image"]
    with pytest.raises(DmfError, match="size is 16: expected 12, the only one"):
        make_decoder(str(out), (4, 4, 32), mesh)
    with pytest.raises(DmfError, match="size is 256: expected 12, the only one"):
        encode(out, str(tmp_path / "images.npz"), tmp_path / "other")
    used = export(out, tmp_path / "whole.safetensors")
    again = conversion.convert_arrays(RAE_DECODER, dict(used), GIVEN)[3]
    _, params = pretrained.load(out)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))


def test_what_does_not_fit_is_one_line():
    files, _ = reference()
    decoder, stat, encoder = files.values()
    wide = {"embeddings.register_tokens": np.zeros((1, 4, 64), np.float32)}
    cases = [
        ({"a": decoder}, {}, "no tensor mean: expected the statistics of the features too"),
        ({"a": stat}, {}, "no tensor decoder_embed.weight"),
        (files | {"more": stat}, {}, "tensor mean is there twice"),
        (files | {"stat": {x: y[:, :2] for x, y in stat.items()}}, {}, r"expected \[32, 3, 3\]"),
        (files | {"encoder": encoder | wide}, {}, "features of 64 channels: expected 32"),
        (files, {"heads": 5}, "RAEConfig.width is 48: expected a multiple of RAEConfig.heads, 5"),
        (files, {"scale": 1}, "--set=scale=1: expected heads or encoder_heads or part"),
        (files | {"more": {"w": np.zeros(3)}}, {}, "tensor w .* has no place in this network"),
    ]
    for tree, given, message in cases:
        with pytest.raises(DmfError, match=message):
            conversion.convert_arrays(RAE_DECODER, Several(tree), GIVEN | given)
    config, _, network, params = conversion.convert_arrays(
        RAE_DECODER, Several(files), GIVEN | {"part": "decoder"}
    )
    assert config.part == "decoder" and "encoder" not in params
    with pytest.raises(DmfError, match="there is no encoder"):
        network.encode(params, jnp.zeros((1, 12, 12, 3)))
