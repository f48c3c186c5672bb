"""Intervals besides linear and dagger: dagger with a floor, and the adaptive one with its table."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import sharding
from dmf.config import check, parse
from dmf.errors import DmfError
from dmf.measure import topologies, tpu_plan
from dmf.method import curriculum, intervals
from dmf.method.curriculum import CurriculumConfig, build_stages, table
from dmf.method.flow import Rows, RowSplit
from dmf.method.intervals import BINS, dagger, interval_rule, linear
from dmf.method.objectives import LossConfig
from dmf.storage import checkpoint
from dmf.storage.readers import orbaxfile
from tests.method.test_choices import resumed_ends_as_uninterrupted
from tests.method.test_objectives import random_net
from tests.tiny import TINY, Setup, linear_network, merged, residuals

FLOOR = interval_rule("floor", 0.25)
RULES = CurriculumConfig(interval="floor", interval_floor=0.25)
ADAPTIVE = merged(TINY, curriculum=dict(interval="adaptive", interval_halflife_images=100.0))


# --- floor ----------------------------------------------------------------------------------------


def test_the_floor_is_the_larger_of_dagger_and_a_share_of_d(float64, rng):
    t = rng.uniform(0.01, 1.0, 10_000)
    r = t * rng.uniform(0, 1, 10_000)
    for rho in (0.5, 1 / 64):
        found, plain = np.asarray(FLOOR(rho, r, t)), np.asarray(dagger(rho, r, t))
        np.testing.assert_array_equal(found, np.where(plain > 0.25 * rho, plain, 0.25 * rho))
        assert (found > plain).any() and (found == plain).any() and (found <= rho).all()
    high = interval_rule("floor", 1.0)
    np.testing.assert_allclose(high(0.5, r, t), linear(0.5, r, t), rtol=1e-12)


def test_pure_noise_learns_under_the_floor():
    net, params = random_net(jax.random.key(0))
    x, e = jax.random.normal(jax.random.key(1), (2, 8, 8))
    rows = Rows(e, jnp.zeros(8), jnp.ones(8), e - x)
    found = [
        residuals("discrete", net, params, rows, RowSplit(8, 1, 1), 0.5, rule, LossConfig()).pairs
        for rule in (dagger, FLOOR)
    ]
    assert float(jnp.abs(found[0]).max()) == 0 and float(jnp.abs(found[1]).min(axis=1).max()) > 1e-3


def test_the_table_of_stages_says_what_the_rules_do_to_d():
    stages = build_stages(RULES, 8, 1000)
    for name, mark, words in (
        ("floor", "+", "to 0.25 d at least"),
        ("adaptive", "*", "at least 0.25; 1 at the start"),
    ):
        lines = table(stages, dataclasses.replace(RULES, interval=name), 0.25).splitlines()
        assert (
            lines[2].split()[3] == f"0.5{mark}"
            and lines[-1].startswith(mark)
            and lines[-1].endswith(words)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(interval="adaptiv"),
            "interval = 'adaptiv': expected one of linear, dagger, sigmoid, fixed, floor, adaptive",
        ),
        (dict(interval_floor=0.0), "interval_floor = 0.0: expected a number above 0 and at most 1"),
        (dict(interval_floor=1.5), "interval_floor = 1.5: expected a number above 0 and at most 1"),
        (
            dict(interval_halflife_images=0.0),
            "interval_halflife_images = 0.0: expected a number above 0",
        ),
    ],
)
def test_a_rule_that_makes_no_sense_names_its_key(change, message):
    with pytest.raises(DmfError, match=f"config.curriculum.{message}"):
        check(parse(merged(TINY, curriculum=change)), 10, 1352)


# --- adaptive: the mathematics --------------------------------------------------------------------


def test_the_share_is_rho_times_the_ratio_of_the_rows_bin_within_its_bounds():
    sums = np.zeros((2, BINS, BINS), np.float32)
    r, t = np.float32([0.1, 0.1, 0.3, 0.0, 0.6]), np.float32([0.3, 0.9, 0.4, 1.0, 0.7])
    sums[:, 2, 1] = 3.0, 2.0  # t = .3, t - r = .2
    sums[:, 7, 6] = 1.0, 100.0  # t = .9, t - r = .8: too small a ratio
    sums[:, 3, 0] = -5.0, 1.0  # t = .4, t - r = .1: a negative one
    sums[:, 7, 7] = 1e9, 1.0  # t = 1, r = 0: too large a one
    found = intervals.share(np.float32(0.25), r, t, jnp.asarray(sums), 0.125)
    np.testing.assert_allclose(
        found, [0.375, 0.25 / 8, 0.25 / 8, 1.0, 0.25], rtol=1e-6
    )  # the last bin is empty


def test_the_table_sums_rows_by_bin_discounts_the_bins_it_sees_and_leaves_the_others(rng):
    t = rng.uniform(0, 1, 500).astype(np.float32)
    r = np.where(np.arange(500) % 5 == 0, t, t * rng.uniform(0, 1, 500)).astype(
        np.float32
    )  # every fifth row has r = t
    products = rng.normal(size=(500, 2)).astype(np.float32)
    products[:, 1] **= 2
    expected = np.zeros((2, BINS, BINS))
    for i in range(500):
        if r[i] < t[i]:
            expected[:, int(t[i] * BINS), int((t[i] - r[i]) * BINS)] += products[i] / 500
    seen = intervals.tally(r, t, jnp.asarray(products))
    np.testing.assert_allclose(seen, expected, atol=1e-6)
    assert 20 < (expected[1] > 0).sum() <= BINS * (BINS + 1) / 2
    before = rng.uniform(1, 2, (2, BINS, BINS)).astype(np.float32)
    after = np.asarray(intervals.update(jnp.asarray(before), seen, 0.75))
    hit = np.broadcast_to(expected[1] > 0, before.shape)
    np.testing.assert_array_equal(after[~hit], before[~hit])
    np.testing.assert_allclose(after[hit], (0.75 * before + expected)[hit], rtol=1e-5)


@pytest.mark.parametrize("to_data", [True, False])
def test_the_rule_is_the_step_that_adcm_minimises_for_one_time_and_for_two(float64, to_data):
    # ADCM: E|f - f'|^2 + lambda E|f' - z_r|^2 with f' = f - D Df/dt and f = z - (t - r) u.
    # With r = 0 it is the published rule.
    net, params = random_net(jax.random.key(0))
    x, e = jax.random.normal(jax.random.key(1), (2, 64, 8))
    t, r = jnp.full(64, 0.8), jnp.full(64, 0.0 if to_data else 0.3)
    rows, rho = Rows(0.2 * x + 0.8 * e, r, t, e - x), 0.2
    L, weight = t[0] - r[0], rho / (1 - rho)

    def f(z, t):
        return z - (t - r)[:, None] * net(params, rows._replace(z=z, t=t))

    now, slope = jax.jvp(f, (rows.z, t), (rows.v, jnp.ones(64)))
    goal = x if to_data else rows.z - L * rows.v

    def cost(step):
        return jnp.sum((step * slope) ** 2) + weight * jnp.sum((now - step * slope - goal) ** 2)

    a, b, c = cost(-1.0), cost(0.0), cost(1.0)  # a parabola in the step
    least = (a - c) / (2 * (a - 2 * b + c))
    fine = lambda rho, r, t: jnp.full(64, 1e-7)  # noqa: E731
    found = residuals(
        "discrete", net, params, rows, RowSplit(64, 1, 1), rho, fine, LossConfig(product_rule=0.5)
    )
    share = intervals.share(rho, r, t, intervals.tally(r, t, found.products), 1e-9)
    assert 0 < float(share[0]) < 1 and float(share[0]) * L == pytest.approx(float(least), rel=1e-5)


@pytest.mark.parametrize(("s", "r", "t"), [(0.5, 0.0, 0.99), (0.5, 0.2, 0.7), (2.0, 0.1, 0.9)])
def test_for_gaussian_data_and_the_exact_solution_the_ratio_is_that_of_the_spreads(
    float64, s, r, t
):
    # f = z std_r / std_t, so e = -(std_r / std_t) (v - E[v|z]). Its mean given z is 0, and the
    # ratio is std_t / std_r.
    n = 200_000
    x, e = np.random.default_rng(0).normal(size=(2, n, 1)) * [[[s]], [[1.0]]]
    std = lambda t: jnp.sqrt((1 - t) ** 2 * s**2 + t**2)  # noqa: E731

    def net(params, rows):
        return ((1 - std(rows.r) / std(rows.t)) / (rows.t - rows.r))[:, None] * rows.z

    rows = Rows(
        jnp.asarray((1 - t) * x + t * e), jnp.full(n, r), jnp.full(n, t), jnp.asarray(e - x)
    )
    fine = lambda rho, r, t: jnp.full(n, 1e-5)  # noqa: E731
    products = residuals(
        "discrete", net, None, rows, RowSplit(n, 1, 1), 0.01, fine, LossConfig()
    ).products
    share = intervals.share(
        0.01, rows.r[:1], rows.t[:1], intervals.tally(rows.r, rows.t, products), 1e-9
    )
    assert float(share[0]) / 0.01 == pytest.approx(
        float(std(t) / std(r)), rel=0.02
    )  # 200,000 draws


# --- adaptive: the program and the run ------------------------------------------------------------


def test_a_step_fills_the_table_obeys_it_and_compiles_once():
    setup = Setup(ADAPTIVE)
    train_step, now = setup.step("discrete"), setup.state()
    tables, shares = [np.asarray(now.intervals)], []
    for n in range(3):
        now, metrics = train_step(now, setup.batch(n), setup.scalars(n, "discrete", 0.25))
        tables.append(np.asarray(now.intervals))
        shares.append(float(metrics["interval"]))
    assert (tables[0] == 0).all() and (tables[1][1] > 0).any() and (tables[1] != tables[2]).any()
    assert shares[0] == 0.25 and shares[1] != 0.25
    told = dataclasses.replace(setup.state(), intervals=jnp.ones((2, BINS, BINS)).at[0].set(2.0))
    told = jax.device_put(told, sharding.placed(setup.mesh, told))
    assert float(
        train_step(told, setup.batch(0), setup.scalars(0, "discrete", 0.25))[1]["interval"]
    ) == pytest.approx(0.5)
    assert train_step._cache_size() == 1


@pytest.mark.parametrize("kind", ["flow", "all_pairs", "jvp"])
def test_other_kinds_pass_the_table_on(kind):
    setup = Setup(ADAPTIVE)
    given = dataclasses.replace(
        setup.state(), intervals=jax.random.uniform(jax.random.key(0), (2, BINS, BINS))
    )
    expected = np.asarray(given.intervals)
    given = jax.device_put(given, sharding.placed(setup.mesh, given))
    after, metrics = setup.step(kind)(given, setup.batch(0), setup.scalars(0, kind))
    np.testing.assert_array_equal(after.intervals, expected)
    assert not {"interval", "intervals"} & set(metrics)


def test_the_table_costs_no_evaluation():
    one, other = (
        Setup(merged(TINY, network=dict(width=64), curriculum=dict(interval=name)))
        for name in ("dagger", "adaptive")
    )
    flops = [
        s.step("discrete")
        .lower(s.state(), s.batch(0), s.scalars(0, "discrete"))
        .compile()
        .cost_analysis()["flops"]
        for s in (one, other)
    ]
    assert flops[1] / flops[0] < 1.01
    assert [curriculum.passes(s.stages[2], 0.75) for s in (one, other)] == [3.75, 3.75]


def test_devices_and_microbatches_fill_the_same_table_and_share_it_by_summing_alone():
    values = merged(ADAPTIVE, batch_size=64, optimizer=dict(eps=1e-4))
    one, eight = Setup(values), Setup(merged(values, microbatches=2, mesh=dict(fsdp=2)), devices=8)
    parts = Setup(merged(values, microbatches=2), devices=8)
    for setup in (one, eight, parts):
        setup.network = linear_network()
    found = [setup.run("discrete", 3)[0].intervals for setup in (one, eight)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-5)
    assert found[1].sharding.is_fully_replicated
    compiled = (
        parts.step("discrete")
        .lower(parts.state(), parts.batch(0), parts.scalars(0, "discrete"))
        .compile()
        .as_text()
    )
    assert set(
        re.findall(
            r"\b(all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)\b", compiled
        )
    ) == {"all-reduce"}


def test_a_run_with_every_choice_at_once_resumes_in_the_same_bits(tmp_path):
    kinds = ("discrete", "guided_discrete")
    switch = dict(switch_optimizer="reset", switch_ema="reset")
    values = merged(
        ADAPTIVE,
        loss=dict(tangent="ema", residual_scale="unit", product_rule=0.5),
        curriculum=dict(
            schedule="smooth", stages=2, kinds=kinds, length=10.0, switch_warmup_steps=2, **switch
        ),
        guidance=dict(omega=1.5, kappa=0.3),
    )
    whole = resumed_ends_as_uninterrupted(values, tmp_path, (8,))
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(("interval" in row) == row["kind"].endswith("discrete") for row in rows)
    assert len({row["interval"] / row["rho"] for row in rows if "interval" in row}) == 10
    stored = orbaxfile.read_leaf(
        whole / "checkpoints" / "14", "intervals", (), (2, BINS, BINS), np.float32
    )
    assert (stored[1] > 0).sum() > 10


def test_a_checkpoint_without_a_table_loads_where_none_is_wanted_and_is_refused_where_one_is(
    tmp_path,
):
    plain, with_table = Setup(), Setup(ADAPTIVE)
    for name, setup, items in (("old", plain, set()), ("new", with_table, {"intervals"})):
        store = checkpoint.Checkpoints(tmp_path / name, 2, [], {"config": {}})
        given = setup.state()
        if items:
            given = dataclasses.replace(
                given, intervals=jax.random.uniform(jax.random.key(0), (2, BINS, BINS))
            )
            given = jax.device_put(given, sharding.placed(setup.mesh, given))
        store.save(7, given)
        found = {p.name for p in (tmp_path / name / "checkpoints" / "7").iterdir() if p.is_dir()}
        assert found == {
            *checkpoint.ITEMS,
            *items,
        }  # of other runs a folder is what it was before there were tables
        back = store.restore_latest(setup.state())
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(given), strict=True):
            np.testing.assert_array_equal(a, b)
        assert isinstance(back.intervals, tuple) == (not items)
        store.close()
    store = checkpoint.Checkpoints(tmp_path / "old", 2, [], {"config": {}})
    with pytest.raises(DmfError, match="none of the checkpoints of steps"):
        store.restore_latest(with_table.state())
    store.close()


def test_a_plan_lowers_the_adaptive_step_and_tells_it_from_others(monkeypatch):
    monkeypatch.setattr(topologies, "libtpu_version", lambda: "any")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    config = parse(ADAPTIVE)
    tpu_plan.lower(config, mesh, "discrete", (8, 8, 1))
    found = {
        tpu_plan._about(
            parse(merged(TINY, curriculum=dict(interval=name))), "", "", "", mesh, "discrete"
        )["program"]
        for name in intervals.RULES
    }
    assert len(found) == len(intervals.RULES)
