"""Kept programs: only whole ones of the right name are left to jax."""

import hashlib
import logging
import os
import warnings

import jax
import pytest

from dmf.run import programs

WHOLE = {"jit_a-1-cache": b"first program", "jit_b-2-cache": b"other program"}


def filled(folder, listed=tuple(WHOLE)):
    folder.mkdir()
    for name, content in WHOLE.items():
        (folder / name).write_bytes(content)
    lines = [f"{hashlib.sha256(WHOLE[name]).hexdigest()}  {name}\n" for name in listed]
    (folder / programs.LIST).write_text("".join(lines))
    return folder


def left(folder):
    return {p.name: p.read_bytes() for p in folder.glob(programs.ENTRIES)}


def swap(folder):
    one, two = (folder / name for name in WHOLE)
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


DAMAGES = {
    "cut": lambda folder: os.truncate(folder / "jit_a-1-cache", 5),
    "altered": lambda folder: (folder / "jit_a-1-cache").write_bytes(b"First program"),
    "swapped": swap,
    "list cut": lambda folder: os.truncate(folder / programs.LIST, 30),
    "list of bytes": lambda folder: (folder / programs.LIST).write_bytes(b"\xff\x00\n\n  \n"),
    "no list": lambda folder: (folder / programs.LIST).unlink(),
}
KEPT = {"cut": {"jit_b-2-cache"}, "altered": {"jit_b-2-cache"}}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_the_list_does_not_confirm_is_deleted_in_one_line(tmp_path, caplog, damage):
    folder = filled(tmp_path / "programs")
    DAMAGES[damage](folder)
    programs.sift(folder)
    kept = KEPT.get(damage, set())
    assert left(folder) == {name: WHOLE[name] for name in kept}
    assert len(caplog.records) == 1 and f"{2 - len(kept)} of 2 programs" in caplog.text
    caplog.clear()
    programs.sift(folder)  # what is left is listed
    assert not caplog.records and set(left(folder)) == kept


def test_whole_programs_stay_without_a_word_and_without_a_write(tmp_path, caplog):
    folder = filled(tmp_path / "programs")
    before = (folder / programs.LIST).stat().st_mtime_ns
    programs.sift(folder)
    assert left(folder) == WHOLE and not caplog.records
    assert (folder / programs.LIST).stat().st_mtime_ns == before


@pytest.fixture
def compiled(monkeypatch):
    """A function that stands for the end of a compilation."""
    listeners = []
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    with warnings.catch_warnings():
        yield lambda: [note(programs.COMPILED, 1.0) for note in listeners]


def test_a_program_is_listed_once_it_is_there_and_again_if_it_grew(tmp_path, compiled, caplog):
    folder = filled(tmp_path / "programs", listed=["jit_a-1-cache"])
    (folder / "jit_b-2-cache").unlink()
    programs.watch(folder)
    new = folder / "jit_c-3-cache"
    new.write_bytes(b"half")  # another thread still writes it
    compiled()
    new.write_bytes(b"half and half")
    compiled()
    programs.sift(folder)
    assert set(left(folder)) == {"jit_a-1-cache", "jit_c-3-cache"} and not caplog.records


def test_what_jax_cannot_read_or_write_goes_and_is_told_once(tmp_path, compiled, caplog, recwarn):
    folder = filled(tmp_path / "programs")
    programs.watch(folder)
    for how, name in (("writing", "jit_a"), ("reading", "jit_b")):
        text = f"Error {how} persistent compilation cache entry for '{name}': OSError: [Errno 28]"
        warnings.warn(f"{text} No space left", stacklevel=1)
    assert left(folder) == {}
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "No space left" in caplog.text
    (folder / "jit_a-1-cache").write_bytes(b"anew")
    compiled()
    programs.sift(folder)
    assert left(folder) == {"jit_a-1-cache": b"anew"}
