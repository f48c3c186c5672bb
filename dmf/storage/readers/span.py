"""Stretches of a file that are found now and read later. No file is mapped into memory."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dmf.errors import DmfError

MAX_PIECES = 1_000_000  # of one file; a real index takes 10 to 100 thousand
PIECE = 64  # bytes of text that count as one piece
MAX_LINE = 500
WHOLE = "a whole file of weights (is it cut off or damaged?)"


def short(thing: object) -> str:
    """A name, number or shape from a file, cut to a short text; of other things their type."""
    if isinstance(thing, list | tuple):
        inner = [short(x) if isinstance(x, int) else type(x).__name__ for x in thing[:8]]
        return f"({', '.join(inner + ['...'] * (len(thing) > 8))})"
    plain = isinstance(thing, str | int | float | Exception | None)
    text = str(thing) if plain else type(thing).__name__
    return text if len(text) <= 100 else f"{text[:97]}..."


@dataclass(eq=False)
class Span:
    """Bytes [start, start + size) of a file, or, where held, of bytes in memory.

    stamp: how the file looked when it was found. name: what errors call it. crc: CRC-32 or None.
    """

    path: str
    stamp: tuple[int, ...]
    start: int
    size: int
    name: str = ""
    crc: int | None = None
    held: bytes | None = None

    def error(self, text: str, expected: str = WHOLE) -> DmfError:
        """A refusal that names the file and this stretch."""
        name = short(self.name) + ": " * bool(self.name)
        return DmfError(f"{self.path}: {name}{text}; expected {expected}")

    def part(self, start: int, size: int, name: str, crc: int | None = None) -> Span:
        """A stretch of this one; DmfError where it reaches beyond."""
        if start < 0 or size < 0 or start + size > self.size:
            where = f"from byte {short(start)} of {self.size}"
            raise self.error(f"announces {short(size)} bytes of {short(name)} {where}")
        return replace(self, start=self.start + start, size=size, name=name, crc=crc)

    def of(self, data: Span | bytes) -> Span:
        """Bytes of a pickle: a stretch of it, or what was decoded from one."""
        if isinstance(data, Span):
            return data
        return replace(self, start=0, size=len(data), name="bytes in its pickle", held=data)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        """A stream at the first byte. Every error of the disk becomes a DmfError."""
        try:
            with io.BytesIO(self.held) if self.held is not None else open(self.path, "rb") as file:
                if self.held is None and _stamp(os.fstat(file.fileno())) != self.stamp:
                    raise self.error("was changed while in use", "the file as it was found")
                file.seek(self.start)
                yield file
        except OSError as error:
            raise self.error(f"cannot be read ({short(error)})", "a readable file") from error

    def array(self, dtype: np.dtype, first: int, count: int) -> np.ndarray:
        """Values [first, first + count) of this stretch as a new 1-D array."""
        raw = np.empty(count * dtype.itemsize, np.uint8)
        with self.opened() as file:
            file.seek(first * dtype.itemsize, os.SEEK_CUR)
            if (got := file.readinto(raw.data)) < len(raw):
                raise self.error(f"ended after {got} of {len(raw)} bytes")
        if len(raw) == self.size and self.crc not in (None, zlib.crc32(raw.data)):
            raise self.error("damaged: its bytes do not match their checksum")
        return raw != 0 if dtype == np.bool_ else raw.view(dtype)


def whole(path: str | Path) -> Span:
    """All bytes of a file. Raises DmfError where there is no regular, non-empty file."""
    span = Span(os.fspath(path), (), 0, 0)
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise span.error("no such file", "a file of weights") from error
    except (OSError, ValueError) as error:
        raise span.error(f"cannot be reached ({short(error)})", "a file of weights") from error
    if not stat.S_ISREG(found.st_mode):
        raise span.error("is a device or a pipe", "a file of weights")
    if not found.st_size:
        raise span.error("is empty")
    return replace(span, stamp=_stamp(found), size=found.st_size)


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)


class Stream:
    """Reads a span forward: never beyond its end, never more pieces than a sane file has.

    budget: the number of pieces that are left, in a list, which the streams of one file share.
    """

    def __init__(self, span: Span, file: Any, budget: list[int] | None = None):
        self.span, self.place, self._file = span, 0, file
        self.budget = [MAX_PIECES] if budget is None else budget

    def charge(self, pieces: int) -> None:
        """Counts work; DmfError once it is more than any file of weights takes."""
        self.budget[0] -= pieces
        if self.budget[0] < 0:
            raise self.span.error(f"describes over {MAX_PIECES} pieces of data besides tensors")

    def skip(self, count: int, name: str) -> Span:
        """The next `count` bytes, unread."""
        found = self.span.part(self.place, count, name)
        self._file.seek(count, os.SEEK_CUR)
        self.place += count
        return found

    def read(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self.span.size - self.place:
            self.skip(count, "a pickle")
        self.charge(1 + count // PIECE)
        self.place += count
        return self._file.read(count)

    def readline(self) -> bytes:
        """The next line, with its end; of a long line the beginning."""
        line: bytes = self._file.readline(min(MAX_LINE, self.span.size - self.place))
        self.charge(1 + len(line) // PIECE)
        self.place += len(line)
        return line
