"""Evaluation protocols as data: everything that must agree before two scores may be compared.

A score is the result of a long recipe.
The recipe says how samples become bytes, and how bytes are resized and scaled.
It says which network looks at them, how many there are, of which classes, and against what.
Each public recipe below is one row.
Your own recipe is a JSON file: it names a row as its base, and the fields that it changes.
All recipes use unbiased covariances (n - 1).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dmf import fields
from dmf.errors import DmfError, NotFinite, printable
from dmf.fields import REQUIRED, choice, limited
from dmf.metrics.resize import RESIZES
from dmf.storage import paths, records

FILE_ORDER = -1
SPACES = ("inception", "dinov2", "pixels")
SCALINGS = ("bytes", "unit", "imagenet")
LABELS = ("data", "uniform", "balanced")
METRICS = ("fid", "sfid", "is", "kid", "precision_recall")
INCEPTION_METRICS = ("sfid", "is")  # other spaces lack their features and logits
_FITTING = {"inception": ("bytes", "unit"), "dinov2": ("imagenet",)}  # space -> scalings
MOST = 2**32 - 1  # the largest seed of numpy.random.RandomState, and far above any count


def _floor_255(x: np.ndarray) -> np.ndarray:
    # py-meanflow goes on to k / 255, and torchmetrics to (k / 255) * 255, cut to a whole number.
    # In float32 this gives k back for all 256 of them.
    return np.floor(np.clip(x * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255))


def _round_127_5(x: np.ndarray) -> np.ndarray:
    return np.clip(x * np.float32(127.5) + np.float32(128), 0, 255)


ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    # py-meanflow, EDM2's decoded latents, and ADM: its 127.5 (x + 1) is the same bit for bit.
    "floor_255": _floor_255,
    # MeanFlow in JAX, EDM: the nearest byte.
    "round_127.5": _round_127_5,
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One recipe for scores of generated images.

        space             the feature space
        resize            how images get the network's size; the space "pixels" has no resize
        scaling           what the network is given of bytes b:
            "bytes"       (b - 128) / 128
            "unit"        2 b / 255 - 1
            "imagenet"    (b / 255 - mean) / std
        rounding          how samples become bytes; images of a data set are bytes already
        labels            of the samples:
            "data"        the training labels in order
            "uniform"     drawn with the seed
            "balanced"    each class equally often
        metrics           some of `METRICS`; "fid" is the Frechet distance in any space
        reference         what samples are held against
        reference_count   how many images that is; 0 for any number
        weights_sha256    first digits of the network file's SHA-256; "" where any file will do
        count             how many samples are scored
        is_shuffle_seed   of numpy.random.RandomState(seed).permutation, or FILE_ORDER
        neighbours        of precision and recall
        reference_images  how many images of the reference serve precision, recall and KID

    Two scores may be compared where all of these agree.
    """

    name: str
    space: str = choice(REQUIRED, SPACES)
    resize: str = choice(REQUIRED, RESIZES)
    scaling: str = choice(REQUIRED, SCALINGS)
    rounding: str = choice(REQUIRED, ROUNDINGS)
    labels: str = choice(REQUIRED, LABELS)
    metrics: tuple[str, ...]
    reference: str
    reference_count: int = limited(REQUIRED, 0, MOST)
    reference_source: str
    weights: str
    weights_sha256: str = ""
    count: int = limited(50_000, 2, MOST)
    is_splits: int = limited(10, 1, MOST)
    is_shuffle_seed: int = limited(FILE_ORDER, FILE_ORDER, MOST)
    kid_subsets: int = limited(100, 1, MOST)
    kid_subset_size: int = limited(1000, 2, MOST)
    neighbours: int = limited(3, 1, MOST)
    reference_images: int = limited(10_000, 2, MOST)


INCEPTION_WEIGHTS = (
    "pt_inception-2015-12-05-6726825d.pth, from the release fid_weights of "
    "github.com/mseitzer/pytorch-fid"
)
ADM_BATCH = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)
# guided-diffusion/evaluations. The reference's statistics are of all training images.
# Its 10,000 images serve precision and recall.
_ADM = Protocol(
    name="adm-imagenet256",
    space="inception",
    resize="tf1_bilinear",
    scaling="bytes",
    rounding="floor_255",
    labels="uniform",
    metrics=("fid", "sfid", "is", "precision_recall"),
    reference="ImageNet 256x256, the ADM reference batch",
    reference_count=0,  # the file does not say
    reference_source=ADM_BATCH,
    weights=INCEPTION_WEIGHTS,
    weights_sha256="6726825d",
)
# Latent models scored with ADM's evaluator. SiT and DiT round decoded images to the nearest byte.
# ADM's own sampler, of pixels, rounds down.
_ADM_LATENTS = replace(_ADM, name="adm-imagenet256-latents", rounding="round_127.5")
# py-meanflow uses torchmetrics' FrechetInceptionDistance(normalize=True).
# Since torchmetrics 1.8.0 (July 2025) its default is half-pixel bilinear with antialias.
# Up to 1.7, and with antialias=False, it is tf1_bilinear. py-meanflow pins no version.
# The inception score is torch-fidelity's: 10 splits in the order of RandomState(2020).
_CIFAR10 = replace(
    _ADM,
    name="cifar10",
    resize="bilinear_antialias",
    labels="data",
    metrics=("fid", "is"),
    is_shuffle_seed=2020,
    reference="the 50,000 CIFAR-10 training images, unflipped",
    reference_count=50_000,
    reference_source="made from the training images by the evaluator",
)
# MeanFlow in JAX resizes at half pixels without antialias, then takes (b - 128) / 128.
# It is a port of StyleGAN's TorchScript network, whose shift in place to TensorFlow 1's positions
# was lost. The row had TensorFlow 1's resize before, which is another picture by tens of bytes.
# The inception score is that program's successor's (iMF).
_MEANFLOW = replace(
    _ADM_LATENTS,
    name="meanflow-imagenet256",
    resize="bilinear",
    metrics=("fid", "is"),
    is_shuffle_seed=2020,
    reference="ImageNet 256x256, the training images by MeanFlow's own pipeline",
    reference_source=(
        "imagenet_256_fid_stats.npz, linked in the README of github.com/Gsunshine/meanflow"
    ),
)
# EDM's fid.py, for any of its data sets. The reference is every training image once, unflipped.
_EDM = replace(
    _ADM_LATENTS,
    name="edm",
    metrics=("fid",),
    reference="the training images, unflipped",
    reference_count=0,  # as many as the data set has
    reference_source="https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/, such as cifar10-32x32.npz",
)
# EDM2's calculate_metrics.py, fd_dinov2 of ImageNet-512.
# Images from its autoencoder are floor(255 clip(y)) for y in [0, 1].
# Its pixel models (img64) use round_127.5.
# Its resize is PyTorch's bicubic with antialias, not clipped.
# dgm-eval uses PIL's on bytes, rounded to bytes. EDM2 calls the two almost the same.
_EDM2 = replace(
    _ADM,
    name="edm2-dinov2",
    space="dinov2",
    resize="bicubic_antialias",
    scaling="imagenet",
    metrics=("fid",),
    reference="the 1,281,167 ImageNet training images, centre-cropped as ADM does",
    reference_count=1_281_167,
    reference_source="https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/, such as img512.pkl",
    weights="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    weights_sha256="d5383ea8",  # recorded by ten public projects; the release names no digest
)
PROTOCOLS = {
    "cifar10": _CIFAR10,
    "adm-imagenet256": _ADM,
    "adm-imagenet256-latents": _ADM_LATENTS,
    "meanflow-imagenet256": _MEANFLOW,
    "edm": _EDM,
    "edm2-dinov2": _EDM2,
}


def to_bytes(x: np.ndarray, rule: str) -> np.ndarray:
    """Samples x (N, H, W, C) in about [-1, 1] as uint8, each step rounded to float32.

    rule: a key of `ROUNDINGS`.

        "floor_255"    floor(255 clip(x / 2 + 1 / 2, 0, 1))
        "round_127.5"  floor(clip(127.5 x + 128, 0, 255))

    Only "round_127.5" returns the bytes b of x = b / 127.5 - 1.
    By the other rule 63 of the 256 bytes come out one lower, in float32.

    Raises DmfError for an unknown rule, a wrong shape or type, and NaN or infinite values.
    """
    if rule not in ROUNDINGS:
        raise DmfError(f"rounding = {rule!r}: expected one of {', '.join(ROUNDINGS)}")
    x = np.asarray(x)
    if x.ndim != 4 or x.dtype.kind in "biu":
        raise DmfError(
            f"samples are {x.dtype} of shape {x.shape}: "
            "expected floats (N, H, W, C) in about [-1, 1]"
        )
    x = x.astype(np.float32, copy=False)
    check_finite(x)
    with np.errstate(over="ignore"):  # a sample of 1e38 is as white as one of 1
        return ROUNDINGS[rule](x).astype(np.uint8)


def check_finite(x: np.ndarray) -> None:
    """Raises NotFinite where an image of (N, H, W, C) has NaN or infinite values."""
    bad = len(x) - int(np.isfinite(x).all(axis=(1, 2, 3)).sum())
    if bad:
        raise NotFinite(
            f"{bad} of {len(x)} generated images have NaN or infinite values: "
            "expected finite values about [-1, 1]"
        )


FILE = records.Is(
    'an object such as {"base": "cifar10", "count": 5000}', lambda x: isinstance(x, dict)
)


def load(name_or_path: str) -> Protocol:
    """The protocol of a name in `PROTOCOLS`, or of a JSON file.

    The file is {"base": a name, and the fields that differ}.
    A file without "base" gives every field that has no default.
    A file without "name" gives the protocol its own name.

    Raises DmfError for an unknown name or field, and for values of another type or kind.
    """
    if name_or_path in PROTOCOLS:
        return PROTOCOLS[name_or_path]
    path = Path(paths.expanded(name_or_path))
    if path.suffix != ".json":
        near = difflib.get_close_matches(name_or_path, PROTOCOLS, 1, 0.0)[0]
        raise DmfError(
            f"protocol {name_or_path!r:.100}: no such protocol; did you mean {near}? "
            f"Expected one of {', '.join(PROTOCOLS)}, or a .json file"
        )
    values = records.read(path, FILE, "a protocol as JSON")
    base = values.pop("base", None)
    if base is not None and (not isinstance(base, str) or base not in PROTOCOLS):
        raise DmfError(f"{path}: base = {base!r:.100}: expected one of {', '.join(PROTOCOLS)}")
    start = {} if base is None else dataclasses.asdict(PROTOCOLS[base])
    protocol = fields.section(Protocol, {**start, "name": path.stem, **values}, str(path))
    _check(protocol, str(path))
    return protocol


def describe(protocol: Protocol) -> str:
    """The protocol in one line, to stand beside every score."""
    p = protocol
    weights = f"weights {p.weights_sha256}" if p.weights_sha256 else "any weights"
    features = "pixels" if p.space == "pixels" else f"{p.space} ({weights}), resize {p.resize}"
    return printable(
        f"{p.name}: {features}, scaling {p.scaling}, rounding {p.rounding}, "
        f"labels {p.labels}, {p.count:,} samples against {p.reference}"
    )


def _check(protocol: Protocol, where: str) -> None:
    """Checks every field by itself, then the fields together. Raises DmfError."""
    fields.check(protocol, where)
    _check_metrics(protocol, where)
    if not re.fullmatch("[0-9a-f]{0,64}", protocol.weights_sha256):
        raise DmfError(
            f"{where}.weights_sha256 = {protocol.weights_sha256!r}: "
            "expected up to 64 hexadecimal digits, in lower case"
        )
    fitting = _FITTING.get(protocol.space, SCALINGS)
    if protocol.scaling not in fitting:
        raise DmfError(
            f"{where}.scaling = {protocol.scaling!r} with space {protocol.space!r}: "
            f"expected {' or '.join(fitting)}"
        )
    if not re.fullmatch(r"[\w .+-]+", protocol.name):
        raise DmfError(
            f"{where}.name = {protocol.name!r}: "
            "expected letters, digits and . + - _, as files are named after it"
        )
    if protocol.name in PROTOCOLS and protocol != PROTOCOLS[protocol.name]:
        raise DmfError(
            f"{where}.name = {protocol.name!r}: "
            "expected a new name, as this one belongs to another protocol"
        )


def _check_metrics(protocol: Protocol, where: str) -> None:
    metrics = protocol.metrics
    if not metrics or len(set(metrics)) != len(metrics) or not set(metrics) <= set(METRICS):
        raise DmfError(
            f"{where}.metrics = {metrics}: expected some of {', '.join(METRICS)}, each once"
        )
    alien = [metric for metric in metrics if metric in INCEPTION_METRICS]
    if alien and protocol.space != "inception":
        raise DmfError(
            f"{where}.metrics has {alien[0]!r} with space {protocol.space!r}: "
            "expected space 'inception' for it"
        )
