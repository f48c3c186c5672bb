"""Inception score and kernel distance: closed forms, and values of torch-fidelity."""

import importlib
import importlib.util
import io

import numpy as np
import pytest

from dmf.errors import DmfError
from dmf.metrics.inception_score import InceptionScore
from dmf.metrics.kid import kernel_distance
from tests.metrics.test_metrics import feature_pair

# splits, seed of torch-fidelity's shuffle or None for the order of the file
IS_CASES = ((10, None), (1, None), (7, None), (10, 2020), (7, 3))
# Rows of the two sets, then the arguments. 1000 of 1000 rows give one value for any subset.
KID_CASES = {
    "whole": (1000, 1000, dict(subsets=3, subset_size=1000)),
    "subsets": (1000, 1000, dict(subsets=100, subset_size=100)),
    "unequal": (
        700,
        333,
        dict(subsets=20, subset_size=150, seed=7, degree=2, gamma=0.05, coef0=0.5),
    ),
}
DECLARED = []  # operators live as long as the object that declared them


@pytest.fixture(scope="module")
def torch_fidelity():
    """Imports a module of torch-fidelity, also where torchvision has no compiled operators."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "torch_fidelity")):
        pytest.skip(
            "torch-fidelity is not installed: "
            "nothing to compare with (its stored values are still checked)"
        )
    import torch

    try:
        importlib.import_module("torch_fidelity")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        DECLARED.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            DECLARED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module


def logits() -> np.ndarray:
    return (2 * np.random.RandomState(5).standard_normal((500, 1008))).astype(np.float32)


def shuffled(count: int, seed: int | None) -> np.ndarray | None:
    """Position of each row after torch-fidelity's shuffle."""
    return None if seed is None else np.argsort(np.random.RandomState(seed).permutation(count))


def score_of(rows: np.ndarray, part: int = 64, **arguments) -> tuple[float, float]:
    score = InceptionScore(len(rows), **arguments)
    for start in range(0, len(rows), part):
        score.add(rows[start : start + part])
    return score.result()


def one_hot(classes: np.ndarray, count: int) -> np.ndarray:
    """Logits of certain predictions: probabilities of exactly 0 and 1 in float64."""
    return 2000.0 * np.eye(count)[classes]


# ---- inception score


@pytest.mark.parametrize(("splits", "seed"), IS_CASES)
def test_inception_score_is_torch_fidelitys_stored_one(golden, splits, seed):
    with golden("kid_is_reference.npz") as stored:
        expected = stored[f"is/{splits}" if seed is None else f"is/{splits}/shuffled_{seed}"]
    got = score_of(logits(), splits=splits, order=shuffled(500, seed))
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)
    if (splits, seed) == (10, None):
        assert got == pytest.approx((5.5703014678, 0.1994477263), rel=1e-9)


@pytest.mark.parametrize(("splits", "seed"), [*IS_CASES, (500, None), (3, 11)])
def test_inception_score_is_torch_fidelitys_own(torch_fidelity, splits, seed):
    import torch

    metric = torch_fidelity("torch_fidelity.metric_isc").isc_features_to_metric
    expected = metric(torch.from_numpy(logits()), splits, seed is not None, seed or 0)
    got = score_of(logits(), splits=splits, order=shuffled(500, seed))
    np.testing.assert_allclose(got, list(expected.values()), rtol=1e-12, atol=1e-13)


def test_inception_score_of_certain_balanced_predictions_is_the_number_of_classes():
    classes = np.arange(120) % 6
    assert score_of(one_hot(classes, 6), splits=4) == pytest.approx((6.0, 0.0), abs=1e-12)
    assert score_of(np.zeros((120, 6)), splits=4) == pytest.approx((1.0, 0.0), abs=1e-12)
    assert score_of(one_hot(classes // 3, 6), splits=4) == pytest.approx((2.0, 0.0), abs=1e-12)


def test_splits_are_cut_in_the_order_of_the_file_unless_an_order_is_given():
    by_class = one_hot(np.repeat(np.arange(5), 20), 5)
    assert score_of(by_class, splits=5) == pytest.approx((1.0, 0.0), abs=1e-12)
    dealt = (
        np.arange(100).reshape(20, 5).T.ravel()
    )  # row -> position: each class is dealt to every split
    assert score_of(by_class, splits=5, order=dealt) == pytest.approx((5.0, 0.0), abs=1e-12)


def test_the_standard_deviation_is_that_of_the_splits():
    rows = np.concatenate(
        [np.zeros((10, 3)), one_hot(np.arange(9) % 3, 3)]
    )  # 19 rows: splits of 9 and 10
    swapped = np.concatenate([rows[10:], rows[:10]])
    assert score_of(swapped, splits=2) == pytest.approx((2.0, 1.0), abs=1e-12)


@pytest.mark.parametrize("part", [1, 37, 50, 499])
def test_inception_score_does_not_depend_on_the_parts(part):
    expected = score_of(logits(), part=500, order=shuffled(500, 1))
    assert score_of(logits(), part=part, order=shuffled(500, 1)) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("seed", [None, 4])
def test_a_stopped_and_resumed_inception_score_is_the_same_bits(seed):
    rows, cuts = logits()[:100], (0, 13, 50, 77, 100)
    for stop in range(len(cuts)):
        whole = InceptionScore(100, 3, shuffled(100, seed))
        part = InceptionScore(100, 3, shuffled(100, seed))
        for i, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
            whole.add(rows[start:end])
            if i == stop:
                file = io.BytesIO()
                np.savez(file, **part.state())
                file.seek(0)
                part = InceptionScore.from_state(np.load(file, allow_pickle=False))
            part.add(rows[start:end])
        assert part.result() == whole.result()


def test_a_state_of_the_inception_score_is_a_copy_both_ways():
    first, rows = InceptionScore(4, 2), np.eye(4)
    first.add(rows[:1])
    state = first.state()
    first.add(rows[1:])
    for _ in range(
        2
    ):  # what the sums did since, or what the first resumed ones do, is not in the state
        resumed = InceptionScore.from_state(state)
        resumed.add(rows[1:])
        assert resumed.result() == first.result()


def test_inception_score_refuses_bad_input():
    with pytest.raises(DmfError, match="1 to 9 splits for 9 samples, got 10"):
        InceptionScore(9, 10)
    with pytest.raises(DmfError, match="1 to 9 splits for 9 samples, got 0"):
        InceptionScore(9, 0)
    for order in (np.arange(8), np.zeros(9, int), np.arange(1, 10)):
        with pytest.raises(DmfError, match=r"order must be a permutation of 0\.\.8"):
            InceptionScore(9, 3, order)
    score = InceptionScore(9, 3)
    score.add(np.zeros((5, 4)))
    for bad, message in (
        (np.full((2, 4), np.nan), "logits has non-finite values in 2 of 2 rows"),
        (np.zeros((2, 3)), "logits have 3 classes, expected 4"),
        (np.zeros((5, 4)), "10 rows of logits were given, expected 9 in all"),
    ):
        with pytest.raises(DmfError, match=message):
            score.add(bad)
    with pytest.raises(DmfError, match="5 rows of logits were given, expected 9 in all"):
        score.result()
    with pytest.raises(DmfError, match=r"the state of an inception score has arrays \['seen'\]"):
        InceptionScore.from_state({"seen": score.state()["seen"]})
    score.add(np.zeros((4, 4)))  # what was refused left nothing behind
    assert score.result() == pytest.approx((1.0, 0.0), abs=1e-12)


# ---- kernel distance


@pytest.fixture(scope="module")
def features() -> tuple[np.ndarray, np.ndarray]:
    return feature_pair(64, 1000, seed=10)


@pytest.mark.parametrize("case", KID_CASES)
def test_kernel_distance_is_torch_fidelitys_stored_one(golden, features, case):
    real, fake, arguments = KID_CASES[case]
    got = kernel_distance(features[0][:real], features[1][:fake], **arguments)
    with golden("kid_is_reference.npz") as stored:
        np.testing.assert_allclose(
            got, stored[f"kid/{case}"], rtol=1e-9, atol=1e-14
        )  # of its float64
        if case == "whole":
            # Not 1e-9: torch-fidelity sums a million kernel values around 6 in float32.
            # Processors differ there by 1e-5.
            assert got[0] == pytest.approx(float(stored["kid/whole_float32"]), rel=3e-5)


@pytest.mark.parametrize("case", ["subsets", "unequal"])
def test_kernel_distance_is_torch_fidelitys_own(torch_fidelity, features, case):
    import torch

    real, fake, given = KID_CASES[case]
    arguments = {"seed": 2020, "degree": 3, "gamma": None, "coef0": 1} | given
    sets = [
        torch.from_numpy(x.astype(np.float64)) for x in (features[0][:real], features[1][:fake])
    ]
    names = {f"kid_{k}": arguments[k] for k in ("subsets", "subset_size")}
    names |= {f"kid_kernel_poly_{k}": arguments[k] for k in ("degree", "gamma", "coef0")}
    metric = torch_fidelity("torch_fidelity.metric_kid").kid_features_to_metric
    expected = metric(*sets, kid_kernel="poly", rng_seed=arguments["seed"], verbose=False, **names)
    got = kernel_distance(features[0][:real], features[1][:fake], **given)
    np.testing.assert_allclose(got, list(expected.values()), rtol=1e-9)


def test_kernel_distance_of_a_linear_kernel_is_the_distance_of_the_means_less_its_bias(features):
    x, y = (f[:200].astype(np.float64) for f in features)
    bias = (np.var(x, axis=0, ddof=1).sum() + np.var(y, axis=0, ddof=1).sum()) / 200
    expected = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2) - bias
    got = kernel_distance(x, y, subsets=2, subset_size=200, degree=1, gamma=1.0, coef0=5.0)
    assert got[0] == pytest.approx(expected, rel=1e-10) and got[1] < 1e-12


def test_kernel_distance_is_its_definition_term_by_term():
    x, y = np.random.RandomState(0).randn(2, 5, 3)

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    same = (
        sum(kernel(s[i], s[j]) for s in (x, y) for i in range(5) for j in range(5) if i != j) / 20
    )
    across = sum(kernel(a, b) for a in x for b in y) / 25
    assert kernel_distance(x, y, subsets=1, subset_size=5)[0] == pytest.approx(
        same - 2 * across, rel=1e-12
    )


def test_kernel_distance_of_one_distribution_is_zero_within_its_error():
    x, y = np.random.RandomState(1).randn(2, 4000, 16)
    mean, std = kernel_distance(x, y, subsets=60, subset_size=100)
    assert abs(mean) < 4 * std / np.sqrt(60) and std > 0
    assert kernel_distance(x, y + 0.5, subsets=60, subset_size=100)[0] > 10 * std


def test_kernel_distance_refuses_bad_input():
    x = np.random.RandomState(2).randn(30, 4)
    with pytest.raises(DmfError, match="real has 30 rows, at least 1000"):
        kernel_distance(x, x)
    with pytest.raises(DmfError, match="fake has 29 rows, at least 30"):
        kernel_distance(x, x[1:], subset_size=30)
    with pytest.raises(DmfError, match="fake has non-finite values in 30 of 30 rows"):
        kernel_distance(x, x * np.inf, subset_size=30)
    with pytest.raises(DmfError, match="4 and 3 dimensions"):
        kernel_distance(x, x[:, 1:], subset_size=30)
    for bad in (dict(subsets=0), dict(subset_size=1), dict(degree=0)):
        with pytest.raises(DmfError, match="subsets >= 1, subset_size >= 2, degree >= 1"):
            kernel_distance(x, x, **{"subset_size": 30, **bad})
