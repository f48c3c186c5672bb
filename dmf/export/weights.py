"""Our checkpoints as files of named tensors for PyTorch.

The key maps of `dmf.convert` run backwards, so a converted file comes back as it was.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from dmf import networks, pretrained
from dmf.convert import audit, direction, native
from dmf.convert.kind import Kind
from dmf.convert.kinds import kind_of
from dmf.convert.leaves import flat, leaf_shapes
from dmf.errors import DmfError
from dmf.export import tensorfile
from dmf.export.tensorfile import FORMATS


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
    _, stored, network, params, _ = pretrained.open_weights(path, ema)
    config, shape = pretrained.described(stored)
    layout = kind_of(kind or _origin(stored, config))
    way = direction.of_source(layout, stored.get("source"))
    tensors, interval = _tensors(layout, way, config, shape, (network, params))
    licence = (stored.get("source") or {}).get("licence", "your own")
    words = pretrained.which(stored, ema)
    layout = layout._replace(conventions=layout.conventions + direction.note(way))
    about = tensorfile.describe(config, shape, layout, licence, words, interval)
    tensorfile.write(target, tensors, about)
    count = sum(x.size for x in tensors.values())
    print(f"exported  {target}: {len(tensors)} tensors, {count:,} values, layout {layout.name}")
    return tensors


def _origin(stored: dict[str, Any], config: Any) -> str:
    """The layout that the weights came in, if it still fits the network; else our own."""
    source = stored.get("source")
    if not source:
        return native.NATIVE.name
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    same = all(now.get(k) == v for k, v in source["network"].items() if k not in networks.FREE)
    return source["kind"] if same else native.NATIVE.name


def _tensors(
    kind: Kind,
    way: direction.Direction | None,
    config: Any,
    shape: tuple[int, ...],
    loaded: tuple[Any, Any],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors by name, and the names that the source's layout lacks. Raises DmfError."""
    network, params = loaded
    if kind.network not in (config.kind, ""):
        raise DmfError(
            f"kind = {kind.name}: the layout of a {kind.network}, this is a {config.kind}; "
            "expected kind = dmf"
        )
    rules = direction.turned(kind.rules(config, shape, None), config, way)
    if {leaf for rule in rules for leaf in rule.leaves} != set(leaf_shapes(network)):
        raise DmfError(
            f"kind = {kind.name}: has no layout for this {config.kind}; "
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
