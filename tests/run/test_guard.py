"""The guard: what it takes for a divergence, what becomes of the stages, and that a guarded run survives like any other."""

import json
import math

import jax
import numpy as np
import pytest

from dmf.config import check, parse
from dmf.errors import DmfError, NotFinite
from dmf.method.curriculum import CurriculumConfig, build_stages, rho_at
from dmf.optim import EMAConfig, OptimizerConfig, ema_decays, learning_rate
from dmf.run import guard
from dmf.run.guard import Diverged, Guard, GuardConfig
from dmf.run.probe import Watch
from dmf.run.scoreboard import Scoreboard
from dmf.run.sigterm import Stop
from dmf.storage.manifest import write_manifest
from dmf.train import train
from tests.test_train import leaves
from tests.tiny import TINY, merged

CONFIG = GuardConfig(every_steps=1, action="jvp", factor=4.0, ulps=1.0)
CALM = {"residual_border": 1.0, "residual_median": 2.0, "change_ulps": 100.0}
LADDER = build_stages(
    CurriculumConfig(stages=6, q=2.0, length=60.0), 8, 100
)  # d = 1/2 .. 1/16 from step 10 to 50


def kinds(stages):
    return [s.kind for s in stages]


def rhos(stages):
    return [s.rho for s in stages if s.kind == "discrete"]


@pytest.mark.parametrize(
    "change, named",
    [
        ({}, ""),
        ({"residual_border": 4.0, "residual_median": 8.0, "change_ulps": 1.0}, ""),
        ({"residual_border": 4.1}, "residual_border = 4.1, above 4 x the stage's first, 1"),
        ({"residual_median": 8.1}, "residual_median = 8.1"),
        ({"residual_median": math.nan}, "residual_median = nan"),
        ({"residual_median": math.inf}, "residual_median = inf"),
        ({"change_ulps": 0.9}, "0.9 ulps of the compute dtype, below 1"),
        ({"change_ulps": math.nan}, "change_ulps = nan, expected a finite value"),
        ({"consistency": math.inf}, "consistency = inf"),
    ],
)
def test_a_probe_is_held_against_the_stages_first(change, named):
    found = guard.alarm({**CALM, **change}, CALM, CONFIG)
    assert (named in found) if named else found == ""


def test_an_infinite_first_probe_is_an_alarm_and_no_measure():
    start = {**CALM, "residual_border": math.inf}
    assert "residual_border = inf, expected a finite value" in guard.alarm(start, start, CONFIG)


@pytest.mark.parametrize("other", [{"rows": 16}, {"source": "training"}])
def test_probes_of_other_images_are_not_compared(tmp_path, other):
    watching = Guard(tmp_path / "guard.json", tmp_path, CONFIG, fresh=True)
    first = {"step": 31, "stage": 3, "rows": 8, "source": "held-out", **CALM}
    worse = {**first, "step": 33, "residual_border": 9.0}
    assert watching.probe_alarm([first, {**worse, **other}], LADDER[3]) == ""
    assert "residual_border = 9, above" in watching.probe_alarm([first, worse], LADDER[3])


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"step": 3}]', '[{"back_to": 0.5}]'])
def test_a_file_that_holds_no_interventions_is_one_line(tmp_path, text):
    (tmp_path / guard.FILE).write_text(text)
    with pytest.raises(
        DmfError, match=r"guard.json cannot be read: \w+: .*; expected what dmf wrote there"
    ):
        train(parse(TINY), tmp_path)
    assert (tmp_path / guard.FILE).read_text() == text


def test_a_score_is_held_against_the_best_since_the_last_stage_of_flow_matching(tmp_path):
    watching = Guard(tmp_path / "guard.json", tmp_path, CONFIG, fresh=True)

    def said(*scores):
        return watching.score_alarm(scores, "fid", LADDER)  # trajectory to step 10

    assert said() == said((10, 30.0), (20, 2.0), (30, 8.0)) == ""
    assert said((10, 30.0), (20, 2.0), (30, 8.1)) == "fid = 8.1, above 4 x the best, 2"
    assert said((10, 30.0), (20, math.nan)) == "fid = nan, above 4 x the best, 30"
    assert (
        said((0, 1.0), (5, 8.0))
        == said((0, 1.0), (10, 30.0))
        == said((0, 1.0), (5, 1.0), (10, 30.0), (20, 100.0))
        == ""
    )
    assert said((0, 1.0), (10, math.inf)) == "fid = inf, above 4 x the best, inf"


@pytest.mark.parametrize("back", [30, 33])
@pytest.mark.parametrize("action", ["stop", "jvp", "halve", "floor", "rate"])
def test_an_intervention_changes_only_what_comes_after_it(action, back):
    found = guard.applied(LADDER, {"step": 36, "back_to": back, "action": action})
    assert (
        [(s.first, s.last) for s in found if s.steps <= 0] == []
        and found[0].first == 0
        and found[-1].last == 60
    )
    assert all(a.last == b.first for a, b in zip(found, found[1:], strict=False))
    before = [s for s in found if s.last <= back]
    assert [(s.kind, s.rho, s.rate) for s in before] == [
        (s.kind, s.rho, 1.0) for s in LADDER if s.first < back
    ]
    after = [s for s in found if s.first >= back]
    assert [s.last for s in after] == [40, 50, 60] and [s.index for s in after] == [3, 4, 5]
    if action == "jvp":
        assert kinds(after) == ["jvp"] * 3 and {s.rho for s in after} == {1.0}
    else:
        assert kinds(after) == ["discrete", "discrete", "jvp"]
    assert {s.rate for s in after} == ({0.5} if action == "rate" else {1.0})
    expected = {"halve": [math.sqrt(1 / 32), 1 / 8], "floor": [1 / 4, 1 / 4], "jvp": []}
    assert rhos(after) == pytest.approx(expected.get(action, [1 / 8, 1 / 16]), rel=1e-12)


def test_a_second_refusal_of_the_same_d_goes_further_back_to_a_larger_one():
    once = guard.applied(LADDER, {"step": 36, "back_to": 33, "action": "halve"})
    again = guard.applied(once, {"step": 38, "back_to": 33, "action": "floor"})
    assert rhos([s for s in again if s.first >= 33]) == [1 / 4, 1 / 4]
    first = guard.applied(LADDER, {"step": 15, "back_to": 10, "action": "halve"})
    assert rhos(first) == pytest.approx([math.sqrt(1 / 2), 1 / 2, math.sqrt(1 / 8), 1 / 4])


def test_a_smooth_schedule_falls_half_as_fast_from_where_it_was_good_or_no_further():
    smooth = build_stages(CurriculumConfig(stages=6, q=2.0, length=60.0, schedule="smooth"), 8, 100)
    good = rho_at(smooth[3], 33)
    floor = guard.applied(smooth, {"step": 36, "back_to": 33, "action": "floor"})
    assert {rho_at(s, n) for s in floor if 33 <= s.first < 50 for n in range(s.first, s.last)} == {
        good
    }
    halved = guard.applied(smooth, {"step": 36, "back_to": 33, "action": "halve"})
    for n in (33, 39, 40, 49):
        was, now = (
            rho_at(next(s for s in found if s.first <= n < s.last), n) for found in (smooth, halved)
        )
        assert now / good == pytest.approx(math.sqrt(was / good), rel=1e-12)
    assert [
        rho_at(s, n) for s in halved[:4] for n in range(s.first, s.last) if s.kind == "discrete"
    ] == pytest.approx(
        [
            rho_at(s, n)
            for s in smooth[:4]
            for n in range(s.first, s.last)
            if s.kind == "discrete" and n < 33
        ],
        rel=1e-12,
    )


@pytest.mark.parametrize("back", [10, 45])
def test_a_cut_stage_keeps_its_warm_up_its_decay_and_the_age_of_its_averages(back):
    rules = CurriculumConfig(
        stages=3, length=60.0, pretrain_length=20.0, switch_ema="reset", switch_warmup_steps=10
    )
    rates = OptimizerConfig(
        warmup_steps=5, pretrain_warmup_steps=5, decay_fraction=0.5, pretrain_decay_fraction=0.5
    )
    ema, stages = EMAConfig(halflife_images=(400.0,)), build_stages(rules, 8, 100)
    found = guard.applied(stages, {"step": back + 3, "back_to": back, "action": "stop"})
    assert len(found) == len(stages) + 1
    for n in range(80):
        assert learning_rate(n, found, rules, rates) == learning_rate(n, stages, rules, rates)
        assert ema_decays(n, found, rules, ema, 8) == ema_decays(n, stages, rules, ema, 8)


def test_the_rate_is_lowered_where_no_finite_difference_is_to_blame():
    for action in ("jvp", "halve", "floor", "rate"):
        assert [guard.remedy(action, LADDER[i]) for i in (0, 5)] == ["rate", "rate"]
        assert guard.remedy(action, LADDER[2]) == action
    assert guard.remedy("stop", LADDER[0]) == "stop"


def test_it_goes_back_to_the_newest_checkpoint_before_values_were_half_way_to_the_alarm(tmp_path):
    probes = [
        {"step": n, "stage": 3, **CALM, "residual_median": x}
        for n, x in ((31, 2), (33, 3.9), (35, 4.1), (36, 3), (38, 9))
    ]
    probes.insert(0, {"step": 30, "stage": 2, **CALM, "residual_median": 1e9})
    how = dict(stages=LADDER, probes=probes, kept=(), scheduled=lambda step: True)
    for n in (37, 34, 32, 30, 20, 10):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "weights").write_text("1")
        write_manifest(tmp_path / str(n))

    def back(found, scores, **changes):
        watching = Guard(tmp_path / "guard.json", tmp_path, CONFIG, fresh=True)
        watching.intervene(found, scores=scores, **{**how, **changes})
        return watching.rows[-1]["back_to"]

    assert back(Diverged(38, "x"), []) == 32
    assert back(Diverged(38, "x"), [(20, 5.0), (30, 4.0), (31, 4.5), (32, 9.0)]) == 30
    assert back(Diverged(31, "x"), [], probes=probes[:1]) == 30
    steep = [
        (30, 100.0),
        (31, 50.0),
        (32, 10.0),
        (33, 1.0),
    ]  # a score that was merely not as good yet is no sign of trouble
    falling = [(n, 500.0 / n**2) for n in range(30, 38)] + [(38, math.nan)]
    assert back(Diverged(38, "x"), falling) == back(Diverged(38, "x"), steep) == 32
    assert (
        back(Diverged(38, "x"), [], kept={10, 34, 60}) == 34
    )  # never before what a change of the config has kept
    assert back(Diverged(34, "x"), [], kept={10, 20, 34}) == 32  # nor to the step that has failed
    assert back(Diverged(30, "x"), [], probes=[], stages=LADDER[:3]) == 20
    assert (
        back(Diverged(38, "x"), [], scheduled=lambda step: step != 32) == 30
    )  # nor to one that was saved by the way
    (tmp_path / "32" / "weights").write_text("2")  # a damaged one is nothing to go back to
    (tmp_path / "30" / "manifest.json").unlink()
    assert back(Diverged(38, "x"), []) == 20
    for n in (20, 10):
        (tmp_path / str(n) / "weights").unlink()
    assert back(Diverged(38, "x"), []) == 0  # weights that were drawn are drawn again
    given = Guard(tmp_path / "given.json", tmp_path, CONFIG, fresh=True, drawn=False)
    with pytest.raises(
        DmfError,
        match="step 38: x; the guard would go back to step 0, but checkpoint .*/0: no readable",
    ):
        given.intervene(Diverged(38, "x"), scores=[], **how)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "weights").write_text("1")
    write_manifest(tmp_path / "0")
    assert back(Diverged(38, "x"), []) == 0
    (tmp_path / "0" / "weights").write_text("2")
    with pytest.raises(
        DmfError,
        match="step 38: x; the guard would go back to step 0, but checkpoint .*/0: file weights",
    ):
        back(Diverged(38, "x"), [])
    assert not (tmp_path / "given.json").exists() and (tmp_path / "37").exists()


def test_an_unknown_action_and_an_action_without_probes_are_refused():
    with pytest.raises(
        DmfError,
        match=r"config.guard.action = 'pray': expected one of off, stop, jvp, halve, floor, rate",
    ):
        parse(merged(TINY, guard=dict(action="pray")))
    with pytest.raises(
        DmfError, match=r"config.guard.every_steps = 0 with config.guard.action = 'jvp'"
    ):
        check(parse(merged(TINY, guard=dict(action="jvp"))), 10, 1000)


# Pretraining of 4 steps, then 2 steps each: trajectory, d = 1/2, d = 1/4, jvp. No checkpoints but at stage boundaries.
GUARDED = merged(
    TINY, guard=dict(every_steps=1, rows=8, action="jvp"), run=dict(checkpoint_every_steps=100)
)


@pytest.fixture
def diverges(monkeypatch):
    """Makes the probe say once that d = 1/4 fails: at the second look, the first being the reference."""
    seen = []

    def probe(self, kind, params, rho):
        seen.append(rho)
        return {
            **CALM,
            "residual_median": 9.0
            if kind == "discrete" and seen.count(0.25) >= 2 and rho == 0.25
            else 2.0,
        }

    monkeypatch.setattr(Watch, "__call__", probe)
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
    line = "guard     stage 2 (discrete), step 10: residual_median = 9, above 3 x the stage's first, 2; "
    line += "back to step 8, the discrete stages left are jvp stages now"
    assert capsys.readouterr().out.count(line) == 2  # when it happens, and below the closing table
    plain = merged(TINY, curriculum=dict(stages=4, kinds=("all_pairs", "discrete", "jvp", "jvp")))
    train(parse(plain), tmp_path / "plain")
    for a, b in zip(state_of(tmp_path), state_of(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(a, b)  # what it did before leaves no trace in the weights


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


# Four steps a stage, d = 1/4 from step 12 to 16; it goes back to step 13, beyond which are the checkpoints 14 and 15.
LONGER = merged(
    GUARDED, curriculum=dict(length=16.0), run=dict(checkpoint_every_steps=1, keep_checkpoints=3)
)


def climbs(monkeypatch, *residuals):
    """Makes the probes of d = 1/4 say these medians one after the other, and then the last of them again."""
    left = list(residuals)

    def probe(self, kind, params, rho):
        return {
            **CALM,
            "residual_median": (left.pop(0) if left[1:] else left[0]) if rho == 0.25 else 2.0,
        }

    monkeypatch.setattr(Watch, "__call__", probe)


def end_of(workdir):
    """What two runs that are the same run end with."""
    logs = [(workdir / name).read_text() for name in ("metrics.jsonl", "watch.jsonl", guard.FILE)]
    return logs, [leaf.tobytes() for leaf in leaves(workdir / "checkpoints" / "20")]


@pytest.mark.parametrize(
    "where, name, call, after",
    [
        (Guard, "_write", 1, True),  # the intervention is written down, and no more
        (guard.paths, "remove_tree", 1, False),  # one checkpoint has lost its manifest
        (guard.paths, "remove_tree", 1, True),
        (guard.paths, "remove_tree", 2, False),
        (Guard, "_write", 2, False),  # all is deleted, which is not noted yet
        (Guard, "_write", 2, True),
    ],
)
def test_a_kill_in_an_intervention_changes_nothing(tmp_path, monkeypatch, where, name, call, after):
    calls, real = [], getattr(where, name)

    def killed(*given):
        calls.append(given)
        if len(calls) == call and not after:
            raise KeyboardInterrupt
        real(*given)
        if len(calls) == call:
            raise KeyboardInterrupt

    climbs(monkeypatch, 2.0, 4.5, 4.5, 9.0)
    train(parse(LONGER), tmp_path / "whole")
    climbs(monkeypatch, 2.0, 4.5, 4.5, 9.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(where, name, killed)
        train(parse(LONGER), tmp_path / "killed")
    train(parse(LONGER), tmp_path / "killed")
    (row,) = json.loads((tmp_path / "killed" / guard.FILE).read_text())
    assert (row["step"], row["back_to"]) == (16, 13)
    assert end_of(tmp_path / "killed") == end_of(tmp_path / "whole")


class AskedAfter(Stop):
    """A request to stop in the midst of the run's so-manieth step."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def unsaved(self):
        super().unsaved()
        self.left -= 1
        if self.left == 0:
            self.ask()


@pytest.mark.parametrize("asked", [13, 14])
def test_a_run_that_was_asked_to_stop_goes_back_no_less_far(tmp_path, monkeypatch, asked):
    values = parse(merged(LONGER, run=dict(checkpoint_every_steps=3, keep_checkpoints=2)))
    climbs(monkeypatch, 2.0, 2.0, 2.0, 9.0)
    train(values, tmp_path / "whole")
    climbs(monkeypatch, 2.0, 2.0, 2.0, 9.0)
    train(values, tmp_path / "asked", stop=AskedAfter(asked))
    assert (tmp_path / "asked" / "checkpoints" / str(asked) / "manifest.json").exists()
    train(values, tmp_path / "asked")
    (row,) = json.loads((tmp_path / "asked" / guard.FILE).read_text())
    assert (row["step"], row["back_to"]) == (16, 15)
    assert end_of(tmp_path / "asked") == end_of(tmp_path / "whole")
    climbs(monkeypatch, 2.0, 2.0, 9.0)
    train(values, tmp_path / "again", stop=AskedAfter(asked))
    train(values, tmp_path / "again")
    (row,) = json.loads((tmp_path / "again" / guard.FILE).read_text())
    assert (row["step"], row["back_to"]) == (15, 12)  # and not to the one that was saved on request


def test_a_run_that_is_asked_to_stop_while_the_guard_goes_back_starts_nothing_more(
    tmp_path, monkeypatch, capsys
):
    stop, real = Stop(), Guard.intervene

    def intervene(self, *given):
        stop.ask()
        real(self, *given)

    climbs(monkeypatch, 2.0, 4.5, 4.5, 9.0)
    train(parse(LONGER), tmp_path / "whole")
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
    assert end_of(tmp_path / "asked") == end_of(tmp_path / "whole")


def test_stop_leaves_the_last_good_state_and_a_report_again_and_again(tmp_path, diverges, capsys):
    stopping = parse(merged(GUARDED, guard=dict(action="stop")))
    for _ in range(2):
        with pytest.raises(
            DmfError,
            match=r"the guard has stopped this run: stage 2 \(discrete\), step 10: residual_median = 9",
        ):
            train(stopping, tmp_path)
        assert max(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")) == 8
    assert (
        capsys.readouterr().out.count(
            "guard     stage 2 (discrete), step 10: residual_median = 9, above"
        )
        == 2
    )  # the report
    assert not (tmp_path / guard.FILE).with_suffix(".json.tmp").exists()
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
    with pytest.raises(
        DmfError, match="the guard has stopped"
    ):  # which has changed nothing; nor do other probes
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
        train(parse(TINY), tmp_path / "off")
    done.clear()
    train(parse(GUARDED), tmp_path / "jvp")
    (row,) = json.loads((tmp_path / "jvp" / guard.FILE).read_text())
    assert (row["step"], row["stage"], row["action"]) == (8, "stage 1", "jvp") and row[
        "back_to"
    ] == 6


def test_weights_that_sample_no_finite_values_are_refused_before_a_step(tmp_path, monkeypatch):
    train(parse(TINY), tmp_path / "given")

    def never(self, boundary, params):
        raise NotFinite("samples has non-finite values in 4 of 4 images")

    monkeypatch.setattr(Scoreboard, "add", never)
    with pytest.raises(DmfError, match="samples has non-finite values in 4 of 4 images"):
        init = str(tmp_path / "given" / "checkpoints" / "12")
        train(
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
    train(parse(TINY), tmp_path / "plain")
    for a, b in zip(state_of(tmp_path / "guarded"), state_of(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_pretraining_from_fresh_weights_can_go_back_to_them(tmp_path, monkeypatch):
    seen = []

    def probe(self, kind, params, rho):
        seen.append(jax.tree.leaves(params)[0].shape)
        return {**CALM, "residual_border": 9.0 if len(seen) == 2 else 1.0}

    monkeypatch.setattr(Watch, "__call__", probe)
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


@pytest.mark.parametrize(
    "writes", [1, 2]
)  # of guard.json: the intervention, and that all beyond step 0 is deleted
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
            Watch, "__call__", lambda *_: {**CALM, "residual_median": next(medians, 2.0)}
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
