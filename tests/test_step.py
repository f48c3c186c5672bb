"""One training step as a program: what it moves and what it leaves alone."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import config, networks, step
from dmf.method import flow, weights
from dmf.networks import is_interval_path
from tests.tiny import TINY, UNET, Setup, linear_network, merged

KINDS = ("flow", "all_pairs", "discrete", "jvp")


def largest_difference(a, b):
    return max(
        float(jnp.max(jnp.abs(np.asarray(x) - np.asarray(y))))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def interval_leaves(params):
    found = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(p): x for p, x in found if is_interval_path(tuple(k.key for k in p))
    }


def test_a_row_may_have_a_class_and_an_augmentation():
    values = merged(UNET, label_dropout=0.5, data=dict(augment=0.5), network=dict(num_classes=10))
    keys = {name: jax.random.key(i) for i, name in enumerate(("flip", "augment", "label"))}
    batch = {"x": jnp.ones((64, 8, 8, 1)), "label": jnp.full(64, 3)}
    _, found = step._condition(keys, batch, config.parse(values))
    assert found.augment.shape == (64, 6) and set(np.asarray(found.label)) == {3, 10}


@pytest.mark.parametrize("kind", KINDS)
def test_one_device_and_eight_take_the_same_five_steps(kind):
    # The gradient of key biases is zero, as the softmax ignores them. Adam divides by its size and
    # turns rounding into full steps. A larger eps keeps the comparison about the program.
    values = merged(TINY, optimizer=dict(eps=1e-4))
    setups = [Setup(values, devices=n) for n in (1, 8)]
    if kind in ("flow", "all_pairs"):  # the DiT's two cases have all that these do
        for setup in setups:
            setup.network = linear_network()
    one, eight = (setup.run(kind, 5) for setup in setups)
    assert abs(one[1]["loss"] - eight[1]["loss"]) < 1e-6 * abs(one[1]["loss"])
    assert largest_difference(one[0].params, eight[0].params) < 1e-6
    assert largest_difference(one[0].ema, eight[0].ema) < 1e-6


def test_splitting_rows_costs_no_communication():
    setup = Setup(merged(TINY, microbatches=2, batch_size=64), devices=8)
    given = jax.eval_shape(setup.state), setup.batch(0), setup.scalars(0, "discrete")
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    compiled = setup.step("discrete").lower(*given).compile(compiler_options=quick).as_text()
    used = set(
        re.findall(
            r"\b(all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)\b", compiled
        )
    )
    assert used == {"all-reduce"}  # the gradient's, and nothing else


@pytest.mark.parametrize(
    ("kind", "values"),
    [*((kind, None) for kind in KINDS), ("discrete", TINY), ("all_pairs", UNET)],
    ids=[*KINDS, "dit", "unet"],
)
def test_microbatches_accumulate_to_the_whole_batch(kind, values):
    whole, parts = (Setup(merged(values or TINY, microbatches=n, batch_size=16)) for n in (1, 4))
    if not values:
        whole.network = parts.network = linear_network()
    grads = []
    for setup in (whole, parts):
        split = step.split_for(kind, setup.config, setup.mesh)
        rows = step.draw_rows(jnp.int32(3), setup.batch(0), split=split, config=setup.config)
        how = dict(kind=kind, network=setup.network, config=setup.config)
        loss = partial(step.stage_loss, **how)
        count = setup.config.microbatches
        gradient = jax.jit(step.make_gradient(loss, split, count))
        grads.append(gradient(setup.state().params, rows, jnp.float32(0.25), {}))
    assert largest_difference(grads[0][0], grads[1][0]) < 2e-5 * max(
        float(jnp.abs(g).max()) for g in jax.tree.leaves(grads[0][0])
    )
    for name, value in grads[0][1].items():
        assert float(grads[1][1][name]) == pytest.approx(float(value), rel=2e-5), name


def test_flow_matching_leaves_the_interval_branch_at_its_start_so_that_u_ignores_r():
    setup = Setup()
    now, _ = setup.run("flow", 4, randomise=False)
    fresh = interval_leaves(setup.state(randomise=False).params)
    found = interval_leaves(now.params)
    assert found and all((found[k] == fresh[k]).all() for k in fresh)
    z, t = jax.random.normal(jax.random.key(0), (5, 8, 8, 1)), jnp.linspace(0.1, 1, 5)
    u = [setup.network.apply(now.params, z, r, t) for r in (t, 0 * t, 0.3 * t)]
    assert float(jnp.abs(u[0]).max()) > 0
    np.testing.assert_array_equal(u[0], u[1])
    np.testing.assert_array_equal(u[0], u[2])


@pytest.mark.parametrize("kind", ["all_pairs", "discrete", "jvp"])
def test_the_curriculum_does_train_the_interval_branch(kind):
    setup = Setup()
    now, _ = setup.run(kind, 4, randomise=False)
    fresh = interval_leaves(setup.state(randomise=False).params)
    assert any((x != fresh[k]).any() for k, x in interval_leaves(now.params).items())


def test_both_evaluations_of_a_row_share_their_dropout_mask():
    # With one mask |u - u'| falls with the interval. Two masks at rate .3 leave it near |u|.
    setup = Setup(UNET)
    train_step = setup.step("discrete")
    change = {
        rho: train_step(setup.state(), setup.batch(0), setup.scalars(0, "discrete", rho))[1][
            "change"
        ]
        for rho in (2.0**-4, 2.0**-10)
    }
    assert float(change[2.0**-10]) < 1e-2 and float(
        change[2.0**-4] / change[2.0**-10]
    ) == pytest.approx(64, rel=0.3)
    split = step.split_for("discrete", setup.config, setup.mesh)
    rows = split.pairs_of(
        step.draw_rows(jnp.int32(0), setup.batch(0), split=split, config=setup.config)
    )
    params = setup.state().params

    @jax.jit
    def u(keys):
        return setup.network.apply(
            params, rows.z, rows.r, rows.t, condition=rows.condition, train=True, rngs=keys
        )

    one, other = u(rows.keys), u(jnp.roll(rows.keys, 1))
    apart = jnp.linalg.norm(one - other) / jnp.linalg.norm(one)
    assert float(apart) > 100 * float(change[2.0**-10])


def test_a_stage_switch_within_a_kind_traces_nothing(monkeypatch):
    setup, traced, draw = Setup(), [], step.draw_rows
    monkeypatch.setattr(step, "draw_rows", lambda *a, **k: traced.append(1) or draw(*a, **k))
    train_step, now = setup.step("discrete"), setup.state()
    for n, rho in enumerate((0.5, 0.25, 0.125, 2.0**-8)):
        now, _ = train_step(now, setup.batch(n), setup.scalars(n, "discrete", rho))
    assert len(traced) == 1


def test_the_state_is_donated():
    setup = Setup()
    before = setup.state()
    setup.step("all_pairs")(before, setup.batch(0), setup.scalars(0, "all_pairs"))
    assert all(x.is_deleted() for x in jax.tree.leaves((before.params, before.ema)))


def test_a_step_is_a_function_of_seed_step_and_batch():
    setup = Setup()
    again = [setup.run("discrete", 3)[0].params for _ in range(2)]
    assert largest_difference(*again) == 0
    other = Setup(merged(TINY, seed=1)).run("discrete", 3)[0].params
    assert largest_difference(again[0], other) > 0


def test_runs_of_other_seeds_share_one_program_and_draw_other_noise():
    setups = [Setup(merged(TINY, seed=seed)) for seed in (0, 2**32 - 1)]
    texts, losses = [], []
    for s in setups:
        train_step, now, batch, scalars = s.step("jvp"), s.state(), s.batch(0), s.scalars(5, "jvp")
        texts.append(train_step.lower(now, batch, scalars).as_text())
        losses.append(float(train_step(now, batch, scalars)[1]["loss"]))
    assert texts[0] == texts[1] and losses[0] != losses[1]
    for s in setups:  # as an input or as a constant
        split = step.split_for("jvp", s.config, s.mesh)
        draw = partial(step.draw_rows, jnp.int32(3), s.batch(0), split=split, config=s.config)
        np.testing.assert_array_equal(draw(seed=np.uint32(s.config.seed)).z, draw().z)


def test_every_purpose_and_step_has_its_own_key():
    keys = [
        jax.random.key_data(k) for n in range(3) for k in step.step_keys(0, jnp.int32(n)).values()
    ]
    assert len({tuple(k.tolist()) for k in keys}) == 3 * len(step.PURPOSES)


def test_label_dropout_gives_the_null_class_at_its_rate_on_both_kinds_of_rows():
    setup = Setup(merged(TINY, label_dropout=0.25, batch_size=4096))
    split = step.split_for("discrete", setup.config, setup.mesh)
    rows = step.draw_rows(jnp.int32(0), setup.batch(0), split=split, config=setup.config)
    for part in (split.pairs_of(rows.condition.label), split.border_of(rows.condition.label)):
        assert abs(float(jnp.mean(part == 10)) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / len(part))


def test_bfloat16_compute_keeps_parameters_times_and_loss_in_float32():
    setup = Setup(merged(TINY, compute_dtype="bfloat16"))
    from dmf import networks

    setup.network = networks.build(setup.config.network, (8, 8, 1), jnp.bfloat16)
    now, metrics = setup.run("discrete", 2)
    reference = Setup().run("discrete", 2)
    assert {x.dtype for x in jax.tree.leaves((now.params, now.ema))} == {jnp.dtype("float32")}
    assert metrics["squares_border"] == pytest.approx(reference[1]["squares_border"], rel=0.02)
    assert largest_difference(now.params, reference[0].params) > 0  # bfloat16 was really used


def test_reported_norm_and_squares_are_those_of_the_batch():
    setup = Setup(merged(TINY, optimizer=dict(clip_norm=1e-3)))
    now = setup.state()
    split = step.split_for("all_pairs", setup.config, setup.mesh)
    rows = step.draw_rows(jnp.int32(0), setup.batch(0), split=split, config=setup.config)
    e = setup.network.apply(now.params, rows.z, rows.r, rows.t, condition=rows.condition) - rows.v
    loss, squares = weights.weighted_loss(e, rows.r, rows.t, 0.0, weights.adaptive(0.5, 1e-3))
    _, metrics = setup.step("all_pairs")(now, setup.batch(0), setup.scalars(0, "all_pairs"))
    assert float(metrics["squares_pairs"]) == pytest.approx(
        float(jnp.mean(split.pairs_of(squares))), rel=1e-5
    )
    assert float(metrics["squares_border"]) == pytest.approx(
        float(jnp.mean(split.border_of(squares))), rel=1e-5
    )
    assert float(metrics["loss"]) == pytest.approx(float(jnp.mean(loss)), rel=1e-5)
    assert float(metrics["grad_norm"]) > 1e-2  # before clipping
    assert int(metrics["nonfinite_leaf"]) == -1


def test_the_first_leaf_with_a_bad_gradient_is_named():
    setup = Setup()
    now = setup.state()
    batch = setup.batch(0)
    batch["x"] = batch["x"].at[3, 0, 0, 0].set(jnp.nan)
    _, metrics = setup.step("all_pairs")(now, batch, setup.scalars(0, "all_pairs"))
    assert int(metrics["nonfinite_leaf"]) >= 0 and not np.isfinite(metrics["grad_norm"])


def test_rows_of_a_step_lie_on_the_path_with_the_law_of_the_config():
    setup = Setup(merged(TINY, batch_size=64))
    split = step.split_for("discrete", setup.config, setup.mesh)
    rows = step.draw_rows(jnp.int32(7), setup.batch(0), split=split, config=setup.config)
    x = setup.batch(0)["x"]
    t = flow.expand(rows.t, x)
    np.testing.assert_allclose(rows.z - t * rows.v, x, atol=1e-5)
    assert int((rows.r < rows.t).sum()) == 48


def test_a_batch_may_bring_its_noise_along():
    setup = Setup()
    split, batch = step.split_for("discrete", setup.config, setup.mesh), setup.batch(0)
    draw = partial(step.draw_rows, jnp.int32(7), split=split, config=setup.config)
    own = draw(batch)
    e = own.v + batch["x"]  # v = e - x
    given = draw(batch | {"noise": jnp.ones_like(e)})
    np.testing.assert_array_equal(given.t, own.t)
    np.testing.assert_allclose(given.v + batch["x"], 1.0, atol=1e-6)
    np.testing.assert_allclose(draw(batch | {"noise": e}).z, own.z, atol=1e-6)


def test_the_network_says_which_parameters_are_frozen():
    grad = jax.grad(
        lambda p: sum(jnp.sum(x) for x in jax.tree.leaves(networks.freeze_interval(p, *of)))
    )
    of = [lambda path: path[0] == "a"]
    assert grad({"a": {"k": 1.0}, "interval": {"k": 1.0}}) == {"a": {"k": 0}, "interval": {"k": 1}}
    of = [is_interval_path]
    assert grad({"a": {"k": 1.0}, "interval": {"k": 1.0}}) == {"a": {"k": 1}, "interval": {"k": 0}}


def test_the_loss_hands_progress_and_times_to_the_weight(monkeypatch):
    setup, seen = Setup(), []
    watched = lambda p, eps: lambda *args: seen.append(args) or jnp.ones(())  # noqa: E731
    monkeypatch.setitem(weights.WEIGHTS, "adaptive", watched)
    split = step.split_for("all_pairs", setup.config, setup.mesh)
    rows = step.draw_rows(jnp.int32(0), setup.batch(0), split=split, config=setup.config)
    how = dict(kind="all_pairs", network=setup.network, config=setup.config, split=split)
    step.stage_loss(setup.state().params, rows, 1.0, {"progress": 0.75}, **how)
    (_, r, t, progress, a), (_, r_pairs, t_pairs, *_) = seen
    assert (
        (a == 1).all() and float(progress) == 0.75 and (r == t).all() and (r_pairs < t_pairs).all()
    )
    stage = setup.stages[-1]
    told = step.step_scalars(stage.last - 1, stage, setup.stages, setup.config)
    assert told.progress == np.float32(7 / 8) and told.progress.dtype == np.float32
