"""What a folder of images tells: files left out, order of classes, splits, EXIF orientation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmf.data import folders
from dmf.data.images import ORIENTATION, open_images
from dmf.errors import DmfError
from tests.data.test_images import encoded, labels, pixels, write_files


def test_files_that_are_left_out_are_counted_by_their_endings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path, ["a.png", "b.jpg"])
    for name in ("c.bmp", "d.BMP", "e.tif", "f.jfif", "readme.txt", "Makefile", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    open_images(str(tmp_path)).announce()
    told = capsys.readouterr().out
    for part in ("2 .bmp", "1 .tif", "1 .jfif", "images, but read are", "1 .txt", "without an end"):
        assert part in told


def test_nothing_is_told_where_nothing_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_images(str(write_files(tmp_path, ["a.png"])))
    source.announce()
    source.read(0)
    source.tell_orientations()
    assert capsys.readouterr().out == ""


def test_folders_of_numbers_count_as_numbers_and_say_so(tmp_path: Path) -> None:
    names = [f"{c}/0.png" for c in range(12)]
    source = open_images(str(write_files(tmp_path / "set", names)))
    assert source.classes == tuple(map(str, range(12)))
    by_name = dict(zip(sorted(names), labels(source), strict=True))
    assert all(by_name[f"{c}/0.png"] == c for c in range(12))
    assert source.notes[0].startswith("class folders sort as numbers: class 0 is 0, 1 is 1, 2 is 2")
    former = open_images(str(tmp_path / "set"), former=True)
    assert labels(former) == list(range(12)) and former.classes[:3] == ("0", "1", "10")
    assert former.notes[0].startswith("class folders sort as text: class 0 is 0, 1 is 1, 2 is 10")
    assert source.about == former.about  # an encoding by an earlier version goes on


@pytest.mark.parametrize(
    ("names", "classes"),
    [(["01", "1", "0"], ("0", "01", "1")), (["2", "10", "a"], ("10", "2", "a"))],
)
def test_only_numbers_sort_as_numbers(
    names: list[str], classes: tuple[str, ...], tmp_path: Path
) -> None:
    write_files(tmp_path, [f"{name}/0.png" for name in names])
    assert folders.read(tmp_path).classes == classes


def test_splits_are_no_classes(tmp_path: Path) -> None:
    root = write_files(tmp_path / "set", ["train/cat/0.png", "val/cat/1.png"])
    message = f"set holds train, val, which are splits .*expected one .*--source={root}/train"
    with pytest.raises(DmfError, match=message):
        open_images(str(root), training=True)
    score = open_images(str(root))  # a score needs no classes
    assert len(score) == 2 and "are splits and no classes" in score.notes[0]
    write_files(root, ["dog/0.png"])
    assert open_images(str(root), training=True).classes == ("dog", "train", "val")


def test_classes_one_level_down_are_noticed(tmp_path: Path) -> None:
    source = open_images(str(write_files(tmp_path, ["images/cat/0.png", "images/dog/1.png"])))
    assert source.num_classes == 1
    assert (
        f"give --source={tmp_path / 'images'}" in source.notes[0] and "2 folders" in source.notes[0]
    )


def test_training_images_are_turned_by_exif_and_those_of_scores_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pixels(0, 12, 20)
    for i in range(9):  # 0 is no orientation
        exif = Image.Exif()
        exif[ORIENTATION] = i
        (tmp_path / f"{i}.png").write_bytes(encoded(image, exif=exif))
    turned = [open_images(str(tmp_path), training=True), open_images(str(tmp_path))]
    upright, stored = ([source.read(i) for i in range(9)] for source in turned)
    for same in (*stored, *upright[:2]):
        np.testing.assert_array_equal(same, image)
    np.testing.assert_array_equal(upright[2], image[:, ::-1])
    np.testing.assert_array_equal(upright[3], image[::-1, ::-1])
    np.testing.assert_array_equal(upright[6], np.rot90(image, -1))  # what most cameras write
    np.testing.assert_array_equal(upright[8], np.rot90(image))
    for source, how in zip(turned, ("turned upright", "read as they are stored"), strict=True):
        source.tell_orientations()
        assert f"7 images have an EXIF orientation and were {how}" in capsys.readouterr().out
    former = open_images(str(tmp_path), training=True, former=True)
    np.testing.assert_array_equal(former.read(6), image)


def test_classes_of_an_npz_without_images_are_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((3, 8, 8, 3), np.uint8), np.array([1, 3, 1]))
    source = open_images(str(tmp_path / "a.npz"))
    assert source.num_classes == 4
    assert (
        "2 of its classes 0 to 3 have no image, such as 0; labels count from 0" in source.notes[0]
    )


def test_names_of_folders_forge_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forged = "a\nERROR: all good\x1b[31m"
    write_files(tmp_path, [f"{forged}/0.png", "10/0.png", f"{forged}/x.\n"])
    open_images(str(tmp_path)).announce()
    told = capsys.readouterr().out
    assert {line[:10] for line in told.splitlines()} == {"note      ", "classes   "}
    assert "\x1b" not in told
