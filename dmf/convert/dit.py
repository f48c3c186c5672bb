"""The transformer `dmf.networks.dit` in the names of SiT and MeanFlow: what both kinds share.

The code names layers as SiT does; `room` turns such a name into ours. The functions torch_* are the
same network in PyTorch, for the forward check.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dmf.convert.kind import (
    Fact,
    Shape,
    Tensors,
    check_given,
    exact,
    fact_of,
    heads_of,
    nchw,
    shown,
)
from dmf.convert.rules import Rule, plain
from dmf.errors import DmfError
from dmf.networks import layers
from dmf.networks.dit import DIT_SIZES, DiTConfig

GIVEN = ("heads", "resolution")
# Fields of a network that neither SiT's nor MeanFlow's program has otherwise.
PLAIN = {"time_routing": "interval", "qk_norm": False}

Linear = Callable[[str, Any], Any]


def check_fields(given: Mapping[str, Any], kind: str) -> None:
    """Refuses given fields that are unknown or no positive integers. Raises DmfError."""
    check_given(given, GIVEN, kind)
    for field, value in given.items():
        layers.check_positive(f"--set={field}", value)


def facts(table: str, resolution: bool) -> tuple[Fact, ...]:
    """What a transformer's tensors do not tell.

    table: name of the label table. resolution: whether a table of positions shows the image size.
    """

    def classes(config: Any, shape: Shape) -> str:
        return "last row of the label table" if config.num_classes else "no classes"

    return (
        fact_of("heads", "heads", "num_heads"),
        Fact(
            "resolution",
            lambda _, shape: shape[0],
            {"input_size": exact},
            told=lambda tensors: resolution and "pos_embed" in tensors,
        ),
        shown("num_classes", num_classes=exact),
        Fact("null_class", classes, settable=False, told=lambda tensors: table not in tensors),
    )


def modules(depth: int) -> list[str]:
    """The linear layers that are plain copies in both kinds."""
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    blocks = [f"blocks.{i}.{part}" for i in range(depth) for part in parts]
    return ["t_embedder.mlp.2", *blocks, "final_layer.adaLN_modulation.1"]


def room(module: str) -> str:
    """SiT's name of a layer -> ours: blocks.3.mlp.fc1 -> blocks_3/mlp/fc1."""
    return re.sub(r"\.(\d+)", r"_\1", module).replace(".", "/")


def label_table(config: DiTConfig, name: str) -> list[Rule]:
    """The rule of the label table, if the network has classes."""
    return [plain(name, "y_embedder/embedding_table/embedding")] if config.num_classes else []


def config_of(
    tensors: Tensors,
    patch: int,
    hidden: int,
    width: int,
    table: str,
    block: str,
    heads: int | None,
) -> DiTConfig:
    """The network's config, from sizes that are known already. Raises DmfError.

    - hidden: width of the MLP.
    - table: name of the label table.
    - block: pattern that matches the number of a block.
    - heads: as given by the user, or None.
    """
    depth = len({found[1] for name in tensors if (found := re.match(block, name))})
    heads = heads_of(DIT_SIZES, width, depth, heads)
    classes = tensors[table].shape[0] - 1 if table in tensors else 0
    if table in tensors and not classes:
        raise DmfError(
            f"tensor {table} has 1 row: expected one per class and one for the null class"
        )
    return DiTConfig(
        depth=depth,
        width=width,
        heads=heads,
        patch=patch,
        mlp_ratio=hidden / width,
        num_classes=classes,
    )


def u(network: Any, params: Any, z: Any, r: Any, t: Any, label: Any) -> np.ndarray:
    """Our network's u(z, r, t), for arrays of a source."""
    label = None if label is None else np.asarray(label, np.int32)
    return np.asarray(jax.jit(network.apply)(params, np.asarray(z, np.float32), r, t, label=label))


def average_outputs(
    network: Any, params: Any, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """u(z, r, t) of x, t and r or h; images as (B, C, H, W)."""
    if not {"x", "t"} <= set(arrays) or not {"r", "h"} & set(arrays):
        return {}
    t, r = np.asarray(arrays["t"], np.float32), r_of(arrays)
    z = np.transpose(arrays["x"], (0, 2, 3, 1))
    return {"u": nchw(u(network, params, z, r, t, arrays.get("y")))}


def r_of(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The end of the interval, which is given itself or by its length."""
    r = arrays["r"] if "r" in arrays else arrays["t"] - arrays["h"]
    return np.asarray(r, np.float32)


def probe(config: DiTConfig, shape: Shape) -> dict[str, np.ndarray]:
    """Random inputs: images at times near both ends and between, with intervals and one null class.

    PyTorch's side needs the number of heads, which no tensor shows. So it is among the arrays.
    """
    rng = np.random.default_rng(0)
    classes = config.num_classes
    label = {"y": np.array([0, classes - 1, classes])} if classes else {}
    x = rng.standard_normal((3, *shape), np.float32)
    times = {
        "t": np.array([0.998, 0.6, 0.003], np.float32),
        "h": np.array([0.9, 0.25, 0.002], np.float32),
    }
    return {"x": x, **times, **label, "heads": np.array(config.heads)}


def torch_embed(linear: Linear, module: str, time: Any) -> Any:
    """A time embedder in PyTorch: time (B,) -> (B, width)."""
    import torch

    angles = time[:, None] * torch.exp(torch.arange(128) * (-math.log(1e4) / 128))
    features = torch.cat((angles.cos(), angles.sin()), dim=1)
    return linear(f"{module}.mlp.2", torch.nn.functional.silu(linear(f"{module}.mlp.0", features)))


def torch_blocks(
    linear: Linear,
    x: Any,
    conds: Sequence[Any],
    heads: int,
    norm: Callable[[str, Any], Any] | None = None,
) -> Any:
    """The transformer in PyTorch: embedded patches (B, N, width) -> output of the last layer.

    - x: the patches without positions, which are added here.
    - conds: what each block sees, and then the last layer, (B, width) each.
    - norm: of queries and of keys, by the name of the layer.
    """
    from torch.nn import functional as F

    x = x + _torch_positions(math.isqrt(x.shape[1]), x.shape[2] // 4)
    seen = [F.silu(cond)[:, None] for cond in conds]

    def modulated(x: Any, shift: Any, scale: Any) -> Any:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    for i, cond in enumerate(seen[:-1]):
        name = f"blocks.{i}"
        chunks = linear(f"{name}.adaLN_modulation.1", cond).chunk(6, dim=-1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = chunks
        qkv = linear(f"{name}.attn.qkv", modulated(x, shift, scale)).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if norm:
            q, k = norm(f"{name}.attn.q_norm", q), norm(f"{name}.attn.k_norm", k)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + gate * linear(f"{name}.attn.proj", mixed.transpose(1, 2).flatten(2))
        wide = linear(f"{name}.mlp.fc1", modulated(x, shift_mlp, scale_mlp))
        x = x + gate_mlp * linear(f"{name}.mlp.fc2", F.gelu(wide, approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", seen[-1]).chunk(2, dim=-1)
    return linear("final_layer.linear", modulated(x, shift, scale))


def _torch_positions(side: int, quarter: int) -> Any:
    """The sine-cosine table of side x side patches: (N, 4 * quarter)."""
    import torch

    powers = -torch.arange(quarter, dtype=torch.float64) / quarter
    angle = torch.arange(side)[:, None] * 1e4**powers
    line = torch.cat((angle.sin(), angle.cos()), dim=1).float()
    return torch.cat((line.repeat(side, 1), line.repeat_interleave(side, 0)), dim=1)


def torch_image(tokens: Any, patch: int) -> Any:
    """(B, N, p * p * C) -> (B, H, W, C)."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side)).transpose(2, 3)
    return grid.flatten(3, 4).flatten(1, 2)
