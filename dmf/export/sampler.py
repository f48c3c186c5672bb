"""The sampler of a checkpoint as a function of arrays alone, and as an artifact of `jax.export`.

    images = sampler(weights, e, labels)        one step: x = e - u(e, 0, 1)

| argument | what it is |
|---|---|
| weights | {name: array}, the tensors of a file in the layout of kind "dmf" |
| e | (B, H, W, C) float32, standard normal noise |
| labels | (B,) int32, not read where the model has no classes |

B is free, and the number of steps is fixed. One artifact serves CPU, CUDA and TPU.
It holds no weights, and needs none of this code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from dmf.convert.leaves import nested
from dmf.convert.rules import relative_l2
from dmf.errors import DmfError
from dmf.method.guidance import condition_of
from dmf.method.samplers import SAMPLERS

if TYPE_CHECKING:
    from dmf.export.model import Model

Weights = Mapping[str, Any]
PLATFORMS = ("cpu", "cuda", "tpu")
# An option of jax: what to cut off the names of source files, which a program holds.
SOURCE_NAMES = "jax_hlo_source_file_canonicalization_regex"
BATCHES = (1, 7)  # at which an artifact is compared with the sampler before it leaves
# Relative L2. Half precision rounds by the order in which XLA sums.
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}


def velocity(model: Model, params: Any, labels: Any) -> Callable[[Any, Any, Any], Any]:
    """u(z, r, t) of the model; it ignores the labels if the model has no classes.

    A network that is told its guidance is told the config's.
    """
    condition = condition_of(model.config.network, labels, model.config.guidance)
    return lambda z, r, t: model.network.apply(params, z, r, t, condition=condition)


def function(model: Model, steps: int) -> Callable[[Weights, Any, Any], Any]:
    """sampler(weights, e, labels) -> images of the shape of e, traced as `sampling.Sampler`.

    Raises DmfError for a sampler that loops on the host, which no program can hold. The same for
    one with fresh noise, which the caller of an artifact does not give.
    """
    row = SAMPLERS[model.sampler]
    if row.on_host or row.fresh_noise:
        kept = {name for name, x in SAMPLERS.items() if not (x.on_host or x.fresh_noise)}
        inside = ", ".join(name for name in SAMPLERS if name in kept)
        what = "loops on the host, and a program cannot"
        if row.fresh_noise:
            what = "draws noise of its own, and a program gets none"
        raise DmfError(
            f"sampler = {model.sampler!r} {what}: expected one of {inside}, by --sampler"
        )
    rules = model.rules()

    @jax.default_matmul_precision("highest")
    def sampler(weights: Weights, e: jax.Array, labels: jax.Array) -> jax.Array:
        leaves = [rule.forward(*(weights[name] for name in rule.tensors)) for rule in rules]
        named = {
            name: x
            for rule, found in zip(rules, leaves, strict=True)
            for name, x in zip(rule.leaves, found, strict=True)
        }
        return SAMPLERS[model.sampler].draw(velocity(model, nested(named), labels), e, steps)

    return sampler


def artifact(model: Model, steps: int, weights: Weights) -> bytes:
    """The sampler as bytes for `jax.export.deserialize`, with a free batch size.

    weights: the tensors of the file. Only their names, shapes and dtypes reach the artifact.
    """
    (rows,) = jax.export.symbolic_shape("b")
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    e = jax.ShapeDtypeStruct((rows, *model.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    kept = jax.config.values[SOURCE_NAMES]
    jax.config.update(SOURCE_NAMES, ".*/")
    try:
        program = jax.jit(function(model, steps))
        exported = jax.export.export(program, platforms=PLATFORMS)(like, e, labels)
    finally:
        jax.config.update(SOURCE_NAMES, kept)
    return bytes(exported.serialize())


def call(stored: bytes) -> tuple[Callable[[Weights, Any, Any], Any], int]:
    """(sampler(weights, e, labels), its calling convention) of an artifact's bytes."""
    exported = jax.export.deserialize(bytearray(stored))
    return jax.jit(exported.call), exported.calling_convention_version


def check(model: Model, steps: int, found: Callable[[Any, Any], Any], what: str) -> dict[str, Any]:
    """Compares found(e, labels) with the checkpoint's own sampler, at the batch sizes BATCHES.

    The null label is among the labels. Returns the largest relative L2 and its limit.
    Raises DmfError above the limit. what: name of `found` for the message.
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
            f"{what} differs from the checkpoint's sampler by {worst:.1e}: "
            f"expected a relative L2 of at most {limit:g}"
        )
    return {
        "relative_l2": worst,
        "limit": limit,
        "batches": list(BATCHES),
        "platform": jax.default_backend(),
    }


def evaluations(model: Model, steps: int) -> int:
    """Evaluations of the network per sample."""
    return steps * SAMPLERS[model.sampler].evaluations
