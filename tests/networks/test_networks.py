"""The networks: parity with other implementations, exact start, dropout, derivatives, errors."""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import networks
from dmf.errors import DmfError
from dmf.networks import (
    DIT_SIZES,
    ADMConfig,
    Condition,
    DiTConfig,
    MLPConfig,
    UNetConfig,
    attention,
    build,
    is_interval_path,
    layers,
)
from dmf.networks.dit import position_embedding
from dmf.networks.mlp import MLP as MLPModule
from dmf.networks.unet import edm_velocity, log_sigma, make_unet
from tests import GOLDEN
from tests.conversion import recipe_weights

PARITY = 5e-6  # relative L2: float32 round-off between two implementations of the same network

UNET_REFERENCE = UNetConfig(
    channels=32,
    channel_mult=(1, 2),
    blocks=2,
    attention_resolutions=(8,),
    dropout=0.0,
    interval_init="random",
)
DIT_REFERENCE = DiTConfig(depth=3, width=96, heads=4, patch=2, num_classes=10)

# The same kinds at a size that compiles fast; (config, image shape, label of a row).
UNET = UNetConfig(
    channels=8,
    channel_mult=(1, 2),
    blocks=1,
    attention_resolutions=(4,),
    dropout=0.3,
    augment_dim=2,
)
DIT = DiTConfig(depth=2, width=16, heads=2, patch=2, num_classes=3)
MLP = MLPConfig(width=16, depth=2)
ADM = ADMConfig(
    channels=64,
    channel_mult=(1, 1),
    blocks=1,
    attention_resolutions=(),
    head_channels=32,
    dropout=0.3,
)
SMALL = {
    "unet": (UNET, (8, 8, 2), np.array([0.3, -1.0], np.float32)),
    "dit": (DIT, (4, 6, 2), np.int32(1)),
    "mlp": (MLP, (5,), None),
    "adm": (ADM, (8, 8, 2), None),
}
BATCH = 3


def fast_compile(function):
    """Jit without LLVM's optimisations: these networks compile for longer than they run."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def relative_l2(got, want):
    got, want = np.asarray(got), np.asarray(want)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def leaf_paths(tree):
    """Flat {path: leaf} of a nested dict."""
    return {
        tuple(getattr(k, "key", 0) for k in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def shapes(network):
    return {
        path: leaf.shape
        for path, leaf in leaf_paths(jax.eval_shape(network.init, jax.random.key(0))).items()
    }


def count(network):
    return sum(math.prod(shape) for shape in shapes(network).values())


def random_params(kind, seed=0):
    """Dense random values for every leaf of a small network, so that no branch is dead."""
    rng = np.random.default_rng(seed)
    draw = {path: rng.standard_normal(shape) for path, shape in shapes(small_network(kind)).items()}
    return nested(
        {
            p: (x / math.sqrt(max(1, math.prod(x.shape[:-1])))).astype(np.float32)
            for p, x in draw.items()
        }
    )


def small_network(kind):
    config, shape, _ = SMALL[kind]
    return build(config, shape)


@functools.cache
def u_and_gradient(kind):
    """Compiled (params, z, r, t, label) -> u and the gradient of sum(u^2) in params."""
    network = small_network(kind)

    def loss(params, z, r, t, label):
        ignored = jax.random.split(jax.random.key(0), BATCH)
        u = network.apply(params, z, r, t, condition=condition(label), rngs=ignored)
        return jnp.sum(u**2), u

    @fast_compile
    def evaluate(params, z, r, t, label):
        (_, u), gradient = jax.value_and_grad(loss, has_aux=True)(params, z, r, t, label)
        return u, gradient

    return evaluate


def condition(label):
    """The network's condition of `small`: classes, an augmentation label, or nothing."""
    floats = label is not None and jnp.issubdtype(label.dtype, jnp.floating)
    return Condition(augment=label) if floats else Condition(label=label)


def initial_leaves(network, wanted):
    """{path: value} of the freshly initialised leaves that are `wanted`. No other is computed."""

    @fast_compile
    def leaves(key):
        return {
            "/".join(path): leaf
            for path, leaf in leaf_paths(network.init(key)).items()
            if wanted(path)
        }

    return {tuple(path.split("/")): np.asarray(x) for path, x in leaves(jax.random.key(0)).items()}


def small(kind, seed=0, batch=BATCH):
    """z, r < t, label, and a tangent of z for SMALL[kind]."""
    _, shape, row = SMALL[kind]
    rng = np.random.default_rng(seed)
    z, v = rng.standard_normal((2, batch, *shape)).astype(np.float32)
    r, t = np.sort(rng.uniform(size=(2, batch)).astype(np.float32), axis=0)
    label = None if row is None else np.stack([row] * batch)
    return z, r, t, label, v


def jax_layout(name, value):
    """A torch parameter as (Flax path, array), by the rule of all layers of both networks."""
    *modules, leaf = name.split(".")
    if leaf == "weight":
        leaf = {1: "scale", 2: "kernel", 4: "kernel"}[value.ndim]
        value = {1: lambda w: w, 2: lambda w: w.T, 4: lambda w: w.transpose(2, 3, 1, 0)}[
            value.ndim
        ](value)
    return (*modules, leaf), value


def unet_reference():
    """The reference U-Net with its own weights: (network, params, data)."""
    data = np.load(GOLDEN / "pymf_tiny_io.npz")
    flat = {}
    for name, value in recipe_weights(data).items():
        if name == "map_layer0.weight":  # acts on [features(t) | features(h)]
            of_t, of_h = np.split(value.T, 2)
            flat[("map_layer0", "kernel")], flat[("interval", "kernel")] = of_t, of_h
        elif not name.endswith("resample_filter"):
            path, flat_value = jax_layout(name, value)
            flat[path] = flat_value
    network = build(UNET_REFERENCE, (16, 16, 3))
    assert {path: value.shape for path, value in flat.items()} == shapes(network)
    return (
        network,
        nested(flat),
        {k: data[k] for k in ("z", "t", "r", "v", "aug_cond", "u_noaug", "u_aug", "dudt_aug")},
    )


def dit_reference(dtype):
    """SiT with reversed time and sign folded into its weights: (network, params, data)."""
    data = np.load(GOLDEN / "sit_tiny_io.npz")
    weights = {k: v.astype(np.float64) for k, v in recipe_weights(data).items() if k != "pos_embed"}
    # cos(f (1 - t)) and sin(f (1 - t)) are a rotation of cos(f t) and sin(f t). The first layer
    # absorbs it.
    f = np.exp(-math.log(1e4) * np.arange(128) / 128)
    cosine, sine = np.split(weights["t_embedder.mlp.0.weight"], 2, axis=1)
    folded = cosine * np.cos(f) + sine * np.sin(f), cosine * np.sin(f) - sine * np.cos(f)
    weights["t_embedder.mlp.0.weight"] = np.concatenate(folded, axis=1)
    # 2 x 2 patches of 8 channels, of which the first 4 are the velocity, data - noise.
    weights["final_layer.linear.weight"] = (
        -weights["final_layer.linear.weight"].reshape(4, 8, 96)[:, :4].reshape(16, 96)
    )
    weights["final_layer.linear.bias"] = (
        -weights["final_layer.linear.bias"].reshape(4, 8)[:, :4].reshape(16)
    )
    flat = {}
    for name, value in weights.items():
        name = name.replace("mlp.0.", "mlp_0.").replace("mlp.2.", "mlp_2.")
        name = name.replace("adaLN_modulation.1", "adaLN_modulation_1").replace(
            "blocks.", "blocks_"
        )
        path, flat_value = jax_layout(name, value)
        if "embedding_table" in path:  # the one matrix that is no linear layer: row = class in both
            path, flat_value = (*path[:-1], "embedding"), value
        flat[path] = flat_value
    network = build(DIT_REFERENCE, (16, 16, 4))
    flat |= initial_leaves(network, is_interval_path)
    assert {path: value.shape for path, value in flat.items()} == shapes(network)
    return network, nested({path: value.astype(dtype) for path, value in flat.items()}), data


def nhwc(x):
    return x.transpose(0, 2, 3, 1)


def test_unet_equals_the_meanflow_unet():
    """Output with and without an augmentation label, and du/dt along (dz, dr, dt) = (v, 0, 1)."""
    network, params, data = unet_reference()
    z, r, t, v, label = nhwc(data["z"]), data["r"], data["t"], nhwc(data["v"]), data["aug_cond"]
    plain = fast_compile(network.apply)(params, z, r, t)
    assert relative_l2(plain, nhwc(data["u_noaug"])) <= PARITY

    @fast_compile
    def derivative(params, z, r, t):
        def u(z, r, t):
            return network.apply(params, z, r, t, condition=condition(label))

        return jax.jvp(u, (z, r, t), (v, jnp.zeros_like(r), jnp.ones_like(t)))

    u, dudt = derivative(params, z, r, t)
    assert relative_l2(u, nhwc(data["u_aug"])) <= PARITY
    assert relative_l2(dudt, nhwc(data["dudt_aug"])) <= PARITY


def test_dit_equals_sit():
    """u(z, t, t) = -SiT(z, 1 - t), the time reversal and the sign being folded into the weights."""
    network, params, data = dit_reference(np.float32)
    z, t, y = nhwc(data["x"]), 1 - data["t"], data["y"].astype(np.int32)
    u = fast_compile(network.apply)(params, z, t, t, label=y)
    assert relative_l2(u, -nhwc(data["out"])) <= PARITY
    assert relative_l2(u, -nhwc(data["out"])[::-1]) > 0.1
    null = fast_compile(network.apply)(params, z, t, t)
    assert y[3] == DIT_REFERENCE.num_classes and np.array_equal(null[3], u[3])
    assert relative_l2(null[:3], u[:3]) > 0.01


def test_dit_equals_sit_in_float64():
    """With parameters and inputs in float64 nothing inside rounds to float32."""
    with jax.enable_x64(True):
        network, params, data = dit_reference(np.float64)
        z, t = nhwc(data["x"]).astype(np.float64), 1 - data["t"].astype(np.float64)
        u = fast_compile(network.apply)(params, z, t, t, label=data["y"])
        assert u.dtype == jnp.float64
        # The reference is 1.5e-8 off: its frequencies and position table are float32, 6e-8 each.
        assert relative_l2(u, -nhwc(data["out_f64"])) <= 5e-8


def test_position_embedding_equals_sit():
    data = np.load(GOLDEN / "sit_tiny_io.npz")
    np.testing.assert_allclose(position_embedding(8, 8, 96), data["fixed/pos_embed"][0], atol=1e-6)


def test_resampling_is_the_convolution_with_the_4x4_filter():
    """Down: depthwise outer([1,3,3,1]) / 64, stride 2, padding 1. Up: four times its transpose."""
    x, y = np.random.default_rng(0).standard_normal((2, 2, 6, 10, 3)).astype(np.float32)
    y = y[:, :3, :5]
    window = np.outer([1, 3, 3, 1], [1, 3, 3, 1]).astype(np.float32) / 64

    def down(x):
        kernel = np.broadcast_to(window[:, :, None, None], (4, 4, 1, 3))
        numbers = ("NHWC", "HWIO", "NHWC")
        padding = ((1, 1), (1, 1))
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), padding, dimension_numbers=numbers, feature_group_count=3
        )

    want, transpose = jax.vjp(down, x)
    np.testing.assert_allclose(layers.blur_down(x), want, atol=1e-6)
    np.testing.assert_allclose(layers.blur_up(y), 4 * transpose(y)[0], atol=1e-6)


def test_box_resampling():
    """Down: the mean of each 2 x 2 block. Up: every pixel four times."""
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    want = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    np.testing.assert_allclose(layers.box_down(x), want, atol=1e-5)
    np.testing.assert_array_equal(layers.box_up(x), np.kron(x, np.ones((1, 2, 2, 1), np.float32)))


def test_edm_velocity_is_that_of_the_denoiser():
    """v = (z - D(z / (1 - t), t / (1 - t))) / t with the literal D.

    The limits are -z - F(z / s) at t = 0 and z - s F(z) at t = 1.
    """
    with jax.enable_x64(True):
        z, t = (
            np.random.default_rng(0).standard_normal((6, 4, 4, 2)),
            np.array([1e-3, 0.1, 0.5, 0.9, 0.999, 0.3]),
        )
        for s in (0.5, 1.3):
            rows = t[:, None, None, None]
            x, sigma = z / (1 - rows), rows / (1 - rows)
            total = s**2 + sigma**2
            denoised = s**2 / total * x + sigma * s / np.sqrt(total) * np.sin(
                3 * x / np.sqrt(total)
            )
            got = edm_velocity(z, jnp.asarray(t), s, lambda y: jnp.sin(3 * y))
            np.testing.assert_allclose(got, (z - denoised) / rows, rtol=0, atol=1e-11)
            ends = edm_velocity(z[:2], jnp.array([0.0, 1.0]), s, lambda y: jnp.sin(3 * y))
            want = -z[0] - np.sin(3 * z[0] / s), z[1] - s * np.sin(3 * z[1])
            np.testing.assert_allclose(ends, np.stack(want), rtol=0, atol=1e-13)


def test_log_sigma_stays_finite():
    """ln(t / (1 - t)) / 4 for sigma in [0.002, 80], with derivative 1 / (4 t (1 - t)).

    Beyond that range it keeps its end values, with derivative 0.
    """
    t = np.array([0, 1e-6, 0.0019, 0.0021, 0.5, 0.98, 0.99, 1], np.float32)
    value, slope = jax.vmap(jax.value_and_grad(lambda t: log_sigma(t[None])[0]))(t)
    sigma = np.clip(t[3:6].astype(np.float64) / (1 - t[3:6].astype(np.float64)), 0.002, 80)
    want = np.log([0.002] * 3 + list(sigma) + [80] * 2) / 4
    np.testing.assert_allclose(value, want, atol=2e-6)
    np.testing.assert_allclose(
        slope, [0] * 3 + list(1 / (4 * t[3:6] * (1 - t[3:6]))) + [0] * 2, rtol=1e-5
    )


@pytest.mark.parametrize("embedding", ["positional", "fourier"])
def test_time_scale_scales_t_and_not_the_interval(embedding):
    """A network with time_scale 4 at (r, t) is the plain network at (4 t - h, 4 t).

    Powers of two make this exact.
    """
    config = dataclasses.replace(UNET, embedding=embedding, embedding_mult=1, resample="box")
    plain, scaled = (
        build(config, (8, 8, 2)),
        build(dataclasses.replace(config, time_scale=4.0), (8, 8, 2)),
    )
    draw, rng = shapes(plain), np.random.default_rng(0)
    params = nested(
        {path: 0.3 * rng.standard_normal(shape).astype(np.float32) for path, shape in draw.items()}
    )
    z, *_ = small("unet")
    t, h = np.float32([0.125, 0.25, 0.5]), np.float32([0.125, 0.0, 0.25])
    u = fast_compile(scaled.apply)(params, z, t - h, t)
    np.testing.assert_array_equal(fast_compile(plain.apply)(params, z, 4 * t - h, 4 * t), u)
    assert relative_l2(fast_compile(plain.apply)(params, z, t - h, t), u) > 1e-3


def test_fourier_frequencies_are_drawn_and_stay():
    """Normal with deviation 16, a leaf of the parameters, without a gradient."""
    small = {
        "channels": 8,
        "channel_mult": (1,),
        "blocks": 1,
        "augment_dim": 0,
        "attention_resolutions": (),
    }
    config = UNetConfig(
        **small, embedding="fourier", embedding_mult=250, time_input="log_sigma", precond="edm"
    )
    network = build(config, (4, 4, 1))
    freqs = initial_leaves(network, lambda path: path[0] == "map_noise")
    assert list(freqs) == [("map_noise", "freqs")] and freqs[("map_noise", "freqs")].shape == (
        1000,
    )
    assert np.std(freqs[("map_noise", "freqs")]) == pytest.approx(16, rel=0.08)
    rng = np.random.default_rng(0)
    params = nested(
        {
            path: rng.standard_normal(shape).astype(np.float32)
            for path, shape in shapes(network).items()
        }
    )
    z, t = rng.standard_normal((2, 4, 4, 1)).astype(np.float32), np.float32([0.2, 0.7])
    slopes = leaf_paths(
        fast_compile(jax.grad(lambda p: jnp.sum(network.apply(p, z, t, t) ** 2)))(params)
    )
    assert not np.any(slopes.pop(("map_noise", "freqs")))
    assert all(np.any(slope) for path, slope in slopes.items())


def test_attention_equals_jax_nn():
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 7, 3, 8)).astype(np.float32)
    want = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    np.testing.assert_allclose(attention.xla(q, k, v), want, atol=2e-6)


def test_parameter_counts():
    """Published sizes: MeanFlow's CIFAR-10 U-Net, and SiT-XL/2.

    Ours has no sigma half, and has an interval branch.
    """
    assert count(build(UNetConfig(), (32, 32, 3))) == 55_932_419
    assert (
        count(build(UNetConfig(augment_dim=0), (32, 32, 3))) == 55_932_419 - 512 * 6 == 55_929_347
    )
    sit = (
        675_129_632 - 256 * 1152
    )  # all of SiT-XL/2 but its position table, which is not a parameter
    sigma = 16 * 1152 + 16  # 4 of the 8 output channels of a 2 x 2 patch
    interval = (256 * 1152 + 1152) + (1152 * 1152 + 1152)
    labelled = count(build(DiTConfig(**DIT_SIZES["XL"], num_classes=1000), (32, 32, 4)))
    assert labelled == sit - sigma + interval == 676_440_592
    assert count(build(DiTConfig(**DIT_SIZES["XL"]), (32, 32, 4))) == labelled - 1001 * 1152


def test_parameters_are_a_plain_float32_tree_with_an_interval_branch():
    for kind in SMALL:
        params = jax.eval_shape(small_network(kind).init, jax.random.key(0))
        assert type(params) is dict and "interval" in params
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert is_interval_path(("interval", "mlp_0", "kernel"))
    assert not is_interval_path(("t_embedder", "mlp_0", "kernel"))


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


@pytest.mark.parametrize(
    ("config", "shape", "dtype", "message"),
    [
        (
            DiTConfig(depth=1, width=16, heads=2, patch=4),
            (6, 8, 1),
            "float32",
            r"network\.patch is 4.*6x8",
        ),
        (
            DiTConfig(depth=1, width=16, heads=3),
            (4, 4, 1),
            "float32",
            r"network\.width is 16.*heads, 3",
        ),
        (DiTConfig(depth=0, width=16, heads=2), (4, 4, 1), "float32", r"network\.depth is 0"),
        (
            DiTConfig(depth=1, width=16, heads=2, interval_init="one"),
            (4, 4, 1),
            "float32",
            r"interval_init is 'one'",
        ),
        (
            DiTConfig(depth=1, width=16, heads=2, num_classes=-1),
            (4, 4, 1),
            "float32",
            r"network\.num_classes is -1",
        ),
        (UNetConfig(), (30, 30, 3), "float32", r"network\.channel_mult.*divisible by 4; got 30"),
        (UNetConfig(), (32, 16, 3), "float32", r"image_shape.*square"),
        (UNetConfig(dropout=1.0), (32, 32, 3), "float32", r"network\.dropout is 1\.0"),
        (
            UNetConfig(interval_init="zeros"),
            (32, 32, 3),
            "float32",
            r"interval_init is 'zeros'.*'zero', 'random'",
        ),
        (
            UNetConfig(resample="bilinear"),
            (32, 32, 3),
            "float32",
            r"resample is 'bilinear'.*'binomial', 'box'",
        ),
        (
            UNetConfig(embedding="learned"),
            (32, 32, 3),
            "float32",
            r"embedding is 'learned'.*'fourier'",
        ),
        (UNetConfig(embedding_mult=0), (32, 32, 3), "float32", r"network\.embedding_mult is 0"),
        (
            UNetConfig(channels=5, embedding_mult=1),
            (32, 32, 3),
            "float32",
            r"channels is 5; expected an even number",
        ),
        (
            UNetConfig(time_input="sigma"),
            (32, 32, 3),
            "float32",
            r"time_input is 'sigma'.*'log_sigma'",
        ),
        (
            UNetConfig(time_scale=0.0),
            (32, 32, 3),
            "float32",
            r"time_scale is 0\.0; expected a finite number above 0",
        ),
        (
            UNetConfig(time_input="log_sigma", time_scale=999.0),
            (32, 32, 3),
            "float32",
            r"time_scale is 999\.0 with time_input",
        ),
        (UNetConfig(precond="vp"), (32, 32, 3), "float32", r"precond is 'vp'.*'none', 'edm'"),
        (
            UNetConfig(sigma_data=0.4),
            (32, 32, 3),
            "float32",
            r"sigma_data is 0\.4 with precond 'none'",
        ),
        (
            UNetConfig(precond="edm", sigma_data=math.inf),
            (32, 32, 3),
            "float32",
            r"sigma_data is inf",
        ),
        (UNetConfig(kind="resnet"), (32, 32, 3), "float32", r"network\.kind is 'resnet'"),
        (UNetConfig(kind="dit"), (32, 32, 3), "float32", r"network\.kind is 'dit' in a UNetConfig"),
        (MLPConfig(interval_init=""), (2,), "float32", r"interval_init is ''"),
        (MLPConfig(width=0), (2,), "float32", r"network\.width is 0"),
        (MLPConfig(), (2,), "float16", r"dtype is float16"),
    ],
)
def test_build_names_the_field_that_does_not_fit(config, shape, dtype, message):
    with pytest.raises(DmfError, match=message):
        build(config, shape, dtype)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "dit",
            {"z": np.zeros((3, 6, 4, 2), np.float32)},
            r"z has shape \(3, 6, 4, 2\); expected \(B, 4, 6, 2\)",
        ),
        ("mlp", {"z": np.zeros((3, 4), np.float32)}, r"z has shape \(3, 4\); expected \(B, 5\)"),
        (
            "mlp",
            {"r": np.zeros((), np.float32)},
            r"r has shape \(\); expected one time per row, \(3,\)",
        ),
        ("mlp", {"t": np.zeros((3, 1), np.float32)}, r"t has shape \(3, 1\)"),
        ("mlp", {"label": np.zeros(3, np.int32)}, r"label.*expected None"),
        (
            "dit",
            {"label": np.zeros(3, np.float32)},
            r"label has shape \(3,\) of float32; expected \(3,\) of integers",
        ),
        (
            "unet",
            {"augment": np.zeros((3, 6), np.float32)},
            r"augment has shape \(3, 6\).*expected \(3, 2\) of floats",
        ),
        ("unet", {"train": True}, r"rngs is None.*network\.dropout is 0\.3"),
        ("unet", {"train": True, "rngs": np.zeros((3, 2), np.uint32)}, r"rngs.*of typed keys"),
    ],
)
def test_apply_names_the_argument_that_does_not_fit(kind, changes, message):
    config, shape, _ = SMALL[kind]
    network, changes = build(config, shape), dict(changes)
    z, r, t, label, _ = small(kind)
    given = condition(label)
    given = given._replace(**{k: changes.pop(k) for k in given._fields if k in changes})
    arguments = {"z": z, "r": r, "t": t, "condition": given} | changes
    params = jax.eval_shape(network.init, jax.random.key(0))
    with pytest.raises(DmfError, match=message):
        jax.eval_shape(lambda params: network.apply(params, **arguments), params)


def test_channels_that_do_not_group_are_named():
    network = build(
        UNetConfig(channels=132, channel_mult=(1,), blocks=1, attention_resolutions=()), (8, 8, 3)
    )
    with pytest.raises(DmfError, match=r"network\.channels: a layer of 132 channels"):
        jax.eval_shape(network.init, jax.random.key(0))


def test_attention_that_no_level_would_have_is_named():
    with pytest.raises(
        DmfError,
        match=r"attention_resolutions has 16; expected some of 24, 12, 6, .* images of 24 pixels",
    ):
        build(UNetConfig(), (24, 24, 3))


@pytest.mark.parametrize("form", ["edm, log sigma", "times 999"])
def test_the_derivative_along_time_of_the_other_forms_of_time(form):
    """du/dt of EDM's velocity and of scaled times, against a central difference in float64."""
    fields = (
        {"time_scale": 999.0}
        if form == "times 999"
        else {"time_input": "log_sigma", "precond": "edm"}
    )
    small = {
        "channels": 8,
        "channel_mult": (1,),
        "blocks": 1,
        "augment_dim": 0,
        "attention_resolutions": (),
    }
    with jax.enable_x64(True):
        network = build(UNetConfig(**small, **fields), (4, 4, 1))
        rng = np.random.default_rng(0)
        params = nested(
            {path: rng.standard_normal(shape) / 4 for path, shape in shapes(network).items()}
        )
        z, t = rng.standard_normal((3, 4, 4, 1)), np.array([0.05, 0.4, 0.97])
        u = fast_compile(lambda t: network.apply(params, z, 0.5 * t, t))
        _, slope = jax.jvp(
            lambda t: network.apply(params, z, 0.5 * t, t), (jnp.asarray(t),), (jnp.ones(3),)
        )
        difference = (u(t + 1e-6) - u(t - 1e-6)) / 2e-6
    assert np.linalg.norm(slope) > 0.1
    np.testing.assert_allclose(slope, difference, rtol=0, atol=1e-5 * np.abs(slope).max())


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
