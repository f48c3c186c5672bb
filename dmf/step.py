"""One training step: draw rows, evaluate the stage's residual, weigh it, move weights and averages.

    draw_rows        batch -> z, r, t, v             method/flow.py
    stage_residuals  rows -> residuals u - target    method/objectives.py, method/intervals.py
    stage_loss       residual -> weighted loss       method/weights.py
    make_train_step  gradient -> optimiser -> EMAs

The network enters as `apply(params, z, r, t, ...)` alone. Its residual depends on the kind of the
stage, a row of `objectives.KINDS`. Guided kinds first replace v (method/guidance.py).
There is one jitted program per kind. Numbers that change from step to step come in as traced
`Scalars`. All randomness comes from the run's seed, the step number and a named purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dmf import networks, sharding
from dmf.config import Config
from dmf.data import augment
from dmf.errors import DmfError
from dmf.method import flow, guidance, intervals, objectives, rectify, teacher, velocity, weights
from dmf.method.flow import Condition, Rows, RowSplit
from dmf.method.objectives import KINDS
from dmf.networks import Execution, Network, attention
from dmf.state import Scalars, Second, TrainState
from dmf.state import step_scalars as step_scalars

Array = jax.Array
Metrics = dict[str, Array]
PURPOSES = ("flip", "augment", "label", "noise", "times", "network", "latent", "guidance")


def network_for(kind: str, config: Config, image_shape: tuple[int, ...], mesh: Mesh) -> Network:
    """The network as a kind of stage computes it: attention kernel, remat and scan."""
    field = KINDS[kind].arithmetic  # plain, difference or derivative: a field of config.attention
    name, platform = getattr(config.attention, field), mesh.devices.flat[0].platform
    wanted = attention.PLATFORMS.get(name, platform)
    if platform != wanted:
        raise DmfError(
            f"config.attention.{field} = {name!r}: expected a {wanted}, found a {platform}"
        )
    kernel = attention.KERNELS[name]
    attend = sharding.on_rows(mesh, kernel) if name in attention.PLATFORMS else kernel
    how = Execution(attend, config.remat, config.scan_blocks)
    return networks.build(config.network, image_shape, jnp.dtype(config.compute_dtype), how)


def make_train_step(
    kind: str, network: Network, optimizer: Any, config: Config, mesh: Mesh, place: Any
) -> jax.stages.Wrapped:
    """The jitted step of a kind: (state, batch, scalars) -> (state, metrics).

    With a teacher, its weights follow, placed as the parameters. The given state is consumed.
    batch: as for `draw_rows`, split over the mesh. place: by `sharding.placed`. Scalar metrics:
        loss                           weighted
        squares_border, squares_pairs  |residual|^2, mean over the r = t and over the r < t rows
        change                         how much u changes over the step back, relative to |u|
        interval                       mean share a of t - r, where the interval is adaptive
        grad_norm, nonfinite_leaf      before clipping; index in jax.tree.leaves, or -1
    """
    split, of_rows = split_for(kind, config, mesh), sharding.rows(mesh)
    average = config.ema.index() if config.loss.tangent in velocity.AVERAGED else None
    draw = partial(draw_rows, split=split, config=config, at_noise=KINDS[kind].taught)
    loss = partial(stage_loss, kind=kind, network=network, config=config)
    beside = partial(second_loss, network=network, config=config)
    parts = split.micro(mesh.size), config.microbatches
    gradient, second_gradient = (
        sharding.averaged(mesh, make_gradient(of, *parts), network.dtypes) for of in (loss, beside)
    )
    has_second = KINDS[kind].second and rectify.fits(config)

    def train_step(
        state: TrainState, batch: Any, scalars: Scalars, taught: Any = None
    ) -> tuple[TrainState, Metrics]:
        rows = draw(state.step, batch, seed=scalars.seed, progress=scalars.progress)
        rows = jax.lax.with_sharding_constraint(rows, of_rows)
        frozen = {} if average is None else {"average": sharding.whole(mesh, state.ema[average])}
        frozen |= {} if taught is None else {velocity.TEACHER: sharding.whole(mesh, taught)}
        if state.second and has_second:
            frozen |= sharding.whole(mesh, {"second": state.second.params, "first": state.params})
        given = {"progress": scalars.progress, "frozen": frozen, "sums": state.intervals}
        grads, metrics = gradient(state.params, rows, scalars.rho, given)
        sums = _tallied(state.intervals, metrics.pop("intervals", None), config)
        metrics["grad_norm"], metrics["nonfinite_leaf"] = global_norm(grads)
        (params, opt_state), second = moved(state, grads, optimizer, scalars), state.second
        if second and has_second:
            grads, found = second_gradient(second.params, rows, scalars.rho, given)
            second = moved(second, grads, optimizer, scalars, config.optimizer.second_rate)
            metrics |= found
        ema = tuple(update_ema(e, params, scalars.ema_decays[i]) for i, e in enumerate(state.ema))
        return TrainState(state.step + 1, params, opt_state, ema, sums, second), metrics

    precision, whole = getattr(config.precision, KINDS[kind].arithmetic), sharding.replicated(mesh)
    given = (place, of_rows, whole, *([place.params] if config.taught else []))
    places: dict[str, Any] = dict(in_shardings=given, out_shardings=(place, whole))
    program, options = jax.default_matmul_precision(precision), sharding.compiler_options(mesh)
    return jax.jit(program(train_step), donate_argnums=0, compiler_options=options, **places)


def split_for(kind: str, config: Config, mesh: Mesh) -> RowSplit:
    """The r < t rows of a step of this kind. A kind that learns v alone has none."""
    fraction = 0.0 if KINDS[kind].v_only else config.times.r_neq_t_fraction
    parts, fraction = mesh.size * config.microbatches, 1.0 if KINDS[kind].taught else fraction
    return flow.row_split(config.batch_size, fraction, parts)


def step_keys(seed: int | np.uint32 | Array, step: Array) -> dict[str, Array]:
    """One key per named purpose, from the run's seed and the step number alone."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return dict(zip(PURPOSES, jax.random.split(key, len(PURPOSES)), strict=True))


def draw_rows(
    step: Array,
    batch: dict[str, Array],
    *,
    split: RowSplit,
    config: Config,
    seed: np.uint32 | Array | None = None,
    progress: float | np.float32 | Array = 1.0,
    at_noise: bool = False,
) -> Rows:
    """Augment the data, draw noise and times, and lay out the rows of a step.

    batch: x (B, H, W, C) float32 in [-1, 1] and label (B,) int32. Encoded images also have std,
        shaped as x. A batch may bring its own noise, shaped as x; otherwise noise is drawn.
    seed: the run's, as an input of the program; None takes the config's, as a constant.
    progress: of the curriculum, in [0, 1], for a law of times that depends on it.
    at_noise: every row is noise at t = 1, with r = 0, where a teacher's path starts.
    """
    keys = step_keys(config.seed if seed is None else seed, step)
    x, condition = _condition(keys, batch, config)
    e = batch["noise"] if "noise" in batch else jax.random.normal(keys["noise"], x.shape)
    r, t = flow.draw_times(keys["times"], config.times, split, progress)
    if at_noise:
        r, t = jnp.zeros_like(r), jnp.ones_like(t)
    z, v = flow.interpolate(x, e, t, config.path)
    if getattr(config.network, "takes_guidance", False) and config.guidance.told:
        condition = condition._replace(
            guidance=guidance.drawn(keys["guidance"], config.guidance, split)
        )
    # Each row's key comes from its global number, so the number of devices does not show.
    row_keys = jax.vmap(partial(jax.random.fold_in, keys["network"]))(jnp.arange(split.batch))
    return Rows(z, r, t, v, condition, row_keys)


def stage_loss(
    params: Any,
    rows: Rows,
    rho: Array,
    given: Mapping[str, Any] = {},
    *,
    config: Config,
    split: Any,
    **how: Any,
) -> tuple[Array, Metrics]:
    """Mean weighted loss of the rows for one kind of stage, and its metrics.

    given: progress, frozen and sums by name, as in `stage_residuals`. All may be missing.
    how: kind, network and train, as in `stage_residuals`.
    With an adaptive interval, metrics["intervals"] is what the rows add to its table.
    """
    progress, frozen = given.get("progress", 0.0), given.get("frozen", {})
    sums = given.get("sums", ())
    if KINDS[how["kind"]].taught:
        v_t = _by_teacher(_views(how["network"], config, False)[1], frozen, config)
        rows, split = teacher.path_rows(v_t, rows, config.teacher)
    how |= dict(config=config, split=split, frozen=frozen, sums=sums)
    rows, found = stage_residuals(params, rows, rho, **how)
    total, metrics = jnp.zeros(()), {} if found.change is None else {"change": found.change}
    weight = config.loss.of_row(config.times)
    for name, e, of in (
        ("border", found.border, split.border_of),
        ("pairs", found.pairs, split.pairs_of),
        ("head_border", found.head_border, split.border_of),
        ("head_pairs", found.head_pairs, split.pairs_of),
    ):
        if e is None:
            continue
        r, t = of((rows.r, rows.t))
        if config.loss.logvar == weights.OFF:
            share = found.share if name == "pairs" else None
            loss, squares = weights.weighted_loss(e, r, t, progress, weight, share)
        else:
            lv = how["network"].logvar(params, r, t)
            loss, squares = weights.learned_loss(e, lv, config.loss.logvar)
        total += jnp.sum(loss) / split.batch
        metrics[f"squares_{name}"] = jnp.mean(squares)
    if config.curriculum.interval == intervals.ADAPTIVE and found.products is not None:
        r, t = split.pairs_of((rows.r, rows.t))
        metrics["interval"] = jnp.mean(_rule(config, sums)(rho, r, t))
        metrics["intervals"] = intervals.tally(r, t, found.products)
    if KINDS[how["kind"]].second:
        loss = _rectified(params, frozen["second"], split.pairs_of(rows), config, how["network"])
        total += rectify.weight(config.loss, progress) * jnp.sum(loss) / split.batch
    return total, metrics | {"loss": total}


def _rectified(params: Any, second: Any, pairs: Rows, config: Config, network: Network) -> Array:
    _, net, own = _views(network, config, True)
    null = config.network.num_classes
    return rectify.generator_loss(net, own, params, second, pairs, config.loss, null)


def second_loss(
    params: Any, rows: Rows, rho: Array, given: Any, *, split: RowSplit, **how: Any
) -> tuple[Array, Metrics]:
    """The mean squared error of a second network on images of given["frozen"]["first"]."""
    network, pairs = how["network"], rectify.untold(split.pairs_of(rows))
    net = _views(network, how["config"], True)[1]
    params = networks.freeze_interval(params, network.is_interval)
    e = rectify.second_residual(net, params, given["frozen"]["first"], pairs)
    return jnp.mean(jnp.square(e)), {"squares_second": jnp.sum(jnp.square(e)) / len(e)}


def stage_residuals(
    params: Any,
    rows: Rows,
    rho: Array,
    *,
    kind: str,
    network: Network,
    config: Config,
    split: RowSplit,
    frozen: Mapping[str, Any] = {},
    sums: Any = (),
    train: bool = True,
) -> tuple[Rows, objectives.Residuals]:
    """(the rows, with the guided velocity as v where the kind is guided; their residuals).

    frozen: trees that no gradient reaches, by name: "average", the evaluated average, for
        config.loss.tangent = ema, and "teacher".
    sums: the table of an adaptive interval. train: with dropout.
    """
    about = KINDS[kind]
    if about.v_only:
        params = networks.freeze_interval(params, network.is_interval)

    whole, net, own = _views(network, config, train)
    rows = _told(own, params, rows, about.guided, config)
    guide = (own, params, rows, config.network.num_classes, config.guidance)
    direction = velocity.TANGENTS[config.loss.tangent]
    tangent = direction(own, params, frozen) if direction else None  # v itself
    if velocity.TEACHER in frozen and not about.taught:
        v_t = _by_teacher(net, frozen, config)
        rows, tangent = teacher.placed(v_t, rows, tangent, config.loss)
    rule = objectives.Rule(config.loss, partial(_rule(config, sums), rho), tangent)
    rule, lack = rule._replace(joint=config.rows == objectives.JOINT), None
    rule = rule._replace(whole=whole if network.sides else None)
    alone = network.sides or (train and getattr(config.network, "dropout", False))
    shared = config.rows in (objectives.SHARED, objectives.JOINT) and split.n_border and not alone
    if about.guided and shared and config.guidance.kappa:
        v_g, v_c, lack = guidance.guided_jointly(*guide, split)
        if config.loss.tangent == velocity.OWN:
            rule = rule._replace(tangent=lambda pairs: v_c)  # the same number
        rows = rows._replace(v=v_g)
    elif about.guided and not config.guidance.told:
        rows = rows._replace(v=guidance.guided_velocity(*guide))
    found = about.laid_out(config.rows)(net, params, rows, split, rule)
    if lack is None or found.border is None:
        return rows, found
    border, v = guidance.complete(found.border, split.border_of(rows.v), lack)
    return rows._replace(v=split.join(split.pairs_of(rows.v), v)), found._replace(border=border)


def _views(network: Network, config: Config, train: bool) -> tuple[flow.Whole, flow.Net, flow.Net]:
    """(u and side outputs, u alone, what knows v(z, t) and has no dropout), of (params, rows)."""

    def given(rows: Rows, train: bool) -> dict[str, Any]:
        return dict(condition=rows.condition, train=train, rngs=rows.keys)

    def whole(params: Any, rows: Rows) -> tuple[Array, flow.Sides]:
        return network.apply_with_sides(params, rows.z, rows.r, rows.t, **given(rows, train))

    def net(params: Any, rows: Rows, train: bool = train) -> Array:
        return network.apply(params, rows.z, rows.r, rows.t, **given(rows, train))

    def head(params: Any, rows: Rows) -> Array:
        out = network.apply_with_sides(params, rows.z, rows.r, rows.t, **given(rows, False))
        return out[1][flow.VELOCITY]

    still = partial(net, train=False)
    return whole, net, head if config.loss.tangent == velocity.HEAD else still


def _told(own: flow.Net, params: Any, rows: Rows, guided: bool, config: Config) -> Rows:
    """The rows with the velocity v_g of a network that is told its guidance, else unchanged."""
    if not guided:  # then v is the same for every guidance, and the network is told none
        return rows._replace(condition=rows.condition._replace(guidance=None))
    if not config.guidance.told:
        return rows
    v_g, v_c = guidance.told_velocity(own, params, rows, config.network.num_classes)
    return rows._replace(v=v_g, own=v_c if config.loss.tangent in velocity.ONLINE else None)


def _by_teacher(net: Any, frozen: Mapping[str, Any], config: Config) -> flow.Tangent:
    still = partial(net, train=False)
    return teacher.known(still, frozen, config.teacher, config.network.num_classes)


def make_gradient(
    loss: Callable[..., tuple[Array, Metrics]], split: RowSplit, count: int
) -> Callable[..., tuple[Any, Metrics]]:
    """(params, rows, rho, given) -> (gradient, metrics), averaged over `count` microbatches.

    loss: `stage_loss` with its keywords set, except the split. split: of all rows.
    All microbatches run inside one program.
    """
    gradient = jax.grad(partial(loss, split=split.micro(count)), has_aux=True)
    if count == 1:
        return gradient

    def accumulated(params: Any, rows: Rows, rho: Array, given: Any) -> tuple[Any, Metrics]:
        micro = split.microbatches(rows, count)
        one = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(gradient, params, one, rho, given)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def add(total: Any, part: Rows) -> tuple[Any, None]:
            new = gradient(params, part, rho, given)
            return jax.tree.map(lambda a, b: a + b / count, total, new), None

        return jax.lax.scan(add, zeros, micro)[0]

    return accumulated


def moved(
    now: TrainState | Second,
    grads: Any,
    optimizer: optax.GradientTransformation,
    scalars: Scalars,
    factor: float = 1.0,
) -> Second:
    """The weights and the optimiser's state after its step. factor: on the learning rate."""
    updates, opt_state = optimizer.update(grads, now.opt_state, now.params)
    rate = scalars.learning_rate if factor == 1 else factor * scalars.learning_rate
    return Second(jax.tree.map(lambda p, u: p - rate * u, now.params, updates), opt_state)


def update_ema(ema: Any, params: Any, decay: Array) -> Any:
    """decay * ema + (1 - decay) * params.

    Written as a correction, so that equal weights stay equal bit for bit.
    """
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), ema, params)


def global_norm(tree: Any) -> tuple[Array, Array]:
    """(norm over all leaves, index of the first leaf that is not finite or -1), both scalars."""
    squares = jnp.stack([jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)])
    bad = ~jnp.isfinite(squares)
    return jnp.sqrt(jnp.sum(squares)), jnp.where(jnp.any(bad), jnp.argmax(bad), -1)


def _rule(config: Config, sums: Any) -> intervals.Interval:
    rules = config.curriculum
    return intervals.interval_rule(rules.interval, rules.interval_floor, sums)


def _tallied(sums: Any, seen: Array | None, config: Config) -> Any:
    """The table of an adaptive interval after a step, the same where the step saw no rows."""
    decay = 0.5 ** (config.batch_size / config.curriculum.interval_halflife_images)
    return sums if seen is None else intervals.update(sums, seen, decay)


def _condition(
    keys: dict[str, Array], batch: dict[str, Array], config: Config
) -> tuple[Array, Condition]:
    """Data after augmentation, and the condition of the network."""
    x, null, condition = batch["x"], config.network.num_classes, Condition()
    if "std" in batch:
        # An encoded image is a mean x and a std, from which a latent is drawn. No flip here: mirror
        # images are encoded too, and the batch holds one of the two.
        x = x + batch["std"] * jax.random.normal(keys["latent"], x.shape)
    elif config.data.flip:
        x = augment.random_flip(keys["flip"], x)
    if config.data.augment:
        x, used = augment.edm_augment(keys["augment"], x, config.data.augment)
        condition = Condition(augment=used)
    if not null:
        return x, condition
    drop = jax.random.bernoulli(keys["label"], config.label_dropout, batch["label"].shape)
    return x, condition._replace(label=jnp.where(drop, null, batch["label"]))
