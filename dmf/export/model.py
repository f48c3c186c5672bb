"""A checkpoint opened for export: its network, its weights, and what a user has to know of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dmf import networks, pretrained
from dmf.config import Config, parse
from dmf.convert import audit
from dmf.convert.leaves import flat
from dmf.convert.native import NATIVE
from dmf.convert.rules import Rule
from dmf.data import latents
from dmf.errors import DmfError
from dmf.export import tensorfile
from dmf.storage.manifest import step_of


@dataclass(frozen=True)
class Model:
    """A checkpoint's network and weights, and what was written beside them."""

    folder: Path  # a run may have removed it by now
    stored: dict[str, Any]
    manifest_sha256: str
    config: Config
    shape: tuple[int, ...]
    network: networks.Network
    params: Any
    ema: float | None  # as for `pretrained.load`
    sampler: str

    def _network(self) -> dict[str, Any]:
        """The network's fields as stored, without the heads for the loss."""
        stored: dict[str, Any] = self.stored["config"]["network"]
        heads = networks.HEADS.items()
        return stored | {name: off for name, off in heads if stored.get(name, off) != off}

    def rules(self) -> list[Rule]:
        """The key map of the file of weights."""
        return NATIVE.rules(self.config.network, self.shape, None)

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights by the names of their file."""
        leaves = {name: np.asarray(x) for name, x in flat(self.params).items()}
        return audit.write(self.rules(), leaves)

    def metadata(self) -> dict[str, Any]:
        """The metadata of the file of weights."""
        licence = (self.stored.get("source") or {}).get("licence", "your own")
        words = pretrained.which(self.stored, self.ema)
        config, shape = pretrained.described(self.stored)
        return tensorfile.describe(config, shape, NATIVE, licence, words, [])

    def converted(self) -> bool:
        """Whether the weights were converted, and not trained here."""
        return pretrained.is_converted(self.stored)

    def home(self) -> Path:
        """Where files about the checkpoint are: its work directory, or beside it."""
        return self.folder.parent if self.converted() else self.folder.parent.parent

    def about(self) -> dict[str, Any]:
        """What a user of the sampler has to know, as plain JSON."""
        config, classes = self.config, self.config.num_classes
        shape = ", ".join(map(str, self.shape))
        rule = "(B,) int32, not read: the model has no classes"
        if classes:
            rule = f"(B,) int32 in 0 .. {classes - 1}, or {classes} for no class; "
            rule += "others are not checked"
        return {
            "conventions": NATIVE.conventions,
            "noise": f"e: (B, {shape}) float32, standard normal, drawn by the caller",
            "images": _images(self),
            "labels": {"classes": classes, "null": classes or None, "rule": rule},
            "latent": _latent(self),
            "sampler": self.sampler,
            "dtype": {
                "weights": "float32",
                "compute": config.compute_dtype,
                "images": "float32",
                "matmul_precision": "highest",
            },
            "ema": pretrained.which(self.stored, self.ema),
            "image_shape": list(self.shape),
            "network": self._network(),
            "origin": _origin(self),
            "versions": {
                name: version(name) for name in ("jax", "jaxlib", "flax", "numpy", "safetensors")
            },
        }


def open_model(path: str | Path, ema: float | None = None, sampler: str = "") -> Model:
    """The checkpoint to export; path and ema as for `pretrained.load`.

    sampler: a key of SAMPLERS; "" takes the run's sampler.
    Raises DmfError where the checkpoint holds no u(z, r, t).
    """
    folder, stored, network, params, manifest = pretrained.open_weights(path, ema)
    if "config" not in stored:
        raise DmfError(
            f"checkpoint {path} holds a {stored['network']['kind']}: "
            "expected a flow model or a generator"
        )
    config = parse(stored["config"])
    config = replace(config, network=pretrained.described(stored)[0])
    params = jax.device_get(params)  # one device is enough for an export
    shape, name = tuple(stored["image_shape"]), sampler or config.run.sampler
    return Model(folder, stored, manifest, config, shape, network, params, ema, name)


def _images(model: Model) -> str:
    if _latent(model):
        return "x: shaped as e, float32, scaled latents; not clipped"
    return (
        "x: shaped as e, float32, in about [-1, 1], not clipped; "
        "bytes are clip(round(127.5 (x + 1)), 0, 255)"
    )


def _latent(model: Model) -> dict[str, Any] | None:
    """How samples become images if they are latents; None if they are images."""
    data = model.stored.get("data") or {}
    if (
        "scale" not in data
        and model.config.data.name not in latents.MOCKS
        and model.shape[-1] in (1, 3)
    ):
        return None
    vae = data.get("vae") or {}
    unknown = "the scale was not recorded; Stable Diffusion's first autoencoder has 0.18215"
    return {
        "scale": data.get("scale"),
        "shift": data.get("shift", 0.0),
        "rule": "image = decode(x / scale + shift)",
        "decoder": "not included: it is the caller's, the one that made the training latents",
        "decoder_file": vae.get("file"),
        "decoder_sha256": vae.get("sha256"),
        "note": "" if "scale" in data else unknown,
    }


def _origin(model: Model) -> dict[str, Any]:
    """Where the weights come from, without any path of the machine that made them."""
    source, converted, trained = model.stored.get("source") or {}, None, None
    if source:
        converted = {"kind": source["kind"], **source["source"], "licence": source["licence"]}
    if not model.converted():
        step = step_of(model.folder.name)
        trained = {"step": step, "data": model.config.data.name}
    return {
        "trained": trained,
        "converted_from": converted,
        "checkpoint_manifest_sha256": model.manifest_sha256,
    }
