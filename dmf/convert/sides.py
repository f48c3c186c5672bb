"""What the tensors of a file do not tell: where each such value comes from.

A value has one of four sources:

    file        the tensors, or a pickled wrapper around them
    side file   config.json beside the file, arguments stored in it, or its metadata
    given       --set
    assumed     the kind's own; only stored outputs or samples can tell

A side file that contradicts the value which is taken ends the conversion.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dmf.convert.direction import Direction
from dmf.convert.kind import ASSUMED, Fact, Kind, Shape, Tensors
from dmf.convert.native import METADATA
from dmf.errors import DmfError, printable
from dmf.storage import records
from dmf.storage.readers.read import Inert, Weights
from dmf.storage.readers.span import short

CONFIG = "config.json"
BESIDE = "the JSON that belongs to these weights, or no such file beside them"
LARGEST = 2**20  # bytes of a config.json that is read
ARGUMENTS = ("args", "hyper_parameters", "hparams", "config", "cfg")  # keys in a checkpoint


class Said(NamedTuple):
    """What a side file says of a fact. value: in our terms; raw: as it stands there."""

    fact: Fact
    where: str
    key: str
    raw: Any
    value: Any


def said(kind: Kind, weights: Weights) -> list[Said]:
    """What the side files of a weight file say of the facts of its kind. Raises DmfError."""
    found = []
    for where, entries in _places(kind, weights):
        for fact in kind.facts:
            for key, read in fact.side.items():
                if key not in entries:
                    continue
                raw = entries[key]
                try:
                    value = read(raw)
                except (TypeError, ValueError, AttributeError, OverflowError) as error:
                    raise DmfError(
                        f"{where}: {key} is {short(raw)}: expected a value for {fact.name}"
                    ) from error
                if value is not None:
                    found.append(Said(fact, where, key, raw, value))
    return found


def _places(kind: Kind, weights: Weights) -> list[tuple[str, Mapping[str, Any]]]:
    """(name of the place, its entries), those whose reading is cheap and safe."""
    if not any(fact.side for fact in kind.facts):
        return []
    tree = weights.tree if isinstance(weights.tree, Mapping) else {}
    stored = [(f"{name} in the file", tree.get(name)) for name in ARGUMENTS]
    fields = [(where, x.state if isinstance(x, Inert) else x) for where, x in stored]
    texts = {name: _of_text(text) for name, text in weights.metadata.items()}
    exported = texts.get(METADATA)
    inner = [texts.get("config"), exported.get("network") if isinstance(exported, dict) else None]
    everything = [
        (f"{CONFIG} beside the file", _config_json(weights.path)),
        *fields,
        ("the file's metadata", texts),
        *(("the file's metadata", entries) for entries in inner),
    ]
    return [(where, entries) for where, entries in everything if isinstance(entries, Mapping)]


def _of_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _config_json(file: Path) -> Any:
    """The config.json beside a weight file, or None. Raises DmfError for one that is no JSON."""
    path = file.parent / CONFIG
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return None
    except OSError as error:
        raise DmfError(f"{path} cannot be read ({error.strerror}); expected {BESIDE}") from error
    return records.read(path, records.ANY, BESIDE)


def adopted(told: list[Said], tensors: Tensors, given: Mapping[str, Any]) -> dict[str, Said]:
    """The facts that only a side file tells, by name; the first place counts."""
    found: dict[str, Said] = {}
    for row in told:
        fact = row.fact
        if fact.settable and fact.name not in given and not fact.told(tensors):
            found.setdefault(fact.name, row)
    return found


def rows(
    kind: Kind,
    config: Any,
    shape: Shape,
    tensors: Tensors,
    given: Mapping[str, Any],
    told: list[Said],
    direction: Direction | None,
) -> list[dict[str, Any]]:
    """Each value that names and shapes may not tell: name, value, source, and where or a note.

    Raises DmfError where a side file contradicts a value.
    """
    found = []
    for fact in kind.facts:
        value, mine = fact.value(config, shape), [row for row in told if row.fact is fact]
        source = {"source": "assumed", "note": fact.note}
        if fact.name in given:
            source = {"source": "given"}
        elif fact.told(tensors):
            source = {"source": "file"}
        elif mine and _same(mine[0].value, value):
            source = {"source": "side file", "where": f"{mine[0].where}: {mine[0].key}"}
        for row in mine:
            if not _same(row.value, value):
                raise DmfError(
                    f"{row.where}: {row.key} is {short(row.raw)}, but {fact.name} is "
                    f"{short(value)} ({_source(source)}): expected the same"
                )
        found.append({"name": fact.name, "value": value, **source})
    for name in ("time", "sign") if direction else ():
        assumed = {"source": "assumed", "note": ASSUMED}
        source = {"source": "given"} if name in given else assumed
        found.append({"name": name, "value": getattr(direction, name), **source})
    return found


def _same(a: Any, b: Any) -> bool:
    listed = isinstance(a, list | tuple) and isinstance(b, list | tuple)
    return list(a) == list(b) if listed else a == b


def show(found: list[dict[str, Any]]) -> None:
    """Prints the rows: the values with their sources, and those that are only assumed."""
    known = [f"{x['name']} = {x['value']} ({_source(x)})" for x in found if "note" not in x]
    if known:
        print(printable(f"values    {', '.join(known)}"))
    for note in dict.fromkeys(x["note"] for x in found if "note" in x):
        mine = [f"{x['name']} = {x['value']}" for x in found if x.get("note") == note]
        print(printable(f"assumed   {', '.join(mine)}: {note}"), flush=True)


def _source(row: Mapping[str, Any]) -> str:
    return row.get("where", row["source"])
