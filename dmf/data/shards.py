"""The files of encoded images: how they are written so that a kill harms nothing, and read.

    DIR/train/plan.json                            what the values depend on; written first
    DIR/train/latents-00012-of-00313.array_record  per image and mirror image: mean, std (h, w, c)
    DIR/train/latents-00012-of-00313.json          count, size, SHA-256 and labels of that shard
    DIR/train/labels.npy                           (N,) int32
    DIR/train/metadata.json                        the plan, all sizes and SHA-256; written last
    DIR/heldout/...                                likewise

Record 2 i is image i, and record 2 i + 1 its mirror image. The mirror image is encoded too, as a
mirrored latent is not the latent of the mirrored image. Values are *unscaled* latents
(`dmf.networks.frozen.vae`), little-endian, in the dtype of the metadata. Shard k holds the images
[k S, (k + 1) S).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dmf.data.metadata import (  # noqa: F401 - some are here for `dmf.convert.encode` alone
    DTYPES,
    FORMAT,
    LABELS,
    METADATA,
    PLAN,
    files,
    metadata,
    name,
    seal_of,
    sealed,
)
from dmf.errors import DmfError
from dmf.storage import atomic
from dmf.storage.paths import sha256

READERS = 8  # threads: a batch's records lie in many shards, and storage answers them at once
# Plain bytes: zstd shrinks float32 latents by 7 %, reads them three times slower, and gives other
# bytes in another version.
WRITER = "group_size:1,uncompressed"
# What a system says where it cannot open a file that may be whole. A missing file is not here.
REFUSALS = tuple(
    os.strerror(e)
    for e in (errno.EMFILE, errno.ENFILE, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE)
)


def sidecar(path: Path) -> Path:
    """The .json beside a shard."""
    return path.with_suffix(".json")


def check_size(path: Path, size: int) -> None:
    """Raises DmfError where a file is missing or has another size; a broken copy shows so."""
    with _reading(path):
        found = path.stat().st_size if path.is_file() else None
    if found != size:
        what = "is missing" if found is None else f"has {found:,} bytes"
        raise DmfError(
            f"{path} {what}: expected {size:,} bytes; the encoding's command makes it again"
        )


def check_sum(path: Path, size: int, digest: str) -> None:
    """Raises DmfError where a file has other bytes than the metadata say; reads all of it."""
    check_size(path, size)
    with _reading(path):
        found = sha256(path)
    if found != digest:
        raise DmfError(
            f"{path} has another SHA-256 than {digest[:12]}...: its bytes were altered; the "
            "command makes it again"
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
    """The facts about the shard `path`: count, bytes, sha256, made_with, images, labels.

    Raises DmfError if they are damaged.
    """
    try:
        entry = json.loads(sidecar(path).read_text())
        if entry.pop("seal") != seal_of(entry):
            raise ValueError("its bytes were altered")
        return entry
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DmfError(
            f"{sidecar(path)} cannot be read ({type(error).__name__}: {error}); the command makes "
            "it again"
        ) from error


def begun(folder: Path) -> list[Path]:
    """The shards in a folder that have a .json beside them, in the order of their names."""
    return sorted(path.with_suffix(".array_record") for path in folder.glob("latents-*.json"))


def write_shard(
    path: Path,
    parts: Iterable[tuple[np.ndarray, np.ndarray]],
    made_with: dict[str, str],
    images: str,
) -> None:
    """Writes a shard under a hidden name, renames it, and then writes its .json.

    parts: (values (n, 2, 2, h, w, c): image, flip, mean or std; labels (n,)). images: their
    identity. Raises DmfError if the disk refuses. Then, and where `parts` raises, nothing is left.
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
            atomic.sync(partial)
            entry = {
                "count": len(labels),
                "bytes": partial.stat().st_size,
                "sha256": sha256(partial),
            }
            partial.replace(path)
            atomic.sync(path.parent)
        entry |= {"made_with": made_with, "images": images, "labels": labels}
        write_json(sidecar(path), sealed(entry), indent=None)
    finally:
        partial.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Removes half-written files of this process and of dead processes of this machine.

    Raises DmfError if the disk refuses.
    """
    with writing(folder):
        atomic.clear(folder)


def remove(path: Path) -> None:
    """Removes a file that may be missing. Raises DmfError if the disk refuses."""
    with writing(path.parent):
        path.unlink(missing_ok=True)


def refused(error: Exception) -> bool:
    """Whether the system refuses the file, so that the file itself may be whole."""
    return (
        isinstance(error, OSError)
        and error.errno is not None
        or any(text in str(error) for text in REFUSALS)
    )


def allow_many_files() -> None:
    """Raises this process's limit of open files to the highest: every shard stays open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # the reader will name a file it cannot open
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses into one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises the latter
        why = " ".join(str(error).split())[:200]
        raise DmfError(
            f"{folder} cannot be written ({why}): expected a writable directory with room; "
            "finished shards are kept, and the same command goes on"
        ) from error


def write_json(path: Path, values: dict[str, Any], indent: int | None = 1) -> None:
    """Writes plain values, whole or not at all."""
    write(path, (json.dumps(values, indent=indent) + "\n").encode())


def write(path: Path, content: bytes) -> None:
    """Writes a small file, whole or not at all. Raises DmfError if the disk refuses."""
    with writing(path.parent):
        atomic.write(path, content, durable=True)


class Shards:
    """Random access to the records of all shards. A file opens at its first use and stays open."""

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
        """The records (n,) of the whole split as (n, 2, h, w, c) in the stored dtype.

        Raises DmfError naming a damaged file.
        """
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
                    f"{path} cannot be read ({why}): expected a readable file, and room for open "
                    "files"
                ) from error
            raise DmfError(
                f"{path} is damaged ({why}): the encoding's command makes it again"
            ) from error
        size = int(np.prod(self._shape)) * self._dtype.itemsize
        bad = [p for p, record in zip(positions, found, strict=True) if len(record) != size]
        if bad:
            raise DmfError(
                f"{path}: record {bad[0]} has not the {size:,} bytes of "
                f"{self._dtype.name}{list(self._shape)}"
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
                    f"{self._paths[shard]} holds {reader.num_records()} readable records, expected "
                    f"{self._counts[shard]}: the encoding's command makes it again"
                )
            self._readers[shard] = reader
        return self._readers[shard]
