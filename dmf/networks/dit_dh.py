"""DiT-DH: a trunk of transformer blocks, then a wide and shallow head that reads z again.

It is the network of flows in the features of an autoencoder (arXiv 2510.11690). A token is one
position of the latent. The trunk sees times and class by adaLN-zero:

    c = SiLU(t + d + y),  d the interval branch of h = t - r

The head embeds z anew. Its modulation is one vector per token, of times and the trunk's token:

    s = SiLU(t + d + trunk),  then a linear layer to the head's width

Each adaLN applies SiLU once more, as the released weights expect. Blocks have RMS norms, rotary
positions of row and column, and SwiGLU. The trunk also adds a sine-cosine table.

Parameter names follow the public code's, with '/' for '.', and '_' before the index of a list:
`blocks.3.mlp.w12.weight` is blocks_3/mlp/w12/kernel. The head's blocks come after the trunk's. Its
r_embedder is `interval` here, and its W is `fourier/freqs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.fields import MOST_BLOCKS, MOST_CLASSES, REQUIRED, WIDEST, choice, limited
from dmf.method.flow import Condition
from dmf.networks import attention, layers
from dmf.networks.layers import Dense, PatchEmbed

FREQUENCIES = 256  # random ones of a time embedder

DIT_DH_SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}


@dataclass(frozen=True, kw_only=True)
class DiTDHConfig:
    """The transformer's shape. DIT_DH_SIZES has depth, width and heads of the named sizes.

    num_classes = 0 means no label. Otherwise the table has num_classes + 1 rows, and its last row
    is the null class.
    With interval_init "zero", u(z, r, t) = u(z, t, t) at the start, bit for bit.
    """

    kind: str = "dit_dh"  # tells the networks apart
    depth: int = limited(REQUIRED, 1, MOST_BLOCKS)  # blocks of the trunk
    width: int = limited(REQUIRED, 1, WIDEST)  # channels of a trunk's token, a multiple of 4 heads
    heads: int = limited(REQUIRED, 1, WIDEST)  # of the trunk's attention
    head_depth: int = limited(2, 1, MOST_BLOCKS)  # blocks of the head
    head_width: int = limited(2048, 1, WIDEST)  # channels of its token, a multiple of 4 head_heads
    head_heads: int = limited(16, 1, WIDEST)  # of its attention
    # width of a block's hidden layer, in widths of a token, of which SwiGLU takes two thirds
    mlp_ratio: float = limited(4.0, 0.01, 100)
    num_classes: int = limited(0, 0, MOST_CLASSES)  # of the data; 0 = no label
    # * zero | random: the branch of t - r at the start
    interval_init: str = choice("zero", layers.INTERVAL_INITS)
    logvar: bool = False  # a head for the log variance of the loss (`loss.logvar`)

    def hidden(self, width: int) -> int:
        """The hidden width of SwiGLU in a block of this width."""
        return int(2 / 3 * int(width * self.mlp_ratio))


class FourierEmbedder(nn.Module):
    """Two-layer MLP on random sines and cosines of a time, (B,) -> (B, width), in float32."""

    width: int
    zero_last: bool = False

    @nn.compact
    def __call__(self, time: jax.Array) -> jax.Array:
        """Embed times (B,); identically zero at the start when `zero_last`."""
        normal = nn.initializers.normal(0.02)
        last = nn.initializers.zeros if self.zero_last else normal
        x = layers.FourierFeatures(2 * FREQUENCIES, 1.0, 1.0, name="fourier")(time)
        x = nn.silu(nn.Dense(self.width, kernel_init=normal, name="mlp_0")(x))
        return nn.Dense(self.width, kernel_init=last, name="mlp_2")(x)


class SwiGLU(nn.Module):
    """w3(silu(a) * b), where w12 x = [a | b]."""

    hidden: int
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens (B, N, width) one by one."""
        layer = partial(Dense, dtype=self.dtype, kernel_init=layers.xavier())
        gate, wide = jnp.split(layer(2 * self.hidden, name="w12")(x), 2, axis=-1)
        return layer(x.shape[-1], name="w3")(nn.silu(gate) * wide)


def _modulation(
    cond: jax.Array, parts: int, width: int, dtype: jnp.dtype | None
) -> list[jax.Array]:
    """`parts` vectors (B, 1 or N, width) from a conditioning of such a shape, zero at the start."""
    dense = Dense(
        parts * width, dtype=dtype, kernel_init=nn.initializers.zeros, name="adaLN_modulation_1"
    )
    return jnp.split(dense(nn.silu(cond)), parts, axis=-1)


def _norm(dtype: jnp.dtype | None, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=1e-6, dtype=dtype, name=name)


class DHBlock(nn.Module):
    """Attention, then SwiGLU, each modulated and with a gate: the identity at the start."""

    heads: int
    hidden: int
    grid: tuple[int, int]
    dtype: jnp.dtype | None
    attend: attention.Kernel

    @nn.compact
    def __call__(self, x: jax.Array, cond: jax.Array) -> jax.Array:
        """Map tokens (B, N, width) given the conditioning (B, 1 or N, width)."""
        dtype = self.dtype
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _modulation(
            cond, 6, x.shape[-1], dtype
        )
        attn = layers.Attention(self.heads, self.attend, dtype, grid=self.grid, name="attn")
        x = x + gate_a * attn(_norm(dtype, "norm1")(x) * (1 + scale_a) + shift_a)
        mlp = SwiGLU(self.hidden, dtype, name="mlp")
        return x + gate_m * mlp(_norm(dtype, "norm2")(x) * (1 + scale_m) + shift_m)


class FinalLayer(nn.Module):
    """Modulated norm and projection, zero at the start, always in float32."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, cond: jax.Array) -> jax.Array:
        """Map tokens (B, N, width) to (B, N, features)."""
        x, cond = layers.at_least_float32(x), layers.at_least_float32(cond)
        shift, scale = _modulation(cond, 2, x.shape[-1], None)
        x = _norm(None, "norm_final")(x) * (1 + scale) + shift
        return Dense(self.features, kernel_init=nn.initializers.zeros, name="linear")(x)


class DiTDH(nn.Module):
    """u(z, r, t) of t, h = t - r and a class, by a trunk and a wide head."""

    config: DiTDHConfig
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
    ) -> jax.Array:
        """Map z (B, H, W, C), times r, t (B,) and classes (B,) or None to u, shaped as z.

        There is no dropout, so `rngs` is unused.
        """
        c, dtype, make = self.config, self.dtype, self.how.block(DHBlock)
        rows, columns = z.shape[1:3]
        how = (rows, columns), dtype, self.how.attend
        time = FourierEmbedder(c.width, name="t_embedder")(t)
        branch = FourierEmbedder(c.width, c.interval_init == "zero", name="interval")
        time = time + branch(t - r)
        cond = time
        if c.num_classes:
            normal = nn.initializers.normal(0.02)
            table = layers.LabelEmbedder(c.num_classes, c.width, normal, name="y_embedder")
            cond = cond + table(condition.label, z.shape[0])
        cond = nn.silu(cond)[:, None]
        s = PatchEmbed(1, c.width, dtype, name="s_embedder")(z)
        s = s + jnp.asarray(layers.position_embedding(rows, columns, c.width), s.dtype)
        for i in range(c.depth):
            s = make(c.heads, c.hidden(c.width), *how, name=f"blocks_{i}")(s, cond)
        s = nn.silu(time[:, None] + s)
        if c.width != c.head_width:
            s = Dense(c.head_width, dtype=dtype, kernel_init=layers.xavier(), name="s_projector")(s)
        x = PatchEmbed(1, c.head_width, dtype, name="x_embedder")(z)
        for i in range(c.depth, c.depth + c.head_depth):
            x = make(c.head_heads, c.hidden(c.head_width), *how, name=f"blocks_{i}")(x, s)
        return FinalLayer(z.shape[-1], name="final_layer")(x, s).reshape(z.shape)


def make_dit_dh(
    config: DiTDHConfig,
    image_shape: tuple[int, ...],
    dtype: jnp.dtype | None,
    how: layers.Execution,
) -> DiTDH:
    """The module for images (H, W, C). Raises DmfError naming the field that does not fit."""
    if len(image_shape) != 3:
        raise DmfError(f"image_shape is {image_shape}; the transformer expects (H, W, C).")
    for field in ("depth", "width", "heads", "head_depth", "head_width", "head_heads"):
        layers.check_positive(f"config.network.{field}", getattr(config, field))
    for width, heads in (("width", "heads"), ("head_width", "head_heads")):
        found, wanted = getattr(config, width), 4 * getattr(config, heads)
        if found % wanted:  # rotary positions take two channels of a head for each axis
            raise DmfError(
                f"config.network.{width} is {found}; "
                f"expected a multiple of four times network.{heads}, {wanted}."
            )
    if not config.hidden(min(config.width, config.head_width)):
        raise DmfError(
            f"config.network.mlp_ratio is {config.mlp_ratio:g}; expected a hidden layer of at "
            "least one channel."
        )
    layers.check_choice("config.network.interval_init", config.interval_init, layers.INTERVAL_INITS)
    return DiTDH(config, dtype, how)
