"""A file of named tensors for PyTorch: its metadata, and how it is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from dmf.convert import native
from dmf.convert.kind import Kind, Shape
from dmf.errors import DmfError
from dmf.storage import atomic
from dmf.storage.readers import read

FORMATS = (".safetensors", ".pt")
INTERVAL = (
    "{} are no part of the source's layout: they are fed h = t - r, with t = 1 noise, "
    "and the network then gives the average velocity u(z, r, t) in the source's time and sign"
)


def describe(
    config: Any, shape: Shape, kind: Kind, licence: str, which: str, interval: list[str]
) -> dict[str, Any]:
    """The metadata of a file of weights.

    - config, shape: of the network and its images.
    - kind: the layout of the file.
    - which: which of a checkpoint's weights these are, in words.
    - interval: the tensors that the layout's source lacks.
    """
    return {
        "network": dataclasses.asdict(config),
        "image_shape": list(shape),
        "kind": kind.name,
        "conventions": kind.conventions,
        "interval": INTERVAL.format(", ".join(interval)) if interval else "",
        "licence": licence,
        "weights": which,
    }


def write(target: Path, tensors: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Writes the file beside its place, reads it back, and moves it there.

    about: for its metadata. Raises DmfError.
    """
    for name, x in tensors.items():
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            raise DmfError(f"tensor {name} is not finite in {x.dtype}: expected finite weights")
    metadata = {native.METADATA: json.dumps(about), "format": "pt"}
    try:
        with atomic.made(target) as partial:
            if target.suffix == ".pt":
                _write_torch(partial, tensors)
            else:
                safetensors.numpy.save_file(tensors, partial, metadata)
            _check_written(target, partial, tensors)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise DmfError(
            f"{target} could not be written: {error}; expected a writable directory with room"
        ) from error


def _check_written(target: Path, partial: Path, tensors: dict[str, np.ndarray]) -> None:
    found = read.flatten(read.open_file(partial).tree)
    if set(found) != set(tensors):
        raise DmfError(
            f"{target}: other tensors were read back than written; expected a working disk"
        )
    for name, x in tensors.items():
        if not np.array_equal(found[name].read(), x):
            raise DmfError(
                f"{target}: tensor {name} was read back with other values; expected a working disk"
            )


def _write_torch(path: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        import torch
    except ImportError as error:
        raise DmfError(
            "a .pt file needs PyTorch, which is not installed; expected --out=FILE.safetensors"
        ) from error
    torch.save({name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}, path)
