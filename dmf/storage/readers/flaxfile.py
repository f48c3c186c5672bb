"""Flax's msgpack checkpoints, read with the msgpack package. Arrays stay in the file."""

from __future__ import annotations

import math
import mmap
from typing import Any

import msgpack
import numpy as np

from dmf.storage.readers.span import MAX_PIECES, Span, short
from dmf.storage.readers.tree import DTYPES, Inert, Tensor, shape_of, tensor

ARRAY, SCALAR = 1, 3  # Flax's extension types; no network has complex numbers, type 2
CHUNKED = "__msgpack_chunked_array__"  # marks the map that stands for an array of over 1 GiB
MAX_ENTRIES = 10_000  # of one map or list: msgpack takes memory for as many as are announced
AHEAD = 100  # bytes by which an array is found again


def read_msgpack(whole: Span) -> Any:
    """The tree of flax.serialization: a map of maps with arrays."""
    with whole.opened() as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        walk, limits = _Walk(whole, mapped), {"max_array_len": MAX_ENTRIES}
        hooks = {"ext_hook": walk.array, "object_pairs_hook": walk.map, "list_hook": walk.row}
        try:
            return msgpack.unpackb(
                mapped, **hooks, **limits, max_map_len=MAX_ENTRIES, strict_map_key=False
            )
        except (msgpack.UnpackException, ValueError) as error:
            why = f"{type(error).__name__}: {short(error)}"
            raise whole.error(f"is no whole msgpack ({why})") from error


class _Walk:
    """What stands for the maps and arrays that msgpack meets, in the order of the file."""

    def __init__(self, whole: Span, mapped: mmap.mmap) -> None:
        self.whole, self.mapped, self.end, self.pieces = whole, mapped, 0, 0

    def row(self, values: list[Any]) -> Any:
        """A list, as a map."""
        return self.map(list(enumerate(values)))

    def map(self, pairs: list[tuple[Any, Any]]) -> Any:
        """A map, each name once; an array, if it is one in chunks."""
        self.pieces += 1 + len(pairs)
        if self.pieces > MAX_PIECES:
            raise self.whole.error(f"describes over {MAX_PIECES} pieces of data besides tensors")
        found: dict[Any, Any] = {}
        for key, value in pairs:
            if not isinstance(key, str | int) or key in found:
                raise self.whole.error(f"a map has the key {short(key)}", "names, each used once")
            raw = isinstance(value, bytes)
            found[key] = Inert("bytes", {"size": len(value)}) if raw else value
        return _joined(self.whole, found) if CHUNKED in found else found

    def array(self, kind: int, data: bytes) -> Any:
        """An array: its shape, the name of its type, and its bytes in row-major order."""
        if kind not in (ARRAY, SCALAR):
            raise self.whole.error(f"extension type {kind}", f"Flax's {ARRAY} and {SCALAR}")
        match msgpack.unpackb(data, max_array_len=MAX_ENTRIES):
            case [list() as shape, str() as name, bytes() as values] if name in DTYPES:
                # msgpack does not say where it is. Only names stand between arrays, so the next
                # place with these first bytes is this array.
                self.end = self.mapped.find(data[:AHEAD], self.end) + len(data)
                span = self.whole.part(self.end - len(values), len(values), f"array to {self.end}")
                found = tensor(span, DTYPES[name], shape)
                return found if kind == ARRAY else Inert("scalar", {})
        raise self.whole.error("an array in another form", f"a shape, one of {list(DTYPES)}, bytes")


def _joined(span: Span, found: dict[Any, Any]) -> Tensor:
    numbered = [x if isinstance(x := found.get(key), dict) else {} for key in ("shape", "chunks")]
    sizes, parts = ([part.get(str(i)) for i in range(len(part))] for part in numbered)
    shape, chunks = shape_of(span, sizes), [x for x in parts if isinstance(x, Tensor)]
    counts = [math.prod(chunk.shape) for chunk in chunks]
    same = len(chunks) == len(parts) and len({chunk.dtype for chunk in chunks}) == 1
    if not same or sum(counts) != math.prod(shape):
        raise span.error(f"an array in {len(parts)} chunks that do not fill shape {short(shape)}")

    def read() -> np.ndarray:
        flat = np.empty(sum(counts), chunks[0].dtype)
        for chunk, end in zip(chunks, np.cumsum(counts), strict=True):
            flat[end - math.prod(chunk.shape) : end] = chunk.read().reshape(-1)
        return flat.reshape(shape)

    return Tensor(shape, chunks[0].dtype, read)
