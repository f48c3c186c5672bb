"""Images in memory or encoded on disk, and batches that are a pure function of (seed, step).

There is no iterator state, so a resumed run sees the examples the interrupted one would have seen, and the
global batch of a step is the same whatever the number of hosts. Reading needs no TensorFlow and no network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dmf.data import cifar10, digits, latents, photos
from dmf.data.latents import Latents
from dmf.errors import DmfError

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class DataConfig:
    """Which images are read, and what is done to them on the device before a training step."""

    name: str = "digits"  # a key of `DATASETS`
    # cifar10: where TFDS data is prepared, "" = $TFDS_DATA_DIR, else ~/tensorflow_datasets; imagenet256_latents: what
    # --mode=encode has written
    data_dir: str = ""
    holdout_fraction: float = (
        0.25  # digits, photos: share of the one set that is "heldout", whatever the training seed
    )
    mock: bool = False  # cifar10, imagenet256_latents: random images, to try the code path only; reads no file
    flip: bool = False  # * mirror each training image with probability 1/2, without telling the network; latents: its own one
    augment: float = 0.0  # * probability p of the EDM pipe, which does tell the network (`augment.edm_augment`); 0 = off


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split in memory; `to_float` maps stored values [0, max_value] to [-1, 1]."""

    images: np.ndarray  # (N, H, W, C), as stored (uint8)
    labels: np.ndarray  # (N,) int32, in [0, num_classes)
    num_classes: int
    max_value: float
    name: str
    split: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return self.images.shape[1:]

    def to_float(self, images: np.ndarray) -> np.ndarray:
        """Returns stored values as network input, x = 2 * stored / max_value - 1, float32, any shape."""
        return images.astype(np.float32) / np.float32(self.max_value / 2) - np.float32(1)


def _load_digits(config: DataConfig, split: Split) -> Dataset:
    if config.mock:
        raise DmfError(
            "config.data.mock is True for 'digits': expected False, they need no preparing"
        )
    images, labels = digits.read(split, config.holdout_fraction)
    return Dataset(images, labels, digits.NUM_CLASSES, digits.MAX_VALUE, "digits", split)


def _load_photos(config: DataConfig, split: Split) -> Dataset:
    if config.mock:
        raise DmfError(
            "config.data.mock is True for 'photos': expected False, they need no preparing"
        )
    images, labels = photos.read(split, config.holdout_fraction)
    return Dataset(images, labels, photos.NUM_CLASSES, photos.MAX_VALUE, "photos", split)


def _load_cifar10(config: DataConfig, split: Split) -> Dataset:
    images, labels = cifar10.read(split, config.data_dir, mock=config.mock)
    return Dataset(images, labels, cifar10.NUM_CLASSES, cifar10.MAX_VALUE, "cifar10", split)


def _load_imagenet256(config: DataConfig, split: Split) -> Latents:
    return (
        latents.mock(split, config.flip)
        if config.mock
        else latents.read(config.data_dir, split, config.flip)
    )


DATASETS: dict[str, Callable[[DataConfig, Split], Dataset | Latents]] = {
    "digits": _load_digits,
    "photos": _load_photos,
    "cifar10": _load_cifar10,
    "imagenet256_latents": _load_imagenet256,
}


def load(config: DataConfig, split: Split) -> Dataset | Latents:
    """Reads one split of the configured data set into memory, or opens its files.

    Raises:
      DmfError: unknown name or split, a field out of range, or data that is not prepared or is damaged.
    """
    if config.name not in DATASETS:
        raise DmfError(
            f"config.data.name is {config.name!r}: expected one of {', '.join(DATASETS)}"
        )
    if split not in ("train", "heldout"):
        raise DmfError(f"split is {split!r}: expected 'train' or 'heldout'")
    if not 0 <= config.augment <= 1:
        raise DmfError(f"config.data.augment is {config.augment}: expected a probability in [0, 1]")
    return DATASETS[config.name](config, split)


def held_out_or(train: Dataset | Latents, config: DataConfig) -> tuple[Dataset | Latents, str]:
    """The held-out images, or where none can be read those of `train`, and what to call them: "held-out" or "training"."""
    try:
        return load(config, "heldout"), "held-out"
    except DmfError:
        return train, "training"


def identity(dataset: Dataset | Latents) -> dict[str, Any]:
    """What tells a data set from another one, as plain values: a resumed run has to find the same."""
    found: dict[str, Any] = {"name": dataset.name, "split": dataset.split, "count": len(dataset)}
    if isinstance(dataset, Latents) and dataset.about:
        found |= {
            name: dataset.about[name]
            for name in ("scale", "dtype", "source", "vae", "labels")
            if name in dataset.about
        }
    return found


def steps_per_epoch(dataset_size: int, batch_size: int) -> int:
    """Returns the number of full batches in one epoch, floor(N / B); the rest of each permutation is dropped.

    Raises:
      DmfError: batch_size is not in [1, dataset_size].
    """
    if not 1 <= batch_size <= dataset_size:
        raise DmfError(
            f"batch_size is {batch_size}: expected 1 to {dataset_size}, the number of images"
        )
    return dataset_size // batch_size


@functools.lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of one epoch, (size,) int64, from Philox keyed by (seed, epoch).

    Sorts raw words, because NumPy keeps the stream of a bit generator stable between releases but not that of
    `Generator.permutation`: a NumPy upgrade must not change the order of a resumed run.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")
    order.flags.writeable = False
    return order


def _mirrored(seed: int, step: int, batch_size: int) -> np.ndarray:
    """Returns which rows of a step's global batch are mirrored, (batch_size,) int64 of 0 and 1: one raw word's top bit each.

    The counter starts far from that of `_permutation`, whose key may be the same.
    """
    key = np.array([seed % 2**64, step], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=np.array([0, 0, 0, 1], np.uint64)).random_raw(
        batch_size
    )
    return (words >> np.uint64(63)).astype(np.int64)


def _positions(rows: np.ndarray | None, batch_size: int) -> np.ndarray:
    """Returns the asked positions in the global batch, all of them for None. Raises DmfError where one cannot be."""
    if rows is None:
        return np.arange(batch_size)
    found = np.asarray(rows)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise DmfError(
            f"rows is {found.dtype}{list(found.shape)}: expected one axis of whole numbers, positions in the batch"
        )
    outside = found[(found < 0) | (found >= batch_size)]
    if len(outside):
        raise DmfError(
            f"rows holds {outside[0]}: expected positions in the global batch, 0 to {batch_size - 1}"
        )
    return found


def batch(
    dataset: Dataset | Latents,
    seed: int,
    step: int,
    batch_size: int,
    *,
    rows: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Returns some or all rows of the global batch of one step, which is a pure function of (seed, step).

    Epoch `step // floor(N / B)` is a fresh permutation of the N images, cut into batches of B. What stands at a position of
    the global batch does not depend on which host asks for it, nor on what else it asks for.

    Args:
      dataset: the split to draw from.
      seed: the run's seed.
      step: counts from 0.
      batch_size: B, images in the global batch, over all hosts.
      rows: (n,) whole numbers in [0, B), the positions that this host supplies, returned in the order given; None: all B.

    Returns:
      x (n, H, W, C) float32 in [-1, 1] and label (n,) int32. Of encoded images x is the mean of the scaled latent, and there
      is also std, shaped as x: the latent is x + std * noise. With `flip` each row is that of the image or of its mirror
      image, which is drawn by its position in the global batch.

    Raises:
      DmfError: batch_size exceeds the split, step < 0, rows are not positions in the batch, or a file of encoded images is
        damaged.
    """
    steps = steps_per_epoch(len(dataset), batch_size)
    if step < 0:
        raise DmfError(f"step is {step}: expected 0 or more")
    positions = _positions(rows, batch_size)
    epoch, step_in_epoch = divmod(int(step), steps)
    index = _permutation(len(dataset), int(seed), epoch)[step_in_epoch * batch_size :][positions]
    if isinstance(dataset, Latents):
        mirrored = (
            _mirrored(int(seed), int(step), batch_size)
            if dataset.flip
            else np.zeros(batch_size, np.int64)
        )
        return dataset.rows(index, mirrored[positions])
    return {"x": dataset.to_float(dataset.images[index]), "label": dataset.labels[index]}
