"""Reference statistics: what samples are held against, read from every public format and written in one of ours.

Public files say nothing of how they were made; ours does: feature space, resize, scaling, the network's SHA-256, data set,
split and number of images. What a file does not say is "unknown", and is for the caller to print, not to guess.

Files are read by hand, not by numpy.load: nothing is unpickled, and no array takes more memory than its file accounts for.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from dmf.errors import DmfError
from dmf.evaluation.protocols import Protocol
from dmf.metrics.frechet import Moments, check_features, moments
from dmf.storage import atomic

UNKNOWN = "unknown"
OWN_FORMAT = "dmf"
RECORD = ("space", "resize", "scaling", "network_sha256", "dataset", "split", "count")
EXPECTED = "mu and sigma, ref_mu and ref_sigma, reps, feats or arr_0"
EDM2_SECTIONS = {"inception": "fid", "dinov2": "fd_dinov2"}
NEEDS = {
    "fid": "pool",
    "sfid": "spatial",
    "kid": "features",
    "precision_recall": "features",
}  # IS takes no reference
# clean-fid's files tell their mode in their name alone: <dataset>_<mode>_<split>_<size>.npz
CLEAN_FID_MODES = {
    "clean": ("bicubic_clean", "bytes"),
    "legacy_tensorflow": ("tf1_bilinear", "bytes"),
    "legacy_pytorch": ("bilinear", "unit"),
}
CLEAN_FID = re.compile(
    rf"(.+)_({'|'.join(CLEAN_FID_MODES)})_(train|test|trainfull|val|custom)_(?:\d+|na)(?:_kid)?\.npz"
)

MAX_READ = (
    2**24
)  # bytes that zipfile may ask for at once: it would read a table of contents of any announced size
MAX_PIECE = 2**20  # bytes of an array read at once
MAX_UNPACKED = 2**26  # bytes of an array that may be packed to next to nothing
MAX_RATIO = 200  # of the packed bytes of a larger one; images and moments do not come near it
ASYMMETRY = 1e-6  # of the largest entry: float32 sums leave 1e-7
NEGATIVE = 1e-5  # of the covariance's norm: float32 entries shift eigenvalues by 1e-6
ODD = (
    ArithmeticError,
    RuntimeError,
    TypeError,
    ValueError,
)  # of sizes, flags and names made to hurt
BROKEN = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    *ODD,
)
HEADER = re.compile(
    r"\{'descr': (.+), 'fortran_order': (True|False), 'shape': \(([0-9L, ]*)\),? ?\} *\n"
)


@dataclass(frozen=True)
class Reference:
    """What samples are held against.

    moments: of "pool" and, for sFID, of "spatial" features; their n is 0 where the file does not tell.
    features (M, D): pool features, for KID, precision and recall. images (M, H, W, C) uint8: to be made features of.
    about: file, sha256 and format of the file, made_from where ours names its source, and every name of `RECORD`.
    """

    moments: dict[str, Moments]
    features: np.ndarray | None = None
    images: np.ndarray | None = None
    about: dict[str, str | int] = field(default_factory=dict)


def read(path: str | Path, space: str = "inception", images: bool = True) -> Reference:
    """Reference statistics in any public format, told by content; raises DmfError, in one line, for whatever is none.

    Ours; guided-diffusion's batches (mu, sigma, mu_s, sigma_s, arr_0; or arr_0 alone); mu and sigma of EDM, pytorch-fid and
    clean-fid; ref_mu and ref_sigma of MeanFlow; reps of dgm-eval and feats of clean-fid, which are features; EDM2's pickle.

    space: "inception" or "dinov2", which part of an EDM2 file. images: False leaves arr_0, which can take gigabytes, unread.
    """
    place = Path(path)
    if not place.is_file():
        what = "is no regular file" if place.exists() else "no such file"
        raise _bad(path, f"{what}; expected reference statistics, an .npz or .pkl")
    from dmf.storage.readers.read import LOOKS, sha256

    try:
        with open(place, "rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise _bad(
            path, f"cannot be read ({error.strerror}); expected reference statistics"
        ) from error
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        found = _read_npz(place, images)
    elif head[:1] == b"\x80":
        found = _read_edm2(place, space)
    else:
        looks = [f"looks like {text}" for pattern, text in LOOKS if re.match(pattern, head)]
        raise _bad(
            path,
            f"{(looks or ['is of no known format'])[0]}; expected reference statistics, an .npz or .pkl",
        )
    about = {
        **dict.fromkeys(RECORD, UNKNOWN),
        **found.about,
        "file": place.name,
        "sha256": sha256(place),
    }
    return Reference(found.moments, found.features, found.images, about)


def write(path: str | Path, reference: Reference) -> None:
    """Writes moments, features and record as one .npz, under a temporary name first; `read` gives them back bit for bit.

    Keys: mu (D,), sigma (D, D) and, where there are any, mu_s, sigma_s, features; about, the record as JSON text. Equal
    references make equal files. Raises DmfError where there are no moments, for images, which have to be made features
    first, for moments that `read` would refuse, and where the disk does.
    """
    pool, spatial = (reference.moments.get(kind) for kind in ("pool", "spatial"))
    if pool is None or reference.images is not None:
        what = "has no moments of pool features" if pool is None else "holds images"
        raise _bad(
            path, f"the reference {what}; expected moments, and features in the place of images"
        )
    if spatial is not None and spatial.n != pool.n:
        raise _bad(
            path,
            f"moments of {pool.n} pool and {spatial.n} spatial features; expected those of the same images",
        )
    arrays: dict[str, np.ndarray] = {}
    for end, part in {"": pool, **({} if spatial is None else {"_s": spatial})}.items():
        _, *found = _checked_moments(path, f"mu{end}", part.mean, f"sigma{end}", part.cov)
        arrays |= dict(zip((f"mu{end}", f"sigma{end}"), found, strict=True))
    if reference.features is not None:
        arrays["features"] = _checked_features(path, "features", reference.features)
    arrays["about"] = np.array(json.dumps(_record(path, reference.about, pool.n), sort_keys=True))
    if (place := Path(path)).is_dir():
        raise _bad(path, "is a folder; expected the name of a file")
    try:
        with atomic.made(place) as partial, open(partial, "wb") as stream:
            _write_npz(stream, arrays)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise _bad(
            path, f"cannot be written ({error.strerror}); expected a folder with room"
        ) from error


def check(
    reference: Reference, protocol: Protocol, network_sha256: str, dims: Mapping[str, int]
) -> None:
    """Raises DmfError where the reference's own record contradicts the protocol or the network; "unknown" contradicts nothing.

    network_sha256: of the file the features of the samples will come from. dims: {"pool": D, "spatial": D} of the space.
    """
    about, name = reference.about, reference.about.get("file", "the reference")
    keys = (
        ("space", "scaling") if protocol.space == "pixels" else ("space", "resize", "scaling")
    )  # pixels are not resized
    wanted = {key: (getattr(protocol, key), f"protocol {protocol.name}") for key in keys}
    wanted["network_sha256"] = (network_sha256, "the network in use")
    if protocol.reference_count:
        wanted["count"] = (protocol.reference_count, f"protocol {protocol.name}")
    for key, (value, who) in wanted.items():
        if (found := about.get(key, UNKNOWN)) not in (UNKNOWN, value):
            raise _bad(
                name, f"was made with {key} = {found}; {who} has {key} = {value}: expected the same"
            )
    sizes = {kind: found.mean.size for kind, found in reference.moments.items()}
    if reference.features is not None:
        sizes["features"] = reference.features.shape[1]
    for kind, size in sizes.items():
        if size != (expected := dims.get("pool" if kind == "features" else kind, size)):
            raise _bad(
                name,
                f"has {kind} of {size} dimensions; expected the {expected} of space {protocol.space}",
            )


def unknown(reference: Reference) -> list[str]:
    """The names of `RECORD` that the reference does not tell."""
    return [key for key in RECORD if reference.about.get(key, UNKNOWN) == UNKNOWN]


def unserved(reference: Reference, metrics: tuple[str, ...]) -> list[str]:
    """Those of the metrics that the reference holds no moments, features or images for."""
    if reference.images is not None:
        return []
    held = {*reference.moments, *(["features"] if reference.features is not None else [])}
    return [metric for metric in metrics if metric in NEEDS and NEEDS[metric] not in held]


def _bad(path: str | Path | int, text: str) -> DmfError:
    return DmfError("".join(c if c.isprintable() else "?" for c in f"{path}: {text}"))


def _record(path: str | Path, about: Mapping[str, str | int], count: int) -> dict[str, str | int]:
    """What our file says of itself: the record, and the public file it was made from."""
    kept = {key: value for key, value in about.items() if key not in ("file", "sha256", "format")}
    if "made_from" not in kept and "sha256" in about and about.get("format") != OWN_FORMAT:
        kept["made_from"] = (
            f"{about.get('file', UNKNOWN)}, {about.get('format', UNKNOWN)}, SHA-256 {about['sha256']}"
        )
    if count:
        if kept.get("count", count) not in (UNKNOWN, count):
            raise _bad(
                path, f"about.count = {kept['count']} of moments of {count} rows; expected the same"
            )
        kept["count"] = count
    return _checked_record(path, {**dict.fromkeys(RECORD, UNKNOWN), **kept})


def _checked_record(path: str | Path, record: Any) -> dict[str, str | int]:
    good = isinstance(record, dict) and all(
        isinstance(key, str) and type(v) in (str, int) for key, v in record.items()
    )
    if not good or not (
        record.get("count", UNKNOWN) == UNKNOWN
        or type(record["count"]) is int
        and record["count"] > 1
    ):
        raise _bad(
            path,
            "about is no record; expected a map of texts and numbers, with a count of at least 2",
        )
    return record


def _checked_moments(
    path: str | Path, mu: str, mean: np.ndarray, sigma: str, cov: np.ndarray, n: int = 0
) -> Moments:
    mean, cov = (np.asarray(x, np.float64, order="C") for x in (mean, cov))
    if mean.ndim != 1 or not mean.size or cov.shape != 2 * mean.shape:
        raise _bad(
            path, f"{mu} has shape {mean.shape} and {sigma} {cov.shape}; expected (D,) and (D, D)"
        )
    for name, values in ((mu, mean), (sigma, cov)):
        if bad := values.size - int(np.isfinite(values).sum()):
            raise _bad(path, f"{name} has {bad} NaN or infinite values; expected finite numbers")
    largest = np.abs(cov).max()
    if (gap := np.abs(cov - cov.T).max()) > ASYMMETRY * largest:
        raise _bad(
            path,
            f"{sigma} is asymmetric by {gap:.3g} where its largest entry is {largest:.3g}; expected a covariance",
        )
    if (least := np.diagonal(cov).min()) < 0:
        raise _bad(
            path, f"{sigma} has the variance {least:.3g} on its diagonal; expected a covariance"
        )
    shift = (
        NEGATIVE * np.linalg.norm(cov) + np.finfo(np.float64).tiny
    )  # a singular covariance is one, and so is zero
    try:
        np.linalg.cholesky(cov + shift * np.eye(len(cov)))
    except np.linalg.LinAlgError as error:
        least = np.linalg.eigvalsh(cov)[0]
        raise _bad(
            path, f"{sigma} has the negative eigenvalue {least:.3g}; expected a covariance"
        ) from error
    return Moments(n, mean, cov)


def _checked_features(path: str | Path, name: str, features: np.ndarray) -> np.ndarray:
    if features.dtype not in (np.float32, np.float64):
        features = features.astype(np.float32)
    check_features(features, f"{path}: {name}", min_rows=2)
    return features


def _read_edm2(path: Path, space: str) -> Reference:
    """One section of EDM2's pickle: {"num_images": N, "fid": {"mu", "sigma"}, "fd_dinov2": {"mu", "sigma"}}."""
    from dmf.storage.readers.read import Tensor, open_file

    tree = open_file(path).tree
    if space not in EDM2_SECTIONS:
        raise _bad(
            path,
            f"is EDM2's, which has no features of space {space}; expected {' or '.join(EDM2_SECTIONS)}",
        )
    section = EDM2_SECTIONS[space]
    match tree.get(section) if isinstance(tree, dict) else None:
        case {"mu": Tensor() as mu, "sigma": Tensor() as sigma} if {
            mu.dtype.kind,
            sigma.dtype.kind,
        } == {"f"}:
            count = tree.get("num_images", UNKNOWN)
            about = _checked_record(path, {"format": "EDM2 pickle", "space": space, "count": count})
            n = count if isinstance(count, int) else 0
            part = _checked_moments(
                path, f"{section}.mu", mu.read(), f"{section}.sigma", sigma.read(), n
            )
            return Reference({"pool": part}, about=about)
        case {"mu": _, "sigma": _}:
            raise _bad(
                path,
                f"{section} holds no plain arrays; expected NumPy's, row-major, of pickle protocol 4 or less",
            )
    keys = (
        ", ".join(str(key)[:40] for key in list(tree)[:8])
        if isinstance(tree, dict)
        else type(tree).__name__
    )
    raise _bad(path, f"has {keys or 'nothing'}; expected {section} with mu and sigma")


def _read_npz(path: Path, with_images: bool) -> Reference:
    with _Npz.open(path) as npz:
        if "about" in npz.members:
            return _read_own(npz)
        if {"mu", "sigma"} <= npz.members.keys():
            return _read_moments(npz, with_images)
        if {"ref_mu", "ref_sigma"} <= npz.members.keys():
            return Reference(
                {"pool": npz.moments("ref_mu", "ref_sigma")}, about={"format": "MeanFlow npz"}
            )
        for key, name in (("reps", "dgm-eval npz"), ("feats", "clean-fid npz")):
            if key in npz.members:
                features = _checked_features(path, key, npz.array(key, "f"))
                about = {**_of_clean_fid(path), "format": name, "count": len(features)}
                return Reference({"pool": moments(features)}, features, about=about)
        if "arr_0" in npz.members:
            return Reference(
                {}, images=npz.images() if with_images else None, about={"format": "ADM npz"}
            )
        keys = ", ".join(sorted(npz.members)[:8])
        raise _bad(path, f"has {keys or 'nothing'}; expected {EXPECTED}")


def _read_own(npz: _Npz) -> Reference:
    text = npz.array("about", "U")
    try:
        record = _checked_record(npz.path, json.loads(text.item() if text.ndim == 0 else "[]"))
    except (ValueError, RecursionError) as error:
        raise _bad(
            npz.path, f"about is no JSON ({error}); expected the record of a reference"
        ) from error
    n = record["count"] if isinstance(record.get("count"), int) else 0
    found = {"pool": npz.moments("mu", "sigma", int(n))}
    if {"mu_s", "sigma_s"} & npz.members.keys():
        found["spatial"] = npz.moments("mu_s", "sigma_s", int(n))
    features = (
        _checked_features(npz.path, "features", npz.array("features", "f"))
        if "features" in npz.members
        else None
    )
    return Reference(found, features, about={**record, "format": OWN_FORMAT})


def _read_moments(npz: _Npz, with_images: bool) -> Reference:
    found = {"pool": npz.moments("mu", "sigma")}
    if not {"mu_s", "sigma_s", "arr_0"} & npz.members.keys():
        return Reference(found, about={**_of_clean_fid(npz.path), "format": "mu/sigma npz"})
    if {"mu_s", "sigma_s"} & npz.members.keys():
        found["spatial"] = npz.moments("mu_s", "sigma_s")
    images = npz.images() if with_images and "arr_0" in npz.members else None
    return Reference(found, images=images, about={"format": "ADM npz"})


def _of_clean_fid(path: Path) -> dict[str, str | int]:
    """What clean-fid's names of files tell; nothing for other names."""
    if not (found := CLEAN_FID.fullmatch(path.name)):
        return {}
    dataset, mode, split = found.groups()
    resize, scaling = CLEAN_FID_MODES[mode]
    return {
        "space": "inception",
        "resize": resize,
        "scaling": scaling,
        "dataset": dataset,
        "split": split,
    }


class _Bounded(io.BufferedReader):
    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_READ:
            raise zipfile.BadZipFile(f"{size} bytes in one piece")
        return super().read(size)


@dataclass(frozen=True)
class _Npz:
    """The arrays of an .npz by their names, read one by one."""

    path: Path
    size: int
    archive: zipfile.ZipFile
    members: dict[str, zipfile.ZipInfo]

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[_Npz]:
        """Raises DmfError where the table of contents is cut off, damaged or ambiguous."""
        with contextlib.ExitStack() as stack:
            with _whole(path, "its table of contents"):
                stream = stack.enter_context(_Bounded(io.FileIO(path)))
                archive = stack.enter_context(zipfile.ZipFile(stream))
            members: dict[str, zipfile.ZipInfo] = {}
            for info in archive.infolist():
                if members.setdefault(info.filename.removesuffix(".npy"), info) is not info:
                    raise _bad(path, f"holds {info.filename[:40]} twice; expected each array once")
            yield cls(path, os.fstat(stream.fileno()).st_size, archive, members)

    def moments(self, mu: str, sigma: str, n: int = 0) -> Moments:
        """The moments of two arrays."""
        return _checked_moments(
            self.path, mu, self.array(mu, "f"), sigma, self.array(sigma, "f"), n
        )

    def images(self) -> np.ndarray:
        """The array arr_0 as images (N, H, W, C)."""
        images = self.array("arr_0", "u")
        if (
            images.ndim != 4
            or images.shape[3] not in (1, 3)
            or images.dtype != np.uint8
            or not images.size
        ):
            raise _bad(
                self.path,
                f"arr_0 is {images.dtype} of shape {images.shape}; expected images, uint8 (N, H, W, 3)",
            )
        return images

    def array(self, name: str, kind: str) -> np.ndarray:
        """An array whose type is of a NumPy kind; no more memory than its member of the archive accounts for."""
        if name not in self.members:
            raise _bad(
                self.path,
                f"has {', '.join(sorted(self.members)[:8])} but not {name}; expected {name} too",
            )
        info = self.members[name]
        packed = min(info.compress_size, self.size)
        if (
            info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            or info.flag_bits & 1
        ):
            raise _bad(
                self.path,
                f"{name} is encrypted or packed in another way than NumPy's; expected plain or deflated",
            )
        if info.file_size > (
            packed
            if info.compress_type == zipfile.ZIP_STORED
            else max(MAX_UNPACKED, MAX_RATIO * packed)
        ):
            raise _bad(
                self.path,
                f"{name} announces {info.file_size} bytes, packed in {packed}; refused, expected a real array",
            )
        with _whole(self.path, name), self.archive.open(info) as stream:
            shape, fortran, dtype = self._header(name, stream, kind)
            held = info.file_size - stream.tell()
            if math.prod(shape) * dtype.itemsize != held:
                raise _bad(
                    self.path,
                    f"{name} declares shape {shape} of {dtype} but holds {held} bytes; expected a whole array",
                )
            array = np.frombuffer(_bytes(stream, held), dtype)
            return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)

    def _header(
        self, name: str, stream: IO[bytes], kind: str
    ) -> tuple[tuple[int, ...], bool, np.dtype]:
        """(shape, whether in Fortran's order, type). Matched and not evaluated, as numpy.load would."""
        start = stream.read(10)
        header = stream.read(int.from_bytes(start[8:], "little")).decode("latin1")
        if start[:8] != b"\x93NUMPY\x01\0" or not (found := HEADER.fullmatch(header)):
            raise _bad(
                self.path,
                f"{name} has no header of version 1.0; expected the array that numpy.savez writes",
            )
        descr, order, sizes = found.groups()
        if not re.fullmatch(f"'[<>|]{kind}[0-9]+'", descr):
            wanted = {"f": "floats", "u": "bytes", "U": "text"}[kind]
            raise _bad(
                self.path,
                f"{name} has type {descr[:40]}; expected {wanted}; objects are never read",
            )
        return (
            tuple(int(size) for size in re.findall("[0-9]+", sizes)),
            order == "True",
            np.dtype(descr[1:-1]),
        )


@contextlib.contextmanager
def _whole(path: Path, name: str) -> Iterator[None]:
    """What zipfile and NumPy raise for damaged files, in one line."""
    try:
        yield
    except BROKEN as error:
        raise _bad(
            path,
            f"{name} cannot be read ({error}); expected a whole .npz (is it cut off or damaged?)",
        ) from error


def _bytes(stream: IO[bytes], size: int) -> np.ndarray:
    """All of a stream of known size, piece by piece; its checksum is compared when it ends."""
    raw, got = np.empty(size, np.uint8), 0
    while piece := stream.read(MAX_PIECE):
        if got + len(piece) > size:
            raise ValueError(f"goes on after {size} bytes")
        raw[got : got + len(piece)] = np.frombuffer(piece, np.uint8)
        got += len(piece)
    if got < size:
        raise EOFError(f"ends after {got} of {size} bytes")
    return raw


def _write_npz(stream: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in arrays.items():
            with archive.open(
                zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True
            ) as member:  # dated 1980, as savez does
                np.lib.format.write_array(
                    member, np.asarray(array, order="C"), (1, 0), allow_pickle=False
                )
