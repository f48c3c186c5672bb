"""Files and folders are there whole or not at all, whatever killed processes left."""

import os
import socket
import subprocess

import pytest

from dmf.errors import short
from dmf.storage import atomic, paths


def left(folder, name, process, host=None):
    """A folder with a file in it, as a killed process leaves it."""
    path = folder / f".{name}.partial-{host or socket.gethostname()}-{process}"
    path.mkdir()
    (path / "half").write_text("data")
    return path


@pytest.fixture
def dead():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("name", ["x", "x[1] (a+b).npz"])
def test_what_dead_processes_left_of_a_place_goes_and_all_else_stays(tmp_path, dead, name):
    gone = [
        left(tmp_path, name, n)
        for n in (dead, os.getpid(), f"{dead}.orbax-checkpoint-tmp", "9" * 30)
    ]
    stays = [
        left(tmp_path, name, os.getppid()),
        left(tmp_path, name, dead, "another"),
        left(tmp_path, f"y{name}", dead),
    ]
    stays += [left(tmp_path, name, f"{dead}.notes")]
    with atomic.made(tmp_path / name) as partial:
        assert not any(path.exists() for path in gone)
        partial.mkdir()
        (partial / "a").write_text("1")
    assert (
        sorted(tmp_path.iterdir()) == sorted([*stays, tmp_path / name])
        and (tmp_path / name / "a").read_text() == "1"
    )
    atomic.clear(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*stays[:2], stays[3], tmp_path / name])


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, dead, durable, monkeypatch):
    place, seen = tmp_path / "x.json", []
    unfinished = tmp_path / f".x.json.partial-{socket.gethostname()}-{dead}"
    unfinished.write_text("hal")  # of a process that was killed
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(os.fstat(handle).st_ino))
    atomic.write(place, b"whole", durable)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"] and place.read_bytes() == b"whole"
    assert seen == [place.stat().st_ino, tmp_path.stat().st_ino] * durable
    with pytest.raises(OSError):
        atomic.write(tmp_path / "none" / "x.json", b"whole", durable)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_file_leaves_what_was_there_before(tmp_path, error):
    (tmp_path / "x").write_text("old")
    with pytest.raises(type(error)), atomic.made(tmp_path / "x") as partial:
        partial.write_text("ne")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"
    with atomic.made(tmp_path / "x") as partial:
        partial.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "new"


def test_a_process_that_was_killed_and_has_the_same_number_again_is_not_in_its_own_way(tmp_path):
    left(tmp_path, "out", os.getpid())  # as the first process of a container always has
    assert paths.check_free(tmp_path / "out") == tmp_path / "out"
    assert not list(tmp_path.iterdir())


def test_an_error_is_short():
    assert short(ValueError("a\n  b" + 300 * "c")) == "ValueError: a b" + 197 * "c"
