"""The path, the laws of (r, t) and the exact split into rows with r = t and r < t."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.errors import DmfError
from dmf.method import flow
from dmf.method.flow import TIME_LAWS, RowSplit, TimeLaw, row_split


def test_path_ends_at_data_and_noise_and_v_is_its_derivative(rng):
    x, e = rng.normal(size=(2, 5, 3, 3, 1)).astype(np.float32)
    z0, v = flow.interpolate(x, e, jnp.zeros(5))
    z1, _ = flow.interpolate(x, e, jnp.ones(5))
    np.testing.assert_array_equal(z0, x)
    np.testing.assert_array_equal(z1, e)
    t = jnp.full(5, 0.3)
    _, dz = jax.jvp(lambda s: flow.interpolate(x, e, s)[0], (t,), (jnp.ones(5),))
    np.testing.assert_allclose(dz, v, rtol=1e-6)


@pytest.mark.parametrize("name", TIME_LAWS)
def test_times_are_ordered_and_the_share_of_pairs_is_exact(name):
    law = TIME_LAWS[name]
    split = row_split(4096, law.r_neq_t_fraction)
    r, t = flow.draw_times(jax.random.key(1), law, split)
    assert (r <= t).all() and (r > 0).all() and (t < 1).all()
    border_r, border_t = split.border_of((r, t))
    np.testing.assert_array_equal(border_r, border_t)
    assert split.n_pairs == law.r_neq_t_fraction * 4096
    if law.pairing == "sorted":
        assert (np.asarray(r < t) == np.asarray(split.is_pair())).all()


def test_cifar_v1_keeps_seventy_percent_of_rows_apart():
    # r = min(r, t) sends some of the 75 % back to r = t. It leaves .700, with a median gap of .34.
    split = row_split(400_000, 0.75)
    r, t = flow.draw_times(jax.random.key(0), TIME_LAWS["cifar_v1"], split)
    assert abs(float(jnp.mean(r < t)) - 0.700) < 0.003
    assert abs(float(jnp.median((t - r)[r < t])) - 0.34) < 0.01


def test_logit_normal_quantiles():
    law = TimeLaw("min", -0.4, 1.0, -4.0, 1.6, 0.0)
    _, t = flow.draw_times(jax.random.key(0), law, row_split(200_000, 0.0))
    expected = 1 / (1 + np.exp(-(-0.4 + np.array([-1.0, 0.0, 1.0]))))
    np.testing.assert_allclose(np.quantile(t, [0.158655, 0.5, 0.841345]), expected, atol=0.005)


@pytest.mark.parametrize("pairing", ["sorted", "above"])
def test_uniform_times_have_the_quantiles_of_their_pairing(pairing):
    """Two sorted draws: t has the distribution t^2. Above: r is uniform, and t given r too."""
    law = TimeLaw(pairing, r_neq_t_fraction=0.5, base="uniform", border="own")
    split = row_split(200_000, 0.5)
    (r, t), (same, border) = (
        of(flow.draw_times(jax.random.key(0), law, split))
        for of in (split.pairs_of, split.border_of)
    )
    seen = [border, r, (t - r) / (1 - r)] if pairing == "above" else [border, t**2, r / t]
    np.testing.assert_array_equal(same, border)
    for uniform in seen:
        np.testing.assert_allclose(
            np.quantile(uniform, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.01
        )


def test_shifted_times_are_the_drawn_ones_nearer_to_noise():
    """s = sqrt(values / 4096) for flows in features: 6.93 at 256 px, 13.86 at 512 px."""
    split, key, s = row_split(50_000, 0.5), jax.random.key(0), (16 * 16 * 768 / 4096) ** 0.5
    assert abs(s - 6.928) < 1e-3 and abs((32 * 32 * 768 / 4096) ** 0.5 - 13.856) < 1e-3
    grid = flow.shifted(np.linspace(1, 0, 16), s)  # MF-RAE's grid of 16 states
    np.testing.assert_allclose(grid[:5], [1, 0.9898, 0.9783, 0.9652, 0.9501], atol=5e-5)
    for pairing in ("sorted", "zero", "above"):
        law = TimeLaw(pairing, base="uniform", r_neq_t_fraction=0.5)
        plain = flow.draw_times(key, law, split)
        moved = dataclasses.replace(law, shift=s)
        r, t = flow.draw_times(key, moved, split)
        for found, drawn in zip((r, t), plain, strict=True):
            # Noise and data are in the ratio t : 1 - t, which grows s times.
            np.testing.assert_allclose(found * (1 - drawn), s * drawn * (1 - found), atol=1e-5)
        np.testing.assert_array_equal(split.border_of(r), split.border_of(t))
        assert (r <= t).all() and float(t.max()) <= 1
        if pairing != "above":
            drawn = float(jnp.mean(split.pairs_of(t - r)))
            assert abs(moved.mean_interval() - drawn) < 5e-3
            drawn = float(jnp.mean(split.border_of(t)))
            assert abs(moved.mean_on_border(lambda t: t) - drawn) < 5e-3


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_split_takes_the_same_rows_whatever_the_number_of_devices(parts):
    assert row_split(64, 0.75, parts) == RowSplit(64, 4, 3)


def test_split_recovers_every_row_once_and_in_order():
    split = row_split(24, 0.25)
    rows = {"a": jnp.arange(24), "b": jnp.arange(48.0).reshape(24, 2)}
    pairs, border = split.pairs_of(rows), split.border_of(rows)
    assert pairs["a"].shape == (6,) and border["b"].shape == (18, 2)
    np.testing.assert_array_equal(pairs["a"], np.arange(0, 24, 4))
    assert sorted([*pairs["a"].tolist(), *border["a"].tolist()]) == list(range(24))
    np.testing.assert_array_equal(split.is_pair()[pairs["a"]], True)


def test_microbatches_keep_groups_whole_and_every_device_its_rows():
    split = row_split(32, 0.25, 2 * 2)
    micro = split.microbatches(jnp.arange(32), 2)
    assert micro.shape == (2, 16) and split.micro(2) == RowSplit(16, 4, 1)
    assert sorted(micro.ravel().tolist()) == list(range(32))
    for rows in micro:
        np.testing.assert_array_equal(rows.reshape(-1, 4)[:, 0] % 4, 0)  # each starts a group
        assert (rows[:8] < 16).all() and (
            rows[8:] >= 16
        ).all()  # the first half stays on the first of two devices


@pytest.mark.parametrize(
    ("batch", "fraction", "parts", "message"),
    [
        (64, 0.3, 1, "19.2 rows, expected a whole number: 0.296875 or 0.3125"),
        (64, 1.5, 1, "r_neq_t_fraction = 1.5: expected a share between 0 and 1"),
        (
            64,
            19 / 64,
            8,
            "pattern cannot be shared by 8 devices x microbatches: expected a multiple of 512",
        ),
    ],
)
def test_impossible_splits_say_what_would_do(batch, fraction, parts, message):
    with pytest.raises(DmfError, match=message):
        row_split(batch, fraction, parts)


def test_the_law_zero_jumps_to_the_data_and_keeps_t_as_drawn():
    split = row_split(64, 0.75)
    r, t = flow.draw_times(jax.random.key(0), TimeLaw(pairing="zero"), split)
    _, same = flow.draw_times(jax.random.key(0), TimeLaw(pairing="min"), split)
    assert (split.pairs_of(r) == 0).all() and (split.border_of(r) == split.border_of(t)).all()
    np.testing.assert_array_equal(t, same)


def test_border_rows_may_have_a_law_of_their_own():
    """Two draws, one for flow matching and one for the average, leave the other rows alone."""
    split = row_split(20_000, 0.5)
    law = TimeLaw("sorted", 0.4, 1.0, -1.2, 1.0, 0.5)
    own = dataclasses.replace(law, border="own", border_mean=0.7, border_std=0.5)
    (r, t), (r_own, t_own) = (flow.draw_times(jax.random.key(0), x, split) for x in (law, own))
    for before, after in ((r, r_own), (t, t_own)):
        np.testing.assert_array_equal(split.pairs_of(after), split.pairs_of(before))
    of_border, r_border = split.border_of((t_own, r_own))
    np.testing.assert_array_equal(of_border, r_border)
    logit = np.log(of_border / (1 - of_border))
    assert logit.mean() == pytest.approx(0.7, abs=0.02)
    assert logit.std() == pytest.approx(0.5, abs=0.02)
