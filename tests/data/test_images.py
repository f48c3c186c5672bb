"""Image sources: order, labels, identity and pixels of each kind; ADM's crop; errors."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dmf.data.images import ImageSource, center_crop, open_images
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


def halved(image: np.ndarray) -> np.ndarray:
    """Means of 2x2 blocks, halves rounded up."""
    height, width = image.shape[0] // 2, image.shape[1] // 2
    blocks = image[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).astype(int)
    return ((blocks.sum((1, 3)) + 2) // 4).astype(np.uint8)


def test_the_crop_of_an_image_of_the_right_height_is_its_middle() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 13, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        center_crop(image, 8), image[:, 2:10]
    )  # 5 columns too many: 2 left, 3 right
    np.testing.assert_array_equal(
        center_crop(image.transpose(1, 0, 2), 8), image.transpose(1, 0, 2)[2:10]
    )


def test_the_crop_halves_by_box_as_long_as_it_can() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
    found = center_crop(image, 8)
    # PIL's box filter rounds each of its two passes
    np.testing.assert_allclose(found.astype(int), halved(image)[:, 1:9].astype(int), atol=1)
    large = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_allclose(
        center_crop(large, 8).astype(int), halved(halved(large)).astype(int), atol=2
    )
    flat = np.full((31, 64, 3), 77, np.uint8)
    np.testing.assert_array_equal(center_crop(flat, 8), np.full((8, 8, 3), 77))


def test_the_crop_ends_with_one_bicubic_step() -> None:
    image = np.random.default_rng(0).integers(0, 256, (21, 30, 3), dtype=np.uint8)
    once = Image.fromarray(image).resize((15, 10), Image.Resampling.BOX)
    twice = once.resize((12, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(center_crop(image, 8), np.asarray(twice)[:, 2:10])
    bicubic = np.asarray(Image.fromarray(image).resize((11, 8), Image.Resampling.BICUBIC))[:, 1:9]
    assert (
        np.abs(center_crop(image, 8).astype(int) - bicubic).mean() > 2
    )  # another rule gives other pixels
    grown = np.asarray(Image.fromarray(image).resize((46, 32), Image.Resampling.BICUBIC))[:, 7:39]
    np.testing.assert_array_equal(center_crop(image, 32), grown)


def truncated_jpeg(folder: Path) -> str:
    (folder / "cut.jpg").write_bytes(encoded(pixels(0, 64, 64), "jpeg", quality=95)[:-200])
    return str(folder)


def other_file(content: bytes, name: str = "bad.png") -> object:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder)

    return write


def sixteen_bits(folder: Path) -> str:
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(folder / "deep.png")
    return str(folder)


def npz(**arrays: np.ndarray) -> object:
    def write(folder: Path) -> str:
        np.savez(folder / "set.npz", **arrays)
        return str(folder / "set.npz")

    return write


def half_an_npz(folder: Path) -> str:
    path = Path(npz(arr_0=np.zeros((4, 8, 8, 3), np.uint8))(folder))
    path.write_bytes(path.read_bytes()[:500])
    return str(path)


def npz_of_something_else(folder: Path) -> str:
    with zipfile.ZipFile(folder / "set.npz", "w") as archive:
        archive.writestr("arr_0.npy", "not an array")
    return str(folder / "set.npz")


IMAGES = np.zeros((2, 8, 8, 3), np.uint8)
ERRORS = {
    "missing": (lambda d: str(d / "none"), "none' does not exist: expected a folder of images"),
    "other kind of file": (
        lambda d: other_file(b"")(d) + "/bad.png",
        "is neither: expected a folder of images, an .npz",
    ),
    "empty folder": (str, "holds no images: expected files ending in .png"),
    "truncated JPEG": (
        truncated_jpeg,
        r"cut.jpg cannot be read \(OSError: .*truncated.*\): expected an undamaged PNG",
    ),
    "half a PNG": (other_file(encoded(pixels(0))[:300]), "bad.png cannot be read"),
    "flipped bit in a PNG": (
        other_file(encoded(pixels(0)).replace(b"IDAT", b"IDAS")),
        "bad.png cannot be read",
    ),
    "no image": (other_file(b"hello"), "bad.png cannot be read"),
    "empty file": (other_file(b""), "bad.png cannot be read"),
    "format that is not expected": (
        other_file(encoded(pixels(0), "bmp")),
        "bad.png cannot be read",
    ),
    "16 bits": (sixteen_bits, "deep.png has pixels of kind I;16: expected 8 bits per channel"),
    "NaN images": (
        npz(arr_0=np.full((2, 8, 8, 3), np.nan, np.float32)),
        r"arr_0 is float32\[2, 8, 8, 3\]: expected .* uint8",
    ),
    "no arr_0": (npz(images=IMAGES), "holds images.npy: expected arr_0"),
    "channels first": (
        npz(arr_0=np.zeros((2, 3, 8, 8), np.uint8)),
        r"arr_0 is uint8\[2, 3, 8, 8\]: expected images",
    ),
    "no images": (npz(arr_0=IMAGES[:0]), "set.npz"),
    "Python objects": (
        npz(arr_0=np.array([{}], object)),
        "cannot be read .*expected an undamaged .npz",
    ),
    "too few labels": (
        npz(arr_0=IMAGES, arr_1=np.zeros(1, int)),
        r"arr_1 is int64\[1\]: expected 2 labels from 0 up",
    ),
    "labels that are no numbers": (
        npz(arr_0=IMAGES, arr_1=np.zeros(2)),
        r"arr_1 is float64\[2\]: expected 2 labels",
    ),
    "half an npz": (half_an_npz, "set.npz cannot be read"),
    "no array in an npz": (npz_of_something_else, "set.npz cannot be read"),
    "unknown TFDS name": (
        lambda d: "tfds:nothing",
        "TFDS data set nothing is not prepared in .*nothing: prepare it by `python",
    ),
    "known TFDS name": (
        lambda d: "tfds:imagenet2012",
        "imagenet2012 is not prepared in .*builder\\('imagenet2012'",
    ),
    "nameless": (lambda d: "tfds:a b!", "TFDS data set a b! is not prepared"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_one_line_that_names_it(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, message = ERRORS[case]
    with pytest.raises(DmfError, match=message) as error:
        open_images(make(tmp_path), str(tmp_path)).read(0)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not any(capfd.readouterr())


@pytest.mark.parametrize(
    ("split", "damage", "message"),
    [
        ("test", "", "cannot be read, split test .*'train', 'validation'"),
        (
            "train",
            "tfrecord",
            "is prepared without random access, expected array_record: convert it by "
            "`tfds convert_format .*DIR prepare it",
        ),
        ("train", "cut", "split train.*: delete its folder and prepare it again"),
        (
            "train",
            "flip",
            "split train, .* is damaged .record .*: delete its folder and prepare it again",
        ),
        ("train[:0]", "", r"cannot be read, split train\[:0\]"),
    ],
)
def test_a_tfds_data_set_that_is_not_as_expected_is_one_line(
    split: str, damage: str, message: str, prepared: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    folder = tmp_path / "copy" / "tiny_faces" / "1.0.0"
    shard = next(folder.glob("*train*"))
    content = bytearray(shard.read_bytes())
    if damage == "tfrecord":
        info = folder / "dataset_info.json"
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
    elif damage == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        for at in range(200, 15_000, 100):
            content[at] ^= 1
        shard.write_bytes(content)
    with pytest.raises(DmfError, match=message) as error:
        source = open_images("tfds:tiny_faces", str(tmp_path / "copy"), split)
        [source.read(i) for i in range(len(source))]
    assert "\n" not in str(error.value) and "tiny_faces" in str(error.value)


def test_the_identity_of_a_tfds_data_set_is_that_of_its_shards(
    prepared: Path, tmp_path: Path
) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    first = open_images("tfds:tiny_faces", str(tmp_path / "copy")).about["sha256"]
    assert first == open_images("tfds:tiny_faces", str(prepared)).about["sha256"]
    with next((tmp_path / "copy" / "tiny_faces" / "1.0.0").glob("*train*")).open("ab") as file:
        file.write(b"x")
    assert open_images("tfds:tiny_faces", str(tmp_path / "copy")).about["sha256"] != first


def test_no_more_files_than_may_be_open_is_not_called_damaged(prepared: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit[1] == resource.RLIM_INFINITY:
        pytest.skip("the number of open files has no limit here")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit[0], limit[1] - 1), limit[1]))
        source = open_images("tfds:tiny_faces", str(prepared))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limit[1], limit[1])
        free = os.open(prepared, os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limit[1]))
        with pytest.raises(
            DmfError, match="record 0 cannot be read .*Too many open files.*ulimit -n"
        ) as error:
            source.read(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert "damaged" not in str(error.value) and "delete" not in str(error.value)
    assert open_images("tfds:tiny_faces", str(prepared)).read(0).ndim == 3


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, ["a.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 24)
    source = open_images(str(tmp_path))
    assert source.read(0).shape == (20, 24, 3)
    with pytest.raises(
        DmfError, match="an image of 24 x 20 enlarged .* has 48 x 40 pixels: expected at most 480"
    ):
        center_crop(source.read(0), 40)
    for limit in (300, 100):  # PIL itself refuses beyond twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DmfError, match="a.png .*pixels") as error:
            source.read(0)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))]
)
def test_the_crop_takes_uint8_rgb_alone(image: np.ndarray) -> None:
    with pytest.raises(DmfError, match="expected uint8"):
        center_crop(image, 4)
