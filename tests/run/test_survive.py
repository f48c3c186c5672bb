"""What may happen to a run and its directory: damaged files, full disks, changed configs, signals. Nothing is lost silently."""

import importlib.util
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import jax
import numpy as np
import pytest

from dmf import train
from dmf.config import parse, to_dict
from dmf.errors import DmfError
from dmf.run import sigterm, workdir
from dmf.storage import checkpoint
from dmf.storage.checkpoint import Checkpoints
from tests import devices
from tests.test_processes import CONFIG, ROOT, VALUES, Group
from tests.test_train import leaves
from tests.tiny import TINY, Setup, merged

# One program, two stages; scored by nothing.
QUICK = merged(
    TINY, curriculum=dict(stages=2, kinds=("all_pairs",) * 2, length=12.0, pretrain_length=0.0)
)


def store(folder, keep=2):
    return Checkpoints(folder, keep, [], {"config": {}})


def steps_on_disk(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A work directory with checkpoints of steps 6 and 9, of different states, and the former's state."""
    folder = tmp_path_factory.mktemp("two")
    setup = Setup()
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
    # It holds no checksum of itself: whatever still parses must not be what was written, spaces and the last line end included.
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
    )  # one file listed twice, another not
    for other in others:
        path.write_bytes(other)
        with pytest.raises(DmfError, match="checkpoint .*expected"):
            checkpoint.verify(tmp_path / "9")


def test_the_last_good_checkpoint_outlives_damaged_and_unfinished_newer_ones(
    two, tmp_path, monkeypatch
):
    # Step 6 is all that is good. A kill between the save of step 7 and its manifest must not leave nothing.
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
    """Returns when nothing has come, gone or grown in a folder for a second."""
    seen, since = None, time.monotonic()
    while time.monotonic() - since < 1.0:
        found = {path: path.stat().st_size for path in folder.rglob("*") if path.exists()}
        if found != seen:
            seen, since = found, time.monotonic()
        time.sleep(0.05)


def test_a_disk_that_fills_up_inside_a_save_loses_no_older_checkpoint(two, tmp_path):
    # The system itself refuses to write: files may not grow beyond 4 kB.
    shutil.copytree(two[0], tmp_path / "run")
    saved = store(tmp_path / "run")
    newest = saved.restore_latest(two[1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(
            DmfError, match="checkpoint of step 12 could not be written .*other steps are untouched"
        ):
            saved.save(12, newest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    saved.close()
    come_to_rest(
        tmp_path / "run"
    )  # the writers of the save that failed, who would end with their process
    again = store(tmp_path / "run")
    found = again.restore_latest(two[1])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(newest), strict=True):
        np.testing.assert_array_equal(a, b)
    again.save(12, newest)  # and when there is room again, the save goes through
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
    for n in range(1, 5):  # steps donate what is being written
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


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_every_start_notes_what_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2-in-the-environment")
    train.train(parse(QUICK), tmp_path)
    (tmp_path / workdir.STARTS).write_text((tmp_path / workdir.STARTS).read_text() + '{"torn')
    train.train(parse(merged(QUICK, run=dict(sample_rows=3))), tmp_path)
    first, torn, second = (tmp_path / workdir.STARTS).read_text().splitlines()
    first, second = json.loads(first), json.loads(second)
    assert torn == '{"torn'
    assert (first["step"], second["step"]) == (0, 12)
    assert (first["differs"], second["differs"]) == ([], ["config.run.sample_rows: 2 -> 3"])
    assert first["jax"] == jax.__version__ and first["numpy"] == np.__version__
    assert (
        first["processes"] == 1 and first["platform"] == "cpu" and first["devices"] == ["8 x cpu"]
    )
    assert first["command"] == shlex.join(sys.orig_argv)
    assert abs(datetime.fromisoformat(first["utc"]).timestamp() - time.time()) < 300
    assert set(first["git"]) == {"revision", "dirty"} or first["git"] == {"revision": "unknown"}
    assert not any("hunter2" in p.read_text(errors="ignore") for p in tmp_path.glob("*.json*"))


def test_the_revision_is_that_of_the_code_and_of_no_repository_around_it(tmp_path):
    git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x"]
    for args in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *args], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert workdir.revision(tmp_path) == {"revision": head, "dirty": False}
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "new.py").touch()
    assert workdir.revision(tmp_path) == {"revision": head, "dirty": True}
    assert workdir.revision(tmp_path / "site-packages") == {"revision": "unknown"}
    assert workdir.revision(tmp_path / "nowhere") == {"revision": "unknown"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of `QUICK`."""
    folder = tmp_path_factory.mktemp("finished")
    train.train(parse(QUICK), folder)
    return folder


def test_a_change_is_shown_refused_and_with_the_flag_taken_and_noted(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    longer = parse(
        merged(QUICK, curriculum=dict(length=20.0), loss=dict(p=0.75), run=dict(sample_rows=3))
    )
    shown = r"config.curriculum.length: 12.0 -> 20.0; config.loss.p: 0.5 -> 0.75"
    with pytest.raises(DmfError, match=f"another config: {shown}; expected .*--allow_change"):
        train.train(longer, run)
    assert (
        json.loads((run / "config.json").read_text())["loss"]["p"] == 0.5
        and not (run / workdir.CHANGES).exists()
    )
    train.train(longer, run, allow_change=True)
    assert re.search(f"changed +after step 12: {shown}\n", capsys.readouterr().out)
    (row,) = rows(run, workdir.CHANGES)
    assert (
        row["step"] == 12
        and row["changed"] == shown.split("; ")
        and row["before"] == json.loads(json.dumps(to_dict(parse(QUICK))))
    )
    assert parse(json.loads((run / "config.json").read_text())) == longer
    assert row["kept"] == steps_on_disk(finished) == [6, 9, 12]
    assert steps_on_disk(run) == [
        6,
        9,
        12,
        18,
        20,
    ]  # those of before, 9 and a boundary among them, and the newest two
    assert (
        rows(run, "metrics.jsonl")[:12] == rows(finished, "metrics.jsonl")
        and len(rows(run, "metrics.jsonl")) == 20
    )
    train.train(longer, run)  # from now on this is the run's config
    assert len(rows(run, workdir.CHANGES)) == 1
    with pytest.raises(DmfError, match="config.loss.p: 0.75 -> 0.5"):
        train.train(parse(QUICK), run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(network=dict(width=64)),
            r"config.network.width: 32 -> 64 \(the weights on disk are those of this network\)",
        ),
        (
            dict(data=dict(holdout_fraction=0.5)),
            r"config.data.holdout_fraction: 0.25 -> 0.5 \(the weights have seen these data",
        ),
        (
            dict(ema=dict(halflife_images=(50.0,))),
            r"halflife_images: .* \(the averages on disk have these half-lives\)",
        ),
        (
            dict(optimizer=dict(clip_norm=0.0)),
            r"clip_norm: 1.0 -> 0.0 \(the optimiser's state on disk has other parts\)",
        ),
        (
            dict(curriculum=dict(length=8.0)),
            "step 12 is on disk: expected a config that ends no earlier, not at 8",
        ),
    ],
)
def test_no_flag_lets_a_change_through_that_the_state_on_disk_does_not_fit(
    finished, change, message
):
    before = {p: p.read_text() for p in finished.glob("*.json*")}
    with pytest.raises(DmfError, match=message):
        train.train(parse(merged(QUICK, **change)), finished, allow_change=True)
    assert {p: p.read_text() for p in finished.glob("*.json*")} == before


def test_another_clipping_threshold_is_a_change_that_the_flag_lets_through(finished):
    values = merged(QUICK, optimizer=dict(clip_norm=2.0))
    about = json.loads((finished / "data.json").read_text())
    with pytest.raises(DmfError, match="clip_norm: 1.0 -> 2.0; expected .*--allow_change"):
        workdir.claim(finished, parse(values), None, about, False)
    workdir.claim(finished, parse(values), None, about, False, allow_change=True)
    with pytest.raises(
        DmfError, match=r"data.count: \d+ -> 7 \(the weights have seen these data\)"
    ):
        workdir.claim(
            finished, parse(values), None, {**about, "count": 7}, False, allow_change=True
        )


class Ended(BaseException):
    """Stands for the end of the process."""


class Notes(dict):
    """A board that all processes of a test share; `at(i)` is how process i sees it."""

    def at(self, i, count=2):
        class Board:
            mine = i

            def post(_, name, text):
                assert name not in self
                self[name] = text

            def posted(_, folder):
                return [text for name, text in self.items() if name.startswith(f"{folder}/")]

        Board.count = count
        return Board()


@pytest.fixture
def ends(monkeypatch):
    """Ends of processes as exceptions; the lines they would have printed."""
    said = []

    def end(line, status=0):
        said.append((line, status))
        raise Ended

    monkeypatch.setattr(sigterm, "_end", end)
    monkeypatch.setattr(sigterm, "GONE_S", 0.0)
    monkeypatch.setattr(sigterm, "LAST_S", 0.0)
    return said


def test_one_process_leaves_at_once_or_at_the_next_gate(ends):
    stop = sigterm.Stop()
    assert not stop.here()
    with pytest.raises(Ended):
        stop.ask()
    assert "the same command goes on" in ends[0][0] and ends[0][1] == 0
    stop = sigterm.Stop()
    assert not stop.here()
    stop.unsaved()
    stop.ask()
    assert stop.here()
    stop = sigterm.Stop()
    stop.unsaved()
    stop.saved()
    with pytest.raises(Ended):
        stop.ask()


def pair(gates, unsaved):
    """Two processes that have passed so many gates, and of which those named hold something unsaved."""
    notes, stops = Notes(), [sigterm.Stop(), sigterm.Stop()]
    for i, (stop, count) in enumerate(zip(stops, gates, strict=True)):
        assert not any(stop.here() for _ in range(count))
        stop.share(notes.at(i))
        if i in unsaved:
            stop.unsaved()
    return stops


def look(stops):
    """All look for notes, often enough; returns those that have ended."""
    ended = []
    for i in (1, 0, 1, 0, 1):
        try:
            if i not in ended:
                stops[i].look()
        except Ended:
            ended.append(i)
    return sorted(ended)


@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("unsaved", [(0, 1), (0,), (1,)])
def test_processes_leave_at_the_same_gate_whoever_was_asked(ends, asked, unsaved):
    stops = pair((3, 5), unsaved)
    stops[asked].ask()
    assert look(stops) == []
    assert [stop._last for stop in stops] == [6, 6]
    assert [stops[0].here() for _ in range(3)] == [False, False, True]  # gates 4, 5 and 6
    assert stops[1].here() and not ends


@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)])
def test_processes_with_nothing_unsaved_all_end_at_once(ends, asked):
    stops = pair((4, 4), ())
    for i in asked:
        stops[i].ask()
    assert look(stops) == [0, 1]
    assert {status for _, status in ends} == {0}


SIGNALLED = merged(
    QUICK, curriculum=dict(length=120.0), run=dict(checkpoint_every_steps=40, score_steps=(1,))
)


class Life:
    """One start of a training command in a process of its own."""

    def __init__(self, folder, name, *flags, **environment):
        config = folder / "config.py"
        config.write_text(CONFIG.format(values=SIGNALLED))
        self.workdir, self.said = folder / name, folder / f"{name}.txt"
        self.said.write_text("")
        self.process = subprocess.Popen(
            [sys.executable, "main.py", f"--config={config}", f"--workdir={self.workdir}", *flags],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": devices(1), **environment},
            stdout=self.said.open("w"),
            stderr=subprocess.STDOUT,
        )

    def wait_until(self, seen):
        end = time.monotonic() + 240
        while not seen():
            assert self.process.poll() is None and time.monotonic() < end, self.said.read_text()
            time.sleep(0.001)

    def listens(self):
        caught = re.search(
            r"SigCgt:\s*(\w+)", Path(f"/proc/{self.process.pid}/status").read_text()
        )[1]
        return int(caught, 16) >> (signal.SIGTERM - 1) & 1

    def steps(self):
        log = self.workdir / "metrics.jsonl"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def end(self, number=signal.SIGTERM):
        """(exit status, steps logged before the signal, seconds until the end, what was said)."""
        logged, began = self.steps(), time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(240)
        return status, logged, time.monotonic() - began, self.said.read_text()

    def finish(self):
        assert self.process.wait(240) == 0, self.said.read_text()
        return self


def newest(folder):
    steps = [
        n
        for n in steps_on_disk(folder)
        if (folder / "checkpoints" / str(n) / checkpoint.MANIFEST).exists()
    ]
    return max(steps, default=0)


def same_end(a, b, last):
    for x, y in zip(
        leaves(a / "checkpoints" / last), leaves(b / "checkpoints" / last), strict=True
    ):
        np.testing.assert_array_equal(x, y)
    for log in ("metrics.jsonl", "scores.jsonl"):
        assert (a / log).read_text() == (b / log).read_text()


def test_sigterm_in_each_phase_ends_well_and_the_run_ends_in_the_same_bits(tmp_path):
    plain = Life(tmp_path, "plain").finish().workdir
    # While it starts, nothing is there yet.
    life = Life(tmp_path, "run")
    life.wait_until(life.listens)
    status, _, _, said = life.end()
    assert status == 0 and said.splitlines()[-1].startswith(
        "stopped, nothing was unsaved; the same command goes on"
    ), said
    # While the first program is compiled, which does not wait for the compiler.
    life = Life(tmp_path, "run", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cold"))
    life.wait_until(lambda: "fresh weights" in life.said.read_text())
    time.sleep(0.2)
    status, logged, _, said = life.end()
    assert (
        (status, logged) == (0, 0)
        and "first step" not in said
        and "stopped, nothing was unsaved" in said
    ), said
    # Between steps.
    life = Life(tmp_path, "run")
    life.wait_until(lambda: life.steps() >= 3)
    status, logged, _, said = life.end()
    step = newest(life.workdir)
    assert (
        status == 0
        and logged <= step < 40
        and f"stopped after step {step} of 120, which is saved" in said
    ), said
    assert life.steps() == step
    # While it saves.
    life = Life(tmp_path, "run")
    life.wait_until(lambda: list(life.workdir.glob("checkpoints/40*tmp*")))
    status, logged, _, said = life.end()
    saved = newest(life.workdir)
    assert status == 0 and max(logged, 40) <= saved < 60, said
    # While a boundary is pictured, which would take minutes.
    life = Life(
        tmp_path, "run", "--config.run.sample_rows=60", "--config.run.score_steps=(100000,)"
    )
    life.wait_until(lambda: newest(life.workdir) == 60)
    time.sleep(0.5)
    status, logged, seconds, said = life.end()
    assert (
        status == 0
        and logged == newest(life.workdir) == 60
        and seconds < 20
        and "nothing was unsaved" in said
    ), said
    assert not (life.workdir / "samples").exists()
    life = Life(tmp_path, "run").finish()
    # The first start came to an end before it could be noted.
    assert [row["step"] for row in rows(life.workdir, "starts.jsonl")] == [0, 0, step, saved, 60]
    same_end(life.workdir, plain, "120")


def test_a_second_sigterm_ends_the_process_at_once(tmp_path, monkeypatch):
    code = """
import os, signal, sys, threading, time
from dmf.run import sigterm
sigterm.ONE_S = 0.2
stop = sigterm.listen()
stop.unsaved()
print("ready", flush=True)
threading.Event().wait(1e6)  # in no step that ends
"""
    # Of SIGINT, Python's own handler tells the main thread at the same time: either ends the process.
    for second, statuses in (
        (signal.SIGTERM, {128 + signal.SIGTERM}),
        (signal.SIGINT, {128 + signal.SIGINT, -signal.SIGINT}),
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # at once: the same request
        time.sleep(0.4)
        assert process.poll() is None
        process.send_signal(second)
        said, _ = process.communicate(timeout=30)
        assert process.returncode in statuses
        assert "ended by a second signal" in said or process.returncode == -signal.SIGINT


def test_other_modes_end_by_sigterm_as_ever(tmp_path):
    code = "import sys; sys.argv = ['main.py', '--mode=score']; import runpy; runpy.run_path('main.py', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import signal; {code}"], cwd=ROOT, stderr=subprocess.PIPE
    )
    assert process.wait(120) == 2 and b"--workdir is missing" in process.stderr.read()


def test_two_processes_stop_at_the_same_step_and_go_on_in_the_same_bits(tmp_path):
    flags = ("--config.curriculum.length=100", "--config.run.checkpoint_every_steps=70")
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert [status for status, *_ in Group(tmp_path, plain, 2, flags=flags).finish()] == [0, 0]
    group = Group(tmp_path, run, 2, flags=flags)
    group.wait_for_step(run, 3)
    group.processes[1].send_signal(signal.SIGTERM)  # only one of them is told
    (first, said, error), (second, _, other) = group.finish()
    assert first == second == 0, error + other
    assert (
        f"stopped after step {newest(run)} of 100, which is saved" in said and 3 <= newest(run) < 50
    )
    # In a boundary's pictures, which would take minutes, both end at once; again only one is told.
    group = Group(
        tmp_path,
        run,
        2,
        flags=(*flags, "--config.run.sample_rows=60", "--config.run.score_steps=(100000,)"),
    )
    end = time.monotonic() + 200
    while newest(run) < 50:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.5)
    group.processes[0].send_signal(signal.SIGTERM)
    (first, said, error), (second, _, other) = group.finish(60)
    assert first == second == 0, error + other
    assert "stopped, nothing was unsaved" in said and newest(run) == 50
    assert [status for status, *_ in Group(tmp_path, run, 2, flags=flags).finish()] == [0, 0]
    assert [row["step"] for row in rows(run, "starts.jsonl")][0::2] == [0, 50]
    like = Setup(VALUES, devices=4).state(randomise=False)
    ends = [store(folder).restore_latest(like) for folder in (plain, run)]
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(a, b)
    for log in ("metrics.jsonl", "scores.jsonl"):
        assert (run / log).read_text() == (plain / log).read_text()


def test_three_kills_by_the_command_that_makes_a_hundred(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", devices(1))
    spec = importlib.util.spec_from_file_location("kills", ROOT / "launch" / "tables" / "kills.py")
    kills = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kills)
    outcome = kills.survive(tmp_path, 3, seed=3, total=60)
    assert outcome["kills"] == sum(outcome["phases"].values()) == 3 and outcome["different"] == []
    log = tmp_path / "killed" / "scores.jsonl"
    log.write_text(log.read_text().replace("0.", "1.", 1))
    (tmp_path / "plain" / "checkpoints" / "60").rename(tmp_path / "plain" / "checkpoints" / "61")
    (tmp_path / "plain" / "checkpoints" / "55").rename(tmp_path / "plain" / "checkpoints" / "60")
    different = kills.compare(tmp_path / "plain", tmp_path / "killed", 60)  # it can tell
    assert "scores.jsonl" in different and "['step']" in different and len(different) > 40
