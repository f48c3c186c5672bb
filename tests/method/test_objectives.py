"""The targets against closed forms, identities, and losses of independent implementations.

Gaussian data N(0, s^2) make everything linear. The regression fixed point of a stage is
u(z, 0, t) = k(t) z with a known k. The exact average velocity is known for every (r, t).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.method import objectives
from dmf.method.flow import Rows, RowSplit
from dmf.method.intervals import INTERVALS, dagger, linear
from dmf.method.objectives import LossConfig
from dmf.method.weights import adaptive
from dmf.method.weights import weighted_loss as weighted_rows
from tests.tiny import residuals

RAW, UNIT = LossConfig(residual_scale="raw"), LossConfig(residual_scale="unit")
ALL_PAIRS = lambda n: RowSplit(n, 1, 1)  # noqa: E731


def weighted_loss(e, p, eps):
    """Loss and squares of rows whose weight does not look at their times."""
    return weighted_rows(e, jnp.zeros(len(e)), jnp.ones(len(e)), 0.0, adaptive(p, eps))


def random_net(key, width=64, dim=8):
    """A small random network u(z, r, t), smooth and not small in any argument."""
    keys = jax.random.split(key, 3)
    shapes = ((dim + 16, width, 0.25), (width, width, 0.125), (width, dim, 0.125))
    params = [s * jax.random.normal(k, (a, b)) for k, (a, b, s) in zip(keys, shapes, strict=True)]

    def features(t):
        f = 2.0 ** jnp.arange(-1, 3)
        return jnp.concatenate([jnp.cos(t[:, None] * f), jnp.sin(t[:, None] * f)], -1)

    def net(params, rows):
        h = jnp.concatenate([rows.z, features(rows.t), features(rows.t - rows.r)], -1)
        h = jnp.tanh(h @ params[0])
        h = h + jnp.tanh(h @ params[1])
        return h @ params[2]

    return net, params


def random_rows(n=32, dim=8, border=0):
    """Rows with r < t, the last `border` of every 4 with r = t."""
    x, e = jax.random.normal(jax.random.key(1), (2, n, dim))
    ab = jax.random.uniform(jax.random.key(2), (2, n), minval=0.05, maxval=0.95)
    r, t = ab.min(0), ab.max(0)
    if border:
        r = jnp.where(jnp.arange(n) % 4 >= 4 - border, t, r)
    return Rows((1 - t)[:, None] * x + t[:, None] * e, r, t, e - x)


def gradient(kind, net, params, rows, split, rho, config, interval=linear, p=0.0, eps=1e-3):
    """Flat gradient of the mean weighted loss, r = t and r < t rows together."""

    def loss(params):
        found = residuals(kind, net, params, rows, split, rho, interval, config)
        return (
            sum(
                jnp.sum(weighted_loss(e, p, eps)[0])
                for e in (found.border, found.pairs)
                if e is not None
            )
            / split.batch
        )

    return jnp.concatenate([g.ravel() for g in jax.tree.leaves(jax.grad(loss)(params))])


def distance(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


# --- Gaussian fixed points -----------------------------------------------------------------------


def flow_coefficient(t, s):
    """c_v(t): the marginal velocity of N(0, s^2) data is c_v z."""
    return (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)


def solve_fixed_point(times, look_up, rows, points, s, rho, interval, config, sweeps):
    """Iterates the regression of u = k(t) z on the real loss.

    A Newton step in k is exact, as targets are stopped.
    times: (M,) ascending grid. rows: M * points rows, `points` quadrature points for each time.
    look_up(k, t) -> k(t).
    """

    def net(k, rows):
        return look_up(k, rows.t)[:, None] * rows.z

    def loss(k):
        e = residuals("discrete", net, k, rows, ALL_PAIRS(len(rows.t)), rho, interval, config).pairs
        return jnp.sum(weighted_loss(e, 0.0, 1.0)[0]) / 2

    curvature = jnp.sum(rows.z.reshape(len(times), points) ** 2, 1)
    step = jax.jit(lambda k: k - jax.grad(loss)(k) / curvature)
    k = flow_coefficient(times, s)
    for _ in range(sweeps):
        k = step(k)
    assert float(jnp.abs(jax.jit(jax.grad(loss))(k) / curvature).max()) < 1e-9
    return k


@pytest.mark.parametrize(
    ("interval", "q", "s", "gain"),
    [
        ("linear", 2, 0.1, 2.098),
        ("linear", 4, 0.5, 1.095),
        ("linear", 16, 2.0, 0.957),
        ("linear", 16, 0.02, 1.205),
        ("dagger", 2, 0.1, 1.607),
        ("dagger", 4, 0.5, 1.026),
        ("dagger", 16, 2.0, 0.989),
        ("dagger", 16, 10.0, 0.985),
    ],
)
def test_training_lands_on_the_gaussian_fixed_point(float64, interval, q, s, gain):
    # The published gain is (1 - t k(t)) std(z_t) / s at t = .98, r = 0. The exact spread gives 1.
    noise_ratio = jnp.exp(jnp.linspace(np.log(1e-4), np.log(0.98 / 0.02), 3000))
    times = noise_ratio / (1 + noise_ratio)
    nodes, weights = np.polynomial.hermite_e.hermegauss(
        2
    )  # exact for the second moments that matter here
    assert np.allclose(weights, weights[0])
    x, e = (a.ravel() for a in np.meshgrid(s * nodes, nodes))
    t = jnp.repeat(times, 4)
    z, v = (1 - t) * jnp.tile(x, 3000) + t * jnp.tile(e, 3000), jnp.tile(e - x, 3000)
    rows = Rows(z[:, None], jnp.zeros_like(t), t, v[:, None])

    def look_up(k, t):
        # The log noise ratio is the grid's coordinate. Below, the flow velocity is good to 1e-4.
        ratio = jnp.log(jnp.maximum(t / (1 - t), 1e-300))
        return jnp.where(
            t < times[0] * 0.999999,
            flow_coefficient(t, s),
            jnp.interp(ratio, jnp.log(noise_ratio), k),
        )

    k = solve_fixed_point(
        times, look_up, rows, 4, s, 1 / q, INTERVALS[interval], RAW, sweeps=60 * q
    )
    found = (1 - times[-1] * k[-1]) * jnp.sqrt((1 - times[-1]) ** 2 * s**2 + times[-1] ** 2) / s
    assert float(found) == pytest.approx(
        gain, abs=1.5e-3
    )  # three printed digits, interpolation on a coarser grid


@pytest.mark.parametrize(
    ("s", "a", "alpha_flow", "discrete"),
    [
        (0.5, 1 / 2, 0.3648, 0.5949),
        (0.5, 1 / 8, 0.4711, 0.5254),
        (0.25, 1 / 4, 0.2261, 0.3105),
        (2.0, 1 / 2, 0.8503, 1.1619),
        (2.0, 1 / 8, 1.7401, 1.8226),
    ],
)
def test_one_weight_family_has_both_published_fixed_points(float64, s, a, alpha_flow, discrete):
    # One step from t = 1 to 0 along the marginal velocity leaves a spread |1 - k(1)|. The truth
    # is s.
    levels = int(np.ceil(np.log(1e-7) / np.log(1 - a)))
    times = (1 - a) ** jnp.arange(levels, -1, -1.0)
    c = flow_coefficient(times, s)
    rows = Rows(jnp.ones((levels + 1, 1)), jnp.zeros(levels + 1), times, c[:, None])

    def look_up(k, t):
        place = levels - jnp.round(jnp.log(t) / jnp.log(1 - a)).astype(int)
        return jnp.where(place < 0, flow_coefficient(t, s), k[jnp.maximum(place, 0)])

    for c_rule, spread in ((0.0, alpha_flow), (1.0, discrete)):
        config = LossConfig(product_rule=c_rule)
        k = solve_fixed_point(
            times, look_up, rows, 1, s, a, linear, config, sweeps=40 * int(1 / a) + levels
        )
        assert float(abs(1 - k[-1])) == pytest.approx(spread, abs=6e-5)


def exact_rows(s, n=64):
    """(the exact average velocity as a network, rows that move along the marginal velocity).

    Data are N(0, s^2).
    """
    ab = jax.random.uniform(jax.random.key(3), (2, n), minval=0.05, maxval=0.95)
    r, t = ab.min(0), ab.max(0)
    z = jax.random.normal(jax.random.key(4), (n, 1))
    std = lambda t: jnp.sqrt((1 - t) ** 2 * s**2 + t**2)  # noqa: E731

    def net(params, rows):
        return ((1 - std(rows.r) / std(rows.t)) / (rows.t - rows.r))[:, None] * rows.z

    return net, Rows(z, r, t, flow_coefficient(t, s)[:, None] * z)


def test_the_exact_average_velocity_solves_the_jvp_identity(float64):
    net, rows = exact_rows(0.5)
    residual = residuals("jvp", net, None, rows, ALL_PAIRS(64), None, linear, RAW).pairs
    assert float(jnp.abs(residual).max()) < 1e-13


@pytest.mark.parametrize("interval", [linear, dagger])
def test_the_discrete_identity_misses_the_exact_solution_by_order_a(float64, interval):
    net, rows = exact_rows(0.5)
    missed = [
        float(
            jnp.linalg.norm(
                residuals("discrete", net, None, rows, ALL_PAIRS(64), a, interval, UNIT).pairs
            )
        )
        for a in (2.0**-4, 2.0**-6, 2.0**-8)
    ]
    assert missed[2] > 1e-4 and np.allclose(
        [missed[0] / missed[1], missed[1] / missed[2]], 4, rtol=0.25
    )


# --- independent implementations -----------------------------------------------------------------


@pytest.fixture
def mlp(golden):
    """The tanh network u(z, t, h) of the stored reference, with its rows in channel-last order."""
    d = golden("mlp_meanflow_losses.npz")
    params = {k[2:]: jnp.asarray(d[k], jnp.float64) for k in d.files if k.startswith("w/")}

    def net(p, rows):
        inputs = jnp.concatenate(
            [rows.z.reshape(len(rows.t), -1), rows.t[:, None], (rows.t - rows.r)[:, None]], -1
        )
        h = jnp.tanh(inputs @ p["W1"] + p["b1"])
        h = jnp.tanh(h @ p["W2"] + p["b2"])
        return (h @ p["W3"] + p["b3"]).reshape(rows.z.shape)

    array = lambda k: jnp.asarray(d[k], jnp.float64)  # noqa: E731
    x, e, r, t = map(array, "xert")
    tb = t[:, None, None, None]
    return d, net, params, Rows((1 - tb) * x + tb * e, r, t, e - x)


def test_jvp_loss_and_gradient_equal_the_pytorch_meanflow(float64, mlp):
    d, net, params, rows = mlp
    np.testing.assert_allclose(net(params, rows), d["u_f64"], atol=1e-12)
    residual = residuals("jvp", net, params, rows, ALL_PAIRS(6), None, linear, RAW).pairs
    np.testing.assert_allclose(net(params, rows) - residual, d["u_tgt_f64"], atol=1e-10)
    for p, eps in ((0.75, 1e-3), (1.0, 1e-2), (0.0, 1e-3)):

        def loss(params, p=p, eps=eps):
            e = residuals("jvp", net, params, rows, ALL_PAIRS(6), None, linear, RAW).pairs
            return jnp.mean(weighted_loss(e, p, eps)[0])

        value, grad = jax.value_and_grad(loss)(params)
        name = f"py_meanflow/p{p}_eps{eps}"
        assert float(value) == pytest.approx(
            float(d[f"{name}/loss"]), rel=2e-7
        )  # the reference ran in float32
        for key, g in grad.items():
            assert distance(g, d[f"{name}/grad/{key}"]) < 5e-6


@pytest.mark.parametrize("step", [0.5, 0.1, 0.01, 0.001])
def test_backward_difference_equals_the_stored_one(float64, mlp, step):
    d, net, params, rows = mlp
    apart = np.asarray(rows.r < rows.t)
    L = jnp.where(apart, rows.t - rows.r, 1.0)
    back = objectives.shift_back(rows, jnp.where(apart, step / L, 0.0))
    inside = apart & np.asarray(
        rows.t - step > rows.r
    )  # shift_back stops at r, the reference does not
    found = (net(params, rows) - net(params, back)) / step
    np.testing.assert_allclose(found[inside], d[f"fd/f64/dudt_back_{step}"][inside], atol=1e-9)
    assert inside.sum() >= 1


def test_weighted_loss_per_row_equals_an_independent_implementation(float64, mlp):
    d, net, params, rows = mlp
    e = residuals("jvp", net, params, rows, ALL_PAIRS(6), None, linear, RAW).pairs
    loss, squares = weighted_loss(e, 1.0, 1e-3)
    np.testing.assert_allclose(
        squares, d["sumsq_f64"], rtol=1e-8
    )  # the reference rounds t - r to float32
    np.testing.assert_allclose(loss, squares / (squares + 1e-3), rtol=1e-12)
    np.testing.assert_allclose(
        weighted_loss(e, 0.0, 1e-3)[0], d["zhuyu/uniform/loss_per_sample"], rtol=1e-6
    )


def test_bfloat16_residuals_are_summed_in_float32():
    e = jnp.full((1, 3072), 0.1, jnp.bfloat16)
    loss, squares = weighted_loss(e, 0.0, 1e-3)
    assert squares.dtype == jnp.float32 and float(squares[0]) == pytest.approx(
        3072 * float(e[0, 0]) ** 2, rel=1e-5
    )
