"""DINOv2's released weights, dinov2_vitl14_pretrain.pth and the sizes S and B: the features of FD-DINOv2."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmf.convert.rules import (
    Arrays,
    Kind,
    Rule,
    conv_layer,
    expect,
    linear_layer,
    norm_layer,
    plain,
    tensor_of,
)
from dmf.errors import DmfError
from dmf.networks import layers
from dmf.networks.frozen.dinov2 import DINO_SIZES, SIZE, Dino, DinoConfig
from dmf.storage.readers.read import Tensor, flatten, strip_prefix

NAME = "dinov2"
COPY = "weights"
# Tensors of the releases that this network does not take, by a part of their names.
OTHER_RELEASES = {
    ".mlp.w12.": "is of the SwiGLU blocks of ViT-g/14",
    "register_tokens": "holds registers, with which positions are resampled in another way and features are others",
}


def _select(tree: Any, which: str) -> tuple[dict[str, Tensor], str]:
    if which not in ("", COPY):
        raise DmfError(
            f"copy {which!r} of the weights is unknown: expected {COPY!r}, the only one of kind {NAME}"
        )
    return strip_prefix(flatten(tree, "")), COPY


def _axes(tensors: Mapping[str, Tensor], name: str, count: int) -> tuple[int, ...]:
    shape = tuple(tensor_of(tensors, name, NAME).shape)
    if len(shape) != count or 0 in shape:
        raise DmfError(
            f"tensor {name} has shape {list(shape)}: expected {count} axes, none empty, in weights of kind {NAME}"
        )
    return shape


def _describe(
    tensors: Mapping[str, Tensor], given: Mapping[str, Any]
) -> tuple[DinoConfig, tuple[int, ...]]:
    for field, value in given.items():
        if field != "heads":
            raise DmfError(
                f"--set={field}={value}: expected heads, the only field that these weights may not show"
            )
        layers.check_positive("--set=heads", value)
    for part, what in OTHER_RELEASES.items():
        for name in tensors:
            if part in name:
                raise DmfError(
                    f"tensor {name} {what}: expected DINOv2 ViT-S/14, B/14 or L/14 without registers"
                )
    width, _, patch, _ = _axes(tensors, "patch_embed.proj.weight", 4)
    if SIZE % patch:
        raise DmfError(
            f"tensor patch_embed.proj.weight has patches of {patch} pixels: expected a divisor of {SIZE}, as 14 is"
        )
    tokens = _axes(tensors, "pos_embed", 3)[1]
    grid = math.isqrt(tokens - 1)
    if not grid or grid**2 != tokens - 1:
        raise DmfError(
            f"tensor pos_embed has {tokens} rows: expected one more than a square number, such as 1370"
        )
    depth = len({found[1] for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))})
    heads = _heads(width, depth, given.get("heads"))
    return DinoConfig(depth=depth, width=width, heads=heads, patch=patch, grid=grid), (
        SIZE,
        SIZE,
        3,
    )


def _heads(width: int, depth: int, given: int | None) -> int:
    named = [
        size["heads"]
        for size in DINO_SIZES.values()
        if (size["width"], size["depth"]) == (width, depth)
    ]
    if given is None and not named:
        raise DmfError(
            f"the weights do not show the number of attention heads, and width {width} with depth {depth} is none of the "
            f"released sizes ({', '.join(DINO_SIZES)}): expected --set=heads=N"
        )
    if given is not None and named and given != named[0]:
        raise DmfError(
            f"--set=heads={given}: expected {named[0]}, as in the released size of width {width} and depth {depth}"
        )
    return given or named[0]


def _mask_token(width: int) -> Rule:
    """What stands for masked patches in training: no image has any."""

    def forward(found: np.ndarray) -> Arrays:
        return ()

    note = "stands for masked patches in training, ignored: images have none; zeros on export"
    return Rule(
        ("mask_token",), (), forward, lambda: (np.zeros((1, width), np.float32),), note, note
    )


def _block(i: int) -> list[Rule]:
    name, room = f"blocks.{i}", f"blocks_{i}"
    linear = {
        "attn.qkv": "attn/qkv",
        "attn.proj": "attn/proj",
        "mlp.fc1": "mlp/fc1",
        "mlp.fc2": "mlp/fc2",
    }
    return [
        *(
            rule
            for norm in ("norm1", "norm2")
            for rule in norm_layer(f"{name}.{norm}", f"{room}/{norm}")
        ),
        *(
            rule
            for module, place in linear.items()
            for rule in linear_layer(f"{name}.{module}", f"{room}/{place}")
        ),
        *(plain(f"{name}.{scale}.gamma", f"{room}/{scale}/gamma") for scale in ("ls1", "ls2")),
    ]


def _rules(
    config: DinoConfig, image_shape: tuple[int, ...], tensors: Mapping[str, Tensor] | None
) -> list[Rule]:
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
    x = jnp.asarray(arrays["x"].transpose(0, 2, 3, 1))
    return {"features": np.asarray(jax.jit(network.apply)(params, x))}


def _torch_places(table: Any, side: int) -> Any:
    """The table of positions (1, 1 + n * n, width) for side x side patches, by the released program's call of PyTorch."""
    from torch.nn import functional

    grid = math.isqrt(table.shape[1] - 1)
    if grid == side:
        return table[:, 1:]
    image = table[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    factor = (side + 0.1) / grid
    return (
        functional.interpolate(image, scale_factor=(factor, factor), mode="bicubic")
        .flatten(2)
        .transpose(1, 2)
    )


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """DINOv2 from its state dict; `heads`, which no tensor shows, is one of the arrays."""
    import torch
    from torch.nn import functional

    def weight(name: str) -> Any:
        return tensors[name].float()

    def linear(module: str, x: Any) -> Any:
        return functional.linear(x, weight(f"{module}.weight"), weight(f"{module}.bias"))

    def norm(module: str, x: Any) -> Any:
        return functional.layer_norm(
            x, x.shape[-1:], weight(f"{module}.weight"), weight(f"{module}.bias"), eps=1e-6
        )

    def attention(module: str, x: Any) -> Any:
        qkv = linear(f"{module}.qkv", x).unflatten(-1, (3, int(arrays["heads"]), -1))
        mixed = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return linear(f"{module}.proj", mixed.transpose(1, 2).flatten(2))

    with torch.no_grad():
        kernel, table = weight("patch_embed.proj.weight"), weight("pos_embed")
        image = torch.from_numpy(np.ascontiguousarray(arrays["x"]))
        x = functional.conv2d(
            image, kernel, weight("patch_embed.proj.bias"), stride=kernel.shape[2:]
        )
        x = x.flatten(2).transpose(1, 2) + _torch_places(table, x.shape[-1])
        x = torch.cat(((weight("cls_token") + table[:, :1]).expand(len(x), -1, -1), x), dim=1)
        for i in range(sum(name.endswith(".attn.qkv.weight") for name in tensors)):
            block = f"blocks.{i}"
            x = x + weight(f"{block}.ls1.gamma") * attention(
                f"{block}.attn", norm(f"{block}.norm1", x)
            )
            wide = functional.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)))
            x = x + weight(f"{block}.ls2.gamma") * linear(f"{block}.mlp.fc2", wide)
        return {"features": norm("norm", x[:, 0]).numpy()}


def _probe(config: DinoConfig, image_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Two images, so that a batch mixed up would show; heads, which no name shows."""
    x = np.random.default_rng(0).standard_normal((2, image_shape[2], *image_shape[:2]), np.float32)
    return {"x": x, "heads": np.array(config.heads)}


DINOV2 = Kind(
    name=NAME,
    network="dinov2",
    licence="DINOv2's code and weights are released under the Apache License 2.0.",
    conventions=(
        "no time; x RGB, channels first, 224 x 224, (byte / 255 - mean) / std with ImageNet's (0.485, 0.456, 0.406) and "
        "(0.229, 0.224, 0.225); features = the class token after the last norm. The table of positions is kept as released, "
        "and resampled in use as by DINOv2's program: bicubic, not antialiased, with its offset of 0.1"
    ),
    copies=(COPY,),
    select=_select,
    describe=_describe,
    rules=_rules,
    outputs=_outputs,
    torch_outputs=_torch_outputs,
    probe=_probe,
)
