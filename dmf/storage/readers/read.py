"""Weight files as a tree of tensors, read lazily and without executing anything they contain.

A file's format is told by its content: safetensors; torch.save, as zip archive or as the older stream; a pickle of a network
as EDM and ECT store it; a Flax msgpack checkpoint. Opening reads names and shapes alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dmf.storage import checkpoint
from dmf.storage.readers import flaxfile, torchfile
from dmf.storage.readers.span import DTYPES, File, Span, packed, refusal, short
from dmf.storage.readers.tree import Inert, Tensor, flatten, module_tensors, strip_prefix

__all__ = [
    "Inert",
    "Tensor",
    "Weights",
    "flatten",
    "module_tensors",
    "open_file",
    "sha256",
    "strip_prefix",
]

ORBAX = "_METADATA"  # in the folder of one tree of Orbax's
STEP = "_CHECKPOINT_METADATA"  # in the folder that Orbax reads, which holds one tree or several
MAX_HEADER = 2**24  # bytes of JSON
SAFETENSORS = {
    **{
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "U16": "uint16",
        "I16": "int16",
        "U32": "uint32",
        "I32": "int32",
    },
    **{
        "U64": "uint64",
        "I64": "int64",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "F64": "float64",
    },
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}
LOOKS = (
    (rb"version https://git-lfs", "a git-lfs pointer, not the file itself (run `git lfs pull`)"),
    (rb"\s*<", "an HTML or XML page, such as a login, a notice of a download limit or an error"),
    (rb"\s*[{\[]", "a JSON text, such as the index of a model in several files"),
    (
        rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!",
        "a compressed archive (unpack it first)",
    ),
    (rb"(?s).{257}ustar", "a tar archive (unpack it first)"),
    (rb"model_checkpoint_path:", "the text beside a TensorFlow checkpoint"),
)
EXPECTED = "safetensors, a PyTorch .pt, .pth, .bin or .ckpt, a pickled network, or a Flax msgpack checkpoint"


@dataclass(frozen=True)
class Weights:
    """A weight file.

    format: "safetensors", "torch zip", "torch legacy", "pickle", "flax msgpack" or "orbax".
    tree: nested dicts with `Tensor` leaves, numbers, text, None, bytes, frozensets, and `Inert` for objects of foreign
        classes; lists and tuples are dicts with the keys 0, 1, ... Opening does not read the tensors.
    metadata: the texts of a safetensors file's `__metadata__`; else empty.
    """

    path: Path
    format: str
    tree: Any
    metadata: dict[str, str] = field(default_factory=dict)


def open_file(path: str | Path) -> Weights:
    """The weight file at `path`, told by its content; raises DmfError, in one line, for whatever is none or is damaged.

    An Orbax directory, as newer Flax trainers write it, is read like a file.
    """
    for folder in (
        Path(path).absolute(),
        Path(path).absolute() / "default",
    ):  # the latter within a CheckpointManager's step
        if os.path.isfile(folder / ORBAX):
            apart = not os.path.isfile(folder / STEP) and os.path.isfile(folder.parent / STEP)
            where = (folder.parent, folder.name) if apart else (folder, "AUTO")
            return Weights(Path(path), "orbax", _read_orbax(where, checkpoint.foreign(*where)))
    file = File.at(path)
    whole, place = file.whole(), Path(path)
    with file.opened() as stream:
        head = stream.read(512)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return Weights(place, "torch zip", torchfile.read_zip(whole))
    if head[8:9] == b"{" and head[5:8] == b"\0\0\0":
        return Weights(place, "safetensors", *_read_safetensors(whole))
    looks = [text for pattern, text in LOOKS if re.match(pattern, head)]
    if looks:
        raise whole.error(f"looks like {looks[0]}; expected {EXPECTED}")
    if head[0] == 0x80:
        return Weights(place, *torchfile.read_pickle(whole))
    if 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):
        return Weights(place, "flax msgpack", flaxfile.read_msgpack(whole))
    raise whole.error(f"begins with {head[:8].hex(' ')}; expected {EXPECTED}")


def sha256(path: str | Path) -> str:
    """The file's SHA-256 in hexadecimal digits; of a directory, that of the names and digests of its files."""
    try:
        if Path(path).is_dir():
            names = sorted(
                p.relative_to(path).as_posix() for p in Path(path).rglob("*") if p.is_file()
            )
            lines = [f"{sha256(Path(path) / name)}  {name}\n" for name in names]
            return hashlib.sha256("".join(lines).encode()).hexdigest()
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise refusal(path, f"cannot be read ({short(error)}); expected a readable file") from error


def _read_orbax(where: tuple[Path, str], node: Any, keys: tuple[str, ...] = ()) -> Any:
    """The tree of an Orbax directory; of a list, which only optimisers have, its being there."""
    if isinstance(node, Mapping):
        return {
            name: _read_orbax(where, below, (*keys, name))
            for name, below in node.items()
            if below is not None
        }
    if not hasattr(node, "shape") or not hasattr(node, "dtype"):
        return node if isinstance(node, int | float | str) else Inert(type(node).__name__, {})
    shape, dtype = tuple(node.shape), np.dtype(node.dtype)
    return Tensor(shape, dtype, functools.partial(checkpoint.read_leaf, *where, keys, shape, dtype))


def _read_safetensors(whole: Span) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata): a length, that many bytes of JSON, then the tensors side by side."""
    with whole.cursor() as cursor:
        if (size := cursor.number("<Q")) > MAX_HEADER:
            raise whole.error(f"its header takes {size} bytes; expected at most {MAX_HEADER}")
        try:
            header = json.loads(cursor.text(size), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise whole.error(
                f"its header is no JSON ({short(error)}); expected that of a safetensors file"
            ) from error
        data = cursor.skip(cursor.left, "its data")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(text, str) for text in metadata.values()
    ):
        raise whole.error("its __metadata__ is no map of texts; expected a safetensors file")
    return _tensors(data, header), metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is used twice")
    return found


def _tensors(data: Span, header: Mapping[str, Any]) -> dict[str, Tensor]:
    found, ends = {}, []
    for name, entry in header.items():
        match entry:
            case {
                "dtype": str() as code,
                "shape": list() as shape,
                "data_offsets": [int() as start, int() as end],
            } if code in SAFETENSORS:
                found[name] = packed(
                    data.part(start, end - start, name), DTYPES[SAFETENSORS[code]], shape
                )
                ends.append((start, end))
            case _:
                raise data.error(
                    f"tensor {short(name)} in no known form; expected its dtype, shape and data_offsets"
                )
    end = 0
    for start, stop in sorted(ends):
        if start != end:
            raise data.error(
                f"a tensor starts at byte {start}, where {end} is expected: side by side, no gap, no overlap"
            )
        end = stop
    if end != data.size:
        raise data.error(f"its tensors take {end} of {data.size} bytes; expected all of them")
    return found
