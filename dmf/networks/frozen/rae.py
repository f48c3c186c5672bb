"""The representation autoencoder: features of DINOv2 with registers as latents, and a ViT decoder.

It is RAE (arXiv 2510.11690). A latent is one feature per patch of the image. The encoder drops the
class token and the registers, and its last norm has no weights. The decoder's tokens are the
positions of the latent and a class token, which it drops at its end.

`encode` and `decode` use latents that are normalised, per channel and position:

    latent = (feature - mean) / sqrt(var + 1e-5)

The statistics are leaves of the parameters. So the autoencoder's scale is 1 and its shift is 0, and
its law has no spread: `encode` gives log-variances of minus infinity.

Images are in [-1, 1] and have one size, `factor` times the latent's. The encoder reads them at
another size. They are resized as by PyTorch's bicubic interpolation without antialiasing. The
encoder's table of positions is resampled with antialiasing, as in its released program.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dmf.errors import DmfError
from dmf.fields import MOST_BLOCKS, REQUIRED, WIDEST, choice, limited
from dmf.metrics.resize import resize
from dmf.networks import attention, layers
from dmf.networks.frozen.dinov2 import DinoBlock, resampling
from dmf.networks.frozen.vae import PARTS, VAE
from dmf.networks.layers import Attention, PatchEmbed

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
EPS = 1e-5  # beside the variance of the statistics
NORM_EPS = {"encoder": 1e-6, "decoder": 1e-12}


@dataclass(frozen=True, kw_only=True)
class RAEConfig:
    """The autoencoder's shape. The defaults are those of the released one for 256 x 256 images.

    depth, width, heads, hidden   of the decoder's transformer
    patch             pixels of an image on the side of a position
    grid              side of the latent
    latent_channels   width of the encoder
    encoder_grid      side of the encoder's table of positions
    part              "both", or "decoder" for no encoder
    """

    kind: str = "rae"
    depth: int = limited(28, 1, MOST_BLOCKS)
    width: int = limited(1152, 1, WIDEST)
    heads: int = limited(16, 1, WIDEST)
    hidden: int = limited(4096, 1, WIDEST)
    patch: int = limited(16, 1, WIDEST)
    grid: int = limited(REQUIRED, 1, WIDEST)
    latent_channels: int = limited(768, 1, WIDEST)
    encoder_depth: int = limited(12, 1, MOST_BLOCKS)
    encoder_heads: int = limited(12, 1, WIDEST)
    encoder_patch: int = limited(14, 1, WIDEST)
    encoder_grid: int = limited(37, 1, WIDEST)
    registers: int = limited(4, 0, 1000)
    part: str = choice("both", PARTS)

    @property
    def factor(self) -> int:
        """The side of an image over the side of its latent."""
        return self.patch

    @property
    def image_channels(self) -> int:
        """RGB."""
        return len(MEAN)

    @property
    def scale(self) -> float:
        """Latents are normalised by the statistics already."""
        return 1.0

    @property
    def shift(self) -> float:
        """Latents are centred already."""
        return 0.0

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """The shape of a square image's latent. Raises DmfError for a side that it has not."""
        side = self.patch * self.grid
        if size != side:
            raise DmfError(f"size is {size}: expected {side}, the only one of the autoencoder")
        return self.grid, self.grid, self.latent_channels


def unpatchified(tokens: jax.Array, patch: int) -> jax.Array:
    """Tokens (B, N, patch * patch * C) of a square image -> (B, H, W, C), row by row."""
    batch, count, values = tokens.shape
    side = round(count**0.5)
    x = tokens.reshape(batch, side, side, patch, patch, values // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side * patch, side * patch, -1)


def _norm(part: str, name: str | None, affine: bool = True) -> nn.LayerNorm:
    norm = partial(nn.LayerNorm, epsilon=NORM_EPS[part], use_fast_variance=False, name=name)
    return norm(use_bias=affine, use_scale=affine)


class Encoder(nn.Module):
    """DINOv2 with registers: the patches' tokens after a norm without weights."""

    config: RAEConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (B, H, W, 3) in [-1, 1] to features (B, grid * grid, latent_channels)."""
        c, normal = self.config, nn.initializers.normal(0.02)
        width, side = c.latent_channels, c.encoder_patch * c.grid
        rows = jnp.asarray(resampling(x.shape[1], side, offset=0.0), jnp.float32)
        pixels = jnp.einsum("ip,jq,bpqc->bijc", rows, rows, (x + 1) / 2)
        pixels = (pixels - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
        token = self.param("cls_token", normal, (1, 1, width), jnp.float32)
        registers = self.param("register_tokens", normal, (1, c.registers, width), jnp.float32)
        table = self.param("pos_embed", normal, (1, 1 + c.encoder_grid**2, width), jnp.float32)
        square = table[:, 1:].reshape(1, c.encoder_grid, c.encoder_grid, width)
        places = resize(square, c.grid, "bicubic_antialias").reshape(1, c.grid**2, width)
        patches = PatchEmbed(c.encoder_patch, width, None, name="patch_embed")(pixels) + places
        first = jnp.concatenate([token + table[:, :1], registers], axis=1)
        first = jnp.broadcast_to(first, (len(x), *first.shape[1:]))
        y = jnp.concatenate([first, patches], axis=1)
        for i in range(c.encoder_depth):
            y = DinoBlock(c.encoder_heads, name=f"blocks_{i}")(y)
        return _norm("encoder", None, affine=False)(y[:, first.shape[1] :])


class DecoderBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x), with GELU itself."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens (B, N, width)."""
        attend = Attention(self.heads, attention.xla, None, name="attn")
        x = x + attend(_norm("decoder", "layernorm_before")(x))
        y = nn.Dense(self.hidden, kernel_init=layers.xavier(), name="fc1")(
            _norm("decoder", "layernorm_after")(x)
        )
        y = nn.gelu(y, approximate=False)
        return x + nn.Dense(x.shape[-1], kernel_init=layers.xavier(), name="fc2")(y)


class Decoder(nn.Module):
    """Features to images."""

    config: RAEConfig

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Map features (B, grid * grid, latent_channels) to images (B, H, W, 3), about [-1, 1]."""
        c, normal = self.config, nn.initializers.normal(0.02)
        x = nn.Dense(c.width, kernel_init=layers.xavier(), name="embed")(features)
        token = self.param("cls_token", normal, (1, 1, c.width), jnp.float32)
        table = self.param("pos_embed", normal, (1, 1 + c.grid**2, c.width), jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, c.width)), x], axis=1) + table
        for i in range(c.depth):
            x = DecoderBlock(c.heads, c.hidden, name=f"layers_{i}")(x)
        x = _norm("decoder", "norm")(x)
        values = c.patch**2 * c.image_channels
        x = nn.Dense(values, kernel_init=layers.xavier(), name="pred")(x)[:, 1:]
        image = unpatchified(x, c.patch)
        image = image * np.array(STD, np.float32) + np.array(MEAN, np.float32)
        return 2 * image - 1


class Autoencoder(nn.Module):
    """Encoder and decoder with the statistics of the features between them."""

    config: RAEConfig

    def setup(self) -> None:
        """Names the parts; a decoder alone has no parameters of an encoder."""
        c = self.config
        shape = c.grid, c.grid, c.latent_channels
        if c.part == "both":
            self.encoder = Encoder(c)
        self.mean = self.param("mean", nn.initializers.zeros, shape, jnp.float32)
        self.var = self.param("var", nn.initializers.ones, shape, jnp.float32)
        self.decoder = Decoder(c)

    def __call__(self, x: jax.Array, latent: jax.Array) -> Any:
        """Runs all parts, for the initialisation."""
        return (self.encode(x) if self.config.part == "both" else None), self.decode(latent)

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map images (B, H, W, 3) to the normalised latent, and its log-variance."""
        features = self.encoder(x).reshape(len(x), *self.mean.shape)
        latent = (features - self.mean) / jnp.sqrt(self.var + EPS)
        return latent, jnp.full_like(latent, -jnp.inf)

    def decode(self, latent: jax.Array) -> jax.Array:
        """Map a normalised latent (B, grid, grid, latent_channels) to images."""
        features = latent * jnp.sqrt(self.var + EPS) + self.mean
        return self.decoder(features.reshape(len(latent), -1, latent.shape[-1]))


def build_rae(config: RAEConfig) -> VAE:
    """Builds the autoencoder, in float32, with the functions of `vae.VAE`.

    Raises DmfError that names a wrong field.
    """
    layers.check_choice("RAEConfig.part", config.part, PARTS)
    parts = {"width": "heads", "latent_channels": "encoder_heads"}
    for width, heads in parts.items() if config.part == "both" else [("width", "heads")]:
        found, wanted = getattr(config, width), getattr(config, heads)
        if found % wanted:
            raise DmfError(
                f"RAEConfig.{width} is {found}: expected a multiple of RAEConfig.{heads}, {wanted}."
            )
    module, side = Autoencoder(config), config.factor * config.grid
    image = side, side, config.image_channels
    latent = config.latent_shape(side)

    def init(key: jax.Array) -> dict[str, Any]:
        rows = (jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in (image, latent))
        return module.lazy_init(key, *rows)["params"]

    def encode(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if config.part != "both":
            raise DmfError(
                f"RAEConfig.part is {config.part!r}: there is no encoder; expected 'both'."
            )
        _check("x", x, image)
        moments: Any = module.apply({"params": params}, x, method="encode")
        return moments

    def decode(params: Any, z: jax.Array) -> jax.Array:
        _check("latent", z, latent)
        found: Any = module.apply({"params": params}, z, method="decode")
        return found

    return VAE(init, encode, decode, config.scale, config.shift)


def _check(name: str, x: jax.Array, shape: tuple[int, ...]) -> None:
    if x.ndim != 4 or x.shape[1:] != shape:
        raise DmfError(f"{name} has shape {x.shape}; expected (B, {', '.join(map(str, shape))}).")
