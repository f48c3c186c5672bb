"""TorchCFM's flow models on CIFAR-10 (I-CFM, OT-CFM, FM): the ADM U-Net without classes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dmf.convert.copies import Copies
from dmf.convert.kind import (
    TRAINING,
    Fact,
    Kind,
    Shape,
    Tensors,
    axes,
    check_given,
    expect,
    fact_of,
    nchw,
    number,
)
from dmf.convert.rules import (
    Rule,
    conv_layer,
    linear_layer,
    negated,
    norm_layer,
    optional,
    plain,
    reversed_layer,
)
from dmf.errors import DmfError
from dmf.networks import ADMConfig, Network, layers
from dmf.networks.adm import GROUPS, plan

NAME = "torchcfm"
COPIES = Copies(
    r"time_embed\.0\.weight", (("ema_model", "ema_model"), ("net_model", "net_model")), "flat"
)
GIVEN = ("head_channels", "resolution", "dropout")  # neither names nor shapes show these
# channels, channel_mult, blocks, levels with attention of the released networks
RELEASED = (128, (1, 2, 2, 2), 2, (1,))
RELEASED_GIVEN = {"head_channels": 64, "resolution": 32}
NEW = "the source has no interval branch"
REVERSED = "time reversal, t -> 1 - t, folded in: a rotation of the cosines and sines of t"
NEGATED = "sign folded in: the source's velocity is data - noise"


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[ADMConfig, Shape]:
    channels = axes(tensors, "time_embed.0.weight", 2, NAME)[1]
    image_channels = axes(tensors, "input_blocks.0.0.weight", 4, NAME)[1]
    if "label_emb.weight" in tensors:
        raise DmfError(f"tensor label_emb.weight: expected weights of kind {NAME} without classes")
    levels = _levels(tensors, channels)
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


def _levels(tensors: Tensors, channels: int) -> list[list[tuple[int, bool]]]:
    """Width and attention of the encoder's blocks, for each resolution.

    channels: of the first level. Raises DmfError for another kind of U-Net.
    """
    levels: list[list[tuple[int, bool]]] = [[]]
    for n in itertools.count(1):
        row = f"input_blocks.{n}"
        if f"{row}.0.op.weight" in tensors:
            levels.append([])
        elif f"{row}.0.in_layers.2.weight" in tensors:
            width = axes(tensors, f"{row}.0.in_layers.2.weight", 4, NAME)[0]
            levels[-1].append((width, f"{row}.1.qkv.weight" in tensors))
        else:
            break
    alike = all(len(set(level)) == 1 and len(level) == len(levels[0]) for level in levels)
    if not alike or any(level[0][0] % channels for level in levels):
        widths = [[width for width, _ in level] for level in levels]
        raise DmfError(
            f"input_blocks have the widths {widths} between downsampling convolutions: expected "
            f"equal numbers of equal blocks, and multiples of time_embed's {channels}"
        )
    return levels


def _given(given: Mapping[str, Any], released: bool) -> tuple[int, int, float]:
    """Channels per head, resolution and dropout; a released network has the first two.

    Raises DmfError.
    """
    check_given(given, GIVEN, NAME)
    known = RELEASED_GIVEN if released else {}
    found = {"dropout": ADMConfig.dropout, **known, **given}
    for field in RELEASED_GIVEN:
        if field not in found:
            raise DmfError(
                f"{field} is unknown, as this is not the released network: "
                f"expected --set={field}=..., for no tensor's name or shape shows it"
            )
        layers.check_positive(field, found[field])
    dropout = number("dropout", found["dropout"])
    return found["head_channels"], found["resolution"], dropout


def _rules(config: ADMConfig, image_shape: Shape, tensors: Tensors | None) -> list[Rule]:
    expect(config, NAME, {"kind": "adm"})
    encoder, decoder = plan(config, image_shape[0])
    angles = functools.partial(layers.frequencies, endpoint=False)
    first_interval = linear_layer("interval.time_embed.0", "interval/time_embed_0")
    rules = reversed_layer("time_embed.0", "time_embed_0", angles, sin_first=False, note=REVERSED)
    rules += linear_layer("time_embed.2", "time_embed_2")
    rules += optional(first_interval, NEW, fill="init")
    rules += optional(linear_layer("interval.time_embed.2", "interval/time_embed_2"), NEW)
    rules += conv_layer("input_blocks.0.0", "input_blocks_0_0")
    middle = encoder[-1]._replace(parts=("block", "attention", "block"), inputs=encoder[-1].width)
    rows = {f"input_blocks.{n}": row for n, row in enumerate(encoder, 1)} | {"middle_block": middle}
    for name, row in (rows | {f"output_blocks.{n}": row for n, row in enumerate(decoder)}).items():
        for i, part in enumerate(row.parts):
            room = f"{name.replace('.', '_')}_{i}"
            rules += _part(part, f"{name}.{i}", room, i == 0 and row.inputs != row.width)
    rules += norm_layer("out.0", "out_0")
    return rules + [negated(rule, NEGATED) for rule in conv_layer("out.2", "out_2")]


def _part(part: str, module: str, room: str, skip: bool) -> list[Rule]:
    """The rules of one part of a row (`dmf.networks.adm.PARTS`).

    skip: a block changes the number of channels, so it has a convolution beside it.
    """
    if part == "attention":
        qkv = _positionwise(f"{module}.qkv", f"{room}/qkv")
        proj = _positionwise(f"{module}.proj_out", f"{room}/proj_out")
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
    """A convolution over positions with a window of one: (out, in, 1) <-> (in, out)."""
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
    return {"v": nchw(-np.asarray(jax.jit(network.apply)(params, z, t, t)))}


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """v(x, t) by PyTorch. No name shows the channels per head, so `arrays` holds head_channels."""
    import torch

    run = _TorchForward(tensors, int(arrays["head_channels"]))
    with torch.no_grad():
        return {"v": run(torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["t"])).numpy()}


class _TorchForward:
    """The network in PyTorch on the source's names, which show its parts."""

    def __init__(self, tensors: Mapping[str, Any], head_channels: int) -> None:
        from torch.nn import functional

        self.f, self.head_channels = functional, head_channels
        self.weights = {name: x.float() for name, x in tensors.items()}
        self.modules = {".".join(name.split(".")[:k]) for name in tensors for k in range(1, 5)}

    def __call__(self, x: Any, t: Any) -> Any:
        import torch

        half = self.weights["time_embed.0.weight"].shape[1] // 2
        angle = t[:, None] * torch.exp(-math.log(1e4) / half * torch.arange(half))
        emb = self.linear("time_embed.0", torch.cat((angle.cos(), angle.sin()), 1))
        emb = self.f.silu(self.linear("time_embed.2", self.f.silu(emb)))
        skips = []
        for n in self.numbers("input_blocks"):
            x = self.row(f"input_blocks.{n}", x, emb)
            skips.append(x)
        x = self.row("middle_block", x, emb)
        for n in range(len(skips)):
            x = self.row(f"output_blocks.{n}", torch.cat((x, skips.pop()), 1), emb)
        return self.conv("out.2", self.f.silu(self.norm("out.0", x)), padding=1)

    def numbers(self, name: str) -> Iterator[int]:
        """0, 1, ... as far as there are modules name.0, name.1, ..."""
        return itertools.takewhile(lambda n: f"{name}.{n}" in self.modules, itertools.count())

    def row(self, name: str, x: Any, emb: Any) -> Any:
        for i in self.numbers(name):
            part = f"{name}.{i}"
            if f"{part}.in_layers" in self.modules:
                x = self.block(part, x, emb)
            elif f"{part}.qkv" in self.modules:
                x = self.attention(part, x)
            elif f"{part}.op" in self.modules:
                x = self.conv(f"{part}.op", x, stride=2, padding=1)
            elif f"{part}.conv" in self.modules:
                x = self.conv(f"{part}.conv", self.f.interpolate(x, scale_factor=2), padding=1)
            else:
                x = self.conv(part, x, padding=1)
        return x

    def block(self, name: str, x: Any, emb: Any) -> Any:
        y = self.f.silu(self.norm(f"{name}.in_layers.0", x))
        y = self.conv(f"{name}.in_layers.2", y, padding=1)
        y = y + self.linear(f"{name}.emb_layers.1", emb)[:, :, None, None]
        y = self.norm(f"{name}.out_layers.0", y)
        if f"{name}.skip_connection" in self.modules:
            x = self.conv(f"{name}.skip_connection", x)
        return x + self.conv(f"{name}.out_layers.3", self.f.silu(y), padding=1)

    def attention(self, name: str, x: Any) -> Any:
        batch, width = x.shape[:2]
        tokens = self.norm(f"{name}.norm", x).reshape(batch, width, -1)
        qkv = self.f.conv1d(tokens, *self.of(f"{name}.qkv"))
        heads = qkv.reshape(batch, -1, 3, self.head_channels, qkv.shape[-1]).transpose(3, 4)
        y = self.f.scaled_dot_product_attention(*heads.unbind(2))
        y = y.transpose(2, 3).reshape(batch, width, -1)
        return x + self.f.conv1d(y, *self.of(f"{name}.proj_out")).reshape(x.shape)

    def norm(self, name: str, x: Any) -> Any:
        return self.f.group_norm(x, GROUPS, *self.of(name), eps=1e-5)

    def linear(self, name: str, x: Any) -> Any:
        return self.f.linear(x, *self.of(name))

    def conv(self, name: str, x: Any, **options: Any) -> Any:
        return self.f.conv2d(x, *self.of(name), **options)

    def of(self, name: str) -> tuple[Any, Any]:
        """Weight and bias of a module."""
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]


def _probe(config: ADMConfig, image_shape: Shape) -> dict[str, np.ndarray]:
    size, _, channels = image_shape
    x = np.random.default_rng(0).standard_normal((3, channels, size, size)).astype(np.float32)
    t = np.array([0.01, 0.4, 0.99], np.float32)
    return {"x": x, "t": t, "head_channels": np.array(config.head_channels)}


TORCHCFM = Kind(
    name=NAME,
    network="adm",
    licence=(
        "MIT, the licence of TorchCFM's repository, which says nothing of its own about the weights"
    ),
    conventions=(
        "source: t = 0 noise, t = 1 data, v = data - noise, so ours is -v(z, 1 - t); "
        "the time reversal is folded into time_embed.0, the sign into out.2"
    ),
    select=COPIES.select,
    describe=_describe,
    rules=_rules,
    outputs=_outputs,
    torch_outputs=_torch_outputs,
    probe=_probe,
    facts=(
        fact_of("head_channels", "head_channels"),
        Fact("resolution", lambda _, shape: shape[0]),
        fact_of("dropout", note=TRAINING),
        Fact("prediction", lambda *_: "velocity", settable=False),
    ),
    time="noise_at_0",
    sign="data_minus_noise",
)
