"""The weight of a row: what it sees, and that no gradient passes through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.method.weights import adaptive, weighted_loss

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
