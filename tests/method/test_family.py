"""Oracles of the published relatives: weights, times, maps, the split, mixed tangents, and parity.

tests/golden/family_losses.npz holds losses and gradients of public PyTorch code on the network and
the draws of mlp_meanflow_losses.npz, in float64: SoFlow 3b60d60, alpha-Flow b0fef77, ECT 2870411.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from dmf.config import check, parse
from dmf.errors import DmfError
from dmf.method import flow, weights
from dmf.method.curriculum import CurriculumConfig, build_stages, rho_at
from dmf.method.flow import TIME_LAWS, Rows, RowSplit, TimeLaw, row_split
from dmf.method.intervals import INTERVALS, fixed, linear, middle_share
from dmf.method.objectives import LossConfig, shift_back
from dmf.method.velocity import along_own
from dmf.method.weights import weighted_loss
from tests.method.test_objectives import (
    ALL_PAIRS,
    distance,
    exact_rows,
    flow_coefficient,
    mlp,
    random_net,
    random_rows,
)
from tests.tiny import TINY, Setup, merged, residuals

__all__ = ["mlp"]  # a fixture of test_objectives
C0 = LossConfig(product_rule=0.0)
LAWS = {
    **TIME_LAWS,
    "zero": TimeLaw("zero", -1.1, 2.0),
    "uniform": TimeLaw("sorted", base="uniform"),
    "min_uniform": TimeLaw("min", base="uniform"),
}

# --- weights of the times -------------------------------------------------------------------------


SHIFTED = {"dyadic": TimeLaw("dyadic", base="uniform", shift=3.0)}  # its t is no draw


@pytest.mark.parametrize("name", [*LAWS, *SHIFTED])
def test_the_progressive_weight_has_mean_one_at_every_progress(name):
    law = {**LAWS, **SHIFTED}[name]
    split = row_split(400_000, 1.0)
    r, t = (np.asarray(x, np.float64) for x in flow.draw_times(jax.random.key(0), law, split))
    r, t = r[r < t], t[r < t]
    rate = 1 / (1 - law.mean_interval())
    for power in (1.0, 2.0):
        factor = weights.progressive(rate, power)
        for progress in (0.0, 0.3, 0.9):
            assert np.mean(factor(r, t, progress)) == pytest.approx(1, abs=2e-3)
        np.testing.assert_allclose(factor(r, t, 0.0), rate * (1 - (t - r)), rtol=1e-12)
        np.testing.assert_allclose(factor(r, t, 1.0), 1, rtol=1e-12)


def test_lambda_of_the_known_laws():
    # Addendum 1.4; an independent replication printed 1.3046 for the first.
    found = [1 / (1 - TIME_LAWS[n].mean_interval()) for n in ("imagenet", "cifar_v0")]
    found += [1 / (1 - x.mean_interval()) for x in (TIME_LAWS["cifar_v1"],)]
    np.testing.assert_allclose(found, [1.3046, 1.347, 1.619], atol=1e-3)


@pytest.mark.parametrize(
    ("mean", "std", "factor", "factor_vp"),
    [(-0.4, 1.0, 4.2533, 2.3760), (-2.0, 2.0, 8.7092, 5.1398), (-0.6, 1.6, 5.8436, 3.3410)],
)
def test_min_snr_in_velocity_form_and_the_factors_that_make_its_mean_one(
    mean, std, factor, factor_vp
):
    alpha = lambda t: weights.min_snr(1.0, 5.0)(t, t, 0.0)  # noqa: E731
    snr = lambda t: ((1 - t) / t) ** 2  # noqa: E731
    vp = lambda t: jnp.minimum(snr(t), 5.0) / (snr(t) + 1)  # noqa: E731
    t = np.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(alpha(t), vp(t) * ((1 - t) ** 2 + t**2), rtol=1e-5)
    assert float(alpha(1 / (1 + 5**0.5))) == pytest.approx(0.477, abs=1e-3)
    law = TimeLaw("min", mean, std)
    assert 1 / law.mean_on_border(alpha) == pytest.approx(factor, rel=5e-4)
    assert 1 / law.mean_on_border(vp) == pytest.approx(factor_vp, rel=5e-4)


@pytest.mark.parametrize(
    "law",
    [
        TIME_LAWS["imagenet"],
        TIME_LAWS["cifar_v1"],
        TimeLaw(border="own", border_mean=0.7),
        TimeLaw(base="uniform"),
    ],
)
def test_the_factor_of_the_border_has_mean_one_under_the_law_that_is_drawn(law):
    law = dataclasses.replace(law, r_neq_t_fraction=0.0)
    r, t = flow.draw_times(jax.random.key(1), law, row_split(400_000, 0.0))
    weight = LossConfig(p=0.0, border_weight="min_snr").of_row(law)
    one = jnp.ones_like(t)
    assert float(jnp.mean(weight(one, r, t, jnp.zeros(()), one))) == pytest.approx(1, abs=3e-3)


def test_a_factor_counts_after_the_adaptive_weight_and_would_be_lost_before_it(float64):
    e, t = jax.random.normal(jax.random.key(0), (8, 5)), jnp.linspace(0.1, 0.9, 8)
    plain = LossConfig(p=1.0, eps=1e-30)
    both = dataclasses.replace(plain, interval_weight="progressive", border_weight="min_snr")
    law = TIME_LAWS["imagenet"]

    def grad(config, r, scale=1.0):
        weight = config.of_row(law)
        return jax.grad(lambda e: weighted_loss(scale * e, r, t, 0.0, weight)[0].sum())(e)

    before = grad(plain, 0 * t, jnp.arange(1.0, 9.0)[:, None])
    np.testing.assert_allclose(before, grad(plain, 0 * t), rtol=1e-12)
    rate = 1 / (1 - law.mean_interval())
    expected = grad(plain, 0 * t) * (rate * (1 - t))[:, None]
    np.testing.assert_allclose(grad(both, 0 * t), expected, rtol=1e-9)
    shape = (grad(both, t) / grad(plain, t))[:, 0]
    alpha = jnp.minimum((1 - t) ** 2, 5 * t**2)
    np.testing.assert_allclose(shape / shape[0], alpha / alpha[0], rtol=1e-9)


# --- paced times ----------------------------------------------------------------------------------

PACED = TimeLaw("min", r_neq_t_fraction=0.5, difficulty_clusters=20, difficulty_share=0.25)


@pytest.mark.parametrize(
    ("pairing", "how"),
    [
        ("min", {}),
        ("sorted", {}),
        ("sorted", dict(border="own", border_mean=-0.4)),
        ("min", dict(base="uniform")),
    ],
)
def test_paced_times_are_the_restricted_law_and_at_last_the_base_law_draw_for_draw(pairing, how):
    law, split = dataclasses.replace(PACED, pairing=pairing, **how), row_split(4000, 0.5)
    base = dataclasses.replace(law, difficulty_clusters=0)

    def draw(law, progress):
        return flow.draw_times(jax.random.key(3), law, split, progress)

    r, t = draw(base, 1.0)
    border = ~np.asarray(split.is_pair())

    def exceeding(t):
        one = norm.sf((np.log(t / (1 - t)) - law.t_mean) / law.t_std)
        one = 1 - t if law.base == "uniform" else one
        return 1 - (1 - one) ** 2 if pairing == "sorted" and not how else one

    for n in (1, 10, 19, 20):
        found_r, found_t = draw(law, np.float32((n - 1) * 0.25 / 20))
        np.testing.assert_array_equal(found_r[~border], r[~border])
        np.testing.assert_array_equal(found_t[~border], t[~border])
        np.testing.assert_array_equal(found_r[border], found_t[border])
        mine, low = np.asarray(found_t, np.float64)[border], 1 - n / 20
        if n == 20:
            np.testing.assert_array_equal(found_t, t)
            continue
        assert mine.min() >= np.float32(low) and mine.max() < 1
        # The rank of each draw stays, also in the tail of 4e-4 beyond t = .95.
        of_base = exceeding(np.asarray(t, np.float64)[border])
        share = exceeding(mine) / exceeding(np.array(low))
        near = mine < 0.998  # beyond, float32 itself rounds t
        np.testing.assert_allclose(share[near], of_base[near], rtol=5e-3)
        assert len(set(mine)) > 1900


def test_flow_matching_alone_draws_all_times_and_a_step_passes_its_progress_on():
    law = dataclasses.replace(PACED, r_neq_t_fraction=0.0)
    _, t = flow.draw_times(jax.random.key(3), law, row_split(64, 0.0), 0.0)
    assert float(t.min()) < 0.5
    setup, seen = Setup(merged(TINY, times=dict(difficulty_clusters=4))), []
    draw = flow.draw_times
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "draw_times", lambda *args: (seen.append(args[3]), draw(*args))[1])
        now = jax.eval_shape(setup.state)
        jax.eval_shape(setup.step("discrete"), now, setup.batch(0), setup.scalars(0, "discrete"))
    assert isinstance(seen[0], jax.Array)  # traced, not a constant


# --- intervals and schedules ----------------------------------------------------------------------


@pytest.mark.parametrize("stage", range(8))
@pytest.mark.parametrize(("rule", "name"), [("dagger", "const"), ("sigmoid", "sigmoid")])
def test_ects_maps_are_intervals_at_r_zero(float64, golden, rule, name, stage):
    d = golden("family_losses.npz")
    sigma = d["ect_map/t"]
    t = sigma / (1 + sigma)
    back = t * (1 - INTERVALS[rule](2.0 ** -(stage + 1), 0 * t, t))
    expected = d[f"ect_map/{name}/r_stage{stage}"]
    np.testing.assert_allclose(back / (1 - back), expected, rtol=2e-6, atol=1e-7)


def test_a_fixed_step_is_a_time_and_at_the_whole_interval_gives_v_without_correction(float64):
    net, params = random_net(jax.random.key(0))
    rows = random_rows()
    a = fixed(0.1, rows.r, rows.t)
    wide = np.asarray(rows.t - rows.r > 0.1)
    np.testing.assert_allclose((a * (rows.t - rows.r))[wide], 0.1, rtol=1e-12)
    np.testing.assert_array_equal(a[~wide], 1)
    u, at_r = net(params, rows), net(params, shift_back(rows, jnp.ones(32)))
    for c, target in ((0.0, rows.v), (1.0, (rows.v + at_r) / 2)):
        loss = LossConfig(product_rule=c)
        found = residuals("discrete", net, params, rows, ALL_PAIRS(32), 2.0, fixed, loss)
        np.testing.assert_allclose(found.pairs, u - target, atol=1e-13)


@pytest.mark.parametrize(
    ("schedule", "ends", "formula"),
    [
        ("smooth", (1.0, 0.0003125), lambda x: 0.0003125**x),
        ("smooth", (0.02, 0.02), lambda x: 0.02),
        ("sigmoid", (0.9, 0.1), lambda x: 1 / (1 + np.exp((2 * x - 1) * np.log(9)))),
    ],
)
def test_a_schedule_runs_from_end_to_end_over_all_discrete_steps(schedule, ends, formula):
    kinds = ("discrete", "all_pairs", "discrete")
    config = CurriculumConfig(3, kinds, schedule=schedule, ends=ends, length=303.0)
    stages = build_stages(config, 8, 1000)
    told = [rho_at(s, n) for s in (stages[0], stages[2]) for n in range(s.first, s.last)]
    np.testing.assert_allclose(told, [formula(n / 201) for n in range(202)], rtol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "ends"),
    [("steps", (0.5, 0.1)), ("smooth", (0.5,)), ("sigmoid", (1.0, 0.1))],
)
def test_ends_that_fit_no_schedule_name_their_key(schedule, ends):
    config = CurriculumConfig(1, ("discrete",), schedule=schedule, ends=ends, length=9.0)
    with pytest.raises(Exception, match="config.curriculum.ends = .* expected"):
        build_stages(config, 8, 1000)


# --- the split ------------------------------------------------------------------------------------


def keyed(rows):
    return rows._replace(keys=jax.random.split(jax.random.key(9), len(rows.t)))


def test_the_split_is_additive_for_the_exact_map_and_blind_to_a_constant(float64):
    net, rows = exact_rows(0.5)
    rows = keyed(rows)
    found = residuals("split", net, None, rows, ALL_PAIRS(64), None, linear, C0)
    assert float(jnp.abs(found.pairs).max()) < 1e-13
    assert 0 < float(found.share.min()) < 0.1 and 0.9 < float(found.share.max()) < 1
    border, rows = (
        RowSplit(64, 4, 2),
        rows._replace(r=jnp.where(jnp.arange(64) % 4 < 2, 0.0, rows.t)),
    )
    constant = lambda params, rows: jnp.full_like(rows.z, 0.7)  # noqa: E731
    found = residuals("split", constant, None, rows, border, None, linear, C0)
    assert float(jnp.abs(found.pairs).max()) < 1e-15 and float(jnp.abs(found.border).min()) > 1e-3


@pytest.mark.parametrize("scale", ["raw", "unit"])
def test_a_split_row_is_alpha_flows_row_with_its_own_jump(float64, scale):
    net, params = random_net(jax.random.key(0))
    rows = keyed(random_rows())
    loss = LossConfig(product_rule=0.0, residual_scale=scale)
    a = middle_share(rows)
    jump = net(params, rows._replace(r=rows.t - a * (rows.t - rows.r)))

    def total(params, kind, rows, interval):
        return jnp.sum(
            residuals(kind, net, params, rows, ALL_PAIRS(32), None, interval, loss).pairs ** 2
        )

    own = lambda rho, r, t: a  # noqa: E731
    found = jax.value_and_grad(total)(params, "split", rows, linear)
    expected = jax.value_and_grad(total)(params, "discrete", rows._replace(v=jump), own)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_a_map_that_is_right_at_r_equal_t_alone_has_a_residual(float64):
    net, rows = exact_rows(0.5)

    def wrong(params, rows):
        return net(params, rows) * (1 + 0.1 * (rows.t - rows.r))[:, None]

    found = residuals("split", wrong, None, rows, ALL_PAIRS(64), None, linear, C0)
    np.testing.assert_array_equal(found.share, 0.5)  # rows without keys
    assert float(jnp.abs(found.pairs).max()) > 1e-3


# --- a tangent and a target between v and the network's own ---------------------------------------


@pytest.mark.parametrize("kind", ["discrete", "jvp", "central"])
def test_a_mixed_tangent_has_the_data_s_and_the_own_one_as_its_ends(kind):
    net, params = random_net(jax.random.key(0))
    rows, tangent = random_rows(), along_own(net, params)

    def at(share, how):
        loss = LossConfig(tangent_data=share)
        return residuals(kind, net, params, rows, ALL_PAIRS(32), 0.25, linear, loss, how).pairs

    np.testing.assert_array_equal(at(1.0, tangent), at(0.0, None))
    own = residuals(kind, net, params, rows, ALL_PAIRS(32), 0.25, linear, LossConfig(), tangent)
    np.testing.assert_array_equal(at(0.0, tangent), own.pairs)
    assert float(jnp.abs(at(0.5, tangent) - at(0.0, tangent)).max()) > 1e-3


def test_the_gradient_is_affine_in_the_share_of_v(float64):
    net, params = random_net(jax.random.key(0))
    rows, tangent = random_rows(), along_own(net, params)

    def grad(**shares):
        loss = LossConfig(**shares)

        def total(p):
            found = residuals("jvp", net, p, rows, ALL_PAIRS(32), None, linear, loss, tangent)
            return jnp.sum(found.pairs**2)

        return jnp.concatenate([g.ravel() for g in jax.tree.leaves(jax.grad(total)(params))])

    for name in ("tangent_data", "target_data"):
        low, middle, high = (grad(**{name: share}) for share in (0.0, 0.3, 1.0))
        assert distance(middle, 0.7 * low + 0.3 * high) < 1e-12 < distance(low, high)


def test_with_the_exact_u_no_share_of_v_moves_the_mean_gradient(float64):
    # Both quadrature points of x and e have equal weight, and the residual is linear in v.
    s, n = 0.5, 16
    net, at = exact_rows(s, n)
    nodes = jnp.array([-1.0, 1.0])
    x, e = (jnp.tile(a.ravel(), n) for a in jnp.meshgrid(s * nodes, nodes))
    r, t = jnp.repeat(at.r, 4), jnp.repeat(at.t, 4)
    rows = Rows(((1 - t) * x + t * e)[:, None], r, t, (e - x)[:, None])

    def whole(p, rows):
        apart = rows.r < rows.t
        average = net(None, rows._replace(t=jnp.where(apart, rows.t, rows.t + 1)))
        instant = flow_coefficient(rows.t, s)[:, None] * rows.z
        return p * jnp.where(apart[:, None], average, instant)

    for shares in (dict(tangent_data=0.3), dict(target_data=0.4), dict(tangent_data=1.0)):
        loss = LossConfig(**shares)

        def total(p, loss=loss):
            tangent = along_own(whole, 1.0)
            how = (ALL_PAIRS(4 * n), None, linear, loss, tangent)
            found = residuals("jvp", whole, p, rows, *how).pairs
            return jnp.sum(found.reshape(n, 4) ** 2, axis=1)

        np.testing.assert_allclose(jax.jacobian(total)(1.0), 0, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "times", "message"),
    [
        (dict(tangent_data=0.5), {}, "tangent_data = 0.5 with config.loss.tangent = 'data'"),
        (dict(target_data=0.5), {}, "target_data = 0.5 with config.loss.tangent = 'data'"),
        (dict(border_weight="min_snr"), dict(difficulty_clusters=4), "border_weight = 'min_snr'"),
    ],
)
def test_choices_that_contradict_each_other_name_their_keys(loss, times, message):
    with pytest.raises(DmfError, match=f"config.loss.{message}.*expected"):
        check(parse(merged(TINY, loss=loss, times=times)), 10, 1352)


# --- public code on fixed draws -------------------------------------------------------------------


def against(golden, mlp, name, loss, rows, net, interval, factor=1.0):
    """Our mean loss per row and its gradient against the stored ones; factor: ours over theirs."""
    d, params = golden("family_losses.npz"), mlp[2]
    law = TimeLaw()

    def per_row(params):
        found = residuals(
            "discrete", net, params, rows, ALL_PAIRS(len(rows.t)), 1.0, interval, loss
        )
        how = (rows.r, rows.t, 0.0, loss.of_row(law), found.share)
        return weighted_loss(found.pairs, *how)[0]

    grad = jax.grad(lambda p: jnp.mean(per_row(p)))(params)
    for key in ("W1", "b3"):
        assert distance(grad[key], factor * d[f"{name}/grad/{key}"]) < 1e-9
    return per_row(params), d[f"{name}/loss"]


def pairs_of(mlp):
    _, net, _, rows = mlp
    return net, jax.tree.map(lambda x: x[jnp.array([0, 1, 3, 4])], rows)  # those with r < t


@pytest.mark.parametrize(("a", "clip"), [(0.3, 4.0), (0.3, 1.0), (0.005, 4.0)])
def test_alpha_flows_loss_is_that_of_its_code(float64, golden, mlp, a, clip):
    net, rows = pairs_of(mlp)
    n = rows.z[0].size  # theirs is a mean over pixels
    loss = LossConfig(1.0, n * 1e-3, 0.0, "raw", clip, weight="alpha")
    name = f"alpha_flow/a{a}_clip{clip}"
    share = lambda rho, r, t: jnp.full_like(t, a)  # noqa: E731
    found, expected = against(golden, mlp, name, loss, rows, net, share)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize(("a", "p", "eps"), [(0.1, 0.75, 1e-3), (0.002, 1.0, 1e-2)])
def test_soflows_linear_form_has_the_gradient_of_c_zero_in_unit_scale(
    float64, golden, mlp, a, p, eps
):
    net, rows = pairs_of(mlp)
    n = rows.z[0].size
    loss = LossConfig(p, n * eps, 0.0, "unit")
    share = lambda rho, r, t: jnp.full_like(t, a)  # noqa: E731
    # Their loss is half of a square, and means over pixels.
    factor = 2 * n ** (1 - p)
    against(golden, mlp, f"soflow/a{a}_p{p}_eps{eps}", loss, rows, net, share, factor)


@pytest.mark.parametrize(
    ("rule", "name", "stage"), [("dagger", "const", 1), ("sigmoid", "sigmoid", 2)]
)
def test_ects_loss_is_that_of_its_code_and_the_gradient_twice_it(
    float64, golden, mlp, rule, name, stage
):
    d, net, _, rows = mlp
    sigma = jnp.asarray(golden("family_losses.npz")["ect/sigma"])
    t = sigma / (1 + sigma)
    x, e = (jnp.asarray(d[k], jnp.float64) for k in "xe")
    z, v = flow.interpolate(x, e, t)
    rows = Rows(z, jnp.zeros_like(t), t, v)
    interval = lambda rho, r, t: INTERVALS[rule](2.0 ** -(stage + 1), r, t)  # noqa: E731
    loss = LossConfig(0.5, 1e-30, 0.0, "raw", weight="norm")
    found, expected = against(golden, mlp, f"ect/{name}{stage}", loss, rows, net, interval, 2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
