"""The run: data, network and curriculum become a trained model in a work directory.

    config.json      the run's config; a later command with another one is refused
    changes.jsonl    changes of the config that --allow_change has let through
    starts.jsonl     a line per start: step, time, command, git revision, versions, devices
    checkpoints/N    the state after N steps; every stage boundary and the best one are kept
    best.json        step and score of the best; WORKDIR/best stands for its checkpoint
    origin.json      where the weights of config.init came from, if they were converted
    data.json        what identifies the data; a later command with other data is refused
    programs/        compiled programs for the next start, kept by main.py (`dmf.run.programs`)
    .lock            held while a process trains
    metrics.jsonl    logged steps
    scores.jsonl     scores at the stage boundaries
    watch.jsonl      probes of the weights (`dmf.run.probe`)
    guard.json       what followed from them (`dmf.run.guard`)
    samples/*.png    a grid of samples per stage boundary; at the end samples.png, curves.png

The same command again goes on from the newest checkpoint and ends in the same bits. Data and
randomness are functions of (seed, step). At a boundary the state is saved, pictured and scored.
Boundaries are the ends of stages, the start from config.init, and steps that the config asks for.
Several processes (`dmf.processes`) compute together, each on its own rows of a batch. The first
one writes the files; all of them write the checkpoints.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax

from dmf import processes
from dmf.config import Config
from dmf.data.feed import Feed
from dmf.method import curriculum
from dmf.run.context import Ahead, Context, compile_ahead, first_state, opened
from dmf.run.guard import Diverged
from dmf.run.report import Report
from dmf.run.scoreboard import OpenJudge
from dmf.run.sigterm import AGAIN, Stop
from dmf.run.workdir import held, kept_by_changes
from dmf.state import TrainState
from dmf.storage import paths


def train(
    config: Config,
    workdir: str | Path,
    began: float | None = None,
    allow_change: bool = False,
    stop: Stop | None = None,
    judge: OpenJudge | None = None,
) -> list[dict[str, Any]]:
    """Trains, or goes on training, in `workdir`; returns the rows of scores.jsonl.

    Args:
        began: when the process started, by time.monotonic; None for now.
        allow_change: a run with another config goes on with this one (`dmf.run.workdir.claim`).
        stop: asks the run to stop before its end (`dmf.run.sigterm`).
        judge: makes what pictures and scores the weights: `dmf.evaluation.boundary.RunJudge`.
            Without one the run has neither pictures nor scores.

    Raises DmfError on bad input.
    """
    place, rows = paths.reach(paths.at(workdir)), None
    with held(place):
        while rows is None:
            rows = attempt(config, place, began, allow_change, stop, judge)
            began = None
    return rows


def attempt(config: Config, workdir: Path, *arguments: Any) -> list[dict[str, Any]] | None:
    """One start of the run, to its end or a stop: the rows of scores.jsonl.

    arguments: the further ones of `open_run`, in its order.
    None where the guard sends the run back to an earlier step: then it starts once more.
    """
    with opened(config, workdir, *arguments) as run:
        report = Report(run)
        try:
            return report.finish() if loop(run, report) else run.scoreboard.rows()
        except Diverged as found:
            if not run.guard.active or found.step == 0:
                raise
            return run.scoreboard.rows() if go_back(run, found) else None


def loop(run: Context, report: Report) -> bool:
    """Step by step. Returns whether the end was reached; if not, the run was asked to stop.

    `report.hold` keeps the metrics of a step. `report.settle` reads and checks them while the next
    step runs, or before the state is saved. `run.stop.here` says whether to stop. `unsaved` and
    `saved` tell it whether a stop now would lose a step.
    """
    with compile_ahead(run) as ahead:
        now = first_state(run)
        report.start(now)
        return steps(run, report, ahead, now)


def steps(run: Context, report: Report, ahead: Ahead, now: TrainState) -> bool:
    """All steps of `loop` from this state. ahead: what compiles their programs."""
    saved = start = int(now.step)  # fresh weights are not saved: they can be drawn again
    with Feed(run.batch, start, run.total) as feed:
        for n in range(start, run.total + 1):
            stopped, boundary = run.stop.here(), run.scoreboard.boundaries.get(n)
            if stopped or boundary:
                report.settle()
            if boundary and not stopped:
                saved = save(run, n, now, saved)
                # Until the next step is compiled and taken the process may end at any time.
                run.stop.saved()
                stopped = run.stop.here()
            if stopped:
                leave(run, n, now, saved, report)
                return False
            if boundary:
                report.boundary(boundary, now)
            if n == run.total:
                break
            stage = curriculum.stage_at(run.stages, n)
            now = run.switched(now, n, stage)
            if n in (start, stage.first):
                ahead.wait(("step", stage.kind))
            if n == start:
                jax.block_until_ready(now)  # the first step is timed by itself
            began, waited_s = time.monotonic(), feed.waited_s
            now, metrics = run.advance(now, n, stage, feed.get(n))
            run.stop.unsaved()
            if n == start:
                report.first_step(n, began, metrics)
            report.settle()
            if n > start:
                report.later_step(began, feed.waited_s - waited_s)
            report.hold(n + 1, stage, metrics)
            if run.is_probed(n + 1, stage):
                report.settle()
                ahead.wait(("probe", stage.kind))
                report.probe(n + 1, stage, now)
            if run.is_scheduled(n + 1) and n + 1 not in run.scoreboard.boundaries:
                report.settle()
                saved = save(run, n + 1, now, saved, wait=False)
    return True


def save(run: Context, n: int, now: TrainState, saved: int, wait: bool = True) -> int:
    """Saves the state after n steps unless it is on disk; returns the newest step that is.

    saved: the newest step that was saved before. wait: return only when it is safe on disk.
    """
    if n > saved:
        run.checkpoints.save(n, now, wait)
    elif wait:
        run.checkpoints.wait()
    return max(n, saved)


def leave(run: Context, n: int, now: TrainState, saved: int, report: Report) -> None:
    """Saves the state of a run that was asked to stop, and says so."""
    report.pause()
    save(run, n, now, saved)
    where = f"step {n} of {run.total}, which is saved"
    print(f"stopped after {where}; the same command goes on from there", flush=True)


def go_back(run: Context, found: Diverged) -> bool:
    """Lets the guard intervene: the next start goes back. Returns whether to stop instead."""
    run.checkpoints.wait()
    with processes.together():
        if processes.is_first():
            kept = kept_by_changes(run.workdir)
            seen = run.watched.read(), run.scoreboard.history(), kept
            run.guard.intervene(found, run.stages, *seen, run.is_scheduled)
    run.stop.saved()
    if stopped := run.stop.here():
        print(f"stopped, nothing was unsaved; {AGAIN}", flush=True)
    return stopped
