"""Kernel distance between two sets of features; with Inception features this is the KID."""

from __future__ import annotations

import numpy as np

from dmf.errors import DmfError
from dmf.metrics.frechet import check_features


def kernel_distance(
    real: np.ndarray,
    fake: np.ndarray,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
) -> tuple[float, float]:
    """Squared kernel distance of two sets of features: its mean and standard deviation (ddof = 0).

    Both are taken over random subsets x of `real` (N, D) and y of `fake` (M, D):

        MMD^2 = 1/(m (m-1)) sum_{i != j} [k(x_i, x_j) + k(y_i, y_j)] - 2/m^2 sum_ij k(x_i, y_j)
        k(a, b) = (gamma a.b + coef0)^degree
        m = subset_size,   gamma = 1/D unless given

    The estimate is unbiased: equal distributions score around 0, some of them below.
    Subsets are drawn without replacement, in the order of torch-fidelity with `real` first.
    Sums are float64. torch-fidelity's are float32, and agree to about 5 digits.

    Binkowski et al. 2018 (arXiv 1801.01401), section 4.
    Raises DmfError for non-finite values, unequal dimensions, and a wrong size of subsets.
    """
    real, fake = np.asarray(real), np.asarray(fake)
    if subsets < 1 or subset_size < 2 or degree < 1:
        raise DmfError(
            f"expected subsets >= 1, subset_size >= 2, degree >= 1, got {subsets}, {subset_size}, "
            f"{degree}"
        )
    check_features(real, "real", min_rows=subset_size)
    check_features(fake, "fake", min_rows=subset_size)
    if real.shape[1] != fake.shape[1]:
        raise DmfError(
            f"the two feature sets have {real.shape[1]} and {fake.shape[1]} dimensions, expected "
            "equal numbers"
        )
    scale = 1.0 / real.shape[1] if gamma is None else gamma
    rng = np.random.RandomState(seed)  # its stream is frozen across NumPy versions
    values = np.empty(subsets)
    for i in range(subsets):
        x = real[rng.choice(len(real), subset_size, replace=False)].astype(np.float64)
        y = fake[rng.choice(len(fake), subset_size, replace=False)].astype(np.float64)
        kernels = (_kernel(z, z, degree, scale, coef0) for z in (x, y))
        same = sum(k.sum() - np.trace(k) for k in kernels)
        across = _kernel(x, y, degree, scale, coef0).sum()
        values[i] = same / (subset_size * (subset_size - 1)) - 2.0 * across / subset_size**2
    return float(values.mean()), float(values.std())


def _kernel(x: np.ndarray, y: np.ndarray, degree: int, gamma: float, coef0: float) -> np.ndarray:
    """(gamma x y^T + coef0)^degree, by repeated products: NumPy's powers use logarithms."""
    base = gamma * (x @ y.T) + coef0
    power = base.copy()
    for _ in range(degree - 1):
        power *= base
    return power
