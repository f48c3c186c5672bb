"""Guidance that a network is told: its law, its velocity, and what samples are told."""

from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits, imagenet256
from dmf import networks, sharding, step
from dmf.config import check, parse
from dmf.errors import DmfError
from dmf.evaluation.sampling import Sampler
from dmf.method.flow import Condition, Rows, RowSplit
from dmf.method.guidance import Contrast, GuidanceConfig, condition_of, drawn, told_velocity
from dmf.networks import InContextConfig
from tests.tiny import TINY, Setup

SPLIT = RowSplit(4096, 4, 2)
NETWORK = InContextConfig(
    depth=2, width=16, heads=2, patch=4, num_classes=10, velocity_head=1, interval_init="random"
)
VALUES = dict(
    TINY,
    network=asdict(NETWORK),
    loss=dict(tangent="head"),
    guidance=dict(most=8.0, omega=7.5, t_start=0.4, t_end=0.65),
    curriculum=dict(TINY["curriculum"], stages=1, kinds=("guided_jvp",), pretrain_length=0.0),
)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_the_law_of_the_scale_and_of_its_interval(power):
    found = np.asarray(drawn(jax.random.key(0), GuidanceConfig(most=8.0, power=power), SPLIT))
    scale, start, end = np.sort(found[:, 0]), found[:, 1], found[:, 2]
    b = 1 - power
    law = np.log(scale) / np.log(8) if b == 0 else (scale**b - 1) / (8**b - 1)
    assert np.abs(law - (np.arange(len(law)) + 0.5) / len(law)).max() < 0.03
    pair = np.asarray(SPLIT.is_pair())
    assert (start[~pair] == 0).all() and (end[~pair] == 1).all()
    for x, low in ((start[pair], 0.0), (end[pair], 0.5)):
        assert low <= x.min() < low + 0.01 and low + 0.49 < x.max() <= low + 0.5


def net(params, rows):
    """A velocity that shows the class and all that it is told."""
    told = rows.condition.guidance
    return rows.z + (rows.condition.label + told @ jnp.array([1.0, 10.0, 100.0]))[:, None]


def told_rows(scale, start, end, t, label):
    told = jnp.array([[scale, start, end]])
    z, v = jnp.array([[0.3, -0.2]]), jnp.array([[1.0, 2.0]])
    at = jnp.array([0.1]), jnp.array([t])
    return Rows(z, *at, v, Condition(jnp.array([label]), guidance=told))


def test_v_g_follows_the_scale_inside_the_interval_alone(float64):
    rows = told_rows(4.0, 0.2, 0.6, 0.5, 3)
    v_g, v_c = told_velocity(net, {}, rows, 5)
    np.testing.assert_allclose(v_c, rows.z + 3 + 4 + 100)  # told the scale, of the whole interval
    np.testing.assert_allclose(v_g, rows.v + (1 - 1 / 4) * ((3 + 4) - (5 + 1)))
    for other in (
        told_rows(1.0, 0.0, 1.0, 0.5, 3),  # the scale 1
        told_rows(4.0, 0.2, 0.6, 0.7, 3),  # outside the interval
        told_rows(4.0, 0.2, 0.6, 0.5, 5),  # the label was dropped
    ):
        np.testing.assert_array_equal(told_velocity(net, {}, other, 5)[0], other.v)
    outside = told_velocity(net, {}, told_rows(4.0, 0.2, 0.6, 0.7, 3), 5)[1]
    np.testing.assert_allclose(outside, rows.z + 3 + 1 + 100)


def perturbed(network, config=NETWORK):
    """Weights of the network without a layer that is zero."""
    params = network.init(jax.random.key(1))
    found, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(2)
    return jax.tree.unflatten(tree, [x + 0.2 * rng.standard_normal(x.shape) for x in found])


def test_samples_are_told_and_ignore_the_head_bit_for_bit():
    config, shape, mesh = parse(VALUES), (8, 8, 1), sharding.make_mesh()
    network = networks.build(config.network, shape)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), perturbed(network))
    without, kept = networks.without_head(config.network, params)
    assert without.velocity_head == 0 and set(params) - set(kept) == {
        "head_blocks_0",
        "head_final_layer",
    }

    def sample(network, params, guidance=None):
        labels = np.arange(3, dtype=np.int32)
        draw = Sampler(network, config, shape, labels, mesh, guidance)
        return draw(params, 3, 2)

    whole = sample(network, params)
    np.testing.assert_array_equal(whole, sample(networks.build(without, shape), kept))
    same = sample(network, params, Contrast(7.5, 0.4, 0.65))
    np.testing.assert_array_equal(whole, same)  # the config's own
    other = sample(network, params, Contrast(2.0, 0.4, 0.65))
    assert np.abs(other - whole).max() > 1e-3


def test_one_step_trains_u_and_head_and_the_flow_kind_leaves_the_branch_alone():
    found = Setup(VALUES).run("guided_jvp", 1)[1]
    assert {"squares_head_border", "squares_head_pairs"} <= set(found)
    config = parse(dict(VALUES, network=dict(VALUES["network"], interval_init="zero")))
    network = networks.build(config.network, (8, 8, 1))
    rows = step.draw_rows(
        jnp.int32(0),
        {"x": jnp.zeros((32, 8, 8, 1)), "label": jnp.zeros(32, jnp.int32)},
        split=RowSplit(32, 4, 3),
        config=config,
    )
    start = network.init(jax.random.key(0))
    end = dict(start, final_layer=perturbed(network)["final_layer"])
    h = lambda r: network.apply(end, rows.z, r, rows.t, condition=rows.condition)  # noqa: E731
    np.testing.assert_array_equal(h(rows.r), h(rows.t))  # a zero branch: u = v for every r
    assert rows.condition.guidance.shape == (32, 3)


def test_what_does_not_fit_is_refused():
    config = parse(VALUES)
    check(config, 10, 1352)
    plain = replace(config, network=replace(NETWORK, scale_tokens=0, interval_tokens=0))
    with pytest.raises(DmfError, match="config.guidance.most = 8: expected 1, or kappa = 0 and"):
        check(plain, 10, 1352)
    headless = replace(config, network=replace(NETWORK, velocity_head=0))
    with pytest.raises(DmfError, match="config.loss.tangent = 'head': expected another direction"):
        check(headless, 10, 1352)
    for field, value in (("velocity_head", 3), ("scale_tokens", 0), ("width", 18)):
        with pytest.raises(DmfError, match=f"config.network.{field} is {value}.*expected"):
            networks.build(replace(NETWORK, **{field: value}), (8, 8, 1))


def test_improved_takes_what_the_network_has():
    whole = imagenet256.get_config("XL,in_context,improved")
    assert whole.network.kind == "in_context_dit" and whole.network.depth == 48
    assert whole.loss.tangent == "head" and whole.guidance.most == 8
    assert whole.curriculum.kinds == ("guided_jvp",)
    check(parse(whole), 1000, 10**6)
    for config, classes in ((imagenet256.get_config("XL,improved"), 1000),):
        assert config.loss.tangent == "own" and config.curriculum.kinds == ("jvp",)
        check(parse(config), classes, 10**6)
    assert digits.get_config("improved").loss.tangent == "own"
    label = jnp.zeros(2, jnp.int32)
    assert condition_of(parse(whole).network, label, GuidanceConfig()).guidance.shape == (2, 3)
    dit = imagenet256.get_config("XL,improved").network
    assert condition_of(dit, label, GuidanceConfig()).guidance is None
