"""Readers of a run that replaces its checkpoints, and of folders without rights."""

import shutil
from pathlib import Path

import pytest

from dmf.errors import DmfError
from dmf.storage import manifest


def step(workdir, n):
    folder = workdir / manifest.FOLDER / str(n)
    (folder / "params").mkdir(parents=True)
    (folder / manifest.MANIFEST).write_text("{}")
    return folder


def test_a_reader_takes_the_newest_when_a_run_removes_what_it_reads(tmp_path):
    step(tmp_path, 3)
    seen = []

    def read(folder):
        seen.append(folder.name)
        if len(seen) < 3:  # the run saves again, and removes this folder
            step(tmp_path, 3 * (len(seen) + 1))
            shutil.rmtree(folder)
            raise DmfError("a file is missing")
        return folder.name

    assert manifest.read_newest(tmp_path, read) == "9" and seen == ["3", "6", "9"]


def test_an_error_of_the_newest_folder_is_told_and_an_endless_race_ends(tmp_path):
    step(tmp_path, 3)
    n = 3

    def damaged(folder):
        raise DmfError("another checksum")

    def replaced(folder):
        nonlocal n
        n += 3
        step(tmp_path, n)
        raise DmfError("a file is missing")

    with pytest.raises(DmfError, match="another checksum"):
        manifest.read_newest(tmp_path, damaged)
    with pytest.raises(DmfError, match="20 times a run removed what was being read"):
        manifest.read_newest(tmp_path, replaced)


def test_a_folder_without_rights_is_passed_over_or_named(tmp_path, monkeypatch, caplog):
    older, newest = step(tmp_path, 3), step(tmp_path, 6)
    looked = Path.is_file

    def is_file(path):
        if newest in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return looked(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    assert manifest.find(tmp_path) == older
    assert "6: Permission denied; the one before it is taken" in caplog.text
    monkeypatch.setattr(Path, "exists", lambda path: is_file(newest / "x"))
    with pytest.raises(DmfError, match="Permission denied; expected a folder that may be read"):
        manifest.find(tmp_path)
