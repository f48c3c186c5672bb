"""DiT-DH in PyTorch: flows in the features of an autoencoder, and MeanFlow students of them.

The layout is of bytetriper/RAE; students are of sony/mf-rae. Time and sign are as here, so all
weights are copies. A student's second embedder, r_embedder, sees t - r; a teacher has none. The
tables of positions are computed, and a file may lack the rotary ones.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dmf.convert import dit, sit
from dmf.convert.copies import Copies
from dmf.convert.kind import (
    Fact,
    Kind,
    Shape,
    Tensors,
    axes,
    check_given,
    expect,
    fact_of,
    heads_of,
)
from dmf.convert.rules import Rule, constant, conv_layer, linear_layer, optional, plain
from dmf.errors import DmfError
from dmf.networks import attention, layers
from dmf.networks.dit_dh import DIT_DH_SIZES, DiTDHConfig

NAME = "dit_dh"
TRUNK, HEAD = "s_embedder.proj", "x_embedder.proj"
# Rotary tables of trunk and head.
ROPES = ("enc_feat_rope", "dec_feat_rope")
COPIES = Copies(
    r"s_embedder\.proj\.weight",
    (("ema", "ema"), ("model", "model")),
    "flat",
    ("pos_embed", *(f"{rope}.freqs_{f}" for rope in ROPES for f in ("cos", "sin"))),
)
GIVEN = ("heads", "head_heads", "resolution")
HEAD_HEADS = 16  # of all published sizes


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[DiTDHConfig, Shape]:
    check_given(given, GIVEN, NAME)
    for field, value in given.items():
        layers.check_positive(f"--set={field}", value)
    width, channels, patch, _ = axes(tensors, f"{TRUNK}.weight", 4, NAME)
    head_width = axes(tensors, f"{HEAD}.weight", 4, NAME)[0]
    if patch != 1 or width == head_width:
        raise DmfError(
            f"trunk and head of {width} and {head_width} channels on patches of {patch}: "
            "expected two widths, on single positions of the latent"
        )
    blocks = (re.match(r"blocks\.(\d+)\.norm1\.weight", name) for name in tensors)
    widths = [axes(tensors, found[0], 1, NAME)[0] for found in blocks if found]
    depth = widths.count(width)
    told = [_rotary_heads(tensors, *part) for part in zip(ROPES, (width, head_width), strict=True)]
    config = DiTDHConfig(
        depth=depth,
        width=width,
        heads=told[0] or heads_of(DIT_DH_SIZES, width, depth, given.get("heads")),
        head_depth=len(widths) - depth,
        head_width=head_width,
        head_heads=told[1] or given.get("head_heads", HEAD_HEADS),
        mlp_ratio=_ratio(tensors, width),
        num_classes=axes(tensors, sit.TABLE, 2, NAME)[0] - 1,
    )
    for field, value in given.items():
        if value != getattr(config, field, value):
            found = getattr(config, field)
            raise DmfError(f"--set={field}={value}: expected {found}, as the rotary tables show")
    resolution = sit.resolution_of(tensors, 1, given.get("resolution"))
    return config, (resolution, resolution, channels)


def _rotary_heads(tensors: Tensors, rope: str, width: int) -> int:
    """Heads of trunk or head by the width of its rotary table; 0 where the file has none."""
    name = f"{rope}.freqs_cos"
    if name not in tensors:
        return 0
    dim = axes(tensors, name, 2, NAME)[1]
    if width % dim:
        raise DmfError(f"tensor {name} is {dim} wide: expected a divisor of {width}")
    return width // dim


def _ratio(tensors: Tensors, width: int) -> float:
    """`mlp_ratio` of the trunk, which rounds its hidden width down twice."""
    hidden = axes(tensors, "blocks.0.mlp.w3.weight", 2, NAME)[1]
    return 4.0 if int(2 / 3 * int(4.0 * width)) == hidden else 1.5 * (hidden + 0.5) / width


def _rules(config: DiTDHConfig, shape: Shape, tensors: Tensors | None) -> list[Rule]:
    expect(config, NAME, {"kind": "dit_dh"})
    count = config.depth + config.head_depth
    parts = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "adaLN_modulation.1")
    modules = [f"blocks.{i}.{part}" for i in range(count) for part in parts]
    modules += ["s_projector", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    norms = [f"blocks.{i}.norm{k}" for i in range(count) for k in (1, 2)]
    norms += ["final_layer.norm_final"]
    silent = functools.partial(optional, reason=sit.NO_INTERVAL)
    seconds = _embedder("r_embedder", "interval")
    return [
        sit.positions(config.width, 1, shape, tensors),
        *(rule for part in (TRUNK, HEAD) for rule in conv_layer(part, dit.room(part))),
        *(rule for rules in _embedder("t_embedder", "t_embedder") for rule in rules),
        *silent(seconds[0], fill="init"),
        *silent(seconds[1]),
        plain(sit.TABLE, "y_embedder/embedding_table/embedding"),
        *(rule for name in modules for rule in linear_layer(name, dit.room(name))),
        *(plain(f"{name}.weight", f"{dit.room(name)}/scale") for name in norms),
        *_rotary(config, shape, tensors),
    ]


def _embedder(theirs: str, ours: str) -> tuple[list[Rule], list[Rule]]:
    """The rules of a time embedder: of its frequencies and first layer, and of its last layer."""
    first = linear_layer(f"{theirs}.mlp.0", f"{ours}/mlp_0")
    freqs = plain(f"{theirs}.W", f"{ours}/fourier/freqs")
    return [freqs, *first], linear_layer(f"{theirs}.mlp.2", f"{ours}/mlp_2")


def rotary_table(rows: int, columns: int, dim: int) -> np.ndarray:
    """Angles (rows * columns, dim) as the public code lays them out: each twice, side by side."""
    return np.repeat(attention.grid_angles(rows, columns, dim), 2, axis=1)


def _rotary(config: DiTDHConfig, shape: Shape, tensors: Tensors | None) -> list[Rule]:
    """The rules of the rotary tables."""
    dims = config.width // config.heads, config.head_width // config.head_heads

    def table(function: Callable[..., np.ndarray], dim: int) -> Callable[[], np.ndarray]:
        return lambda: function(rotary_table(shape[0], shape[1], dim)).astype(np.float32)

    note = "the rotary table of rows and columns"
    return [
        constant(name, table(function, dim), note, sit.rounding(name, tensors))
        for rope, dim in zip(ROPES, dims, strict=True)
        for name, function in ((f"{rope}.freqs_cos", np.cos), (f"{rope}.freqs_sin", np.sin))
    ]


def _probe(config: DiTDHConfig, shape: Shape) -> dict[str, np.ndarray]:
    ours: Any = dit.probe(config, shape)  # type: ignore[arg-type]
    head = np.array(config.head_heads)
    return ours | {"x": ours["x"].transpose(0, 3, 1, 2), "head_heads": head}


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The network in PyTorch on x, t, r or h, y and the numbers of heads."""
    import torch
    from torch.nn import functional as F

    def linear(module: str, x: Any) -> Any:
        return F.linear(x, tensors[f"{module}.weight"].float(), tensors[f"{module}.bias"].float())

    def embed(module: str, time: Any) -> Any:
        angle = time[:, None] * tensors[f"{module}.W"].float() * 2 * torch.pi
        features = torch.cat((angle.sin(), angle.cos()), dim=1)
        return linear(f"{module}.mlp.2", F.silu(linear(f"{module}.mlp.0", features)))

    def patches(module: str) -> Any:
        kernel = tensors[f"{module}.weight"].float()[:, :, 0, 0]
        bias = tensors[f"{module}.bias"].float()
        return F.linear(x.flatten(2).transpose(1, 2), kernel, bias)

    x, t = torch.from_numpy(np.ascontiguousarray(arrays["x"])), torch.from_numpy(arrays["t"])
    time = embed("t_embedder", t)
    if "r_embedder.W" in tensors:
        time = time + embed("r_embedder", t - torch.from_numpy(dit.r_of(arrays)))
    label = torch.from_numpy(arrays["y"]).long()
    cond = F.silu(time + tensors[sit.TABLE].float()[label])[:, None]
    s, y = patches(TRUNK) + tensors["pos_embed"].float(), patches(HEAD)
    blocks = sum(name.endswith(".attn.qkv.weight") for name in tensors)
    trunk = [tensors[f"blocks.{i}.norm1.weight"].shape[0] for i in range(blocks)].count(s.shape[-1])
    for i in range(trunk):
        s = _torch_block(tensors, linear, i, s, cond, int(arrays["heads"]))
    s = linear("s_projector", F.silu(time[:, None] + s))
    for i in range(trunk, blocks):
        y = _torch_block(tensors, linear, i, y, s, int(arrays["head_heads"]))
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(s)).chunk(2, dim=-1)
    y = _torch_norm(tensors, "final_layer.norm_final", y) * (1 + scale) + shift
    y = linear("final_layer.linear", y)
    return {"u": y.transpose(1, 2).unflatten(2, x.shape[2:]).numpy()}


def _torch_norm(tensors: Mapping[str, Any], name: str, x: Any) -> Any:
    scale = tensors[f"{name}.weight"].float()
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale


def _torch_block(
    tensors: Mapping[str, Any], linear: dit.Linear, i: int, x: Any, cond: Any, heads: int
) -> Any:
    """One block in PyTorch on tokens (B, N, width)."""
    import torch
    from torch.nn import functional as F

    name, side = f"blocks.{i}", int(x.shape[1] ** 0.5)
    parts = linear(f"{name}.adaLN_modulation.1", F.silu(cond)).chunk(6, dim=-1)
    y = _torch_norm(tensors, f"{name}.norm1", x) * (1 + parts[1]) + parts[0]
    q, k, v = linear(f"{name}.attn.qkv", y).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    dim = q.shape[-1] // 2
    powers = 1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    line = (torch.arange(side)[:, None] * powers).repeat_interleave(2, dim=1)
    row, column = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    angle = torch.cat((row, column), dim=-1).flatten(0, 1)
    cos, sin = angle.cos().float(), angle.sin().float()

    def turned(x: Any) -> Any:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack((-b, a), dim=-1).flatten(-2) * sin

    mixed = F.scaled_dot_product_attention(turned(q), turned(k), v)
    x = x + parts[2] * linear(f"{name}.attn.proj", mixed.transpose(1, 2).flatten(2))
    y = _torch_norm(tensors, f"{name}.norm2", x) * (1 + parts[4]) + parts[3]
    gate, wide = linear(f"{name}.mlp.w12", y).chunk(2, dim=-1)
    return x + parts[5] * linear(f"{name}.mlp.w3", F.silu(gate) * wide)


def _has(name: str) -> Callable[[Tensors], bool]:
    return lambda tensors: name in tensors


DIT_DH = Kind(
    name=NAME,
    network="dit_dh",
    licence="RAE's and MF-RAE's repositories are under the MIT licence; trained on ImageNet.",
    conventions=(
        "t = 1 is noise, v or u of noise - data: as here, nothing is folded. "
        "r_embedder sees t - r. Latents are the encoder's features, normalised by its statistics. "
        "Times of training were shifted by the latent's dimension. "
        "The label table's last row is the null class"
    ),
    select=COPIES.select,
    describe=_describe,
    rules=_rules,
    outputs=dit.average_outputs,
    torch_outputs=_torch_outputs,
    probe=_probe,
    facts=(
        fact_of("heads", told=_has(f"{ROPES[0]}.freqs_cos")),
        fact_of("head_heads", told=_has(f"{ROPES[1]}.freqs_cos")),
        *(fact for fact in dit.facts(sit.TABLE, resolution=True) if fact.name != "heads"),
        Fact("path", lambda *_: "linear", settable=False),
    ),
    time="noise_at_1",
    sign="noise_minus_data",
)
