"""Our checkpoints as files of named tensors for PyTorch.

The key maps of `dmf.convert` run backwards, so a converted file comes back as it was.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from dmf import networks, pretrained
from dmf.convert import audit, native
from dmf.convert.kinds import KINDS, kind_of
from dmf.convert.leaves import flat, leaf_shapes
from dmf.errors import DmfError
from dmf.export.model import which
from dmf.storage import atomic
from dmf.storage.readers import read

FORMATS = (".safetensors", ".pt")
INTERVAL = (
    "{} are no part of the source's layout: they are fed h = t - r, with t = 1 noise, "
    "and the network then gives the average velocity u(z, r, t) in the source's time and sign"
)


def export(
    path: str | Path, out: str | Path, *, kind: str = "", ema: float | None = None
) -> dict[str, np.ndarray]:
    """Writes the weights of a checkpoint as a new file; returns its tensors by name.

    - path, ema: the checkpoint and its average, as for `pretrained.load`.
    - out: a .safetensors file, whose metadata say what it holds.
      Or a .pt file, which is a plain state dict and needs PyTorch.
    - kind: layout and conventions of the file, a key of KINDS.
      "" takes the layout that the weights came in, else our own, "dmf".

    Raises DmfError for any bad input; it then leaves no file behind.
    """
    target = Path(out)
    _check_target(target)
    folder, stored = pretrained.open_folder(path)
    config, shape = pretrained.described(stored)
    kind = kind_of(kind or _origin(stored, config)).name
    tensors, interval = _tensors(kind, config, shape, pretrained.load_folder(folder, stored, ema))
    write(target, tensors, describe(stored, kind, interval, ema))
    count = sum(x.size for x in tensors.values())
    print(f"exported  {target}: {len(tensors)} tensors, {count:,} values, layout {kind}")
    return tensors


def describe(
    stored: dict[str, Any], kind: str, interval: list[str], ema: float | None
) -> dict[str, Any]:
    """The metadata of a file of weights. interval: tensors that the source's layout lacks."""
    config, shape = pretrained.described(stored)
    return {
        "network": dataclasses.asdict(config),
        "image_shape": list(shape),
        "kind": kind,
        "conventions": KINDS[kind].conventions,
        "interval": INTERVAL.format(", ".join(interval)) if interval else "",
        "licence": (stored.get("source") or {}).get("licence", "your own"),
        "weights": which(stored, ema),
    }


def _origin(stored: dict[str, Any], config: Any) -> str:
    """The layout that the weights came in, if it still fits the network; else our own."""
    source = stored.get("source")
    if not source:
        return native.NATIVE.name
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    same = all(now.get(k) == v for k, v in source["network"].items() if k not in networks.FREE)
    return source["kind"] if same else native.NATIVE.name


def _tensors(
    kind: str, config: Any, shape: tuple[int, ...], loaded: tuple[Any, Any]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors by name, and the names that the source's layout lacks. Raises DmfError."""
    network, params = loaded
    wanted = KINDS[kind].network
    if wanted not in (config.kind, ""):
        raise DmfError(
            f"kind = {kind}: the layout of a {wanted}, this is a {config.kind}; expected kind = dmf"
        )
    rules = KINDS[kind].rules(config, shape, None)
    if {leaf for rule in rules for leaf in rule.leaves} != set(leaf_shapes(network)):
        raise DmfError(
            f"kind = {kind}: has no layout for this {config.kind}; "
            "expected kind = dmf, or the kind of its source"
        )
    tensors = audit.write(rules, {name: np.asarray(x) for name, x in flat(params).items()})
    extra = [name for rule in rules if rule.missing and rule.leaves for name in rule.tensors]
    return tensors, [name for name in extra if name in tensors]


def _check_target(target: Path) -> None:
    if target.suffix not in FORMATS or not target.parent.is_dir():
        raise DmfError(
            f"{target}: expected a file name ending in {' or '.join(FORMATS)}, "
            "in a directory that exists"
        )
    if target.exists():
        raise DmfError(f"{target} is there already: expected a new file; nothing is overwritten")


def write(target: Path, tensors: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Writes the file beside its place, reads it back, and moves it there.

    about: for its metadata. Raises DmfError.
    """
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
