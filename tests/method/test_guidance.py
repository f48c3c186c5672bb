"""Guided stages: the target against one computed by hand, its evaluations, its cost, whole runs."""

import dataclasses
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import config, pretrained, step
from dmf.config import parse
from dmf.errors import DmfError
from dmf.measure import benchmark
from dmf.method import guidance, objectives
from dmf.method.curriculum import CurriculumConfig, build_stages, passes, table
from dmf.method.flow import Condition, Rows, RowSplit
from dmf.method.guidance import GuidanceConfig, guided_velocity
from dmf.networks import Network
from tests import runs
from tests.test_configs import load
from tests.test_step import largest_difference
from tests.test_train import leaves, stopped_after
from tests.tiny import TINY, Setup, merged

NULL, RHO = 10, 0.25
STRENGTH = dict(omega=0.6, kappa=0.7, t_start=0.25, t_end=0.75)
KINDS = ("guided_discrete", "guided_jvp")
GUIDED = merged(TINY, guidance=STRENGTH, curriculum=dict(stages=2, kinds=KINDS, interval="linear"))
RUN = merged(
    TINY,
    guidance=STRENGTH,
    curriculum=dict(kinds=("all_pairs", "discrete", "jvp", "guided_jvp"), pretrain_length=0.0),
)


# --- by hand: u = E[label] tanh(b z + c (t - r) + d t) + g z, times the row's mask in training -----


class Call(NamedTuple):
    """One evaluation of the network below: its labels, in training or not, at r = t or not."""

    label: list[int]
    train: bool
    border: bool


def by_hand_network(calls=None):
    """The closed form as a Network. A row's "key" is its mask, a factor.

    calls: collects the evaluations.
    """

    def apply(params, z, r, t, *, condition, train, rngs):
        label = condition.label
        if calls is not None:
            calls.append(Call(np.asarray(label).tolist(), train, r is t))
        column = lambda x: x[:, None]  # noqa: E731
        inner = params["b"] * z + column(params["c"] * (t - r) + params["d"] * t)
        u = column(params["E"][label]) * jnp.tanh(inner) + params["g"] * z
        return u * column(rngs) if train else u

    return Network(None, apply, None)


def by_hand_params():
    rng = np.random.default_rng(3)
    return {"E": rng.uniform(0.5, 1.5, NULL + 1), "b": 0.8, "c": -0.6, "d": 0.9, "g": 0.3}


def by_hand_rows():
    """16 rows, the last of every 4 with r = t.

    Times lie inside, outside and on the ends of the interval. Some labels are dropped.
    """
    rng = np.random.default_rng(4)
    t = np.array(
        [0.25, 0.75, 0.5, 0.25, 0.1, 0.9, 0.3, 0.2, 0.74, 0.76, 0.6, 0.6, 0.24, 0.5, 0.45, 0.95]
    )
    r = np.where(np.arange(16) % 4 == 3, t, t * rng.uniform(0, 0.9, 16))
    label = np.array([0, 1, 2, 3, 4, 5, NULL, 6, 7, 8, 9, NULL, 0, NULL, 1, 2])
    z, v = rng.normal(size=(2, 16, 5))
    return Rows(z, r, t, v, Condition(label=label), rng.uniform(0.5, 1.5, 16))


def one_row(params, z, r, t, label):
    """u of one row in NumPy, and its slope in the inner argument."""
    wave = np.tanh(params["b"] * z + params["c"] * (t - r) + params["d"] * t)
    return params["E"][label] * wave + params["g"] * z, params["E"][label] * (1 - wave**2)


def residual_by_hand(kind, params, strength, z, r, t, v, label, mask):
    """e of one row, from the formulas on paper."""
    v_u, v_c = one_row(params, z, t, t, NULL)[0], one_row(params, z, t, t, label)[0]
    if label != NULL and strength.t_start <= t <= strength.t_end:
        v = v_u + strength.omega * (v - v_u) + strength.kappa * (v_c - v_u)
    u, slope = one_row(params, z, r, t, label)
    if r == t:
        return mask * u - v
    if kind == "guided_jvp":
        dudt = slope * (params["b"] * v + params["c"] + params["d"]) + params["g"] * v
        return mask * u - (v - (t - r) * mask * dudt)
    back = RHO * (t - r)
    u_next = mask * one_row(params, z - back * v, r, t - back, label)[0]
    return mask * u - (back * v + (t - r) * u_next) / (back + t - r)


def by_hand_config(**strength):
    return parse({**GUIDED, "guidance": strength})


def by_hand_loss(kind, network, settings):
    return partial(
        step.stage_loss, kind=kind, network=network, config=settings, split=RowSplit(16, 4, 3)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "strength",
    [dict(STRENGTH), dict(STRENGTH, kappa=0.0), dict(omega=3.0), dict(omega=1.0, kappa=0.5)],
)
def test_the_residual_of_every_row_is_the_one_computed_by_hand(
    float64, monkeypatch, kind, strength
):
    found, real = [], objectives.KINDS[kind]
    spy = lambda *args: found.append(real.residual(*args)) or found[-1]  # noqa: E731
    monkeypatch.setitem(objectives.KINDS, kind, real._replace(residual=spy))
    settings, params, rows = by_hand_config(**strength), by_hand_params(), by_hand_rows()
    _, metrics = by_hand_loss(kind, by_hand_network(), settings)(
        params, jax.tree.map(jnp.asarray, rows), RHO
    )
    expected = np.stack(
        [
            residual_by_hand(kind, params, settings.guidance, *row)
            for row in zip(*rows[:4], rows.condition.label, rows.keys, strict=True)
        ]
    )
    pair = np.arange(16) % 4 < 3
    np.testing.assert_allclose(found[0].pairs, expected[pair], rtol=0, atol=1e-14)
    np.testing.assert_allclose(found[0].border, expected[~pair], rtol=0, atol=1e-14)
    assert float(metrics["squares_pairs"]) == pytest.approx(
        np.mean(np.sum(expected[pair] ** 2, 1)), rel=1e-13
    )


def test_rows_outside_the_interval_and_dropped_ones_keep_v_and_so_does_no_guidance():
    rows = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else jnp.int32), by_hand_rows()
    )
    net = lambda params, rows: 0.1 * rows.z + rows.condition.label[:, None]  # noqa: E731
    v_g = guided_velocity(net, None, rows, NULL, GuidanceConfig(**STRENGTH))
    guided = np.asarray((v_g != rows.v).all(1))
    assert guided.nonzero()[0].tolist() == [0, 1, 2, 3, 8, 10, 14]
    np.testing.assert_array_equal(v_g[~guided], rows.v[~guided])
    np.testing.assert_array_equal(guided_velocity(net, None, rows, NULL, GuidanceConfig()), rows.v)
    with pytest.raises(DmfError, match="rows.condition.label = None: expected classes"):
        guided_velocity(net, None, rows._replace(condition=Condition()), NULL, GuidanceConfig())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kappa", [0.0, 0.7])
def test_what_is_evaluated_how_often_and_on_which_labels(kind, kappa):
    calls, rows = [], by_hand_rows()
    settings = by_hand_config(**dict(STRENGTH, kappa=kappa))
    by_hand_loss(kind, by_hand_network(calls), settings)(
        by_hand_params(), jax.tree.map(jnp.asarray, rows), RHO
    )
    given, pair = rows.condition.label.tolist(), np.arange(16) % 4 < 3
    extra = [Call([NULL] * 16, False, True), *[Call(given, False, True)] * (kappa > 0)]
    pairs, border = (
        Call(rows.condition.label[pair].tolist(), True, False),
        Call(rows.condition.label[~pair].tolist(), True, False),
    )
    training = [Call(given, True, False), pairs] if kind == "guided_discrete" else [pairs, border]
    assert calls == extra + training
    assert guidance.passes(settings.guidance) == len(extra)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_flows_through_the_guided_velocity(float64, kind):
    settings, params, network = by_hand_config(**STRENGTH), by_hand_params(), by_hand_network()
    rows = jax.tree.map(jnp.asarray, by_hand_rows())

    def still(params, rows):
        return network.apply(
            params, rows.z, rows.r, rows.t, condition=rows.condition, train=False, rngs=None
        )

    constant = rows._replace(v=guided_velocity(still, params, rows, NULL, settings.guidance))
    params = jax.tree.map(jnp.asarray, params)
    whole = jax.grad(by_hand_loss(kind, network, settings), has_aux=True)(params, rows, RHO)[0]
    plain = by_hand_loss(kind.removeprefix("guided_"), network, settings)
    expected = jax.grad(plain, has_aux=True)(params, constant, RHO)[0]
    without = jax.grad(plain, has_aux=True)(params, rows, RHO)[0]
    assert largest_difference(whole, expected) < 1e-14
    assert largest_difference(whole, without) > 1e-2


@pytest.mark.parametrize(
    ("omega", "kappa", "scale"), [(3.0, 0.0, 3.0), (1.0, 0.5, 2.0), (0.2, 0.92, 2.5)]
)
def test_training_comes_to_rest_at_the_effective_scale(float64, omega, kappa, scale):
    # A network that knows the label alone. At rest
    # u_c = u_null + omega / (1 - kappa) (mean v of the class - u_null).
    rows = by_hand_rows()
    mean = np.random.default_rng(5).normal(size=(NULL + 1, 5))
    rows = jax.tree.map(jnp.asarray, rows._replace(v=mean[rows.condition.label]))
    table_of = lambda params, z, r, t, condition, train, rngs: params[condition.label]  # noqa: E731
    values = {**merged(GUIDED, loss=dict(p=0.0)), "guidance": dict(omega=omega, kappa=kappa)}
    loss = by_hand_loss("guided_discrete", Network(None, table_of, None), parse(values))
    gradient = jax.jit(jax.grad(lambda params: loss(params, rows, RHO)[0]))
    rest = mean[NULL] + scale * (mean - mean[NULL])
    assert float(jnp.abs(gradient(jnp.asarray(rest))).max()) < 1e-14
    assert float(jnp.abs(gradient(jnp.asarray(mean))).max()) > 1e-2


# --- as a stage of the curriculum -----------------------------------------------------------------


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


def test_one_device_and_eight_take_the_same_guided_steps_and_guidance_needs_no_communication():
    one, eight = Setup(RUN), Setup(RUN, devices=8)
    (first, metrics), (second, others) = one.run("guided_jvp", 3), eight.run("guided_jvp", 3)
    assert abs(metrics["loss"] - others["loss"]) < 1e-6 * abs(metrics["loss"])
    # We compare u, not weights. The softmax ignores key biases, and Adam makes whole steps of their
    # rounding.
    z, t = jax.random.normal(jax.random.key(0), (6, 8, 8, 1)), jnp.linspace(0.1, 1, 6)
    start, *u = (
        one.network.apply(jax.device_get(p), z, 0.3 * t, t)
        for p in (one.state().params, first.params, second.params)
    )
    assert largest_difference(u[0], u[1]) < 1e-3 * largest_difference(u[0], start)
    program = (
        eight.step("guided_jvp")
        .lower(eight.state(), eight.batch(0), eight.scalars(0, "guided_jvp"))
        .compile()
    )
    used = set(
        re.findall(
            r"\b(all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)\b",
            program.as_text(),
        )
    )
    assert used == {"all-reduce"}  # the gradient's


def test_the_compiled_work_is_what_the_table_says(monkeypatch):
    monkeypatch.setattr(benchmark, "CASES", (("flow", 0.0),))
    values = merged(
        GUIDED, network=dict(patch=2, width=64), curriculum=dict(stages=1, kinds=("guided_jvp",))
    )
    rows = benchmark.benchmark(parse(values), rounds=1)
    assert [(r["kind"], r["r_neq_t"]) for r in rows] == [("flow", 0.0), ("guided_jvp", 0.75)]
    assert rows[1]["limit"] == (5 + 0.75) / 3
    assert rows[1]["flops_ratio"] == pytest.approx(rows[1]["limit"], rel=0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with a guided stage at its end: its directory, and the programs it compiled."""
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
            parse(load(name, variant)) for name in ("imagenet256", "imagenet256_guided")
        )
        assert dataclasses.astuple(guided.guidance) == strength
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
            "config.curriculum.kinds has 'guided_discrete': expected no guided stage, as config.network takes no classes",
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
            "config.guidance.t_start = 0.25: expected 0.0, or one of guided_discrete, guided_jvp in config.curriculum.kinds",
        ),
        (
            dict(curriculum=dict(kinds=("discrete", "guided_flow"))),
            "config.curriculum.kinds has 'guided_flow': expected only flow, all_pairs, discrete, jvp, guided_discrete, ",
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
