"""Image sources: order, labels, identity and pixels of each kind; ADM's crop; errors."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dmf.data.images import ImageSource, open_images
from dmf.errors import DmfError
from tests import ROOT
from tests.data.test_data import WITHOUT_TENSORFLOW

CLASSES = 3
COUNTS = {"train": 11, "validation": 4}


def pixels(seed: int, height: int = 20, width: int = 24) -> np.ndarray:
    """A smooth random image (height, width, 3) uint8, so that JPEG keeps most of it."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: np.ndarray, form: str = "png", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **options)
    return file.getvalue()


# Other tests import this file under another name, and a name can be registered once.
with tfds.core.registered.skip_registration():

    class TinyFaces(tfds.core.GeneratorBasedBuilder):
        """Pictures of many sizes, labelled in turn."""

        __module__ = "tiny_faces"  # of a package TFDS would want to know the files
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            label = tfds.features.ClassLabel(num_classes=CLASSES)
            features = tfds.features.FeaturesDict(
                {"image": tfds.features.Image(encoding_format="jpeg"), "label": label}
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager: tfds.download.DownloadManager) -> dict[str, object]:
            return {split: self._generate_examples(split) for split in COUNTS}

        def _generate_examples(self, split: str) -> object:
            for i in range(COUNTS[split]):
                image = pixels(100 * len(split) + i, 20 + 3 * i, 70 - 3 * i)
                yield i, {"image": encoded(image, "jpeg"), "label": i % CLASSES}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory of TFDS with TinyFaces in it, prepared by TFDS itself."""
    data_dir = tmp_path_factory.mktemp("tfds")
    TinyFaces(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


def labels(source: ImageSource) -> list[int]:
    return [source.example(i)[1] for i in range(len(source))]


def write_files(folder: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            encoded(pixels(i), {".png": "png", ".webp": "webp"}.get(path.suffix.lower(), "jpeg"))
        )
    return folder


def test_a_folder_is_sorted_by_relative_path_and_labelled_by_its_sub_folders(
    tmp_path: Path,
) -> None:
    names = ["b/2.png", "b/10.JPEG", "a/deep/x.jpg", "c/1.webp", "a/z.png"]
    folder = write_files(tmp_path / "set", names)
    (folder / "a" / "readme.txt").write_text("no image")
    (folder / "a" / "._z.png").write_bytes(b"what some systems leave")
    source = open_images(str(folder), split="heldout")
    order = [
        names.index(n) for n in ("a/deep/x.jpg", "a/z.png", "b/10.JPEG", "b/2.png", "c/1.webp")
    ]
    assert len(source) == 5 and source.num_classes == 3
    assert labels(source) == [0, 0, 1, 1, 2]
    np.testing.assert_array_equal(source.read(1), pixels(order[1]))  # PNG keeps every bit
    np.testing.assert_array_equal(source.read(3), pixels(order[3]))
    for i in (0, 2, 4):
        with Image.open(folder / names[order[i]]) as image:
            np.testing.assert_array_equal(source.read(i), np.asarray(image.convert("RGB")))
        assert np.abs(source.read(i).astype(float) - pixels(order[i])).mean() < 10
    assert {k: source.about[k] for k in ("kind", "name", "split", "count")} == {
        "kind": "folder",
        "name": "set",
        "split": "heldout",
        "count": 5,
    }


def test_a_folder_without_images_in_its_sub_folders_has_no_classes(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    source = open_images(str(write_files(tmp_path, ["0.png", "1.png", ".cache/2.png"])))
    assert source.num_classes == 0 and labels(source) == [0, 0]


def link(at: Path, to: Path | str) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    at.symlink_to(to)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda d: write_files(d, ["2.png"]),
            "2.png lies beside 2 folders of images, such as a, and has no class: expected all",
        ),
        (
            lambda d: (d / "aa").mkdir(),
            "aa holds no images, so that it is not clear how classes are counted",
        ),
        (lambda d: (d / "aa" / "deep").mkdir(parents=True), "aa holds no images"),
        (
            lambda d: link(d / "b" / "loop", d),
            "set/b/loop is .*set again, by a link: expected every folder of images once",
        ),
        (lambda d: link(d / "c", d / "b"), "set/[bc] is .*set/[bc] again, by a link"),
        (
            lambda d: link(d / "b" / "3.png", d / "gone.png"),
            "3.png links to .*gone.png, which is not there",
        ),
        (
            lambda d: link(d / "aa", d / "gone"),
            "aa links to .*gone, which is not there",
        ),  # it may be a class
        (lambda d: link(d / "b" / "3.png", "3.png"), "3.png links to 3.png, which is not there"),
    ],
)
def test_a_folder_whose_classes_or_images_are_not_clear_is_one_line(
    spoil: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = write_files(tmp_path / "set", ["a/0.png", "b/1.png"])
    assert labels(open_images(str(folder))) == [0, 1]
    spoil(folder)
    with pytest.raises(DmfError, match=message) as error:
        open_images(str(folder))
    assert "\n" not in str(error.value)


def test_classes_and_images_may_be_links(tmp_path: Path) -> None:
    write_files(tmp_path / "there", ["0.png", "1.png"])
    link(tmp_path / "set" / "b", tmp_path / "there")
    link(tmp_path / "set" / "a" / "x.png", tmp_path / "there" / "1.png")
    source = open_images(str(tmp_path / "set"))
    assert labels(source) == [0, 1, 1]
    np.testing.assert_array_equal(source.read(0), pixels(1))


def test_a_folder_that_the_system_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scan = write_files(tmp_path, ["a/0.png", "b/1.png"]), os.scandir

    def refuse(path: str) -> object:  # whoever tests as root may read all
        if str(path).endswith("b"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        DmfError, match="/b cannot be read .Permission denied.: expected readable folders"
    ):
        open_images(str(folder))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_a_file_that_the_system_refuses_is_not_called_damaged(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_images(str(write_files(tmp_path, ["0.png"])))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "0.png"))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(
        DmfError, match=f"0.png cannot be read .*{os.strerror(number)}.*: expected a readable file"
    ) as error:
        source.read(0)
    assert "damage" not in str(error.value)


def test_the_identity_of_a_part_of_a_folder_is_that_of_its_names_sizes_and_labels(
    tmp_path: Path,
) -> None:
    folder = write_files(tmp_path, ["a/0.png", "a/1.png", "b/2.png", "b/3.png"])
    parts = [open_images(str(folder)).part_sha256(first, first + 2) for first in (0, 2)]
    with (folder / "b" / "2.png").open("ab") as file:
        file.write(b"x")
    after = [open_images(str(folder)).part_sha256(first, first + 2) for first in (0, 2)]
    assert after[0] == parts[0] and after[1] != parts[1] and len({*parts, *after}) == 3
    write_files(folder, ["aa/0.png"])  # all after it have another label
    assert open_images(str(folder)).part_sha256(3, 5) != after[1]


def test_the_identity_of_a_folder_is_that_of_names_and_sizes(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "one", ["a/0.png", "b/1.png"])
    first = open_images(str(folder)).about["sha256"]
    shutil.copytree(folder, tmp_path / "two")
    assert open_images(str(tmp_path / "two")).about["sha256"] == first
    with (folder / "a" / "0.png").open("ab") as file:
        file.write(b"x")
    longer = open_images(str(folder)).about["sha256"]
    (tmp_path / "two" / "b" / "1.png").rename(tmp_path / "two" / "b" / "2.png")
    assert len({first, longer, open_images(str(tmp_path / "two")).about["sha256"]}) == 3


def test_every_kind_of_picture_becomes_rgb(tmp_path: Path) -> None:
    rgb = pixels(0)
    grey = rgb[..., 0]
    Image.fromarray(grey).save(tmp_path / "a_grey.png")
    Image.fromarray(np.dstack([rgb, grey])).save(tmp_path / "b_alpha.png")
    Image.fromarray(rgb).quantize(16).save(tmp_path / "c_palette.png")
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "d_cmyk.jpg")
    source = open_images(str(tmp_path))
    images = [source.read(i) for i in range(4)]
    assert all(image.shape == (20, 24, 3) and image.dtype == np.uint8 for image in images)
    np.testing.assert_array_equal(images[0], np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(images[1], rgb)  # the transparency is dropped, nothing is blended
    np.testing.assert_array_equal(
        images[2], np.asarray(Image.fromarray(rgb).quantize(16).convert("RGB"))
    )
    assert np.abs(images[3].astype(float) - rgb).mean() < 12


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_and_where_it_is_stored_plainly_it_stays_on_disk(
    save: object, tmp_path: Path
) -> None:
    images = np.stack([pixels(i) for i in range(7)])
    save(tmp_path / "a.npz", images)
    save(tmp_path / "b.npz", arr_0=images, mu=np.zeros(5), arr_1=np.arange(7) % 4)
    for name, expected in (("a.npz", None), ("b.npz", np.arange(7) % 4)):
        source = open_images(str(tmp_path / name))
        assert (
            len(source) == 7 and source.about["kind"] == "npz" and len(source.about["sha256"]) == 64
        )
        for i in (0, 3, 6):
            np.testing.assert_array_equal(source.read(i), images[i])
        if expected is None:
            assert source.num_classes == 0 and source.example(6)[1] == 0
        else:
            assert labels(source) == expected.tolist() and source.num_classes == 4
    # The file changes after it was opened: a source in memory still gives the old values.
    source = open_images(str(tmp_path / "b.npz"))
    raw = bytearray((tmp_path / "b.npz").read_bytes())
    at = raw.find(images[6].tobytes())
    assert (at > 0) == (save is np.savez)
    if at > 0:
        with (tmp_path / "b.npz").open("r+b") as file:
            file.seek(at)
            file.write(bytes([raw[at] ^ 255]))
        assert source.read(6)[0, 0, 0] == images[6, 0, 0, 0] ^ 255


def check_tiny_faces(source: ImageSource, split: str) -> None:
    assert len(source) == COUNTS[split] and source.num_classes == CLASSES
    assert sorted(labels(source)) == sorted(i % CLASSES for i in range(COUNTS[split]))
    shapes = set()
    for i in range(len(source)):
        image, label = source.example(i)
        number = (image.shape[0] - 20) // 3  # TFDS shuffles; the height tells which image it is
        assert number % CLASSES == label
        with Image.open(
            io.BytesIO(encoded(pixels(100 * len(split) + number, *image.shape[:2]), "jpeg"))
        ) as expected:
            np.testing.assert_array_equal(image, np.asarray(expected))
        shapes.add(image.shape)
    assert len(shapes) == len(source)


@pytest.mark.parametrize("split", COUNTS)
def test_a_tfds_data_set_is_read_as_it_was_prepared(split: str, prepared: Path) -> None:
    source = open_images("tfds:tiny_faces", str(prepared), split)
    check_tiny_faces(source, split)
    assert source.about["name"] == "tiny_faces/1.0.0" and source.about["split"] == split


def test_splits_of_tfds_may_be_sliced_and_versions_named(prepared: Path) -> None:
    whole = open_images("tfds:tiny_faces:1.0.0", str(prepared))
    part = open_images("tfds:tiny_faces", str(prepared), "train[3:8]")
    assert len(part) == 5 and part.about["sha256"] != whole.about["sha256"]
    for i in range(5):
        np.testing.assert_array_equal(part.read(i), whole.read(3 + i))


def test_tfds_is_read_where_tensorflow_is_not_installed_and_the_builder_is_not_known(
    prepared: Path,
) -> None:
    code = """
from dmf.data.images import open_images
source = open_images("tfds:tiny_faces")
assert len(source) == 11 and source.example(0)[1] in (0, 1, 2), len(source)
print([source.read(i).shape for i in (0, 10)])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": str(prepared)}
    program = [sys.executable, "-c", WITHOUT_TENSORFLOW + code]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    source = open_images("tfds:tiny_faces", str(prepared))
    assert done.stdout.strip() == str([source.read(i).shape for i in (0, 10)])
    assert not done.stderr
