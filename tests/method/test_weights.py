"""The weight of a row: what it sees, and that no gradient passes through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.method.weights import LOG_VARIANCES, adaptive, learned_loss, weighted_loss

R, T = jnp.array([0.0, 0.2, 0.5]), jnp.array([0.4, 0.9, 0.5])
E = jnp.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]])
SQUARES = np.array([5.0, 1.25, 9.0])


def test_a_weight_sees_error_times_and_progress():
    weight = lambda s, r, t, progress, a: a * s * (t - r) + progress  # noqa: E731
    loss, squares = weighted_loss(E, R, T, 0.25, weight)
    np.testing.assert_allclose(squares, SQUARES, rtol=1e-6)
    np.testing.assert_allclose(loss, SQUARES * (SQUARES * np.array(T - R) + 0.25), rtol=1e-6)


def test_no_gradient_passes_through_a_weight():
    weight = lambda s, r, t, progress, a: s**2 + t  # noqa: E731
    found = jax.grad(lambda e: jnp.sum(weighted_loss(e, R, T, 0.0, weight)[0]))(E)
    expected = 2 * np.array(E) * (SQUARES**2 + np.array(T))[:, None]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.75])
def test_the_adaptive_weight_is_a_power_of_the_error_alone(p):
    found = adaptive(p, 1e-3)(jnp.asarray(SQUARES), R, T, jnp.array(0.5), jnp.ones(3))
    np.testing.assert_allclose(found, (SQUARES + 1e-3) ** -p, rtol=1e-6)


M = jnp.array([0.03, 1.0, 7.0])


def test_the_papers_learned_scale_is_stationary_at_the_error_and_the_released_one_nowhere():
    """In lv, at lv = log m: 0 and c / (1 + c). In m, there: 1 / (2 m) and 1 / ((1 + c) m)."""
    slopes = {
        form: [jax.vmap(jax.grad(LOG_VARIANCES[form], i))(M, jnp.log(M)) for i in (0, 1)]
        for form in ("paper", "released")
    }
    np.testing.assert_allclose(slopes["paper"][1], 0, atol=1e-7)
    np.testing.assert_allclose(slopes["released"][1], 0.01 / 1.01, rtol=1e-5)
    np.testing.assert_allclose(slopes["paper"][0], 1 / (2 * M), rtol=1e-6)
    np.testing.assert_allclose(slopes["released"][0], 1 / (1.01 * M), rtol=1e-6)
    far = jax.vmap(jax.grad(LOG_VARIANCES["released"], 1), (0, None))(M, -500.0)
    assert np.isfinite(far).all() and (far >= 0).all()


def test_with_the_scale_frozen_at_one_the_released_loss_is_the_logarithm_of_the_error():
    loss, squares = learned_loss(E, jnp.zeros(3), "released")
    np.testing.assert_allclose(squares, SQUARES, rtol=1e-6)
    np.testing.assert_allclose(loss, np.log(SQUARES / 2 + 0.01), rtol=1e-6)
    paper, _ = learned_loss(E, jnp.log(jnp.array([2.0, 3.0, 4.0])), "paper")
    scale = np.array([2.0, 3.0, 4.0])
    np.testing.assert_allclose(paper, np.log1p(SQUARES / 2 / scale) + np.log(scale) / 2, rtol=1e-6)
