"""The networks: exact start, dropout, derivatives, half precision, side outputs, conditions."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import networks
from dmf.errors import DmfError
from dmf.networks import (
    Condition,
    DiTConfig,
    MLPConfig,
    UNetConfig,
    build,
    is_interval_path,
    layers,
)
from dmf.networks.mlp import MLP as MLPModule
from dmf.networks.unet import make_unet
from tests.networks.small import (
    BATCH,
    MLP,
    SMALL,
    UNET,
    condition,
    fast_compile,
    initial_leaves,
    leaf_paths,
    nested,
    random_params,
    relative_l2,
    small,
    small_network,
    u_and_gradient,
)


def test_parameters_are_a_plain_float32_tree_with_an_interval_branch():
    for kind in SMALL:
        params = jax.eval_shape(small_network(kind).init, jax.random.key(0))
        assert type(params) is dict and "interval" in params
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert is_interval_path(("interval", "mlp_0", "kernel"))
    assert not is_interval_path(("t_embedder", "mlp_0", "kernel"))


@pytest.mark.parametrize("kind", SMALL)
def test_a_network_says_which_weights_it_casts_to_half_precision(kind):
    """Casting these weights ahead changes no bit of u; casting any other does."""
    config, shape, label = SMALL[kind]
    network, params = build(config, shape, jnp.bfloat16), random_params(kind)
    assert {jnp.dtype("float32")} == set(jax.tree.leaves(small_network(kind).dtypes(params)))
    found = leaf_paths(network.dtypes(params))
    cast = [path for path, dtype in found.items() if dtype == jnp.bfloat16]
    assert 0 < len(cast) < len(found)
    given = small(kind)

    @fast_compile
    def u(params):
        return network.apply(params, *given[:3], condition=condition(given[3]))

    def rounded(paths):
        half = {p: x.astype(jnp.bfloat16) for p, x in leaf_paths(params).items() if p in paths}
        flat = leaf_paths(params) | {p: np.asarray(x, np.float32) for p, x in half.items()}
        return np.asarray(u(nested(flat)))

    np.testing.assert_array_equal(rounded(()), rounded(cast))
    assert (rounded(()) != rounded(set(found) - set(cast))).any()


def test_initial_spread():
    """The initialisation of EDM (U-Net) and SiT (DiT), by the spread of single kernels."""
    config = UNetConfig(
        channels=32, channel_mult=(2,), blocks=1, attention_resolutions=(8,), interval_init="random"
    )
    xavier = math.sqrt(2 / (128 + 128))  # one layer, 128 -> 128, officially
    expected = {
        ("map_layer0", "kernel"): xavier,
        ("interval", "kernel"): xavier,
        ("enc", "8x8_block0", "conv0", "kernel"): math.sqrt(2 / (9 * (32 + 64))),
        ("enc", "8x8_block0", "conv1", "kernel"): 1e-5 * math.sqrt(2 / (9 * (64 + 64))),
        ("enc", "8x8_block0", "qkv", "kernel"): math.sqrt(0.2 * 2 / (64 + 192)),
        ("enc", "8x8_block0", "proj", "kernel"): 1e-5 * math.sqrt(2 / (64 + 64)),
        ("dec", "8x8_aux_conv", "kernel"): 1e-5 * math.sqrt(2 / (9 * (64 + 3))),
    }
    for path, leaf in initial_leaves(build(config, (8, 8, 3)), expected.__contains__).items():
        assert np.std(leaf) == pytest.approx(expected.pop(path), rel=0.08), path
    assert not expected
    config = DiTConfig(depth=1, width=96, heads=4, num_classes=10, interval_init="random")
    expected = {
        ("x_embedder", "proj", "kernel"): math.sqrt(2 / (16 + 96)),
        ("interval", "mlp_2", "kernel"): 0.02,
        ("t_embedder", "mlp_0", "kernel"): 0.02,
        ("y_embedder", "embedding_table", "embedding"): 0.02,
        ("blocks_0", "attn", "qkv", "kernel"): math.sqrt(2 / (96 + 288)),
        ("blocks_0", "adaLN_modulation_1", "kernel"): 0.0,
        ("final_layer", "linear", "kernel"): 0.0,
    }
    for path, leaf in initial_leaves(build(config, (8, 8, 4)), expected.__contains__).items():
        assert np.std(leaf) == pytest.approx(expected.pop(path), rel=0.08), path
    assert not expected


@pytest.mark.parametrize("kind", SMALL)
def test_zero_interval_starts_as_a_flow_model(kind):
    """With the initial interval branch u(z, r, t) = u(z, t, t) bit for bit, for any other weights.

    The branch is nevertheless alive: its gradient is not zero, and with random values r matters.
    """
    z, r, t, label, _ = small(kind)
    probe = u_and_gradient(kind)
    initial = initial_leaves(small_network(kind), is_interval_path)
    for seed in (0, 1):
        params = nested(leaf_paths(random_params(kind, seed)) | initial)
        at_t, _ = probe(params, z, t, t, label)
        at_r, gradient = probe(params, z, r, t, label)
        assert np.std(at_t) > 0.05
        assert np.array_equal(at_r, at_t)
        assert (
            max(
                np.abs(g).max()
                for path, g in leaf_paths(gradient).items()
                if is_interval_path(path)
            )
            > 1e-3
        )
    alive = random_params(kind)
    assert relative_l2(probe(alive, z, r, t, label)[0], probe(alive, z, t, t, label)[0]) > 1e-3


@pytest.mark.parametrize("kind", SMALL)
def test_r_enters_only_through_the_interval(kind):
    """With the branch of t silenced, u feels how long the interval is, and not where it lies."""
    z, _, _, label, _ = small(kind)
    last_of_t = {
        "unet": ("map_layer0",),
        "dit": ("t_embedder", "mlp_2"),
        "mlp": ("time",),
        "adm": ("time_embed_2",),
    }[kind]
    flat = leaf_paths(random_params(kind))
    params = nested(flat | {(*last_of_t, "kernel"): 0 * flat[(*last_of_t, "kernel")]})
    probe = u_and_gradient(kind)
    r, t = (
        np.float32([0, 0.25, 0.5]),
        np.float32([0.5, 0.5, 0.5]),
    )  # sums and differences exact in float32
    u, _ = probe(params, z, r, t, label)
    assert np.array_equal(probe(params, z, r + 0.25, t + 0.25, label)[0], u)
    assert relative_l2(probe(params, z, r, t + 0.25, label)[0], u) > 1e-3


@pytest.mark.parametrize("kind", SMALL)
def test_derivatives_equal_finite_differences(kind):
    """In float64, under dropout: du along (dz, dr, dt), and the gradient of a loss with it."""
    network = small_network(kind)
    step, rng = 1e-5, np.random.default_rng(1)
    with jax.enable_x64(True):
        z, r, t, label, v = small(kind)
        z, r, t, v = (x.astype(np.float64) for x in (z, r, t, v))
        dr, dt = rng.standard_normal((2, BATCH))
        keys = jax.random.split(jax.random.key(2), BATCH)
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), random_params(kind))
        direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), params)

        def loss(params, z, r, t):
            def u(z, r, t):
                return network.apply(
                    params, z, r, t, condition=condition(label), train=True, rngs=keys
                )

            value, slope = jax.jvp(u, (z, r, t), (v, dr, dt))
            return jnp.mean(value**2) + jnp.mean(slope**2), (value, slope)

        evaluate = fast_compile(jax.value_and_grad(loss, has_aux=True))
        (_, (_, slope)), gradient = evaluate(params, z, r, t)
        (_, (after, _)), _ = evaluate(params, z + step * v, r + step * dr, t + step * dt)
        (_, (before, _)), _ = evaluate(params, z - step * v, r - step * dr, t - step * dt)
        assert slope.dtype == jnp.float64
        assert relative_l2(slope, np.asarray(after - before) / (2 * step)) < 1e-7

        (after, _), _ = evaluate(
            jax.tree.map(lambda x, d: x + step * d, params, direction), z, r, t
        )
        (before, _), _ = evaluate(
            jax.tree.map(lambda x, d: x - step * d, params, direction), z, r, t
        )
        along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), gradient, direction)))
        assert along == pytest.approx(float(after - before) / (2 * step), rel=1e-6)


def test_dropout_masks_belong_to_their_rows():
    """A row has one mask, in a part of a batch or in the whole. Rows differ, kept values grow."""
    keys = jax.random.split(jax.random.key(0), 5)
    layer = layers.RowDropout(0.3)
    whole = np.asarray(layer.apply({}, np.ones((5, 4, 50), np.float32), keys))
    part = np.asarray(layer.apply({}, np.ones((2, 4, 50), np.float32), keys[np.array([3, 1])]))
    assert np.array_equal(part, whole[[3, 1]])
    assert np.array_equal(np.unique(whole), np.float32([0, 1 / 0.7]))
    kept = (whole > 0).reshape(5, -1)
    assert np.abs(kept.mean(axis=1) - 0.7).max() < 5 * math.sqrt(0.3 * 0.7 / 200)
    # Independent masks agree in .7^2 + .3^2 = .58 of 200 places, with a deviation of .035.
    agreement = [(kept[i] == kept[j]).mean() for i in range(5) for j in range(i)]
    assert np.abs(np.array(agreement) - 0.58).max() < 5 * 0.035
    assert np.array_equal(layer.apply({}, whole, None), whole)


def test_dropout_layers_of_the_unet_are_independent():
    """Every block draws its own mask from the keys of its rows. Evaluation ignores keys."""
    module, network = make_unet(UNET, (8, 8, 2), None, layers.PLAIN), small_network("unet")
    z, r, t, label, _ = small("unet")
    keys = jax.random.split(jax.random.key(0), BATCH)

    @fast_compile
    def outputs(params, z, r, t, keys):
        u, state = module.apply(
            {"params": params}, z, r, t, condition(label), keys,
            capture_intermediates=lambda module, _: isinstance(module, layers.RowDropout),
            mutable=["intermediates"],
        )  # fmt: skip
        trained = network.apply(params, z, r, t, condition=condition(label), train=True, rngs=keys)
        return u, trained, state["intermediates"]

    params = random_params("unet")
    u, trained, drops = outputs(params, z, r, t, keys)
    masks = {path[:-2]: np.asarray(x) != 0 for path, x in leaf_paths(drops).items()}
    _, _, reordered = outputs(params, z[::-1], r[::-1], t[::-1], keys[::-1])
    for path, x in leaf_paths(reordered).items():
        assert np.array_equal((np.asarray(x) != 0)[::-1], masks[path[:-2]]), path
    # enc: block, down, block; dec: in0, in1, 2 blocks, up, 2 blocks
    assert len(masks) == 10
    for a, mask in masks.items():
        for b, other in masks.items():
            alike = a != b and mask.shape == other.shape
            assert not alike or (mask == other).mean() < 0.58 + 5 * 0.5 / math.sqrt(mask.size), (
                a,
                b,
            )
    np.testing.assert_array_equal(u, trained)
    evaluated, _ = u_and_gradient("unet")(params, z, r, t, label)
    assert relative_l2(trained, evaluated) > 0.05


@pytest.mark.parametrize("kind", SMALL)
def test_bfloat16_compute(kind):
    """u is float32, close to the float32 computation and not equal to it. Times keep their detail.

    bfloat16 rounds by up to 2^-9 = 0.2 %; some tens of roundings add in squares to about 1 %.
    """
    config, shape, _ = SMALL[kind]
    network = build(config, shape, jnp.bfloat16)
    z, r, t, label, _ = small(kind)
    params = random_params(kind)
    apply = fast_compile(
        lambda params, r, t: network.apply(params, z, r, t, condition=condition(label))
    )
    u = apply(params, r, t)
    assert u.dtype == jnp.float32
    assert 1e-4 < relative_l2(u, u_and_gradient(kind)(params, z, r, t, label)[0]) < 0.03
    # bfloat16 cannot tell 0.5 from 0.5 + 2^-10. Amplified, the difference survives later rounding.
    of_t = ("map_layer0", "t_embedder", "time", "time_embed_0")
    params = {k: jax.tree.map(lambda x: 30 * x, p) if k in of_t else p for k, p in params.items()}
    half = np.full(BATCH, 0.5, np.float32)
    later = half + np.float32(2**-10)
    assert not np.array_equal(apply(params, half, half), apply(params, later, later))


def test_mlp_takes_flat_and_shaped_data():
    network = build(MLP, (1, 5, 1))
    z, r, t, _, _ = small("mlp")
    flat = network.apply(random_params("mlp"), z, r, t)
    shaped = network.apply(random_params("mlp"), z.reshape(BATCH, 1, 5, 1), r, t)
    assert flat.shape == (BATCH, 5) and shaped.shape == (BATCH, 1, 5, 1)
    assert np.array_equal(shaped.reshape(BATCH, 5), flat)


def test_dit_class_outside_the_table_gives_nan():
    z, r, t, _, _ = small("dit")
    u, _ = u_and_gradient("dit")(random_params("dit"), z, r, t, np.int32([0, 3, 4]))
    assert np.isfinite(u[:2]).all() and np.isnan(u[2]).all()


def test_a_unet_with_classes_has_a_table_and_is_else_the_same_network():
    plain, (z, r, t, _, _) = small_network("unet"), small("unet")
    config, shape = dataclasses.replace(UNET, num_classes=3), SMALL["unet"][1]
    classes = build(config, shape)
    assert set(jax.eval_shape(classes.init, jax.random.key(0))) == {
        *jax.eval_shape(plain.init, jax.random.key(0)),
        "map_label",
    }
    # Without an image the module gives the embedding, which is all that a class can change.
    module, given = make_unet(config, shape, None, layers.PLAIN), Condition()
    params = module.init(jax.random.key(0), None, r, t, given, None)["params"]
    table = np.asarray(params["map_label"]["embedding_table"]["embedding"])
    assert table.shape == (4, 16) and not table[3].any()
    assert 0.5 < np.abs(table[:3]).max() < math.sqrt(18 / 19)  # EDM's sqrt(3) times Xavier's
    embed = jax.jit(lambda label: module.apply({"params": params}, None, r, t, label, None))

    def of(label):
        return np.asarray(embed(Condition(jnp.full(len(t), label))))

    none = np.asarray(embed(Condition()))
    np.testing.assert_allclose(of(3), none, rtol=0, atol=1e-6)
    without = make_unet(UNET, shape, None, layers.PLAIN)  # the null class starts at zero
    rest = {name: x for name, x in params.items() if name != "map_label"}
    plainly = without.apply({"params": rest}, None, r, t, given, None)
    np.testing.assert_allclose(none, plainly, rtol=0, atol=1e-6)
    assert np.abs(of(0) - of(1)).max() > 1e-3 and np.isnan(of(4)).all()
    with pytest.raises(DmfError, match="this network has no label"):
        plain.apply(random_params("unet"), z, r, t, label=np.zeros(len(z), np.int32))


class WithSide(MLPModule):
    """An MLP that also tells the square of its output."""

    @nn.compact
    def __call__(self, *inputs):
        u = super().__call__(*inputs)
        return u, {"square": u**2}


def test_a_network_may_return_named_side_outputs(monkeypatch):
    plain = small_network("mlp")
    make = lambda config, shape, dtype, how: WithSide(config, dtype)  # noqa: E731
    monkeypatch.setitem(networks.KINDS, "mlp", (MLPConfig, make))
    network, params = small_network("mlp"), random_params("mlp")
    z, r, t, _, _ = small("mlp")
    u, sides = network.apply_with_sides(params, z, r, t)
    assert list(sides) == ["square"]
    np.testing.assert_array_equal(sides["square"], u**2)
    np.testing.assert_array_equal(network.apply(params, z, r, t), u)
    np.testing.assert_array_equal(plain.apply(params, z, r, t), u)
    assert plain.apply_with_sides(params, z, r, t)[1] == {}


def test_label_is_short_for_a_condition_and_both_are_refused():
    network, params = small_network("dit"), random_params("dit")
    z, r, t, label, _ = small("dit")
    given = Condition(label=label)
    short, long = (
        network.apply(params, z, r, t, **k) for k in (dict(label=label), dict(condition=given))
    )
    np.testing.assert_array_equal(short, long)
    with pytest.raises(DmfError, match="label and condition are both given; expected one"):
        network.apply(params, z, r, t, label=label, condition=given)


def test_an_mlp_with_raw_times_is_linear_in_them_before_its_first_activation():
    """One hidden layer: its input is z A + t b + (t - r) c + d, so two calls give the same u."""
    network = build(MLPConfig(width=5, depth=1, time_input="raw", interval_init="random"), (2,))
    params = network.init(jax.random.key(0))
    assert params["time"]["kernel"].shape == params["interval"]["kernel"].shape == (1, 5)
    z, t, r = jnp.ones((3, 2)), jnp.array([0.3, 0.6, 1.0]), jnp.array([0.1, 0.6, 0.0])
    hidden = z @ params["input"]["kernel"] + params["input"]["bias"]
    hidden += (
        t[:, None] * params["time"]["kernel"] + (t - r)[:, None] * params["interval"]["kernel"]
    )
    u = jax.nn.silu(hidden) @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(network.apply(params, z, r, t), u, rtol=1e-5)


def test_an_mlp_may_start_as_torch_layers_do():
    """Uniform in +-1 / sqrt(inputs): 4 inputs of the first layer's three parts, then the width."""
    config = MLPConfig(width=400, depth=2, time_input="raw", interval_init="random", init="torch")
    params = networks.build(config, (2,)).init(jax.random.key(0))
    for name, bound in (("input", 0.5), ("time", 0.5), ("interval", 0.5), ("hidden_1", 0.05)):
        for leaf in params[name].values():
            assert 0.97 * bound < float(jnp.max(jnp.abs(leaf))) <= bound
