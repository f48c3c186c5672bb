"""Checkpoints that are damaged, cut off or not finished are named; an older one is taken."""

import resource
import shutil
import threading
import time

import jax
import numpy as np
import pytest

from dmf.errors import DmfError
from dmf.storage import checkpoint
from tests.runs import steps_on_disk, store
from tests.tiny import MLP, Setup


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A work directory with checkpoints of steps 6 and 9, and the state of step 6."""
    folder = tmp_path_factory.mktemp("two")
    setup = Setup(MLP)  # few leaves: they are read fifty times
    saved = store(folder)
    saved.save(6, setup.run("all_pairs", 1)[0])
    older = saved.restore_latest(setup.state())
    saved.save(9, setup.run("all_pairs", 2)[0])
    saved.close()
    return folder, older


def damage(path, rng):
    """Flips a bit of a file, cuts it short, or deletes it; returns what was done."""
    content = bytearray(path.read_bytes())
    how = rng.choice(["flip", "truncate", "delete"]) if content else "delete"
    if how == "flip":
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(content[: rng.integers(len(content))])
    else:
        path.unlink()
    return how


def test_fifty_damages_of_a_checkpoint_are_named_and_none_is_loaded(two, tmp_path, caplog):
    whole, older = two
    rng = np.random.default_rng(0)
    copy, done = tmp_path / "copy", []
    for i in range(50):
        shutil.copytree(whole, copy)
        folder = copy / "checkpoints" / "9"
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        victim = folder / checkpoint.MANIFEST if i % 5 == 0 else files[rng.integers(len(files))]
        done.append((victim.name == checkpoint.MANIFEST, damage(victim, rng)))
        caplog.clear()
        saved = store(copy)
        found = saved.restore_latest(older)
        saved.close()
        assert int(found.step) == int(older.step), (
            victim,
            done[-1],
        )  # the one before, not the damaged one
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(older), strict=True):
            np.testing.assert_array_equal(a, b)
        assert f"checkpoint {folder}" in caplog.text and "it is skipped" in caplog.text
        assert done[-1][0] or victim.relative_to(folder).as_posix() in caplog.text
        shutil.rmtree(copy)
    assert set(done) == {(m, how) for m in (True, False) for how in ("flip", "truncate", "delete")}


def test_every_bit_and_every_length_of_a_manifest_counts(two, tmp_path):
    # It holds no checksum of itself. So every change must be seen, also of spaces and line ends.
    shutil.copytree(two[0] / "checkpoints" / "9", tmp_path / "9")
    path = tmp_path / "9" / checkpoint.MANIFEST
    whole = path.read_bytes()
    checkpoint.verify(tmp_path / "9")
    rng = np.random.default_rng(1)
    bits = rng.choice(8 * len(whole), 300, replace=False)
    others = [
        bytes(b ^ (1 << bit % 8 if i == bit // 8 else 0) for i, b in enumerate(whole))
        for bit in bits
    ]
    others += [whole[:-1], whole + b"\n", b"{}\n", b"[]\n", b"", b"null\n"]
    lines = whole.decode().splitlines()
    others.append(
        whole.replace(lines[1].encode(), lines[5].encode())
    )  # one file is listed twice, another is missing
    for other in others:
        path.write_bytes(other)
        with pytest.raises(DmfError, match="checkpoint .*expected"):
            checkpoint.verify(tmp_path / "9")


def test_the_last_good_checkpoint_outlives_damaged_and_unfinished_newer_ones(
    two, tmp_path, monkeypatch
):
    # Only step 6 is good. A kill between the save of step 7 and its manifest must leave it there.
    shutil.copytree(two[0], tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "9", folder / "12")
    (folder / "9" / checkpoint.MANIFEST).write_text("{")
    (folder / "12" / checkpoint.MANIFEST).unlink()
    saved = store(tmp_path / "run")
    found = saved.restore_latest(two[1])

    class Killed(Exception):
        pass

    def kill(_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "write_manifest", kill)
        saved.save(7, found)
    saved.close()
    assert 6 in steps_on_disk(tmp_path / "run")
    saved = store(tmp_path / "run")
    assert saved.restore_latest(two[1]) is not None
    saved.save(7, found)
    saved.save(8, found)
    saved.close()
    assert steps_on_disk(tmp_path / "run") == [7, 8]


def come_to_rest(folder):
    """Returns when the files of a folder have not changed for a second."""
    seen, since = None, time.monotonic()
    while time.monotonic() - since < 1.0:
        found = {path: path.stat().st_size for path in folder.rglob("*") if path.exists()}
        if found != seen:
            seen, since = found, time.monotonic()
        time.sleep(0.05)


def test_a_disk_that_fills_up_inside_a_save_is_one_line_and_loses_no_older_checkpoint(
    two, tmp_path, caplog, capfd
):
    # The system itself refuses to write: files may not grow beyond 4 kB.
    shutil.copytree(two[0], tmp_path / "run")
    saved = store(tmp_path / "run")
    newest = saved.restore_latest(two[1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(
            DmfError,
            match=r"checkpoint of step 12 could not be written to \S*: File too large; "
            "checkpoints of other steps are untouched",
        ):
            saved.save(12, newest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    saved.close()
    # The writers of the failed save are still at work; in a run they end with the process.
    come_to_rest(tmp_path / "run")
    # Orbax logs a traceback in each of its threads.
    assert not caplog.records and capfd.readouterr().err == ""
    again = store(tmp_path / "run")
    found = again.restore_latest(two[1])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(newest), strict=True):
        np.testing.assert_array_equal(a, b)
    again.save(12, newest)  # with room again, the save succeeds
    assert again.complete() == [12, 9]
    again.close()
    for step in (6, 9):
        assert step == 6 or checkpoint.verify(tmp_path / "run" / "checkpoints" / str(step)) is None


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_show_in_it(
    two, tmp_path, monkeypatch
):
    go_on, real = threading.Event(), checkpoint.write_manifest

    def slow(folder):
        assert go_on.wait(60)
        real(folder)

    monkeypatch.setattr(checkpoint, "write_manifest", slow)
    setup = Setup()
    state, program = setup.run("all_pairs", 1)[0], setup.step("all_pairs")
    expected = jax.tree.map(np.array, state)
    saved = store(tmp_path)
    saved.save(3, state, wait=False)
    for n in range(1, 5):  # a step donates the state that is being written
        state, _ = program(state, setup.batch(n), setup.scalars(n, "all_pairs"))
    jax.block_until_ready(state)
    assert not saved.complete()  # it does not exist yet
    go_on.set()
    saved.save(5, state)  # waits for it
    assert saved.complete() == [5, 3]
    saved.close()
    shutil.rmtree(tmp_path / "checkpoints" / "5")
    found = store(tmp_path).restore_latest(setup.state())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_save_that_fails_behind_training_is_told_by_the_next_one(
    two, tmp_path, monkeypatch, caplog
):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    saved, state = store(tmp_path), two[1]
    saved.save(3, state, wait=False)
    with pytest.raises(
        DmfError, match="checkpoint of step 3 could not be written .*No space left on device"
    ):
        saved.save(4, state)
    saved.save(6, state, wait=False)
    saved.close()  # where another error ends the run
    assert "checkpoint of step 6 could not be written" in caplog.text
    assert store(tmp_path).restore_latest(state) is None
