"""Data sets behind one protocol, and batches that are a pure function of (seed, step).

There is no iterator state, so a resumed run sees the examples that the interrupted run would have
seen. The global batch of a step is the same for any number of processes. Reading needs neither
TensorFlow nor a network connection, and this module imports no reader before it is needed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from dmf import fields
from dmf.errors import DmfError
from dmf.fields import limited

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class DataConfig:
    """Which images are read, and what a training step does to them on the device."""

    name: str = "digits"  # a key of `DATASETS`; "" where weights were converted
    # cifar10: where TFDS data is prepared, "" = $TFDS_DATA_DIR, else ~/tensorflow_datasets;
    # imagenet256_latents, imagenet256_features: what --mode=encode has written;
    # pairs: what --mode=pairs has written
    data_dir: str = ""
    # digits, photos: share of the one set that is "heldout", whatever the training seed
    holdout_fraction: float = limited(0.25, 0, 1)
    # cifar10 and the two of ImageNet: random images, to try the code path only; reads no file
    mock: bool = False
    # * mirror each training image with probability 1/2, without telling the network;
    # latents: take the stored mirror image
    flip: bool = False
    # * probability p of the EDM pipe, which does tell the network (`augment.edm_augment`); 0 = off
    augment: float = limited(0.0, 0, 1)


class Source(Protocol):
    """One split of a data set, in memory or on disk."""

    @property
    def name(self) -> str:
        """The data set's key in `DATASETS`."""

    @property
    def split(self) -> str:
        """Either "train" or "heldout"."""

    @property
    def num_classes(self) -> int:
        """How many classes the labels tell apart."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in their order, () where they are not known."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C) of an image, or of an image's latent."""

    @property
    def labels(self) -> np.ndarray:
        """(N,) int32 in [0, num_classes), in the order of the images."""

    @property
    def mixed(self) -> bool:
        """Whether the classes are mixed, so that the first few labels are a sample of all."""

    @property
    def flip(self) -> bool:
        """Whether a batch shows the stored mirror image of a row with probability 1/2."""

    def __len__(self) -> int:
        """N, the number of images."""

    def rows(self, index: np.ndarray, mirrored: np.ndarray) -> dict[str, np.ndarray]:
        """The images `index` (n,), and the mirror images of those where `mirrored` (n,) is 1.

        mirrored: 0 everywhere unless `flip` is True.

        Returns x (n, H, W, C) float32 and label (n,) int32. A latent is x + std * noise, and its
        std (n, H, W, C) float32 is then given too. A source may also give noise, shaped as x: the
        noise that each row is paired with. Raises DmfError where a file is damaged.
        """

    def origin(self) -> dict[str, Any]:
        """Plain values that tell this data set from another with the same name and count."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A `Source` whose images are in memory."""

    images: np.ndarray  # (N, H, W, C), as stored (uint8)
    labels: np.ndarray  # (N,) int32, in [0, num_classes)
    num_classes: int
    max_value: float  # stored values run from 0 to this
    name: str
    split: str
    mixed: bool = True
    flip: bool = False  # training mirrors these images on the device
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.images.shape[1:]

    def to_float(self, images: np.ndarray) -> np.ndarray:
        """Stored values of any shape as network input in [-1, 1], float32."""
        return images.astype(np.float32) / np.float32(self.max_value / 2) - np.float32(1)

    def rows(self, index: np.ndarray, mirrored: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": self.to_float(self.images[index]), "label": self.labels[index]}

    def origin(self) -> dict[str, Any]:
        return {}


def _load_digits(config: DataConfig, split: Split) -> Source:
    from dmf.data import bundled

    _check_no_mock(config)
    images, labels = bundled.read_digits(split, config.holdout_fraction)
    return Dataset(images, labels, bundled.DIGITS, bundled.DIGITS_MAX, "digits", split)


def _load_photos(config: DataConfig, split: Split) -> Source:
    from dmf.data import bundled

    _check_no_mock(config)
    images, labels = bundled.read_photos(split, config.holdout_fraction)
    return Dataset(images, labels, bundled.PHOTOS, bundled.PHOTOS_MAX, "photos", split)


def _load_cifar10(config: DataConfig, split: Split) -> Source:
    from dmf.data import cifar10

    images, labels = cifar10.read(split, config.data_dir, mock=config.mock)
    return Dataset(images, labels, cifar10.NUM_CLASSES, cifar10.MAX_VALUE, "cifar10", split)


def _load_latents(config: DataConfig, split: Split) -> Source:
    from dmf.data import latents

    if config.mock:
        return latents.mock(split, config.flip, config.name)
    return latents.read(config.data_dir, split, config.flip, config.name)


def _load_pairs(config: DataConfig, split: Split) -> Source:
    from dmf.data import latents

    _check_no_mock(config)
    if config.flip or config.augment:
        name = "flip" if config.flip else "augment"
        raise DmfError(
            f"config.data.{name} = {getattr(config, name)} for 'pairs': expected "
            f"{0.0 if name == 'augment' else False}, as a changed sample has another noise"
        )
    return latents.read_pairs(config.data_dir, split)


DATASETS: dict[str, Callable[[DataConfig, Split], Source]] = {
    "digits": _load_digits,
    "photos": _load_photos,
    "cifar10": _load_cifar10,
    "imagenet256_latents": _load_latents,
    "imagenet256_features": _load_latents,
    "pairs": _load_pairs,
}


def load(config: DataConfig, split: Split) -> Source:
    """Reads one split of the configured data set into memory, or opens its files.

    Raises DmfError for an unknown name or split, a field out of range, and for data that are not
    prepared or damaged.
    """
    if config.name not in DATASETS:
        raise DmfError(f"config.data.name = {config.name!r}: expected one of {', '.join(DATASETS)}")
    fields.check(config, "config.data")
    if split not in ("train", "heldout"):
        raise DmfError(f"split is {split!r}: expected 'train' or 'heldout'")
    return DATASETS[config.name](config, split)


def behind(config: DataConfig) -> DataConfig:
    """The data of the model that made the pairs, whose name may be ""; other data are their own."""
    if config.name != "pairs":
        return config
    from dmf.data import latents

    found = latents.behind_pairs(config.data_dir)
    known = {f.name for f in dataclasses.fields(DataConfig)}
    return DataConfig(**({"name": ""} | {k: v for k, v in found.items() if k in known}))


def held_out_or(train: Source, config: DataConfig) -> tuple[Source, str]:
    """The held-out images and "held-out"; where none can be read, `train` and "training"."""
    try:
        return load(config, "heldout"), "held-out"
    except DmfError:
        return train, "training"


def identity(source: Source) -> dict[str, Any]:
    """Plain values that tell a data set from another; a resumed run must find the same."""
    about = {"name": source.name, "split": source.split, "count": len(source)}
    return about | source.origin()


def whole(source: Source) -> dict[str, np.ndarray]:
    """All rows of a source in their order, as `Source.rows` gives them."""
    return source.rows(np.arange(len(source)), np.zeros(len(source), np.int64))


def steps_per_epoch(dataset_size: int, batch_size: int) -> int:
    """Full batches in one epoch, floor(N / B); the rest of each permutation is dropped.

    Raises DmfError where batch_size is not in [1, dataset_size].
    """
    if not 1 <= batch_size <= dataset_size:
        raise DmfError(
            f"batch_size is {batch_size}: expected 1 to {dataset_size}, the number of images"
        )
    return dataset_size // batch_size


def batch(
    source: Source,
    seed: int,
    step: int,
    batch_size: int,
    *,
    rows: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Some or all rows of the global batch of one step, a pure function of (seed, step).

    Epoch `step // floor(N / B)` is a fresh permutation of the N images, cut into batches of B. The
    row at a position of the global batch does not depend on which process asks for it.

    Args:
      source: the split to draw from.
      seed: the run's seed.
      step: counts from 0.
      batch_size: B, images in the global batch, over all processes.
      rows: (n,) whole numbers in [0, B), the positions to return, in this order; None: all B.

    Returns:
      What `Source.rows` gives for these rows. A source with `flip` gives the mirror image where a
      draw by the row's position in the global batch says so.

    Raises:
      DmfError: batch_size exceeds the split, step < 0, rows are not positions in the batch, or a
        file is damaged.
    """
    steps = steps_per_epoch(len(source), batch_size)
    if step < 0:
        raise DmfError(f"step is {step}: expected 0 or more")
    positions = _positions(rows, batch_size)
    epoch, step_in_epoch = divmod(int(step), steps)
    index = _permutation(len(source), int(seed), epoch)[step_in_epoch * batch_size :][positions]
    mirrored = np.zeros(batch_size, np.int64)
    if source.flip:
        mirrored = _mirrored(int(seed), int(step), batch_size)
    return source.rows(index, mirrored[positions])


def _check_no_mock(config: DataConfig) -> None:
    if config.mock:
        raise DmfError(
            f"config.data.mock is True for {config.name!r}: expected False, they need no preparing"
        )


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, (size,) int64, from Philox keyed by (seed, epoch).

    Sorts raw words. NumPy keeps the stream of a bit generator stable between releases, but not the
    stream of `Generator.permutation`. A NumPy upgrade must not change the order of a resumed run.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")
    order.flags.writeable = False
    return order


def _mirrored(seed: int, step: int, batch_size: int) -> np.ndarray:
    """Which rows of a step's global batch are mirrored, (batch_size,) int64 of 0 and 1.

    Each row takes the top bit of a raw word. The counter starts far from the counter of
    `_permutation`, whose key may be the same.
    """
    key = np.array([seed % 2**64, step], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=np.array([0, 0, 0, 1], np.uint64)).random_raw(
        batch_size
    )
    return (words >> np.uint64(63)).astype(np.int64)


def _positions(rows: np.ndarray | None, batch_size: int) -> np.ndarray:
    """The asked positions in the global batch, all of them for None.

    Raises DmfError for anything but whole numbers in [0, batch_size).
    """
    if rows is None:
        return np.arange(batch_size)
    found = np.asarray(rows)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise DmfError(
            f"rows is {found.dtype}{list(found.shape)}: expected one axis of whole numbers, "
            "positions in the batch"
        )
    outside = found[(found < 0) | (found >= batch_size)]
    if len(outside):
        raise DmfError(
            f"rows holds {outside[0]}: expected positions in the global batch, 0 to "
            f"{batch_size - 1}"
        )
    return found
