"""Runs as main.py starts them, with a judge; runs that a test holds open; what is on their disk."""

import json
from functools import partial

from dmf import train as trainer
from dmf.evaluation.boundary import RunJudge
from dmf.run import context
from dmf.run.report import Report
from dmf.storage.checkpoint import Checkpoints
from tests.tiny import MLP, merged

# One program and two stages, scored by nothing.
QUICK = merged(
    MLP, curriculum=dict(stages=2, kinds=("all_pairs",) * 2, length=12.0, pretrain_length=0.0)
)

train = partial(trainer.train, judge=RunJudge)
open_run = partial(context.open_run, judge=RunJudge)


def begin(run):
    """The state that an open run goes on from, with its logs set back to that step."""
    now = context.first_state(run)
    Report(run).start(now)
    return now


def loop(run, report=None):
    """Takes the steps of an open run; returns whether it came to its end."""
    return trainer.loop(run, report or Report(run))


def store(folder, keep=2):
    """The checkpoints of a work directory, with metadata of no run."""
    return Checkpoints(folder, keep, [], {"config": {}})


def steps_on_disk(folder):
    """The steps of a work directory's checkpoint folders."""
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def rows(folder, name):
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]
