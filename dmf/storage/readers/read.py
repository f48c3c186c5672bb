"""Weight files as a tree of tensors, read lazily; nothing that a file contains is executed.

Its content tells the format of a file:
- safetensors
- torch.save, as zip archive or older stream
- a pickle of a network, such as those of EDM and ECT
- a Flax msgpack checkpoint
Opening reads no tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dmf.errors import DmfError, printable
from dmf.storage import manifest, paths
from dmf.storage.readers import flaxfile, torchfile
from dmf.storage.readers.orbaxfile import read_orbax
from dmf.storage.readers.span import Span, short, whole
from dmf.storage.readers.tree import DTYPES, Tensor, pairs, tensor
from dmf.storage.readers.tree import Inert as Inert
from dmf.storage.readers.tree import flatten as flatten
from dmf.storage.readers.tree import module_tensors as module_tensors
from dmf.storage.readers.tree import strip_prefix as strip_prefix

sha256 = manifest.sha256_of_weights
SAFETENSORS = {
    code: DTYPES[name]
    for code, name in pairs("""BOOL:bool U8:uint8 I8:int8 U16:uint16 I16:int16 U32:uint32 I32:int32
        U64:uint64 I64:int64 F16:float16 BF16:bfloat16 F32:float32 F64:float64
        F8_E4M3:float8_e4m3fn F8_E5M2:float8_e5m2""")
}
LOOKS = (
    (rb"version https://git-lfs", "a git-lfs pointer, not the file itself (run `git lfs pull`)"),
    (rb"\s*<", "an HTML or XML page, such as a login, a notice of a download limit or an error"),
    (rb"\s*[{\[]", "a JSON text, such as the index of a model in several files"),
    (
        rb"\x1f\x8b|BZh|\xfd7zX|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!",
        "a compressed archive (unpack it first)",
    ),
    (rb"(?s).{257}ustar", "a tar archive (unpack it first)"),
    (rb"model_checkpoint_path:", "the text beside a TensorFlow checkpoint"),
)
ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".msgpack")
EXPECTED = "safetensors, a file or a pickled network of PyTorch, or a Flax msgpack checkpoint"


@dataclass(frozen=True)
class Weights:
    """A weight file.

    format: "safetensors", "torch zip", "torch legacy", "pickle", "flax msgpack" or "orbax".
    tree: nested dicts; a list or tuple is a dict with the keys 0, 1, ... Leaves are `Tensor`,
        numbers, text, None, bytes, frozensets, and `Inert` for objects of classes not ours.
    metadata: the texts of a safetensors file's `__metadata__`; else empty.
    """

    path: Path
    format: str
    tree: Any
    metadata: dict[str, str] = field(default_factory=dict)
    more: tuple[Path, ...] = ()  # the other files of `open_files`

    @property
    def file(self) -> str:
        """The file's name, or all names with commas."""
        return ", ".join(path.name for path in (self.path, *self.more))

    def sha256(self) -> str:
        """The SHA-256 of the file, or one made of those of all files, in any order."""
        found = sorted(sha256(path) for path in (self.path, *self.more))
        return hashlib.sha256("".join(found).encode()).hexdigest() if self.more else found[0]


class Several(dict[str, Any]):
    """The trees of several files, by their places."""


def open_files(source: str | Path) -> Weights:
    """The weight files of a list with commas, or the one at `source`, see `open_file`.

    The tree of several is a `Several`. Raises DmfError.
    """
    names = [str(source)] if os.path.exists(source) else str(source).split(",")
    first, *more = (open_file(paths.expanded(name)) for name in names)
    if not more:
        return first
    opened = [first, *more]
    tree = Several({str(weights.path): weights.tree for weights in opened})
    formats = ", ".join(dict.fromkeys(weights.format for weights in opened))
    return Weights(first.path, formats, tree, more=tuple(weights.path for weights in more))


def open_file(path: str | Path) -> Weights:
    """The weight file at `path`, the one in that folder, or Orbax's directory.

    The first bytes tell the format. Raises DmfError for any other file and for a damaged one.
    """
    if (tree := read_orbax(Path(path))) is not None:
        return Weights(Path(path), "orbax", tree)
    place = _one_of(Path(path)) if os.path.isdir(path) else Path(path)
    span = whole(place)
    with span.opened() as stream:
        head = stream.read(512)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return Weights(place, "torch zip", torchfile.read_zip(span))
    if head[8:9] == b"{" and head[5:8] == b"\0\0\0":  # a length in 8 bytes, then JSON
        return Weights(place, "safetensors", *_read_safetensors(span))
    looks = [text for pattern, text in LOOKS if re.match(pattern, head)]
    if looks:
        raise span.error(f"looks like {looks[0]}", EXPECTED)
    if head[0] == 0x80:  # the first opcode of a pickle
        return Weights(place, *torchfile.read_pickle(span))
    if 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):  # a map of msgpack
        return Weights(place, "flax msgpack", flaxfile.read_msgpack(span))
    raise span.error(f"begins with {head[:8].hex(' ')}", EXPECTED)


def _one_of(folder: Path) -> Path:
    """The one weight file in a folder. Raises DmfError where there is none or a choice."""
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise DmfError(f"{folder}: cannot be read ({short(error)}); expected a folder") from error
    found = [name for name in names if name.endswith(ENDINGS)]
    if len(found) != 1:
        some = ", ".join(map(short, (found or names)[:8])) or "nothing"
        what = f"is a directory with {len(found) or 'no'} weight files; it holds {some}"
        raise Span(str(folder), (), 0, 0).error(what, f"one file that ends in {', '.join(ENDINGS)}")
    print(printable(f"source    {folder / found[0]}, the one weight file in the folder"))
    return folder / found[0]


def _read_safetensors(span: Span) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata). The library checks the header; NumPy has not all its types of values."""
    try:
        safe_open(span.path, framework="numpy").__exit__(None, None, None)
    except (SafetensorError, OSError, ValueError) as error:
        why = short(str(error).removeprefix("Error while deserializing header: "))
        raise span.error(f"is no whole safetensors file ({why})") from error
    with span.opened() as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    metadata, found = header.pop("__metadata__", {}), {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if (code := entry["dtype"]) not in SAFETENSORS:
            raise span.error(f"{short(name)} is of type {code}", ", ".join(SAFETENSORS))
        part = span.part(8 + size + start, end - start, name)
        found[name] = tensor(part, SAFETENSORS[code], entry["shape"])
    return found, metadata
