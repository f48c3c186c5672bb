"""Data sets in shards: the normal law of each image's latent, and pairs of noise and sample.

`dmf.convert.encode` and `dmf.convert.pairs` write the files. Reading needs neither TensorFlow nor
jax, except where the noise of pairs is drawn again.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmf.data import shards
from dmf.errors import DmfError
from dmf.storage import paths

NAME = "imagenet256_latents"
# Metadata that tell data sets apart.
ORIGIN = ("scale", "shift", "dtype", "source", "vae", "labels")
OF_PAIRS = (
    *("weights", "sampler", "steps", "times", "guidance", "seed"),
    *("noise", "dtype", "truncation", "labels", "kept"),
)
FEATURES = "imagenet256_features"  # of a representation autoencoder
# Name -> how many images a mock has, and their shape.
MOCKS = {NAME: (2048, (32, 32, 4)), FEATURES: (64, (16, 16, 768))}
MOCK_CLASSES, MOCK_STD = 1000, 0.1


@dataclass(frozen=True, eq=False)
class Latents:
    """A `Source` of encoded images: the normal law of each image's latent, read on demand."""

    # record numbers (n,) -> (n, 2, h, w, c): mean and std, unscaled
    fetch: Callable[[np.ndarray], np.ndarray]
    labels: np.ndarray  # (N,) int32, in [0, num_classes)
    num_classes: int
    image_shape: tuple[int, ...]  # (h, w, c)
    scale: float  # scaled latent = scale * (unscaled latent - shift)
    name: str
    split: str
    flip: bool  # a batch shows the mirrored copy of each image with probability 1/2
    about: dict[str, Any]  # the metadata of the files; {} for a mock
    mixed: bool = False  # stored latents may be sorted by class
    shift: float = 0.0

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.about.get("classes", ()))

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: np.ndarray, mirrored: np.ndarray) -> dict[str, np.ndarray]:
        """The scaled law of the images `index` (n,), mirrored where `mirrored` (n,) is 1.

        Returns x = scale * (mean - shift) and std = scale * std, each (n, h, w, c) float32, and
        label (n,) int32. A latent is x + std * noise. Raises DmfError naming the file that is
        damaged.
        """
        found, scale = self.fetch(2 * index + mirrored), np.float32(self.scale)
        mean, std = (found[:, i].astype(np.float32) for i in (0, 1))
        x = scale * (mean - np.float32(self.shift))
        return {"x": x, "std": scale * std, "label": self.labels[index]}

    def origin(self) -> dict[str, Any]:
        """What was encoded, how and with which labels; {} for a mock."""
        return {name: self.about[name] for name in ORIGIN if name in self.about}


def read(data_dir: str, split: str, flip: bool, name: str = NAME) -> Latents:
    """Opens one split below `data_dir`; "train" may also be `data_dir` itself.

    Reads the labels, and no latents yet. Raises DmfError where the split is not encoded, or not to
    its end, and where a file has another size than the metadata say.
    """
    if not data_dir:
        raise DmfError(
            f"config.data.data_dir is '' for {name!r}: expected the OUT of `--mode=encode`"
        )
    root = Path(paths.expanded(data_dir))
    folder = root if split == "train" and os.path.isfile(root / shards.METADATA) else root / split
    about = shards.metadata(folder)
    for file, size, _ in shards.files(about):
        shards.check_size(folder / file, size)
    labels = _labels(folder, about)
    return Latents(
        fetch=shards.Shards(folder, about).fetch,
        labels=labels,
        num_classes=about["num_classes"],
        image_shape=tuple(about["latent_shape"]),
        scale=about["scale"],
        shift=about.get("shift", 0.0),
        name=name,
        split=split,
        flip=flip and split == "train",
        about=about,
    )


@dataclass(frozen=True, eq=False)
class Pairs:
    """A `Source` of samples of a model, each with the noise that the sampler made it from."""

    fetch: Callable[[np.ndarray], np.ndarray]  # numbers (n,) -> (n, k, h, w, c); the sample is last
    kept: np.ndarray  # (N,) int32, the numbers of the pairs that are used
    labels: np.ndarray  # (N,) int32, in [0, num_classes)
    redraw: Callable[[np.ndarray], np.ndarray] | None  # numbers (n,) -> noise (n, h, w, c)
    about: dict[str, Any]  # the metadata of the files
    split: str = "train"
    name: str = "pairs"
    mixed: bool = False  # labels may come in turn
    flip: bool = False
    classes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return self.about["num_classes"]

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.about["image_shape"])

    def __len__(self) -> int:
        return len(self.kept)

    def rows(self, index: np.ndarray, mirrored: np.ndarray) -> dict[str, np.ndarray]:
        """x and noise, each (n, h, w, c) float32, and label (n,) int32. Raises DmfError."""
        number = self.kept[index]
        found = self.fetch(number).astype(np.float32)
        noise = found[:, 0] if self.redraw is None else self.redraw(number)
        return {"x": found[:, -1], "noise": noise, "label": self.labels[index]}

    def origin(self) -> dict[str, Any]:
        """Which model made the pairs and how, and which of them are kept."""
        return {name: self.about[name] for name in OF_PAIRS}


def read_pairs(data_dir: str, split: str) -> Pairs:
    """Opens the pairs of a folder. Reads their labels, and no pair yet.

    Raises DmfError where they are not written to their end, where a file has another size than the
    metadata say, and for any split but "train".
    """
    folder, about = _pairs(data_dir)
    if split != "train":
        raise DmfError(f"{folder} holds pairs, which have no split {split!r}: expected 'train'")
    for name, size, _ in shards.files(about):
        shards.check_size(folder / name, size)
    labels, kept = _labels(folder, about), _numbers(folder / shards.KEPT, about["kept"])
    inside = len(kept) and kept.min() >= 0 and kept.max() < about["count"]
    if len(kept) != about["truncation"]["kept"] or not inside:
        raise DmfError(
            f"{folder / shards.KEPT} holds {len(kept)} numbers: expected "
            f"{about['truncation']['kept']} of 0 to {about['count'] - 1}"
        )
    shape, stored = tuple(about["image_shape"]), about["noise"] == "stored"
    record = (1 + stored, *shape)
    return Pairs(
        shards.Shards(folder, about, shards.PAIRS, record).fetch,
        kept,
        labels[kept],
        None if stored else _redrawn(about["seed"], shape),
        about,
    )


def behind_pairs(data_dir: str) -> dict[str, Any]:
    """The data config of the model that made the pairs, {} where it is not known."""
    return _pairs(data_dir)[1]["data"]


def _pairs(data_dir: str) -> tuple[Path, dict[str, Any]]:
    if not data_dir:
        raise DmfError("config.data.data_dir is '' for 'pairs': expected the OUT of `--mode=pairs`")
    folder = Path(paths.expanded(data_dir))
    return folder, shards.metadata(folder, shards.PAIRS)


def _redrawn(seed: int, shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """numbers (n,) -> the noise of these pairs, drawn again from its keys on the host."""
    import jax

    from dmf.method import keys

    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise DmfError(
            "the noise of pairs is redrawn on the CPU, which jax does not see: expected cpu among "
            "JAX_PLATFORMS, or pairs made with --noise=stored"
        ) from error

    @jax.jit
    def draw(row: jax.Array) -> jax.Array:
        found = keys.keys_of(jax.numpy.uint32(seed), row, keys.PAIRS)
        return keys.noise_of(found, shape)

    def noise(number: np.ndarray) -> np.ndarray:
        with jax.default_device(cpu):
            return np.asarray(draw(number.astype(np.int32)))

    return noise


def mock(split: str, flip: bool, name: str = NAME) -> Latents:
    """Random latents of random classes, to try the code path only; reads no file."""
    rng = np.random.default_rng(0 if split == "train" else 1)
    count, shape = MOCKS[name]
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    labels = rng.integers(0, MOCK_CLASSES, count).astype(np.int32)

    def fetch(records: np.ndarray) -> np.ndarray:
        mean = images[records // 2].astype(np.float32) / np.float32(127.5) - np.float32(1)
        mean = np.where((records % 2 == 1)[:, None, None, None], mean[:, :, ::-1], mean)
        return np.stack([mean, np.full_like(mean, MOCK_STD)], axis=1)

    return Latents(
        fetch, labels, MOCK_CLASSES, shape, 1.0, name, split, flip and split == "train", {}
    )


def _labels(folder: Path, about: dict[str, Any]) -> np.ndarray:
    path = folder / shards.LABELS
    labels = _numbers(path, about["labels"])
    if labels.shape != (about["count"],):
        raise DmfError(
            f"{path} holds {labels.dtype}{list(labels.shape)}: expected int32[{about['count']}]"
        )
    return labels


def _numbers(path: Path, entry: dict[str, Any]) -> np.ndarray:
    """A file of int32 numbers. Raises DmfError where it is damaged."""
    shards.check_sum(path, entry["bytes"], entry["sha256"])
    try:
        found = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = " ".join(str(error).split())[:200]
        raise DmfError(
            f"{path} cannot be read ({type(error).__name__}: {why}): expected an array of numbers"
        ) from error
    if found.ndim != 1 or found.dtype != np.int32:
        raise DmfError(f"{path} holds {found.dtype}{list(found.shape)}: expected one axis of int32")
    return found
