"""A frozen teacher: its velocity in target and tangent, and the path of its solver."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import step
from dmf.config import check, parse
from dmf.errors import DmfError
from dmf.method import curriculum, teacher
from dmf.method.flow import Condition, Rows, RowSplit
from dmf.method.teacher import TeacherConfig
from dmf.networks import Network
from tests.method.test_objectives import flow_coefficient
from tests.tiny import MLP, TINY, merged

S = 0.5  # data N(0, S^2)
SPLIT = RowSplit(16, 4, 3)


def exact(params, z, r, t, *, condition=None, train=False, rngs=None):
    """params times the exact average velocity of Gaussian data; classes shift it."""
    std = lambda t: jnp.sqrt((1 - t) ** 2 * S**2 + t**2)  # noqa: E731
    length = t - r
    apart = (1 - std(r) / std(t)) / jnp.where(length > 0, length, 1)
    u = params * jnp.where(length > 0, apart, flow_coefficient(t, S))[:, None] * z
    label = condition.label if condition else None
    return u if label is None else u + label[:, None]


NETWORK = Network(None, exact, lambda *a, **k: (exact(*a, **k), {}))


def rows(at_noise=False):
    x, e = jax.random.normal(jax.random.key(1), (2, SPLIT.batch, 4)) * jnp.array([[[S]], [[1]]])
    r, t = jnp.sort(jax.random.uniform(jax.random.key(2), (2, SPLIT.batch)), 0)
    r = jnp.where(SPLIT.is_pair(), r, t)
    if at_noise:
        r, t = jnp.zeros_like(r), jnp.ones_like(t)
    z = (1 - t)[:, None] * x + t[:, None] * e
    return Rows(z, r, t, e - x, keys=jax.random.split(jax.random.key(3), SPLIT.batch))


def loss(params, taught, kind, given=None, at_noise=False, **values):
    config = parse(merged(MLP, batch_size=16, **values))
    given, frozen = given or rows(at_noise), {"frozen": {"teacher": taught}}
    how = dict(kind=kind, network=NETWORK, config=config, split=SPLIT)
    return step.stage_loss(params, given, 0.25, frozen, **how)


PLACES = {
    "both": dict(velocity="teacher", tangent="teacher"),
    "target": dict(velocity="teacher"),
    "tangent": dict(tangent="teacher"),
}


def test_the_exact_u_meets_every_row_of_an_exact_teacher_and_none_of_the_data(float64):
    _, found = loss(1.0, 1.0, "jvp", loss=PLACES["both"] | dict(p=0.0))
    assert found["squares_pairs"] < 1e-24 and found["squares_border"] < 1e-24
    for place in ("target", "tangent"):
        _, one = loss(1.0, 1.0, "jvp", loss=PLACES[place] | dict(p=0.0))
        assert one["squares_pairs"] > 1e-3, place
        assert (one["squares_border"] < 1e-24) == (place == "target")
    _, data = loss(1.0, 1.0, "jvp", loss=dict(p=0.0))
    np.testing.assert_allclose(one["squares_border"], data["squares_border"])


def test_target_and_tangent_are_the_places_of_the_residual(float64):
    """e = u - [target - (t - r) du/dt along the tangent]; du/dt is affine in the tangent."""
    here = SPLIT.pairs_of(rows())
    v_t = exact(0.9, here.z, here.t, here.t)
    u = exact(1.1, here.z, here.r, here.t)
    for place, target, along in (
        ("both", v_t, v_t),
        ("target", v_t, here.v),
        ("tangent", here.v, v_t),
    ):
        at = lambda z, t: exact(1.1, z, here.r, t)  # noqa: E731
        _, dudt = jax.jvp(at, (here.z, here.t), (along, jnp.ones_like(here.t)))
        e = u - (target - (here.t - here.r)[:, None] * dudt)
        _, found = loss(1.1, 0.9, "jvp", loss=PLACES[place] | dict(p=0.0))
        np.testing.assert_allclose(found["squares_pairs"], jnp.mean(jnp.sum(e**2, 1)), rtol=1e-12)


@pytest.mark.parametrize("kind", ["flow", "discrete", "jvp", "teacher_path"])
def test_no_gradient_reaches_the_teacher(kind):
    values = dict(loss=PLACES["both"], curriculum=dict(stages=2, kinds=("all_pairs", kind)))
    both = jax.grad(lambda p, q: loss(p, q, kind, None, True, **values)[0], (0, 1))(1.1, 0.9)
    assert abs(both[0]) > 1e-4 and both[1] == 0


def test_guidance_leads_away_from_the_null_class():
    here = rows()._replace(condition=Condition(label=jnp.arange(16) % 3))

    def net(params, rows):
        return exact(params, rows.z, rows.r, rows.t, condition=rows.condition)

    frozen = {"teacher": 1.0}
    plain, guided = (
        teacher.known(net, frozen, TeacherConfig(guidance=scale), 2)(here) for scale in (1, 3)
    )
    expected = jnp.broadcast_to(2.0 * (here.condition.label - 2)[:, None], plain.shape)
    np.testing.assert_allclose(guided - plain, expected, atol=1e-5)  # 0 where the label is dropped


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_states_of_the_path_tend_to_the_exact_average_velocity(float64, solver, order):
    def off(states):
        settings = dict(solver=solver, states=states, shift=2.0)
        _, found = loss(1.0, 1.0, "teacher_path", None, True, teacher=settings, loss=dict(p=0.0))
        return found["squares_pairs"] ** 0.5

    coarse, fine = off(9), off(17)
    assert fine < 0.2 and coarse / fine == pytest.approx(2**order, rel=0.25)


def test_pairs_follow_the_true_grid_and_the_released_labels_do_not():
    v_t = lambda rows: rows.z  # noqa: E731  the flow is z(t) = z(1) e^(t - 1), Euler's (1 - h)^n
    settings = dict(states=4, shift=3.0)
    true, split = teacher.path_rows(v_t, rows(True), TeacherConfig(**settings))
    assert split == RowSplit(16 * 6, 1, 1) and split.n_border == 0
    grid = np.array([1, 3 * 2 / 3 / (1 + 2 * 2 / 3), 3 / 3 / (1 + 2 / 3), 0])
    np.testing.assert_allclose(true.t[:6], grid[[0, 0, 0, 1, 1, 2]], rtol=1e-6)
    np.testing.assert_allclose(true.r[:6], grid[[1, 2, 3, 2, 3, 3]], rtol=1e-6)
    z = np.asarray(rows(True).z[0]) * np.cumprod([1, *(1 + np.diff(grid))])[:, None]
    np.testing.assert_allclose(true.z[:6], z[np.array([0, 0, 0, 1, 1, 2])], rtol=1e-5)
    v = (z[1] - z[3]) / (grid[1] - grid[3])
    np.testing.assert_allclose(true.v[4], v, rtol=1e-5)
    released, _ = teacher.path_rows(v_t, rows(True), TeacherConfig(labels="released", **settings))
    np.testing.assert_allclose(released.t[:6], [1, 1, 1, 2 / 3, 2 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(released.z, true.z)
    np.testing.assert_allclose(released.v[4], v * (grid[1] / (2 / 3)), rtol=1e-5)


def test_drawn_pairs_are_among_all_pairs_and_each_path_draws_its_own():
    v_t, given = (lambda rows: rows.z), rows(True)
    every, _ = teacher.path_rows(v_t, given, TeacherConfig(states=8))
    drawn, split = teacher.path_rows(v_t, given, TeacherConfig(states=8, pairs=5))
    known = {(float(t), float(r)) for t, r in zip(every.t, every.r, strict=True)}
    pairs = np.stack([drawn.t, drawn.r], -1).reshape(16, 5, 2)
    assert split.batch == 80 and {tuple(p) for p in pairs.reshape(-1, 2).tolist()} <= known
    assert len({p.tobytes() for p in pairs}) == 16
    half = jax.tree.map(lambda x: x[8:], given)
    alone, _ = teacher.path_rows(v_t, half, TeacherConfig(states=8, pairs=5))
    np.testing.assert_array_equal(alone.z, drawn.z[40:])  # whatever rows stand beside it
    assert len(set(map(bytes, np.asarray(jax.random.key_data(drawn.keys))))) == 80


WRONG = {
    "place": (dict(teacher=dict(place="x")), "teacher.place = 'x': expected the default, or a use"),
    "classes": (
        dict(loss=PLACES["both"], teacher=dict(guidance=2.0)),
        "config.teacher.guidance = 2: expected 1, as config.network takes no classes",
    ),
    "shares": (
        dict(loss=PLACES["both"] | dict(target_data=0.5)),
        "config.loss.tangent_data = 0 and target_data = 0.5: expected 0 and 1, as the teacher",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_fields_that_contradict_each_other_give_one_line(name):
    values, message = WRONG[name]
    with pytest.raises(DmfError, match=message):
        check(parse(merged(MLP, **values)), 0, 1000)


def test_a_guided_stage_beside_a_teacher_gives_one_line():
    values = merged(
        TINY,
        guidance=dict(omega=2.0),
        loss=PLACES["both"],
        curriculum=dict(stages=2, kinds=("all_pairs", "guided_jvp")),
    )
    with pytest.raises(DmfError, match="has 'guided_jvp' with config.loss.tangent = 'teacher'"):
        check(parse(values), 10, 1000)


def test_the_count_of_passes_has_those_of_the_teacher():
    def passes(kind, **values):
        values = merged(TINY, curriculum=dict(stages=2, kinds=("all_pairs", kind)), **values)
        stage = check(parse(values), 10, 1000)[-1]
        return partial(curriculum.passes, stage)(0.25)

    assert passes("discrete", loss=PLACES["both"]) == 4.25
    assert passes("discrete", loss=PLACES["tangent"]) == 3.5
    assert passes("discrete", loss=PLACES["target"], teacher=dict(guidance=2.0)) == 5.25
    # 15 steps of Heun, and 120 pairs of 3 passes each, for every path
    assert passes("teacher_path", teacher=dict(solver="heun")) == 30 + 120 * 3
    assert passes("teacher_path", teacher=dict(pairs=8)) == 15 + 8 * 3
