"""Moments that are summed in parts, and the Frechet distance in 2048 dimensions."""

import io

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from dmf.errors import DmfError
from dmf.metrics.frechet import Moments, MomentSums, frechet_distance, moments
from tests.metrics.test_metrics import feature_pair

# Of feature_pair(2048, 3000, seed=12): sums of both means, traces of both covariances, and the
# distance by public implementations. torch-fidelity is left out: with float32 means it is 2e-8 off.
D2048_CHECKSUM = (1040.866923698257, 1052.3990833546186, 168.61237329595866, 213.04855391735785)
D2048_DISTANCE = {
    "float64 eigenvalues": 44.546741824553806,
    "pytorch-fid": 44.54674182455324,
    "torchmetrics": 44.546741824553635,
    "clean-fid": 44.54674182455324,
    "EDM": 44.54674182455325,
    "MeanFlow": 44.54674182455324,
}


def in_parts(features: np.ndarray, sizes: tuple[int, ...]) -> MomentSums:
    """Sums of the features in parts of these sizes. The last part is the rest."""
    sums = MomentSums()
    for part in np.split(features, np.cumsum(sizes)):
        sums.add(part)
    return sums


def assert_equal_moments(got: Moments, expected: Moments, rtol: float) -> None:
    """Compares means relatively, and each covariance relative to its two variances."""
    assert got.n == expected.n and got.mean.dtype == got.cov.dtype == np.float64
    np.testing.assert_allclose(got.mean, expected.mean, rtol=rtol, atol=0)
    sd = np.sqrt(np.diag(expected.cov))
    assert np.abs((got.cov - expected.cov) / np.outer(sd, sd)).max() < rtol


@pytest.mark.parametrize(
    "sizes",
    [(), (1,), (1000, 1), (4097, 500), (7,) * 600],
    ids=lambda sizes: f"{len(sizes) + 1} parts",
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moments_in_parts_are_the_moments_of_the_whole(sizes, dtype):
    rng = np.random.RandomState(0)
    features = (rng.randn(5000, 12) @ rng.randn(12, 12) + 3).astype(
        dtype
    )  # more rows than one chunk
    assert_equal_moments(in_parts(features, sizes).moments(), moments(features), rtol=1e-12)


def test_a_mean_a_million_times_the_spread_cancels_nothing():
    features = 1e4 + 1e-2 * np.random.RandomState(1).randn(3000, 8)
    got = in_parts(features, (256, 256, 1, 1024)).moments()
    assert_equal_moments(got, moments(features), rtol=1e-12)
    naive = features.T @ features / len(features) - np.outer(
        features.mean(axis=0), features.mean(axis=0)
    )
    assert (
        np.abs(naive - got.cov).max() > 1e-5 * got.cov.max()
    )  # what sums without a pivot would give


def test_a_first_part_unlike_the_rest_costs_no_digits():
    rng = np.random.RandomState(2)
    features = np.concatenate([rng.randn(10, 6) + 30, rng.randn(2000, 6)])
    assert_equal_moments(in_parts(features, (10, 100)).moments(), moments(features), rtol=1e-12)


def test_whole_numbers_are_exact():
    features = np.array([[0.0, 2.0], [4.0, 2.0], [2.0, 8.0]])
    got = in_parts(features, (2,)).moments()
    assert (
        got.n == 3
        and got.mean.tolist() == [2.0, 4.0]
        and got.cov.tolist() == [[4.0, 0.0], [0.0, 12.0]]
    )


@pytest.mark.parametrize("stop", range(5))
def test_stopped_and_resumed_sums_are_the_same_bits(stop):
    parts = np.split(np.random.RandomState(3).randn(900, 5).astype(np.float32), [300, 301, 650])
    whole, first = MomentSums(), MomentSums()
    for part in parts:
        whole.add(part)
    for part in parts[:stop]:
        first.add(part)
    file = io.BytesIO()
    np.savez(file, **first.state())
    file.seek(0)
    resumed = MomentSums.from_state(np.load(file, allow_pickle=False))
    for part in parts[stop:]:
        resumed.add(part)
    for name, value in whole.state().items():
        assert np.array_equal(resumed.state()[name], value), name


def test_a_state_is_a_copy_both_ways():
    sums = in_parts(np.eye(4), (2,))
    state = sums.state()
    resumed = MomentSums.from_state(state)
    sums.add(np.ones((3, 4)))
    resumed.add(np.ones((3, 4)))
    assert np.array_equal(sums.moments().cov, resumed.moments().cov)
    assert (
        int(state["count"]) == 4
        and state["outer"].sum() == in_parts(np.eye(4), (2,)).state()["outer"].sum()
    )


def test_bad_parts_are_refused_and_leave_the_sums_as_they_were():
    sums = in_parts(np.random.RandomState(4).randn(10, 3), (5,))
    before = sums.state()
    for bad, message in (
        (np.full((7, 3), [1, np.nan, np.inf]), "features has non-finite values in 7 of 7 rows"),
        (np.zeros((2, 4)), "features have 4 dimensions, expected 3 as in the parts before"),
        (np.zeros((0, 3)), "features has 0 rows, at least 1"),
        (np.zeros(3), r"features must have shape \(N, D\), got \(3,\)"),
    ):
        with pytest.raises(DmfError, match=message):
            sums.add(bad)
    assert all(np.array_equal(value, before[name]) for name, value in sums.state().items())


def test_too_few_rows_and_foreign_states_are_refused():
    one = MomentSums()
    one.add(np.zeros((1, 3)))
    for sums, count in ((MomentSums(), 0), (one, 1)):
        with pytest.raises(DmfError, match=f"the sums hold {count} rows, at least 2 are needed"):
            sums.moments()
    state = one.state()
    for broken in (
        {k: v for k, v in state.items() if k != "sum"},
        state | {"outer": np.zeros((3, 2))},
        state | {"more": np.zeros(1)},
    ):
        with pytest.raises(DmfError, match="the state of moment sums has arrays"):
            MomentSums.from_state(broken)


def test_frechet_distance_of_2048_dimensions_agrees_with_public_implementations():
    with threadpool_limits(
        limits=1, user_api="blas"
    ):  # 6 s on one core; threads that wait for busy cores take minutes
        a, b = feature_pair(2048, 3000, seed=12)
        first, second = in_parts(a, (1000,)).moments(), moments(b)
        distance = frechet_distance(first, second)
    sums = (first.mean.sum(), second.mean.sum(), np.trace(first.cov), np.trace(second.cov))
    np.testing.assert_allclose(sums, D2048_CHECKSUM, rtol=1e-9)  # the recipe drew the same features
    for name, value in D2048_DISTANCE.items():
        assert distance == pytest.approx(value, rel=1e-9), name
