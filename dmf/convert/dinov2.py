"""DINOv2's released weights, such as dinov2_vitl14_pretrain.pth: the features of FD-DINOv2."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dmf.convert.copies import Copies
from dmf.convert.kind import (
    Kind,
    Shape,
    Tensors,
    axes,
    check_given,
    expect,
    heads_of,
    nhwc,
)
from dmf.convert.rules import Rule, conv_layer, linear_layer, norm_layer, plain, unread
from dmf.errors import DmfError
from dmf.networks import layers
from dmf.networks.frozen.dinov2 import DINO_SIZES, SIZE, Dino, DinoConfig

NAME = "dinov2"
COPIES = Copies(r"patch_embed\.proj\.weight", (), "weights")
# Other releases: part of a tensor's name -> what that tensor is.
OTHER_RELEASES = {
    ".mlp.w12.": "is of the SwiGLU blocks of ViT-g/14",
    "register_tokens": "holds registers, with which positions and features are others",
}


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[DinoConfig, Shape]:
    check_given(given, ["heads"], NAME)
    for value in given.values():
        layers.check_positive("--set=heads", value)
    for part, what in OTHER_RELEASES.items():
        for name in tensors:
            if part in name:
                raise DmfError(
                    f"tensor {name} {what}: "
                    "expected DINOv2 ViT-S/14, B/14 or L/14 without registers"
                )
    width, _, patch, _ = axes(tensors, "patch_embed.proj.weight", 4, NAME)
    if SIZE % patch:
        raise DmfError(
            f"tensor patch_embed.proj.weight has patches of {patch} pixels: "
            f"expected a divisor of {SIZE}, as 14 is"
        )
    tokens = axes(tensors, "pos_embed", 3, NAME)[1]
    grid = math.isqrt(tokens - 1)
    if not grid or grid**2 != tokens - 1:
        raise DmfError(
            f"tensor pos_embed has {tokens} rows: "
            "expected one more than a square number, such as 1370"
        )
    depth = len({found[1] for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))})
    heads = heads_of(DINO_SIZES, width, depth, given.get("heads"))
    config = DinoConfig(depth=depth, width=width, heads=heads, patch=patch, grid=grid)
    return config, (SIZE, SIZE, 3)


def _mask_token(width: int) -> Rule:
    note = "stands for masked patches in training, ignored: images have none; zeros on export"
    return unread("mask_token", lambda: np.zeros((1, width), np.float32), note, note)


def _block(i: int) -> list[Rule]:
    name, room = f"blocks.{i}", f"blocks_{i}"
    modules = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    linear = [linear_layer(f"{name}.{m}", f"{room}/{m.replace('.', '/')}") for m in modules]
    return [
        *norm_layer(f"{name}.norm1", f"{room}/norm1"),
        *norm_layer(f"{name}.norm2", f"{room}/norm2"),
        *(rule for rules in linear for rule in rules),
        plain(f"{name}.ls1.gamma", f"{room}/ls1/gamma"),
        plain(f"{name}.ls2.gamma", f"{room}/ls2/gamma"),
    ]


def _rules(config: DinoConfig, image_shape: Shape, tensors: Tensors | None) -> list[Rule]:
    expect(config, NAME, {"kind": "dinov2"})
    return [
        plain("cls_token", "cls_token"),
        plain("pos_embed", "pos_embed"),
        _mask_token(config.width),
        *conv_layer("patch_embed.proj", "patch_embed/proj"),
        *(rule for i in range(config.depth) for rule in _block(i)),
        *norm_layer("norm", "norm"),
    ]


def _outputs(network: Dino, params: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if "x" not in arrays:
        return {}
    return {"features": np.asarray(jax.jit(network.apply)(params, nhwc(arrays["x"])))}


def _torch_places(table: Any, side: int) -> Any:
    """Positions of side x side patches, resampled as by the released program.

    table: (1, 1 + n * n, width) -> (1, side * side, width).
    """
    from torch.nn import functional

    grid = math.isqrt(table.shape[1] - 1)
    if grid == side:
        return table[:, 1:]
    image = table[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    factors = ((side + 0.1) / grid,) * 2
    found = functional.interpolate(image, scale_factor=factors, mode="bicubic")
    return found.flatten(2).transpose(1, 2)


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """DINOv2 in PyTorch. No tensor shows the number of heads, so it is among the arrays."""
    import torch
    from torch.nn import functional

    def weight(name: str) -> Any:
        return tensors[name].float()

    def linear(module: str, x: Any) -> Any:
        return functional.linear(x, weight(f"{module}.weight"), weight(f"{module}.bias"))

    def norm(module: str, x: Any) -> Any:
        scale, bias = weight(f"{module}.weight"), weight(f"{module}.bias")
        return functional.layer_norm(x, x.shape[-1:], scale, bias, eps=1e-6)

    def attention(module: str, x: Any) -> Any:
        qkv = linear(f"{module}.qkv", x).unflatten(-1, (3, int(arrays["heads"]), -1))
        mixed = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return linear(f"{module}.proj", mixed.transpose(1, 2).flatten(2))

    with torch.no_grad():
        kernel, table = weight("patch_embed.proj.weight"), weight("pos_embed")
        image = torch.from_numpy(np.ascontiguousarray(arrays["x"]))
        bias = weight("patch_embed.proj.bias")
        x = functional.conv2d(image, kernel, bias, stride=kernel.shape[2:])
        x = x.flatten(2).transpose(1, 2) + _torch_places(table, x.shape[-1])
        x = torch.cat(((weight("cls_token") + table[:, :1]).expand(len(x), -1, -1), x), dim=1)
        for i in range(sum(name.endswith(".attn.qkv.weight") for name in tensors)):
            block = f"blocks.{i}"
            y = attention(f"{block}.attn", norm(f"{block}.norm1", x))
            x = x + weight(f"{block}.ls1.gamma") * y
            wide = functional.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
            x = x + weight(f"{block}.ls2.gamma") * linear(f"{block}.mlp.fc2", wide)
        return {"features": norm("norm", x[:, 0]).numpy()}


def _probe(config: DinoConfig, image_shape: Shape) -> dict[str, np.ndarray]:
    """Two images, to show a batch that is mixed up, and the number of heads."""
    x = np.random.default_rng(0).standard_normal((2, image_shape[2], *image_shape[:2]), np.float32)
    return {"x": x, "heads": np.array(config.heads)}


DINOV2 = Kind(
    name=NAME,
    network="dinov2",
    licence="DINOv2's code and weights are released under the Apache License 2.0.",
    conventions=(
        "no time; x RGB, channels first, 224 x 224, (byte / 255 - mean) / std with ImageNet's "
        "(0.485, 0.456, 0.406) and (0.229, 0.224, 0.225); "
        "features = the class token after the last norm. "
        "The table of positions is kept as released, and resampled in use as by DINOv2's program: "
        "bicubic, not antialiased, with its offset of 0.1"
    ),
    select=COPIES.select,
    describe=_describe,
    rules=_rules,
    outputs=_outputs,
    torch_outputs=_torch_outputs,
    probe=_probe,
)
