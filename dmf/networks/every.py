"""Every network by its kind: u(z, r, t), and the frozen ones."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, field
from typing import Any

from dmf import fields, networks
from dmf.errors import DmfError
from dmf.networks import NetworkConfig, UNetConfig
from dmf.networks.frozen import dinov2, inception, rae, vae

# Images to latents and back: kind -> (config class, how one is built). A config has part, factor,
# image_channels, latent_channels, scale, shift and latent_shape; `vae.VAE` is what is built.
AUTOENCODERS: dict[str, tuple[type, Any]] = {
    "vae": (vae.VAEConfig, vae.build_vae),
    "rae": (rae.RAEConfig, rae.build_rae),
}
# Networks other than u(z, r, t): the same of all.
OTHERS: dict[str, tuple[type, Any]] = {
    **AUTOENCODERS,
    "inception": (inception.InceptionConfig, inception.build_inception),
    "dinov2": (dinov2.DinoConfig, dinov2.build_dinov2),
}

MOST_NUMBERS = 2**26  # of one image, beyond any that was trained on


@dataclass(frozen=True)
class _Of:
    """The section of a config that holds a network, as in `dmf.config.Config`."""

    network: NetworkConfig = field(default_factory=UNetConfig)


def network_config(values: dict[str, Any]) -> Any:
    """The config of any network, from its fields as plain values.

    Raises DmfError for an unknown kind or field, and for a value out of range.
    """
    kind = values.get("kind")
    if isinstance(kind, str) and kind in OTHERS:
        other = fields.section(OTHERS[kind][0], values, "network")
        fields.check(other, "network")
        return other
    found = fields.section(_Of, {"network": values}, "config")
    fields.check(found, "config")
    return found.network


def image_shape(sizes: Any) -> tuple[int, ...]:
    """An image shape from plain values: (H, W, C), (D,), or () of an autoencoder, for any.

    Raises DmfError for another value.
    """
    whole = isinstance(sizes, list | tuple) and all(type(n) is int and n > 0 for n in sizes)
    if not whole or len(sizes) > 3 or math.prod(sizes) > MOST_NUMBERS:
        raise DmfError(
            f"image_shape = {reprlib.repr(sizes)}: expected at most 3 whole numbers above 0, "
            f"with a product of at most {MOST_NUMBERS}"
        )
    return tuple(sizes)


def least(config: Any) -> tuple[int, int]:
    """(tensors, values) that a network has at the very least, by the fields of its config.

    It counts one layer of every block. Nothing is built, so a depth without end costs nothing.
    """
    if config.kind in ("unet", "adm", "vae"):  # a 3x3 convolution per block and level
        wide = config.channels if config.kind == "vae" else config.channel_mult
        base = 1 if config.kind == "vae" else config.channels
        layers, times = [9 * (base * n) ** 2 for n in wide], config.blocks
    elif config.kind in (
        "dit",
        "dinov2",
        "dit_dh",
        "rae",
    ):  # queries, keys, values and output of attention
        layers, times = [4 * config.width**2], config.depth
    elif config.kind == "in_context_dit":
        layers, times = [4 * config.width**2], config.depth + config.velocity_head
    elif config.kind == "mlp":
        layers, times = [config.width**2], config.depth - 1
    else:
        layers, times = [], 0
    return times * len(layers), times * sum(layers)


def build(config: Any, image_shape: tuple[int, ...]) -> Any:
    """The network of a config, u(z, r, t) or one of OTHERS, in float32."""
    if config.kind in OTHERS:
        return OTHERS[config.kind][1](config)
    return networks.build(config, image_shape)
