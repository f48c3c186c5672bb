"""The probe: closed-form numbers, the gradients it compares, and a run that it does not change."""

import json
from functools import partial

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import data, sharding, step
from dmf.config import parse
from dmf.method import weights
from dmf.method.flow import Rows
from dmf.run import probe
from tests.runs import train
from tests.tiny import MLP, TINY, Setup, merged

A = 0.7  # of the field dz/dt = A z, whose average velocity is known


def rows_at(r, t):
    z = jax.random.normal(jax.random.key(3), (len(t), 4, 4, 1), jnp.float64)
    return Rows(z, jnp.asarray(r, jnp.float64), jnp.asarray(t, jnp.float64), 0 * z)


def expanded(x):
    return x[:, None, None, None]


def test_two_halves_of_a_true_average_velocity_end_where_the_whole_does():
    with jax.enable_x64(True):
        rows = rows_at([0.0, 0.2, 0.5, 0.9], [1.0, 0.6, 0.51, 1.0])

        def true(rows):
            length = expanded(rows.t - rows.r)
            return rows.z * (1 - jnp.exp(-A * length)) / length

        assert float(probe.jump_error(true, rows).max()) < 1e-14
        # The velocity itself in place of the average: (1 - A L) against (1 - A L / 2)^2, by A L.
        found = probe.jump_error(lambda rows: A * rows.z, rows)
        np.testing.assert_allclose(found, A * (rows.t - rows.r) / 4, rtol=1e-12)


def made(devices=1, base=TINY, **changes):
    setup = Setup(merged(base, guard=dict(rows=16), **changes), devices=devices)
    now = setup.state()
    place = sharding.placed(setup.mesh, now).params
    return (
        setup,
        now,
        probe.Probe(setup.config, data.load(setup.config.data, "train"), setup.mesh, place),
    )


@pytest.mark.parametrize("kind", ["discrete", "jvp"])
def test_one_device_and_eight_see_the_same(kind):
    found = []
    for devices, mesh in ((1, {}), (8, dict(fsdp=8))):
        _, now, look = made(devices, mesh=mesh)
        found.append(look(kind, now.params, 0.25))
    assert found[0].keys() == found[1].keys() and ("change_ulps" in found[0]) == (
        kind == "discrete"
    )
    # Devices decide where the pairs of the law rows lie. All other rows are the same.
    for name in set(found[0]) - {"gradient_ratio", "gradient_cosine"}:
        assert found[0][name] == pytest.approx(found[1][name], rel=2e-4, abs=1e-6), name


def test_one_row_gone_astray_moves_the_mean_and_not_the_median():
    setup, now, look = made()
    even, law = look.drawn
    u = setup.network.apply(now.params, *even[:3], condition=even.condition)
    squares = np.mean(np.square(u - even.v), axis=(1, 2, 3))
    found = look("all_pairs", now.params, 1.0)
    assert found["residual_pairs"] == pytest.approx(squares.mean(), rel=1e-4)
    assert found["residual_median"] == pytest.approx(np.median(squares), rel=1e-4)
    look.drawn = even._replace(v=even.v.at[0].multiply(100.0)), law
    moved = look("all_pairs", now.params, 1.0)
    assert (
        moved["residual_pairs"] > 100 * found["residual_pairs"]
        and moved["residual_median"] < 1.5 * found["residual_median"]
    )


def test_gradients_are_those_of_the_two_kinds_of_rows():
    setup, now, look = made(base=MLP)
    found = look("discrete", now.params, 0.25)
    (_, law), split = look.drawn, look._split

    @partial(jax.jit, static_argnames="part")
    @jax.grad
    def gradient(params, part):
        how = dict(
            kind="discrete", network=setup.network, config=setup.config, split=split, train=False
        )
        _, residuals = step.stage_residuals(params, law, jnp.float32(0.25), **how)
        e, weight = getattr(residuals, part), weights.adaptive(0.5, 1e-3)
        return weights.weighted_loss(e, law.r[: len(e)], law.t[: len(e)], 0.0, weight)[0].mean()

    border, pairs = (
        jax.flatten_util.ravel_pytree(gradient(now.params, part=part))[0]
        for part in ("border", "pairs")
    )
    assert found["gradient_ratio"] == pytest.approx(
        float(jnp.linalg.norm(pairs) / jnp.linalg.norm(border)), rel=1e-4
    )
    cosine = border @ pairs / jnp.linalg.norm(pairs) / jnp.linalg.norm(border)
    assert found["gradient_cosine"] == pytest.approx(float(cosine), rel=1e-4, abs=1e-5)
    assert split.n_pairs == 12 and split.n_border == 4


def test_the_finer_the_interval_the_fewer_ulps_are_left_and_half_precision_leaves_fewer():
    _, now, look = made(base=MLP)
    ulps = [look("discrete", now.params, 2.0**-i)["change_ulps"] for i in (1, 5, 9)]
    assert ulps[0] > 8 * ulps[1] > 64 * ulps[2]
    _, now, half = made(base=MLP, compute_dtype="bfloat16")
    assert half("discrete", now.params, 2.0**-9)["change_ulps"] < 1


def test_intervals_are_spread_evenly_and_times_are_valid():
    _, _, look = made(base=MLP)
    even, _ = look.drawn
    assert (np.histogram(even.t - even.r, probe.EDGES)[0] == 4).all()
    assert (even.r >= 0).all() and (even.t <= 1).all()


def test_a_run_ends_in_the_same_weights_with_a_probe_and_without(tmp_path):
    values = merged(MLP, guard=dict(every_steps=3, rows=8))
    train(parse(values), tmp_path / "with")
    train(parse(MLP), tmp_path / "without")
    rows = [
        json.loads(line) for line in (tmp_path / "with" / "watch.jsonl").read_text().splitlines()
    ]
    ends = {
        4,
        6,
        8,
        10,
        12,
    }  # of pretraining and of four stages
    assert [row["step"] for row in rows] == sorted(ends | {3, 6, 9, 12} | {1, 5, 7, 9, 11})
    assert [row["kind"] for row in rows][-4:] == ["discrete", "discrete", "jvp", "jvp"]
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("with", "without")]
    assert logs[0] == logs[1] and not (tmp_path / "without" / "watch.jsonl").exists()
