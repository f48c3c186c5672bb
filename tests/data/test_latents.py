"""The data set of encoded images: batches, a training step, and damaged files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from dmf import data, sharding, step
from dmf.config import parse
from dmf.convert import encode
from dmf.data import DataConfig, shards
from dmf.data.images import open_images
from dmf.errors import DmfError
from dmf.storage.records import sealed
from tests import ROOT, runs
from tests.data.encoding import (
    CLASSES,
    COUNT,
    LATENT,
    SETTINGS,
    config,
    cut,
    flip_a_byte,
    records,
)
from tests.data.encoding import copy as copy
from tests.data.encoding import program as program
from tests.data.encoding import source as source
from tests.data.encoding import vae as vae
from tests.data.encoding import whole as whole
from tests.data.test_data import PARTITIONS, WITHOUT_TENSORFLOW, numbered, reassembled
from tests.data.test_images import COUNTS, TinyFaces
from tests.tiny import TINY, merged


def test_a_batch_is_the_scaled_law_of_the_rows_that_any_data_set_would_give(whole: Path) -> None:
    dataset, stored, like = data.load(config(whole), "train"), records(whole), numbered(COUNT)
    assert (
        len(dataset) == COUNT and dataset.image_shape == LATENT and dataset.num_classes == CLASSES
    )
    assert (
        dataset.name == "imagenet256_latents"
        and dataset.split == "train"
        and dataset.about["vae"]["sha256"]
    )
    for n in (0, 1, 7):
        batch, rows = data.batch(dataset, 5, n, 8), data.batch(like, 5, n, 8)["label"]
        assert set(batch) == {"x", "std", "label"}
        np.testing.assert_array_equal(batch["label"], dataset.labels[rows])
        np.testing.assert_array_equal(batch["x"], np.float32(0.18215) * stored[2 * rows, 0])
        np.testing.assert_array_equal(batch["std"], np.float32(0.18215) * stored[2 * rows, 1])
        assert (
            batch["x"].dtype == batch["std"].dtype == np.float32
            and batch["label"].dtype == np.int32
        )


def test_the_shift_of_an_autoencoder_is_taken_off_before_the_scale(copy: Path) -> None:
    change(shift=0.0609)(copy / "train")
    dataset, stored = data.load(config(copy), "train"), records(copy)
    rows = dataset.rows(np.arange(4), np.zeros(4, int))
    scale, means = np.float32(0.18215), stored[:8:2, 0]
    np.testing.assert_array_equal(rows["x"], scale * (means - np.float32(0.0609)))
    np.testing.assert_array_equal(rows["std"], scale * stored[:8:2, 1])
    assert data.identity(dataset)["shift"] == 0.0609


def test_with_flip_each_row_is_one_of_the_two_copies_drawn_by_seed_and_step(whole: Path) -> None:
    dataset, plain = data.load(config(whole, flip=True), "train"), data.load(config(whole), "train")
    stored, like = np.float32(0.18215) * records(whole), numbered(COUNT)
    copies = []
    for seed, n in [(s, n) for s in range(3) for n in range(12)]:
        batch, rows = data.batch(dataset, seed, n, 8), data.batch(like, seed, n, 8)["label"]
        mirrored = np.array(
            [np.array_equal(x, stored[2 * i + 1, 0]) for x, i in zip(batch["x"], rows, strict=True)]
        )
        for name, part in (("x", 0), ("std", 1)):
            np.testing.assert_array_equal(batch[name], stored[2 * rows + mirrored, part])
        np.testing.assert_array_equal(batch["label"], data.batch(plain, seed, n, 8)["label"])
        copies.append(mirrored)
    assert abs(np.mean(copies) - 0.5) < 4 * 0.5 / np.sqrt(36 * 8)
    assert len({tuple(c) for c in copies}) > 30  # another draw at every seed and step


@pytest.mark.parametrize("parts", PARTITIONS.values(), ids=PARTITIONS)
def test_the_copies_do_not_depend_on_which_host_asks_for_them(
    parts: list[list[int]], whole: Path
) -> None:
    dataset = data.load(config(whole, flip=True), "train")
    together, found = data.batch(dataset, 1, 3, 8), reassembled(dataset, 1, 3, 8, parts)
    for name in ("x", "std", "label"):
        np.testing.assert_array_equal(found[name], together[name])


def test_the_copies_never_change_between_versions_and_know_nothing_of_the_order() -> None:
    assert "".join(map(str, data._mirrored(3, 17, 24))) == "110011110010011010100111"
    # The same key serves both where step and epoch agree: the streams must differ nevertheless.
    order, copies = np.argsort(data._permutation(4096, 0, 5)), data._mirrored(0, 5, 4096)
    assert abs(np.corrcoef(order, copies)[0, 1]) < 5 / np.sqrt(4096)


def test_a_mock_goes_the_same_way(whole: Path) -> None:
    for flip in (False, True):
        dataset = data.load(DataConfig(name="imagenet256_latents", mock=True, flip=flip), "train")
        batch, plain = (
            data.batch(dataset, 0, 2, 64),
            data.batch(data.load(DataConfig("imagenet256_latents", mock=True), "train"), 0, 2, 64),
        )
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            "x": ((64, 32, 32, 4), np.float32),
            "std": ((64, 32, 32, 4), np.float32),
            "label": ((64,), np.int32),
        }
        same = (batch["x"] == plain["x"]).all((1, 2, 3))
        turned = (batch["x"] == plain["x"][:, :, ::-1]).all((1, 2, 3))
        assert (same | turned).all() and turned.any() == flip and same.any()


def test_a_tfds_data_set_is_encoded_and_read_split_by_split(vae: Path, tmp_path: Path) -> None:
    TinyFaces(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    for split in COUNTS:
        encode.encode(
            vae,
            "tfds:tiny_faces",
            tmp_path / "out",
            **SETTINGS,
            data_dir=str(tmp_path / "tfds"),
            split=split,
        )
    assert [about["count"] for about in encode.verify(tmp_path / "out")] == [11, 4]
    for split, part in (("train", "train"), ("validation", "heldout")):
        dataset = data.load(config(tmp_path / "out", flip=True), part)
        images = open_images("tfds:tiny_faces", str(tmp_path / "tfds"), split)
        assert dataset.labels.tolist() == [images.example(i)[1] for i in range(COUNTS[split])]
        assert (
            len(dataset) == COUNTS[split] and dataset.about["source"]["name"] == "tiny_faces/1.0.0"
        )
        assert dataset.flip == (part == "train")  # what is held out is shown as it is
        # The folder itself will do for training.
        if part == "train":
            assert len(data.load(config(tmp_path / "out" / "train"), "train")) == COUNTS[split]


def test_a_training_step_is_taken_from_encoded_images(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])  # one device compiles faster
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: mesh)
    where = {"name": "imagenet256_latents", "data_dir": str(whole), "flip": True}
    run = runs.open_run(
        parse(
            merged(
                TINY,
                batch_size=16,
                data=where,
                network={"num_classes": CLASSES},
                times={"r_neq_t_fraction": 0.5},
            )
        ),
        tmp_path,
    )
    batch = sharding.put_rows(mesh, data.batch(run.dataset, 0, 0, 16))
    scalars = step.step_scalars(0, run.stages[0], run.stages, run.config)
    before = runs.begin(run)
    start = jax.tree.leaves(jax.device_get(before.params))
    now, metrics = run.steps[run.stages[0].kind](before, batch, scalars)
    run.close()
    assert (
        int(now.step) == 1
        and np.isfinite(float(metrics["loss"]))
        and int(metrics["nonfinite_leaf"]) == -1
    )
    assert any(
        not np.array_equal(a, b) for a, b in zip(start, jax.tree.leaves(now.params), strict=True)
    )


def test_latents_are_read_where_neither_tensorflow_nor_jax_is_imported(whole: Path) -> None:
    code = f"""
from dmf.data import DataConfig, batch, load
dataset = load(DataConfig("imagenet256_latents", data_dir={str(whole)!r}, flip=True), "train")
print(float(batch(dataset, 0, 0, 16)["x"].sum(dtype="f8")))
assert "jax" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", WITHOUT_TENSORFLOW + code]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = data.batch(data.load(config(whole, flip=True), "train"), 0, 0, 16)["x"].sum(dtype="f8")
    assert float(done.stdout) == float(ours)


def change(**values: object) -> Callable[[Path], None]:
    """Metadata with other values and a fitting seal."""

    def damage(folder: Path) -> None:
        path = folder / "metadata.json"
        found = {k: v for k, v in json.loads(path.read_text()).items() if k != "seal"}
        path.write_text(json.dumps(sealed(found | values)))

    return damage


def replace(old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / "metadata.json").read_text()
        assert text.count(old) == 1
        (folder / "metadata.json").write_text(text.replace(old, new))

    return damage


ENTRY = {"name": "latents-00000-of-00004.array_record", "bytes": 1, "sha256": "0" * 64, "count": 6}


SHARD_FILE = "latents-00001-of-00004.array_record"
UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "unfinished": (
        lambda d: (d / "metadata.json").unlink(),
        "train is not encoded to its end .no metadata.json",
    ),
    "nothing there": (shutil.rmtree, "train holds no encoded images .no metadata.json"),
    "missing shard": (
        lambda d: (d / SHARD_FILE).unlink(),
        f"{SHARD_FILE} is missing: expected [0-9,]+ bytes",
    ),
    "cut shard": (
        lambda d: cut(d / SHARD_FILE),
        f"{SHARD_FILE} has [0-9,]+ bytes: expected [0-9,]+ bytes",
    ),
    "flipped byte": (
        lambda d: flip_a_byte(d / SHARD_FILE),
        f"{SHARD_FILE} is damaged .*: the command makes it",
    ),
    "other file of the size": (
        lambda d: (d / SHARD_FILE).write_bytes(bytes((d / SHARD_FILE).stat().st_size)),
        f"{SHARD_FILE} holds 0 readable records, expected 12",
    ),
    "labels": (lambda d: flip_a_byte(d / "labels.npy"), "labels.npy has another SHA-256"),
    "format": (change(format=2), "format is 2, expected 1"),
    "other shape": (change(latent_shape=[4, 4, 4]), "record . has not the 512 bytes of float32"),
    "dtype": (
        change(dtype="bfloat16"),
        "metadata.json: dtype is 'bfloat16', expected one of float32, float16",
    ),
    "altered scale": (
        replace('\n "scale": 0.18215', '\n "scale": 0.28215'),
        "metadata.json: its values were altered; expected what `--mode=encode`",
    ),
    "no seal": (replace('"seal"', '"deal"'), "metadata.json: seal is missing, expected a text"),
    "infinite scale": (
        change(scale=float("inf")),
        "metadata.json: scale is inf, expected a finite number above 0",
    ),
    "negative scale": (change(scale=-1.0), "metadata.json: scale is -1.0, expected a finite"),
    "infinite shift": (change(shift=float("nan")), "shift is nan, expected a finite number"),
    "text for a scale": (change(scale="1"), "metadata.json: scale is '1', expected a finite"),
    "flat latents": (
        change(latent_shape=[8, 8]),
        r"latent_shape is \[8, 8\], expected three whole numbers above 0",
    ),
    "empty latents": (
        change(latent_shape=[8, 0, 4]),
        r"latent_shape is \[8, 0, 4\], expected three",
    ),
    "no shape": (change(latent_shape=8), "latent_shape is 8, expected three"),
    "classes": (change(num_classes=-1), "num_classes is -1, expected a whole number, 0 or more"),
    "half a count": (change(count=22.5), "count is 22.5, expected a whole number above 0"),
    "shard size": (change(shard_size=0), "shard_size is 0, expected a whole number above 0"),
    "too many images": (change(count=25), "4 shards, expected 5 of 6 images for count 25"),
    "one more image": (change(count=24), "shard 3 is .* of 5 images, expected .*'count': 6"),
    "other shards": (
        change(count=24, shards=[ENTRY] * 4),
        "shard 1 is 'latents-00000-of-00004.* expected .*latents-00001",
    ),
    "shard without a name": (
        change(shards=[{"count": 6}] * 4),
        "shards is .*expected a list of files",
    ),
    "labels elsewhere": (
        change(labels=ENTRY | {"name": "../labels.npy"}),
        "labels is .*expected the file labels.npy",
    ),
    "no JSON": (
        lambda d: (d / "metadata.json").write_text("{"),
        "metadata.json line 1: no JSON",
    ),
    "no object": (
        lambda d: (d / "metadata.json").write_text("[]"),
        "metadata.json: it is .*, expected an object",
    ),
    "half the fields": (
        lambda d: (d / "metadata.json").write_text('{"format": 1}'),
        "metadata.json: seal is missing, expected a text",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_damaged_files_are_one_line_that_names_them(case: str, copy: Path) -> None:
    damage, message = UNREADABLE[case]
    damage(copy / "train")
    with pytest.raises(DmfError, match=message) as error:
        data.batch(data.load(config(copy), "train"), 0, 0, COUNT)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_a_run_needs_the_directory_and_the_split(whole: Path) -> None:
    with pytest.raises(
        DmfError,
        match="config.data.data_dir is '' for 'imagenet256_latents': expected .*--mode=encode",
    ):
        data.load(DataConfig(name="imagenet256_latents"), "train")
    with pytest.raises(DmfError, match="heldout holds no encoded images"):
        data.load(config(whole), "heldout")
    with pytest.raises(
        DmfError, match="heldout holds no encoded images"
    ):  # the training images are not held out
        data.load(config(whole / "train"), "heldout")


def test_shards_are_listed_by_their_metadata_alone(whole: Path, copy: Path) -> None:
    (copy / "train" / "latents-00009-of-00004.array_record").write_bytes(b"x")
    found = shards.Shards(copy / "train", shards.metadata(copy / "train")).fetch(
        np.array([45, 0, 12, 0])
    )
    np.testing.assert_array_equal(found, records(whole)[[45, 0, 12, 0]])
