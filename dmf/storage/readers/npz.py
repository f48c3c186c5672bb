"""The arrays of an .npz, read by hand and not by numpy.load.

Nothing is unpickled, and no array takes more memory than its file accounts for.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from dmf.errors import DmfError
from dmf.storage.readers.torchfile import Bounded

MAX_PIECE = 2**20  # bytes of an array that are read at once
MAX_UNPACKED = 2**26  # bytes of an array that may be packed to next to nothing
MAX_RATIO = 200  # of packed to unpacked bytes of a larger array: images and moments stay far below
# What zipfile and NumPy raise for damaged files, and for sizes, flags and names made to hurt.
ODD = (ArithmeticError, RuntimeError, TypeError, ValueError, OSError, EOFError)
BROKEN = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error, *ODD)
STORED = zipfile.ZIP_STORED
HEADER = re.compile(
    r"\{'descr': (.+), 'fortran_order': (True|False), 'shape': \(([0-9L, ]*)\),? ?\} *\n"
)


def bad(path: str | Path | int, text: str) -> DmfError:
    """The refusal of a file."""
    return DmfError(f"{path}: {text}")


@dataclass(frozen=True)
class Npz:
    """The arrays of an .npz by their names, read one by one."""

    path: Path
    size: int
    archive: zipfile.ZipFile
    members: dict[str, zipfile.ZipInfo]

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[Npz]:
        """Raises DmfError where the table of contents is cut off, damaged or ambiguous."""
        with contextlib.ExitStack() as stack:
            with _whole(path, "its table of contents"):
                stream = stack.enter_context(Bounded(io.FileIO(path)))
                archive = stack.enter_context(zipfile.ZipFile(stream))
            members: dict[str, zipfile.ZipInfo] = {}
            for info in archive.infolist():
                if members.setdefault(info.filename.removesuffix(".npy"), info) is not info:
                    raise bad(path, f"holds {info.filename[:40]} twice; expected each array once")
            yield cls(path, os.fstat(stream.fileno()).st_size, archive, members)

    def array(self, name: str, kind: str) -> np.ndarray:
        """An array whose type is of a NumPy kind. Its memory is bounded by its part of the file."""
        if name not in self.members:
            names = ", ".join(sorted(self.members)[:8])
            raise bad(self.path, f"has {names} but not {name}; expected {name} too")
        info = self.members[name]
        packed, stored = min(info.compress_size, self.size), info.compress_type == STORED
        if info.compress_type not in (STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            what = f"{name} is encrypted or packed in another way than NumPy's"
            raise bad(self.path, f"{what}; expected plain or deflated")
        if info.file_size > (packed if stored else max(MAX_UNPACKED, MAX_RATIO * packed)):
            what = f"{name} announces {info.file_size} bytes, packed in {packed}"
            raise bad(self.path, f"{what}; refused, expected a real array")
        with _whole(self.path, name), self.archive.open(info) as stream:
            shape, fortran, dtype = self._header(name, stream, kind)
            held = info.file_size - stream.tell()
            if math.prod(shape) * dtype.itemsize != held:
                what = f"{name} declares shape {shape} of {dtype} but holds {held} bytes"
                raise bad(self.path, f"{what}; expected a whole array")
            array = np.frombuffer(_bytes(stream, held), dtype)
            return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)

    def _header(
        self, name: str, stream: IO[bytes], kind: str
    ) -> tuple[tuple[int, ...], bool, np.dtype]:
        """(shape, whether in Fortran's order, type). numpy.load would evaluate it; this matches."""
        start = stream.read(10)
        header = stream.read(int.from_bytes(start[8:], "little")).decode("latin1")
        if start[:8] != b"\x93NUMPY\x01\0" or not (found := HEADER.fullmatch(header)):
            what = f"{name} has no header of version 1.0"
            raise bad(self.path, f"{what}; expected the array that numpy.savez writes")
        descr, order, sizes = found.groups()
        if not re.fullmatch(f"'[<>|]{kind}[0-9]+'", descr):
            wanted = {"f": "floats", "u": "bytes", "U": "text"}[kind]
            what = f"{name} has type {descr[:40]}"
            raise bad(self.path, f"{what}; expected {wanted}; objects are never read")
        shape = tuple(int(size) for size in re.findall("[0-9]+", sizes))
        return shape, order == "True", np.dtype(descr[1:-1])


@contextlib.contextmanager
def _whole(path: Path, name: str) -> Iterator[None]:
    """What zipfile and NumPy raise for damaged files, in one line."""
    try:
        yield
    except BROKEN as error:
        what = f"{name} cannot be read ({error})"
        raise bad(path, f"{what}; expected a whole .npz (is it cut off or damaged?)") from error


def _bytes(stream: IO[bytes], size: int) -> np.ndarray:
    """All of a stream of known size, in pieces. zipfile compares the checksum at the end."""
    raw, got = np.empty(size, np.uint8), 0
    while piece := stream.read(MAX_PIECE):
        if got + len(piece) > size:
            raise ValueError(f"goes on after {size} bytes")
        raw[got : got + len(piece)] = np.frombuffer(piece, np.uint8)
        got += len(piece)
    if got < size:
        raise EOFError(f"ends after {got} of {size} bytes")
    return raw


def write_npz(stream: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as np.savez does, dated 1980: equal arrays make equal files."""
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in arrays.items():
            plain = np.asarray(array, order="C")
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, plain, (1, 0), allow_pickle=False)
