"""The 1797 handwritten digits inside scikit-learn: 8x8 grey, values 0 to 16, 10 classes."""

from __future__ import annotations

import numpy as np

from dmf.errors import DmfError

NUM_CLASSES = 10
MAX_VALUE = 16.0


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


def read(split: str, holdout_fraction: float) -> tuple[np.ndarray, np.ndarray]:
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
