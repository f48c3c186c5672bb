"""Rectification: its fixed point and sign, what each gradient reaches, and the state it adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import state, step
from dmf.errors import DmfError
from dmf.method import rectify
from dmf.method.flow import Condition, Rows, expand
from dmf.method.weights import LossConfig
from tests.tiny import TINY, Setup, linear_network, merged

VALUES = merged(
    TINY,
    loss=dict(tangent="own", rectify_ramp=1e-6),
    curriculum=dict(stages=1, kinds=("rectify",), pretrain_length=0.0),
    optimizer=dict(eps=1e-4),
)
COUNT = 50_000


def law(mean, sd):
    """The velocity u(z, t, t) of Gaussian data with this mean and deviation."""

    def velocity(params, rows):
        t, z = expand(rows.t, rows.z), rows.z
        slope = (t - (1 - t) * sd**2) / ((1 - t) ** 2 * sd**2 + t**2)
        return slope * (z - (1 - t) * mean) - mean

    return velocity


def drift(mean, sd, wanted=0.7, spread=0.5):
    """(E[g], E[g x]) before the normaliser, of images N(mean, sd^2) and data N(.7, .5^2)."""
    x = mean + sd * jax.random.normal(jax.random.key(0), (COUNT, 1))
    keys = jax.random.split(jax.random.key(1), COUNT)
    ones = jnp.ones(COUNT)
    rows = rectify.noised(x, Rows(x, 0 * ones, ones, x, Condition(), keys), rectify.GENERATOR)
    v_real, v_fake = (law(*of)(None, rows) for of in ((wanted, spread), (mean, sd)))
    g = rectify.direction(x, rows, v_real, v_fake)
    apart = jnp.abs(x - (rows.z - expand(rows.t, x) * v_real))
    g = g * jnp.maximum(apart, rectify.TINY)
    return float(g.mean()), float((g * x).mean())


def test_nothing_moves_images_that_have_the_law_of_the_data():
    assert np.abs(drift(0.7, 0.5)).max() < 1e-6


def test_images_above_the_data_are_moved_down_and_images_below_up():
    above, below = drift(1.3, 0.5)[0], drift(0.1, 0.5)[0]
    assert above == pytest.approx(0.39, abs=0.01)  # the addendum's figure, by its own draws
    assert below == pytest.approx(-above, abs=0.01)


def test_the_loss_has_the_direction_as_its_gradient():
    x, g = (jax.random.normal(jax.random.key(i), (3, 4, 4, 1)) for i in (0, 1))
    found = jax.grad(lambda x: jnp.sum(rectify.toward(x, g)))(x)
    np.testing.assert_allclose(found, g / 16, rtol=1e-5, atol=1e-7)


def pieces(scale=1.0):
    setup = Setup(merged(VALUES, loss=dict(rectify_guidance=scale)))
    setup.network = linear_network()
    split = step.split_for("rectify", setup.config, setup.mesh)
    rows = step.draw_rows(jnp.int32(3), setup.batch(0), split=split, config=setup.config)
    own = lambda params, rows: setup.network.apply(  # noqa: E731
        params, rows.z, rows.r, rows.t, condition=rows.condition
    )
    return setup, split, rows, own


def norm(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def test_no_gradient_passes_between_the_two_networks():
    setup, split, rows, own = pieces()
    params = setup.state().params
    second = jax.tree.map(lambda x: 1.1 * x, params)
    pairs = split.pairs_of(rows)

    def loss(params, second):
        of = LossConfig()
        return jnp.sum(rectify.generator_loss(own, own, params, second, pairs, of, 10))

    def error(second, params):
        return jnp.sum(rectify.second_residual(own, second, params, pairs) ** 2)

    for f, both in ((loss, (params, second)), (error, (second, params))):
        trained, other = jax.grad(f, argnums=(0, 1))(*both)
        assert norm(trained) > 1e-3 and norm(other) == 0
    same = jax.grad(loss)(params, params)  # v_real = v_fake: nothing is to be moved
    assert norm(same) == 0


def test_guidance_takes_the_real_velocity_beyond_that_of_the_class():
    _, split, rows, own = pieces()
    seen, pairs = [], split.pairs_of(rows)

    def still(params, rows):
        seen.append(np.asarray(rows.condition.label))
        return own(params, rows)

    params = pieces()[0].state().params
    args = own, still, params, params, pairs
    plain, guided = (
        rectify.generator_loss(*args, LossConfig(rectify_guidance=s), 10) for s in (1.0, 2.0)
    )
    classed = np.asarray(pairs.condition.label) != 10
    assert (plain == 0).all() and (guided[classed] > 0).all() and (guided[~classed] == 0).all()
    assert len(seen) == 5 and (seen[3] == 10).all()


def test_one_device_and_eight_take_the_same_steps_and_both_networks_move():
    setups = [Setup(merged(VALUES, mesh=dict(fsdp=n)), devices=m) for n, m in ((1, 1), (2, 8))]
    for setup in setups:
        setup.network = linear_network()
    (one, found), (eight, other) = (setup.run("rectify", 3) for setup in setups)
    assert found["loss"] == pytest.approx(other["loss"], rel=1e-6)
    for name in ("params", "second"):
        pairs = jax.tree.leaves(
            jax.tree.map(
                lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()),
                getattr(one, name),
                getattr(eight, name),
            )
        )
        assert max(pairs) < 1e-5, name
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(eight.second.params))
    start = setups[0].state().params
    apart = [jax.tree.map(lambda a, b: a - b, x, start) for x in (one.params, one.second.params)]
    assert min(map(norm, apart)) > 1e-4
    assert norm(apart[1]["interval"]) == 0  # the second network knows v alone


def test_the_state_holds_two_networks_and_no_third():
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    without, beside = (Setup(values).state() for values in (TINY, VALUES))
    assert without.second == () and size(without.second) == 0
    assert size(beside) - size(without) == size((beside.params, beside.opt_state))
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((beside.params, beside.second))]
    assert len(set(buffers)) == len(buffers)


def test_after_pretraining_the_second_network_starts_from_the_flow_model():
    setup = Setup(VALUES)
    now = setup.state()
    moved = jax.tree.map(lambda x: x + 1, now.params)
    now = state.TrainState(now.step, now.params, now.opt_state, (moved, now.ema[1]), (), now.second)
    before = setup.stages[0].__class__(-1, "flow", 1.0, 0, 4)
    found = state.switch(now, before, setup.config.curriculum, setup.config.ema, setup.optimizer)
    assert norm(jax.tree.map(lambda a, b: a - b, found.second.params, moved)) == 0


def test_a_guided_rectification_needs_classes():
    values = merged(VALUES, label_dropout=0.0, loss=dict(rectify_guidance=2.0))
    with pytest.raises(DmfError, match="config.loss.rectify_guidance = 2.0: expected 1"):
        Setup(values).step("rectify")
