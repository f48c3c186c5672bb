"""Runs as main.py starts them, with a judge; and runs that a test holds open to look inside."""

from functools import partial

from dmf import train as trainer
from dmf.evaluation.boundary import RunJudge
from dmf.run import context
from dmf.run.report import Report

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
