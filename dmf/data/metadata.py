"""What an encoded split says of itself: metadata.json, its checks and its seal."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dmf.errors import DmfError

FORMAT = 1
PLAN, METADATA, LABELS = "plan.json", "metadata.json", "labels.npy"
DTYPES = {"float32": "<f4", "float16": "<f2"}
HOW = "what `--mode=encode` has written to its end; the same command goes on where it stopped"


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


# Key -> (what is expected, whether a value is that).
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "count": ("a whole number above 0", lambda x: _whole(x, 1)),
    "num_classes": ("a whole number, 0 or more", lambda x: _whole(x, 0)),
    "latent_shape": (
        "three whole numbers above 0",
        lambda x: len(x) == 3 and all(_whole(n, 1) for n in x),
    ),
    "dtype": (f"one of {', '.join(DTYPES)}", lambda x: x in DTYPES),
    "scale": (
        "a finite number above 0",
        lambda x: type(x) in (int, float) and math.isfinite(x) and x > 0,
    ),
    "shard_size": ("a whole number above 0", lambda x: _whole(x, 1)),
    "shards": (
        "a list of files",
        lambda x: type(x) is list and all(_is_file_entry(f) and _whole(f["count"], 1) for f in x),
    ),
    "labels": (f"the file {LABELS}", lambda x: _is_file_entry(x) and x["name"] == LABELS),
    "source": ("what was encoded", lambda x: type(x) is dict),
    "vae": ("what has encoded it", lambda x: type(x) is dict),
    "seal": ("a SHA-256", lambda x: type(x) is str),
}
# Like FIELDS, of keys that files may lack.
OPTIONAL: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "classes": ("a list of names", lambda x: type(x) is list and all(type(n) is str for n in x)),
    "shift": ("a finite number", lambda x: type(x) in (int, float) and math.isfinite(x)),
}


def _is_file_entry(entry: Any) -> bool:
    return type(entry["name"]) is type(entry["sha256"]) is str and _whole(entry["bytes"], 0)


def name(shard: int, shards: int) -> str:
    """File name of a shard."""
    return f"latents-{shard:05}-of-{shards:05}.array_record"


def metadata(folder: Path) -> dict[str, Any]:
    """The metadata of an encoded split, without the seal.

    Raises DmfError where they are missing, damaged or of another version.
    """
    path = folder / METADATA
    try:
        if not path.is_file():
            what = (
                "is not encoded to its end"
                if (folder / PLAN).is_file()
                else "holds no encoded images"
            )
            raise DmfError(f"{folder} {what} (no {METADATA}): expected {HOW}")
        found = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise DmfError(
                f"{path}: format is {found['format']!r}, expected {FORMAT}, the format of this "
                "version"
            )
        missing = [name for name in FIELDS if name not in found]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing")
        unsealed = {k: v for k, v in found.items() if k != "seal"}
        if found["seal"] != seal_of(unsealed):
            raise ValueError("its bytes were altered")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DmfError(
            f"{path} cannot be read ({type(error).__name__}: {error}): expected {HOW}"
        ) from error
    _check_fields(path, found)
    return unsealed


def _check_fields(path: Path, found: dict[str, Any]) -> None:
    """Raises DmfError for a value that `FIELDS` or `OPTIONAL` does not allow."""
    known = FIELDS | {key: rule for key, rule in OPTIONAL.items() if key in found}
    for key, (expected, good) in known.items():
        try:
            fine = good(found[key])
        except (TypeError, KeyError):
            fine = False
        if not fine:
            raise DmfError(f"{path}: {key} is {found[key]!r:.100}, expected {expected}")
    size, count = found["shard_size"], found["count"]
    total = -(-count // size)
    if len(found["shards"]) != total:  # before a list of as many is made
        raise DmfError(
            f"{path}: {len(found['shards'])} shards, expected {total} of {size} images for count "
            f"{count}"
        )
    for k, entry in enumerate(found["shards"]):
        wanted = {"name": name(k, total), "count": min(size, count - k * size)}
        if {key: entry[key] for key in wanted} != wanted:
            raise DmfError(
                f"{path}: shard {k} is {entry['name']!r:.100} of {entry['count']} images, expected "
                f"{wanted}"
            )


def files(about: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
    """(name, bytes, SHA-256) of every file that the metadata list."""
    for entry in (about["labels"], *about["shards"]):
        yield entry["name"], entry["bytes"], entry["sha256"]


def sealed(entry: dict[str, Any]) -> dict[str, Any]:
    """Plain values with their own SHA-256, which shows an alteration."""
    return {**entry, "seal": seal_of(entry)}


def seal_of(entry: dict[str, Any]) -> str:
    """The SHA-256 of an entry's values, which `sealed` stores with them."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
