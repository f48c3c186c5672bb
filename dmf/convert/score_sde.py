"""Checkpoints of Rectified Flow on CIFAR-10 (arXiv 2209.03003): Score SDE's DDPM++.

The file is {optimizer, model, ema, step}:

- `model` is one flat list of modules, all_modules.N, in the order in which the network runs;
- `ema` is a list of tensors without names, in the order of the model's parameters.

A score network (VP, sub-VP) of the same code has the same names and shapes.
So a file does not show that it holds a flow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
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
    nhwc,
    number,
)
from dmf.convert.rules import (
    Arrays,
    Rule,
    constant,
    conv_layer,
    linear,
    linear_layer,
    negated,
    norm_layer,
    optional,
    plain,
    reversed_layer,
)
from dmf.errors import DmfError
from dmf.networks import UNetConfig, layers

NAME = "rectified_flow"
TIME_SCALE = 999.0
SIGMAS = "sigmas"  # the model's one buffer; everything else is a parameter
COPIES = Copies(r"all_modules\.0\.weight", (("ema", "ema"), ("model", "model")), "model", (SIGMAS,))
GIVEN = {"image_size": 32, "dropout": 0.15}  # as the flow of CIFAR-10 was trained
FIELDS: dict[str, Any] = {
    "kind": "unet",
    "resample": "box",
    "residual_encoder": False,
    "embedding": "positional",
    "embedding_mult": 1,
    "time_input": "t",
    "time_scale": TIME_SCALE,
    "precond": "none",
    "augment_dim": 0,
    "num_classes": 0,
}

Plan = list[tuple[str, str]]  # (sort of module, our room) of all_modules.0, 1, 2, ...


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[UNetConfig, Shape]:
    check_given(given, list(GIVEN), NAME)
    size, dropout = ({**GIVEN, **given}[field] for field in GIVEN)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise DmfError(f"image_size is {size!r}: expected the side of the images in pixels")
    channels = axes(tensors, "all_modules.0.weight", 2, NAME)[1]
    image_channels = axes(tensors, "all_modules.2.weight", 4, NAME)[1]
    numbers, into, out = _blocks(tensors)
    # Where a block keeps its width, only a resampling one has a 1 x 1 convolution beside it.
    # Between two levels there are two such blocks: one on the way down, one on the way up.
    resampling = sum(
        a == b and f"all_modules.{n}.Conv_2.weight" in tensors
        for n, a, b in zip(numbers, into, out, strict=True)
    )
    levels = resampling // 2 + 1
    # A level has n blocks on the way down and n + 1 on the way up. The middle has two.
    blocks, rest = divmod(len(numbers) - resampling - 2 - levels, 2 * levels)
    if rest or resampling % 2 or blocks < 1:
        raise DmfError(
            f"{len(numbers)} residual blocks, {resampling} of them resampling: "
            f"expected a U-Net of kind {NAME}"
        )
    firsts = [level * (blocks + 1) for level in range(levels)]
    if any(out[i] % channels for i in firsts):
        raise DmfError(
            f"levels of {', '.join(str(out[i]) for i in firsts)} channels: "
            f"expected multiples of {channels}"
        )
    attended = [
        level
        for level, i in enumerate(firsts)
        if f"all_modules.{numbers[i] + 1}.NIN_0.W" in tensors
    ]
    config = UNetConfig(
        channels=channels,
        channel_mult=tuple(out[i] // channels for i in firsts),
        blocks=blocks,
        attention_resolutions=tuple(size >> level for level in attended),
        dropout=number("dropout", dropout),
        **{field: value for field, value in FIELDS.items() if field != "kind"},
    )
    return config, (size, size, image_channels)


def _blocks(tensors: Tensors) -> tuple[list[int], list[int], list[int]]:
    """The numbers of the residual blocks in their order, and their channels in and out."""
    convolutions = [re.fullmatch(r"all_modules\.(\d+)\.Conv_0\.weight", name) for name in tensors]
    numbers = sorted(int(found[1]) for found in convolutions if found)
    into = [axes(tensors, f"all_modules.{n}.GroupNorm_0.weight", 1, NAME)[0] for n in numbers]
    out = [axes(tensors, f"all_modules.{n}.Conv_0.weight", 4, NAME)[0] for n in numbers]
    return numbers, into, out


def _plan(config: UNetConfig, size: int) -> Plan:
    """The sort of every module by its number, and its room in our network."""
    levels = list(enumerate(config.channel_mult))
    tags = [f"{size >> level}x{size >> level}" for level, _ in levels]
    attended = [size >> level in config.attention_resolutions for level, _ in levels]
    plan: Plan = [
        ("embed", "map_layer0"),
        ("linear", "map_layer1"),
        ("conv", f"enc/{tags[0]}_conv"),
    ]
    width = config.channels
    for level, mult in levels:
        if level:
            plan.append(("skip_block", f"enc/{tags[level]}_down"))
        for k in range(config.blocks):
            room, wide = f"enc/{tags[level]}_block{k}", config.channels * mult
            plan.append(("block" if width == wide else "skip_block", room))
            plan += [("attention", room)] * attended[level]
            width = wide
    middle = f"dec/{tags[-1]}_in"
    plan += [("block", f"{middle}0"), ("attention", f"{middle}0"), ("block", f"{middle}1")]
    for level, _ in reversed(levels):
        if level < levels[-1][0]:
            plan.append(("skip_block", f"dec/{tags[level]}_up"))
        plan += [("skip_block", f"dec/{tags[level]}_block{k}") for k in range(config.blocks + 1)]
        plan += [("attention", f"dec/{tags[level]}_block{config.blocks}")] * attended[level]
    return [*plan, ("norm", f"dec/{tags[0]}_aux_norm"), ("negated", f"dec/{tags[0]}_aux_conv")]


def _rules(config: UNetConfig, image_shape: Shape, tensors: Tensors | None) -> list[Rule]:
    expect(config, NAME, FIELDS)
    plan = enumerate(_plan(config, image_shape[0]))
    found = [rule for n, (sort, room) in plan for rule in MODULES[sort](f"all_modules.{n}", room)]
    note = "exp of 1000 even steps from ln 50 to ln 0.01, which a flow does not use"
    interval = linear("interval.weight", "interval/kernel")
    return [
        *found,
        *optional([interval], "a flow has one time"),
        constant(SIGMAS, _sigmas, note, atol=1e-5),
    ]


def _sigmas() -> np.ndarray:
    return np.exp(np.linspace(math.log(50.0), math.log(0.01), 1000))


def _angles(count: int) -> np.ndarray:
    return TIME_SCALE * layers.frequencies(count, endpoint=True)


def _embed(module: str, room: str) -> list[Rule]:
    note = "time reversed, t = 1 - t_source: a rotation by 999 f per frequency, in float64"
    return reversed_layer(module, room, _angles, sin_first=True, note=note)


def _block(module: str, room: str) -> list[Rule]:
    return [
        *norm_layer(f"{module}.GroupNorm_0", f"{room}/norm0"),
        *conv_layer(f"{module}.Conv_0", f"{room}/conv0"),
        *linear_layer(f"{module}.Dense_0", f"{room}/affine"),
        *norm_layer(f"{module}.GroupNorm_1", f"{room}/norm1"),
        *conv_layer(f"{module}.Conv_1", f"{room}/conv1"),
    ]


def _skip_block(module: str, room: str) -> list[Rule]:
    return [*_block(module, room), *conv_layer(f"{module}.Conv_2", f"{room}/skip")]


def _attention(module: str, room: str) -> list[Rule]:
    packed = "query, key and value in one layer; (in, out) in both"

    def joined(*x: np.ndarray) -> Arrays:
        return (np.concatenate([a if a.ndim == 1 else a[None, None] for a in x], axis=-1),)

    def kernels(x: np.ndarray) -> Arrays:
        return np.split(x[0, 0], 3, axis=-1)

    qkv = [tuple(f"{module}.NIN_{i}.{leaf}" for i in range(3)) for leaf in ("W", "b")]
    proj = (f"{module}.NIN_3.W",), (f"{room}/proj/kernel",)
    return [
        *norm_layer(f"{module}.GroupNorm_0", f"{room}/norm2"),
        Rule(qkv[0], (f"{room}/qkv/kernel",), joined, kernels, packed),
        Rule(qkv[1], (f"{room}/qkv/bias",), joined, lambda x: np.split(x, 3), packed),
        Rule(*proj, lambda w: (w[None, None],), lambda k: (k[0, 0],)),
        plain(f"{module}.NIN_3.b", f"{room}/proj/bias"),
    ]


def _negated(module: str, room: str) -> list[Rule]:
    note = "negated: the source's velocity is data - noise"
    return [negated(rule, note) for rule in conv_layer(module, room)]


MODULES = {
    "embed": _embed,
    "linear": linear_layer,
    "conv": conv_layer,
    "norm": norm_layer,
    "block": _block,
    "skip_block": _skip_block,
    "attention": _attention,
    "negated": _negated,
}


def _outputs(network: Any, params: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not {"x", "t"} <= set(arrays):
        return {}
    z, t = nhwc(arrays["x"]), 1 - jnp.asarray(arrays["t"])
    return {"v": nchw(-np.asarray(network.apply(params, z, t, t)))}


def _probe(config: UNetConfig, image_shape: Shape) -> dict[str, np.ndarray]:
    # 1 - t is exact for these times. The factor 999 would make an error of 1e-8 in t visible.
    size, _, channels = image_shape
    x = np.random.default_rng(0).standard_normal((3, channels, size, size)).astype(np.float32)
    return {"x": x, "t": np.array([1 / 1024, 0.375, 1023 / 1024], np.float32)}


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """v(x, t) by PyTorch, which runs the modules in their order.

    Names and widths show the sort of each module, and where a skip is taken.
    """
    import torch
    from torch.nn import functional as F

    like = tensors["all_modules.2.weight"]
    x, t = (torch.as_tensor(arrays[name]).to(like.dtype) for name in ("x", "t"))
    emb = _torch_embedding(tensors, t)
    count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("all_modules."))
    blocks = [n for n in range(3, count) if f"all_modules.{n}.Conv_0.weight" in tensors]
    widths = {n: tensors[f"all_modules.{n}.Conv_0.weight"].shape[:2] for n in blocks}
    # The way up starts at the first block that takes more channels than the last one gave.
    up = next(b for a, b in zip(blocks, blocks[1:], strict=False) if widths[b][1] != widths[a][0])
    h = F.conv2d(x, like, tensors["all_modules.2.bias"], padding=1)
    skips = [h]
    for n in range(3, count - 2):
        if n not in widths:
            h = _torch_attention(tensors, f"all_modules.{n}", h)
        else:
            if n >= up and widths[n][1] != h.shape[1]:
                h = torch.cat([h, skips.pop()], 1)
            h = _torch_block(tensors, f"all_modules.{n}", h, emb, up=n >= up)
        if n + 1 in widths and n < up - 3:
            skips.append(h)
    h = F.silu(_torch_norm(tensors, f"all_modules.{count - 2}", h))
    return {"v": _torch_conv(tensors, f"all_modules.{count - 1}", h).numpy()}


def _torch_embedding(tensors: Mapping[str, Any], t: Any) -> Any:
    import torch
    from torch.nn import functional as F

    half = tensors["all_modules.0.weight"].shape[1] // 2
    steps = torch.arange(half, dtype=t.dtype)
    angle = TIME_SCALE * t[:, None] * torch.exp(-math.log(10000) / (half - 1) * steps)
    emb = _torch_linear(tensors, "all_modules.0", torch.cat([angle.sin(), angle.cos()], 1))
    if "interval.weight" in tensors:  # sin 0, cos 0: a velocity has an empty interval
        emb = emb + tensors["interval.weight"][:, half:].sum(1)
    return F.silu(_torch_linear(tensors, "all_modules.1", F.silu(emb)))


def _torch_linear(tensors: Mapping[str, Any], name: str, x: Any) -> Any:
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def _torch_conv(tensors: Mapping[str, Any], name: str, x: Any) -> Any:
    from torch.nn import functional as F

    weight = tensors[f"{name}.weight"]
    return F.conv2d(x, weight, tensors[f"{name}.bias"], padding=weight.shape[-1] // 2)


def _torch_norm(tensors: Mapping[str, Any], name: str, x: Any) -> Any:
    from torch.nn import functional as F

    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return F.group_norm(x, min(x.shape[1] // 4, 32), weight, bias, 1e-6)


def _torch_block(tensors: Mapping[str, Any], name: str, x: Any, emb: Any, up: bool) -> Any:
    from torch.nn import functional as F

    def resampled(a: Any) -> Any:
        return F.interpolate(a, scale_factor=2.0) if up else F.avg_pool2d(a, 2)

    y = F.silu(_torch_norm(tensors, f"{name}.GroupNorm_0", x))
    if f"{name}.Conv_2.weight" in tensors:
        if tensors[f"{name}.Conv_2.weight"].shape[0] == x.shape[1]:
            x, y = resampled(x), resampled(y)
        x = _torch_conv(tensors, f"{name}.Conv_2", x)
    shift = _torch_linear(tensors, f"{name}.Dense_0", emb)[:, :, None, None]
    y = _torch_conv(tensors, f"{name}.Conv_0", y) + shift
    y = F.silu(_torch_norm(tensors, f"{name}.GroupNorm_1", y))
    return (x + _torch_conv(tensors, f"{name}.Conv_1", y)) / math.sqrt(2)


def _torch_attention(tensors: Mapping[str, Any], name: str, x: Any) -> Any:
    def nin(i: int, y: Any) -> Any:
        return y @ tensors[f"{name}.NIN_{i}.W"] + tensors[f"{name}.NIN_{i}.b"]

    y = _torch_norm(tensors, f"{name}.GroupNorm_0", x).flatten(2).transpose(1, 2)
    weights = (nin(0, y) @ nin(1, y).transpose(1, 2) / math.sqrt(x.shape[1])).softmax(-1)
    y = nin(3, weights @ nin(2, y)).transpose(1, 2).reshape(x.shape)
    return (x + y) / math.sqrt(2)


RECTIFIED_FLOW = Kind(
    name=NAME,
    network="unet",
    licence="none stated by its authors",
    conventions=(
        "source: t = 0 noise, t = 1 data, v = data - noise, the network sees 999 t; "
        "time is folded into the first layer of the embedding, the sign into the last "
        "convolution; the factor 999 is the network's time_scale"
    ),
    select=COPIES.select,
    describe=_describe,
    rules=_rules,
    outputs=_outputs,
    torch_outputs=_torch_outputs,
    probe=_probe,
    facts=(
        Fact("image_size", lambda _, shape: shape[0]),
        fact_of("dropout", note=TRAINING),
        fact_of("time_scale", settable=False),
        Fact("prediction", lambda *_: "velocity", settable=False),
    ),
    time="noise_at_0",
    sign="data_minus_noise",
)
