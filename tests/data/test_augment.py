"""Augmentation: the warp against SciPy and closed forms, the law of the draws, and the label."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from dmf.data import augment
from dmf.data.augment import Transform
from dmf.errors import DmfError

P = 0.12
# Compiled once per shape; another test shows that jit changes nothing.
apply_transform = jax.jit(augment.apply_transform)
edm_augment = jax.jit(augment.edm_augment)


def transform(**fields: float) -> Transform:
    return Transform(**{name: jnp.float32(fields.get(name, 0.0)) for name in Transform._fields})


def matrix_of(t: Transform) -> np.ndarray:
    """Output = matrix @ input in (x, y), y down: magnify, stretch by s along (cos a, -sin a)."""
    axis = np.array([np.cos(t.angle), -np.sin(t.angle)])
    across = np.array([np.sin(t.angle), np.cos(t.angle)])
    s = 2.0 ** (0.2 * float(t.aniso))
    stretch = s * np.outer(axis, axis) + np.outer(across, across) / s
    return stretch * 2.0 ** (0.2 * float(t.scale)) @ np.diag([1 - 2 * float(t.flip), 1])


def smooth_image(seed: int, shape: tuple[int, int], sigma: float = 2.0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((*shape, 3))
    image = ndimage.gaussian_filter(noise, (sigma, sigma, 0), mode="mirror")
    return (image / np.abs(image).max()).astype(np.float32)


def blob(x0: float, y0: float, size: int = 32, sigma: float = 2.5) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * sigma**2))[..., None].astype(np.float32)


def moments(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centroid (x, y) from the image centre and covariance of a grey image, as a distribution."""
    weight = np.asarray(image, np.float64)[..., 0]
    weight = weight / weight.sum()
    size = len(weight)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    points = np.stack([x, y])
    mean = (points * weight).sum((1, 2))
    centred = points - mean[:, None, None]
    return mean, np.einsum("ihw,jhw,hw->ij", centred, centred, weight)


def test_sym6_is_the_order_6_symlet_scaling_filter() -> None:
    h = augment.SYM6
    taps = np.arange(12)
    assert h.sum() == pytest.approx(np.sqrt(2), abs=1e-10)
    for shift in range(6):
        assert h[2 * shift :] @ h[: 12 - 2 * shift] == pytest.approx(float(shift == 0), abs=1e-10)
    high_pass = (-1.0) ** taps * h
    for moment in range(6):  # the symlet of order 5 gives -60 for the fifth
        assert abs(high_pass @ (taps - 5.5) ** moment) < 1e-9, moment


def test_warp_by_almost_nothing_is_the_identity() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (16, 32, 3)).astype(np.float32)
    out = apply_transform(x, transform(shift_x=1e-9))
    np.testing.assert_allclose(
        out, x, atol=2e-6
    )  # white noise: the filter bank reconstructs perfectly


@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (8, 8)])
def test_warp_equals_scipy_spline_interpolation_with_mirrored_edges(shape: tuple[int, int]) -> None:
    centre = (np.array(shape) - 1) / 2
    image = smooth_image(0, shape)
    for seed in range(12):
        t = augment.draw_transform(jax.random.key(seed), 1.0)
        shift = 0.125 * np.array([t.shift_y * shape[0], t.shift_x * shape[1]])
        inverse = np.linalg.inv(matrix_of(t))[::-1, ::-1]  # (x, y) to (row, column)
        offset = centre - inverse @ (centre + shift)
        expected = np.stack([
            ndimage.affine_transform(image[..., c], inverse, offset, order=5, mode="mirror")
            for c in range(3)
        ], axis=-1)  # fmt: skip
        # Measured 0.012: bilinear reading, on half pixels, of features about 2 pixels wide.
        np.testing.assert_allclose(apply_transform(image, t), expected, atol=0.015, err_msg=f"{t}")


@pytest.mark.parametrize(
    "fields",
    [
        {"scale": 1.5},
        {"scale": -1.5},
        {"aniso": 1.5},
        {"aniso": 1.5, "angle": np.pi / 5},
        {"aniso": -1.5, "angle": -2.5},
        {"shift_x": 0.9},
        {"shift_y": -0.7},
        {"flip": 1.0, "scale": 0.8, "aniso": 1.0, "angle": 0.7, "shift_x": -0.4, "shift_y": 0.5},
    ],
)
def test_blob_moves_and_spreads_as_the_matrix_says(fields: dict[str, float]) -> None:
    t = transform(**fields)
    matrix, shift = (
        matrix_of(t),
        0.125 * 32 * np.array([fields.get("shift_x", 0), fields.get("shift_y", 0)]),
    )
    position = np.array([2.0, 1.0])
    mean, covariance = moments(apply_transform(blob(*position), t))
    np.testing.assert_allclose(mean, matrix @ position + shift, atol=0.005)
    # Linear interpolation with spacing 1/2 adds a variance of 0 to 1/16 square pixel, in the frame
    # of the input.
    np.testing.assert_allclose(covariance, (6.25 + 1 / 32) * matrix @ matrix.T, atol=0.06)


def test_directions_positive_scale_magnifies_and_positive_shift_goes_right_and_down() -> None:
    mean, covariance = moments(
        apply_transform(blob(0, 0), transform(scale=1.0, shift_x=1.0, shift_y=0.5))
    )
    assert covariance[0, 0] > 6.25 * 1.2
    np.testing.assert_allclose(mean, [4.0, 2.0], atol=0.005)
    _, wide = moments(apply_transform(blob(0, 0), transform(aniso=1.0)))
    assert wide[0, 0] > 6.25 * 1.2 and wide[1, 1] < 6.25 / 1.2
    _, rising = moments(apply_transform(blob(0, 0), transform(aniso=1.0, angle=np.pi / 4)))
    assert rising[0, 1] < -1.0  # counter-clockwise as seen: up and to the right, and y points down


@pytest.mark.parametrize("pixels", [-3, 1, 4])
def test_translation_by_whole_pixels_is_a_shift(pixels: int) -> None:
    x = np.random.default_rng(1).uniform(-1, 1, (32, 32, 3)).astype(np.float32)
    w = pixels / (0.125 * 32)
    right = apply_transform(x, transform(shift_x=w))
    down = apply_transform(x, transform(shift_y=w))
    inner = slice(4, 28)
    np.testing.assert_allclose(right[:, inner], np.roll(x, pixels, axis=1)[:, inner], atol=2e-6)
    np.testing.assert_allclose(down[inner], np.roll(x, pixels, axis=0)[inner], atol=2e-6)


def test_flip_and_identity_are_exact() -> None:
    x = np.random.default_rng(2).uniform(-1, 1, (32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(apply_transform(x, transform()), x)
    np.testing.assert_array_equal(apply_transform(x, transform(flip=1.0)), x[:, ::-1])


def within_5_sigma(hits: np.ndarray, probability: float) -> bool:
    return abs(np.mean(hits) - probability) < 5 * np.sqrt(
        probability * (1 - probability) / len(hits)
    )


def test_draws_follow_the_pipe() -> None:
    keys = jax.random.split(jax.random.key(0), 40_000)
    t = Transform(*map(np.asarray, jax.vmap(augment.draw_transform, in_axes=(0, None))(keys, P)))
    assert set(np.unique(t.flip)) == {0.0, 1.0} and within_5_sigma(t.flip == 1, 0.5)
    scaled, stretched, moved = t.scale != 0, t.aniso != 0, t.shift_x != 0
    for name, hits in {"scale": scaled, "aniso": stretched, "translate": moved}.items():
        assert within_5_sigma(hits, P), name
    np.testing.assert_array_equal(moved, t.shift_y != 0)
    for name, pair in {
        "scale, aniso": scaled & stretched,
        "aniso, translate": stretched & moved,
    }.items():
        assert within_5_sigma(pair, P**2), f"{name} are not independent"
    for name, w in {
        "scale": t.scale[scaled],
        "aniso": t.aniso[stretched],
        "shift": t.shift_x[moved],
    }.items():
        assert abs(w.mean()) < 5 / np.sqrt(len(w)) and abs(w.std() - 1) < 5 / np.sqrt(2 * len(w)), (
            name
        )
    assert abs(np.corrcoef(t.shift_x[moved], t.shift_y[moved])[0, 1]) < 5 / np.sqrt(moved.sum())
    assert not t.angle[~stretched].any() and within_5_sigma(t.angle[stretched] != 0, 0.5)
    angle = t.angle[stretched & (t.angle != 0)]
    spread = np.pi / np.sqrt(3)  # standard deviation of the uniform law on [-pi, pi)
    assert abs(angle.mean()) < 5 * spread / np.sqrt(len(angle)) and abs(angle.std() - spread) < 0.1
    assert -np.pi <= angle.min() < -3 and 3 < angle.max() < np.pi


def test_label_lists_the_draws_in_order() -> None:
    t = transform(flip=1.0, scale=0.3, aniso=-0.5, angle=2.0, shift_x=0.7, shift_y=-0.9)
    expected = [1.0, 0.3, -0.5 * np.cos(2.0), -0.5 * np.sin(2.0), 0.7, -0.9]
    np.testing.assert_allclose(augment.transform_label(t), expected, rtol=1e-6)


def test_label_is_zero_exactly_where_nothing_was_done() -> None:
    x = np.random.default_rng(3).uniform(-1, 1, (256, 16, 16, 3)).astype(np.float32)
    out, label = edm_augment(jax.random.key(0), x, P)
    assert label.shape == (256, 6) and label.dtype == out.dtype == jnp.float32
    unlabelled = ~np.asarray(label).any(axis=1)
    untouched = (np.asarray(out) == x).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(unlabelled, untouched)
    assert within_5_sigma(unlabelled, 0.5 * (1 - P) ** 3)
    only_flipped = (label[:, 0] == 1) & ~np.asarray(label)[:, 1:].any(axis=1)
    assert only_flipped.any()
    np.testing.assert_array_equal(out[only_flipped], x[only_flipped][:, :, ::-1])


def test_probability_zero_does_nothing_at_all() -> None:
    x = np.random.default_rng(4).uniform(-1, 1, (256, 16, 16, 3)).astype(np.float32)
    out, label = edm_augment(jax.random.key(0), x, 0.0)
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(label, np.zeros((256, 6)))


def test_augmented_images_stay_near_the_range_of_the_input() -> None:
    x = np.stack([smooth_image(seed, (32, 32)) for seed in range(32)])
    out, _ = edm_augment(jax.random.key(1), x, 1.0)
    assert np.isfinite(out).all() and np.abs(out).max() < 1.02  # measured 1.007
    constant = np.full_like(x, -1)
    np.testing.assert_allclose(
        edm_augment(jax.random.key(2), constant, 1.0)[0], constant, atol=1e-5
    )


@pytest.mark.parametrize("function", [augment.random_flip, lambda key, x: edm_augment(key, x, 0.5)])
def test_a_row_does_not_depend_on_the_batch_around_it(function) -> None:
    x = np.random.default_rng(5).uniform(-1, 1, (16, 8, 8, 3)).astype(np.float32)
    key = jax.random.key(3)
    whole, half = function(key, x), function(key, x[:8])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:8], b, atol=1e-6), whole, half)
    moved = np.concatenate([x[:1], x[:0:-1]])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b[0], atol=1e-6), whole, function(key, moved)
    )


def test_jit_gives_the_same_and_compiles_once_for_all_probabilities() -> None:
    x = np.random.default_rng(6).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    traces = []

    @jax.jit
    def counted(key: jax.Array, x: jax.Array, p: float) -> tuple[jax.Array, jax.Array]:
        traces.append(p)
        return augment.edm_augment(key, x, p)

    for p in (0.0, P, 1.0):
        compiled = counted(jax.random.key(4), x, p)
    assert len(traces) == 1
    eager = augment.edm_augment(jax.random.key(4), x, 1.0)
    # Fusion rounds the sampling positions differently, by about 1e-6 of a pixel.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), eager, compiled)


def test_filters_are_applied_in_full_float32_on_accelerators() -> None:
    program = apply_transform.lower(jnp.zeros((8, 8, 3)), transform()).as_text()
    assert (
        program.count("stablehlo.dot_general")
        == program.count("precision = [HIGHEST, HIGHEST]")
        > 0
    )


def test_random_flip_mirrors_half_of_the_rows() -> None:
    x = np.random.default_rng(7).uniform(-1, 1, (4096, 2, 3, 1)).astype(np.float32)
    out = np.asarray(augment.random_flip(jax.random.key(5), x))
    kept, mirrored = (out == x).all(axis=(1, 2, 3)), (out == x[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (kept ^ mirrored).all() and within_5_sigma(mirrored, 0.5)


def test_one_pixel_wide_images_are_refused() -> None:
    with pytest.raises(DmfError, match="side of 1"):
        jax.eval_shape(augment.edm_augment, jax.random.key(0), jnp.zeros((2, 8, 1, 3)), P)
