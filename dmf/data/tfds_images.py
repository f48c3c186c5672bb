"""Image records of a TFDS data set that is prepared as array_record, read one by one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dmf.data import shards
from dmf.errors import DmfError
from dmf.storage import paths

# What the parsers behind TFDS raise for bad names, shards, splits, versions and metadata.
RAISED = (RuntimeError, ValueError, OSError, LookupError, AssertionError, TypeError)


class Records(NamedTuple):
    """A split of a data set. get(i): a record with the bytes of an image file, and its label."""

    name: str  # with config and version
    size: int
    classes: int  # 0: the records have no labels
    sha256: str  # of name, split, count and shards
    get: Callable[[int], dict[str, Any]]


def open_records(name: str, data_dir: str, split: str) -> Records:
    """Opens a split; image files stay undecoded, as TFDS may decode to other pixels than ours.

    data_dir: where TFDS has prepared it; "" is $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    Raises DmfError where it is not prepared, has no images or cannot be read.
    """
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    # TFDS reports the same trouble in other ways when it fills in its default directory itself.
    root = paths.expanded(data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    path: Any = tfds.core.Path(root) / name.partition(":")[0]
    shards.allow_many_files()
    try:
        builder = tfds.builder(name, data_dir=root)
        path = builder.data_path
        features = builder.info.features
        if "image" not in features:
            raise DmfError(
                f"TFDS data set {name} in {path} has {', '.join(features)}: expected an 'image'"
            )
        decoders = {"image": tfds.decode.SkipDecoding()}
        records = builder.as_data_source(split=split, decoders=decoders)
        count, full_name = len(records), builder.info.full_name
        used = builder.info.splits[split].file_instructions
        parts = [_part(tfds.core.Path(i.filename), i) for i in used]
    except (*RAISED, ParseError) as error:
        raise DmfError(_explanation(error, name, path, split)) from error
    labelled = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
    about = json.dumps(["tfds", full_name, split, count, parts]).encode()

    def get(i: int) -> dict[str, Any]:
        return _record(records, f"{full_name}, split {split}, in {path}", i)

    classes = int(features["label"].num_classes) if labelled else 0
    return Records(full_name, count, classes, hashlib.sha256(about).hexdigest(), get)


def _part(path: Any, shard: Any) -> list[Any]:
    """What a split takes of one shard, and the bytes of the shard's file."""
    return [path.name, shard.skip, shard.take, shard.examples_in_shard, path.stat().length]


def _record(records: Sequence[dict[str, Any]], name: str, i: int) -> dict[str, Any]:
    try:
        record = records[i]
        if not record["image"]:  # the only sign of a shard that was cut short
            raise ValueError("it is empty")
        return record
    except (RuntimeError, ValueError, OSError, LookupError, TypeError) as error:
        why = " ".join(str(error).split())[:200]
        if shards.refused(error):
            raise DmfError(
                f"TFDS data set {name}: record {i} cannot be read ({why}); expected readable "
                "files, and room for one open file per shard (`ulimit -n`)"
            ) from error
        raise DmfError(
            f"TFDS data set {name} is damaged (record {i}: {why}): delete its folder and prepare "
            "it again"
        ) from error


def _explanation(error: Exception, name: str, path: Any, split: str) -> str:
    """One sentence on why TFDS could not open a data set."""
    base = name.partition(":")[0]
    prepare = (
        'prepare it by `python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{base}', data_dir='DIR', file_format='array_record')"
        '.download_and_prepare()"` and name DIR as data_dir'
    )
    if not (path / "dataset_info.json").exists():
        return f"TFDS data set {name} is not prepared in {path}: {prepare}"
    if isinstance(error, NotImplementedError):
        return (
            f"TFDS data set {name} in {path} is prepared without random access, expected "
            f"array_record: convert it by `tfds convert_format --dataset_version_dir={path} "
            f"--out_file_format=array_record --out_dir=DIR/{base}/{path.name}`, for which TFDS "
            f"needs apache-beam, or in another DIR {prepare}"
        )
    why = " ".join(str(error).split())[:200]
    return (
        f"TFDS data set {name} in {path} cannot be read, split {split} ({why}); expected one of "
        "its splits, undamaged"
    )
