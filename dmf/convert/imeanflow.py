"""Improved MeanFlow's ImageNet transformer (Flax). It has our conventions: all weights are copies.

Its code stores queries, keys and values apart, and we store them as one matrix. A file for
inference may lack the velocity head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmf.convert import dit
from dmf.convert.copies import Copies
from dmf.convert.kind import Kind, Shape, Tensors, axes, expect, heads_of
from dmf.convert.rules import Rule, plain, unread
from dmf.method.flow import VELOCITY, Condition
from dmf.networks.in_context import IN_CONTEXT_SIZES, InContextConfig

NAME = "imeanflow"
COPIES = Copies(
    r"net\.u_final_layer\.norm\.kernel", (("ema", "ema_params"), ("params", "params")), "flat"
)
RESOLUTION = 32  # a constant of its code: latents of 256 x 256 images
TABLE = "net.y_embedder.embedding_table._flax_embedding.embedding"
PATCHES = "net.x_embedder.proj"
HEAD = 8  # blocks of each branch in the published sizes
# Their name of an embedder, and of its tokens -> ours.
EMBEDDERS = {
    "h_embedder": "interval",
    "omega_embedder": "scale_embedder",
    "cfg_t_start_embedder": "start_embedder",
    "cfg_t_end_embedder": "end_embedder",
}
TOKENS = {"time": "time", "class": "class", "omega": "scale", "t_min": "start", "t_max": "end"}


def _count(tensors: Tensors, part: str) -> int:
    """How many blocks of a part the file has."""
    found = (re.match(rf"net\.{part}_(\d+)\.", name) for name in tensors)
    return len({m[1] for m in found if m})


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[InContextConfig, Shape]:
    dit.check_fields(given, NAME)
    patch, _, channels, width = axes(tensors, f"{PATCHES}.kernel", 4, NAME)
    _, hidden = axes(tensors, "net.u_heads_0.mlp.w1._flax_linear.kernel", 2, NAME)
    depth = _count(tensors, "shared_blocks") + _count(tensors, "u_heads")
    counts: dict[str, Any] = {
        name: axes(tensors, f"net.{theirs}_tokens", 2, NAME)[0]
        for name, theirs in (
            ("class_tokens", "class"),
            ("time_tokens", "time"),
            ("scale_tokens", "omega"),
            ("interval_tokens", "t_min"),
        )
    }
    ratio = 8 / 3 if int(width * 8 / 3) == hidden else hidden / width
    config = InContextConfig(
        depth=depth,
        width=width,
        heads=heads_of(IN_CONTEXT_SIZES, width, depth, given.get("heads")),
        patch=patch,
        mlp_ratio=ratio,
        num_classes=axes(tensors, TABLE, 2, NAME)[0] - 1,
        velocity_head=_count(tensors, "v_heads"),
        **counts,
    )
    resolution = given.get("resolution", RESOLUTION)
    return config, (resolution, resolution, channels)


def _block(theirs: str, ours: str) -> list[Rule]:
    """The rules of one block."""
    qkv = tuple(f"{theirs}.attn.{x}_proj._flax_linear.kernel" for x in "qkv")
    joined = Rule(
        qkv,
        (f"{ours}/attn/qkv/kernel",),
        lambda *x: (np.concatenate(x, axis=1),),
        lambda x: np.split(x, 3, axis=1),
        "queries, keys and values as one matrix",
    )
    copies = {
        "norm1.kernel": "norm1/scale",
        "norm2.kernel": "norm2/scale",
        "attn.q_norm.kernel": "attn/q_norm/scale",
        "attn.k_norm.kernel": "attn/k_norm/scale",
        "attn.out_proj._flax_linear.kernel": "attn/proj/kernel",
        "attn_scale": "attn_scale",
        "mlp_scale": "mlp_scale",
    }
    copies |= {f"mlp.w{i}._flax_linear.kernel": f"mlp/w{i}/kernel" for i in (1, 2, 3)}
    return [joined, *(plain(f"{theirs}.{a}", f"{ours}/{b}") for a, b in copies.items())]


def _final(theirs: str, ours: str) -> list[Rule]:
    """The rules of a last layer."""
    layer = [
        plain(f"{theirs}.linear._flax_linear.{x}", f"{ours}/linear/{x}") for x in ("kernel", "bias")
    ]
    return [plain(f"{theirs}.norm.kernel", f"{ours}/norm/scale"), *layer]


def _rules(config: InContextConfig, shape: Shape, tensors: Tensors | None) -> list[Rule]:
    expect(config, NAME, {"kind": "in_context_dit"})
    branch = config.velocity_head or min(HEAD, config.depth)
    if tensors is not None:
        branch = _count(tensors, "u_heads")
    shared = config.depth - branch
    parts = [(f"net.shared_blocks_{i}", f"blocks_{i}") for i in range(shared)]
    parts += [(f"net.u_heads_{i}", f"blocks_{shared + i}") for i in range(branch)]
    parts += [(f"net.v_heads_{i}", f"head_blocks_{i}") for i in range(config.velocity_head)]
    rules = [rule for part in parts for rule in _block(*part)]
    rules += [plain(f"{PATCHES}.{x}", f"x_embedder/proj/{x}") for x in ("kernel", "bias")]
    rules += [
        plain(f"net.{theirs}.mlp.layers_{i}._flax_linear.{x}", f"{ours}/mlp_{i}/{x}")
        for theirs, ours in EMBEDDERS.items()
        for i in (0, 2)
        for x in ("kernel", "bias")
    ]
    rules += [plain(f"net.{a}_tokens", f"{b}_tokens") for a, b in TOKENS.items()]
    rules += [plain(TABLE, "y_embedder/embedding_table/embedding")]
    rules += _final("net.u_final_layer", "final_layer")
    if config.velocity_head:
        return rules + _final("net.v_final_layer", "head_final_layer")
    return rules + _unused(config, shape)


def _unused(config: InContextConfig, shape: Shape) -> list[Rule]:
    """The last layer of a velocity head that is not there: the code makes it all the same."""
    features = config.patch**2 * shape[-1]
    sizes = {
        "norm.kernel": (config.width,),
        "linear._flax_linear.kernel": (config.width, features),
        "linear._flax_linear.bias": (features,),
    }

    def zeros(size: tuple[int, ...]) -> Any:
        return lambda: np.zeros(size, np.float32)

    why = "the last layer of a velocity head without blocks"
    return [unread(f"net.v_final_layer.{x}", zeros(s), why, why) for x, s in sizes.items()]


def _outputs(network: Any, params: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """u(z, t - h, t) and v(z, t) of the head, images as (B, H, W, C)."""
    if not {"x", "t", "h", "y", "omega", "t_min", "t_max"} <= set(arrays):
        return {}
    x, t, h = (np.asarray(arrays[name], np.float32) for name in ("x", "t", "h"))
    guidance = np.stack([arrays["omega"], arrays["t_min"], arrays["t_max"]], axis=1)
    label = jnp.asarray(arrays["y"], jnp.int32)
    condition = Condition(label, guidance=jnp.asarray(guidance, jnp.float32))
    run = jax.jit(network.apply_with_sides)
    u, sides = run(params, x, t - h, t, condition=condition)
    return {"u": np.asarray(u), **({"v": np.asarray(sides[VELOCITY])} if sides else {})}


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The network in PyTorch from its Flax tree: kernels are (in, out), images (B, H, W, C)."""
    import torch

    weight, linear, norm, block = _torch_layers(tensors, int(arrays["heads"]))

    def embed(module: str, time: Any) -> Any:
        return dit.torch_embed(
            lambda name, x: linear(re.sub(r"\.(\d)$", r".layers_\1", name), x), module, time
        )

    given = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()}
    told = {
        "class": tensors[TABLE].float()[given["y"]],
        "omega": embed("omega_embedder", 1 - 1 / given["omega"]),
        "t_min": embed("cfg_t_start_embedder", given["t_min"]),
        "t_max": embed("cfg_t_end_embedder", given["t_max"]),
        "time": embed("h_embedder", given["h"]),
    }
    prefix = [weight(f"{name}_tokens") + x[:, None] for name, x in told.items()]
    kernel = weight("x_embedder.proj.kernel")
    patch, _, _, width = kernel.shape
    windows = given["x"].unfold(1, patch, patch).unfold(2, patch, patch).permute(0, 1, 2, 4, 5, 3)
    patches = windows.flatten(3).flatten(1, 2) @ kernel.reshape(-1, width)
    x = torch.cat([*prefix, patches + weight("x_embedder.proj.bias")], dim=1)
    for i in range(_count(tensors, "shared_blocks")):
        x = block(f"shared_blocks_{i}", x)
    found = {}
    for name in ("u", "v"):
        y = x
        for i in range(blocks := _count(tensors, f"{name}_heads")):
            y = block(f"{name}_heads_{i}", y)
        if blocks:
            y = norm(f"{name}_final_layer.norm", y[:, -patches.shape[1] :])
            found[name] = dit.torch_image(linear(f"{name}_final_layer.linear", y), patch).numpy()
    return found


def _torch_layers(tensors: Mapping[str, Any], heads: int) -> tuple[Callable[..., Any], ...]:
    """(a weight by name, a linear layer, a norm, a block) in PyTorch, by names without net."""
    import torch
    from torch.nn import functional as F

    def weight(name: str) -> Any:
        return tensors[f"net.{name}"].float()

    def linear(module: str, x: Any) -> Any:
        bias = tensors.get(f"net.{module}._flax_linear.bias")
        y = x @ weight(f"{module}._flax_linear.kernel")
        return y if bias is None else y + bias.float()

    def norm(name: str, x: Any) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight(f"{name}.kernel")

    def block(name: str, x: Any) -> Any:
        y = norm(f"{name}.norm1", x)
        q, k, v = (linear(f"{name}.attn.{w}_proj", y).unflatten(-1, (heads, -1)) for w in "qkv")
        q, k = (_torch_rotated(norm(f"{name}.attn.{w}_norm", y)) for w, y in (("q", q), ("k", k)))
        mixed = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
        y = linear(f"{name}.attn.out_proj", mixed.transpose(1, 2).flatten(2))
        x = x + y * weight(f"{name}.attn_scale")
        y = norm(f"{name}.norm2", x)
        y = F.silu(linear(f"{name}.mlp.w1", y)) * linear(f"{name}.mlp.w3", y)
        return x + linear(f"{name}.mlp.w2", y) * weight(f"{name}.mlp_scale")

    return weight, linear, norm, block


def _torch_rotated(x: Any) -> Any:
    """Rotary positions of (B, N, heads, dim) in PyTorch."""
    import torch

    tokens, dim = x.shape[1], x.shape[3]
    powers = -torch.arange(0, dim, 2, dtype=torch.float64) / dim
    angle = torch.arange(tokens)[:, None] * 1e4**powers
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def _probe(config: InContextConfig, shape: Shape) -> dict[str, np.ndarray]:
    """Random inputs, each row with another guidance; heads as in `dit.probe`."""
    found: Any = dit.probe(config, shape)  # type: ignore[arg-type]
    given = {"omega": [1.0, 7.5, 2.0], "t_min": [0.0, 0.4, 0.1], "t_max": [1.0, 0.65, 0.9]}
    return found | {name: np.array(x, np.float32) for name, x in given.items()}


IMEANFLOW = Kind(
    name=NAME,
    network="in_context_dit",
    licence="improved MeanFlow's repository is under the MIT licence; trained on ImageNet.",
    conventions="t = 1 is noise, u(z, h = t - r) of noise - data: as here, nothing is folded.",
    select=COPIES.select,
    describe=_describe,
    rules=_rules,
    outputs=_outputs,
    torch_outputs=_torch_outputs,
    probe=_probe,
    facts=dit.facts(TABLE, resolution=False),
    time="noise_at_1",
    sign="noise_minus_data",
)
