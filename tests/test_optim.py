"""Learning rate, EMAs and the optimiser as functions of the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import optim, sharding, state, step
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


SPLUS = OptimizerConfig(name="splus", b2=0.95, decompose_every_steps=5)
ONE = sharding.make_mesh(devices=jax.devices()[:1])


def tree(values):
    """Parameters as a network has them, from arrays by path."""
    found = {}
    for path, x in values.items():
        layer, _, name = path.rpartition("/")
        found.setdefault(layer or "top", {})[name] = jnp.asarray(x)
    return found


def steps(config, grads, params, mesh=ONE, rate=0.1):
    """Yields (parameters, direction, optimiser's state) after each of some gradients."""
    optimizer = optim.build(config)
    now = jax.device_put(optimizer.init(params), sharding.replicated(mesh))
    update = jax.jit(optimizer.update)
    for n, g in enumerate(grads, 1):
        u, now = update(g, now, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, u)
        if optim.is_due(config, n):
            now = optim.decomposed(now, mesh)
        yield params, u, now


def gradients(count, shape, seed=0):
    return [{"a": {"kernel": g}} for g in jax.random.normal(jax.random.key(seed), (count, *shape))]


def test_splus_follows_two_public_implementations_for_twenty_steps(golden):
    """Stored runs of its optax and of its torch code (kvfrans/splus d96bd16), without decay.

    rect has 8 x 20 entries: after its first decomposition its right side has no unique basis.
    """
    stored = golden("splus.npz")
    names = sorted(name[3:] for name in stored if name.startswith("p0/"))
    lasting = [name for name in names if not name.startswith("rect")]
    first = tree({name: stored[f"p0/{name}"] for name in names})
    grads = [
        tree({n: stored[f"g/{n}"][min(i, len(stored[f"g/{n}"]) - 1)] for n in names})
        for i in range(20)
    ]
    for n, (params, _, _) in enumerate(steps(SPLUS, grads, first), 1):
        for code in ("optax", "torch"):
            for name in names if n == 1 else lasting if n in (5, 10, 20) else ():
                expected = tree({name: stored[f"{code}{n}/{name}"]})
                (layer, leaf), *_ = [(k, *v.values()) for k, v in expected.items()]
                found = params[layer][name.rpartition("/")[2]]
                np.testing.assert_allclose(found, leaf, atol=4e-6, err_msg=f"{name} {n} {code}")


def test_the_optimiser_counts_its_steps_from_its_last_reset():
    found = [state.optimizer_steps(n, STAGES, CURRICULUM) for n in (0, 99, 100, 200, 499)]
    assert found == [1, 100, 1, 101, 400]
    reset = dataclasses.replace(CURRICULUM, switch_optimizer="reset")
    assert [state.optimizer_steps(n, STAGES, reset) for n in (199, 200)] == [100, 1]


def test_a_direction_of_splus_has_a_fixed_length_and_follows_rotations():
    """|U|^2 = m n. U(A G B') = A U(G) B' from the second decomposition on, not before."""
    grads = gradients(12, (6, 6))
    a, b = (jnp.linalg.qr(g["a"]["kernel"])[0] for g in gradients(2, (6, 6), seed=1))
    turned = [{"a": {"kernel": a @ g["a"]["kernel"] @ b.T}} for g in grads]
    start, config = {"a": {"kernel": jnp.zeros((6, 6))}}, dataclasses.replace(SPLUS, b1=0.5)
    pairs = zip(steps(config, grads, start), steps(config, turned, start), strict=True)
    misses = []
    for (_, u, _), (_, rotated, _) in pairs:
        u, rotated = u["a"]["kernel"], rotated["a"]["kernel"]
        assert float(jnp.sum(jnp.square(u))) == pytest.approx(36 * (2 / 12) ** 2, rel=1e-4)
        misses.append(float(jnp.abs(rotated - a @ u @ b.T).max()))
    assert misses[0] > 0.1 and max(misses[5:]) < 1e-4


def test_the_sign_of_an_eigenvector_does_not_matter():
    *_, (params, _, now) = steps(SPLUS, gradients(6, (4, 6)), {"a": {"kernel": jnp.zeros((4, 6))}})
    (splus, *rest), g = now, gradients(1, (4, 6), seed=2)[0]
    flipped = jax.tree.map(lambda q: q * jnp.where(jnp.arange(len(q)) % 2, -1, 1), splus.turns)
    update = optim.build(SPLUS).update
    u, v = (update(g, (splus._replace(turns=q), *rest), params)[0] for q in (splus.turns, flipped))
    np.testing.assert_allclose(u["a"]["kernel"], v["a"]["kernel"], atol=1e-6)


def test_what_splus_does_not_turn_moves_by_signs():
    """Sides that are too large, tables, and convolutions unless they are asked for."""
    params = {
        "large": {"kernel": jnp.ones((3, 9))},
        "table": {"embedding": jnp.ones((3, 3))},
        "conv": {"kernel": jnp.ones((3, 3, 2, 4))},
    }
    config = dataclasses.replace(SPLUS, largest_side=9)
    update, now = optim.build(config).update(params, optim.build(config).init(params), params)
    assert {k: list(v) for k, v in now[0].sums.items()} == {"large/kernel": ["left"]}
    for leaf in jax.tree.leaves(update):
        np.testing.assert_allclose(leaf, 1e-3)
    config = dataclasses.replace(config, convolutions=True, largest_side=100)
    sums = optim.build(config).init(params)[0].sums
    assert {k: v.shape for k, v in sums["conv/kernel"].items()} == {
        "left": (18, 18),
        "right": (4, 4),
    }


def test_decay_of_splus_is_scaled_as_its_direction():
    """parameter <- parameter - rate 2 / (m + n) (U + decay parameter)."""
    params = {"a": {"kernel": jnp.full((2, 6), 3.0)}}
    config = dataclasses.replace(SPLUS, weight_decay=0.5)
    update, _ = optim.build(config).update(params, optim.build(config).init(params), params)
    np.testing.assert_allclose(update["a"]["kernel"], 2 / 8 * (1 + 0.5 * 3.0), rtol=1e-6)


def test_eight_devices_share_the_decompositions_and_find_the_same_bits():
    eight = sharding.make_mesh(devices=jax.devices()[:8])
    params = {k: {"kernel": jnp.zeros((4, 6))} for k in "abc"}
    grads = [{k: g["a"] for k in "abc"} for g in gradients(2, (4, 6))]
    states = [
        [now for _, _, now in steps(SPLUS, jax.device_put(grads, place), params, mesh)][-1]
        for mesh in (ONE, eight)
        for place in [sharding.replicated(mesh)]
    ]
    one, many = (jax.tree.leaves(s[0].turns) for s in states)
    assert len(one) == 6 and float(jnp.abs(one[0] - jnp.eye(4)).max()) > 0.1
    for a, b in zip(one, many, strict=True):
        np.testing.assert_array_equal(a, b)


def test_muon_makes_a_matrix_orthogonal_and_leaves_the_rest_to_adam():
    params = {"a": {"kernel": jnp.zeros((4, 8)), "bias": jnp.zeros(8)}}
    g = {"a": {"kernel": gradients(1, (4, 8))[0]["a"]["kernel"], "bias": jnp.arange(8.0)}}
    update, adam = (
        optimizer.update(g, optimizer.init(params), params)[0]["a"]
        for optimizer in (optim.build(OptimizerConfig(name=n)) for n in ("muon", "adam"))
    )
    np.testing.assert_allclose(update["bias"], adam["bias"], rtol=1e-6)
    values = jnp.linalg.svd(update["kernel"])[1] / (0.2 * 8**0.5)
    assert float(values.min()) > 0.65 and float(values.max()) < 1.25  # five Newton-Schulz steps
    assert float(jnp.sum(update["kernel"] * g["a"]["kernel"])) > 0
