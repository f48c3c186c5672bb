"""The velocity head: a side output that is trained beside u and may be the tangent's source."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import step
from dmf.config import parse
from dmf.method.flow import VELOCITY, Rows, RowSplit
from dmf.method.weights import weighted_loss
from dmf.networks import Network
from tests.tiny import TINY, merged

SPLIT = RowSplit(8, 4, 2)
PARAMS = {"a": jnp.array(0.7), "b": jnp.array(-0.4), "head": jnp.array(0.0)}


def rows():
    rng = np.random.default_rng(5)
    t = np.array([0.9, 0.6, 0.5, 0.8, 0.7, 0.4, 0.3, 1.0])
    r = np.where(SPLIT.is_pair(), t * [0.1, 0.5, 1, 1, 0.2, 0.8, 1, 1], t)
    z, v = (jnp.asarray(rng.standard_normal((8, 2, 2, 1))) for _ in range(2))
    return Rows(z, jnp.asarray(r), jnp.asarray(t), v)


def with_sides(params, z, r, t, **_):
    """u, and beside it the head u(z, t, t) + head."""

    def u(r):
        h = (t - r).reshape(-1, 1, 1, 1)
        return params["a"] * jnp.sin(z) + params["b"] * h * jnp.cos(z)

    return u(r), {VELOCITY: u(t) + params["head"]}


NETWORK = Network(None, lambda *a, **k: with_sides(*a, **k)[0], with_sides, sides=(VELOCITY,))
PLAIN = NETWORK._replace(sides=())


def config(tangent="own", layout="split"):
    return parse(merged(TINY, batch_size=8, rows=layout, loss=dict(tangent=tangent, p=0.5)))


def loss(params, kind, network, tangent="own", layout="split"):
    # The check that a network of the config has a head stands in dmf.config, not here.
    how = dict(kind=kind, network=network, split=SPLIT)
    return step.stage_loss(params, rows(), 0.25, config=config(tangent, layout), **how)


@pytest.mark.parametrize("kind", ["flow", "all_pairs", "discrete", "central", "jvp"])
def test_an_exact_head_is_the_boundary_form_and_adds_its_own_loss(float64, kind):
    total, found = loss(PARAMS, kind, NETWORK, "head")
    boundary, without = loss(PARAMS, kind, PLAIN)
    for name in ("squares_border", "squares_pairs"):
        np.testing.assert_allclose(found[name], without[name], rtol=1e-14)
    here = rows()
    e = with_sides(PARAMS, here.z, here.r, here.t)[1][VELOCITY] - here.v
    own, squares = weighted_loss(e, here.r, here.t, 0.0, config().loss.of_row(config().times))
    np.testing.assert_allclose(total, boundary + own.mean(), rtol=1e-14)
    found_squares = found["squares_head_border"] + found["squares_head_pairs"]
    np.testing.assert_allclose(found_squares / 2, squares.mean(), rtol=1e-14)


@pytest.mark.parametrize("kind", ["discrete", "jvp"])
def test_the_head_learns_through_its_own_loss_alone_and_u_not_through_the_tangent(float64, kind):
    params = PARAMS | {"head": jnp.array(0.3)}
    found = jax.grad(lambda p: loss(p, kind, NETWORK, "head")[0])(params)
    here = rows()

    def own(params, free):
        side = with_sides({**params, **free}, here.z, here.r, here.t)[1][VELOCITY]
        return weighted_loss(
            side - here.v, here.r, here.t, 0.0, config().loss.of_row(config().times)
        )[0].mean()

    of_head = jax.grad(partial(own, params))({"head": params["head"]})
    np.testing.assert_allclose(found["head"], of_head["head"], rtol=1e-13)
    # Another head moves the direction, so the residuals of the pairs change.
    _, moved = loss(params, kind, NETWORK, "head")
    _, still = loss(PARAMS, kind, NETWORK, "head")
    assert abs(moved["squares_pairs"] - still["squares_pairs"]) > 1e-4


@pytest.mark.parametrize("layout", ["joint", "whole"])
@pytest.mark.parametrize("kind", ["discrete", "jvp"])
def test_every_layout_trains_the_head_as_the_default_does(float64, kind, layout):
    def found(layout):
        return jax.value_and_grad(lambda p: loss(p, kind, NETWORK, "head", layout), has_aux=True)(
            PARAMS | {"head": jnp.array(0.3)}
        )

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), found(layout), found("split"))
