"""Precision and recall of samples by nearest neighbours in a feature space."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dmf.errors import DmfError
from dmf.metrics.frechet import check_features

_ROWS_PER_CHUNK = 1024  # bounds the distances in memory: 1024 x 50,000 float64 is 400 MB
# Share of |a|^2 + |b|^2: above the rounding of the expanded square, below real neighbours.
_SAME_POINT = 1e-12


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of `fake` (M, D) against `real` (N, D), both in [0, 1].

        precision = share of fake f with |f - x| <= radius_k(x) for at least one real x
        recall    = share of real x with |x - f| <= radius_k(f) for at least one fake f

    radius_k is the distance to the k-th nearest other point of the same set.
    Both depend on N and M: compare only scores of equal counts.

    Kynkaanniemi et al. 2019 (arXiv 1904.06991), equations 1 and 2.
    Raises DmfError for k < 1, sets of k rows or fewer, non-finite values, unequal dimensions.
    """
    real, fake = np.asarray(real), np.asarray(fake)
    if k < 1:
        raise DmfError(f"k must be at least 1, got {k}")
    check_features(real, "real", min_rows=k + 1)
    check_features(fake, "fake", min_rows=k + 1)
    _check_same_dimension(real, fake)
    return _share_inside(fake, real, k), _share_inside(real, fake, k)


def nearest_distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Euclidean distance (N,) from each of `points` (N, D) to the nearest of `others` (M, D).

    Equal points give exactly 0.
    Raises DmfError for empty sets, non-finite values and unequal dimensions.
    """
    points, others = np.asarray(points), np.asarray(others)
    check_features(points, "points", min_rows=1)
    check_features(others, "others", min_rows=1)
    _check_same_dimension(points, others)
    return np.sqrt(
        np.concatenate([block.min(axis=1) for block in _squared_distance_blocks(points, others)])
    )


def _check_same_dimension(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[1] != b.shape[1]:
        dims = f"{a.shape[1]} and {b.shape[1]}"
        raise DmfError(f"the two point sets have {dims} dimensions, expected equal numbers")


def _share_inside(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    """Share of `points` inside at least one ball: around a centre, with its k-NN radius."""
    # Index k, not k - 1: each point finds itself at distance exactly 0.
    # The copy lets the block go, which a view of one column would keep in memory.
    own = _squared_distance_blocks(centres, centres)
    squared_radii = np.concatenate([np.partition(block, k, axis=1)[:, k].copy() for block in own])
    across = _squared_distance_blocks(points, centres)
    return float(np.concatenate([(block <= squared_radii).any(axis=1) for block in across]).mean())


def _squared_distance_blocks(points: np.ndarray, others: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks (<= chunk, M) of |p - o|^2, float64; exactly 0 for equal points.

    |p - o|^2 = |p|^2 + |o|^2 - 2 p.o
    """
    # A common mean far from 0 would cost the digits of the difference.
    origin = others.mean(axis=0, dtype=np.float64)
    others = others - origin
    others_squared = np.einsum("nd,nd->n", others, others)
    for start in range(0, len(points), _ROWS_PER_CHUNK):
        chunk = points[start : start + _ROWS_PER_CHUNK] - origin
        scale = np.einsum("nd,nd->n", chunk, chunk)[:, None] + others_squared
        squared = scale - 2.0 * (chunk @ others.T)
        squared[squared < _SAME_POINT * scale] = 0.0
        yield squared
