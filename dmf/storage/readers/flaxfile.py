"""Flax's msgpack checkpoints: found by walking over the file's headers, array by array, without reading the arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dmf.storage.readers.span import DTYPES, Cursor, Span, checked_sizes, packed, short
from dmf.storage.readers.tree import MAX_DEPTH, Inert, Tensor

CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
NUMBERS = dict(
    zip(
        range(0xCA, 0xD4), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True
    )
)
LENGTHS = {
    **{0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I")},
    **{0xC7: ("extension", ">B"), 0xC8: ("extension", ">H"), 0xC9: ("extension", ">I")},
    **{0xD9: ("text", ">B"), 0xDA: ("text", ">H"), 0xDB: ("text", ">I")},
    **{0xDC: ("list", ">H"), 0xDD: ("list", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I")},
}
FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
ARRAY, SCALAR = 1, 3  # Flax's extension types; of NumPy, and 2, a complex number, no network has
CHUNKED = "__msgpack_chunked_array__"  # marks the map that stands for an array of over 1 GiB


def read_msgpack(whole: Span) -> Any:
    """The tree of flax.serialization: a map of maps with arrays."""
    with whole.cursor() as cursor:
        tree = _value(cursor, 0)
        if cursor.left:
            raise whole.error(
                f"goes on for {cursor.left} bytes after its end; expected nothing more"
            )
        return tree


def _value(cursor: Cursor, depth: int) -> Any:
    code = cursor.take(1)[0]
    if code < 0x80 or code >= 0xE0:
        return code if code < 0x80 else code - 0x100
    if code in CONSTANTS:
        return CONSTANTS[code]
    if code in NUMBERS:
        return cursor.number(NUMBERS[code])
    kind, size = _header(cursor, code)
    if depth > MAX_DEPTH:
        raise cursor.span.error(f"nests over {MAX_DEPTH} deep; expected a plain tree")
    if kind == "text":
        return cursor.text(size)
    if kind == "bytes":
        return Inert("bytes", {"size": cursor.skip(size, "a byte string").size})
    if kind == "list":
        return {i: _value(cursor, depth + 1) for i in range(size)}
    return _map(cursor, size, depth) if kind == "map" else _extension(cursor, size, depth)


def _header(cursor: Cursor, code: int) -> tuple[str, int]:
    if code in LENGTHS:
        kind, form = LENGTHS[code]
        return kind, cursor.number(form)
    if code in FIXED_EXTENSIONS:
        return "extension", FIXED_EXTENSIONS[code]
    for first, kind, mask in ((0xA0, "text", 0x1F), (0x90, "list", 0x0F), (0x80, "map", 0x0F)):
        if first <= code <= first + mask:
            return kind, code & mask
    raise cursor.span.error(
        f"byte {code:#x} stands where a value begins; expected a Flax msgpack checkpoint"
    )


def _map(cursor: Cursor, size: int, depth: int) -> Any:
    found: dict[str | int, Any] = {}
    for _ in range(size):
        key = _value(cursor, depth + 1)
        if not isinstance(key, str | int) or key in found:
            raise cursor.span.error(
                f"key {short(key)} of a map is used twice or is no text; expected names, each once"
            )
        found[key] = _value(cursor, depth + 1)
    return _joined(cursor.span, found) if CHUNKED in found else found


def _extension(cursor: Cursor, size: int, depth: int) -> Any:
    """An array: a list of shape, name of the type, and bytes in row-major order."""
    kind, end = cursor.number(">b"), cursor.left - size
    if kind not in (ARRAY, SCALAR):
        raise cursor.span.error(
            f"extension type {kind}; expected arrays and scalars, types {ARRAY} and {SCALAR}, of Flax"
        )
    form, fields = _header(cursor, cursor.take(1)[0])
    shape, name = (
        (_value(cursor, depth + 1) for _ in range(2))
        if (form, fields) == ("list", 3)
        else (None, None)
    )
    form, count = _header(cursor, cursor.take(1)[0])
    if (
        not isinstance(shape, dict)
        or not isinstance(name, str)
        or name not in DTYPES
        or form != "bytes"
    ):
        raise cursor.span.error(
            f"an array of type {short(name)}; expected a shape, one of {', '.join(DTYPES)}, and bytes"
        )
    data = cursor.skip(count, f"an array at byte {cursor.span.size - cursor.left}")
    tensor = packed(data, DTYPES[name], list(shape.values()))
    if cursor.left != end:
        raise data.error("is shorter or longer than announced; expected a whole array")
    return tensor if kind == ARRAY else Inert("scalar", {})


def _joined(span: Span, found: dict[str | int, Any]) -> Tensor:
    numbered = [x if isinstance(x := found.get(key), dict) else {} for key in ("shape", "chunks")]
    sizes, parts = ([part.get(str(i)) for i in range(len(part))] for part in numbered)
    shape, chunks = checked_sizes(span, sizes), [part for part in parts if isinstance(part, Tensor)]
    counted = sum(math.prod(chunk.shape) for chunk in chunks)
    if (
        len(chunks) != len(parts)
        or counted != math.prod(shape)
        or len({chunk.dtype for chunk in chunks}) != 1
    ):
        raise span.error(
            f"an array in {len(parts)} chunks that do not fill shape {short(shape)}; expected Flax's chunks"
        )
    return Tensor(shape, chunks[0].dtype, functools.partial(_read_chunks, shape, chunks))


def _read_chunks(shape: tuple[int, ...], chunks: Sequence[Tensor]) -> np.ndarray:
    flat, start = np.empty(math.prod(shape), chunks[0].dtype), 0
    for chunk in chunks:
        values = chunk.read().reshape(-1)
        flat[start : start + values.size] = values
        start += values.size
    return flat.reshape(shape)
