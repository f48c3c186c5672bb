"""Samplers against the exact flow of Gaussian data, which is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.errors import DmfError
from dmf.method.samplers import (
    SAMPLERS,
    TIMES,
    euler,
    few_step,
    gamma,
    heun,
    one_step,
    restart,
)

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


def keys_of(rows, seed=0):
    return jax.random.split(jax.random.key(seed), rows)


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
        more = {"keys": keys_of(len(noise))} if sampler.fresh_noise else {}
        sampler.draw(counted, noise, 3, **more)
    assert len(calls) == 3 * sampler.evaluations
    inside = jax.jit(lambda e, n: sampler.draw(velocity, e, n, **more))
    if sampler.on_host:  # it loops over a number, which a program does not know while it is traced
        with pytest.raises(jax.errors.ConcretizationTypeError):
            inside(noise, 3)
    else:
        np.testing.assert_allclose(
            inside(noise, 3), sampler.draw(velocity, noise, 3, **more), rtol=1e-12
        )


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


def exact_at_zero(z, r, t):
    """The exact average velocity where all data are 0: z_t = t e, so u = e = z / t for every r."""
    return z / t[:, None]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_fresh_noise_keeps_the_standard_deviation_of_the_time(share):
    """On one-point data the state that a step reaches has the standard deviation t' exactly."""
    seen, rows, wide = [], 64, 512
    e = jax.random.normal(jax.random.key(1), (rows, wide))

    def watched(z, r, t):
        seen.append((float(t[0]), z))
        return exact_at_zero(z, r, t)

    with jax.disable_jit():
        x = gamma(watched, e, 4, keys=keys_of(rows), share=share)
    assert [t for t, _ in seen] == [1.0, 0.75, 0.5, 0.25]
    for t, z in seen:
        assert float(jnp.std(z)) == pytest.approx(t, rel=0.02)  # of 32,768 draws
    np.testing.assert_allclose(x, 0, atol=1e-6)


def test_no_share_of_fresh_noise_is_few_steps_and_the_whole_is_a_restart(noise):
    keys = keys_of(len(noise))
    np.testing.assert_allclose(
        gamma(average, noise, 5, keys=keys, share=0.0), few_step(average, noise, 5), rtol=1e-12
    )
    found = restart(average, noise, 3, keys=keys)
    z = noise
    for i, s in enumerate((2 / 3, 1 / 3, 0.0)):
        t = jnp.full(len(z), 1 - i / 3)
        draws = [jax.random.normal(jax.random.fold_in(k, i), (3,), z.dtype) for k in keys]
        z = (1 - s) * (z - t[:, None] * average(z, 0 * t, t)) + s * jnp.stack(draws)
    np.testing.assert_allclose(found, z, rtol=1e-6)  # the program has its times in float32


@pytest.mark.parametrize("name", ["restart", "gamma"])
def test_the_fresh_noise_of_a_row_depends_on_its_key_alone(noise, name):
    keys, draw = keys_of(len(noise)), SAMPLERS[name].draw
    whole = draw(average, noise, 3, keys=keys)
    np.testing.assert_allclose(draw(average, noise[2:4], 3, keys=keys[2:4]), whole[2:4], rtol=1e-12)
    assert np.abs(draw(average, noise, 3, keys=keys_of(len(noise), 1)) - whole).max() > 1e-3
    np.testing.assert_allclose(draw(average, noise, 1, keys=keys), SIGMA * noise, atol=1e-14)
