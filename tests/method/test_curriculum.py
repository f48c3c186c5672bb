"""Stages as a function of the step, and the two interval rules against their definitions."""

import dataclasses

import numpy as np
import pytest

from dmf.errors import DmfError
from dmf.method.curriculum import (
    CurriculumConfig,
    build_stages,
    passes,
    progress_at,
    stage_at,
    table,
)
from dmf.method.intervals import INTERVALS

PAPER = CurriculumConfig(stages=10, q=2.0, interval="dagger", length=2000.0, length_unit="epochs")


def literal_dagger(rho, r, t):
    """The paper's form, through the noise ratio t / (1 - t): the share of t - r of a step back."""
    ratio = lambda x: x / (1 - x)  # noqa: E731
    s = ratio(t) - (ratio(t) - ratio(r)) * rho
    return (t - s / (1 + s)) / (t - r)


def test_dagger_closed_form_equals_its_definition(float64, rng):
    t = rng.uniform(0.01, 0.999, 100_000)
    r = t * rng.uniform(0, 0.999, 100_000)
    for rho in (0.5, 0.125, 2.0**-8, 1 / 16):
        d = INTERVALS["dagger"](rho, r, t)
        np.testing.assert_allclose(
            np.asarray(d) * (t - r), literal_dagger(rho, r, t) * (t - r), atol=2e-15
        )
        assert (d > 0).all() and (d <= rho).all()


def test_dagger_published_steps(float64):
    for r, t, step in ((0.7, 0.9, 0.05), (0.4, 0.6, 0.08), (0.2, 0.8, 0.12)):
        assert float(INTERVALS["dagger"](0.5, r, t)) * (t - r) == pytest.approx(step, abs=1e-15)


def test_dagger_from_data_is_a_constant_ratio_of_noise_levels(float64):
    t, rho = np.linspace(0.05, 0.95, 19), 0.125
    t_next = t - np.asarray(INTERVALS["dagger"](rho, 0 * t, t)) * t
    np.testing.assert_allclose((t_next / (1 - t_next)) / (t / (1 - t)), 1 - rho, rtol=1e-13)


def test_dagger_is_finite_and_right_where_the_definition_is_not():
    r, t, rho = np.float32(0), np.float32(0.99999), np.float32(1 / 256)
    exact = literal_dagger(np.float64(rho), np.float64(r), np.float64(t))
    assert float(INTERVALS["dagger"](rho, r, t)) == pytest.approx(exact, rel=1e-6)
    assert (
        abs(literal_dagger(rho, r, t) / exact - 1) > 0.2
    )  # the literal form in float32 is off by half here
    assert float(INTERVALS["dagger"](rho, r, np.float32(1))) == 0.0
    assert float(INTERVALS["dagger"](rho, np.float32(0.3), np.float32(0.3))) == pytest.approx(
        float(rho), rel=1e-6
    )


def test_linear_is_the_same_share_everywhere():
    np.testing.assert_array_equal(
        INTERVALS["linear"](0.25, np.zeros(3), np.array([0.1, 0.5, 1.0])), 0.25
    )


def test_the_papers_curriculum():
    stages = build_stages(PAPER, 1024, 50_000)
    assert [s.kind for s in stages] == ["all_pairs", *["discrete"] * 8, "jvp"]
    assert [s.rho for s in stages[1:9]] == [2.0**-i for i in range(1, 9)]
    assert all(s.steps == 200 * 48 for s in stages) and stages[-1].last == 96_000


def test_the_stage_at_every_boundary_step():
    config = dataclasses.replace(PAPER, length=107.0, length_unit="steps", pretrain_length=13.0)
    stages = build_stages(config, 8, 100)
    assert stages[0].kind == "flow" and stages[0].index == -1
    assert [s.steps for s in stages[1:]] == [
        11,
        10,
        11,
        11,
        11,
        10,
        11,
        11,
        10,
        11,
    ]  # a length K does not divide, and 107
    for before, after in zip(stages, stages[1:], strict=False):
        assert before.last == after.first
        assert (
            stage_at(stages, after.first - 1) is before and stage_at(stages, after.first) is after
        )
    assert stage_at(stages, stages[-1].last) is stages[-1]


def test_explicit_lengths_in_images():
    config = CurriculumConfig(
        stages=3, length=640.0, stage_lengths=(320.0, 160.0, 160.0), length_unit="images"
    )
    assert [s.steps for s in build_stages(config, 16, 1000)] == [20, 10, 10]


def test_cost_in_forward_passes_and_the_printed_table():
    stages = build_stages(PAPER, 1024, 50_000)
    assert [passes(stages[i], 0.75) for i in (0, 1, 9)] == [3.0, 3.75, 3.75]
    text = table(stages, PAPER, 0.75)
    assert ["stage", "8", "discrete", "0.00390625+", "9600", "76800", "3.75"] in [
        line.split() for line in text.splitlines()
    ]
    assert text.splitlines()[11].split() == ["all", "96000", "3.67"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=0.5), r"curriculum.q = 0.5: expected a number above 1"),
        (dict(q=1.0), r"curriculum.q = 1.0"),
        (dict(q=float("nan")), r"curriculum.q = nan"),
        (dict(interval="dager"), r"curriculum.interval = 'dager': expected one of linear, dagger"),
        (dict(stages=2), r"curriculum.stages = 2: expected at least 3"),
        (dict(kinds=("flow", "jpv"), stages=2), r"curriculum.kinds has 'jpv'"),
        (dict(kinds=("jvp",)), r"kinds has 1 entries: expected config.curriculum.stages = 10"),
        (
            dict(stages=3, stage_lengths=(1000.0, 500.0, 400.0)),
            r"stage_lengths add up to 1900: expected config.curriculum.length = 2000",
        ),
        (dict(stage_lengths=(1.0,)), r"stage_lengths has 1 entries: expected 10"),
        (dict(stage_learning_rates=(1.0,)), r"stage_learning_rates has 1 entries"),
        (
            dict(length_unit="epoch"),
            r"length_unit = 'epoch': expected one of steps, epochs, images",
        ),
        (dict(length=4.0, length_unit="steps"), r"has no step"),
        (dict(switch_ema="drop"), r"switch_ema = 'drop': expected one of keep, reset"),
    ],
)
def test_a_curriculum_that_makes_no_sense_names_its_key(change, message):
    with pytest.raises(DmfError, match=message):
        build_stages(dataclasses.replace(PAPER, **change), 1024, 50_000)


def test_progress_runs_over_the_curriculum_and_waits_in_pretraining():
    config = CurriculumConfig(stages=3, length=60.0, pretrain_length=20.0)
    stages = build_stages(config, 8, 1000)
    assert [progress_at(stages, n) for n in (0, 19, 20, 50, 80)] == [0, 0, 0, 0.5, 1]
    alone = build_stages(CurriculumConfig(stages=1, kinds=("flow",), length=10.0), 8, 1000)
    assert [progress_at(alone, n) for n in (0, 5, 10)] == [0, 0.5, 1]
