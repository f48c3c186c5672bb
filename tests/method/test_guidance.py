"""Guided stages: the target against one computed by hand, its evaluations, its cost, whole runs."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import step
from dmf.config import parse
from dmf.errors import DmfError
from dmf.method import guidance, objectives
from dmf.method.flow import Condition, Rows, RowSplit
from dmf.method.guidance import GuidanceConfig, guided_velocity
from dmf.networks import Network
from tests.test_step import largest_difference
from tests.tiny import TINY, merged

NULL, RHO = 10, 0.25
STRENGTH = dict(omega=0.6, kappa=0.7, t_start=0.25, t_end=0.75)
KINDS = ("guided_discrete", "guided_jvp")
GUIDED = merged(TINY, guidance=STRENGTH, curriculum=dict(stages=2, kinds=KINDS, interval="linear"))
RUN = merged(
    TINY,
    guidance=STRENGTH,
    curriculum=dict(kinds=("all_pairs", "discrete", "jvp", "guided_jvp"), pretrain_length=0.0),
)


# --- by hand: u = E[label] tanh(b z + c (t - r) + d t) + g z, times the row's mask in training ---


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
