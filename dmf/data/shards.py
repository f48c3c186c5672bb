"""The files of encoded images: their names, how they are written so that a kill harms nothing, and how they are read.

    DIR/train/plan.json                               what the values depend on; written first
    DIR/train/latents-00012-of-00313.array_record     record 2 i + flip of its images: mean, then std, each (h, w, c)
    DIR/train/latents-00012-of-00313.json             vouches for it, and keeps the labels of its images
    DIR/train/labels.npy                              (N,) int32
    DIR/train/metadata.json                           the plan, and size and SHA-256 of all shards and labels; written last
    DIR/heldout/...                                   likewise

Record 2 i is image i, record 2 i + 1 its mirror image, encoded as such: a mirrored latent is not the latent of the mirrored
image. Values are of *unscaled* latents (`dmf.networks.vae`), little-endian, in the dtype of the metadata. Shard k holds the
images [k S, (k + 1) S).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dmf.errors import DmfError

FORMAT = 1
PLAN, METADATA, LABELS = "plan.json", "metadata.json", "labels.npy"
DTYPES = {"float32": "<f4", "float16": "<f2"}
READERS = 8  # threads: a batch's records lie in many shards, and storage answers them at once
# Plain bytes: float32 latents shrink by 7 %, read three times slower, and differently from one zstd to the next.
WRITER = "group_size:1,uncompressed"
HOW = "what `--mode=encode` has written to its end; the same command goes on where it stopped"
FIELDS = ("count", "num_classes", "latent_shape", "dtype", "scale", "shard_size", "shards", "labels", "source", "vae")


def name(shard: int, shards: int) -> str:
    """File name of a shard."""
    return f"latents-{shard:05}-of-{shards:05}.array_record"


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def metadata(folder: Path) -> dict[str, Any]:
    """The metadata of an encoded split. Raises DmfError where it is missing, damaged or of another version."""
    path = folder / METADATA
    if not path.is_file():
        what = "is not encoded to its end" if (folder / PLAN).is_file() else "holds no encoded images"
        raise DmfError(f"{folder} {what} (no {METADATA}): expected {HOW}")
    try:
        found = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise DmfError(f"{path}: format is {found['format']!r}, expected {FORMAT}, that of this version")
        missing = [name for name in FIELDS if name not in found]
        if missing or found["dtype"] not in DTYPES:
            raise ValueError(f"{', '.join(missing) or 'dtype'} not as expected")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DmfError(f"{path} cannot be read ({type(error).__name__}: {error}): expected {HOW}") from error


def files(about: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
    """(name, bytes, SHA-256) of every file that the metadata vouch for."""
    for entry in (about["labels"], *about["shards"]):
        yield entry["name"], entry["bytes"], entry["sha256"]


def check_size(path: Path, size: int) -> None:
    """Raises DmfError where a file is missing or has another size: cheap, and what a broken copy looks like."""
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        what = "is missing" if found is None else f"has {found:,} bytes"
        raise DmfError(f"{path} {what}: expected {size:,} bytes; the encoding's command makes it again")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sum(path: Path, size: int, digest: str) -> None:
    """Raises DmfError where a file has not the bytes that the metadata tell; reads all of it."""
    check_size(path, size)
    if sha256(path) != digest:
        raise DmfError(f"{path} has another SHA-256 than {digest[:12]}...: its bytes were altered; the command makes it again")


def read_sidecar(path: Path) -> dict[str, Any]:
    """What vouches for the shard `path`: count, bytes, sha256, labels, made_with. Raises DmfError if it cannot be read."""
    try:
        entry = json.loads(_sidecar(path).read_text())
        if entry.pop("seal") != _seal(entry):
            raise ValueError("its bytes were altered")
        return entry
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DmfError(
            f"{_sidecar(path)} cannot be read ({type(error).__name__}: {error}); the command makes it again"
        ) from error


def is_intact(path: Path) -> bool:
    """Whether the shard `path` was written to its end and has its bytes still; prints a line if it has not."""
    if not _sidecar(path).exists():
        return False
    try:
        entry = read_sidecar(path)
        check_sum(path, entry["bytes"], entry["sha256"])
        return True
    except DmfError as error:
        print(f"again     {error}", flush=True)
        return False


def write_shard(path: Path, parts: Iterable[tuple[np.ndarray, np.ndarray]], made_with: dict[str, str]) -> None:
    """Writes a shard under a hidden name, then renames it, then writes what vouches for it.

    parts: (values (n, 2, 2, h, w, c): image, flip, mean or std; labels (n,)). Raises DmfError if the disk refuses; then, and
    if `parts` raise, nothing stays behind.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = _partial(path)
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
            entry = {"count": len(labels), "bytes": partial.stat().st_size, "sha256": sha256(partial)}
            partial.replace(path)
            _sync(path.parent)
        entry |= {"made_with": made_with, "labels": labels}
        write_json(_sidecar(path), {**entry, "seal": _seal(entry)}, indent=None)
    finally:
        partial.unlink(missing_ok=True)


def _seal(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


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
    partial = _partial(path)
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
            for row, record in zip(rows, self._read(shard, records[rows] % self._per_shard), strict=True):
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
            raise DmfError(f"{path} is damaged ({why}): the encoding's command makes it again") from error
        size = int(np.prod(self._shape)) * self._dtype.itemsize
        bad = [p for p, record in zip(positions, found, strict=True) if len(record) != size]
        if bad:
            raise DmfError(f"{path}: record {bad[0]} has not the {size:,} bytes of {self._dtype.name}{list(self._shape)}")
        return found

    def _reader(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        if shard not in self._readers:
            reader = ArrayRecordReader(str(self._paths[shard]), "readahead_buffer_size:0,max_parallelism:0")
            if not reader.ok() or reader.num_records() != self._counts[shard]:
                raise DmfError(
                    f"{self._paths[shard]} holds {reader.num_records()} readable records, expected {self._counts[shard]}: "
                    "the encoding's command makes it again"
                )
            self._readers[shard] = reader
        return self._readers[shard]
