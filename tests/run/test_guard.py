"""The guard: what it takes for a divergence, and what becomes of the stages."""

import math

import pytest

from dmf.config import check, parse
from dmf.errors import DmfError
from dmf.method.curriculum import CurriculumConfig, build_stages, rho_at
from dmf.optim import EMAConfig, OptimizerConfig
from dmf.run import guard
from dmf.run.guard import Diverged, Guard, GuardConfig
from dmf.state import ema_decays, learning_rate
from dmf.storage.manifest import write_manifest
from tests.runs import train
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
    with pytest.raises(DmfError, match=r"guard.json( line 1)?: .*expected (what|a|an) "):
        train(parse(TINY), tmp_path)
    assert (tmp_path / guard.FILE).read_text() == text


def test_a_score_is_held_against_the_best_since_the_last_stage_of_flow_matching(tmp_path):
    watching = Guard(tmp_path / "guard.json", tmp_path, CONFIG, fresh=True)

    def said(*scores):
        return watching.score_alarm(scores, "fid", LADDER)  # all_pairs to step 10

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
    ]  # a score that is not as good yet is no alarm
    falling = [(n, 500.0 / n**2) for n in range(30, 38)] + [(38, math.nan)]
    assert back(Diverged(38, "x"), falling) == back(Diverged(38, "x"), steep) == 32
    assert (
        back(Diverged(38, "x"), [], kept={10, 34, 60}) == 34
    )  # not before a checkpoint that a change of the config has kept
    assert back(Diverged(34, "x"), [], kept={10, 20, 34}) == 32  # not to the step that has failed
    assert back(Diverged(30, "x"), [], probes=[], stages=LADDER[:3]) == 20
    assert (
        back(Diverged(38, "x"), [], scheduled=lambda step: step != 32) == 30
    )  # not to a checkpoint that was not scheduled
    (tmp_path / "32" / "weights").write_text("2")  # damaged: it cannot go back there
    (tmp_path / "30" / "manifest.json").unlink()
    assert back(Diverged(38, "x"), []) == 20
    for n in (20, 10):
        (tmp_path / str(n) / "weights").unlink()
    assert back(Diverged(38, "x"), []) == 0  # fresh weights are drawn again
    given = Guard(tmp_path / "given.json", tmp_path, CONFIG, fresh=True, drawn=False)
    with pytest.raises(
        DmfError,
        match="step 38: x; the guard would go back to step 0, but checkpoint .*/0: .*cannot be",
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
