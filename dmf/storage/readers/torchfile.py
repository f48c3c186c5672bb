"""Files of PyTorch: zip archives, the streams written before version 1.6, pickled networks."""

from __future__ import annotations

import functools
import io
import re
import struct
import zipfile
from dataclasses import replace
from typing import Any

import numpy as np

from dmf.storage.readers.span import Span, Stream, short
from dmf.storage.readers.unpickle import Storage, Unpickler, tree_of

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a stream
VERSION = 1001
MAX_DIRECTORY = 2**24  # bytes of a zip archive's table of contents, which is read at once
# What zipfile raises for damaged archives, and for sizes and flags that nobody writes.
BROKEN = (zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, ValueError, ArithmeticError)
STATE_DICT = "a state_dict of torch.save (unpack an archive first)"


class Bounded(io.BufferedReader):
    """A file for zipfile, which reads a table of contents at once, however long it says it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes; BadZipFile where too many are asked for."""
        if size is not None and size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its table of contents takes {size} bytes")
        return super().read(size)


def read_zip(whole: Span) -> Any:
    """The tree of an archive of torch.save: NAME/data.pkl, and NAME/data/KEY for each storage."""
    try:
        with whole.opened() as file, zipfile.ZipFile(Bounded(file.raw)) as archive:
            return _read_archive(whole, archive)
    except (*BROKEN, struct.error, EOFError) as error:
        raise whole.error(f"is no whole zip archive ({short(error)})") from error


def _read_archive(whole: Span, archive: zipfile.ZipFile) -> Any:
    names = archive.namelist()
    if len(set(names)) != len(names):
        raise whole.error("holds two members of one name")
    roots = [name.split("/")[0] for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(roots) != 1:
        raise whole.error(f"is a zip archive with {short([*names, 'nothing'][0])}", STATE_DICT)
    if f"{roots[0]}/constants.pkl" in names:
        raise whole.error("is a TorchScript archive, which carries code", STATE_DICT)
    if f"{roots[0]}/byteorder" in names and archive.read(f"{roots[0]}/byteorder") != b"little":
        raise whole.error("stores numbers in another byte order", "little-endian numbers")
    member = functools.cache(functools.partial(_member, whole, archive))

    def storage(key: str, dtype: np.dtype, count: int) -> Storage:
        if f"{roots[0]}/data/{key}" not in archive.NameToInfo:
            raise program.error(f"names storage {short(key)}, which the archive lacks")
        found = member(f"{roots[0]}/data/{key}")
        if found.size != count * dtype.itemsize:
            raise found.error(f"holds {found.size} bytes", f"{short(count)} values of {dtype}")
        return Storage(found, dtype)

    program = member(f"{roots[0]}/data.pkl")
    with archive.open(program.name) as file:
        while file.read(2**20):  # compares the checksum in the end
            pass
    with program.opened() as file:
        stream = Stream(program, file)
        return tree_of(Unpickler(stream, storage, _nested(stream)).load(), program)


def _member(whole: Span, archive: zipfile.ZipFile, name: str) -> Span:
    """Where the bytes of a member lie. zipfile checks that its header stands there."""
    info = archive.getinfo(name)
    if info.compress_type or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise whole.error(f"{short(name)} is compressed or encrypted", "plain bytes")
    archive.open(info).close()
    with whole.opened() as file:
        file.seek(info.header_offset + 26)  # to the lengths of the name and of an extra field
        start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return whole.part(start, info.file_size, name, info.CRC or None)


def read_pickle(whole: Span) -> tuple[str, Any]:
    """(format, tree) of a file that begins with a pickle: torch.save's stream, or a network."""
    with whole.opened() as file:
        stream = Stream(whole, file)
        found = Unpickler(stream, None, _nested(stream)).load()
        legacy = isinstance(found, int) and found == MAGIC
        if legacy:
            found = _read_stream(stream, _nested(stream))
        if left := whole.size - stream.place:
            raise whole.error(f"goes on for {left} bytes after its end")
        return "torch legacy" if legacy else "pickle", tree_of(found, whole)


def _nested(outer: Stream) -> Any:
    """Reads a storage from a byte string of a pickle. No other may be nested in it."""

    def read(span: Span) -> Storage:
        with span.opened() as file:
            stream = Stream(span, file, outer.budget)
            magic = Unpickler(stream).load()
            if magic == MAGIC and isinstance(found := _read_stream(stream, None), Storage):
                return found
        raise span.error("is not what torch.save makes of a storage")

    return read


def _read_stream(stream: Stream, nested: Any) -> Any:
    """What follows the magic number: version, system, object and keys, then counts and bytes."""
    found: dict[str, Storage] = {}

    def storage(key: str, dtype: np.dtype, count: int) -> Storage:
        span = replace(stream.span, size=count * dtype.itemsize, name=f"storage {short(key)}")
        made = found.setdefault(key, Storage(span, dtype))
        if (made.span.size, made.dtype) != (span.size, dtype):
            raise made.span.error("has two sizes or types")
        return made

    version, system = Unpickler(stream).load(), Unpickler(stream).load()
    if version != VERSION or not isinstance(system, dict) or not system.get("little_endian"):
        raise stream.span.error("is of another version or byte order", "PyTorch's usual stream")
    made, keys = Unpickler(stream, storage, nested).load(), Unpickler(stream).load()
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not named or sorted(keys) != sorted(found):
        raise stream.span.error(f"lists other storages than its {len(found)} tensors need")
    for span, dtype in (found[key] for key in keys):
        count = struct.unpack("<q", stream.read(8))[0]
        if count * dtype.itemsize != span.size:
            raise span.error(f"holds {count} values", f"{span.size} bytes of {dtype}")
        span.start = stream.skip(span.size, span.name).start
    return made
