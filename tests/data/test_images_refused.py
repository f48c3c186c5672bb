"""Images from outside: ADM's crop, and what is refused in one line."""

from __future__ import annotations

import os
import resource
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmf.data.images import center_crop, open_images
from dmf.errors import DmfError
from tests.data.test_images import encoded, pixels, write_files
from tests.data.test_images import prepared as prepared


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


def npz_that_lies(save: Callable[..., None]) -> object:
    """arr_0 announces a row more than it holds; stored plainly, its bytes would be arr_1's."""

    def write(folder: Path) -> str:
        path = Path(folder / "set.npz")
        save(path, arr_0=np.zeros((3, 8, 8, 3), np.uint8), arr_1=np.zeros(64, np.int64))
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        members["arr_0.npy"] = members["arr_0.npy"].replace(b"(3, 8", b"(4, 8")
        kind = zipfile.ZIP_STORED if save is np.savez else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return str(path)

    return write


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
    "labels beyond 32 bits": (
        npz(arr_0=IMAGES, arr_1=np.array([1, 2**32 + 1])),
        "set.npz: arr_1 holds 4294967297: expected labels of at most 2147483646",
    ),
    "labels beyond 64 bits": (
        npz(arr_0=IMAGES, arr_1=np.array([1, 2**64 - 1], np.uint64)),
        "set.npz: arr_1 holds 18446744073709551615: expected labels",
    ),
    "an array shorter than announced": (
        npz_that_lies(np.savez),
        r"arr_0 declares shape \(4, 8, 8, 3\) of uint8 but holds 576 bytes: expected a whole array",
    ),
    "a packed array shorter than announced": (
        npz_that_lies(np.savez_compressed),
        r"arr_0 declares shape \(4, 8, 8, 3\) of uint8 but holds 576 bytes: expected a whole array",
    ),
    "only images of other kinds": (
        other_file(encoded(pixels(0), "bmp"), "a.bmp"),
        "holds no images: expected .*; left out are 1 .bmp",
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
