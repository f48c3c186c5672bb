"""Crops of the two photographs inside scikit-learn: 16x16 colour, 12 classes.

The photographs, a temple and a flower, have 2 x 3 regions each, and a class is a region. A strip
from top to bottom stands in the middle of every region. Held-out crops lie inside it, and training
crops left and right of it, so no pixel is in crops of both splits.
"""

from __future__ import annotations

import numpy as np

from dmf.errors import DmfError

NAMES = ("china.jpg", "flower.jpg")
REGIONS = (2, 3)  # rows and columns of regions in a photograph
NUM_CLASSES = len(NAMES) * REGIONS[0] * REGIONS[1]
MAX_VALUE = 255.0
CROP = 32  # pixels of a photograph, averaged 2 x 2
STRIDE = 8  # pixels from one crop to the next


def starts(first: int, last: int) -> range:
    """Where the crops that lie within pixels first .. last - 1 of one axis begin."""
    return range(first, last - CROP + 1, STRIDE)


def columns(left: int, right: int, fraction: float) -> dict[str, list[int]]:
    """Where the crops of a region from column `left` to `right` begin, by split."""
    width = round(fraction * (right - left))
    strip = left + (right - left - width) // 2
    sides = [*starts(left, strip), *starts(strip + width, right)]
    return {"train": sides, "heldout": [*starts(strip, strip + width)]}


def halved(pixels: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels, rounded: (H, W, C) uint8 -> (H / 2, W / 2, C) uint8."""
    height, width, channels = pixels.shape
    blocks = pixels.reshape(height // 2, 2, width // 2, 2, channels).astype(np.uint16)
    return ((blocks.sum((1, 3)) + 2) // 4).astype(np.uint8)


def crops(photograph: np.ndarray, split: str, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 16, 16, C) of one photograph (H, W, C), and their regions (N,), row by row."""
    height, width, channels = photograph.shape
    rows, cols = (
        np.linspace(0, n, parts + 1).astype(int)
        for n, parts in zip((height, width), REGIONS, strict=True)
    )
    images, regions = [], []
    for region in range(REGIONS[0] * REGIONS[1]):
        i, j = divmod(region, REGIONS[1])
        for top in starts(rows[i], rows[i + 1]):
            for left in columns(cols[j], cols[j + 1], fraction)[split]:
                images.append(halved(photograph[top : top + CROP, left : left + CROP]))
                regions.append(region)
    return np.reshape(images, (-1, CROP // 2, CROP // 2, channels)), np.array(regions, np.int32)


def read(split: str, holdout_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 16, 16, 3) uint8 and labels (N,) int32 of "train" or "heldout", labels in turn.

    Raises DmfError where holdout_fraction leaves a split without a crop in some region.
    """
    from sklearn.datasets import load_sample_image  # a slow import that only these data need

    images, labels = [], []
    for i, name in enumerate(NAMES):
        photograph = load_sample_image(name)
        narrow = photograph.shape[1] // REGIONS[1]
        if not 0 < holdout_fraction < 1 or not all(columns(0, narrow, holdout_fraction).values()):
            raise DmfError(
                f"config.data.holdout_fraction is {holdout_fraction}: expected a share of the "
                f"{narrow} columns of a region that leaves crops of {CROP} in both splits, such as "
                "0.25"
            )
        found, regions = crops(photograph, split, holdout_fraction)
        images.append(found)
        labels.append(regions + i * REGIONS[0] * REGIONS[1])
    x, label = np.concatenate(images), np.concatenate(labels)
    # So far the classes come one after another. Samples take labels in this order, so the first n
    # must hold all classes equally, for any n.
    rank = np.concatenate([np.arange(n) for n in np.bincount(label)])
    order = np.lexsort((label, rank))
    return x[order], label[order]
