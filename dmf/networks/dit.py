"""The diffusion transformer of SiT and MeanFlow on ImageNet latents: adaLN-zero, velocity output.

Parameter names follow SiT's state dict. '.' reads as '/', and '_' joins the index of a list:

    blocks.3.adaLN_modulation.1.weight   blocks_3/adaLN_modulation_1/kernel
    t_embedder.mlp.0                     t_embedder/mlp_0

Only `interval` is not SiT's. It is a second embedder like `t_embedder`, for h = t - r, or for r
where weights were trained so. Its output is added to the conditioning vector.

With time_routing = "decoupled" there is no such embedder (Decoupled MeanFlow, arXiv 2510.24474).
The first blocks see t. The later blocks and the last layer see r, by the same `t_embedder`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dmf.errors import DmfError
from dmf.fields import MOST_BLOCKS, MOST_CLASSES, REQUIRED, WIDEST, choice, limited
from dmf.method.flow import Condition
from dmf.networks import attention, layers
from dmf.networks.layers import Dense, PatchEmbed, TimeEmbedder

INTERVAL_INPUTS = ("t-r", "r")

DIT_SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "M": {"depth": 16, "width": 1024, "heads": 16},
    "L": {"depth": 24, "width": 1024, "heads": 16},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The transformer's shape. DIT_SIZES has depth, width and heads of the named sizes.

    num_classes = 0 means no label. Otherwise the table has num_classes + 1 rows, and its last row
    is the null class.
    With interval_init "zero", u(z, r, t) = u(z, t, t) at the start, bit for bit.
    The field interval_input tells what the interval branch sees.
    With time_routing "decoupled" the parameters are a flow model's, and u(z, t, t) is its velocity.
    """

    kind: str = "dit"  # tells the networks apart
    depth: int = limited(REQUIRED, 1, MOST_BLOCKS)  # blocks
    width: int = limited(REQUIRED, 1, WIDEST)  # channels of a token, a multiple of 4 and of heads
    heads: int = limited(REQUIRED, 1, WIDEST)  # of attention
    patch: int = limited(2, 1, WIDEST)  # pixels, or latents, on the side of a token
    # width of a block's hidden layer, in widths of a token
    mlp_ratio: float = limited(4.0, 0.01, 100)
    num_classes: int = limited(0, 0, MOST_CLASSES)  # of the data; 0 = no label
    # * zero | random: the branch of t - r at the start
    interval_init: str = choice("zero", layers.INTERVAL_INITS)
    # t-r | r: what the interval branch sees; r is for weights that were trained so
    interval_input: str = choice("t-r", INTERVAL_INPUTS)
    # interval: all blocks see t and the branch | decoupled: the first blocks see t, the rest r
    time_routing: str = choice("interval", layers.TIME_ROUTINGS)
    t_blocks: int = limited(0, 0, MOST_BLOCKS)  # decoupled: blocks that see t; else 0
    qk_norm: bool = False  # RMS norm of queries and keys, with a scale per channel of a head
    logvar: bool = False  # a head for the log variance of the loss (`loss.logvar`)


def _modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return x * (1 + scale) + shift


def _norm(dtype: jnp.dtype | None) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=1e-6, use_bias=False, use_scale=False, use_fast_variance=False, dtype=dtype
    )


def _modulation(
    cond: jax.Array, parts: int, width: int, dtype: jnp.dtype | None
) -> list[jax.Array]:
    """adaLN-zero: `parts` vectors (B, 1, width) from the conditioning vector (B, width).

    All are zero at the start.
    """
    zeros = nn.initializers.zeros
    dense = nn.Dense(parts * width, dtype=dtype, kernel_init=zeros, name="adaLN_modulation_1")
    return jnp.split(dense(nn.silu(cond))[:, None, :], parts, axis=-1)


class FeedForward(nn.Module):
    """Two-layer MLP with the tanh form of GELU."""

    hidden: int
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens (B, N, width) one by one."""
        y = Dense(self.hidden, dtype=self.dtype, kernel_init=layers.xavier(), name="fc1")(x)
        y = nn.gelu(y, approximate=True)
        return Dense(x.shape[-1], dtype=self.dtype, kernel_init=layers.xavier(), name="fc2")(y)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-zero: the identity at the start."""

    config: DiTConfig
    dtype: jnp.dtype | None
    attend: attention.Kernel

    @nn.compact
    def __call__(self, x: jax.Array, cond: jax.Array) -> jax.Array:
        """Map tokens (B, N, width) given the conditioning vector (B, width)."""
        c, dtype = self.config, self.dtype
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _modulation(cond, 6, c.width, dtype)
        attn = layers.Attention(c.heads, self.attend, dtype, c.qk_norm, name="attn")
        x = x + gate_a * attn(_modulate(_norm(dtype)(x), shift_a, scale_a))
        mlp = FeedForward(int(c.width * c.mlp_ratio), dtype, name="mlp")
        return x + gate_m * mlp(_modulate(_norm(dtype)(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches, zero at the start, always in float32."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, cond: jax.Array) -> jax.Array:
        """Map tokens (B, N, width) to (B, N, features)."""
        # In bfloat16 this layer would put u on a grid of relative spacing 2^-8.
        x = layers.at_least_float32(x)
        shift, scale = _modulation(cond, 2, x.shape[-1], None)
        x = _modulate(_norm(None)(x), shift, scale)
        return Dense(self.features, kernel_init=nn.initializers.zeros, name="linear")(x)


class DiT(nn.Module):
    """u(z, r, t) by a transformer conditioned on t, on h = t - r or on r, and on a class."""

    config: DiTConfig
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
        c = self.config
        batch, height, width, channels = z.shape
        rows, columns = height // c.patch, width // c.patch
        x = PatchEmbed(c.patch, c.width, self.dtype, name="x_embedder")(z)
        x = x + jnp.asarray(layers.position_embedding(rows, columns, c.width), x.dtype)
        early, late = self._conditions(r, t, condition.label)
        x = self._scanned(x, early, late) if self.how.scan else self._unrolled(x, early, late)
        x = FinalLayer(c.patch**2 * channels, name="final_layer")(x, late)
        x = x.reshape(batch, rows, columns, c.patch, c.patch, channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(z.shape)

    def _conditions(
        self, r: jax.Array, t: jax.Array, label: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """What the first blocks see, and what the others and the last layer see, (B, width)."""
        c, embed = self.config, TimeEmbedder(self.config.width, name="t_embedder")
        if c.time_routing == "decoupled":
            conds = [embed(t), embed(r)]
        else:
            seen = r if c.interval_input == "r" else t - r
            branch = TimeEmbedder(c.width, c.interval_init == "zero", name="interval")
            conds = [embed(t) + branch(seen)]
        if c.num_classes:
            init = nn.initializers.normal(0.02)
            table = layers.LabelEmbedder(c.num_classes, c.width, init, name="y_embedder")
            of_label = table(label, t.shape[0])
            conds = [cond + of_label for cond in conds]
        return conds[0], conds[-1]

    def _unrolled(self, x: jax.Array, early: jax.Array, late: jax.Array) -> jax.Array:
        make, c = self.how.block(DiTBlock), self.config
        for i in range(c.depth):
            cond = early if i < c.t_blocks else late
            x = make(c, self.dtype, self.how.attend, name=f"blocks_{i}")(x, cond)
        return x

    def _scanned(self, x: jax.Array, early: jax.Array, late: jax.Array) -> jax.Array:
        """The blocks as one program that runs depth times over their parameters.

        The parameters keep their places in the tree.
        """
        params = [self.variables["params"][f"blocks_{i}"] for i in range(self.config.depth)]
        block = DiTBlock(self.config, self.dtype, self.how.attend, parent=None)

        def step(x: jax.Array, at: Any) -> tuple[Any, None]:
            params, is_early = at
            cond = late if early is late else jnp.where(is_early, early, late)
            return block.apply({"params": params}, x, cond), None

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        sees_t = None if early is late else np.arange(self.config.depth) < self.config.t_blocks
        return jax.lax.scan(self.how.scan_body(step), x, (stacked, sees_t))[0]


def make_dit(
    config: DiTConfig, image_shape: tuple[int, ...], dtype: jnp.dtype | None, how: layers.Execution
) -> DiT:
    """The module for images (H, W, C). Raises DmfError naming the field that does not fit."""
    if len(image_shape) != 3:
        raise DmfError(f"image_shape is {image_shape}; the DiT expects (H, W, C).")
    for field in ("depth", "width", "heads", "patch"):
        layers.check_positive(f"config.network.{field}", getattr(config, field))
    if config.width % config.heads or config.width % 4:
        raise DmfError(
            f"config.network.width is {config.width}; "
            f"expected a multiple of 4 and of network.heads, {config.heads}."
        )
    if image_shape[0] % config.patch or image_shape[1] % config.patch:
        raise DmfError(
            f"config.network.patch is {config.patch}; "
            f"expected a divisor of the image size, {image_shape[0]}x{image_shape[1]}."
        )
    if config.num_classes < 0:
        raise DmfError(
            f"config.network.num_classes is {config.num_classes}; expected 0 (no label) or more."
        )
    layers.check_choice("config.network.interval_init", config.interval_init, layers.INTERVAL_INITS)
    layers.check_choice("config.network.interval_input", config.interval_input, INTERVAL_INPUTS)
    layers.check_choice("config.network.time_routing", config.time_routing, layers.TIME_ROUTINGS)
    _check_routing(config)
    return DiT(config, dtype, how)


def _check_routing(config: DiTConfig) -> None:
    """Raises DmfError for a number of blocks, or an input of the branch, that has no meaning."""
    if config.time_routing == "interval":
        if config.t_blocks:
            raise DmfError(
                f"config.network.t_blocks is {config.t_blocks}; "
                "expected 0, or time_routing 'decoupled'."
            )
        return
    if not 1 <= config.t_blocks <= config.depth:
        raise DmfError(
            f"config.network.t_blocks is {config.t_blocks}; expected 1 to {config.depth}, some of "
            "the blocks, as time_routing is 'decoupled'."
        )
    if config.interval_input != "t-r":
        raise DmfError(
            f"config.network.interval_input is {config.interval_input!r}; expected 't-r', as "
            "time_routing 'decoupled' has no interval branch."
        )
