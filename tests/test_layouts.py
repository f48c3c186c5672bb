"""The layouts of the rows of a step: the same numbers for every kind, on any devices."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from dmf import step
from dmf.method import curriculum
from dmf.method.curriculum import Stage
from dmf.method.objectives import KINDS, LAYOUTS
from tests.test_step import largest_difference
from tests.tiny import TINY, Setup, linear_network, merged

GUIDED = dict(omega=0.6, kappa=0.7, t_start=0.2, t_end=0.8)
ALL = [
    *((kind, "data", "dagger") for kind in KINDS if not KINDS[kind].taught),  # all rows alike
    ("guided_jvp", "own", "dagger"),
    ("guided_discrete", "own", "adaptive"),
    ("jvp", "own", "dagger"),
]


def values_of(kind, **changes):
    guided = dict(guidance=GUIDED) if KINDS[kind].guided else {}
    return merged(
        TINY,
        curriculum=dict(kinds=(kind,), stages=1),
        optimizer=dict(eps=1e-4),
        **guided,
        **changes,
    )


def loss_and_gradient(values, kind):
    """Metrics and gradient of one batch in float64; without jit, which nothing here needs."""
    setup = Setup(values)
    config, split = setup.config, step.split_for(kind, setup.config, setup.mesh)
    network = linear_network(jnp.float64)
    rows = step.draw_rows(jnp.int32(3), setup.batch(0), split=split, config=config)
    wide = lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x  # noqa: E731
    rows, params = jax.tree.map(wide, (rows, network.init(jax.random.key(1))))
    second = {"second": jax.tree.map(lambda x: 1.1 * x, params)} if KINDS[kind].second else {}
    given = {"progress": 0.5, "sums": jnp.ones((2, 8, 8)), "frozen": second}
    loss = partial(step.stage_loss, kind=kind, network=network, config=config, split=split)
    return jax.grad(loss, has_aux=True)(params, rows, jnp.float64(0.25), given)


@pytest.mark.parametrize(("kind", "tangent", "interval"), ALL)
def test_every_layout_has_the_loss_gradient_and_metrics_of_the_default(
    float64, kind, tangent, interval
):
    given = dict(loss=dict(tangent=tangent))
    if tangent == "own":  # what a row with r = t must not see, and what needs the share of a row
        given["loss"] |= dict(tangent_data=0.3, target_data=0.6, weight="alpha")
    values = merged(values_of(kind, **given), curriculum=dict(interval=interval))
    grads, metrics = loss_and_gradient(values, kind)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads))
    for layout in LAYOUTS[1:]:
        found, told = loss_and_gradient(merged(values, rows=layout), kind)
        assert largest_difference(found, grads) < 1e-10 * scale, layout
        assert set(told) == set(metrics)
        assert largest_difference(told, metrics) < 1e-10 * (1 + float(metrics["loss"])), layout


@pytest.mark.parametrize(
    ("kind", "guidance", "passes"),
    [
        ("jvp", 0, [3.25, 3.25, 3.5, 4.0]),
        ("discrete", 0, [3.25, 3.25, 3.25, 4.0]),
        ("terminal", 0, [3.5, 3.5, 3.5, 5.0]),  # its identity has no joint form
        ("guided_jvp", 2, [5.25, 4.5, 4.75, 6.0]),  # 2, or 1 + p where v_u and v_c share a pass
        ("guided_jvp", 1, [4.25, 4.25, 4.5, 5.0]),
    ],
)
def test_the_passes_of_every_layout_are_counted(kind, guidance, passes):
    stage = Stage(0, kind, 1.0, 0, 1, guidance, 0)
    assert [curriculum.passes(stage, 0.25, layout) for layout in LAYOUTS] == passes


@pytest.mark.parametrize("kind", ["guided_jvp", "discrete"])
def test_five_steps_of_every_layout_are_equal_on_one_device_and_eight(kind):
    found = []
    for layout, devices in [("split", 1), *((name, 8) for name in LAYOUTS)]:
        setup = Setup(values_of(kind, rows=layout), devices=devices)
        setup.network = linear_network()
        found.append(setup.run(kind, 5))
    for now, metrics in found[1:]:
        assert metrics["loss"] == pytest.approx(found[0][1]["loss"], rel=1e-6)
        assert largest_difference(now.params, found[0][0].params) < 1e-6
