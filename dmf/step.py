"""One training step: draw (z, r, t, v), evaluate the stage's residual, weigh it, take the gradient, move weights and EMAs.

    batch x -> augment -> flow.draw_times, flow.interpolate -> objectives.OBJECTIVES[kind] -> weighted_loss -> Adam -> EMAs

In a guided stage v is replaced by `guidance.guided_velocity` before the objective sees it, and nothing else differs.
`make_train_step` gives one jitted, donated, sharded program per kind of stage. All that changes from step to step or from
stage to stage within a kind comes in as traced numbers (`Scalars`); all randomness comes from one key, the step number and
a named purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dmf import networks, optim, sharding
from dmf.config import Config
from dmf.data import augment
from dmf.errors import DmfError
from dmf.method import curriculum, flow, intervals, objectives
from dmf.method.curriculum import GUIDED, Stage, identity_of, rho_at
from dmf.method.flow import Rows, RowSplit
from dmf.method.guidance import guided_velocity
from dmf.networks import Execution, Network, attention, is_interval_path
from dmf.state import TrainState

Array = jax.Array
Metrics = dict[str, Array]
PURPOSES = ("flip", "augment", "label", "noise", "times", "network", "latent")


class Scalars(NamedTuple):
    """What a step is told from outside: rho, learning rate, one decay per EMA, the seed: no program depends on them."""

    rho: np.float32 | Array
    learning_rate: np.float32 | Array
    ema_decays: np.ndarray | Array
    seed: np.uint32 | Array


def step_scalars(step: int, stage: Stage, stages: tuple[Stage, ...], config: Config) -> Scalars:
    """The traced numbers of a step, in float32 but for the seed."""
    rate = optim.learning_rate(step, stages, config.curriculum, config.optimizer)
    decays = optim.ema_decays(step, stages, config.curriculum, config.ema, config.batch_size)
    rho, seed = np.float32(rho_at(stage, step)), np.uint32(config.seed)
    return Scalars(rho, np.float32(rate), np.asarray(decays, np.float32), seed)


def network_for(kind: str, config: Config, image_shape: tuple[int, ...], mesh: Mesh) -> Network:
    """The network as a kind of stage computes it: with the attention kernel of its identity, remat and scan."""
    name, platform = getattr(config.attention, identity_of(kind)), mesh.devices.flat[0].platform
    wanted = attention.PLATFORMS.get(name, platform)
    if platform != wanted:
        raise DmfError(
            f"config.attention.{identity_of(kind)} = {name!r}: expected a {wanted}, found a {platform}"
        )
    kernel = attention.KERNELS[name]
    attend = sharding.on_rows(mesh, kernel) if name in attention.PLATFORMS else kernel
    how = Execution(attend, config.remat, config.scan_blocks)
    return networks.build(config.network, image_shape, jnp.dtype(config.compute_dtype), how)


def make_train_step(
    kind: str,
    network: Network,
    optimizer: optax.GradientTransformation,
    config: Config,
    mesh: Mesh,
    place: Any,
) -> jax.stages.Wrapped:
    """The jitted step of one kind of stage: (state, batch, scalars) -> (state, metrics). The given state is consumed.

    batch: x (B, H, W, C) float32 in [-1, 1] and label (B,) int32, rows split over the mesh; of encoded images also std, shaped
    as x. place: where the state lives, from `sharding.placed`.
    metrics: scalars. loss (weighted), squares_border and squares_pairs (mean sum of squares of the rows with r = t and with
    r < t), change (|u - u'| / |u|), interval (mean a where it is adaptive), grad_norm before clipping, nonfinite_leaf (index in
    jax.tree.leaves, or -1).
    """
    split, average = (
        split_for(kind, config, mesh),
        config.ema.index() if config.loss.tangent == "ema" else None,
    )
    draw = partial(draw_rows, split=split, config=config)
    loss = partial(
        stage_loss,
        kind=kind,
        network=network,
        config=config,
        split=split.micro(config.microbatches),
    )

    def train_step(
        state: TrainState, batch: dict[str, Array], scalars: Scalars
    ) -> tuple[TrainState, Metrics]:
        rows = sharding.constrain_rows(mesh, draw(state.step, batch, seed=scalars.seed))
        along = None if average is None else sharding.whole(mesh, state.ema[average])
        loss_now = partial(loss, average=along, sums=state.intervals)
        grads, metrics = _gradient(
            loss_now, state.params, rows, scalars.rho, split, config.microbatches, mesh
        )
        intervals = _tallied(state.intervals, metrics.pop("intervals", None), config)
        metrics["grad_norm"], metrics["nonfinite_leaf"] = optim.global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - scalars.learning_rate * u, state.params, updates)
        ema = tuple(
            optim.update_ema(e, params, scalars.ema_decays[i]) for i, e in enumerate(state.ema)
        )
        return TrainState(state.step + 1, params, opt_state, ema, intervals), metrics

    with_precision = jax.default_matmul_precision(getattr(config.precision, identity_of(kind)))(
        train_step
    )
    whole = sharding.replicated(mesh)
    given, made = (place, sharding.rows(mesh), whole), (place, whole)
    options = sharding.compiler_options(mesh)
    return jax.jit(
        with_precision,
        donate_argnums=0,
        in_shardings=given,
        out_shardings=made,
        compiler_options=options,
    )


def split_for(kind: str, config: Config, mesh: Mesh) -> RowSplit:
    """The rows with r < t of a step of this kind; pure flow matching has none."""
    fraction = 0.0 if kind == "flow" else config.times.r_neq_t_fraction
    return flow.row_split(config.batch_size, fraction, mesh.devices.size * config.microbatches)


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
) -> Rows:
    """Augment the data, draw noise and times, and lay out the rows of a step (each drawn by its global row number).

    seed: the run's, as an input of the program; None: the config's, as a constant.
    """
    keys = step_keys(config.seed if seed is None else seed, step)
    x, label = _condition(keys, batch, config)
    e = jax.random.normal(keys["noise"], x.shape)
    r, t = flow.draw_times(keys["times"], config.times, split)
    z, v = flow.interpolate(x, e, t)
    row_keys = jax.vmap(partial(jax.random.fold_in, keys["network"]))(jnp.arange(split.batch))
    return Rows(z, r, t, v, label, row_keys)


def stage_loss(
    params: Any, rows: Rows, rho: Array, *, config: Config, split: RowSplit, **how: Any
) -> tuple[Array, Metrics]:
    """Mean weighted loss of the rows under the kind's identity, and what is logged of it.

    how: as `stage_residuals` takes it. What the rows add to the table of an adaptive interval is in the metrics as `intervals`.
    """
    _, found = stage_residuals(params, rows, rho, config=config, split=split, **how)
    total, metrics = jnp.zeros(()), {} if found.change is None else {"change": found.change}
    for name, e in (("border", found.border), ("pairs", found.pairs)):
        if e is None:
            continue
        loss, squares = objectives.weighted_loss(e, config.loss.p, config.loss.eps)
        total += jnp.sum(loss) / split.batch
        metrics[f"squares_{name}"] = jnp.mean(squares)
    if config.curriculum.interval == "adaptive" and found.products is not None:
        pairs, interval = (
            split.pairs_of(rows),
            curriculum.interval_rule(config.curriculum, how["sums"]),
        )
        metrics["interval"] = jnp.mean(interval(rho, pairs.r, pairs.t))
        metrics["intervals"] = intervals.tally(pairs.r, pairs.t, found.products)
    return total, metrics | {"loss": total}


def stage_residuals(
    params: Any,
    rows: Rows,
    rho: Array,
    *,
    kind: str,
    network: Network,
    config: Config,
    split: RowSplit,
    average: Any = None,
    sums: Any = (),
    train: bool = True,
) -> tuple[Rows, objectives.Residuals]:
    """(the rows with the velocity that the stage enforces, their residuals).

    average: the averaged weights whose velocity config.loss.tangent = ema goes along; sums: the table of an adaptive interval,
    `dmf.method.intervals`; train: with dropout.
    """
    if kind == "flow":
        params = freeze_interval(params)

    def net(params: Any, rows: Rows, train: bool = train) -> Array:
        return network.apply(
            params, rows.z, rows.r, rows.t, label=rows.label, train=train, rngs=rows.keys
        )

    if kind in GUIDED:
        v_g = guided_velocity(
            partial(net, train=False), params, rows, config.num_classes, config.guidance
        )
        rows = rows._replace(v=v_g)
    tangent: objectives.Tangent = objectives.along_data
    if config.loss.tangent != "data":
        tangent = objectives.along_own(
            partial(net, train=False), params if config.loss.tangent == "own" else average
        )
    enforce = objectives.OBJECTIVES[identity_of(kind)]
    share = partial(curriculum.interval_rule(config.curriculum, sums), rho)
    return rows, enforce(net, params, rows, split, objectives.Rule(config.loss, share, tangent))


def _tallied(sums: Any, seen: Array | None, config: Config) -> Any:
    """The table of an adaptive interval after a step that saw rows for it, or the same."""
    decay = 0.5 ** (config.batch_size / config.curriculum.interval_halflife_images)
    return sums if seen is None else intervals.update(sums, seen, decay)


def freeze_interval(params: Any) -> Any:
    """No gradient into the interval branch: pure flow matching leaves it at its zero start, so u = v for every r."""

    def freeze(path: tuple[Any, ...], x: Array) -> Array:
        return jax.lax.stop_gradient(x) if is_interval_path(tuple(p.key for p in path)) else x

    return jax.tree_util.tree_map_with_path(freeze, params)


def _condition(
    keys: dict[str, Array], batch: dict[str, Array], config: Config
) -> tuple[Array, Array | None]:
    """Data after augmentation, and the label the network is given: augmentation vector, class, or None."""
    x = batch["x"]
    if (
        "std" in batch
    ):  # an encoded image is a normal law; its mirror image was encoded apart, and chosen by the batch
        x = x + batch["std"] * jax.random.normal(keys["latent"], x.shape)
    elif config.data.flip:
        x = augment.random_flip(keys["flip"], x)
    if config.data.augment:
        return augment.edm_augment(keys["augment"], x, config.data.augment)
    if not config.num_classes:
        return x, None
    drop = jax.random.bernoulli(keys["label"], config.label_dropout, batch["label"].shape)
    return x, jnp.where(drop, config.num_classes, batch["label"])


def _gradient(
    loss: Callable[..., tuple[Array, Metrics]],
    params: Any,
    rows: Rows,
    rho: np.float32 | Array,
    split: RowSplit,
    count: int,
    mesh: Mesh,
) -> tuple[Any, Metrics]:
    """Gradient and metrics, averaged over `count` microbatches inside the same program."""
    grad = sharding.gradient(mesh, loss)
    if count == 1:
        return grad(params, rows, rho)
    micro = sharding.constrain_rows(mesh, split.microbatches(rows, count), axis=1)
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], micro), rho)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, part: Rows) -> tuple[Any, None]:
        return jax.tree.map(lambda a, b: a + b / count, total, grad(params, part, rho)), None

    return jax.lax.scan(add, zeros, micro)[0]
