"""The crops of two photographs, and the score that they share with the digits."""

import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from dmf.data import DataConfig, bundled, load
from dmf.errors import DmfError
from dmf.evaluation import sampling


@pytest.fixture(scope="module")
def sets():
    return {split: load(DataConfig(name="photos"), split) for split in ("train", "heldout")}


@pytest.fixture(scope="module")
def scorer(sets):
    found, main = sampling.make_scorer(DataConfig(name="photos"), sets["train"])
    assert main == "fd_hidden"
    return found


@pytest.mark.parametrize("fraction", [0.16, 0.25, 0.6])
def test_no_pixel_is_in_crops_of_both_splits(fraction):
    # Every pixel has another number, so the values of a crop tell its place. The 2 x 2 means of
    # `halved` are undone here.
    height, width = 427, 640
    number = np.arange(height * width).reshape(height, width, 1)
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundled, "halved", lambda pixels: pixels.reshape(16, 64, 1))
        for split in ("train", "heldout"):
            found, _ = bundled.crops(number, split, fraction)
            seen[split] = set(found.reshape(-1).tolist())
    assert found.size and not seen["train"] & seen["heldout"]
    columns = {split: {n % width for n in pixels} for split, pixels in seen.items()}
    assert not columns["train"] & columns["heldout"]  # strips from top to bottom
    assert len(columns["heldout"]) == pytest.approx(fraction * width, abs=3 * bundled.STRIDE)
    assert len(columns["train"]) == pytest.approx((1 - fraction) * width, abs=6 * bundled.STRIDE)


def test_a_crop_is_the_mean_of_the_photographs_pixels_and_its_label_the_region(sets):
    train = sets["train"]
    assert (
        train.images.shape == (3864, 16, 16, 3)
        and len(sets["heldout"]) == 828
        and train.num_classes == 12
    )
    photograph = load_sample_image("flower.jpg").astype(int)
    for label, (top, left) in {
        6: (0, 0),
        11: (213, 426),
    }.items():  # the first crop of a region stands in its corner
        corner = photograph[top : top + 32, left : left + 32]
        means = sum(corner[i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
        image = train.images[np.flatnonzero(train.labels == label)[0]]
        assert np.abs(image - means).max() <= 0.5
    assert train.to_float(train.images).min() == -1 and train.to_float(train.images).max() == 1


def test_classes_are_equally_many_in_every_prefix_and_reading_again_gives_the_same(sets):
    for split, found in sets.items():
        assert set(np.bincount(found.labels, minlength=12)) == {len(found) // 12}
        for count in (7, 12, 100, 500):  # samples take labels from the front
            counts = np.bincount(found.labels[:count], minlength=12)
            assert counts.max() - counts.min() <= 1
        images, labels = bundled.read_photos(split, 0.25)
        np.testing.assert_array_equal(images, found.images)
        np.testing.assert_array_equal(labels, found.labels)
    assert len(np.unique(sets["train"].images, axis=0)) > 3800  # a plain sky may repeat


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.8, 1.0])
def test_a_share_that_leaves_a_split_empty_is_refused(fraction):
    with pytest.raises(
        DmfError,
        match=f"config.data.holdout_fraction is {fraction}: expected a share of the 213 columns",
    ):
        load(DataConfig(name="photos", holdout_fraction=fraction), "train")
    with pytest.raises(DmfError, match="config.data.mock is True for 'photos'"):
        load(DataConfig(name="photos", mock=True), "train")


def test_the_photos_score_sees_real_crops_as_real_and_noise_as_noise(sets, scorer):
    train, heldout = ((s.to_float(s.images), s.labels) for s in sets.values())
    own = scorer(*train)
    assert own["fd_hidden"] < 1e-9 and own["fd_pixels"] < 1e-9 and own["nn_ratio"] == 0
    other = scorer(*heldout)
    assert other["fd_hidden_heldout"] < 1e-9 and other["fd_hidden"] == pytest.approx(
        scorer.floor["fd_hidden_heldout"]
    )
    rng = np.random.RandomState(0)
    noise = scorer(rng.uniform(-1, 1, (500, 16, 16, 3)).astype(np.float32), train[1][:500])
    grainy = scorer(np.clip(train[0] + 0.3 * rng.randn(*train[0].shape), -1, 1), train[1])
    for key in ("fd_hidden", "fd_pixels"):
        assert own[key] < 0.1 < grainy[key] < 0.2 * noise[key]
        assert 0 < scorer.floor[key] < 0.05 * noise[key]
    assert noise["accuracy"] < 0.2 < 0.5 < scorer.floor["accuracy"]
    assert scorer(train[0], (train[1] + 1) % 12)["accuracy"] < 0.1


def test_the_space_of_pixels_holds_nearly_all_of_the_variance(sets, scorer):
    rows = (
        sets["train"]
        .to_float(sets["train"].images)
        .reshape(len(sets["train"]), -1)
        .astype(np.float64)
    )
    basis = scorer._basis
    np.testing.assert_allclose(basis.T @ basis, np.eye(64), atol=1e-12)
    kept = np.var(rows @ basis, axis=0).sum() / np.var(rows, axis=0).sum()
    assert 0.98 < kept < 0.99  # the comment there says 98 %


def test_the_digits_score_is_the_one_of_before():
    train = load(DataConfig(), "train")
    scorer, main = sampling.make_scorer(DataConfig(), train)
    # Noted before the code was shared with the photos, and equal bit for bit then. Another
    # processor rounds otherwise.
    before = {
        "fd_hidden": 0.34845471683937035,
        "fd_pixels": 0.2884569882051835,
        "fd_hidden_heldout": 0.13074313725306297,
        "fd_pixels_heldout": 0.23776839535632632,
        "accuracy": 0.9887640449438202,
        "precision": 0.9146067415730337,
        "recall": 0.9326923076923077,
        "nn_ratio": 0.8610107385607093,
    }
    assert main == "fd_hidden" and scorer.floor == pytest.approx(before, rel=1e-8)
