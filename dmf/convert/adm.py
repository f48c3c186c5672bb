"""TorchCFM's flow models on CIFAR-10 (I-CFM, OT-CFM and FM, 400,000 steps): the ADM U-Net without classes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dmf.convert.rules import (
    Kind,
    Rule,
    conv_layer,
    expect,
    linear_layer,
    negated,
    norm_layer,
    optional,
    plain,
    reversed_layer,
    tensor_of,
)
from dmf.errors import DmfError
from dmf.networks import ADMConfig, Network, layers
from dmf.networks.adm import GROUPS, plan
from dmf.storage.readers.read import Tensor, flatten, strip_prefix

NAME = "torchcfm"
GIVEN = ("head_channels", "resolution", "dropout")  # what neither names nor shapes tell
RELEASED = (
    128,
    (1, 2, 2, 2),
    2,
    (1,),
)  # channels, channel_mult, blocks, levels with attention; 32 pixels, 64 per head
NEW = "the source has no interval branch"
REVERSED = "time reversal, t -> 1 - t, folded in: a rotation of the cosines and sines of t"
NEGATED = "sign folded in: the source's velocity is data - noise"


def _select(tree: Any, which: str) -> tuple[dict[str, Tensor], str]:
    copies = [name for name in TORCHCFM.copies if isinstance(tree, dict) and name in tree]
    name = which or (copies[0] if copies else "")
    if name and name not in copies:
        raise DmfError(
            f"copy = {which!r}: expected {' or '.join(map(repr, copies)) or 'none, as this file holds one copy'}"
        )
    return strip_prefix(flatten(tree[name] if name else tree, "")), name or "flat"


def _describe(
    tensors: Mapping[str, Tensor], given: Mapping[str, Any]
) -> tuple[ADMConfig, tuple[int, ...]]:
    channels = _width(tensors, "time_embed.0.weight", 1)
    image_channels = _width(tensors, "input_blocks.0.0.weight", 1)
    if "label_emb.weight" in tensors:
        raise DmfError(f"tensor label_emb.weight: expected weights of kind {NAME} without classes")
    levels = _levels(tensors)
    mult, blocks = tuple(level[0][0] // channels for level in levels), len(levels[0])
    attend = tuple(i for i, level in enumerate(levels) if level[0][1])
    heads, size, dropout = _given(given, (channels, mult, blocks, attend) == RELEASED)
    config = ADMConfig(
        channels=channels,
        channel_mult=mult,
        blocks=blocks,
        attention_resolutions=tuple(size >> i for i in attend),
        head_channels=heads,
        dropout=dropout,
    )
    return config, (size, size, image_channels)


def _width(tensors: Mapping[str, Tensor], name: str, axis: int) -> int:
    shape = tuple(tensor_of(tensors, name, NAME).shape)
    if len(shape) != (2 if name.startswith("time_embed") else 4) or not all(shape):
        raise DmfError(
            f"tensor {name} has shape {list(shape)}: expected the weights of kind {NAME}"
        )
    return shape[axis]


def _levels(tensors: Mapping[str, Tensor]) -> list[list[tuple[int, bool]]]:
    """Width and attention of the encoder's blocks, resolution by resolution. Raises DmfError for another kind of U-Net."""
    levels: list[list[tuple[int, bool]]] = [[]]
    for n in itertools.count(1):
        row = f"input_blocks.{n}"
        if f"{row}.0.op.weight" in tensors:
            levels.append([])
        elif f"{row}.0.in_layers.2.weight" in tensors:
            levels[-1].append(
                (
                    _width(tensors, f"{row}.0.in_layers.2.weight", 0),
                    f"{row}.1.qkv.weight" in tensors,
                )
            )
        else:
            break
    channels = _width(tensors, "time_embed.0.weight", 1)
    alike = all(len(set(level)) == 1 and len(level) == len(levels[0]) for level in levels)
    if not alike or any(level[0][0] % channels for level in levels):
        raise DmfError(
            f"input_blocks have the widths {[[width for width, _ in level] for level in levels]} between downsampling "
            f"convolutions: expected equal numbers of equal blocks, and multiples of time_embed's {channels}"
        )
    return levels


def _given(given: Mapping[str, Any], released: bool) -> tuple[int, int, float]:
    """Channels per head, resolution and dropout, those of the released networks where the file is one of them."""
    for field in given:
        if field not in GIVEN:
            raise DmfError(
                f"{field} is no field of kind {NAME} that can be given: expected one of {', '.join(GIVEN)}"
            )
    found = {
        "dropout": ADMConfig.dropout,
        **({"head_channels": 64, "resolution": 32} if released else {}),
        **given,
    }
    for field in GIVEN[:2]:
        if field not in found:
            raise DmfError(
                f"{field} is unknown, as this is not the released network: expected it to be given (--set={field}=...); "
                "no tensor's name or shape tells"
            )
        layers.check_positive(field, found[field])
    if isinstance(found["dropout"], str):
        raise DmfError(f"dropout is {found['dropout']!r}: expected a number")
    return found["head_channels"], found["resolution"], float(found["dropout"])


def _rules(
    config: ADMConfig, image_shape: tuple[int, ...], tensors: Mapping[str, Tensor] | None
) -> list[Rule]:
    expect(config, NAME, {"kind": "adm"})
    encoder, decoder = plan(config, image_shape[0])
    angles = functools.partial(layers.frequencies, endpoint=False)
    rules = reversed_layer("time_embed.0", "time_embed_0", angles, sin_first=False, note=REVERSED)
    rules += linear_layer("time_embed.2", "time_embed_2")
    rules += optional(
        linear_layer("interval.time_embed.0", "interval/time_embed_0"), NEW, fill="init"
    )
    rules += optional(linear_layer("interval.time_embed.2", "interval/time_embed_2"), NEW)
    rules += conv_layer("input_blocks.0.0", "input_blocks_0_0")
    middle = encoder[-1]._replace(parts=("block", "attention", "block"), inputs=encoder[-1].width)
    rows = {f"input_blocks.{n}": row for n, row in enumerate(encoder, 1)} | {"middle_block": middle}
    for name, row in (rows | {f"output_blocks.{n}": row for n, row in enumerate(decoder)}).items():
        for i, part in enumerate(row.parts):
            rules += _part(
                part,
                f"{name}.{i}",
                f"{name.replace('.', '_')}_{i}",
                i == 0 and row.inputs != row.width,
            )
    rules += norm_layer("out.0", "out_0")
    return rules + [negated(rule, NEGATED) for rule in conv_layer("out.2", "out_2")]


def _part(part: str, module: str, room: str, skip: bool) -> list[Rule]:
    """The rules of one part of a row (dmf.networks.adm.PARTS); skip: whether a block changes the number of channels."""
    if part == "attention":
        qkv, proj = (
            _positionwise(f"{module}.{name}", f"{room}/{name}") for name in ("qkv", "proj_out")
        )
        return [*norm_layer(f"{module}.norm", f"{room}/norm"), *qkv, *proj]
    if part != "block":
        name = {"down": "op", "up": "conv"}[part]
        return conv_layer(f"{module}.{name}", f"{room}/{name}")
    return [
        *norm_layer(f"{module}.in_layers.0", f"{room}/in_layers_0"),
        *conv_layer(f"{module}.in_layers.2", f"{room}/in_layers_2"),
        *linear_layer(f"{module}.emb_layers.1", f"{room}/emb_layers_1"),
        *norm_layer(f"{module}.out_layers.0", f"{room}/out_layers_0"),
        *conv_layer(f"{module}.out_layers.3", f"{room}/out_layers_3"),
        *(conv_layer(f"{module}.skip_connection", f"{room}/skip_connection") if skip else []),
    ]


def _positionwise(module: str, room: str) -> list[Rule]:
    """A convolution over positions whose window is one: (out, in, 1) <-> (in, out)."""
    names = (f"{module}.weight",), (f"{room}/kernel",)
    return [
        Rule(*names, lambda x: (x[:, :, 0].T,), lambda x: (x.T[:, :, None],)),
        plain(f"{module}.bias", f"{room}/bias"),
    ]


def _outputs(
    network: Network, params: Any, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """v(x, t) in the source's convention, from x (B, C, R, R) and t (B,)."""
    if not {"x", "t"} <= set(arrays):
        return {}
    z, t = arrays["x"].transpose(0, 2, 3, 1), 1 - arrays["t"]
    return {"v": -np.asarray(jax.jit(network.apply)(params, z, t, t)).transpose(0, 3, 1, 2)}


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """v(x, t) by PyTorch; arrays["head_channels"] is the one number that the names do not tell."""
    import torch

    run = _TorchForward(tensors, int(arrays["head_channels"]))
    with torch.no_grad():
        return {"v": run(torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["t"])).numpy()}


class _TorchForward:
    """The network written out in PyTorch on the source's names; what it consists of is read off the names there are."""

    def __init__(self, tensors: Mapping[str, Any], head_channels: int) -> None:
        from torch.nn import functional

        self.f, self.head_channels = functional, head_channels
        self.weights = {name: x.float() for name, x in tensors.items()}
        self.modules = {".".join(name.split(".")[:k]) for name in tensors for k in range(1, 5)}

    def __call__(self, x: Any, t: Any) -> Any:
        import torch

        half = self.weights["time_embed.0.weight"].shape[1] // 2
        angle = t[:, None] * torch.exp(-math.log(1e4) / half * torch.arange(half))
        emb = self.apply(self.f.linear, "time_embed.0", torch.cat((angle.cos(), angle.sin()), 1))
        emb = self.f.silu(self.apply(self.f.linear, "time_embed.2", self.f.silu(emb)))
        skips = []
        for n in itertools.takewhile(
            lambda n: f"input_blocks.{n}" in self.modules, itertools.count()
        ):
            x = self.row(f"input_blocks.{n}", x, emb)
            skips.append(x)
        x = self.row("middle_block", x, emb)
        for n in range(len(skips)):
            x = self.row(f"output_blocks.{n}", torch.cat((x, skips.pop()), 1), emb)
        return self.apply(self.f.conv2d, "out.2", self.f.silu(self.norm("out.0", x)), padding=1)

    def row(self, name: str, x: Any, emb: Any) -> Any:
        for i in itertools.takewhile(lambda i: f"{name}.{i}" in self.modules, itertools.count()):
            part = f"{name}.{i}"
            if f"{part}.in_layers" in self.modules:
                x = self.block(part, x, emb)
            elif f"{part}.qkv" in self.modules:
                x = self.attention(part, x)
            elif f"{part}.op" in self.modules:
                x = self.apply(self.f.conv2d, f"{part}.op", x, stride=2, padding=1)
            elif f"{part}.conv" in self.modules:
                x = self.apply(
                    self.f.conv2d, f"{part}.conv", self.f.interpolate(x, scale_factor=2), padding=1
                )
            else:
                x = self.apply(self.f.conv2d, part, x, padding=1)
        return x

    def block(self, name: str, x: Any, emb: Any) -> Any:
        y = self.apply(
            self.f.conv2d,
            f"{name}.in_layers.2",
            self.f.silu(self.norm(f"{name}.in_layers.0", x)),
            padding=1,
        )
        y = self.norm(
            f"{name}.out_layers.0",
            y + self.apply(self.f.linear, f"{name}.emb_layers.1", emb)[:, :, None, None],
        )
        if f"{name}.skip_connection" in self.modules:
            x = self.apply(self.f.conv2d, f"{name}.skip_connection", x)
        return x + self.apply(self.f.conv2d, f"{name}.out_layers.3", self.f.silu(y), padding=1)

    def attention(self, name: str, x: Any) -> Any:
        batch, width = x.shape[:2]
        qkv = self.apply(
            self.f.conv1d, f"{name}.qkv", self.norm(f"{name}.norm", x).reshape(batch, width, -1)
        )
        q, k, v = (
            qkv.reshape(batch, -1, 3, self.head_channels, qkv.shape[-1]).transpose(3, 4).unbind(2)
        )
        y = self.f.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(batch, width, -1)
        return x + self.apply(self.f.conv1d, f"{name}.proj_out", y).reshape(x.shape)

    def norm(self, name: str, x: Any) -> Any:
        return self.f.group_norm(
            x, GROUPS, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps=1e-5
        )

    def apply(self, function: Any, name: str, x: Any, **options: Any) -> Any:
        """A function of torch.nn.functional with the weight and bias of a module."""
        return function(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **options)


def _probe(config: ADMConfig, image_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    size, _, channels = image_shape
    x = np.random.default_rng(0).standard_normal((3, channels, size, size)).astype(np.float32)
    return {
        "x": x,
        "t": np.array([0.01, 0.4, 0.99], np.float32),
        "head_channels": np.array(config.head_channels),
    }


TORCHCFM = Kind(
    name=NAME,
    network="adm",
    licence="MIT, the licence of TorchCFM's repository, which says nothing of its own about the weights",
    conventions=(
        "source: t = 0 noise, t = 1 data, v = data - noise, so ours is -v(z, 1 - t); the time reversal is folded into "
        "time_embed.0, the sign into out.2"
    ),
    copies=("ema_model", "net_model"),
    select=_select,
    describe=_describe,
    rules=_rules,
    outputs=_outputs,
    torch_outputs=_torch_outputs,
    probe=_probe,
)
