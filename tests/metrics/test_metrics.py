"""The metrics: closed forms, independent implementations, scores of real digits and noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestNeighbors

from dmf.errors import DmfError
from dmf.metrics import precision_recall as precision_recall_module
from dmf.metrics.frechet import Moments, frechet_distance, moments
from dmf.metrics.labelled import DigitsScorer
from dmf.metrics.precision_recall import nearest_distances, precision_recall
from tests import GOLDEN, ROOT

GOLDEN = GOLDEN / "frechet_reference.npz"
INDEPENDENT = (
    "exact_f64_eigh",
    "pytorch_fid",
    "torchmetrics_f64",
    "cleanfid",
    "edm",
    "meanflow_jax",
)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def feature_pair(dim: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The recipe behind the golden values: two rectified Gaussians with a common mixing matrix."""
    rng = np.random.RandomState(seed)
    mixing = rng.standard_normal((dim, dim)) / np.sqrt(dim)
    centre = 0.4 + 0.2 * rng.rand(dim)

    def rectified(shift: np.ndarray | float, gain: float) -> np.ndarray:
        noise = rng.standard_normal((count, dim))
        return np.maximum(centre + shift + gain * noise @ mixing.T * 0.3, 0).astype(np.float32)

    first = rectified(0.0, 1.0)
    return first, rectified(0.03 * rng.standard_normal(dim), 1.15)


def frechet_from_rows(a: np.ndarray, b: np.ndarray) -> float:
    """The distance from the rows, without a covariance.

    tr (..)^1/2 is the nuclear norm of A_c B_c^T.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    a_centred, b_centred = a - a.mean(axis=0), b - b.mean(axis=0)
    scale = np.sqrt((len(a) - 1) * (len(b) - 1))
    cross = np.linalg.norm(a_centred @ b_centred.T, ord="nuc") / scale
    spread = np.sum(a_centred**2) / (len(a) - 1) + np.sum(b_centred**2) / (len(b) - 1)
    return float(np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + spread - 2 * cross)


# ---- Frechet distance


def test_frechet_agrees_with_six_implementations_on_full_rank(
    golden: dict[str, np.ndarray],
) -> None:
    a, b = feature_pair(64, 1000, seed=10)
    assert a.sum(dtype=np.float64) == pytest.approx(float(golden["d64_n1000/sum_a"]), rel=1e-9)
    assert b.sum(dtype=np.float64) == pytest.approx(float(golden["d64_n1000/sum_b"]), rel=1e-9)
    ours = frechet_distance(moments(a), moments(b))
    assert ours == pytest.approx(0.2588243788139, rel=1e-9)
    for name in INDEPENDENT:
        assert ours == pytest.approx(float(golden[f"d64_n1000/{name}"]), rel=1e-9), name


def test_frechet_is_exact_on_singular_covariances(golden: dict[str, np.ndarray]) -> None:
    a, b = golden["d64_n50/a"], golden["d64_n50/b"]
    ours = frechet_distance(moments(a), moments(b))
    assert ours == pytest.approx(
        float(golden["d64_n50/exact_50_digits"]), rel=1e-12
    )  # 50-digit arithmetic
    assert ours == pytest.approx(frechet_from_rows(a, b), rel=1e-12)
    for name in INDEPENDENT:
        # Not 1e-9: they are 2e-8 off, by square roots of eigenvalues that are zero up to rounding.
        assert ours == pytest.approx(float(golden[f"d64_n50/{name}"]), rel=3e-8), name


def test_frechet_of_unequal_counts_and_ranks_matches_the_data_matrix_route() -> None:
    rng = np.random.RandomState(0)
    a, b = rng.randn(30, 48) @ rng.randn(48, 48), rng.randn(200, 48) + 0.5
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(
        frechet_from_rows(a, b), rel=1e-12
    )


def test_frechet_of_diagonal_covariances_is_the_sum_of_one_dimensional_distances() -> None:
    rng = np.random.RandomState(1)
    mean_a, mean_b = rng.randn(2, 12)
    sd_a, sd_b = rng.rand(2, 12) * 3
    sd_b[3] = 0.0  # one direction without spread
    expected = np.sum((mean_a - mean_b) ** 2 + (sd_a - sd_b) ** 2)
    a, b = Moments(9, mean_a, np.diag(sd_a**2)), Moments(9, mean_b, np.diag(sd_b**2))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-13)


def test_frechet_of_a_pure_shift_is_its_squared_length_and_of_the_same_set_zero() -> None:
    rng = np.random.RandomState(2)
    features = rng.randn(300, 20) @ rng.randn(20, 20)
    shift = rng.randn(20)
    a = moments(features)
    assert frechet_distance(a, moments(features + shift)) == pytest.approx(
        np.sum(shift**2), rel=1e-11
    )
    assert 0.0 <= frechet_distance(a, a) < 1e-13 * np.trace(a.cov)


def test_frechet_is_symmetric_and_unchanged_by_rotation() -> None:
    a, b = feature_pair(64, 50, seed=3)
    rotation = np.linalg.qr(np.random.RandomState(4).randn(64, 64))[0]
    forward = frechet_distance(moments(a), moments(b))
    assert frechet_distance(moments(b), moments(a)) == pytest.approx(forward, rel=1e-13)
    assert frechet_distance(moments(a @ rotation), moments(b @ rotation)) == pytest.approx(
        forward, rel=1e-11
    )


def test_moments_are_the_unbiased_float64_ones_across_chunks() -> None:
    features = (1000 + np.random.RandomState(5).randn(9000, 3)).astype(np.float32)  # three chunks
    got = moments(features)
    assert got.n == 9000 and got.mean.dtype == got.cov.dtype == np.float64
    np.testing.assert_allclose(got.mean, features.astype(np.float64).mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(
        got.cov, np.cov(features.astype(np.float64).T), rtol=1e-10, atol=1e-12
    )


def test_moments_refuse_bad_features_and_count_the_bad_rows() -> None:
    features = np.zeros((7, 3))
    features[2, 1], features[5, 0], features[5, 2] = np.nan, np.inf, np.nan
    with pytest.raises(DmfError, match="non-finite values in 2 of 7 rows"):
        moments(features)
    with pytest.raises(DmfError, match="1 rows, at least 2"):
        moments(np.zeros((1, 3)))
    with pytest.raises(DmfError, match=r"\(N, D\), got \(2, 3, 4\)"):
        moments(np.zeros((2, 3, 4)))
    with pytest.raises(DmfError, match="3 and 4 dimensions"):
        frechet_distance(moments(np.eye(3)), moments(np.eye(4)))


# ---- precision and recall


def test_precision_recall_of_identical_and_of_far_sets() -> None:
    points = np.random.RandomState(6).randn(200, 5)
    assert precision_recall(points, points) == (1.0, 1.0)
    assert precision_recall(points, points + 100.0) == (0.0, 0.0)


def test_dropping_half_of_the_modes_halves_recall_alone() -> None:
    rng = np.random.RandomState(7)
    modes = np.repeat(np.eye(8) * 50.0, 40, axis=0)
    real = modes + rng.uniform(-1, 1, modes.shape)
    kept = modes[:160]
    # Each point moves a tenth of the way to its mode.
    # Fake and real points stay inside each other's balls.
    fake = kept + 0.9 * (real[:160] - kept)
    assert precision_recall(real, fake) == (1.0, 0.5)
    assert precision_recall(fake, real) == (0.5, 1.0)


def test_balls_are_closed_and_exclude_the_point_itself() -> None:
    line = np.arange(6.0)[
        :, None
    ]  # radius_1 is 1 everywhere, radius_2 is 2 at the ends and 1 inside
    assert precision_recall(line, np.array([[-1.0], [-1.25], [6.0], [7.0]]), k=1)[0] == 0.5
    assert precision_recall(line, np.array([[-2.0], [-2.25], [6.0], [7.0]]), k=2)[0] == 0.75


def test_precision_recall_matches_brute_force_across_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision_recall_module, "_ROWS_PER_CHUNK", 64)
    rng = np.random.RandomState(8)
    real, fake = (
        rng.randn(300, 6) + 1e6,
        1.1 * rng.randn(210, 6) + 1e6,
    )  # the offset must not eat the digits

    def inside(points: np.ndarray, centres: np.ndarray) -> float:
        tree = NearestNeighbors(n_neighbors=4, algorithm="kd_tree").fit(centres)
        radii = tree.kneighbors(centres)[0][:, 3]
        gaps = np.linalg.norm(points[:, None] - centres[None], axis=2)
        return float((gaps <= radii).any(axis=1).mean())

    got = precision_recall(real, fake)
    assert got == (inside(fake, real), inside(real, fake))
    assert min(got) > 0.2 and max(got) < 0.99  # the comparison is not at a trivial end


def test_collapse_to_one_point_has_no_recall_and_radius_exactly_zero() -> None:
    rng = np.random.RandomState(9)
    real = rng.randn(100, 16) + 3
    collapsed = np.repeat(real[:1], 50, axis=0)
    assert precision_recall(real, collapsed) == (1.0, 0.01)


def test_nearest_distances_match_a_tree_and_give_zero_for_equal_points() -> None:
    rng = np.random.RandomState(10)
    points, others = rng.randn(2000, 7) + 50, rng.randn(333, 7) + 50
    tree = NearestNeighbors(n_neighbors=1, algorithm="kd_tree").fit(others)
    np.testing.assert_allclose(
        nearest_distances(points, others), tree.kneighbors(points)[0][:, 0], rtol=1e-9
    )
    assert np.all(nearest_distances(others[::-1], others) == 0.0)


def test_precision_recall_refuses_bad_input() -> None:
    points = np.random.RandomState(11).randn(5, 2)
    with pytest.raises(DmfError, match="k must be at least 1, got 0"):
        precision_recall(points, points, k=0)
    with pytest.raises(DmfError, match="fake has 3 rows, at least 4"):
        precision_recall(points, points[:3])
    with pytest.raises(DmfError, match="fake has non-finite values in 1 of 5 rows"):
        precision_recall(points, np.where(points == points[2, 0], np.nan, points))
    with pytest.raises(DmfError, match="2 and 3 dimensions"):
        precision_recall(points, np.zeros((5, 3)))


# ---- digits

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def digits_split() -> Split:
    """Train images, train labels, held-out images, held-out labels: stratified 75 / 25."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 8 - 1).astype(np.float32).reshape(-1, 8, 8, 1)
    train, heldout, train_labels, heldout_labels = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    return train, train_labels, heldout, heldout_labels


@pytest.fixture(scope="module")
def split() -> Split:
    return digits_split()


@pytest.fixture(scope="module")
def scorer(split: Split) -> DigitsScorer:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # a ConvergenceWarning would mean features that depend on max_iter
        return DigitsScorer(*split)


def noise_samples(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState(12)
    return rng.uniform(-1, 1, (count, 8, 8, 1)).astype(np.float32), rng.randint(0, 10, count)


def digits_report() -> dict[str, object]:
    """All results of a new scorer, to compare in one process and between processes."""
    scorer = DigitsScorer(*digits_split())
    score = scorer(*noise_samples(300))
    return {
        "floor": scorer.floor,
        "score": score,
        "classifier_accuracy": scorer.classifier_accuracy,
    }


def test_heldout_digits_score_as_real(scorer: DigitsScorer, split: Split) -> None:
    score = scorer(split[2], split[3])
    assert score["accuracy"] > 0.95 and scorer.classifier_accuracy > 0.95
    for key in ("fd_hidden", "fd_pixels"):
        assert 0.5 * scorer.floor[key] < score[key] < 2.0 * scorer.floor[key]
    assert score["fd_hidden_heldout"] < 1e-9 and score["fd_pixels_heldout"] < 1e-9
    for key in ("accuracy", "precision", "recall"):
        assert score[key] == scorer.floor[key] > 0.85
    assert score["nn_heldout"] == 0.0 and score["nn_ratio"] == float("inf")
    assert score["n_samples"] == len(split[2])


def test_training_digits_score_as_memorised(scorer: DigitsScorer, split: Split) -> None:
    score = scorer(split[0], split[1])
    assert score["nn_train"] == 0.0 and score["nn_ratio"] == 0.0 and score["nn_heldout"] > 1.0
    assert score["precision"] == 1.0 and score["recall"] == 1.0
    assert score["fd_hidden"] < 1e-9 and score["fd_pixels"] < 1e-9
    assert score["fd_hidden_heldout"] == pytest.approx(scorer.floor["fd_hidden_heldout"], rel=1e-9)
    assert score["fd_pixels_heldout"] == pytest.approx(scorer.floor["fd_pixels_heldout"], rel=1e-9)


def test_dropping_half_of_the_classes_costs_recall_alone(
    scorer: DigitsScorer, split: Split
) -> None:
    kept = split[1] < 5
    score = scorer(split[0][kept], split[1][kept])
    assert score["precision"] == 1.0 and score["accuracy"] > 0.99
    assert 0.5 < score["recall"] < 0.6


def test_near_copies_of_training_digits_fall_well_below_the_reference_ratio(
    scorer: DigitsScorer, split: Split
) -> None:
    copies = split[0] + 0.1 * np.random.RandomState(13).randn(*split[0].shape)
    assert scorer(copies, split[1])["nn_ratio"] < 0.5 * scorer.floor["nn_ratio"]
    # The training set is three times as large, so unseen digits are a little nearer to it.
    assert 0.75 < scorer.floor["nn_ratio"] < 1.0


def test_noise_scores_as_noise_and_wrong_labels_as_wrong(
    scorer: DigitsScorer, split: Split
) -> None:
    score = scorer(*noise_samples(2000))
    assert 0.05 < score["accuracy"] < 0.15
    assert score["precision"] == 0.0 and score["recall"] == 0.0
    for key in ("fd_hidden", "fd_pixels", "fd_hidden_heldout", "fd_pixels_heldout"):
        assert score[key] > 50 * scorer.floor[key]
    assert scorer(split[2], (split[3] + 1) % 10)["accuracy"] < 0.05


def test_hidden_features_are_the_classifiers_own(scorer: DigitsScorer, split: Split) -> None:
    rows = split[2].reshape(-1, 64).astype(np.float64)
    hidden = scorer.hidden(rows)
    assert (
        hidden.shape == (len(rows), 64)
        and hidden.min() == 0.0
        and np.linalg.matrix_rank(hidden) > 50
    )
    train_rows = split[0].reshape(-1, 64).astype(np.float64)

    def nearest_mean_accuracy(fitted: np.ndarray, features: np.ndarray) -> float:
        means = np.stack([fitted[split[1] == digit].mean(axis=0) for digit in range(10)])
        guess = np.argmin(((features[:, None] - means) ** 2).sum(axis=2), axis=1)
        return float((guess == split[3]).mean())

    # Trained features gather each class around its mean. Pixels, and random projections, do not.
    assert nearest_mean_accuracy(scorer.hidden(train_rows), hidden) > 0.95
    assert nearest_mean_accuracy(train_rows, rows) < 0.93


def test_samples_are_clipped_before_scoring(scorer: DigitsScorer, split: Split) -> None:
    overshoot = split[2] * 1.5
    assert scorer(overshoot, split[3]) == scorer(np.clip(overshoot, -1, 1), split[3])


def test_two_builds_and_a_process_with_another_thread_count_give_identical_numbers() -> None:
    here = digits_report()
    assert digits_report() == here
    command = "import json, test_metrics; print(json.dumps(test_metrics.digits_report()))"
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", command]
    output = subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == here


def test_digits_scorer_refuses_bad_input(scorer: DigitsScorer, split: Split) -> None:
    train, train_labels, heldout, heldout_labels = split
    broken = heldout.copy()
    broken[3], broken[9, 0, 0, 0] = np.nan, np.inf
    with pytest.raises(DmfError, match="samples has non-finite values in 2 of 450 images"):
        scorer(broken, heldout_labels)
    with pytest.raises(DmfError, match=r"samples must have shape \(N, 8, 8, 1\), got \(450, 64\)"):
        scorer(heldout.reshape(-1, 64), heldout_labels)
    with pytest.raises(DmfError, match="samples has 3 images, at least 4"):
        scorer(heldout[:3], heldout_labels[:3])
    with pytest.raises(DmfError, match=r"labels must be 450 integers of shape \(450,\)"):
        scorer(heldout, np.eye(10)[heldout_labels])
    with pytest.raises(DmfError, match="labels must be 450 integers"):
        scorer(heldout, heldout_labels[:449])
    with pytest.raises(
        DmfError, match=r"train_images reaches from 0 to 16, expected values in \[-1, 1\]"
    ):
        DigitsScorer(8 * (train + 1), train_labels, heldout, heldout_labels)
    with pytest.raises(DmfError, match="heldout_images has 7 images, at least 8"):
        DigitsScorer(train, train_labels, heldout[:7], heldout_labels[:7])
