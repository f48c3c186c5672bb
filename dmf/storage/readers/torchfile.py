"""Files that PyTorch has written: its zip archives, the streams it wrote before version 1.6, and pickles of whole networks."""

from __future__ import annotations

import functools
import io
import re
import struct
import zipfile
from typing import Any

import numpy as np

from dmf.storage.readers.pickled import STORAGES, Global, Storage, tree_of, wrong
from dmf.storage.readers.span import DTYPES, Cursor, Span, short
from dmf.storage.readers.unpickle import Machine

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a stream
VERSION = 1001
MAX_DIRECTORY = 2**24  # bytes of a zip archive's table of contents; it is read at once
LOCAL_HEADER = struct.Struct("<4s22xHH")
BROKEN_ZIP = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    NotImplementedError,
    ValueError,
    OverflowError,
    struct.error,
    EOFError,
)


class _Measured:
    """What zipfile needs of a file. It would read the table of contents at once, however long the archive says it is."""

    def __init__(self, stream: io.BufferedReader):
        self.seek, self.tell, self.seekable, self._read = (
            stream.seek,
            stream.tell,
            stream.seekable,
            stream.read,
        )

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its table of contents takes {size} bytes")
        return self._read(size)


def read_zip(whole: Span) -> Any:
    """The tree of a zip archive of torch.save: `<name>/data.pkl` beside `<name>/data/<key>`, one for each storage."""
    members = _members(whole)
    roots = [
        name.removesuffix("data.pkl") for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)
    ]
    if len(roots) != 1:
        raise whole.error(
            f"is a zip archive with {short(list(members)[0])}; expected one of torch.save, with one data.pkl"
        )
    root = roots[0]
    if f"{root}constants.pkl" in members:
        raise whole.error(
            "looks like a TorchScript archive, which carries code; expected a state_dict of torch.save"
        )
    order = members.get(f"{root}byteorder")
    with members[f"{root}data.pkl"].cursor() as cursor:
        if (
            order is not None
            and order.array(np.dtype(np.uint8), 0, min(order.size, 9)).tobytes() != b"little"
        ):
            raise whole.error(
                "stores its numbers in another byte order; expected little-endian ones"
            )
        cursor.span.verify()
        nested = functools.partial(_nested, budget=cursor.budget)
        raw = Machine(
            cursor, functools.partial(_zip_storage, cursor, members, f"{root}data/"), nested
        ).run()
        return tree_of(raw, cursor.span)


def _members(whole: Span) -> dict[str, Span]:
    """Where every member of the archive lies; only stored ones, each name once."""
    found: dict[str, Span] = {}
    with whole.file.opened() as stream:
        try:
            table = zipfile.ZipFile(_Measured(stream)).infolist()  # type: ignore[call-overload]
        except BROKEN_ZIP as error:
            raise whole.error(
                f"its zip table of contents cannot be read ({short(error)}); expected a whole archive (is the file cut off?)"
            ) from error
        if not any(info.filename.endswith("/data.pkl") for info in table):
            what = short(table[0].filename) if table else "nothing"
            raise whole.error(
                f"is a zip archive with {what}, not of torch.save; expected weights (unpack it first)"
            )
        for info in table:
            if info.filename in found:
                raise whole.error(
                    f"holds two members named {short(info.filename)}; expected each name once"
                )
            if (
                info.compress_type != zipfile.ZIP_STORED
                or info.flag_bits & 1
                or info.compress_size != info.file_size
            ):
                raise whole.error(
                    f"member {short(info.filename)} is compressed or encrypted; expected plain bytes"
                )
            start = _data_start(whole, stream, info)
            found[info.filename] = whole.part(
                start, info.file_size, info.filename, info.CRC or None
            )
    return found


def _data_start(whole: Span, stream: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace")
    stream.seek(min(max(info.header_offset, 0), whole.size))
    header = stream.read(LOCAL_HEADER.size + len(name))
    if len(header) == LOCAL_HEADER.size + len(name) and header.endswith(name):
        signature, name_size, extra_size = LOCAL_HEADER.unpack_from(header)
        if signature == b"PK\x03\x04" and name_size == len(name):
            return info.header_offset + len(header) + extra_size
    raise whole.error(
        f"member {short(info.filename)} is not where the table says; expected a whole archive (is the file cut off?)"
    )


def _zip_storage(cursor: Cursor, members: dict[str, Span], folder: str, found: Any) -> Storage:
    match found:
        case ("storage", Global(label), str() as key, _, int() as count) if label in STORAGES:
            span, dtype = members.get(folder + key), DTYPES[STORAGES[label]]
            if span is None:
                raise cursor.span.error(
                    f"names storage {short(key)}, which the archive lacks; expected all storages"
                )
            if span.size != count * dtype.itemsize:
                raise span.error(
                    f"holds {span.size} bytes; expected {short(count)} values of {dtype}"
                )
            return Storage(key, dtype, count, span)
    raise wrong(cursor, "a storage", found)


def read_pickle(whole: Span) -> tuple[str, Any]:
    """(format, tree) of a file that begins with a pickle: a stream of torch.save, or one pickle of a network (EDM, ECT)."""
    with whole.cursor() as cursor:
        nested = functools.partial(_nested, budget=cursor.budget)
        raw = Machine(cursor, None, nested).run()
        legacy = isinstance(raw, int) and raw == MAGIC
        raw = _stream(cursor, nested) if legacy else raw
        if cursor.left:
            raise whole.error(
                f"goes on for {cursor.left} bytes after its end; expected nothing more"
            )
        return "torch legacy" if legacy else "pickle", tree_of(raw, whole)


def _nested(span: Span, budget: list[int]) -> Storage:
    """The storage in a byte string within a pickle: a stream as above, in which no other may be nested."""
    with span.cursor(budget) as cursor:
        if Machine(cursor, None, None).run() == MAGIC and isinstance(
            found := _stream(cursor, None), Storage
        ):
            return found
        raise span.error(
            "is not what torch.save makes of a storage; expected its magic number and a storage"
        )


def _stream(cursor: Cursor, nested: Any) -> Any:
    """What follows the magic number: version, system, object and keys as pickles, then each key's count and bytes."""
    storages: dict[str, Storage] = {}
    version, system = (Machine(cursor, None, None).run() for _ in range(2))
    if (
        version != VERSION
        or not isinstance(system, dict)
        or system.get("little_endian") is not True
    ):
        raise wrong(cursor, "a PyTorch stream of another version or byte order", version)
    raw = Machine(cursor, functools.partial(_stream_storage, cursor, storages), nested).run()
    keys = Machine(cursor, None, None).run()
    if (
        not isinstance(keys, list)
        or not all(isinstance(key, str) for key in keys)
        or sorted(keys) != sorted(storages)
    ):
        raise cursor.span.error(
            f"lists other storages than its {len(storages)} tensors need; expected a whole stream"
        )
    for key in keys:
        storage = storages[key]
        if (count := cursor.number("<q")) != storage.count:
            raise cursor.span.error(
                f"storage {short(key)} holds {count} values; expected {short(storage.count)}"
            )
        storage.span = cursor.skip(count * storage.dtype.itemsize, f"storage {short(key)}")
    return raw


def _stream_storage(cursor: Cursor, storages: dict[str, Storage], found: Any) -> Any:
    match found:
        case ("module", Global() as cls, *_):
            return cls
        case ("storage", Global(label), str() as key, _, int() as count, None) if label in STORAGES:
            made = storages.setdefault(key, Storage(key, DTYPES[STORAGES[label]], count))
            if (made.count, made.dtype) == (count, DTYPES[STORAGES[label]]):
                return made
    raise wrong(cursor, "a storage", found)
