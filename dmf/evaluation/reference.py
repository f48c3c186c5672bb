"""Reference statistics: what samples are compared with. Every public format is read, ours written.

Public files do not say how they were made. Ours says: feature space, resize, scaling, SHA-256 of
the network, data set, split and number of images. What a file does not say is "unknown"; the caller
prints it and does not guess.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dmf.evaluation.protocols import Protocol
from dmf.metrics.frechet import Moments, check_features, moments
from dmf.storage import atomic, paths, records
from dmf.storage.readers.npz import Npz, bad, write_npz

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
    rf"(.+)_({'|'.join(CLEAN_FID_MODES)})_(train|test|trainfull|val|custom)"
    r"_(?:\d+|na)(?:_kid)?\.npz"
)

ASYMMETRY = 1e-6  # relative to the largest entry: float32 sums leave 1e-7
NEGATIVE = 1e-5  # relative to the norm: float32 entries shift eigenvalues by 1e-6


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    moments: of "pool" and, for sFID, of "spatial" features. Their n is 0 where a file does not say.
    features: (M, D), pool features, for KID, precision and recall.
    images: (M, H, W, C) uint8, of which features have to be made.
    about: file, sha256 and format of the file, and every name of `RECORD`. A file of ours may name
        its source too, as made_from.
    """

    moments: dict[str, Moments]
    features: np.ndarray | None = None
    images: np.ndarray | None = None
    about: dict[str, str | int] = field(default_factory=dict)


def read(path: str | Path, space: str = "inception", images: bool = True) -> Reference:
    """Reference statistics in any public format, which the content tells.

    - .npz, ours
    - .npz of guided-diffusion: mu, sigma, mu_s, sigma_s and arr_0, or arr_0 alone
    - .npz of EDM, pytorch-fid and clean-fid: mu, sigma
    - .npz of MeanFlow: ref_mu, ref_sigma
    - .npz of dgm-eval: reps, and of clean-fid: feats; both are features
    - .pkl of EDM2

    space: "inception" or "dinov2", the part of an EDM2 file that is read.
    images: False leaves arr_0 unread, which can take gigabytes.
    Raises DmfError, in one line, for any other or damaged file.
    """
    place = paths.local(path, "of reference statistics")
    if not place.is_file():
        what = "is no regular file" if place.exists() else "no such file"
        raise bad(path, f"{what}; expected reference statistics, an .npz or .pkl")
    from dmf.storage.manifest import sha256_of_weights
    from dmf.storage.readers.read import LOOKS

    try:
        with open(place, "rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise bad(
            path, f"cannot be read ({error.strerror}); expected reference statistics"
        ) from error
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        found = _read_npz(place, images)
    elif head[:1] == b"\x80":
        found = _read_edm2(place, space)
    else:
        looks = [f"looks like {text}" for pattern, text in LOOKS if re.match(pattern, head)]
        what = (looks or ["is of no known format"])[0]
        raise bad(path, f"{what}; expected reference statistics, an .npz or .pkl")
    about = {
        **dict.fromkeys(RECORD, UNKNOWN),
        **found.about,
        "file": place.name,
        "sha256": sha256_of_weights(place),
    }
    return Reference(found.moments, found.features, found.images, about)


def write(path: str | Path, reference: Reference) -> None:
    """Writes moments, features and record as one .npz, whole or not at all.

    `read` gives them back bit for bit, and equal references make equal files.
    Keys: mu (D,), sigma (D, D), and about, the record as JSON text; mu_s, sigma_s and features
    where there are any.
    Raises DmfError where there are no moments, where there are images, for moments that `read`
    would refuse, and where the disk fails.
    """
    pool, spatial = (reference.moments.get(kind) for kind in ("pool", "spatial"))
    if pool is None or reference.images is not None:
        what = "has no moments of pool features" if pool is None else "holds images"
        raise bad(
            path, f"the reference {what}; expected moments, and features in the place of images"
        )
    if spatial is not None and spatial.n != pool.n:
        what = f"moments of {pool.n} pool and {spatial.n} spatial features"
        raise bad(path, f"{what}; expected those of the same images")
    arrays: dict[str, np.ndarray] = {}
    for end, part in {"": pool, **({} if spatial is None else {"_s": spatial})}.items():
        _, *found = _checked_moments(path, f"mu{end}", part.mean, f"sigma{end}", part.cov)
        arrays |= dict(zip((f"mu{end}", f"sigma{end}"), found, strict=True))
    if reference.features is not None:
        arrays["features"] = _checked_features(path, "features", reference.features)
    arrays["about"] = np.array(json.dumps(_record(path, reference.about, pool.n), sort_keys=True))
    if (place := Path(path)).is_dir():
        raise bad(path, "is a folder; expected the name of a file")
    try:
        with atomic.made(place) as partial, open(partial, "wb") as stream:
            write_npz(stream, arrays)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise bad(
            path, f"cannot be written ({error.strerror}); expected a folder with room"
        ) from error


def check(
    reference: Reference, protocol: Protocol, network_sha256: str, dims: Mapping[str, int]
) -> None:
    """Raises DmfError where the record of the reference contradicts the protocol or the network.

    "unknown" contradicts nothing.
    network_sha256: of the file that gives the features of the samples.
    dims: {"pool": D, "spatial": D} of the space.
    """
    about, name = reference.about, reference.about.get("file", "the reference")
    resized = () if protocol.space == "pixels" else ("resize",)
    keys = ("space", *resized, "scaling")
    wanted = {key: (getattr(protocol, key), f"protocol {protocol.name}") for key in keys}
    wanted["network_sha256"] = (network_sha256, "the network in use")
    if protocol.reference_count:
        wanted["count"] = (protocol.reference_count, f"protocol {protocol.name}")
    for key, (value, who) in wanted.items():
        if (found := about.get(key, UNKNOWN)) not in (UNKNOWN, value):
            raise bad(
                name, f"was made with {key} = {found}; {who} has {key} = {value}: expected the same"
            )
    sizes = {kind: found.mean.size for kind, found in reference.moments.items()}
    if reference.features is not None:
        sizes["features"] = reference.features.shape[1]
    for kind, size in sizes.items():
        if size != (expected := dims.get("pool" if kind == "features" else kind, size)):
            what = f"has {kind} of {size} dimensions"
            raise bad(name, f"{what}; expected the {expected} of space {protocol.space}")


def unknown(reference: Reference) -> list[str]:
    """The names of `RECORD` that the reference does not tell."""
    return [key for key in RECORD if reference.about.get(key, UNKNOWN) == UNKNOWN]


def unserved(reference: Reference, metrics: tuple[str, ...]) -> list[str]:
    """The metrics for which the reference holds no moments, features or images."""
    if reference.images is not None:
        return []
    held = {*reference.moments, *(["features"] if reference.features is not None else [])}
    return [metric for metric in metrics if metric in NEEDS and NEEDS[metric] not in held]


def _record(path: str | Path, about: Mapping[str, str | int], count: int) -> dict[str, str | int]:
    """What our file says about itself: the record, and the public file that it was made from."""
    kept = {key: value for key, value in about.items() if key not in ("file", "sha256", "format")}
    if "made_from" not in kept and "sha256" in about and about.get("format") != OWN_FORMAT:
        name, kind = (about.get(key, UNKNOWN) for key in ("file", "format"))
        kept["made_from"] = f"{name}, {kind}, SHA-256 {about['sha256']}"
    if count:
        if kept.get("count", count) not in (UNKNOWN, count):
            raise bad(
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
        raise bad(
            path,
            "about is no record; expected a map of texts and numbers, with a count of at least 2",
        )
    return record


def _checked_moments(
    path: str | Path, mu: str, mean: np.ndarray, sigma: str, cov: np.ndarray, n: int = 0
) -> Moments:
    mean, cov = (np.asarray(x, np.float64, order="C") for x in (mean, cov))
    if mean.ndim != 1 or not mean.size or cov.shape != 2 * mean.shape:
        raise bad(
            path, f"{mu} has shape {mean.shape} and {sigma} {cov.shape}; expected (D,) and (D, D)"
        )
    for name, values in ((mu, mean), (sigma, cov)):
        if wild := values.size - int(np.isfinite(values).sum()):
            raise bad(path, f"{name} has {wild} NaN or infinite values; expected finite numbers")
    largest = np.abs(cov).max()
    if (gap := np.abs(cov - cov.T).max()) > ASYMMETRY * largest:
        what = f"{sigma} is asymmetric by {gap:.3g} where its largest entry is {largest:.3g}"
        raise bad(path, f"{what}; expected a covariance")
    if (least := np.diagonal(cov).min()) < 0:
        raise bad(
            path, f"{sigma} has the variance {least:.3g} on its diagonal; expected a covariance"
        )
    shift = (
        NEGATIVE * np.linalg.norm(cov) + np.finfo(np.float64).tiny
    )  # a singular covariance is one, and so is zero
    try:
        np.linalg.cholesky(cov + shift * np.eye(len(cov)))
    except np.linalg.LinAlgError as error:
        least = np.linalg.eigvalsh(cov)[0]
        raise bad(
            path, f"{sigma} has the negative eigenvalue {least:.3g}; expected a covariance"
        ) from error
    return Moments(n, mean, cov)


def _checked_features(path: str | Path, name: str, features: np.ndarray) -> np.ndarray:
    if features.dtype not in (np.float32, np.float64):
        features = features.astype(np.float32)
    check_features(features, f"{path}: {name}", min_rows=2)
    return features


def _read_edm2(path: Path, space: str) -> Reference:
    """One section, "fid" or "fd_dinov2", of EDM2's pickle: {"mu", "sigma"} beside "num_images"."""
    from dmf.storage.readers.read import Tensor, open_file

    tree = open_file(path).tree
    if space not in EDM2_SECTIONS:
        what = f"is EDM2's, which has no features of space {space}"
        raise bad(path, f"{what}; expected {' or '.join(EDM2_SECTIONS)}")
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
            what = "NumPy's, row-major, of pickle protocol 4 or less"
            raise bad(path, f"{section} holds no plain arrays; expected {what}")
    keys = (
        ", ".join(str(key)[:40] for key in list(tree)[:8])
        if isinstance(tree, dict)
        else type(tree).__name__
    )
    raise bad(path, f"has {keys or 'nothing'}; expected {section} with mu and sigma")


def _read_npz(path: Path, with_images: bool) -> Reference:
    with Npz.open(path) as npz:
        if "about" in npz.members:
            return _read_own(npz)
        if {"mu", "sigma"} <= npz.members.keys():
            return _read_moments(npz, with_images)
        if {"ref_mu", "ref_sigma"} <= npz.members.keys():
            return Reference(
                {"pool": _moments(npz, "ref_mu", "ref_sigma")}, about={"format": "MeanFlow npz"}
            )
        for key, name in (("reps", "dgm-eval npz"), ("feats", "clean-fid npz")):
            if key in npz.members:
                features = _checked_features(path, key, npz.array(key, "f"))
                about = {**_of_clean_fid(path), "format": name, "count": len(features)}
                return Reference({"pool": moments(features)}, features, about=about)
        if "arr_0" in npz.members:
            return Reference(
                {}, images=_images(npz) if with_images else None, about={"format": "ADM npz"}
            )
        keys = ", ".join(sorted(npz.members)[:8])
        raise bad(path, f"has {keys or 'nothing'}; expected {EXPECTED}")


def _read_own(npz: Npz) -> Reference:
    text = npz.array("about", "U")
    told = text.item() if text.ndim == 0 else "[]"
    about = records.parse(told, records.ANY, f"{npz.path}: about", "the record of a reference")
    record = _checked_record(npz.path, about)
    n = record["count"] if isinstance(record.get("count"), int) else 0
    found = {"pool": _moments(npz, "mu", "sigma", int(n))}
    if {"mu_s", "sigma_s"} & npz.members.keys():
        found["spatial"] = _moments(npz, "mu_s", "sigma_s", int(n))
    features = (
        _checked_features(npz.path, "features", npz.array("features", "f"))
        if "features" in npz.members
        else None
    )
    return Reference(found, features, about={**record, "format": OWN_FORMAT})


def _read_moments(npz: Npz, with_images: bool) -> Reference:
    found = {"pool": _moments(npz, "mu", "sigma")}
    if not {"mu_s", "sigma_s", "arr_0"} & npz.members.keys():
        return Reference(found, about={**_of_clean_fid(npz.path), "format": "mu/sigma npz"})
    if {"mu_s", "sigma_s"} & npz.members.keys():
        found["spatial"] = _moments(npz, "mu_s", "sigma_s")
    images = _images(npz) if with_images and "arr_0" in npz.members else None
    return Reference(found, images=images, about={"format": "ADM npz"})


def _of_clean_fid(path: Path) -> dict[str, str | int]:
    """What a name of a clean-fid file tells; nothing for other names."""
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


def _moments(npz: Npz, mu: str, sigma: str, n: int = 0) -> Moments:
    return _checked_moments(npz.path, mu, npz.array(mu, "f"), sigma, npz.array(sigma, "f"), n)


def _images(npz: Npz) -> np.ndarray:
    """The array arr_0 as images (N, H, W, C)."""
    images = npz.array("arr_0", "u")
    flat = images.ndim != 4 or images.shape[3] not in (1, 3)
    if flat or images.dtype != np.uint8 or not images.size:
        what = f"arr_0 is {images.dtype} of shape {images.shape}"
        raise bad(npz.path, f"{what}; expected images, uint8 (N, H, W, 3)")
    return images
