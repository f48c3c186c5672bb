"""Weights from a checkpoint directory: `load`, for sampling, scoring and notebooks.

A directory holds a run (several steps, each with raw weights and averages) or converted weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dmf import networks, sharding
from dmf.config import parse, to_dict
from dmf.errors import DmfError
from dmf.networks.every import OTHERS, build, image_shape, network_config
from dmf.optim import EMAConfig
from dmf.storage import checkpoint
from dmf.storage.manifest import digest, read_newest


def load(path: str | Path, ema: float | None = None) -> tuple[Any, Any]:
    """(network, params) of a checkpoint, ready to be called.

    network.apply(params, z, r, t, label=...) is u(z, r, t), or the velocity v of a flow model.
    An autoencoder has encode and decode, the Inception network apply (`dmf.networks.frozen`).
    The weights are replicated over all devices.

    Args:
        path: a work directory, one of its step folders, or a converted directory.
        ema: half-life in images of the average to take, 0 for the raw weights, None for the
            average that the run evaluates.

    Raises DmfError where the folder is missing or damaged.
    """
    found = open_weights(path, ema)
    return found.network, found.params


class Opened(NamedTuple):
    """Weights with all that is read of their step folder, which a run may remove at any time."""

    folder: Path
    stored: dict[str, Any]  # what was written beside the weights
    network: Any
    params: Any
    manifest_sha256: str


def open_weights(path: str | Path, ema: float | None = None) -> Opened:
    """Verifies and reads a checkpoint in one go. Arguments and errors: `load`."""

    def read(folder: Path) -> Opened:
        stored = checkpoint.metadata(folder)
        network, params = load_folder(folder, stored, ema)
        return Opened(folder, stored, network, params, digest(folder))

    return read_newest(path, read)


def load_folder(folder: Path, stored: dict[str, Any], ema: float | None = None) -> tuple[Any, Any]:
    """`load` of what `open_folder` has found and verified."""
    try:
        network_config, shape = described(stored)
    except DmfError as error:
        raise DmfError(f"checkpoint {folder}: its metadata: {error}") from error
    if ema and is_converted(stored):
        raise DmfError(f"checkpoint {folder} has no EMA: expected ema = 0 or none, got {ema:g}")
    if "config" in stored:
        config = parse(stored["config"])
        dtype = jnp.dtype(config.compute_dtype)
        whole = networks.build(config.network, shape, dtype)  # as it was trained
        network = networks.build(network_config, shape, dtype)
        averages = (
            config.ema if ema is None else EMAConfig(config.ema.halflife_images, evaluate=ema)
        )
        index = averages.index()
    else:
        network, index = build(network_config, shape), None
        whole = network
    like = abstract_params(whole, sharding.make_mesh())
    _, params = networks.without_head(None, checkpoint.read_params(folder, index, like))
    _check_finite(folder, params)
    return network, params


def _check_finite(folder: Path, params: Any) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if wild := x.size - int(np.isfinite(x).sum()):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise DmfError(
                f"checkpoint {folder}: {wild} of the {x.size} values of weight {name} are not "
                "finite; expected weights of a working network"
            )


def open_folder(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """(step folder, what was written beside the weights) of a checkpoint, which is verified."""
    return read_newest(path, lambda folder: (folder, checkpoint.metadata(folder)))


def is_converted(stored: dict[str, Any]) -> bool:
    """Whether a checkpoint holds converted weights, and not a run's."""
    return "config" not in stored or not stored["config"]["data"]["name"]


def which(stored: dict[str, Any], ema: float | None) -> str:
    """Which of a checkpoint's weights `load` takes, in words."""
    if is_converted(stored):
        return f"converted from copy {stored['source']['source']['copy']!r}"
    halflife = stored["config"]["ema"]["evaluate"] if ema is None else ema
    return f"average with a half-life of {halflife:g} images" if halflife else "raw"


def described(stored: dict[str, Any]) -> tuple[Any, tuple[int, ...]]:
    """(network config, image shape) from a checkpoint's metadata.

    A head for the loss is left out: what reads weights for use does not need it.
    """
    shape = image_shape(stored.get("image_shape"))
    if "config" in stored:
        return networks.without_head(parse(stored["config"]).network)[0], shape
    return network_config(stored["network"]), shape


def metadata(config: Any, image_shape: tuple[int, ...], source: dict[str, Any]) -> dict[str, Any]:
    """What is written beside converted weights.

    For a u(z, r, t) it holds a whole config, so that `load` and config.init read it like a run. The
    empty data name marks it as converted.
    """
    stored = {"image_shape": list(image_shape), "source": source}
    if config.kind in OTHERS:
        return {"network": dataclasses.asdict(config), **stored}
    run = parse(
        {"network": dataclasses.asdict(config), "data": {"name": ""}, "ema": {"evaluate": 0.0}}
    )
    return {"config": to_dict(run), **stored}


def abstract_params(network: Any, mesh: Mesh) -> Any:
    """Shapes, dtypes and placement of the network's weights, nothing allocated."""
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    place = sharding.placed(mesh, shapes)
    return jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, place
    )
