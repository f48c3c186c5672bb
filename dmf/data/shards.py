"""The files of encoded images: their names, how they are written so that a kill harms nothing, and how they are read.

    DIR/train/plan.json                               what the values depend on; written first
    DIR/train/latents-00012-of-00313.array_record     record 2 i + flip of its images: mean, then std, each (h, w, c)
    DIR/train/latents-00012-of-00313.json             vouches for it, and keeps the labels of its images
    DIR/train/labels.npy                              (N,) int32
    DIR/train/metadata.json                           the plan, size and SHA-256 of shards and labels, and a seal; written last
    DIR/heldout/...                                   likewise

Record 2 i is image i, record 2 i + 1 its mirror image, encoded as such: a mirrored latent is not the latent of the mirrored
image. Values are of *unscaled* latents (`dmf.networks.frozen.vae`), little-endian, in the dtype of the metadata. Shard k holds the
images [k S, (k + 1) S).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import resource
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dmf.errors import DmfError
from dmf.logging import Count
from dmf.storage import atomic
from dmf.storage.digest import sha256

FORMAT = 1
PLAN, METADATA, LABELS = "plan.json", "metadata.json", "labels.npy"
DTYPES = {"float32": "<f4", "float16": "<f2"}
VERIFIERS = 4  # threads: hashing sets the interpreter free
READERS = 8  # threads: a batch's records lie in many shards, and storage answers them at once
# Plain bytes: float32 latents shrink by 7 %, read three times slower, and differently from one zstd to the next.
WRITER = "group_size:1,uncompressed"
HOW = "what `--mode=encode` has written to its end; the same command goes on where it stopped"
# What a system says where it cannot give a file that may be whole; a missing file is not among them.
REFUSALS = tuple(
    os.strerror(e)
    for e in (errno.EMFILE, errno.ENFILE, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE)
)


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


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


def _is_file_entry(entry: Any) -> bool:
    return type(entry["name"]) is type(entry["sha256"]) is str and _whole(entry["bytes"], 0)


def name(shard: int, shards: int) -> str:
    """File name of a shard."""
    return f"latents-{shard:05}-of-{shards:05}.array_record"


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def metadata(folder: Path) -> dict[str, Any]:
    """The metadata of an encoded split. Raises DmfError where it is missing, damaged or of another version."""
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
                f"{path}: format is {found['format']!r}, expected {FORMAT}, that of this version"
            )
        missing = [name for name in FIELDS if name not in found]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing")
        unsealed = {k: v for k, v in found.items() if k != "seal"}
        if found["seal"] != _seal(unsealed):
            raise ValueError("its bytes were altered")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DmfError(
            f"{path} cannot be read ({type(error).__name__}: {error}): expected {HOW}"
        ) from error
    _check_fields(path, found)
    return unsealed


def _check_fields(path: Path, found: dict[str, Any]) -> None:
    """Raises DmfError where a value of the metadata is not what its name promises."""
    for key, (expected, good) in FIELDS.items():
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
            f"{path}: {len(found['shards'])} shards, expected {total} of {size} images for count {count}"
        )
    for k, entry in enumerate(found["shards"]):
        wanted = {"name": name(k, total), "count": min(size, count - k * size)}
        if {key: entry[key] for key in wanted} != wanted:
            raise DmfError(
                f"{path}: shard {k} is {entry['name']!r:.100} of {entry['count']} images, expected {wanted}"
            )


def files(about: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
    """(name, bytes, SHA-256) of every file that the metadata vouch for."""
    for entry in (about["labels"], *about["shards"]):
        yield entry["name"], entry["bytes"], entry["sha256"]


def check_size(path: Path, size: int) -> None:
    """Raises DmfError where a file is missing or has another size: cheap, and what a broken copy looks like."""
    with _reading(path):
        found = path.stat().st_size if path.is_file() else None
    if found != size:
        what = "is missing" if found is None else f"has {found:,} bytes"
        raise DmfError(
            f"{path} {what}: expected {size:,} bytes; the encoding's command makes it again"
        )


def check_sum(path: Path, size: int, digest: str) -> None:
    """Raises DmfError where a file has not the bytes that the metadata tell; reads all of it."""
    check_size(path, size)
    with _reading(path):
        found = sha256(path)
    if found != digest:
        raise DmfError(
            f"{path} has another SHA-256 than {digest[:12]}...: its bytes were altered; the command makes it again"
        )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DmfError(
            f"{path} cannot be read ({error.strerror}): expected a readable file; see to the disk"
        ) from error


def read_sidecar(path: Path) -> dict[str, Any]:
    """What vouches for the shard `path`: count, bytes, sha256, made_with, images, labels. Raises DmfError if damaged."""
    try:
        entry = json.loads(_sidecar(path).read_text())
        if entry.pop("seal") != _seal(entry):
            raise ValueError("its bytes were altered")
        return entry
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DmfError(
            f"{_sidecar(path)} cannot be read ({type(error).__name__}: {error}); the command makes it again"
        ) from error


def begun(folder: Path) -> list[Path]:
    """The shards in a folder that something vouches for, whatever it says, in the order of their names."""
    return sorted(path.with_suffix(".array_record") for path in folder.glob("latents-*.json"))


def intact(paths: Sequence[Path], images: Sequence[str]) -> list[bool]:
    """Which shards were written to their end, of the images with these identities, and have their bytes still.

    Reads all of them; prints how far it is, and a line for each that is there but not intact.
    """

    def trouble(k: int) -> str:
        try:
            entry = read_sidecar(paths[k])
            if entry.get("images") != images[k]:
                return f"{paths[k]} is of other images"
            check_sum(paths[k], entry["bytes"], entry["sha256"])
            return ""
        except DmfError as error:
            return str(error)

    there = [k for k, path in enumerate(paths) if _sidecar(path).exists()]
    progress, found = Count("verify", len(there), "shards"), {}
    with ThreadPoolExecutor(VERIFIERS, "verify") as pool:
        for done, (k, why) in enumerate(zip(there, pool.map(trouble, there), strict=True), 1):
            found[k] = why
            progress.show(done)
    for why in filter(None, found.values()):
        print(f"again     {why}", flush=True)
    return [found.get(k) == "" for k in range(len(paths))]


def write_shard(
    path: Path,
    parts: Iterable[tuple[np.ndarray, np.ndarray]],
    made_with: dict[str, str],
    images: str,
) -> None:
    """Writes a shard under a hidden name, then renames it, then writes what vouches for it.

    parts: (values (n, 2, 2, h, w, c): image, flip, mean or std; labels (n,)). images: their identity.
    Raises DmfError if the disk refuses; then, and if `parts` raise, nothing stays behind.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = atomic.partial(path)
    labels: list[int] = []
    try:
        with writing(path.parent):
            writer = ArrayRecordWriter(str(partial), WRITER)
        for values, some in parts:
            with writing(path.parent):
                for record in values.reshape(-1, *values.shape[2:]):
                    writer.write(record.tobytes())
            labels += some.tolist()
        with writing(path.parent):
            writer.close()
            _sync(partial)
            entry = {
                "count": len(labels),
                "bytes": partial.stat().st_size,
                "sha256": sha256(partial),
            }
            partial.replace(path)
            _sync(path.parent)
        entry |= {"made_with": made_with, "images": images, "labels": labels}
        write_json(_sidecar(path), sealed(entry), indent=None)
    finally:
        partial.unlink(missing_ok=True)


def sealed(entry: dict[str, Any]) -> dict[str, Any]:
    """Plain values with the SHA-256 of themselves, by which an alteration is seen."""
    return {**entry, "seal": _seal(entry)}


def _seal(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def clear(folder: Path) -> None:
    """Removes what dead processes of this machine left half-written, and what this process did. Raises DmfError."""
    with writing(folder):
        atomic.clear(folder)


def remove(path: Path) -> None:
    """Removes a file that may be missing. Raises DmfError if the disk refuses."""
    with writing(path.parent):
        path.unlink(missing_ok=True)


def refused(error: Exception) -> bool:
    """Whether it is the system that refuses a file, so that the file itself may be whole."""
    return (
        isinstance(error, OSError)
        and error.errno is not None
        or any(text in str(error) for text in REFUSALS)
    )


def allow_many_files() -> None:
    """Lets this process open as many files as it may ever: each shard of a data set stays open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(
            OSError, ValueError
        ):  # where the system gives fewer than it tells, the reader will say so
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What the disk refuses, as one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises the latter
        why = " ".join(str(error).split())[:200]
        raise DmfError(
            f"{folder} cannot be written ({why}): expected a writable directory with room; finished shards are kept, and the "
            "same command goes on"
        ) from error


def write_json(path: Path, values: dict[str, Any], indent: int | None = 1) -> None:
    """Writes plain values, whole or not at all."""
    write(path, (json.dumps(values, indent=indent) + "\n").encode())


def write(path: Path, content: bytes) -> None:
    """Writes a small file, whole or not at all. Raises DmfError if the disk refuses."""
    partial = atomic.partial(path)
    try:
        with writing(path.parent):
            partial.write_bytes(content)
            _sync(partial)
            partial.replace(path)
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Returns when a file, or the names in a directory, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Shards:
    """Random access to the records of all shards; each file is opened at its first use, and stays open."""

    def __init__(self, folder: Path, about: dict[str, Any]):
        allow_many_files()
        self._paths = [folder / entry["name"] for entry in about["shards"]]
        self._counts = [2 * entry["count"] for entry in about["shards"]]
        self._per_shard = 2 * about["shard_size"]
        self._dtype = np.dtype(DTYPES[about["dtype"]])
        self._shape = (2, *about["latent_shape"])
        self._readers: dict[int, Any] = {}
        self._locks = [threading.Lock() for _ in self._paths]
        self._pool = ThreadPoolExecutor(READERS, "latents")

    def fetch(self, records: np.ndarray) -> np.ndarray:
        """The records (n,) of the whole split as (n, 2, h, w, c) in the stored dtype. Raises DmfError naming a damaged file."""
        out = np.empty((len(records), *self._shape), self._dtype)
        shards = records // self._per_shard

        def read(shard: int) -> None:
            rows = np.flatnonzero(shards == shard)
            for row, record in zip(
                rows, self._read(shard, records[rows] % self._per_shard), strict=True
            ):
                out[row] = np.frombuffer(record, self._dtype).reshape(self._shape)

        list(self._pool.map(read, np.unique(shards).tolist()))
        return out

    def _read(self, shard: int, positions: np.ndarray) -> list[bytes]:
        path = self._paths[shard]
        try:
            with self._locks[shard]:  # readers of older releases are not safe in several threads
                found = self._reader(shard).read(positions.tolist())
        except RuntimeError as error:
            why = " ".join(str(error).split())[:200]
            if refused(error):
                raise DmfError(
                    f"{path} cannot be read ({why}): expected a readable file, and room for open files"
                ) from error
            raise DmfError(
                f"{path} is damaged ({why}): the encoding's command makes it again"
            ) from error
        size = int(np.prod(self._shape)) * self._dtype.itemsize
        bad = [p for p, record in zip(positions, found, strict=True) if len(record) != size]
        if bad:
            raise DmfError(
                f"{path}: record {bad[0]} has not the {size:,} bytes of {self._dtype.name}{list(self._shape)}"
            )
        return found

    def _reader(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        if shard not in self._readers:
            reader = ArrayRecordReader(
                str(self._paths[shard]), "readahead_buffer_size:0,max_parallelism:0"
            )
            if not reader.ok() or reader.num_records() != self._counts[shard]:
                raise DmfError(
                    f"{self._paths[shard]} holds {reader.num_records()} readable records, expected {self._counts[shard]}: "
                    "the encoding's command makes it again"
                )
            self._readers[shard] = reader
        return self._readers[shard]
