"""Guided stages in a curriculum: their cost, whole runs, refusals."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from dmf import config, pretrained
from dmf.config import parse
from dmf.errors import DmfError
from dmf.measure import benchmark
from dmf.method.curriculum import CurriculumConfig, build_stages, passes, table
from tests import runs
from tests.method.test_guidance import GUIDED, RUN, STRENGTH
from tests.test_configs import load
from tests.test_step import largest_difference
from tests.test_train import leaves, stopped_after
from tests.tiny import TINY, Setup, merged


def test_a_guided_discrete_stage_looks_as_far_back_as_the_last_discrete_one():
    kinds = (
        "guided_discrete",
        "all_pairs",
        "discrete",
        "discrete",
        "guided_discrete",
        "jvp",
        "guided_discrete",
        "guided_jvp",
    )
    curriculum = CurriculumConfig(stages=8, kinds=kinds, q=3.0, length=80.0)
    stages = build_stages(curriculum, 8, 1000, 2)
    assert [s.rho for s in stages] == [1 / 3, 1.0, 3.0**-2, 3.0**-3, 3.0**-3, 1.0, 3.0**-3, 1.0]
    assert [passes(s, 0.25) for s in stages] == [5.25, 3.0, 3.25, 3.25, 5.25, 3.25, 5.25, 5.25]
    lines = [line.split() for line in table(stages, curriculum, 0.25).splitlines()]
    assert lines[5] == ["stage", "4", "guided_discrete", "0.037037+", "10", "40", "5.25"]
    assert lines[8] == ["stage", "7", "guided_jvp", "-", "10", "70", "5.25"]
    assert lines[9] == ["all", "80", "4.22"]
    assert passes(build_stages(curriculum, 8, 1000, 1)[0], 0.25) == 4.25


def test_the_compiled_work_is_what_the_table_says(monkeypatch):
    monkeypatch.setattr(benchmark, "CASES", (("flow", 0.0),))
    values = merged(
        GUIDED, network=dict(patch=2, width=64), curriculum=dict(stages=1, kinds=("guided_jvp",))
    )
    rows = benchmark.benchmark(parse(values), rounds=1)
    assert [(r["kind"], r["r_neq_t"]) for r in rows] == [("flow", 0.0), ("guided_jvp", 0.75)]
    assert rows[1]["limit"] == (5 + 0.75) / 3
    # v_u, v_c and u share the embeddings of z and t: 6 % of the products of so small a network.
    # One pass too few or too many would be 17 %.
    assert rows[1]["flops_ratio"] == pytest.approx(rows[1]["limit"], rel=0.07)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with a guided stage at its end: its directory, and its compiled programs."""
    workdir = tmp_path_factory.mktemp("guided")
    run = runs.open_run(parse(RUN), workdir)
    runs.loop(run)
    run.close()
    return workdir, {kind: program._cache_size() for kind, program in run.steps.items()}


def test_a_run_goes_into_its_guided_stage_and_compiles_it_once(finished):
    workdir, programs = finished
    assert programs == {"all_pairs": 1, "discrete": 1, "jvp": 1, "guided_jvp": 1}
    run = runs.open_run(parse(RUN), workdir)
    logged = [(m["step"], m["kind"]) for m in run.metrics.read()]
    run.close()
    assert logged[-3:] == [(6, "jvp"), (7, "guided_jvp"), (8, "guided_jvp")]


def test_a_run_stopped_in_its_guided_stage_ends_in_the_same_bits(finished, tmp_path):
    stopped_after(7, RUN, tmp_path)
    runs.train(parse(RUN), tmp_path)
    for a, b in zip(
        leaves(tmp_path / "checkpoints" / "8"),
        leaves(finished[0] / "checkpoints" / "8"),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert (tmp_path / "metrics.jsonl").read_text() == (finished[0] / "metrics.jsonl").read_text()


def test_a_guided_stage_of_its_own_starts_from_a_finished_curriculum(finished, tmp_path):
    alone = dict(stages=1, kinds=("guided_jvp",), length=2.0, pretrain_length=0.0)
    values = merged(TINY, init=str(finished[0]), guidance=STRENGTH, curriculum=alone)
    runs.train(parse(values), tmp_path)
    before, start, end = (
        pretrained.load(f)[1] for f in (finished[0], tmp_path / "checkpoints" / "0", tmp_path)
    )
    assert largest_difference(before, start) == 0 < largest_difference(start, end)


def test_the_guided_recipe_for_imagenet_differs_in_its_stage_and_guidance_alone():
    published = {
        "XL": (0.2, 0.92, 0.0, 0.75),
        "L": (0.2, 0.92, 0.0, 0.8),
        "B": (1.0, 0.5, 0.0, 1.0),
        "S": (1.0, 0.5, 0.0, 1.0),
    }
    for variant, strength in published.items():
        plain, guided = (
            parse(load(f"{name}:{variant}")) for name in ("imagenet256", "imagenet256_guided")
        )
        assert dataclasses.astuple(guided.guidance) == (*strength, 1.0, 1.0)  # told none
        changed = config.differences(config.to_dict(plain), config.to_dict(guided))
        assert {c.split(":")[0].split(".")[1] for c in changed} == {"curriculum", "guidance"}
        stages = config.check(guided, 1000, 1_281_167)
        assert [(s.kind, s.steps, passes(s, 0.25)) for s in stages] == [
            ("guided_jvp", 40 * 1251, 5.25)
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(guidance=dict(omega=0.0)), "config.guidance.omega = 0.0: expected a number above 0"),
        (
            dict(guidance=dict(kappa=1.0)),
            "config.guidance.kappa = 1.0: expected a number of at least 0 and below 1",
        ),
        (
            dict(guidance=dict(kappa=-0.1)),
            "config.guidance.kappa = -0.1: expected a number of at least 0",
        ),
        (
            dict(guidance=dict(t_end=1.5)),
            "config.guidance.t_end = 1.5: expected a number of at least 0 and at most 1",
        ),
        (
            dict(guidance=dict(t_start=0.75)),
            "config.guidance.t_start = 0.75: expected a time below t_end = 0.75",
        ),
        (
            dict(guidance=dict(omega=1.0, kappa=0.0)),
            "config.guidance.omega = 1 with kappa = 0: expected other values",
        ),
        (
            dict(guidance=dict(omgea=2.0)),
            "config.guidance.omgea: no such field; did you mean config.guidance.omega",
        ),
        (
            dict(label_dropout=0.0),
            "config.label_dropout = 0: expected a positive share, as a guided_discrete stage",
        ),
        (
            dict(label_dropout=0.0, network=dict(num_classes=0)),
            "config.curriculum.kinds has 'guided_discrete': expected no guided stage"
            ", as config.network takes no classes",
        ),
        (
            dict(curriculum=dict(kinds=("discrete", "jvp"))),
            "config.guidance.omega = 0.6: expected 1.0, or one of guided_discr",
        ),
        (
            dict(
                curriculum=dict(kinds=("discrete", "jvp")),
                guidance=dict(omega=1.0, kappa=0.0, t_end=1.0),
            ),
            "config.guidance.t_start = 0.25: expected 0.0, or one of guided_discrete, "
            "guided_jvp, guided_flow, guided_split in config.curriculum.kinds",
        ),
        (
            dict(curriculum=dict(kinds=("discrete", "guided_central"))),
            "config.curriculum.kinds has 'guided_central': expected only flow, all_pairs, "
            ".*discrete, jvp, central",
        ),
        (
            dict(times=dict(r_neq_t_fraction=0.0)),
            "expected a positive share, as a guided_discrete stage learns from rows with",
        ),
    ],
)
def test_guidance_that_cannot_work_is_refused(change, message):
    with pytest.raises(DmfError, match=message):
        config.check(parse(merged(GUIDED, **change)), 10, 1352)


def test_the_guided_velocities_share_what_is_the_same_in_all_evaluations_of_a_row():
    # u, v_u and v_c are evaluated at the same z, so one patch embedding serves all three.
    def convolutions(values, kind):
        setup = Setup(values)
        lowered = setup.step(kind).lower(
            jax.eval_shape(setup.state), setup.batch(0), setup.scalars(0, kind)
        )
        quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        compiled = lowered.compile(compiler_options=quick).as_text()
        return lowered.as_text().count("stablehlo.convolution"), len(
            re.findall(r"= \S+ convolution\(", compiled)
        )

    guided, plain = convolutions(GUIDED, "guided_discrete"), convolutions(TINY, "discrete")
    assert plain == (3, 3)  # u, u' and the gradient of the first one's kernel
    assert guided == (5, 3)
