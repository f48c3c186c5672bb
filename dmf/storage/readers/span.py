"""Stretches of a file that are found now and read later, and tensors over them. No file is mapped into memory."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dmf.errors import DmfError
from dmf.storage.readers.tree import Tensor

MAX_PIECES = 1_000_000  # bounds time and memory (under 1 GB): a real index takes 10 to 100 thousand
PIECE = 64  # bytes of text that count as one piece
MAX_LINE = 500
MAX_DIMS = 32
MAX_REPEATED = (
    2**26
)  # bytes of a tensor that repeats values, and so takes more memory than the file holds
MAX_COUNT = 2**58  # values of a tensor: their bytes can be counted in 63 bits
INTEGERS = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
PLAIN = (*INTEGERS, "float16", "float32", "float64")
NARROW = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
DTYPES = {name: np.dtype(name) for name in PLAIN} | {
    name: np.dtype(getattr(ml_dtypes, name)) for name in NARROW
}


def refusal(path: str | Path, text: str) -> DmfError:
    """The error of a file, on one line whatever names the file holds."""
    return DmfError("".join(c if c.isprintable() else "?" for c in f"{path}: {text}"))


def short(thing: object) -> str:
    """What a file gives as a name, number or shape, cut to what a line of text bears; of anything else its type."""
    if isinstance(thing, list | tuple):
        inner = [short(x) if isinstance(x, int) else type(x).__name__ for x in thing[:8]]
        return f"({', '.join([*inner, *(['...'] if len(thing) > 8 else [])])})"
    text = (
        str(thing)
        if isinstance(thing, str | int | float | Exception | None)
        else type(thing).__name__
    )
    return text if len(text) <= 100 else f"{text[:97]}..."


@dataclass(frozen=True)
class File:
    """A file as it was when it was first seen; it is opened anew for each reading, and must not have changed by then."""

    path: str
    size: int
    stamp: tuple[int, ...]

    @classmethod
    def at(cls, path: str | Path) -> File:
        """Raises DmfError where there is no regular, non-empty file."""
        try:
            found = os.stat(path)
        except FileNotFoundError as error:
            raise refusal(path, "no such file; expected a file of weights") from error
        except (OSError, ValueError) as error:
            raise refusal(
                path, f"cannot be reached ({short(error)}); expected a file of weights"
            ) from error
        if stat.S_ISDIR(found.st_mode):
            raise refusal(
                path,
                "is a directory; expected one file of weights, or an Orbax directory with its _METADATA",
            )
        if not stat.S_ISREG(found.st_mode):
            raise refusal(path, "is a device or a pipe; expected a file of weights")
        if not found.st_size:
            raise refusal(path, "is empty; expected a file of weights (was its download cut off?)")
        return cls(os.fspath(path), found.st_size, _stamp(found))

    @contextlib.contextmanager
    def opened(self) -> Iterator[io.BufferedReader]:
        """The open file; every error of the disk becomes a DmfError."""
        try:
            with open(self.path, "rb") as stream:
                if _stamp(os.fstat(stream.fileno())) != self.stamp:
                    raise refusal(
                        self.path,
                        "was changed while in use; expected the file as it was when first opened",
                    )
                yield stream
        except OSError as error:
            raise refusal(
                self.path, f"cannot be read ({short(error)}); expected a readable file"
            ) from error

    def whole(self) -> Span:
        """All its bytes."""
        return Span(self, 0, self.size, "")


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)


@dataclass(frozen=True)
class Span:
    """Bytes [start, start + size) of a file, or bytes held in memory, under the name that errors give them."""

    file: File
    start: int
    size: int
    name: str
    held: bytes | None = None
    crc: int | None = None  # CRC-32 of all of it, where known

    def error(self, text: str) -> DmfError:
        """A refusal that names the file and the stretch."""
        return refusal(self.file.path, f"{short(self.name)}: {text}" if self.name else text)

    def part(self, offset: int, size: int, name: str, crc: int | None = None) -> Span:
        """A stretch of this one; DmfError where it reaches beyond."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise self.error(
                f"{short(name)} lies at bytes {short(offset)} to {short(offset + size)} of {self.size}; expected it within "
                "(is the file cut off?)"
            )
        return Span(self.file, self.start + offset, size, name, self.held, crc)

    def memory(self, data: bytes, name: str) -> Span:
        """Bytes that came out of this stretch by decoding."""
        return Span(self.file, 0, len(data), name, data)

    @contextlib.contextmanager
    def opened(self) -> Iterator[io.BufferedReader]:
        """A stream that stands at the first byte."""
        with self.file.opened() if self.held is None else _in_memory(self.held) as stream:
            stream.seek(self.start)
            yield stream

    @contextlib.contextmanager
    def cursor(self, budget: list[int] | None = None) -> Iterator[Cursor]:
        """Reads forward from the first byte. budget: shared with the cursor that led here."""
        with self.opened() as stream:
            yield Cursor(self, stream, [MAX_PIECES] if budget is None else budget)

    def array(self, dtype: np.dtype, first: int, count: int) -> np.ndarray:
        """Values [first, first + count) of this stretch as a new 1-D array."""
        raw = np.empty(count * dtype.itemsize, np.uint8)
        got, view = 0, raw.data
        with self.opened() as stream:
            stream.seek(self.start + first * dtype.itemsize)
            while got < len(raw) and (more := stream.readinto(view[got:])):
                got += more
        if got < len(raw):
            raise self.error(
                f"ended after {got} of {len(raw)} bytes; expected all of them (is the file cut off?)"
            )
        if len(raw) == self.size:
            self._check(zlib.crc32(view))
        return raw != 0 if dtype == np.bool_ else raw.view(dtype)

    def verify(self) -> None:
        """DmfError where its bytes do not match their checksum; reads them all, a piece at a time."""
        crc, left = 0, self.size
        with self.opened() as stream:
            while left and (data := stream.read(min(left, 2**20))):
                crc, left = zlib.crc32(data, crc), left - len(data)
        self._check(crc)

    def _check(self, crc: int) -> None:
        if self.crc not in (None, crc):
            raise self.error(
                f"damaged: its bytes do not match their checksum; expected CRC-32 {self.crc:08x}"
            )


@contextlib.contextmanager
def _in_memory(data: bytes) -> Iterator[io.BufferedReader]:
    yield io.BufferedReader(io.BytesIO(data))  # type: ignore[arg-type]


class Cursor:
    """Reads a span forward, piece by piece, never beyond its end and never more pieces than a sane file has."""

    def __init__(self, span: Span, stream: io.BufferedReader, budget: list[int]):
        self.span, self.left, self.budget, self._stream = span, span.size, budget, stream

    def charge(self, pieces: int) -> None:
        """Counts work; DmfError once it is more than any file of weights takes."""
        self.budget[0] -= pieces
        if self.budget[0] < 0:
            raise self.span.error(
                f"describes over {MAX_PIECES} pieces of data besides tensors; expected a file of weights"
            )

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        self._within(count)
        self.charge(1 + count // PIECE)
        data = self._stream.read(count)
        if len(data) != count:
            raise self.span.error("ended early; expected the file as it was when first opened")
        self.left -= count
        return data

    def skip(self, count: int, name: str) -> Span:
        """The next `count` bytes, unread."""
        self._within(count)
        found = self.span.part(self.span.size - self.left, count, name)
        self._stream.seek(count, os.SEEK_CUR)
        self.left -= count
        return found

    def number(self, form: str) -> Any:
        """The next number, in a form of `struct`."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, count: int) -> str:
        """The next `count` bytes as UTF-8."""
        try:
            return self.take(count).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise self.span.error(
                f"text before byte {self.span.size - self.left} is not UTF-8; expected UTF-8"
            ) from error

    def line(self) -> str:
        """The next line of text, without its end."""
        data = self._stream.readline(min(MAX_LINE, self.left))
        if not data.endswith(b"\n"):
            raise self.span.error(
                f"no line of text at byte {self.span.size - self.left}; expected one (is the file cut off?)"
            )
        self._stream.seek(-len(data), os.SEEK_CUR)
        return self.text(len(data))[:-1]

    def _within(self, count: int) -> None:
        if not 0 <= count <= self.left:
            raise self.span.error(
                f"{short(count)} bytes announced at byte {self.span.size - self.left} where {self.left} are left; expected "
                "no more than there are (is the file cut off?)"
            )


def checked_sizes(span: Span, shape: Sequence[Any]) -> tuple[int, ...]:
    """A shape that NumPy can have; of a tensor without values too, whose other sizes nothing else bounds."""
    if len(shape) <= MAX_DIMS and all(isinstance(n, int) and 0 <= n < MAX_COUNT for n in shape):
        sizes = tuple(int(n) for n in shape)
        if math.prod(max(n, 1) for n in sizes) < MAX_COUNT:
            return sizes
    raise span.error(f"shape {short(shape)}; expected up to {MAX_DIMS} sizes >= 0 of sane extent")


def strided(
    span: Span,
    dtype: np.dtype,
    shape: Sequence[Any],
    strides: Sequence[Any] | None = None,
    offset: Any = 0,
) -> Tensor:
    """A tensor over a span; strides and offset count values, None = row-major. DmfError where it is not all inside."""
    sizes = checked_sizes(span, shape)
    steps = _row_major(sizes) if strides is None else strides
    if len(steps) != len(sizes) or not all(isinstance(n, int) and n >= 0 for n in (*steps, offset)):
        raise span.error(
            f"strides {short(steps)} from value {short(offset)} for shape {short(shape)}; expected numbers >= 0"
        )
    steps = tuple(step if n > 1 else 0 for n, step in zip(sizes, steps, strict=True))
    reach = 1 + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    count, held = math.prod(sizes), span.size // dtype.itemsize
    if count and offset + reach > held:
        raise span.error(
            f"holds {held} values; expected those of shape {short(shape)} with strides {short(strides or steps)} from "
            f"value {short(offset)} (is the file cut off?)"
        )
    if count > held and count * dtype.itemsize > MAX_REPEATED:
        raise span.error(
            f"repeats values to fill shape {short(shape)}; expected at most {MAX_REPEATED} bytes of such a tensor"
        )
    return Tensor(
        sizes, dtype, functools.partial(_read, span, dtype, sizes, steps, int(offset), reach)
    )


def packed(span: Span, dtype: np.dtype, shape: Sequence[Any]) -> Tensor:
    """The row-major tensor that fills a span exactly; DmfError where shape and bytes disagree."""
    tensor = strided(span, dtype, shape)
    if math.prod(tensor.shape) * dtype.itemsize != span.size:
        raise span.error(
            f"holds {span.size} bytes; expected those of shape {short(shape)} and type {dtype}"
        )
    return tensor


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _read(
    span: Span,
    dtype: np.dtype,
    shape: tuple[int, ...],
    steps: tuple[int, ...],
    offset: int,
    reach: int,
) -> np.ndarray:
    if 0 in shape:
        return np.empty(shape, dtype)
    flat = span.array(dtype, offset, reach)
    if steps == tuple(
        step if n > 1 else 0 for n, step in zip(shape, _row_major(shape), strict=True)
    ):
        return flat.reshape(shape)
    view = np.lib.stride_tricks.as_strided(flat, shape, [step * dtype.itemsize for step in steps])
    return np.array(view, order="C")
