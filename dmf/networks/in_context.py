"""The transformer of improved MeanFlow (arXiv 2512.02012): what it is told stands before the image.

The tokens of class, guidance and time, each a learned token plus an embedding, come first:

    class (8), guidance scale (4), its interval's ends (2 + 2), h = t - r (4), then the patches

There is no adaLN. A block has RMS norms, rotary positions, norms of queries and keys, SwiGLU, and a
gate per channel that is zero at the start. The network does not see t itself, only h.

Its velocity head is a second branch of the last blocks. It gives v(z, t) as a side output, which
the loss trains. Sampling and export leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.fields import MOST_BLOCKS, MOST_CLASSES, REQUIRED, WIDEST, choice, limited
from dmf.method.flow import VELOCITY, Condition
from dmf.networks import attention, layers
from dmf.networks.layers import Dense, PatchEmbed, TimeEmbedder

MOST_TOKENS = 1000  # of one input
BLOCK_GAIN = 0.32  # the paper's code: standard deviation of a block's kernels, times sqrt(fan_in)

IN_CONTEXT_SIZES: dict[str, dict[str, int]] = {
    "B": {"depth": 12, "width": 768, "heads": 12},
    "M": {"depth": 24, "width": 768, "heads": 12},
    "L": {"depth": 32, "width": 1024, "heads": 16},
    "XL": {"depth": 48, "width": 1024, "heads": 16},
}


@dataclass(frozen=True, kw_only=True)
class InContextConfig:
    """The transformer's shape. IN_CONTEXT_SIZES has depth, width and heads of the named sizes.

    num_classes = 0 means no label, and no class tokens. Otherwise the table's last row is the null
    class. scale_tokens = 0 and interval_tokens = 0 mean that the network is told no guidance.
    With interval_init "zero", u(z, r, t) = u(z, t, t) at the start, bit for bit.
    """

    kind: str = "in_context_dit"  # tells the networks apart
    depth: int = limited(REQUIRED, 1, MOST_BLOCKS)  # blocks from z to u
    width: int = limited(REQUIRED, 1, WIDEST)  # channels of a token, a multiple of 2 * heads
    heads: int = limited(REQUIRED, 1, WIDEST)  # of attention
    patch: int = limited(2, 1, WIDEST)  # pixels, or latents, on the side of a token
    # width of a block's hidden layer, in widths of a token
    mlp_ratio: float = limited(8 / 3, 0.01, 100)
    num_classes: int = limited(0, 0, MOST_CLASSES)  # of the data; 0 = no label
    class_tokens: int = limited(8, 1, MOST_TOKENS)  # before the image, with classes only
    time_tokens: int = limited(4, 1, MOST_TOKENS)  # of t - r
    scale_tokens: int = limited(4, 0, MOST_TOKENS)  # of the guidance scale; 0 = told no guidance
    interval_tokens: int = limited(2, 0, MOST_TOKENS)  # of each end of the guidance interval
    # blocks of the velocity head, a copy of the last ones of depth; 0 = no head
    velocity_head: int = limited(8, 0, MOST_BLOCKS)
    # * zero | random: the branch of t - r at the start
    interval_init: str = choice("zero", layers.INTERVAL_INITS)
    logvar: bool = False  # a head for the log variance of the loss (`loss.logvar`)

    @property
    def takes_guidance(self) -> bool:
        """Whether the network is told scale and interval of guidance."""
        return self.scale_tokens > 0


def _fan_in(gain: float) -> nn.initializers.Initializer:
    """N(0, gain^2 / fan_in)."""
    return nn.initializers.variance_scaling(gain**2, "fan_in", "normal")


class RotaryAttention(nn.Module):
    """Self-attention with norms and rotary positions of queries and keys.

    The columns of qkv are [q | k | v], each head-major. No layer has a bias.
    """

    heads: int
    attend: attention.Kernel
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Mix tokens (B, N, width)."""
        batch, tokens, width = x.shape
        layer = _layer(self.dtype)
        qkv = layer(3 * width, name="qkv")(x)
        qkv = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads)
        angle = attention.line_angles(tokens, width // self.heads)
        q = attention.rotated(_norm(self.dtype, "q_norm")(qkv[:, :, 0]), angle)
        k = attention.rotated(_norm(self.dtype, "k_norm")(qkv[:, :, 1]), angle)
        y = self.attend(q, k, qkv[:, :, 2]).reshape(batch, tokens, width)
        return layer(width, name="proj")(y)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases."""

    hidden: int
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens (B, N, width) one by one."""
        layer = _layer(self.dtype)
        gate, wide = layer(self.hidden, name="w1")(x), layer(self.hidden, name="w3")(x)
        return layer(x.shape[-1], name="w2")(nn.silu(gate) * wide)


class Block(nn.Module):
    """Attention, then SwiGLU, each with a gate per channel: the identity at the start."""

    config: InContextConfig
    dtype: jnp.dtype | None
    attend: attention.Kernel

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens (B, N, width)."""
        c, zeros = self.config, nn.initializers.zeros
        gates = [self.param(f"{name}_scale", zeros, (c.width,)) for name in ("attn", "mlp")]
        gate_a, gate_m = (gate.astype(x.dtype) for gate in gates)
        attn = RotaryAttention(c.heads, self.attend, self.dtype, name="attn")
        x = x + gate_a * attn(_norm(self.dtype, "norm1")(x))
        mlp = SwiGLU(int(c.width * c.mlp_ratio), self.dtype, name="mlp")
        return x + gate_m * mlp(_norm(self.dtype, "norm2")(x))


class FinalLayer(nn.Module):
    """Norm and projection to patches, zero at the start, always in float32."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens (B, N, width) to (B, N, features)."""
        x = _norm(None, "norm")(layers.at_least_float32(x))
        return Dense(self.features, kernel_init=nn.initializers.zeros, name="linear")(x)


class InContextDiT(nn.Module):
    """u(z, r, t), and beside it v(z, t) by the velocity head, of h = t - r, class and guidance."""

    config: InContextConfig
    dtype: jnp.dtype | None
    how: layers.Execution

    @nn.compact
    def __call__(
        self,
        z: jax.Array,
        r: jax.Array,
        t: jax.Array,
        condition: Condition,
        rngs: jax.Array | None,
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        """Map z (B, H, W, C), times r, t (B,) and the condition to u, and to v with a head.

        There is no dropout, so `rngs` is unused.
        """
        c, make = self.config, self.how.block(Block)
        patches = PatchEmbed(c.patch, c.width, self.dtype, name="x_embedder")(z)
        prefix = self._prefix(t - r, condition).astype(patches.dtype)
        x, first = jnp.concatenate([prefix, patches], axis=1), prefix.shape[1]

        def run(x: jax.Array, names: list[str], last: str) -> jax.Array:
            for name in names:
                x = make(c, self.dtype, self.how.attend, name=name)(x)
            x = FinalLayer(c.patch**2 * z.shape[-1], name=last)(x[:, first:])
            rows, columns = z.shape[1] // c.patch, z.shape[2] // c.patch
            x = x.reshape(z.shape[0], rows, columns, c.patch, c.patch, z.shape[-1])
            return x.transpose(0, 1, 3, 2, 4, 5).reshape(z.shape)

        shared = c.depth - c.velocity_head
        for i in range(shared):
            x = make(c, self.dtype, self.how.attend, name=f"blocks_{i}")(x)
        u = run(x, [f"blocks_{i}" for i in range(shared, c.depth)], "final_layer")
        if not c.velocity_head:
            return u
        v = run(x, [f"head_blocks_{i}" for i in range(c.velocity_head)], "head_final_layer")
        return u, {VELOCITY: v.astype(u.dtype)}

    def _prefix(self, h: jax.Array, condition: Condition) -> jax.Array:
        """The tokens before the image, (B, tokens, width)."""
        c, std = self.config, nn.initializers.normal(1 / math.sqrt(self.config.width))
        scale, start, end = _guidance(condition, h)

        def told(name: str, count: int, embedding: jax.Array) -> jax.Array:
            return self.param(f"{name}_tokens", std, (count, c.width)) + embedding[:, None]

        def embedded(name: str, x: jax.Array, silent: bool = False) -> jax.Array:
            return TimeEmbedder(c.width, silent, _fan_in(1.0), name=name)(x)

        parts = []
        if c.num_classes:
            table = layers.LabelEmbedder(c.num_classes, c.width, std, name="y_embedder")
            parts.append(told("class", c.class_tokens, table(condition.label, h.shape[0])))
        if c.takes_guidance:
            of_scale = embedded("scale_embedder", 1 - 1 / scale)
            parts.append(told("scale", c.scale_tokens, of_scale))
            for name, time in (("start", start), ("end", end)):
                embedding = embedded(f"{name}_embedder", time)
                parts.append(told(name, c.interval_tokens, embedding))
        of_h = embedded("interval", h, c.interval_init == "zero")
        return jnp.concatenate([*parts, told("time", c.time_tokens, of_h)], axis=1)


def _guidance(condition: Condition, h: jax.Array) -> tuple[jax.Array, ...]:
    """(scale, start, end), each (B,); without guidance 1, 0 and 1."""
    if condition.guidance is None:
        return jnp.ones_like(h), jnp.zeros_like(h), jnp.ones_like(h)
    return tuple(condition.guidance[:, i] for i in range(3))


def _norm(dtype: jnp.dtype | None, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=1e-6, dtype=dtype, name=name)


def _layer(dtype: jnp.dtype | None) -> Callable[..., Dense]:
    """A linear layer of a block, which has no bias."""
    return partial(Dense, dtype=dtype, use_bias=False, kernel_init=_fan_in(BLOCK_GAIN))


def make_in_context_dit(
    config: InContextConfig,
    image_shape: tuple[int, ...],
    dtype: jnp.dtype | None,
    how: layers.Execution,
) -> InContextDiT:
    """The module for images (H, W, C). Raises DmfError naming the field that does not fit."""
    if len(image_shape) != 3:
        raise DmfError(f"image_shape is {image_shape}; the transformer expects (H, W, C).")
    for field in ("depth", "width", "heads", "patch", "time_tokens", "class_tokens"):
        layers.check_positive(f"config.network.{field}", getattr(config, field))
    if config.width % (2 * config.heads):
        raise DmfError(
            f"config.network.width is {config.width}; "
            f"expected a multiple of twice network.heads, {2 * config.heads}."
        )
    if image_shape[0] % config.patch or image_shape[1] % config.patch:
        raise DmfError(
            f"config.network.patch is {config.patch}; "
            f"expected a divisor of the image size, {image_shape[0]}x{image_shape[1]}."
        )
    if not 0 <= config.velocity_head <= config.depth:
        raise DmfError(
            f"config.network.velocity_head is {config.velocity_head}; expected 0 to "
            f"{config.depth}, the depth."
        )
    if (config.scale_tokens > 0) != (config.interval_tokens > 0):
        raise DmfError(
            f"config.network.scale_tokens is {config.scale_tokens} with interval_tokens "
            f"{config.interval_tokens}; expected both above 0, or none."
        )
    layers.check_choice("config.network.interval_init", config.interval_init, layers.INTERVAL_INITS)
    return InContextDiT(config, dtype, how)
