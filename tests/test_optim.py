"""Learning rate, EMAs and the optimiser as functions of the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import optim, state, step
from dmf.errors import DmfError
from dmf.method.curriculum import CurriculumConfig, build_stages
from dmf.optim import EMAConfig, OptimizerConfig

CURRICULUM = CurriculumConfig(stages=4, length=400.0, pretrain_length=100.0, length_unit="steps")
STAGES = build_stages(CURRICULUM, 10, 1000)
ADAM = OptimizerConfig(
    learning_rate=2.0,
    warmup_steps=10,
    decay_fraction=0.5,
    pretrain_learning_rate=1.0,
    pretrain_warmup_steps=0,
)


def rate(step, curriculum=CURRICULUM, **changes):
    return state.learning_rate(step, STAGES, curriculum, dataclasses.replace(ADAM, **changes))


def test_each_phase_has_its_own_rate_warm_up_and_decay():
    assert [rate(n) for n in (0, 50, 99)] == [1.0, 1.0, 1.0]
    assert [rate(n) for n in (100, 104, 109, 110, 200)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0])
    assert [rate(n) for n in (300, 400, 499)] == pytest.approx(
        [2.0, 1.0, 0.01]
    )  # linear over the last half
    assert rate(75, pretrain_decay_fraction=0.5) == pytest.approx(0.5)


def test_a_switch_may_warm_up_again_and_each_stage_has_its_factor():
    again = dataclasses.replace(
        CURRICULUM, switch_warmup_steps=4, stage_learning_rates=(1.0, 0.5, 0.25, 1.0)
    )
    at = lambda n: rate(n, again, warmup_steps=0, decay_fraction=0.0)  # noqa: E731
    assert [at(n) for n in (100, 150)] == [
        2.0,
        2.0,
    ]  # the curriculum's first stage follows its own warm-up
    assert [at(n) for n in (200, 201, 203, 299)] == [0.25, 0.5, 1.0, 1.0]
    assert [at(n) for n in (300, 399, 400, 499)] == [0.125, 0.5, 0.5, 2.0]


def test_half_life_is_a_half_life():
    config = EMAConfig((500.0, 5000.0), rampup_ratio=0.0)
    decays = state.ema_decays(50, STAGES, CURRICULUM, config, 10)
    assert decays[0] ** (500 / 10) == pytest.approx(0.5) and decays[1] ** (
        5000 / 10
    ) == pytest.approx(0.5)


def test_official_decays_as_half_lives():
    defaults = EMAConfig(rampup_ratio=0.0)
    assert state.ema_decays(0, STAGES, CURRICULUM, defaults, 1024) == pytest.approx(
        (0.999, 0.9996, 0.9999, 0.99995), abs=2e-6
    )


def test_a_young_average_is_short_and_a_reset_makes_it_young():
    config = EMAConfig((1000.0,), rampup_ratio=0.1)
    keep = [state.ema_decays(n, STAGES, CURRICULUM, config, 10)[0] for n in (0, 9, 99, 100, 299)]
    assert keep[:2] == pytest.approx(
        [0.5 ** (10 / 1.0), 0.5 ** (10 / 10.0)]
    )  # 1 and 10 images: a tenth of those seen
    assert keep[3] == keep[0]  # the hand-over after pretraining starts afresh
    assert keep[4] == pytest.approx(0.5 ** (10 / 200))
    reset = dataclasses.replace(CURRICULUM, switch_ema="reset")
    assert state.ema_decays(200, STAGES, reset, config, 10)[0] == keep[0]
    assert state.ema_decays(200, STAGES, CURRICULUM, config, 10)[0] > keep[0]


def test_ema_update_is_the_weighted_mean_and_keeps_equal_weights_bit_for_bit():
    a, p = jax.random.normal(jax.random.key(0), (2, 1000))
    np.testing.assert_allclose(
        step.update_ema(a, p, jnp.float32(0.9)), 0.9 * a + 0.1 * p, atol=1e-6
    )
    np.testing.assert_array_equal(step.update_ema(p, p, jnp.float32(0.99995)), p)


def test_adam_with_clip_and_decay_against_its_formula():
    config = OptimizerConfig(b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, clip_norm=1.0)
    optimizer = optim.build(config)
    p, g = jnp.array([3.0, -4.0]), jnp.array([30.0, 40.0])
    update, _ = optimizer.update(g, optimizer.init(p), p)
    clipped = g / 50
    np.testing.assert_allclose(update, clipped / (jnp.abs(clipped) + 1e-8) + 0.1 * p, rtol=1e-5)


def test_global_norm_and_the_first_bad_leaf():
    tree = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]]), "c": jnp.zeros(2)}
    norm, bad = step.global_norm(tree)
    assert float(norm) == 5.0 and int(bad) == -1
    tree["b"], tree["c"] = jnp.array([jnp.inf]), jnp.array([jnp.nan])
    norm, bad = step.global_norm(tree)
    assert not np.isfinite(norm) and int(bad) == 1


def test_weight_decay_spares_fixed_frequencies():
    """Fourier frequencies have no gradient: decayed, they would drift off for good."""
    params = {
        "map_noise": {"freqs": np.full(3, 16.0, np.float32)},
        "dense": {"kernel": np.full(3, 16.0, np.float32)},
    }
    optimizer = optim.build(optim.OptimizerConfig(weight_decay=0.1))
    update, _ = optimizer.update(
        jax.tree.map(np.zeros_like, params), optimizer.init(params), params
    )
    np.testing.assert_array_equal(update["map_noise"]["freqs"], 0)
    np.testing.assert_allclose(update["dense"]["kernel"], 1.6, rtol=1e-6)


def test_an_unknown_optimiser_is_named():
    with pytest.raises(DmfError, match=r"config\.optimizer\.name = 'lion': expected one of adam"):
        optim.build(OptimizerConfig(name="lion"))
