"""Files in shards: how they are written so that a kill harms nothing, and read.

Encoded images:

    DIR/train/plan.json                            what the values depend on; written first
    DIR/train/latents-00012-of-00313.array_record  per image and mirror image: mean, std (h, w, c)
    DIR/train/latents-00012-of-00313.json          count, size, SHA-256 and labels of that shard
    DIR/train/labels.npy                           (N,) int32
    DIR/train/metadata.json                        the plan, all sizes and SHA-256; written last
    DIR/heldout/...                                likewise

Pairs of noise and sample, `pairs-...` in the place of `latents-...`, stand likewise in DIR, with
kept.npy (n,) int32: the numbers of the pairs that training reads.

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
from typing import Any, NamedTuple

import numpy as np

from dmf.errors import DmfError
from dmf.storage import atomic, records
from dmf.storage.paths import sha256
from dmf.storage.records import ANY, COUNT, POSITIVE, Is, Maybe

FORMAT = 1
PLAN, METADATA, LABELS, KEPT = "plan.json", "metadata.json", "labels.npy", "kept.npy"
DTYPES = {"float32": "<f4", "float16": "<f2"}
AGAIN = "what the command wrote there; the command makes it again"
ENTRY = {"name": str, "sha256": str, "bytes": COUNT}  # a file
SHAPE = Is(
    "three whole numbers above 0",
    lambda x: type(x) is list and len(x) == 3 and all(map(POSITIVE.test, x)),
)
# What both kinds of shards say of themselves, besides their format.
BOTH = {
    "count": POSITIVE,
    "num_classes": COUNT,
    "dtype": Is(f"one of {', '.join(DTYPES)}", lambda x: type(x) is str and x in DTYPES),
    "shard_size": POSITIVE,
    "shards": Is("a list of files", lambda x: records.fits(x, [ENTRY | {"count": POSITIVE}])),
    "labels": Is(f"the file {LABELS}", lambda x: records.fits(x, ENTRY) and x["name"] == LABELS),
}
FORM = BOTH | {
    "latent_shape": SHAPE,
    "scale": Is("a finite number above 0", lambda x: records.fits(x, float) and x > 0),
    "shift": Maybe(float),
    "classes": Maybe([str]),
    "source": dict,
    "vae": dict,
}
PAIR_FORM = BOTH | {
    "image_shape": SHAPE,
    "noise": Is("stored or redrawn", lambda x: x in ("stored", "redrawn")),
    "seed": COUNT,
    "kept": Is(f"the file {KEPT}", lambda x: records.fits(x, ENTRY) and x["name"] == KEPT),
    "truncation": {"kept": POSITIVE, "largest": float, ...: ANY},
    "weights": dict,
    "data": dict,
    "sampler": str,
    "steps": POSITIVE,
}
SHARD = {  # what stands beside a shard
    "count": POSITIVE,
    "bytes": COUNT,
    "sha256": str,
    "made_with": dict,
    "images": str,
    "labels": [COUNT],
    "distances": Maybe([float]),  # of pairs: mean (e - x)^2
    records.SEAL: str,
}


class Kind(NamedTuple):
    """What tells encoded images from pairs."""

    stem: str  # start of a shard's name
    mode: str  # the command
    what: str
    done: str
    form: dict[Any, Any]  # of the metadata
    copies: int  # records per image or pair

    @property
    def how(self) -> str:
        """What is expected where the files are no whole set."""
        verb = f"what `--mode={self.mode}` has written to its end"
        return f"{verb}; the same command goes on where it stopped"


ENCODED = Kind("latents", "encode", "encoded images", "encoded", FORM, 2)
PAIRS = Kind("pairs", "pairs", "pairs", "written", PAIR_FORM, 1)

READERS = 8  # threads: a batch's records lie in many shards, and storage answers them at once
# Plain bytes: zstd shrinks float32 latents by 7 %, reads them three times slower, and gives other
# bytes in another version.
WRITER = "group_size:1,uncompressed"
# What a system says where it cannot open a file that may be whole. A missing file is not here.
REFUSALS = tuple(
    os.strerror(e)
    for e in (errno.EMFILE, errno.ENFILE, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE)
)


def name(shard: int, shards: int, stem: str = ENCODED.stem) -> str:
    """File name of a shard."""
    return f"{stem}-{shard:05}-of-{shards:05}.array_record"


def metadata(folder: Path, kind: Kind = ENCODED) -> dict[str, Any]:
    """The metadata of an encoded split or of pairs, without the seal.

    Raises DmfError where they are missing, damaged or of another version.
    """
    path = folder / METADATA
    if not os.path.isfile(path):
        begun = os.path.isfile(folder / PLAN)
        what = f"is not {kind.done} to its end" if begun else f"holds no {kind.what}"
        raise DmfError(f"{folder} {what} (no {METADATA}): expected {kind.how}")
    found = records.read(path, {"format": int, records.SEAL: str}, kind.how)
    if found["format"] != FORMAT:
        raise DmfError(
            f"{path}: format is {found['format']}, expected {FORMAT}, the format of this version"
        )
    unsealed = records.unsealed(found, str(path), kind.how)
    records.check(unsealed, kind.form, str(path))
    _check_shards(path, unsealed, kind.stem)
    return unsealed


def _check_shards(path: Path, found: dict[str, Any], stem: str) -> None:
    """Raises DmfError where names and counts of the shards are not those of so many images."""
    size, count = found["shard_size"], found["count"]
    total = -(-count // size)
    if len(found["shards"]) != total:  # before a list of as many is made
        raise DmfError(
            f"{path}: {len(found['shards'])} shards, expected {total} of {size} images for count "
            f"{count}"
        )
    for k, entry in enumerate(found["shards"]):
        wanted = {"name": name(k, total, stem), "count": min(size, count - k * size)}
        if {key: entry[key] for key in wanted} != wanted:
            raise DmfError(
                f"{path}: shard {k} is {entry['name']!r:.100} of {entry['count']} images, expected "
                f"{wanted}"
            )


def files(about: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
    """(name, bytes, SHA-256) of every file that the metadata list."""
    kept = [about["kept"]] if "kept" in about else []
    for entry in (about["labels"], *kept, *about["shards"]):
        yield entry["name"], entry["bytes"], entry["sha256"]


def sidecar(path: Path) -> Path:
    """The .json beside a shard."""
    return path.with_suffix(".json")


def check_size(path: Path, size: int) -> None:
    """Raises DmfError where a file is missing or has another size; a broken copy shows so."""
    with _reading(path):
        found = path.stat().st_size if path.is_file() else None
    if found != size:
        what = "is missing" if found is None else f"has {found:,} bytes"
        raise DmfError(f"{path} {what}: expected {size:,} bytes; the command makes it again")


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
    beside = sidecar(path)
    return records.unsealed(records.read(beside, SHARD, AGAIN), str(beside), AGAIN)


def begun(folder: Path) -> list[Path]:
    """The shards in a folder that have a .json beside them, in the order of their names."""
    return sorted(path.with_suffix(".array_record") for path in folder.glob("*-of-*.json"))


def write_shard(
    path: Path,
    parts: Iterable[tuple[np.ndarray, dict[str, np.ndarray]]],
    made_with: dict[str, str],
    images: str,
) -> None:
    """Writes a shard under a hidden name, renames it, and then writes its .json.

    parts: (values; labels, and of pairs distances, each (n,)). Values of images are
    (n, 2, 2, h, w, c): image, flip, mean or std. Values of pairs are (n, 1, k, h, w, c): the noise
    if it is stored, then the sample.

    images: their identity. Raises DmfError if the disk refuses.
    Then, and where `parts` raises, nothing is left.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = atomic.partial(path)
    facts: dict[str, list[Any]] = {"labels": []}
    try:
        with writing(path.parent):
            writer = ArrayRecordWriter(str(partial), WRITER)
        for values, some in parts:
            with writing(path.parent):
                for record in values.reshape(-1, *values.shape[2:]):
                    writer.write(record.tobytes())
            for key, found in some.items():
                facts.setdefault(key, []).extend(found.tolist())
        with writing(path.parent):
            writer.close()
            atomic.sync(partial)
            entry = {
                "count": len(facts["labels"]),
                "bytes": partial.stat().st_size,
                "sha256": sha256(partial),
            }
            partial.replace(path)
            atomic.sync(path.parent)
        entry |= {"made_with": made_with, "images": images, **facts}
        write_json(sidecar(path), records.sealed(entry), indent=None)
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

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        kind: Kind = ENCODED,
        shape: tuple[int, ...] = (),
    ):
        """shape: of a record, () for the mean and std of encoded images."""
        allow_many_files()
        self._paths = [folder / entry["name"] for entry in about["shards"]]
        self._counts = [kind.copies * entry["count"] for entry in about["shards"]]
        self._per_shard = kind.copies * about["shard_size"]
        self._dtype = np.dtype(DTYPES[about["dtype"]])
        self._shape = shape or (2, *about["latent_shape"])
        self._readers: dict[int, Any] = {}
        self._locks = [threading.Lock() for _ in self._paths]
        self._pool = ThreadPoolExecutor(READERS, "shards")

    def fetch(self, records: np.ndarray) -> np.ndarray:
        """The records (n,) of the whole split as (n, ...) in the stored dtype.

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
            raise DmfError(f"{path} is damaged ({why}): the command makes it again") from error
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
                    f"{self._counts[shard]}: the command makes it again"
                )
            self._readers[shard] = reader
        return self._readers[shard]
