"""The identity in the end time: its exact solution, its limits, and where its gradient flows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.method.flow import Rows, RowSplit
from dmf.method.intervals import linear
from tests.method.test_objectives import (
    ALL_PAIRS,
    RAW,
    distance,
    exact_rows,
    flow_coefficient,
    gradient,
    random_net,
    random_rows,
)
from tests.tiny import residuals

BOTH = pytest.mark.parametrize("kind", ["terminal", "lagrangian"])


def exact(s):
    """The exact average velocity of data N(0, s^2), also for r = t, and rows to try it on."""
    _, rows = exact_rows(s)
    std = lambda t: jnp.sqrt((1 - t) ** 2 * s**2 + t**2)  # noqa: E731

    def net(params, rows):
        length = rows.t - rows.r
        apart = (1 - std(rows.r) / std(rows.t)) / jnp.where(length > 0, length, 1)
        return jnp.where(length > 0, apart, flow_coefficient(rows.t, s))[:, None] * rows.z

    return net, rows


@BOTH
def test_the_exact_average_velocity_solves_the_identity_in_the_end_time(float64, kind):
    net, rows = exact(0.5)
    found = residuals(kind, net, None, rows, ALL_PAIRS(64), None, linear, RAW).pairs
    assert float(jnp.abs(found).max()) < 1e-13
    wrong = lambda params, rows: 1.1 * net(params, rows)  # noqa: E731
    off = residuals(kind, wrong, None, rows, ALL_PAIRS(64), None, linear, RAW).pairs
    assert float(jnp.abs(off).max()) > 0.01


@BOTH
def test_a_row_whose_r_falls_on_t_is_flow_matching(float64, kind):
    net, params = random_net(jax.random.key(0))
    rows = random_rows()
    rows = rows._replace(r=rows.t)
    expected = net(params, rows) - rows.v
    for split, part in ((ALL_PAIRS(32), lambda e: e), (RowSplit(32, 4, 3), None)):
        found = residuals(kind, net, params, rows, split, None, linear, RAW)
        np.testing.assert_allclose(found.pairs, (part or split.pairs_of)(expected), atol=1e-14)
        if part is None:
            np.testing.assert_allclose(found.border, split.border_of(expected), atol=1e-14)


def test_the_gradient_stops_at_the_end_point_and_in_one_kind_at_the_derivative(float64):
    net, params = random_net(jax.random.key(0))
    rows = random_rows()
    length = (rows.t - rows.r)[:, None]

    def moved(params):
        """The derivative of the end point by r, by central differences."""
        at = lambda d: net(params, rows._replace(r=rows.r + d))  # noqa: E731
        return net(params, rows) - length * (at(1e-5) - at(-1e-5)) / 2e-5

    end = Rows(rows.z - length * net(params, rows), rows.r, rows.r, rows.v)
    target = net(params, end)
    through = lambda p: jnp.sum((moved(p) - target) ** 2) / 32  # noqa: E731
    stopped = net(params, rows) - (moved(params) - target)
    held = lambda p: jnp.sum((net(p, rows) - stopped) ** 2) / 32  # noqa: E731
    flat = lambda loss: jnp.concatenate(  # noqa: E731
        [g.ravel() for g in jax.tree.leaves(jax.grad(loss)(params))]
    )
    for kind, loss, other in (("lagrangian", through, held), ("terminal", held, through)):
        found = gradient(kind, net, params, rows, ALL_PAIRS(32), None, RAW)
        assert distance(found, flat(loss)) < 1e-7 and distance(found, flat(other)) > 0.01
