"""Evaluation protocols as data: everything that has to agree before two scores may be compared.

A score is one number of a long recipe: how samples become bytes, how bytes are resized and scaled, which network looks at
them, how many there are, of which classes, and against what. Each public recipe below is one row; a recipe of your own is
a JSON file that names a row as its base and the fields it changes. Covariances are unbiased (n - 1) in all of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmf.errors import DmfError, NotFinite
from dmf.fields import section
from dmf.metrics.resize import RESIZES

FILE_ORDER = -1
SPACES = ("inception", "dinov2", "pixels")
SCALINGS = ("bytes", "unit", "imagenet")
LABELS = ("data", "uniform", "balanced")
METRICS = ("fid", "sfid", "is", "kid", "precision_recall")
INCEPTION_METRICS = ("sfid", "is")  # of features and logits that other spaces do not have


@dataclass(frozen=True)
class Protocol:
    """One recipe for scores of generated images.

    space: whose features. resize: to the network's size, a name of `dmf.metrics.resize.RESIZES`; pixels are not resized.
    scaling: of bytes b before the network: "bytes" (b - 128) / 128, "unit" 2 b / 255 - 1, "imagenet" (b / 255 - mean) / std.
    rounding: of samples to bytes, a name of `ROUNDINGS`. Images of a data set are bytes already and are never rounded.
    labels: "data", the training labels in order; "uniform", drawn with the seed; "balanced", each class equally often.
    count: samples scored. reference, reference_count: what they are held against, and how many images that is (0: any number).
    metrics: of `METRICS`; "fid" is the Frechet distance in any space. weights_sha256: first digits of the network's file,
    "" where any file will do.
    """

    name: str
    space: str
    resize: str
    scaling: str
    rounding: str
    labels: str
    metrics: tuple[str, ...]
    reference: str
    reference_count: int
    reference_source: str
    weights: str
    weights_sha256: str = ""
    count: int = 50_000
    is_splits: int = 10
    is_shuffle_seed: int = (
        FILE_ORDER  # of numpy.random.RandomState(seed).permutation; FILE_ORDER: as generated
    )
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    neighbours: int = 3  # of precision and recall
    reference_images: int = 10_000  # of the reference, for precision, recall and KID


INCEPTION_WEIGHTS = "pt_inception-2015-12-05-6726825d.pth, from the release fid_weights of github.com/mseitzer/pytorch-fid"
ADM_BATCH = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz"
PROTOCOLS = {
    # py-meanflow: torchmetrics' FrechetInceptionDistance(normalize=True). Since torchmetrics 1.8.0 (July 2025) its default
    # antialias=True is half-pixel bilinear with antialias; up to 1.7, and with antialias=False, it is tf1_bilinear. The
    # repository pins no version. IS as torch-fidelity has it: 10 splits in the order of RandomState(2020).
    "cifar10": Protocol(
        name="cifar10",
        space="inception",
        resize="bilinear_antialias",
        scaling="bytes",
        rounding="floor_255",
        labels="data",
        metrics=("fid", "is"),
        is_shuffle_seed=2020,
        reference="the 50,000 CIFAR-10 training images, unflipped",
        reference_count=50_000,
        reference_source="made from the training images by the evaluator",
        weights=INCEPTION_WEIGHTS,
        weights_sha256="6726825d",
    ),
    # guided-diffusion/evaluations. Its statistics are of all training images, its 10,000 images serve precision and recall.
    "adm-imagenet256": Protocol(
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
    ),
    # Latent models scored with ADM's evaluator: SiT and DiT round what the autoencoder decodes to the nearest byte, where
    # ADM's own sampler, of pixels, rounds down.
    "adm-imagenet256-latents": Protocol(
        name="adm-imagenet256-latents",
        space="inception",
        resize="tf1_bilinear",
        scaling="bytes",
        rounding="round_127.5",
        labels="uniform",
        metrics=("fid", "sfid", "is", "precision_recall"),
        reference="ImageNet 256x256, the ADM reference batch",
        reference_count=0,  # the file does not say
        reference_source=ADM_BATCH,
        weights=INCEPTION_WEIGHTS,
        weights_sha256="6726825d",
    ),
    # MeanFlow in JAX: the resize of StyleGAN's TorchScript network, which is TensorFlow 1's. IS as its successor iMF has it.
    "meanflow-imagenet256": Protocol(
        name="meanflow-imagenet256",
        space="inception",
        resize="tf1_bilinear",
        scaling="bytes",
        rounding="round_127.5",
        labels="uniform",
        metrics=("fid", "is"),
        is_shuffle_seed=2020,
        reference="ImageNet 256x256, the training images by MeanFlow's own pipeline",
        reference_count=0,  # the file does not say
        reference_source="imagenet_256_fid_stats.npz, linked in the README of github.com/Gsunshine/meanflow",
        weights=INCEPTION_WEIGHTS,
        weights_sha256="6726825d",
    ),
    # EDM's fid.py, of any of its data sets: the reference is every training image once, unflipped.
    "edm": Protocol(
        name="edm",
        space="inception",
        resize="tf1_bilinear",
        scaling="bytes",
        rounding="round_127.5",
        labels="uniform",
        metrics=("fid",),
        reference="the training images, unflipped",
        reference_count=0,  # as many as the data set has
        reference_source="https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/, such as cifar10-32x32.npz",
        weights=INCEPTION_WEIGHTS,
        weights_sha256="6726825d",
    ),
    # EDM2's calculate_metrics.py, fd_dinov2 of ImageNet-512. Images decoded by its VAE are floor(255 clip(y)) for y in [0, 1];
    # its pixel models (img64) use round_127.5. Its resize is PyTorch's bicubic with antialias, not clipped; dgm-eval's is
    # PIL's on bytes, rounded to bytes. EDM2 calls the two almost the same.
    "edm2-dinov2": Protocol(
        name="edm2-dinov2",
        space="dinov2",
        resize="bicubic_antialias",
        scaling="imagenet",
        rounding="floor_255",
        labels="uniform",
        metrics=("fid",),
        reference="the 1,281,167 ImageNet training images, centre-cropped as ADM does",
        reference_count=1_281_167,
        reference_source="https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs/, such as img512.pkl",
        weights="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        weights_sha256="d5383ea8",  # as ten public projects record it; the release itself names none
    ),
}


def _floor_255(x: np.ndarray) -> np.ndarray:
    # py-meanflow goes on to k / 255, and torchmetrics to (k / 255) * 255 truncated: exact for all 256 k in float32.
    return np.floor(np.clip(x * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255))


def _round_127_5(x: np.ndarray) -> np.ndarray:
    return np.clip(x * np.float32(127.5) + np.float32(128), 0, 255)


ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "floor_255": _floor_255,  # py-meanflow; ADM, whose 127.5 (x + 1) is the same number bit for bit; EDM2's decoded latents
    "round_127.5": _round_127_5,  # MeanFlow in JAX, EDM: the nearest byte
}
_CHOICES: dict[str, Collection[str]] = {
    **{
        "space": SPACES,
        "resize": RESIZES,
        "scaling": SCALINGS,
        "rounding": ROUNDINGS,
        "labels": LABELS,
    },
}
_LEAST = {
    **{
        "count": 2,
        "reference_count": 0,
        "is_splits": 1,
        "is_shuffle_seed": FILE_ORDER,
        "kid_subsets": 1,
    },
    **{"kid_subset_size": 2, "neighbours": 1, "reference_images": 2},
}


def to_bytes(x: np.ndarray, rule: str) -> np.ndarray:
    """Samples x (N, H, W, C) in about [-1, 1] as uint8, by a rule of `ROUNDINGS`, each step rounded to float32.

    "floor_255"    floor(255 clip(x / 2 + 1 / 2, 0, 1))
    "round_127.5"  floor(clip(127.5 x + 128, 0, 255))

    Only "round_127.5" gives the bytes b of x = b / 127.5 - 1 back; by the other, 63 of the 256 come out one lower (in float32).
    Raises DmfError for an unknown rule, another shape or type, and images with NaN or infinite values.
    """
    if rule not in ROUNDINGS:
        raise DmfError(f"rounding = {rule!r}: expected one of {', '.join(ROUNDINGS)}")
    x = np.asarray(x)
    if x.ndim != 4 or x.dtype.kind in "biu":
        raise DmfError(
            f"samples are {x.dtype} of shape {x.shape}: expected floats (N, H, W, C) in about [-1, 1]"
        )
    x = x.astype(np.float32, copy=False)
    bad = len(x) - int(np.isfinite(x).all(axis=(1, 2, 3)).sum())
    if bad:
        raise NotFinite(
            f"{bad} of {len(x)} generated images have NaN or infinite values: expected finite values about [-1, 1]"
        )
    with np.errstate(over="ignore"):  # a sample of 1e38 is as white as one of 1
        return ROUNDINGS[rule](x).astype(np.uint8)


def load(name_or_path: str) -> Protocol:
    """The protocol of a name in `PROTOCOLS`, or of a JSON file: {"base": a name, and the fields that differ}.

    Without "base" the file gives every field that has no default. A protocol without a name of its own is called after its
    file. Raises DmfError for an unknown name or field, and for values of another type or kind.
    """
    if name_or_path in PROTOCOLS:
        return PROTOCOLS[name_or_path]
    path = Path(name_or_path)
    if path.suffix != ".json":
        near = difflib.get_close_matches(name_or_path, PROTOCOLS, 1, 0.0)[0]
        raise DmfError(
            f"protocol {name_or_path!r:.100}: no such protocol; did you mean {near}? Expected one of {', '.join(PROTOCOLS)}, "
            "or a .json file"
        )
    values = _read_json(path)
    base = values.pop("base", None)
    if base is not None and (not isinstance(base, str) or base not in PROTOCOLS):
        raise DmfError(f"{path}: base = {base!r:.100}: expected one of {', '.join(PROTOCOLS)}")
    start = {} if base is None else dataclasses.asdict(PROTOCOLS[base])
    protocol = section(Protocol, {**start, "name": path.stem, **values}, str(path))
    _check(protocol, str(path))
    return protocol


def describe(protocol: Protocol) -> str:
    """The protocol in one line, to stand beside every score."""
    weights = f"weights {protocol.weights_sha256}" if protocol.weights_sha256 else "any weights"
    features = (
        "pixels"
        if protocol.space == "pixels"
        else f"{protocol.space} ({weights}), resize {protocol.resize}"
    )
    return (
        f"{protocol.name}: {features}, scaling {protocol.scaling}, rounding {protocol.rounding}, labels {protocol.labels}, "
        f"{protocol.count:,} samples against {protocol.reference}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
    except OSError as error:
        raise DmfError(
            f"{path}: cannot be read ({error.strerror}); expected a protocol as JSON"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DmfError(f"{path}: no JSON ({error}); expected a protocol as JSON") from error
    if not isinstance(values, dict):
        raise DmfError(
            f'{path}: holds a {type(values).__name__}; expected an object such as {{"base": "cifar10", "count": 5000}}'
        )
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field is given twice")
    return found


def _check(protocol: Protocol, where: str) -> None:
    """Every field by itself, then what excludes each other."""
    for key, choices in _CHOICES.items():
        if getattr(protocol, key) not in choices:
            raise DmfError(
                f"{where}.{key} = {getattr(protocol, key)!r}: expected one of {', '.join(choices)}"
            )
    for key, least in _LEAST.items():
        if not least <= getattr(protocol, key) < 2**32:
            raise DmfError(
                f"{where}.{key} = {getattr(protocol, key)}: expected at least {least} and less than 2**32"
            )
    metrics = protocol.metrics
    if not metrics or len(set(metrics)) != len(metrics) or not set(metrics) <= set(METRICS):
        raise DmfError(
            f"{where}.metrics = {metrics}: expected some of {', '.join(METRICS)}, each once"
        )
    alien = [
        metric
        for metric in metrics
        if metric in INCEPTION_METRICS and protocol.space != "inception"
    ]
    if alien:
        raise DmfError(
            f"{where}.metrics has {alien[0]!r} with space {protocol.space!r}: expected space 'inception' for it"
        )
    if not re.fullmatch("[0-9a-f]{0,64}", protocol.weights_sha256):
        raise DmfError(
            f"{where}.weights_sha256 = {protocol.weights_sha256!r}: expected up to 64 hexadecimal digits, in lower case"
        )
    fitting = {"inception": ("bytes", "unit"), "dinov2": ("imagenet",)}.get(
        protocol.space, SCALINGS
    )
    if protocol.scaling not in fitting:
        raise DmfError(
            f"{where}.scaling = {protocol.scaling!r} with space {protocol.space!r}: expected {' or '.join(fitting)}"
        )
    if not re.fullmatch(r"[\w .+-]+", protocol.name):
        raise DmfError(
            f"{where}.name = {protocol.name!r}: expected letters, digits and . + - _, as files are named after it"
        )
    if protocol.name in PROTOCOLS and protocol != PROTOCOLS[protocol.name]:
        raise DmfError(
            f"{where}.name = {protocol.name!r}: expected a name of its own, as {protocol.name!r} is another protocol"
        )
