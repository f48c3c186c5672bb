"""Every network by its kind: u(z, r, t), and the frozen ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dmf import fields, networks
from dmf.networks import NetworkConfig, UNetConfig
from dmf.networks.frozen import dinov2, inception, vae

# Networks other than u(z, r, t): kind -> (config class, how one is built).
OTHERS: dict[str, tuple[type, Any]] = {
    "vae": (vae.VAEConfig, vae.build_vae),
    "inception": (inception.InceptionConfig, inception.build_inception),
    "dinov2": (dinov2.DinoConfig, dinov2.build_dinov2),
}


@dataclass(frozen=True)
class _Of:
    """The section of a config that holds a network, as in `dmf.config.Config`."""

    network: NetworkConfig = field(default_factory=UNetConfig)


def network_config(values: dict[str, Any]) -> Any:
    """The config of any network, from its fields as plain values.

    Raises DmfError for an unknown kind or field.
    """
    kind = values.get("kind")
    if kind in OTHERS:
        return fields.section(OTHERS[kind][0], values, "network")
    found = fields.section(_Of, {"network": values}, "config")
    fields.check(found, "config")
    return found.network


def build(config: Any, image_shape: tuple[int, ...]) -> Any:
    """The network of a config, u(z, r, t) or one of OTHERS, in float32."""
    if config.kind in OTHERS:
        return OTHERS[config.kind][1](config)
    return networks.build(config, image_shape)
