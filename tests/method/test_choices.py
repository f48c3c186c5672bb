"""Choices besides the paper's: the schedule of d, the direction of the step back, the interval.

Each choice is one field of the config. Its default changes nothing.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import imagenet256
from dmf import fields, sharding, step
from dmf.config import check, parse
from dmf.errors import DmfError
from dmf.evaluation import pictures
from dmf.measure import benchmark, topologies, tpu_plan
from dmf.measure.cost import Compilations
from dmf.method import curriculum, velocity
from dmf.method.curriculum import CurriculumConfig, build_stages, rho_at, stage_at, table
from dmf.method.flow import PAIRINGS, Condition, Rows, RowSplit, TimeLaw
from dmf.method.intervals import RULES, dagger, linear
from dmf.method.objectives import GUIDED, KINDS, LossConfig
from dmf.method.velocity import along_own
from dmf.networks import Network
from tests import ROOT, runs
from tests.test_train import leaves, stopped_after
from tests.tiny import MLP, TINY, Setup, linear_network, merged, residuals

SMOOTH = CurriculumConfig(stages=6, q=2.0, length=600.0, schedule="smooth")


@pytest.mark.parametrize(
    ("section", "name", "table"),
    [
        (TimeLaw, "pairing", PAIRINGS),
        (CurriculumConfig, "interval", RULES),
        (LossConfig, "tangent", velocity.TANGENTS),
    ],
)
def test_a_new_row_of_a_table_is_a_choice_of_its_field(section, name, table):
    (field,) = [f for f in dataclasses.fields(section) if f.name == name]
    assert field.metadata[fields.CHOICES] == tuple(table)


def resumed_ends_as_uninterrupted(values, tmp_path, stops):
    """Trains once in one go, and once for each step after which an error stops it.

    All runs end in the same bits.
    """
    runs.train(parse(values), tmp_path / "whole")
    last = max(
        int(p.name) for p in (tmp_path / "whole" / "checkpoints").iterdir() if p.name.isdigit()
    )
    expected = leaves(tmp_path / "whole" / "checkpoints" / str(last))

    for n in stops:
        stopped_after(n, values, tmp_path / str(n))
        runs.train(parse(values), tmp_path / str(n))
        for a, b in zip(
            leaves(tmp_path / str(n) / "checkpoints" / str(last)), expected, strict=True
        ):
            np.testing.assert_array_equal(a, b)
        assert (tmp_path / str(n) / "metrics.jsonl").read_text() == (
            tmp_path / "whole" / "metrics.jsonl"
        ).read_text()
    return tmp_path / "whole"


# --- the schedule of d ----------------------------------------------------------------------------


def test_a_smooth_schedule_falls_by_one_factor_a_step_between_the_same_ends():
    stages = build_stages(SMOOTH, 8, 1000)
    plain = build_stages(dataclasses.replace(SMOOTH, schedule="steps"), 8, 1000)
    assert [(s.kind, s.first, s.steps) for s in stages] == [
        (s.kind, s.first, s.steps) for s in plain
    ]
    rho = np.array([rho_at(stage_at(stages, n), n) for n in range(100, 500)])
    assert rho[0] == 1 / 2 and rho[-1] == pytest.approx(1 / 16, rel=1e-12)
    np.testing.assert_allclose(
        rho[1:] / rho[:-1], 8 ** (-1 / 399), rtol=1e-12
    )  # over the boundaries of stages as well
    assert {rho_at(plain[i], n) for i in (1, 2) for n in range(plain[i].first, plain[i].last)} == {
        0.5,
        0.25,
    }
    assert [rho_at(stages[i], stages[i].first) for i in (0, 5)] == [1.0, 1.0]


def test_a_smooth_schedule_passes_over_stages_of_other_kinds():
    kinds = (
        "guided_discrete",
        "discrete",
        "jvp",
        "discrete",
        "guided_discrete",
        "all_pairs",
        "discrete",
        "guided_discrete",
    )
    config = CurriculumConfig(stages=8, kinds=kinds, q=2.0, length=80.0, schedule="smooth")
    stages = build_stages(config, 8, 1000, 1)
    at = [(rho_at(s, s.first), rho_at(s, s.last - 1)) for s in stages]
    factor = (2.0**-6 / 2.0**-1) ** (1 / 29)
    assert at[1] == pytest.approx((2.0**-1, 2.0**-1 * factor**9)) and at[3] == pytest.approx(
        (2.0**-1 * factor**10, 2.0**-1 * factor**19)
    )
    assert at[6][1] == pytest.approx(2.0**-6, rel=1e-12)
    assert (
        at[4][0] == at[4][1] == at[3][1] and at[7][0] == at[7][1] == at[6][1]
    )  # guided: what was reached before
    assert at[0] == (0.5, 0.5) and at[2] == at[5] == (1.0, 1.0)
    lone = CurriculumConfig(
        stages=3, length=3.0, schedule="smooth"
    )  # one discrete step: nothing to fall between
    assert [s.rho for s in build_stages(lone, 8, 1000)] == [1.0, 0.5, 1.0]


def test_the_table_shows_where_a_smooth_stage_begins_and_ends():
    stages = build_stages(SMOOTH, 8, 1000)
    lines = table(stages, SMOOTH, 0.25).splitlines()
    assert lines[2].split() == ["stage", "1", "discrete", "0.5..0.298466+", "100", "100", "3.25"]
    assert (
        lines[5].split()[3] == "0.104702..0.0625+" and len({len(line) for line in lines[:8]}) == 1
    )
    assert lines[1].split()[3] == "-"


def test_the_step_is_told_the_schedule_and_compiles_once():
    setup = Setup(merged(TINY, curriculum=dict(schedule="smooth", stages=6, length=60.0)))
    setup.network = linear_network()
    stage = setup.stages[2]
    told = [
        step.step_scalars(n, stage, setup.stages, setup.config).rho
        for n in range(stage.first, stage.last)
    ]
    assert (
        told == [np.float32(rho_at(stage, n)) for n in range(stage.first, stage.last)]
        and len(set(told)) == 10
    )
    train_step, now = setup.step("discrete"), setup.state()
    for n, rho in enumerate(told[:3]):
        now, _ = train_step(now, setup.batch(n), setup.scalars(n, "discrete", rho))
    assert train_step._cache_size() == 1


def test_a_smooth_run_logs_its_interval_and_resumes_in_the_same_bits(tmp_path):
    values = merged(
        MLP, curriculum=dict(schedule="smooth", stages=4, length=12.0, pretrain_length=0.0)
    )
    whole = resumed_ends_as_uninterrupted(values, tmp_path, (7,))
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["rho"] for r in rows if r["kind"] == "discrete"] == pytest.approx(
        [2.0 ** (-1 - i / 5) for i in range(6)]
    )


def test_the_curves_draw_the_interval(tmp_path):
    stages = build_stages(SMOOTH, 8, 1000)

    def drawn(name, fall):
        rows = [
            dict(
                step=n,
                kind=stage_at(stages, n - 1).kind,
                rho=0.5 * fall**n,
                squares_border=1.0,
                squares_pairs=2.0,
            )
            for n in range(1, 601)
        ]
        pictures.curves(tmp_path / name, rows, [], stages, "fd")
        return np.asarray(Image.open(tmp_path / name))

    a, b, c = drawn("a.png", 0.99), drawn("b.png", 0.99), drawn("c.png", 0.97)
    np.testing.assert_array_equal(a, b)
    assert a.shape != c.shape or (a != c).any()


def test_an_unknown_schedule_is_refused():
    with pytest.raises(
        DmfError, match="config.curriculum.schedule = 'smoth': expected one of steps, smooth"
    ):
        build_stages(dataclasses.replace(SMOOTH, schedule="smoth"), 8, 1000)


# --- the direction of the step back ---------------------------------------------------------------

PARAMS = {"p": 0.7, "c": -0.4, "d": 0.9}
OTHERS = {"p": -0.3, "c": 0.8, "d": 0.2}
ROWS = 16
SPLIT = RowSplit(ROWS, 4, 3)


def affine(params, z, r, t):
    """A network with known derivatives: u = p z + c (t - r) + d t; u(z, t, t) = p z + d t."""
    return params["p"] * z + (params["c"] * (t - r) + params["d"] * t)[:, None]


def affine_net(params, rows):
    return affine(params, rows.z, rows.r, rows.t)


def affine_rows():
    """16 rows, the last of every 4 with r = t."""
    rng = np.random.default_rng(3)
    t = rng.uniform(0.2, 0.95, ROWS)
    r = np.where(np.arange(ROWS) % 4 == 3, t, t * rng.uniform(0, 0.9, ROWS))
    z, v = rng.normal(size=(2, ROWS, 5))
    label = rng.integers(0, 10, ROWS)
    return jax.tree.map(
        jnp.asarray, Rows(z, r, t, v, Condition(label=label), rng.uniform(size=ROWS))
    )


def residual_by_hand(kind, rho, along, rows):
    """e of r < t rows, linear intervals and raw scale, by the formulas on paper. along: (B, D)."""
    z, r, t, v, along = (
        np.asarray(x)[np.arange(ROWS) % 4 < 3] for x in (rows.z, rows.r, rows.t, rows.v, along)
    )
    u, L = affine(PARAMS, z, r, t), (t - r)[:, None]
    if kind == "jvp":
        return u - v + L * (PARAMS["p"] * along + PARAMS["c"] + PARAMS["d"])
    u_next = affine(PARAMS, z - rho * L * along, r, t - rho * (t - r))
    return u - (rho * L * v + L * u_next) / (rho * L + L)


@pytest.mark.parametrize("kind", ["discrete", "jvp"])
@pytest.mark.parametrize("weights", [PARAMS, OTHERS])
def test_the_residual_along_another_velocity_is_the_formula_with_v_in_the_target_alone(
    float64, kind, weights
):
    rows, tangent = affine_rows(), along_own(affine_net, weights)
    found = residuals(kind, affine_net, PARAMS, rows, SPLIT, 0.25, linear, LossConfig(), tangent)
    own = affine(weights, rows.z, rows.t, rows.t)
    np.testing.assert_allclose(found.pairs, residual_by_hand(kind, 0.25, own, rows), atol=1e-14)
    data = residuals(kind, affine_net, PARAMS, rows, SPLIT, 0.25, linear, LossConfig())
    np.testing.assert_allclose(data.pairs, residual_by_hand(kind, 0.25, rows.v, rows), atol=1e-14)
    np.testing.assert_array_equal(found.border, data.border)
    assert float(jnp.abs(found.pairs - data.pairs).max()) > 1e-2


@pytest.mark.parametrize("kind", ["discrete", "jvp"])
@pytest.mark.parametrize("scale", ["raw", "unit"])
def test_no_gradient_flows_through_the_direction(float64, kind, scale):
    rows, config = affine_rows(), LossConfig(residual_scale=scale)

    def total(params):
        tangent = along_own(affine_net, params)
        return residuals(
            kind, affine_net, params, rows, SPLIT, 0.25, linear, config, tangent
        ).pairs.sum()

    first = jax.grad(lambda params: affine_net(params, SPLIT.pairs_of(rows)).sum())(PARAMS)
    for name, g in jax.grad(total)(PARAMS).items():
        assert float(g) == pytest.approx(float(first[name]), rel=1e-13)


@pytest.mark.parametrize("kind", ["discrete", "jvp"])
def test_where_the_network_already_gives_v_its_own_direction_is_the_data_s(float64, kind):
    rows = affine_rows()
    rows = rows._replace(v=affine(PARAMS, rows.z, rows.t, rows.t))
    tangent = along_own(affine_net, PARAMS)
    one, other = (
        residuals(kind, affine_net, PARAMS, rows, SPLIT, 0.25, dagger, LossConfig(), *extra)
        for extra in ((tangent,), ())
    )
    np.testing.assert_array_equal(one.pairs, other.pairs)


CHOSEN = merged(TINY, batch_size=ROWS, loss=dict(p=0.5), guidance=dict(omega=1.5, kappa=0.3))


@pytest.mark.parametrize("kind", ["discrete", "jvp", "guided_discrete", "guided_jvp"])
@pytest.mark.parametrize(
    "tangent", sorted({*velocity.TANGENTS} - {velocity.HEAD, velocity.TEACHER})
)
def test_what_is_evaluated_with_which_weights_and_what_is_counted(kind, tangent):
    calls = []

    def apply(params, z, r, t, *, condition, train, rngs):
        calls.append(
            (len(t), bool((r == t).all()), train, float(jax.lax.stop_gradient(params["p"])))
        )
        return affine(params, z, r, t)

    kinds = dict(stages=2, kinds=("discrete", kind), length=8.0, pretrain_length=0.0)
    guidance = dict(omega=1.5, kappa=0.3) if kind in GUIDED else dict(omega=1.0, kappa=0.0)
    config = parse(merged(CHOSEN, curriculum=kinds, loss=dict(tangent=tangent), guidance=guidance))
    step.stage_loss(
        PARAMS,
        affine_rows(),
        0.25,
        {"frozen": {"average": OTHERS} if tangent == "ema" else {}},
        kind=kind,
        network=Network(None, apply, None),
        config=config,
        split=SPLIT,
    )
    assert calls.count((12, True, False, {"own": 0.7, "ema": -0.3, "data": 0.0}[tangent])) == (
        tangent != "data"
    )
    guided = 2 * (kind in GUIDED)
    assert calls.count((16, True, False, 0.7)) == guided
    assert len(calls) == 2 + guided + (tangent != "data")
    forward = sum(n for n, *_ in calls) / ROWS + 0.75 * (
        KINDS[kind].arithmetic == "derivative"
    )  # the tangent of a JVP is a pass as well
    assert curriculum.passes(check(config, 10, 1352)[1], 0.75) == 2 + forward
    assert (
        f"{2 + forward:.2f}"
        in table(check(config, 10, 1352), config.curriculum, 0.75).splitlines()[2]
    )


def test_a_kind_without_a_direction_pays_for_none():
    config = parse(merged(TINY, loss=dict(tangent="own"), curriculum=dict(pretrain_length=4.0)))
    assert [curriculum.passes(s, 0.75) for s in check(config, 10, 1352)] == [
        3.0,
        3.0,
        4.5,
        4.5,
        4.5,
    ]


def test_the_step_goes_along_the_evaluated_average():
    # At the start every average is the weights; then it lags behind them.
    first, second = {}, {}
    for tangent in ("data", "own", "ema"):
        setup = Setup(merged(TINY, loss=dict(tangent=tangent), ema=dict(rampup_ratio=0.0)))
        setup.network = linear_network()
        train_step, now = setup.step("discrete"), setup.state()
        for n, found in ((0, first), (1, second)):
            now, metrics = train_step(now, setup.batch(n), setup.scalars(n, "discrete"))
            found[tangent] = float(metrics["loss"])
    assert first["own"] == first["ema"] != first["data"] and len(set(second.values())) == 3


@pytest.mark.parametrize(("kind", "tangent"), [("discrete", "ema"), ("jvp", "own")])
def test_split_weights_and_microbatches_take_the_same_steps_along_a_networks_velocity(
    kind, tangent
):
    values = merged(TINY, loss=dict(tangent=tangent), optimizer=dict(eps=1e-4), batch_size=32)
    ways = Setup(values), Setup(merged(values, microbatches=2, mesh=dict(fsdp=4)), devices=4)
    for setup in ways:
        setup.network = linear_network()
    one, many = (setup.run(kind, 3) for setup in ways)
    assert many[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-5)
    for a, b in zip(jax.tree.leaves(one[0].params), jax.tree.leaves(many[0].params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_benchmark_counts_the_pass_that_is_compiled():
    with Compilations() as seen:
        found = {}
        for tangent in ("data", "own"):
            config = parse(
                merged(TINY, loss=dict(tangent=tangent), network=dict(width=64, depth=2))
            )
            mesh = sharding.make_mesh(devices=jax.devices()[:1])
            programs, _, _ = benchmark.compile_cases(
                config, (8, 8, 1), 10, [("discrete", 0.5)], mesh, seen
            )
            found[tangent] = programs[0]
    assert (found["data"].passes, found["own"].passes) == (3.5, 4.0)
    assert found["own"].counts.flops / found["data"].counts.flops == pytest.approx(
        4.0 / 3.5, rel=0.03
    )


def test_a_plan_that_was_made_before_the_choice_came_stands(monkeypatch):
    rows = json.loads((ROOT / "docs" / "tpu_plan.json").read_text())["rows"]
    values = imagenet256.get_config("XL").to_dict()
    monkeypatch.setattr(topologies, "libtpu_version", lambda: "any")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def program(**changes):
        return tpu_plan._about(parse(merged(values, **changes)), "", "", "", mesh, "discrete")[
            "program"
        ]

    assert program() in {row["program"] for row in rows}
    assert (
        len({program(), program(loss=dict(tangent="own")), program(loss=dict(tangent="ema"))}) == 3
    )


def test_an_average_that_is_not_kept_cannot_be_gone_along():
    with pytest.raises(
        DmfError,
        match="config.loss.tangent = 'ema' with config.ema.evaluate = 0: expected the half-life",
    ):
        check(parse(merged(TINY, loss=dict(tangent="ema"), ema=dict(evaluate=0.0))), 10, 1352)
    with pytest.raises(
        DmfError, match="config.loss.tangent = 'mine': expected one of data, own, ema"
    ):
        parse(merged(TINY, loss=dict(tangent="mine")))
