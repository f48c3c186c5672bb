"""The sampler of a checkpoint as a function of arrays alone, and as an artifact of `jax.export` that needs none of this code.

    images = sampler(weights, e, labels)        one step: x = e - u(e, 0, 1)

weights: {name: array}, the tensors of a file in the layout of kind "dmf"; e: (B, H, W, C) float32, standard normal noise;
labels: (B,) int32, not read where the model has no classes. B is free; the number of steps is not. One artifact serves CPU,
CUDA and TPU, and holds no weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from dmf import networks, pretrained
from dmf.config import Config, parse
from dmf.convert import audit
from dmf.convert.command import KINDS
from dmf.convert.native import NATIVE
from dmf.convert.rules import Rule, relative_l2
from dmf.data import latents
from dmf.errors import DmfError
from dmf.evaluation import sampling
from dmf.export import weights as files
from dmf.method.samplers import SAMPLERS
from dmf.storage import checkpoint

Weights = Mapping[str, Any]
PLATFORMS = ("cpu", "cuda", "tpu")
SOURCE_NAMES = "jax_hlo_source_file_canonicalization_regex"  # what to cut off file names: a program tells where it was traced
BATCHES = (1, 7)  # at which an artifact is held against the sampler before it leaves
LIMITS = {
    "float32": 1e-5,
    "bfloat16": 2e-2,
}  # relative L2; half precision rounds by the order in which XLA sums


@dataclass(frozen=True)
class Model:
    """A checkpoint opened for export: its network and weights, and what was written beside them."""

    folder: Path
    stored: dict[str, Any]
    config: Config
    shape: tuple[int, ...]
    network: networks.Network
    params: Any
    ema: float | None  # as for `pretrained.load`
    sampler: str

    def rules(self) -> list[Rule]:
        """The key map of the weights' file."""
        return KINDS[NATIVE.name].rules(self.config.network, self.shape, None)

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights by the names of their file."""
        return audit.write(
            self.rules(), {name: np.asarray(x) for name, x in audit.flat(self.params).items()}
        )


def open_model(path: str | Path, ema: float | None = None, sampler: str = "") -> Model:
    """The checkpoint to export; path and ema as for `pretrained.load`. sampler: a key of SAMPLERS, "" for the run's own.

    Raises DmfError where the checkpoint holds no u(z, r, t).
    """
    folder, stored = pretrained.open_folder(path)
    if "config" not in stored:
        raise DmfError(
            f"checkpoint {path} holds a {stored['network']['kind']}: expected a flow model or a generator"
        )
    config = parse(stored["config"])
    network, params = pretrained.load_folder(folder, stored, ema)
    shape, params = (
        tuple(stored["image_shape"]),
        jax.device_get(params),
    )  # one device is enough for what follows
    return Model(folder, stored, config, shape, network, params, ema, sampler or config.run.sampler)


def velocity(model: Model, params: Any, labels: Any) -> Callable[[Any, Any, Any], Any]:
    """u(z, r, t) of the model; the labels are left out where it has no classes."""
    classes = labels if model.config.num_classes else None
    return lambda z, r, t: model.network.apply(params, z, r, t, label=classes)


def function(model: Model, steps: int) -> Callable[[Weights, Any, Any], Any]:
    """sampler(weights, e, labels) -> images of the shape of e, after `steps` steps; traced as `sampling.Sampler` does."""
    rules = model.rules()

    @jax.default_matmul_precision("highest")
    def sampler(weights: Weights, e: jax.Array, labels: jax.Array) -> jax.Array:
        leaves = [rule.forward(*(weights[name] for name in rule.tensors)) for rule in rules]
        named = {
            name: x
            for rule, found in zip(rules, leaves, strict=True)
            for name, x in zip(rule.leaves, found, strict=True)
        }
        return SAMPLERS[model.sampler].draw(velocity(model, audit.nested(named), labels), e, steps)

    return sampler


def artifact(model: Model, steps: int, weights: Weights) -> bytes:
    """The sampler as bytes that `jax.export.deserialize` reads, for PLATFORMS, with the batch size left open.

    weights: the tensors of its file; their names, shapes and dtypes are all that goes into the artifact.
    """
    (rows,) = jax.export.symbolic_shape("b")
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    e, labels = (
        jax.ShapeDtypeStruct((rows, *model.shape), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    kept = jax.config.values[SOURCE_NAMES]
    jax.config.update(SOURCE_NAMES, ".*/")
    try:
        exported = jax.export.export(jax.jit(function(model, steps)), platforms=PLATFORMS)(
            like, e, labels
        )
    finally:
        jax.config.update(SOURCE_NAMES, kept)
    return bytes(exported.serialize())


def call(stored: bytes) -> tuple[Callable[[Weights, Any, Any], Any], int]:
    """(sampler(weights, e, labels), its calling convention) of an artifact's bytes."""
    exported = jax.export.deserialize(bytearray(stored))
    return jax.jit(exported.call), exported.calling_convention_version


def check(model: Model, steps: int, found: Callable[[Any, Any], Any], what: str) -> dict[str, Any]:
    """Holds found(e, labels) against the checkpoint's own sampler at the batch sizes BATCHES, the null label among the labels.

    Returns the largest relative L2 and what it is of. Raises DmfError where it is above LIMITS.
    """
    classes, worst = model.config.num_classes, 0.0
    limit = LIMITS[model.config.compute_dtype]

    @jax.default_matmul_precision("highest")
    def own(params: Any, n: jax.Array, e: jax.Array, labels: jax.Array) -> jax.Array:
        return SAMPLERS[model.sampler].draw(velocity(model, params, labels), e, n)

    run = partial(jax.jit(own), model.params, np.int32(steps))
    for rows in BATCHES:
        e = np.random.default_rng(rows).standard_normal((rows, *model.shape)).astype(np.float32)
        labels = ((classes - np.arange(rows)) % (classes + 1)).astype(np.int32)
        worst = max(worst, relative_l2(np.asarray(found(e, labels)), np.asarray(run(e, labels))))
    if not worst <= limit:
        raise DmfError(
            f"{what} differs from the checkpoint's sampler by {worst:.1e}: expected a relative L2 of at most {limit:g}"
        )
    return {
        "relative_l2": worst,
        "limit": limit,
        "batches": list(BATCHES),
        "platform": jax.default_backend(),
    }


def about(model: Model) -> dict[str, Any]:
    """What a user of the sampler has to know, as plain JSON: conventions, labels, latents, precision, origin, versions."""
    config, classes = model.config, model.config.num_classes
    return {
        "conventions": NATIVE.conventions,
        "noise": f"e: (B, {', '.join(map(str, model.shape))}) float32, standard normal, drawn by the caller",
        "images": _images(model),
        "labels": {
            "classes": classes,
            "null": classes or None,
            "rule": f"(B,) int32 in 0 .. {classes - 1}, or {classes} for no class; others are not checked"
            if classes
            else "(B,) int32, not read: the model has no classes",
        },
        "latent": _latent(model),
        "sampler": model.sampler,
        "dtype": {
            "weights": "float32",
            "compute": config.compute_dtype,
            "images": "float32",
            "matmul_precision": "highest",
        },
        "ema": files.which(model.stored, model.ema),
        "image_shape": list(model.shape),
        "network": model.stored["config"]["network"],
        "origin": _origin(model),
        "versions": {
            name: version(name) for name in ("jax", "jaxlib", "flax", "numpy", "safetensors")
        },
    }


def evaluations(model: Model, steps: int) -> int:
    """Evaluations of the network per sample."""
    return steps * sampling.evaluations(model.sampler)


def sha256(content: bytes) -> str:
    """Of an artifact, for its entry in the metadata."""
    return hashlib.sha256(content).hexdigest()


def _images(model: Model) -> str:
    if _latent(model):
        return "x: shaped as e, float32, scaled latents; not clipped"
    return "x: shaped as e, float32, in about [-1, 1], not clipped; bytes are clip(round(127.5 (x + 1)), 0, 255)"


def _latent(model: Model) -> dict[str, Any] | None:
    """How samples become images where they are latents; None where they are images."""
    data = model.stored.get("data") or {}
    if "scale" not in data and model.config.data.name != latents.NAME and model.shape[-1] in (1, 3):
        return None
    vae = data.get("vae") or {}
    return {
        "scale": data.get("scale"),
        "shift": 0.0,
        "rule": "image = decode(x / scale + shift)",
        "decoder": "not included: it is the caller's, the one that made the training latents",
        "decoder_file": vae.get("file"),
        "decoder_sha256": vae.get("sha256"),
        "note": ""
        if "scale" in data
        else "the scale was not recorded; Stable Diffusion's first autoencoder has 0.18215",
    }


def _origin(model: Model) -> dict[str, Any]:
    """Where the weights come from; no path of the machine that made them."""
    source = model.stored.get("source") or {}
    converted = (
        {"kind": source["kind"], **source["source"], "licence": source["licence"]}
        if source
        else None
    )
    trained = None
    if not pretrained.is_converted(model.stored):
        trained = {
            "step": int(model.folder.name) if model.folder.name.isdigit() else None,
            "data": model.config.data.name,
        }
    manifest = (model.folder / checkpoint.MANIFEST).read_bytes()
    return {
        "trained": trained,
        "converted_from": converted,
        "checkpoint_manifest_sha256": sha256(manifest),
    }
