"""CIFAR-10: read as it was prepared, without TensorFlow; damage is one line."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from dmf import data
from dmf.data import DataConfig
from dmf.errors import DmfError
from tests.data.test_data import WITHOUT_TENSORFLOW, run_python

SHARD = "cifar10-{}.array_record-00000-of-00001"
SIZES = {"train": 24, "test": 10}


def cifar_images(split: str) -> np.ndarray:
    return np.random.default_rng(SIZES[split]).integers(
        0, 256, (SIZES[split], 32, 32, 3), dtype=np.uint8
    )


def write_shard(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    features = tfds.features.FeaturesDict({
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=images.shape[1:]),
        "label": tfds.features.ClassLabel(num_classes=100),
    })  # fmt: skip
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        png = io.BytesIO()
        Image.fromarray(image).save(png, "png")
        example = {"id": str(i), "image": png.getvalue(), "label": label}
        writer.write(features.serialize_example(features.encode_example(example)))
    writer.close()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CIFAR-10 in the layout that TFDS prepares, written without TensorFlow."""
    data_dir = tmp_path_factory.mktemp("tfds")
    folder = data_dir / "cifar10" / str(tfds.builder_cls("cifar10").VERSION)
    folder.mkdir(parents=True)
    for split, size in SIZES.items():
        write_shard(folder / SHARD.format(split), cifar_images(split), np.arange(size) % 10)
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    splits = [
        {"name": s, "shardLengths": [str(n)], "filepathTemplate": template}
        for s, n in SIZES.items()
    ]
    info = {
        "name": "cifar10",
        "version": folder.name,
        "fileFormat": "array_record",
        "splits": splits,
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return data_dir


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    """The version folder of a copy of `prepared` that a test may damage."""
    shutil.copytree(prepared, tmp_path / "copy")
    return next((tmp_path / "copy" / "cifar10").iterdir())


def cifar10(data_dir: Path) -> DataConfig:
    return DataConfig(name="cifar10", data_dir=str(data_dir))


def test_cifar10_is_read_as_it_was_prepared(prepared: Path) -> None:
    for split, tfds_split in (("train", "train"), ("heldout", "test")):
        dataset = data.load(cifar10(prepared), split)
        np.testing.assert_array_equal(dataset.images, cifar_images(tfds_split))
        np.testing.assert_array_equal(dataset.labels, np.arange(SIZES[tfds_split]) % 10)
        assert dataset.images.dtype == np.uint8 and dataset.labels.dtype == np.int32


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_cifar10_is_read_from_tfds_mock_data_of_any_length(
    split: data.Split, tmp_path: Path
) -> None:
    with tfds.testing.mock_data(num_examples=37):
        dataset = data.load(cifar10(tmp_path), split)
    assert dataset.images.shape == (37, 32, 32, 3) and dataset.images.dtype == np.uint8
    assert dataset.images.std() > 50 and 0 <= dataset.labels.min() <= dataset.labels.max() < 10
    assert data.batch(dataset, 0, 0, 37)["x"].shape == (37, 32, 32, 3)


def test_mock_config_needs_no_files_and_leaves_tfds_as_it_was(tmp_path: Path) -> None:
    config = DataConfig(name="cifar10", data_dir=str(tmp_path), mock=True)
    assert len(data.load(config, "train")) == 256
    with pytest.raises(DmfError, match="not prepared"):
        data.load(cifar10(tmp_path), "train")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / SHARD.format("train")).read_bytes()
        (folder / SHARD.format("train")).write_bytes(content[: int(keep * len(content))])

    return damage


def flip_one_bit(folder: Path) -> None:
    content = bytearray((folder / SHARD.format("train")).read_bytes())
    content[30_000] ^= 1
    (folder / SHARD.format("train")).write_bytes(content)


def other_data(image_size: int, first_label: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        images = np.zeros((SIZES["train"], image_size, image_size, 3), np.uint8)
        write_shard(
            folder / SHARD.format("train"), images, first_label + np.arange(SIZES["train"]) % 10
        )

    return damage


def rewrite_info(change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        info = folder / "dataset_info.json"
        info.write_text(change(info.read_text()))

    return damage


DAMAGE = {
    "missing shard": remove(SHARD.format("train")),
    "empty shard": truncate(0.0),
    "half a shard": truncate(0.5),
    "99 % of a shard": truncate(0.99),
    "flipped bit": flip_one_bit,
    "small images": other_data(image_size=16, first_label=0),
    "labels out of range": other_data(image_size=32, first_label=1),
    "fewer images than stated": rewrite_info(lambda text: text.replace('["24"]', '["30"]')),
    "no train split": rewrite_info(lambda text: text.replace('"train"', '"other"')),
    "half the metadata": rewrite_info(lambda text: text[: len(text) // 2]),
    "empty metadata": rewrite_info(lambda text: ""),
    "metadata without content": rewrite_info(lambda text: "{}"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_cifar10_is_one_error_that_names_the_directory(kind: str, copy: Path) -> None:
    DAMAGE[kind](copy)
    with pytest.raises(
        DmfError, match=r"is damaged \(.+\): delete this folder and run `python"
    ) as error:
        data.load(cifar10(copy.parents[1]), "train")
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


def test_unprepared_cifar10_is_one_error_with_the_command(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "dataset_info.json").unlink()  # as an interrupted preparation leaves it
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "default"))
    for data_dir in (
        tmp_path / "nowhere",
        copy.parents[1],
        tmp_path / "file",
        tmp_path / "default",
    ):
        named = "" if data_dir.name == "default" else str(data_dir)
        with pytest.raises(DmfError, match="CIFAR-10 is not prepared in ") as error:
            data.load(DataConfig(name="cifar10", data_dir=named), "train")
        message = str(error.value)
        assert str(data_dir / "cifar10") in message and "\n" not in message
        assert "internet access" in message and "--config.data.data_dir=DIR" in message
    assert not (tmp_path / "nowhere").exists()
    code = re.search(r'`python -c "(.*)"`', message).group(1)
    ast.parse(code)
    assert "data_dir='DIR', file_format='array_record').download_and_prepare()" in code


def test_cifar10_prepared_as_tfrecord_is_refused(copy: Path) -> None:
    info = copy / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        DmfError,
        match=r"without random access, expected the format array_record; .*another DIR: run",
    ):
        data.load(cifar10(copy.parents[1]), "train")


def test_every_data_set_is_read_where_tensorflow_is_not_installed(prepared: Path) -> None:
    code = """
from dmf.data import DataConfig, batch, load
sizes = {DataConfig(): 1352, DataConfig("cifar10", mock=True): 256, DataConfig("cifar10"): 24}
for config, size in sizes.items():
    dataset = load(config, "train")
    assert len(dataset) == size, len(dataset)
    assert len(batch(dataset, 0, 0, 16)["x"]) == 16
"""
    run_python(WITHOUT_TENSORFLOW + code, TFDS_DATA_DIR=str(prepared))
