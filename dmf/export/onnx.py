"""The sampler as an ONNX file, with weights and metadata inside.

Before it leaves, it is compared with the checkpoint's own sampler, in onnxruntime.

- Inputs: e (B, H, W, C) float32, and labels (B,) int32.
- Output: images. B is free.
- It computes in float32, for onnxruntime has no bfloat16 on a CPU.

jax2onnx, onnx and onnxruntime are an optional extra: requirements-onnx.txt.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmf import networks
from dmf.errors import DmfError, short
from dmf.export import place, sampler
from dmf.export.model import Model, open_model
from dmf.export.model import about as told

METADATA = "dmf"  # key of the file's metadata: JSON, as in a model folder's config.json
LARGEST = 2**31 - 2**20  # bytes of a protocol buffer, less some for the graph
MISSING = (
    "an .onnx file needs {}, which is not installed; "
    "expected pip install --no-deps -r requirements-onnx.txt"
)


def export(
    path: str | Path, out: str | Path, *, steps: int = 1, ema: float | None = None, name: str = ""
) -> dict[str, Any]:
    """Writes the sampler of a checkpoint as the file `out`; returns its metadata.

    name: of the sampler; "" takes the run's sampler.

    Raises DmfError, and then leaves no file behind, where

    - the extra is missing, or cannot do this network;
    - the sampler is not few_step;
    - the weights do not fit into one file;
    - onnxruntime's images differ from the checkpoint's.
    """
    target = Path(out)
    jax2onnx, onnx, runtime = _extra()
    place.check_free(target)
    model = open_model(path, ema, name)
    if model.sampler != "few_step":
        raise DmfError(
            f"sampler = {model.sampler!r}: "
            "expected few_step for an .onnx file, by --sampler=few_step"
        )
    bytes_of_weights = sum(x.nbytes for x in jax.tree.leaves(model.params))
    if bytes_of_weights > LARGEST:
        raise DmfError(
            f"{target}: {bytes_of_weights:,} bytes of weights; "
            f"expected at most {LARGEST:,}, all that ONNX has room for"
        )
    model = replace(model, config=replace(model.config, compute_dtype="float32"))
    model = replace(model, network=networks.build(model.config.network, model.shape))
    with _at_work(target):
        content = _convert(jax2onnx, onnx, model, steps)
    with place.made_whole(target) as partial:
        partial.write_bytes(content.SerializeToString())
        with _at_work(target):
            run = _session(runtime, partial)
        about = {
            **told(model),
            "steps": steps,
            "nfe": sampler.evaluations(model, steps),
            "opset": content.opset_import[0].version,
            "check": sampler.check(model, steps, run, f"{target} in onnxruntime"),
        }
        about["versions"] |= {p.__name__: p.__version__ for p in (onnx, runtime)}
        onnx.helper.set_model_props(content, {METADATA: json.dumps(about)})
        partial.write_bytes(content.SerializeToString())
    off = f"{about['check']['relative_l2']:.1e} (relative L2) off"
    print(
        f"exported  {target}: ONNX, opset {about['opset']}, {steps} step(s); onnxruntime is {off}"
    )
    return about


def _extra() -> tuple[Any, Any, Any]:
    """The three packages."""
    try:
        import jax2onnx
        import onnx
        import onnxruntime
    except ImportError as error:
        raise DmfError(MISSING.format(error.name)) from error
    return jax2onnx, onnx, onnxruntime


def _convert(jax2onnx: Any, onnx: Any, model: Model, steps: int) -> Any:
    """The ONNX model, checked by ONNX's own rules."""
    e = jax.ShapeDtypeStruct(("B", *model.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct(("B",), jnp.int32)
    names = {"input_names": ["e", "labels"], "output_names": ["images"]}
    found = jax2onnx.to_onnx(_unrolled(model, steps), [e, labels], model_name="sampler", **names)
    _share(found.graph)
    onnx.checker.check_model(found)
    return found


def _share(graph: Any) -> None:
    """Stores equal constants once; before, every step has a copy of each weight."""
    kept: dict[tuple[Any, ...], str] = {}
    names: dict[str, str] = {}
    for x in list(graph.initializer):
        same = (tuple(x.dims), x.data_type, x.raw_data)
        if x.raw_data and kept.setdefault(same, x.name) != x.name:
            names[x.name] = kept[same]
            graph.initializer.remove(x)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def _unrolled(model: Model, steps: int) -> Callable[[Any, Any], Any]:
    """`dmf.method.samplers.few_step` without its loop, for a loop of ONNX takes no labels.

    z <- z - (t - r) u(z, r, t)
    """

    def images(e: Any, labels: Any) -> Any:
        u, z, rows = sampler.velocity(model, model.params, labels), e, e.shape[:1]
        for i in range(steps):
            t, r = (np.float32(1) - np.float32(j) / np.float32(steps) for j in (i, i + 1))
            z = z - (t - r) * u(z, jnp.broadcast_to(r, rows), jnp.broadcast_to(t, rows))
        return z

    return images


def _session(runtime: Any, file: Path) -> Callable[[Any, Any], Any]:
    """found(e, labels) -> images, in onnxruntime on the CPU."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # else it warns of each unused constant
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    inputs = {node.name for node in session.get_inputs()}

    def found(e: Any, labels: Any) -> Any:
        fed = {k: x for k, x in {"e": e, "labels": labels}.items() if k in inputs}
        return session.run(None, fed)[0]

    return found


@contextmanager
def _at_work(target: Path) -> Iterator[None]:
    """Turns errors of the three packages into one line, and silences the log of jax2onnx."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    except Exception as error:  # their errors share no base
        raise DmfError(
            f"{target}: jax2onnx, onnx or onnxruntime cannot do this network ({short(error)}); "
            "expected a model folder"
        ) from error
    finally:
        logging.disable(level)
