"""CIFAR-10 through TFDS random access: 50,000 training and 10,000 test images, 32x32x3 uint8.

Reads data that was prepared once as array_record. Preparing needs TensorFlow and a network
connection. Reading needs neither, and downloads nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dmf.errors import DmfError
from dmf.storage import paths

NUM_CLASSES = 10
MAX_VALUE = 255.0
IMAGE_SHAPE = (32, 32, 3)
MOCK_EXAMPLES = 256
SPLITS = {"train": "train", "heldout": "test"}

_HOW_TO_PREPARE = (
    "run `python -c \"import tensorflow_datasets as tfds; tfds.builder('cifar10', data_dir='DIR', "
    "file_format='array_record').download_and_prepare()\"` on a machine with internet access, "
    "TensorFlow and importlib_resources, then pass --config.data.data_dir=DIR"
)


def read(split: str, data_dir: str = "", *, mock: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) uint8 in [0, 255] and labels (N,) int32; "heldout" is the test split.

    Args:
      split: "train" or "heldout".
      data_dir: the directory that TFDS prepared; "" is $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      mock: 256 random images, to try the code path only; data_dir is ignored.

    Raises:
      DmfError: the data are not prepared there, or in a format without random access, or damaged.
    """
    import tensorflow_datasets as tfds

    with _quiet_tfds():
        if mock:
            with tfds.testing.mock_data(num_examples=MOCK_EXAMPLES):
                return _decode(tfds.data_source("cifar10", split=SPLITS[split], download=False))
        return _read_prepared(SPLITS[split], data_dir)


def _read_prepared(tfds_split: str, data_dir: str) -> tuple[np.ndarray, np.ndarray]:
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    # TFDS reports the same trouble in other ways when it fills in its default directory itself.
    root = paths.expanded(data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    try:
        return _decode(tfds.data_source("cifar10", split=tfds_split, data_dir=root, download=False))
    # What the parsers behind TFDS raise for bad shards, images, splits, versions and metadata.
    except (RuntimeError, ValueError, OSError, LookupError, AssertionError, ParseError) as error:
        folder = tfds.core.Path(root) / "cifar10" / str(tfds.builder_cls("cifar10").VERSION)
        raise DmfError(_explanation(error, folder)) from error


def _explanation(error: Exception, folder: Any) -> str:
    """One sentence on why TFDS could not read the folder of its version."""
    if not (folder / "dataset_info.json").exists():
        return f"CIFAR-10 is not prepared in {folder}: {_HOW_TO_PREPARE}"
    if isinstance(error, NotImplementedError):
        return (
            f"CIFAR-10 in {folder} is prepared without random access, expected the format "
            "array_record; TFDS keeps one format per directory, so choose another DIR: "
            f"{_HOW_TO_PREPARE}"
        )
    return f"CIFAR-10 in {folder} is damaged ({error}): delete this folder and {_HOW_TO_PREPARE}"


def _decode(source: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Decodes every example once; 50,000 take seconds, and 150 MB stay in memory."""
    images = np.empty((len(source), *IMAGE_SHAPE), dtype=np.uint8)
    labels = np.empty(len(source), dtype=np.int32)
    for i in range(len(source)):  # one at a time: TFDS's mock source has no working __getitems__
        example = source[i]
        images[i], labels[i] = example["image"], example["label"]
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise ValueError(
            f"labels are {labels.min()} to {labels.max()}, expected 0 to {NUM_CLASSES - 1}"
        )
    return images, labels


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Drops TFDS's warnings on missing metadata and OpenCV, which would hide our one sentence."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
