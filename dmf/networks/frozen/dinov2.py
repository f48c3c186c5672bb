"""DINOv2 (arXiv:2304.07193), a vision transformer: the feature network of FD-DINOv2.

FD-DINOv2 is from arXiv:2306.04675 and EDM2. Published distances use the class token of ViT-L/14
after the last norm, at 224 x 224 pixels, with the released weights.

The weights were trained at 518 x 518 pixels. Their table of positions has 37 x 37 rows.
At 224 pixels there are only 16 x 16 patches.
The table is therefore resampled in use, as in the released program; see `resampling`.
Other ways, such as antialiasing or no offset, give other features.

Input: 224 x 224 RGB, channels last, (byte / 255 - mean) / std.
ImageNet's mean is (0.485, 0.456, 0.406), and its std is (0.229, 0.224, 0.225).
The caller resizes and normalises.

Parameter names follow the PyTorch file, with '/' for '.'. A number that indexes a list follows '_':
`blocks.3.attn.qkv.weight` is blocks_3/attn/qkv/kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dmf.errors import DmfError
from dmf.fields import MOST_BLOCKS, REQUIRED, WIDEST, limited
from dmf.networks import attention, layers
from dmf.networks.layers import Attention, PatchEmbed

SIZE = 224
MLP_RATIO = 4
NORM_EPS = 1e-6
OFFSET = 0.1  # of a patch; the released program adds it to the target size
CUBIC = -0.75  # slope of the cubic kernel at distance 1; antialiased resizers mostly have -0.5

DINO_SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "L": {"depth": 24, "width": 1024, "heads": 16},
}


@dataclass(frozen=True, kw_only=True)
class DinoConfig:
    """The transformer's shape; DINO_SIZES has depth, width and heads of the released sizes.

    patch: side of a patch in pixels. grid: side of the square table of positions, 37 as released.
    """

    kind: str = "dinov2"
    depth: int = limited(REQUIRED, 1, MOST_BLOCKS)
    width: int = limited(REQUIRED, 1, WIDEST)
    heads: int = limited(REQUIRED, 1, WIDEST)
    patch: int = limited(14, 1, SIZE)
    grid: int = limited(37, 1, WIDEST)


class Dino(NamedTuple):
    """The network as two pure functions.

    init(key) -> params: A nested dict of float32 arrays.
    They are random, for tests only: a distance needs the released weights.

    apply(params, x) -> features (B, width): The class token after the last norm.
    x is (B, 224, 224, 3), normalised as this module says.
    Products are full float32 ("highest"), also where bfloat16 or TF32 would be faster.
    Raises DmfError for another shape.
    """

    init: Callable[[jax.Array], dict[str, Any]]
    apply: Callable[..., jax.Array]


def resampling(source: int, target: int, offset: float = OFFSET) -> np.ndarray:
    """The matrix (target, source) that resamples one axis of a table of positions, float64.

    Row i is the cubic kernel, a = -0.75, at (i + 1/2) source / (target + offset) - 1/2.
    Positions beyond the ends repeat the last one. Rows sum to 1. Equal sizes give the identity.

    This is PyTorch's bicubic interpolation without antialiasing. DINOv2's program calls it with
    an offset of 0.1: it gives the factor (target + 0.1) / source instead of the size.
    All samples then lie a little to the left; from 37 to 16, by up to 0.22 of a position.
    """
    if source == target:
        return np.eye(target)
    position = (np.arange(target) + 0.5) * source / (target + offset) - 0.5
    matrix = np.zeros((target, source))
    for step in (-1, 0, 1, 2):
        tap = np.floor(position) + step
        d, a = np.abs(position - tap), CUBIC
        near, far = ((a + 2) * d - (a + 3)) * d**2 + 1, a * (((d - 5) * d + 8) * d - 4)
        column = np.clip(tap, 0, source - 1).astype(int)
        matrix[np.arange(target), column] += np.where(d <= 1, near, far)
    return matrix


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=NORM_EPS, use_fast_variance=False, name=name)


class LayerScale(nn.Module):
    """x gamma, one factor per channel."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scale x (B, N, width)."""
        return x * self.param("gamma", nn.initializers.ones, x.shape[-1:], jnp.float32)


class FeedForward(nn.Module):
    """Two-layer MLP with GELU itself, not its tanh form."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens (B, N, width) one by one."""
        width = x.shape[-1]
        y = nn.Dense(MLP_RATIO * width, kernel_init=layers.xavier(), name="fc1")(x)
        y = nn.gelu(y, approximate=False)
        return nn.Dense(width, kernel_init=layers.xavier(), name="fc2")(y)


class DinoBlock(nn.Module):
    """x + gamma_1 attention(norm x), then x + gamma_2 mlp(norm x)."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens (B, N, width)."""
        attend = Attention(self.heads, attention.xla, None, name="attn")
        x = x + LayerScale(name="ls1")(attend(_norm("norm1")(x)))
        return x + LayerScale(name="ls2")(FeedForward(name="mlp")(_norm("norm2")(x)))


class DinoNetwork(nn.Module):
    """From the image to the class token."""

    config: DinoConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (B, 224, 224, 3) to features (B, width)."""
        c = self.config
        normal = nn.initializers.normal(0.02)
        token = self.param("cls_token", normal, (1, 1, c.width), jnp.float32)
        table = self.param("pos_embed", normal, (1, 1 + c.grid**2, c.width), jnp.float32)
        rows = jnp.asarray(resampling(c.grid, SIZE // c.patch), jnp.float32)
        square = table[0, 1:].reshape(c.grid, c.grid, c.width)
        places = jnp.einsum("ip,jq,pqc->ijc", rows, rows, square).reshape(-1, c.width)
        patches = PatchEmbed(c.patch, c.width, None, name="patch_embed")(x) + places
        first = jnp.broadcast_to(token + table[:, :1], (len(x), 1, c.width))
        y = jnp.concatenate((first, patches), axis=1)
        for i in range(c.depth):
            y = DinoBlock(c.heads, name=f"blocks_{i}")(y)
        return _norm("norm")(y[:, 0])


def build_dinov2(config: DinoConfig) -> Dino:
    """Builds the network. Raises DmfError for a config of another kind, or a wrong field."""
    if not isinstance(config, DinoConfig) or config.kind != "dinov2":
        raise DmfError(
            f"config.kind is {config.kind!r} in a {type(config).__name__}; "
            "expected 'dinov2', DinoConfig."
        )
    for field in ("depth", "width", "heads", "patch", "grid"):
        layers.check_positive(f"config.{field}", getattr(config, field))
    if config.width % config.heads:
        raise DmfError(
            f"config.width is {config.width}; expected a multiple of config.heads, {config.heads}."
        )
    if SIZE % config.patch:
        raise DmfError(
            f"config.patch is {config.patch}; expected a divisor of {SIZE}, the image size."
        )
    module, shape = DinoNetwork(config), (SIZE, SIZE, 3)

    def init(key: jax.Array) -> dict[str, Any]:
        return module.lazy_init(key, jax.ShapeDtypeStruct((1, *shape), jnp.float32))["params"]

    def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
        if x.ndim != 4 or x.shape[1:] != shape:
            raise DmfError(
                f"x has shape {x.shape}; expected (B, {SIZE}, {SIZE}, 3), resized and normalised."
            )
        with jax.default_matmul_precision("highest"):  # whatever the caller's default is
            features: Any = module.apply({"params": params}, x.astype(jnp.float32))
        return features

    return Dino(init, apply)
