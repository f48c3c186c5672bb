"""DINOv2: equal to timm's blocks and the released resampling, key map, refused files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dmf import pretrained
from dmf.convert import audit
from dmf.convert.command import convert
from dmf.convert.dinov2 import DINOV2, _torch_places
from dmf.convert.rules import relative_l2
from dmf.errors import DmfError
from dmf.export.weights import export
from dmf.networks.frozen.dinov2 import DINO_SIZES, DinoConfig, build_dinov2, resampling
from tests.conftest import GOLDEN
from tests.conversion import (
    check_names,
    convert_arrays,
    export_arrays,
    hollow,
    needs_torch,
    recipe_weights,
)

TINY = DinoConfig(depth=3, width=80, heads=5)
# Relative L2 to timm 1.0.31 in float64. PyTorch has resampled the positions as DINOv2 does.
# The blocks of transformers 5.23 are 6e-16 away from timm's. Its resampling has no offset
# and is 0.07 away.
BOUND = 1e-6
# PyTorch in float32. timm itself has 6e-7, mostly from positions of samples in float32.
TORCH_BOUND = 2e-6


@functools.cache
def reference():
    """(weights, x as NCHW, features of timm, 3 channels of the resampled table); read only."""
    data = np.load(GOLDEN / "dinov2_tiny_io.npz")
    draw = np.random.RandomState(int(data["recipe/seed"]))
    coarse, fine = draw.standard_normal((2, 3, 16, 16)), draw.standard_normal((2, 3, 224, 224))
    x = (np.kron(coarse, np.ones((14, 14))) + 0.5 * fine).astype(np.float32)
    return recipe_weights(data), x, data["features"], data["places"]


@functools.cache
def converted():
    return convert_arrays(DINOV2, reference()[0], {"heads": 5})


def shapes(depth, width):
    """{name: shape} of a released file."""
    w = width
    found = {"cls_token": (1, 1, w), "pos_embed": (1, 1370, w), "mask_token": (1, w)}
    found |= {"patch_embed.proj.weight": (w, 3, 14, 14), "patch_embed.proj.bias": (w,)}
    block = {
        "norm1.weight": (w,),
        "norm1.bias": (w,),
        "attn.qkv.weight": (3 * w, w),
        "attn.qkv.bias": (3 * w,),
    }
    block |= {
        "attn.proj.weight": (w, w),
        "attn.proj.bias": (w,),
        "ls1.gamma": (w,),
        "norm2.weight": (w,),
        "norm2.bias": (w,),
    }
    block |= {
        "mlp.fc1.weight": (4 * w, w),
        "mlp.fc1.bias": (4 * w,),
        "mlp.fc2.weight": (w, 4 * w),
        "mlp.fc2.bias": (w,),
    }
    block |= {"ls2.gamma": (w,)}
    found |= {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    return found | {"norm.weight": (w,), "norm.bias": (w,)}


def test_the_network_equals_timm():
    """Two images show a batch that is mixed up; 5 heads of 16 show heads and sizes swapped."""
    _, x, want, _ = reference()
    config, shape, network, params = converted()
    assert config == TINY and shape == (224, 224, 3)
    got = DINOV2.outputs(network, params, {"x": x})["features"]
    assert got.shape == (2, 80) and relative_l2(got, want) <= BOUND
    assert relative_l2(got[::-1], want) > 0.1


@needs_torch
@pytest.mark.parametrize(("half", "low", "high"), [(False, 0, TORCH_BOUND), (True, 1e-5, 3e-3)])
def test_the_check_against_pytorch_equals_timm(half, low, high):
    import torch

    weights, x, want, _ = reference()
    # The order of a safetensors file.
    tensors = {name: torch.from_numpy(weights[name]) for name in sorted(weights)}
    tensors = {name: value.half() for name, value in tensors.items()} if half else tensors
    got = DINOV2.torch_outputs(tensors, {"x": x, "heads": np.array(5)})["features"]
    assert got.dtype == np.float32 and low <= relative_l2(got, want) <= high


def test_positions_are_resampled_as_by_the_released_program():
    """PyTorch's bicubic interpolation in float64, by the factor (16 + 0.1) / 37."""
    weights, _, _, want = reference()
    table = weights["pos_embed"][0, 1:, :3].astype(np.float64).reshape(37, 37, 3)
    rows = resampling(37, 16)
    np.testing.assert_allclose(np.einsum("ip,jq,pqc->cij", rows, rows, table), want, atol=1e-12)
    np.testing.assert_allclose(rows.sum(1), 1, atol=1e-12)
    assert np.array_equal(resampling(16, 16), np.eye(16))


@needs_torch
@pytest.mark.parametrize(
    ("source", "target"), [(37, 16), (37, 32), (16, 37), (5, 16), (1, 14), (16, 16)]
)
def test_any_table_is_resampled_as_pytorch_does(source, target):
    import torch

    table = np.random.default_rng(0).standard_normal((1, 1 + source**2, 2))
    want = _torch_places(torch.from_numpy(table), target).numpy()[0].reshape(target, target, 2)
    rows = resampling(source, target)
    np.testing.assert_allclose(
        np.einsum("ip,jq,pqc->ijc", rows, rows, table[0, 1:].reshape(source, source, 2)),
        want,
        atol=1e-12,
    )


def test_a_table_of_16_rows_is_taken_as_it_is():
    """timm's file for 224 pixels has resampled positions and no mask_token."""
    weights, x, want, _ = reference()
    table, rows = weights["pos_embed"][0].astype(np.float64), resampling(37, 16)
    places = np.einsum("ip,jq,pqc->ijc", rows, rows, table[1:].reshape(37, 37, 80)).reshape(256, 80)
    small = weights | {"pos_embed": np.concatenate((table[:1], places))[None].astype(np.float32)}
    del small["mask_token"]
    config, _, network, params = convert_arrays(DINOV2, small, {"heads": 5})
    assert config.grid == 16
    assert relative_l2(DINOV2.outputs(network, params, {"x": x})["features"], want) <= BOUND


@pytest.mark.parametrize(
    ("size", "count"), [("S", 22_056_192), ("B", 86_579_712), ("L", 304_367_616)]
)
def test_every_tensor_and_every_leaf_of_a_released_file_is_used_once(size, count):
    """With mask_token and without; counts of parameters as timm gives them."""
    shape = DINO_SIZES[size]
    full = shapes(shape["depth"], shape["width"])
    config, _ = check_names(DINOV2, full)
    assert config == DinoConfig(**shape)
    check_names(DINOV2, {name: found for name, found in full.items() if name != "mask_token"})
    leaves = audit.leaf_shapes(build_dinov2(config))
    assert (
        len(leaves) == len(full) - 1
        and sum(int(np.prod(found)) for found in leaves.values()) == count
    )


def test_a_round_trip_is_bit_equal():
    weights = reference()[0]
    assert {name: x.shape for name, x in weights.items()} == shapes(3, 80)
    back = export_arrays(DINOV2, *converted())
    assert {name: x.shape for name, x in back.items()} == shapes(3, 80)
    assert all(np.array_equal(back[name], x) for name, x in weights.items() if name != "mask_token")
    assert not back["mask_token"].any()


def test_a_file_becomes_a_checkpoint_and_a_file_again(tmp_path):
    """By the commands: compared with stored outputs, loaded, exported.

    The report says why mask_token is left out.
    """
    weights, x, want, _ = reference()
    safetensors.numpy.save_file(weights, tmp_path / "dino.safetensors")
    np.savez(tmp_path / "io.npz", x=x, features=want)
    source, out, check = tmp_path / "dino.safetensors", tmp_path / "out", str(tmp_path / "io.npz")
    with pytest.raises(DmfError, match=r"forward check of features against io\.npz: relative L2"):
        convert("dinov2", source, out, given={"heads": 4}, check=check)
    report = convert("dinov2", source, out, given={"heads": 5}, check=check)
    assert report["checks"][0]["relative_l2"] <= BOUND and "Apache" in report["licence"]
    notes = {row["tensors"][0]: row["note"] for row in report["tensors"] if row["note"]}
    assert list(notes) == ["mask_token"] and "training" in notes["mask_token"]
    network, params = pretrained.load(out)
    assert np.array_equal(params["pos_embed"], weights["pos_embed"])
    features = jax.eval_shape(
        network.apply, params, jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    )
    assert features.shape == (1, 80)
    back = export(out, tmp_path / "again.safetensors")
    assert set(back) == set(weights) and np.array_equal(
        back["blocks.2.attn.qkv.weight"], weights["blocks.2.attn.qkv.weight"]
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float64])
def test_every_product_is_in_full_float32(dtype, float64):
    """For any default precision and dtype of the image.

    There are 6 products in a block, 2 for the positions, and 1 for the patches.
    """
    network = build_dinov2(TINY)
    params = jax.eval_shape(network.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    x = jax.ShapeDtypeStruct((2, 224, 224, 3), dtype)
    with jax.default_matmul_precision("bfloat16"):
        assert jax.eval_shape(network.apply, params, x) == jax.ShapeDtypeStruct((2, 80), np.float32)
        program = jax.jit(network.apply).lower(params, x).as_text()
    products = [
        line
        for line in program.splitlines()
        if "stablehlo.convolution" in line or "stablehlo.dot_general" in line
    ]
    assert len(products) == 6 * 3 + 3
    for line in products:
        assert line.count("HIGHEST") == 2 and "bf16" not in line and "f64" not in line


def with_(**changes):
    """Names and shapes of ViT-S/14 with some changed; None takes one away."""
    found = shapes(12, 384) | {name.replace("__", "."): shape for name, shape in changes.items()}
    return {name: shape for name, shape in found.items() if shape is not None}


GIANT = {name: shape for name, shape in shapes(40, 1536).items() if ".mlp." not in name}
GIANT |= {f"blocks.{i}.mlp.w12.weight": (8192, 1536) for i in range(40)}
WRONG = {
    "of another kind": (
        {"fc.weight": (1008, 2048)},
        r"no tensor patch_embed\.proj\.weight among 1",
    ),
    "of ViT-g": (
        GIANT,
        r"w12\.weight is of the SwiGLU blocks of ViT-g/14: expected DINOv2 ViT-S/14, B/14 or L/14",
    ),
    "with registers": (
        with_(register_tokens=(1, 4, 384)),
        "register_tokens holds registers.*expected .* without registers",
    ),
    "without layer scales": (
        with_(blocks__3__ls1__gamma=None),
        r"blocks\.3\.ls1\.gamma is missing",
    ),
    "with a hole": (
        with_(blocks__7__attn__qkv__bias=None),
        r"blocks\.7\.attn\.qkv\.bias is missing",
    ),
    "without positions": (with_(pos_embed=None), "no tensor pos_embed"),
    "with odd positions": (
        with_(pos_embed=(1, 1374, 384)),
        "pos_embed has 1374 rows: expected one more than a square",
    ),
    "with flat positions": (
        with_(pos_embed=(1370, 384)),
        r"pos_embed has shape \[1370, 384\]: expected 3 axes",
    ),
    "with odd patches": (
        with_(patch_embed__proj__weight=(384, 3, 15, 15)),
        "patches of 15 pixels: expected a divisor of 224",
    ),
    "with grey images": (
        with_(patch_embed__proj__weight=(384, 1, 14, 14)),
        r"\[384, 1, 14, 14\]: expected \[384, 3, 14, 14\]",
    ),
    "of another ratio": (
        with_(blocks__0__mlp__fc1__weight=(768, 384)),
        r"\[768, 384\]: expected \[1536, 384\]",
    ),
    "with a head": (with_(head__weight=(1000, 384)), r"head\.weight \[1000, 384\] has no place"),
    "of no released size": (
        shapes(11, 384),
        "width 384 with depth 11 is none of the named sizes.*expected --set=heads=N",
    ),
}


@pytest.mark.parametrize("which", WRONG)
def test_a_file_is_refused(which):
    found, message = WRONG[which]
    with pytest.raises(DmfError, match=message):
        check_names(DINOV2, found)


GIVEN = {
    "patch": ({"patch": 14}, "--set=patch=14: expected heads for kind dinov2"),
    "no number": ({"heads": "many"}, "--set=heads is 'many'; expected an integer"),
    "not the released one": (
        {"heads": 12},
        "--set=heads=12: expected 6, as in the named size of width 384 and depth 12",
    ),
}


@pytest.mark.parametrize("which", GIVEN)
def test_what_is_given_is_checked(which):
    given, message = GIVEN[which]
    with pytest.raises(DmfError, match=message):
        DINOV2.describe(hollow(shapes(12, 384)), given)
    with pytest.raises(DmfError, match="--copy=ema is not in this file: expected weights"):
        DINOV2.select({}, "ema")


CONFIGS = {
    "heads": ({"heads": 7}, "width is 80; expected a multiple of config.heads, 7"),
    "patch": ({"patch": 15}, "patch is 15; expected a divisor of 224"),
    "depth": ({"depth": 0}, "config.depth is 0; expected an integer of at least 1"),
    "kind": ({"kind": "dit"}, "config.kind is 'dit' in a DinoConfig; expected 'dinov2'"),
}


@pytest.mark.parametrize("which", CONFIGS)
def test_a_config_is_checked(which):
    changes, message = CONFIGS[which]
    with pytest.raises(DmfError, match=message):
        build_dinov2(DinoConfig(**{"depth": 3, "width": 80, "heads": 5} | changes))


def test_images_of_another_size_are_refused():
    network = build_dinov2(TINY)
    for shape in ((1, 518, 518, 3), (1, 3, 224, 224), (224, 224, 3)):
        with pytest.raises(DmfError, match="expected \\(B, 224, 224, 3\\)"):
            network.apply({}, np.zeros(shape, np.float32))
