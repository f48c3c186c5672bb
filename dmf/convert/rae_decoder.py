"""The representation autoencoder in PyTorch: decoder, statistics and encoder, from several files.

    model.pt            bytetriper/RAE's decoder, a flat state dict
    stat.pt             mean and var of the encoder's features, (C, h, w) each
    model.safetensors   DINOv2 with registers, as transformers stores it; may be left out

`--source` names them with commas. Without the encoder the autoencoder decodes alone. Two spellings
of the encoder's attention are known: that of released files, and that of transformers 5.
"""

from __future__ import annotations

import functools
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
    fact_of,
    heads_of,
    nchw,
    nhwc,
)
from dmf.convert.rules import Rule, conv_layer, linear_layer, norm_layer, plain, unread
from dmf.errors import DmfError
from dmf.networks import layers
from dmf.networks.frozen import rae
from dmf.networks.frozen.dinov2 import DINO_SIZES
from dmf.networks.frozen.rae import RAEConfig
from dmf.networks.frozen.vae import PARTS, VAE
from dmf.storage.readers.read import Several, flatten
from dmf.storage.readers.tree import Tensor

NAME = "rae_decoder"
DECODER = Copies(r"decoder_embed\.weight", (("ema", "ema"), ("model", "model")), "flat")
ENCODER = Copies(r"embeddings\.register_tokens", (), "encoder")
SPELLINGS = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
GIVEN = ("heads", "encoder_heads", "part")
DECODER_SIZES = {
    "B": {"depth": 12, "width": 768, "heads": 12},
    "L": {"depth": 24, "width": 1024, "heads": 16},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}
NO_NORM = "RAE's last norm of the encoder has no weights; 1 and 0 on export"
NO_MASK = "stands for masked patches in training, ignored: images have none; zeros on export"


def _select(tree: Any, which: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of all files, in the spelling of released ones, and the decoder's copy."""
    found: dict[str, Tensor] = {}
    copy = DECODER.bare
    for file in tree.values() if isinstance(tree, Several) else (tree,):
        tensors = flatten(file)
        if any(re.search(DECODER.mark, name) for name in tensors):
            tensors, copy = DECODER.select(file, which)
        elif any(re.search(ENCODER.mark, name) for name in tensors):
            tensors, _ = ENCODER.select(file, "")
        for name, tensor in tensors.items():
            for pattern, released in SPELLINGS:
                name = re.sub(pattern, released, name)
            if found.setdefault(name, tensor) is not tensor:
                raise DmfError(f"tensor {name} is there twice: expected each name in one file")
    return found, copy


def _count(tensors: Tensors, pattern: str) -> int:
    return len({found[1] for name in tensors if (found := re.match(pattern, name))})


def _side(tensors: Tensors, name: str) -> int:
    """Side of the square table of positions, which a class token precedes. Raises DmfError."""
    rows = axes(tensors, name, 3, NAME)[1]
    side = math.isqrt(max(rows - 1, 0))
    if not side or side**2 != rows - 1:
        raise DmfError(
            f"tensor {name} has {rows} rows: expected one more than a square number, such as 257"
        )
    return side


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[RAEConfig, Shape]:
    """The config. The shape is (), as of other autoencoders."""
    check_given(given, GIVEN, NAME)
    layers.check_choice("--set=part", part := given.get("part", PARTS[0]), PARTS)
    width, channels = axes(tensors, "decoder_embed.weight", 2, NAME)
    values = axes(tensors, "decoder_pred.weight", 2, NAME)[0]
    patch = math.isqrt(values // 3)
    if 3 * patch**2 != values:
        raise DmfError(f"tensor decoder_pred.weight has {values} rows: expected 3 patch^2, of RGB")
    for name in ("mean", "var"):
        if name not in tensors:
            raise DmfError(
                f"no tensor {name}: expected the statistics of the features too, "
                "--source=model.pt,stat.pt"
            )
    depth = _count(tensors, r"decoder_layers\.(\d+)\.")
    decoder: dict[str, Any] = dict(
        depth=depth,
        width=width,
        heads=heads_of(DECODER_SIZES, width, depth, given.get("heads")),
        hidden=axes(tensors, "decoder_layers.0.intermediate.dense.weight", 2, NAME)[0],
        patch=patch,
        grid=_side(tensors, "decoder_pos_embed"),
        latent_channels=channels,
    )
    if "embeddings.register_tokens" not in tensors or part == "decoder":
        return RAEConfig(**decoder, part="decoder"), ()
    return RAEConfig(**decoder, **_encoder_of(tensors, channels, given)), ()


def _encoder_of(tensors: Tensors, channels: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the encoder. Raises DmfError for one of other features than the decoder's."""
    _, registers, width = axes(tensors, "embeddings.register_tokens", 3, NAME)
    if width != channels:
        raise DmfError(
            f"the encoder has features of {width} channels: expected {channels}, as the decoder"
        )
    depth = _count(tensors, r"encoder\.layer\.(\d+)\.")
    return dict(
        encoder_depth=depth,
        encoder_heads=heads_of(DINO_SIZES, width, depth, given.get("encoder_heads")),
        encoder_patch=axes(tensors, "embeddings.patch_embeddings.projection.weight", 4, NAME)[2],
        encoder_grid=_side(tensors, "embeddings.position_embeddings"),
        registers=registers,
    )


def _attention(module: str, room: str) -> list[Rule]:
    """Queries, keys and values, joined, and the projection after them."""
    names = [f"{module}.attention.{x}" for x in ("query", "key", "value")]
    note = "queries, keys and values as one matrix"

    def joined(leaf: str, kind: str) -> Rule:
        def forward(*x: np.ndarray) -> tuple[np.ndarray, ...]:
            return (np.concatenate(x, axis=0).T,)

        tensors = tuple(f"{name}.{kind}" for name in names)
        return Rule(tensors, (f"{room}/qkv/{leaf}",), forward, lambda x: np.split(x.T, 3), note)

    projection = linear_layer(f"{module}.output.dense", f"{room}/proj")
    return [joined("kernel", "weight"), joined("bias", "bias"), *projection]


def _decoder(config: RAEConfig) -> list[Rule]:
    rules = [
        *linear_layer("decoder_embed", "decoder/embed"),
        plain("trainable_cls_token", "decoder/cls_token"),
        plain("decoder_pos_embed", "decoder/pos_embed"),
        *norm_layer("decoder_norm", "decoder/norm"),
        *linear_layer("decoder_pred", "decoder/pred"),
    ]
    for i in range(config.depth):
        module, room = f"decoder_layers.{i}", f"decoder/layers_{i}"
        norms = [f"layernorm_{x}" for x in ("before", "after")]
        rules += [rule for x in norms for rule in norm_layer(f"{module}.{x}", f"{room}/{x}")]
        rules += _attention(f"{module}.attention", f"{room}/attn")
        rules += linear_layer(f"{module}.intermediate.dense", f"{room}/fc1")
        rules += linear_layer(f"{module}.output.dense", f"{room}/fc2")
    return rules


def _encoder(config: RAEConfig) -> list[Rule]:
    width = config.latent_channels
    ones, none = (functools.partial(f, width, np.float32) for f in (np.ones, np.zeros))
    mask = functools.partial(np.zeros, (1, width), np.float32)
    rules = [
        plain("embeddings.cls_token", "encoder/cls_token"),
        plain("embeddings.register_tokens", "encoder/register_tokens"),
        plain("embeddings.position_embeddings", "encoder/pos_embed"),
        *conv_layer("embeddings.patch_embeddings.projection", "encoder/patch_embed/proj"),
        unread("embeddings.mask_token", mask, NO_MASK, NO_MASK),
        unread("layernorm.weight", ones, NO_NORM, NO_NORM),
        unread("layernorm.bias", none, NO_NORM, NO_NORM),
    ]
    for i in range(config.encoder_depth):
        module, room = f"encoder.layer.{i}", f"encoder/blocks_{i}"
        rules += [r for n in (1, 2) for r in norm_layer(f"{module}.norm{n}", f"{room}/norm{n}")]
        rules += _attention(f"{module}.attention", f"{room}/attn")
        rules += [
            r for n in (1, 2) for r in linear_layer(f"{module}.mlp.fc{n}", f"{room}/mlp/fc{n}")
        ]
        rules += [plain(f"{module}.layer_scale{n}.lambda1", f"{room}/ls{n}/gamma") for n in (1, 2)]
    return rules


def _rules(config: RAEConfig, shape: Shape, tensors: Tensors | None) -> list[Rule]:
    expect(config, NAME, {"kind": "rae"})
    first, last = (2, 0, 1), (1, 2, 0)  # which axis of (h, w, C) and of (C, h, w)
    rules = _decoder(config)
    for name in ("mean", "var"):

        def forward(x: np.ndarray) -> tuple[np.ndarray, ...]:
            return (x.transpose(last),)

        rules.append(Rule((name,), (name,), forward, lambda x: (x.transpose(first),)))
    if config.part == "both":
        return rules + _encoder(config)
    note = "of the encoder, left out: part is 'decoder'"
    found = tensors or {}
    left = [name for name in found if name.startswith(("embeddings.", "encoder.", "layernorm."))]
    blank = functools.partial(np.broadcast_to, np.float32(0))
    return rules + [
        unread(name, functools.partial(blank, tuple(found[name].shape)), note) for name in left
    ]


def _outputs(network: VAE, params: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """latent of images x in [0, 1], and image in [0, 1] of latents z; channels first."""
    found = {}
    if "x" in arrays:
        found["latent"] = nchw(jax.jit(network.encode)(params, 2 * nhwc(arrays["x"]) - 1)[0])
    if "z" in arrays:
        found["image"] = nchw(jax.jit(network.decode)(params, nhwc(arrays["z"])) + 1) / 2
    return found


def _probe(config: RAEConfig, shape: Shape) -> dict[str, np.ndarray]:
    """Two images and two latents, and the numbers of heads, which no tensor shows."""
    rng, side = np.random.default_rng(0), config.patch * config.grid
    z = rng.standard_normal((2, config.latent_channels, config.grid, config.grid), np.float32)
    found = {"z": z, "heads": np.array(config.heads)}
    if config.part == "decoder":
        return found
    x = rng.uniform(0, 1, (2, 3, side, side)).astype(np.float32)
    return found | {"x": x, "encoder_heads": np.array(config.encoder_heads)}


class _Torch:
    """PyTorch's functions on the tensors; each takes the name of its module."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        import torch

        self.torch, self.f, self.tensors = torch, torch.nn.functional, tensors
        self.mean, self.std = (torch.tensor(x).view(1, 3, 1, 1) for x in (rae.MEAN, rae.STD))

    def weight(self, name: str) -> Any:
        return self.tensors[name].float()

    def linear(self, x: Any, module: str) -> Any:
        return self.f.linear(x, self.weight(f"{module}.weight"), self.weight(f"{module}.bias"))

    def norm(self, x: Any, module: str, eps: float) -> Any:
        weights = (self.weight(f"{module}.{x}") for x in ("weight", "bias"))
        return self.f.layer_norm(x, x.shape[-1:], *weights, eps=eps)

    def attention(self, x: Any, module: str, heads: int) -> Any:
        qkv = (
            self.linear(x, f"{module}.attention.{name}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = self.f.scaled_dot_product_attention(*qkv)
        return self.linear(mixed.transpose(1, 2).flatten(2), f"{module}.output.dense")

    def mlp(self, x: Any, first: str, last: str) -> Any:
        return self.linear(self.f.gelu(self.linear(x, first)), last)

    def statistics(self) -> tuple[Any, Any]:
        return self.weight("mean"), (self.weight("var") + rae.EPS).sqrt()

    def encode(self, x: Any, heads: int) -> Any:
        kernel = self.weight(patch := "embeddings.patch_embeddings.projection.weight")
        grid, mean, std = self.weight("mean").shape[-1], *self.statistics()
        size = (grid * kernel.shape[-1],) * 2
        pixels = self.f.interpolate(x, size=size, mode="bicubic", align_corners=False)
        pixels, bias = (pixels - self.mean) / self.std, self.weight(f"{patch[:-6]}bias")
        y = self.f.conv2d(pixels, kernel, bias, stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
        table = self.weight("embeddings.position_embeddings")
        square = table[:, 1:].unflatten(1, (math.isqrt(table.shape[1] - 1), -1)).movedim(3, 1)
        places = self.f.interpolate(square, size=(grid, grid), mode="bicubic", antialias=True)
        token = self.weight("embeddings.cls_token") + table[:, :1]
        first = self.torch.cat((token, self.weight("embeddings.register_tokens")), dim=1)
        y = self.torch.cat((first.expand(len(y), -1, -1), y + places.flatten(2).mT), dim=1)
        for i in range(_count(self.tensors, r"encoder\.layer\.(\d+)\.")):
            name = f"encoder.layer.{i}"
            mixed = self.attention(self.norm(y, f"{name}.norm1", 1e-6), f"{name}.attention", heads)
            y = y + self.weight(f"{name}.layer_scale1.lambda1") * mixed
            wide = self.norm(y, f"{name}.norm2", 1e-6)
            wide = self.mlp(wide, f"{name}.mlp.fc1", f"{name}.mlp.fc2")
            y = y + self.weight(f"{name}.layer_scale2.lambda1") * wide
        y = self.f.layer_norm(y[:, first.shape[1] :], y.shape[-1:], eps=1e-6)
        return (y.mT.unflatten(2, (grid, grid)) - mean) / std

    def decode(self, z: Any, heads: int) -> Any:
        mean, std = self.statistics()
        x = self.linear((z * std + mean).flatten(2).mT, "decoder_embed")
        token = self.weight("trainable_cls_token").expand(len(x), -1, -1)
        x = self.torch.cat((token, x), dim=1) + self.weight("decoder_pos_embed")
        for i in range(_count(self.tensors, r"decoder_layers\.(\d+)\.")):
            name = f"decoder_layers.{i}"
            y = self.norm(x, f"{name}.layernorm_before", 1e-12)
            x = x + self.attention(y, f"{name}.attention", heads)
            y = self.norm(x, f"{name}.layernorm_after", 1e-12)
            x = x + self.mlp(y, f"{name}.intermediate.dense", f"{name}.output.dense")
        x = self.linear(self.norm(x, "decoder_norm", 1e-12), "decoder_pred")[:, 1:]
        patch = math.isqrt(x.shape[-1] // 3)
        image = self.f.pixel_shuffle(
            x.unflatten(-1, (patch * patch, 3))
            .transpose(2, 3)
            .flatten(2)
            .mT.unflatten(2, z.shape[2:]),
            patch,
        )
        return image * self.std + self.mean


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs of `_outputs`. The arrays hold the numbers of heads."""
    import torch

    net, found = _Torch(tensors), {}
    with torch.no_grad():
        if "x" in arrays:
            found["latent"] = net.encode(torch.tensor(arrays["x"]), int(arrays["encoder_heads"]))
        if "z" in arrays:
            found["image"] = net.decode(torch.tensor(arrays["z"]), int(arrays["heads"]))
    return {name: x.numpy() for name, x in found.items()}


RAE_DECODER = Kind(
    name=NAME,
    network="rae",
    licence="RAE's repository: MIT; DINOv2's code and weights: Apache-2.0; trained on ImageNet.",
    conventions=(
        "images in [0, 1] there, in [-1, 1] here; latents are features of DINOv2 with registers, "
        "after a norm without weights, normalised by stat.pt: (f - mean) / sqrt(var + 1e-5); "
        "scale is 1 and shift is 0; an image has one size, the decoder's"
    ),
    select=_select,
    describe=_describe,
    rules=_rules,
    outputs=_outputs,
    torch_outputs=_torch_outputs,
    probe=_probe,
    facts=(fact_of("heads"), fact_of("encoder_heads")),
    several=True,
)
