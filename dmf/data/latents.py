"""The data set of encoded images: the normal law of each image's latent.

`dmf.convert.encode` writes the files. Reading needs neither TensorFlow nor jax.
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
    path, entry = folder / shards.LABELS, about["labels"]
    shards.check_sum(path, entry["bytes"], entry["sha256"])
    try:
        labels = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = " ".join(str(error).split())[:200]
        raise DmfError(
            f"{path} cannot be read ({type(error).__name__}: {why}): expected an array of labels"
        ) from error
    if labels.shape != (about["count"],) or labels.dtype != np.int32:
        raise DmfError(
            f"{path} holds {labels.dtype}{list(labels.shape)}: expected int32[{about['count']}]"
        )
    return labels
