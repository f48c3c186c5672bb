"""Guarded runs: they go back, go on otherwise, and survive kills and stops like any other run."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

from dmf.config import parse
from dmf.errors import DmfError, NotFinite
from dmf.run import guard
from dmf.run.guard import Guard
from dmf.run.probe import Probe
from dmf.run.scoreboard import Scoreboard
from dmf.run.sigterm import Stop
from dmf.train import train
from tests import runs
from tests.test_train import leaves
from tests.tiny import MLP, merged

pytestmark = pytest.mark.usefixtures("shared_programs")

CALM = {"residual_border": 1.0, "residual_median": 2.0, "change_ulps": 100.0}
# Pretraining of 4 steps, then 2 steps each: all_pairs, d = 1/2, d = 1/4, jvp.
# There are checkpoints at stage boundaries only.
GUARDED = merged(
    MLP, guard=dict(every_steps=1, rows=8, action="jvp"), run=dict(checkpoint_every_steps=100)
)


@pytest.fixture
def diverges(monkeypatch):
    """Makes the second probe at d = 1/4 an alarm; the first one is the reference."""
    seen = []

    def probe(self, kind, params, rho):
        seen.append(rho)
        return {
            **CALM,
            "residual_median": 9.0
            if kind == "discrete" and seen.count(0.25) >= 2 and rho == 0.25
            else 2.0,
        }

    monkeypatch.setattr(Probe, "__call__", probe)
    return seen


def state_of(workdir):
    return leaves(workdir / "checkpoints" / "12")


def test_a_run_hands_over_to_jvp_and_says_so(tmp_path, diverges, capsys):
    train(parse(GUARDED), tmp_path)
    (row,) = json.loads((tmp_path / guard.FILE).read_text())
    assert (row["step"], row["stage"], row["back_to"], row["action"], row["settled"]) == (
        10,
        "stage 2",
        8,
        "jvp",
        True,
    )
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in logged] == ["flow"] * 4 + ["all_pairs"] * 2 + ["discrete"] * 2 + [
        "jvp"
    ] * 4
    assert [r["step"] for r in logged] == list(range(1, 13))
    line = (
        "guard     stage 2 (discrete), step 10: residual_median = 9, above 3 x the stage's first, "
    )
    line += "2; back to step 8, the discrete stages left are jvp stages now"
    assert capsys.readouterr().out.count(line) == 2  # when it happens, and below the closing table
    plain = merged(MLP, curriculum=dict(stages=4, kinds=("all_pairs", "discrete", "jvp", "jvp")))
    train(parse(plain), tmp_path / "plain")
    for a, b in zip(state_of(tmp_path), state_of(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(a, b)  # the way back leaves no trace in the weights


@pytest.mark.parametrize("action", ["halve", "floor", "rate"])
def test_each_way_on_reaches_the_end(tmp_path, diverges, action):
    train(parse(merged(GUARDED, guard=dict(action=action))), tmp_path)
    rows = json.loads((tmp_path / guard.FILE).read_text())
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in logged if r["step"] in (9, 10)]
    expected = {"halve": (math.sqrt(1 / 8), 1), "floor": (1 / 2, 1), "rate": (1 / 4, 1 / 2)}[action]
    assert [r["rho"] for r in last] == pytest.approx([expected[0]] * 2)
    assert last[0]["learning_rate"] == pytest.approx(1e-3 * expected[1])
    assert len(rows) == 1 and len(state_of(tmp_path)) > 0


# Four steps a stage, d = 1/4 from step 12 to 16. It goes back to step 13, and deletes 14 and 15.
LONGER = merged(
    GUARDED, curriculum=dict(length=16.0), run=dict(checkpoint_every_steps=1, keep_checkpoints=3)
)


def climbs(monkeypatch, *residuals):
    """Makes the probes at d = 1/4 give these medians in turn, and then the last one again."""
    left = list(residuals)

    def probe(self, kind, params, rho):
        return {
            **CALM,
            "residual_median": (left.pop(0) if left[1:] else left[0]) if rho == 0.25 else 2.0,
        }

    monkeypatch.setattr(Probe, "__call__", probe)


def end_of(workdir):
    """What a run ends with: its logs, and the bytes of its last state."""
    logs = [(workdir / name).read_text() for name in ("metrics.jsonl", "watch.jsonl", guard.FILE)]
    return logs, [leaf.tobytes() for leaf in leaves(workdir / "checkpoints" / "20")]


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    """A run that was stopped before the stage in which it will go back; for copies."""
    folder = tmp_path_factory.mktemp("early")
    with pytest.MonkeyPatch.context() as patch:
        climbs(patch, 9.0)
        train(parse(LONGER), folder, stop=AskedAfter(11))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The end of a run that goes back once, and that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        climbs(patch, 2.0, 4.5, 4.5, 9.0)
        train(parse(LONGER), folder)
    return end_of(folder)


@pytest.mark.parametrize(
    "where, name, call, after",
    [
        (Guard, "_write", 1, True),  # the intervention is written, and nothing is deleted
        (guard.paths, "remove_tree", 1, False),  # one checkpoint has lost its manifest
        (guard.paths, "remove_tree", 1, True),
        (guard.paths, "remove_tree", 2, False),
        (Guard, "_write", 2, False),  # everything is deleted, but that is not written yet
        (Guard, "_write", 2, True),
    ],
)
def test_a_kill_in_an_intervention_changes_nothing(
    tmp_path, monkeypatch, early, whole, where, name, call, after
):
    shutil.copytree(early, tmp_path / "killed")
    calls, real = [], getattr(where, name)

    def killed(*given):
        calls.append(given)
        if len(calls) == call and not after:
            raise KeyboardInterrupt
        real(*given)
        if len(calls) == call:
            raise KeyboardInterrupt

    climbs(monkeypatch, 2.0, 4.5, 4.5, 9.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(where, name, killed)
        train(parse(LONGER), tmp_path / "killed")
    train(parse(LONGER), tmp_path / "killed")
    (row,) = json.loads((tmp_path / "killed" / guard.FILE).read_text())
    assert (row["step"], row["back_to"]) == (16, 13)
    assert end_of(tmp_path / "killed") == whole


class AskedAfter(Stop):
    """A request to stop that comes inside a step: the run's step with this number."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def unsaved(self):
        super().unsaved()
        self.left -= 1
        if self.left == 0:
            self.ask()


def test_a_run_that_was_asked_to_stop_goes_back_no_less_far(tmp_path, monkeypatch):
    values = parse(merged(LONGER, run=dict(checkpoint_every_steps=3, keep_checkpoints=2)))
    climbs(monkeypatch, 2.0, 2.0, 2.0, 9.0)
    train(values, tmp_path / "whole")
    folder = tmp_path / "asked"
    climbs(monkeypatch, 2.0, 2.0, 2.0, 9.0)
    train(values, folder, stop=AskedAfter(14))
    assert (folder / "checkpoints" / "14" / "manifest.json").exists()
    train(values, folder)
    (row,) = json.loads((folder / guard.FILE).read_text())
    assert (row["step"], row["back_to"]) == (16, 15)
    assert end_of(folder) == end_of(tmp_path / "whole")
    climbs(monkeypatch, 2.0, 2.0, 9.0)
    train(values, tmp_path / "again", stop=AskedAfter(14))
    train(values, tmp_path / "again")
    (row,) = json.loads((tmp_path / "again" / guard.FILE).read_text())
    # It goes not to the checkpoint that the request has made.
    assert (row["step"], row["back_to"]) == (15, 12)


def test_a_run_that_is_asked_to_stop_while_the_guard_goes_back_starts_nothing_more(
    tmp_path, monkeypatch, early, whole, capsys
):
    shutil.copytree(early, tmp_path / "asked")
    stop, real = Stop(), Guard.intervene

    def intervene(self, *given):
        stop.ask()
        real(self, *given)

    climbs(monkeypatch, 2.0, 4.5, 4.5, 9.0)
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "intervene", intervene)
        train(parse(LONGER), tmp_path / "asked", stop=stop)
    assert capsys.readouterr().out.endswith(
        "stopped, nothing was unsaved; the same command goes on from what is on disk\n"
    )
    (row,) = json.loads((tmp_path / "asked" / guard.FILE).read_text())
    assert not row["settled"]
    train(parse(LONGER), tmp_path / "asked")
    assert end_of(tmp_path / "asked") == whole


def test_stop_leaves_the_last_good_state_and_a_report_again_and_again(tmp_path, diverges, capsys):
    stopping = parse(merged(GUARDED, guard=dict(action="stop")))
    for _ in range(2):
        with pytest.raises(
            DmfError,
            match=r"the guard has stopped this run: stage 2 \(discrete\), step 10: residual_median",
        ):
            train(stopping, tmp_path)
        assert max(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")) == 8
    told = "guard     stage 2 (discrete), step 10: residual_median = 9, above"
    assert capsys.readouterr().out.count(told) == 2  # in the report of each start
    assert [path.name for path in tmp_path.glob("*guard.json*")] == [guard.FILE]
    with pytest.raises(DmfError, match="config.guard.action: stop -> off"):
        train(parse(merged(GUARDED, guard=dict(action="off"))), tmp_path)
    train(parse(merged(GUARDED, guard=dict(action="off"))), tmp_path, allow_change=True)
    assert len(state_of(tmp_path)) > 0


def test_a_stop_is_taken_back_by_other_rules_alone(tmp_path, diverges):
    stopping = merged(GUARDED, guard=dict(action="stop"))
    with pytest.raises(DmfError, match="the guard has stopped"):
        train(parse(stopping), tmp_path)
    with pytest.raises(DmfError, match="the guard has stopped"):
        train(parse(merged(stopping, curriculum=dict(q=3.0))), tmp_path, allow_change=True)
    # That change was refused. Other probes change nothing either.
    with pytest.raises(DmfError, match="the guard has stopped"):
        train(parse(merged(stopping, guard=dict(rows=16, every_steps=2))), tmp_path)
    train(
        parse(merged(stopping, curriculum=dict(q=3.0), guard=dict(factor=100.0))),
        tmp_path,
        allow_change=True,
    )
    assert len(state_of(tmp_path)) > 0


def test_samples_that_are_not_finite_are_a_divergence(tmp_path, monkeypatch):
    add, done = Scoreboard.add, []

    def once(self, boundary, params):
        if boundary.step == 8 and not done:
            done.append(boundary)
            raise NotFinite("samples has non-finite values in 3 of 4 images")
        add(self, boundary, params)

    monkeypatch.setattr(Scoreboard, "add", once)
    with pytest.raises(DmfError, match="samples has non-finite values in 3 of 4 images"):
        runs.train(parse(MLP), tmp_path / "off")
    done.clear()
    runs.train(parse(GUARDED), tmp_path / "jvp")
    (row,) = json.loads((tmp_path / "jvp" / guard.FILE).read_text())
    assert (row["step"], row["stage"], row["action"]) == (8, "stage 1", "jvp") and row[
        "back_to"
    ] == 6


def test_weights_that_sample_no_finite_values_are_refused_before_a_step(tmp_path, monkeypatch):
    runs.train(parse(MLP), tmp_path / "given")

    def never(self, boundary, params):
        raise NotFinite("samples has non-finite values in 4 of 4 images")

    monkeypatch.setattr(Scoreboard, "add", never)
    with pytest.raises(DmfError, match="samples has non-finite values in 4 of 4 images"):
        init = str(tmp_path / "given" / "checkpoints" / "12")
        runs.train(
            parse(merged(GUARDED, init=init, curriculum=dict(pretrain_length=0.0))),
            tmp_path / "run",
        )
    assert not (tmp_path / "run" / guard.FILE).exists()


def test_values_that_are_not_finite_lower_the_rate_until_the_limit(tmp_path):
    values = merged(GUARDED, guard=dict(limit=2))
    values["curriculum"] = {**values["curriculum"], "stage_learning_rates": (1.0, 1.0, 1e30, 1.0)}
    with pytest.raises(DmfError, match="the guard has stopped this run: stage 2"):
        train(parse(values), tmp_path)
    assert [row["action"] for row in json.loads((tmp_path / guard.FILE).read_text())] == [
        "jvp",
        "rate",
        "stop",
    ]


def test_a_healthy_run_is_left_alone(tmp_path):
    train(parse(GUARDED), tmp_path / "guarded")
    assert not (tmp_path / "guarded" / guard.FILE).exists()
    train(parse(MLP), tmp_path / "plain")
    for a, b in zip(state_of(tmp_path / "guarded"), state_of(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_pretraining_from_fresh_weights_can_go_back_to_them(tmp_path, monkeypatch):
    seen = []

    def probe(self, kind, params, rho):
        seen.append(jax.tree.leaves(params)[0].shape)
        return {**CALM, "residual_border": 9.0 if len(seen) == 2 else 1.0}

    monkeypatch.setattr(Probe, "__call__", probe)
    train(parse(GUARDED), tmp_path)
    (row,) = json.loads((tmp_path / guard.FILE).read_text())
    assert (row["step"], row["back_to"], row["action"]) == (2, 0, "rate")
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in logged] == list(range(1, 13))
    assert [r["learning_rate"] for r in logged][:4] == pytest.approx(
        [0.25e-3, 0.5e-3, 0.5e-3, 0.5e-3]
    )
    assert logged[-1]["learning_rate"] == pytest.approx(0.5e-3)
    assert not (tmp_path / "checkpoints" / "0").exists()  # they are drawn again


# guard.json is written twice: with the intervention, and when all beyond step 0 is deleted.
@pytest.mark.parametrize("writes", [1, 2])
def test_a_kill_on_the_way_back_to_fresh_weights_changes_nothing(tmp_path, monkeypatch, writes):
    calls, real = [], Guard._write

    def killed(self):
        real(self)
        calls.append(self)
        if len(calls) == writes:
            raise KeyboardInterrupt

    def run(workdir, dies):
        medians = iter([2.0, 9.0])
        monkeypatch.setattr(
            Probe, "__call__", lambda *_: {**CALM, "residual_median": next(medians, 2.0)}
        )
        with monkeypatch.context() as patch:
            if dies:
                patch.setattr(Guard, "_write", killed)
                with pytest.raises(KeyboardInterrupt):
                    train(parse(GUARDED), workdir)
                assert not list(workdir.glob("checkpoints/[0-9]*"))
        train(parse(GUARDED), workdir)
        return json.loads((workdir / guard.FILE).read_text()), [
            leaf.tobytes() for leaf in state_of(workdir)
        ]

    whole, killed_once = run(tmp_path / "whole", False), run(tmp_path / "killed", True)
    assert whole == killed_once and [row["back_to"] for row in whole[0]] == [0]
