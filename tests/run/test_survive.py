"""Signals and kills: a run loses at most one step, and the same command ends in the same bits."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dmf.run import sigterm
from dmf.storage import checkpoint
from tests import devices
from tests.runs import QUICK, rows, steps_on_disk, store
from tests.test_processes import CONFIG, ROOT, VALUES, Group
from tests.test_train import leaves
from tests.tiny import Setup, merged


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
    """Two processes that have passed so many gates; those named hold something unsaved."""
    notes, stops = Notes(), [sigterm.Stop(), sigterm.Stop()]
    for i, (stop, count) in enumerate(zip(stops, gates, strict=True)):
        assert not any(stop.here() for _ in range(count))
        stop.share(notes.at(i))
        if i in unsaved:
            stop.unsaved()
    return stops


def look(stops):
    """All processes look for notes until nothing changes; returns those that have ended."""
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
    """One start of a training command as a process."""

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
    # While the first program is compiled: the end does not wait for the compiler.
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
    # While a boundary is pictured. These pictures would take minutes.
    life = Life(
        tmp_path, "run", "--config.run.sample_rows=60", "--config.run.score_steps=(100000,)"
    )
    life.wait_until(lambda: newest(life.workdir) == 60)
    time.sleep(0.5)
    status, logged, seconds, said = life.end()
    assert (
        status == 0
        and logged == newest(life.workdir) == 60
        and seconds < 100
        and "nothing was unsaved" in said
    ), said
    assert not (life.workdir / "samples").exists()
    life = Life(tmp_path, "run").finish()
    # The first start came to an end before it could be noted.
    assert [row["step"] for row in rows(life.workdir, "starts.jsonl")] == [0, 0, step, saved, 60]
    same_end(life.workdir, plain, "120")


@pytest.mark.parametrize(
    ("number", "training", "line", "status"),
    [
        (signal.SIGINT, True, f"interrupted, nothing was unsaved; {sigterm.AGAIN}", 130),
        (signal.SIGINT, False, "interrupted; it goes on", 130),
        (signal.SIGTERM, False, "stopped; it goes on", 143),
    ],
)
def test_the_last_line_and_the_status_tell_which_signal_came(ends, number, training, line, status):
    with pytest.raises(Ended):
        sigterm.Stop("; it goes on", training).ask(number)
    assert ends == [(line, status)]
    stop = sigterm.Stop(training=training)
    assert stop.status == 0
    stop.unsaved()
    stop.ask(number)  # the run saves and leaves by itself, with this status
    assert stop.here() and stop.status == status


def test_a_second_signal_ends_the_process_at_once():
    code = """
import threading
from dmf.run import sigterm
sigterm.ONE_S = 2
stop = sigterm.listen()
stop.unsaved()
print("ready", flush=True)
threading.Event().wait(1e6)  # a step that never ends
"""
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # at once: the same request
    time.sleep(0.2)
    assert process.poll() is None
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        process.send_signal(signal.SIGINT)  # counts as a second one after `ONE_S`
        time.sleep(0.2)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert said == f"ended by a second signal; {sigterm.AGAIN}\n"


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
    # While a boundary is pictured, both end at once. Again only one of them is told.
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
    (first, said, error), (second, _, other) = group.finish(200)
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
    # Without probes, which are half of a start's programs.
    whole, unprobed = kills.command, ("--config.guard.every_steps=0", "--config.guard.action=off")
    monkeypatch.setattr(kills, "command", lambda *given: [*whole(*given), *unprobed])
    outcome = kills.survive(tmp_path, 3, seed=3, total=60)
    assert outcome["kills"] == sum(outcome["phases"].values()) == 3 and outcome["different"] == []
    log = tmp_path / "killed" / "scores.jsonl"
    log.write_text(log.read_text().replace("0.", "1.", 1))
    (tmp_path / "plain" / "checkpoints" / "60").rename(tmp_path / "plain" / "checkpoints" / "61")
    (tmp_path / "plain" / "checkpoints" / "55").rename(tmp_path / "plain" / "checkpoints" / "60")
    different = kills.compare(tmp_path / "plain", tmp_path / "killed", 60)  # it can tell
    assert "scores.jsonl" in different and "['step']" in different and len(different) > 40
