"""Data: batches as a pure function of (seed, step), the fixed split, CIFAR-10 from its files."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from dmf import data
from dmf.data import DataConfig, Dataset
from dmf.errors import DmfError
from tests import ROOT as REPOSITORY


def numbered(size: int) -> Dataset:
    """A data set whose image i and label i are i, to see which rows a batch holds."""
    rows = np.arange(size)
    images = np.broadcast_to(rows[:, None, None, None], (size, 2, 2, 1)).astype(np.float32)
    return Dataset(images, rows.astype(np.int32), size, 2.0, "numbered", "train")


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (13, 4), (7, 7), (5, 3)])
def test_an_epoch_shows_each_image_at_most_once_and_drops_only_the_rest(
    size: int, batch_size: int
) -> None:
    dataset, steps = numbered(size), data.steps_per_epoch(size, batch_size)
    assert steps == size // batch_size
    for epoch in range(3):
        batches = [
            data.batch(dataset, 0, epoch * steps + i, batch_size)["label"] for i in range(steps)
        ]
        rows = np.concatenate(batches)
        assert len(rows) == steps * batch_size == len(set(rows.tolist()))
        if size % batch_size == 0:
            assert sorted(rows) == list(range(size))


def test_a_batch_depends_on_seed_and_step_only() -> None:
    dataset = numbered(100)
    first = data.batch(dataset, 3, 17, 8)
    data.batch(dataset, 3, 99, 8), data.batch(dataset, 4, 17, 8), data.batch(numbered(50), 3, 17, 8)
    again = data.batch(dataset, 3, 17, 8)
    for name in ("x", "label"):
        np.testing.assert_array_equal(first[name], again[name])
    np.testing.assert_array_equal(
        first["x"][:, 0, 0, 0], first["label"] - 1
    )  # image and label are one row's


def test_seeds_and_epochs_have_unrelated_orders() -> None:
    dataset = numbered(1000)
    orders = [
        data.batch(dataset, seed, epoch, 1000)["label"] for seed in range(4) for epoch in range(4)
    ]
    for i, a in enumerate(orders):
        for b in orders[:i]:  # matches are about Poisson(1)
            assert (a == b).sum() < 10 and abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(1000)


def test_the_order_never_changes_between_versions() -> None:
    rows = data.batch(numbered(1352), 0, 0, 8)["label"].tolist()
    message = "a run resumed with this version would see other examples than the run it continues"
    assert rows == [1051, 998, 162, 670, 664, 185, 322, 431], message


PARTITIONS = {  # positions in a global batch of 8, process by process
    "one": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "backwards": [[7, 6, 5, 4, 3, 2, 1, 0]],
    "two": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "interleaved": [[0, 2, 4, 6], [1, 3, 5, 7]],
    "uneven": [[5], [], [7, 0, 3], [1, 2, 4, 6]],
    "row by row": [[3], [1], [4], [0], [5], [7], [2], [6]],
}


def reassembled(
    dataset: Dataset, seed: int, step: int, batch_size: int, parts: list[list[int]]
) -> dict[str, np.ndarray]:
    """The global batch from the parts of all processes, each put at its positions."""
    found = [
        data.batch(dataset, seed, step, batch_size, rows=np.array(part, np.int64)) for part in parts
    ]
    back = np.argsort(np.concatenate(parts))
    return {name: np.concatenate([some[name] for some in found])[back] for name in found[0]}


@pytest.mark.parametrize("parts", PARTITIONS.values(), ids=PARTITIONS)
def test_the_batches_of_all_hosts_are_the_global_batch(parts: list[list[int]]) -> None:
    dataset = numbered(50)
    for n in (0, 7, 5, 6):  # in the first epoch and the next
        whole, found = data.batch(dataset, 1, n, 8), reassembled(dataset, 1, n, 8, parts)
        for name in ("x", "label"):
            np.testing.assert_array_equal(found[name], whole[name])
            assert found[name].dtype == whole[name].dtype


def test_a_host_gets_its_rows_in_the_order_it_names_them() -> None:
    whole = data.batch(numbered(50), 1, 3, 8)["label"]
    for rows in (np.array([6, 1, 1, 4]), np.array([7], np.uint8), np.array([], np.int32), [2, 0]):
        np.testing.assert_array_equal(
            data.batch(numbered(50), 1, 3, 8, rows=rows)["label"], whole[np.array(rows, int)]
        )


def test_consecutive_steps_walk_through_one_permutation_after_the_other() -> None:
    dataset, steps, parts = numbered(24), 4, [[4, 0], [5, 2], [1, 3]]
    seen = np.stack(
        [reassembled(dataset, 9, n, 6, parts)["label"] for n in range(3 * steps)]
    ).reshape(3, 24)
    for epoch, order in enumerate(seen):
        assert sorted(order) == list(range(24))  # no image twice, none skipped
        np.testing.assert_array_equal(order, data._permutation(24, 9, epoch))
    assert len({tuple(order) for order in seen}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 11}, "batch_size is 11: expected 1 to 10"),
        ({"batch_size": 0}, "batch_size is 0: expected 1 to 10"),
        ({"batch_size": 4, "step": -1}, "step is -1: expected 0 or more"),
        (
            {"batch_size": 4, "rows": [0, 4]},
            "rows holds 4: expected positions in the global batch, 0 to 3",
        ),
        (
            {"batch_size": 4, "rows": [0, -1]},
            "rows holds -1: expected positions in the global batch, 0 to 3",
        ),
        (
            {"batch_size": 4, "rows": [0.0, 1.0]},
            r"rows is float64\[2\]: expected one axis of whole numbers",
        ),
        (
            {"batch_size": 4, "rows": [True, False, True, False]},
            r"rows is bool\[4\]: expected one axis of whole numbers",
        ),
        (
            {"batch_size": 4, "rows": [[0, 1]]},
            r"rows is int64\[1, 2\]: expected one axis of whole numbers",
        ),
        ({"batch_size": 4, "rows": 2}, r"rows is int64\[\]: expected one axis of whole numbers"),
    ],
)
def test_impossible_batches_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DmfError, match=message):
        data.batch(numbered(10), **({"seed": 0, "step": 0} | arguments))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            DataConfig(name="cifar"),
            "config.data.name = 'cifar': expected one of digits, photos, cifar10",
        ),
        (DataConfig(augment=1.5), "config.data.augment = 1.5: expected a number of at least 0"),
        (DataConfig(holdout_fraction=0.0), "config.data.holdout_fraction is 0.0"),
        (DataConfig(holdout_fraction=1.0), "config.data.holdout_fraction is 1.0"),
        (DataConfig(mock=True), "config.data.mock is True for 'digits'"),
    ],
)
def test_impossible_configs_are_refused(config: DataConfig, message: str) -> None:
    with pytest.raises(DmfError, match=message):
        data.load(config, "train")


def test_unknown_splits_are_refused() -> None:
    with pytest.raises(DmfError, match="split is 'test': expected 'train' or 'heldout'"):
        data.load(DataConfig(), "test")


def test_digits_are_all_of_scikit_learns_and_split_once_per_class() -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    train, heldout = (data.load(DataConfig(), split) for split in ("train", "heldout"))
    assert train.images.shape[1:] == (8, 8, 1) and train.images.dtype == np.uint8
    assert train.num_classes == 10 and train.labels.dtype == np.int32
    both = np.concatenate([train.images, heldout.images]).reshape(-1, 64)
    labelled = np.column_stack([both, np.concatenate([train.labels, heldout.labels])])
    # Together the two splits hold each labelled image of the source once, so they share no row.
    expected = np.column_stack([source.data, source.target])
    np.testing.assert_array_equal(np.unique(labelled, axis=0), np.unique(expected, axis=0))
    assert len(labelled) == len(expected) == len(np.unique(expected, axis=0)) == 1797
    for label, count in enumerate(np.bincount(source.target)):
        assert (heldout.labels == label).sum() == count // 4


def test_the_digit_split_holds_out_every_fourth_image_of_each_class() -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    rows = np.sort(
        np.concatenate([np.flatnonzero(source.target == label)[3::4] for label in range(10)])
    )
    heldout = data.load(DataConfig(), "heldout")
    np.testing.assert_array_equal(heldout.images[..., 0], source.images[rows])
    np.testing.assert_array_equal(heldout.labels, source.target[rows])
    assert len(data.load(DataConfig(holdout_fraction=0.2), "heldout")) == sum(
        np.bincount(source.target) // 5
    )


@pytest.mark.parametrize("config", [DataConfig(), DataConfig(name="cifar10", mock=True)])
def test_batches_are_float32_in_minus_one_to_one(config: DataConfig) -> None:
    dataset = data.load(config, "train")
    batch = data.batch(dataset, 0, 5, 64)
    assert batch["x"].dtype == np.float32 and batch["x"].shape == (64, *dataset.images.shape[1:])
    assert batch["label"].dtype == np.int32 and batch["label"].shape == (64,)
    assert batch["x"].min() == -1 and 0.9 < batch["x"].max() <= 1
    assert set(batch["label"].tolist()) <= set(range(10))


def test_stored_values_map_linearly_onto_minus_one_to_one() -> None:
    digits = data.load(DataConfig(), "train")
    np.testing.assert_array_equal(
        digits.to_float(np.array([0, 8, 12, 16], np.uint8)), [-1, 0, 0.5, 1]
    )
    cifar = data.load(DataConfig(name="cifar10", mock=True), "train")
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_allclose(cifar.to_float(levels), levels / 127.5 - 1, atol=1e-7)
    np.testing.assert_array_equal(np.round((cifar.to_float(levels) + 1) * 127.5), levels)


def run_python(code: str, **environment: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


WITHOUT_TENSORFLOW = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *args):
        hidden = name.partition(".")[0] in ("tensorflow", "tensorboard")
        return None if hidden else self.finder.find_spec(name, *args)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
try:
    import tensorflow
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("tensorflow is not hidden")
"""


def test_importing_the_data_room_imports_none_of_the_libraries_behind_it() -> None:
    libraries = ("tensorflow_datasets", "tensorflow", "sklearn", "jax")
    run_python(
        f"import sys, dmf.data\nfound = set(sys.modules) & set({libraries})\n"
        "assert not found, found"
    )
