"""The networks against independent implementations and formulas."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.networks import (
    DIT_SIZES,
    DiTConfig,
    UNetConfig,
    attention,
    build,
    layers,
)
from dmf.networks.layers import log_sigma, position_embedding
from dmf.networks.unet import edm_velocity
from tests import GOLDEN
from tests.networks.small import (
    DIT_REFERENCE,
    PARITY,
    UNET,
    condition,
    count,
    dit_reference,
    fast_compile,
    initial_leaves,
    leaf_paths,
    nested,
    nhwc,
    relative_l2,
    shapes,
    small,
    unet_reference,
)


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
