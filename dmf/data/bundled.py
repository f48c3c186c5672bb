"""The two data sets made of what scikit-learn carries: digits, and crops of photographs.

Digits are 1797 handwritten ones: 8x8 grey, values 0 to 16, 10 classes.

Photos are crops of two photographs: 16x16 colour, 12 classes. The photographs, a temple and a
flower, have 2 x 3 regions each, and a class is a region. A strip from top to bottom stands in the
middle of every region. Held-out crops lie inside it, and training crops left and right of it. So
no pixel is in crops of both splits.
"""

from __future__ import annotations

import numpy as np

from dmf.errors import DmfError

DIGITS, DIGITS_MAX = 10, 16.0  # classes, largest value
NAMES = ("china.jpg", "flower.jpg")
REGIONS = (2, 3)  # rows and columns of regions in a photograph
PHOTOS = len(NAMES) * REGIONS[0] * REGIONS[1]
PHOTOS_MAX = 255.0
CROP = 32  # pixels of a photograph, averaged 2 x 2
STRIDE = 8  # pixels from one crop to the next


def heldout_mask(labels: np.ndarray, fraction: float) -> np.ndarray:
    """(N,) bool, True for held-out rows: floor(fraction n) of a class's n rows, evenly spaced.

    The file runs from writer to writer. With even spaces both splits have digits of all writers,
    and the split depends on no random stream.
    """
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        counts = np.floor(np.arange(len(rows) + 1) * fraction)
        mask[rows] = np.diff(counts) > 0
    return mask


def read_digits(split: str, holdout_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 8, 8, 1) uint8 in [0, 16] and labels (N,) int32 of "train" or "heldout".

    Raises DmfError where holdout_fraction leaves one of the two splits empty.
    """
    from sklearn.datasets import load_digits  # a slow import that only this data set needs

    source = load_digits()
    heldout = heldout_mask(source.target, holdout_fraction)
    if heldout.all() or not heldout.any():
        raise DmfError(
            f"config.data.holdout_fraction is {holdout_fraction}: expected a number between 0 and "
            "1 that leaves images in both splits"
        )
    rows = heldout if split == "heldout" else ~heldout
    return source.images[rows][..., None].astype(np.uint8), source.target[rows].astype(np.int32)


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


def read_photos(split: str, holdout_fraction: float) -> tuple[np.ndarray, np.ndarray]:
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
