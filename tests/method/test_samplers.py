"""Samplers against the exact flow of Gaussian data, which is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.errors import DmfError
from dmf.method.samplers import SAMPLERS, TIMES, euler, few_step, heun, one_step

SIGMA = 0.4


def std(t):
    return jnp.sqrt((1 - t) ** 2 * SIGMA**2 + t**2)


def velocity(z, r, t):
    """v(z, t) = s'(t) / s(t) z for data N(0, SIGMA^2)."""
    return ((t - (1 - t) * SIGMA**2) / std(t) ** 2)[:, None] * z


def average(z, r, t):
    """The exact average velocity: the flow map multiplies by s(r) / s(t)."""
    return ((1 - std(r) / std(t)) / jnp.where(t > r, t - r, 1))[:, None] * z


@pytest.fixture
def noise(rng, float64):
    return jnp.asarray(rng.normal(size=(6, 3)))


@pytest.mark.parametrize("steps", [1, 2, 3, 32])
def test_an_exact_average_velocity_gives_the_exact_sample_in_any_number_of_steps(noise, steps):
    np.testing.assert_allclose(few_step(average, noise, steps), SIGMA * noise, atol=1e-14)


def test_one_step_is_e_minus_u_at_exactly_zero_and_one(noise):
    seen = []
    x = one_step(lambda z, r, t: seen.append((r, t)) or 2 * z, noise)
    np.testing.assert_array_equal(x, -noise)
    np.testing.assert_array_equal(seen[0][0], 0.0)
    np.testing.assert_array_equal(seen[0][1], 1.0)
    np.testing.assert_array_equal(few_step(average, noise, 1), one_step(average, noise))


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(noise, sampler, order):
    errors = [
        float(jnp.abs(sampler(velocity, noise, n) - SIGMA * noise).max()) for n in (64, 128, 256)
    ]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert np.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_a_flow_model_is_sampled_alike_by_its_average_and_by_euler(noise):
    np.testing.assert_array_equal(few_step(velocity, noise, 5), euler(velocity, noise, 5))


def test_no_steps_is_an_error(noise):
    with pytest.raises(DmfError, match="sampling steps = 0: expected at least 1"):
        euler(velocity, noise, 0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_table_knows_cost_and_place_of_every_sampler(noise, name):
    sampler, calls = SAMPLERS[name], []

    def counted(z, r, t):
        calls.append(isinstance(z, jax.core.Tracer))
        return velocity(z, r, t)

    with jax.disable_jit():
        sampler.draw(counted, noise, 3)
    assert len(calls) == 3 * sampler.evaluations
    inside = jax.jit(lambda e, n: sampler.draw(velocity, e, n))
    if sampler.on_host:  # it loops over a number, which a program does not know while it is traced
        with pytest.raises(jax.errors.ConcretizationTypeError):
            inside(noise, 3)
    else:
        np.testing.assert_allclose(inside(noise, 3), sampler.draw(velocity, noise, 3), rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_loop_on_the_host_draws_the_samples_of_the_program(noise, steps):
    found = SAMPLERS["few_step_on_host"].draw(jax.jit(velocity), noise, steps)
    np.testing.assert_allclose(found, few_step(velocity, noise, steps), rtol=1e-12)


def test_every_spacing_runs_from_one_to_zero_and_has_its_published_times():
    for times in TIMES.values():
        for n in (1, 2, 5):
            t = np.array([float(times(i, n)) for i in range(n + 1)])
            assert t[0] == 1 and t[-1] == 0 and (np.diff(t) < 0).all()
    np.testing.assert_allclose(float(TIMES["shifted"](1, 2)), 0.75)  # 3 / 2 / (1 + 2 / 2)
    # EDM's second of three levels: ((80^(1/7) + 0.002^(1/7)) / 2)^7.
    sigma = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    np.testing.assert_allclose(float(TIMES["edm"](1, 3)), sigma / (1 + sigma), rtol=1e-5)
