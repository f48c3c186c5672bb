"""The training state, its rates at each step, and what happens to it at a stage switch.

Rates and decays are computed outside the jitted step and given to it as traced numbers. So a stage
switch, a warm-up or an EMA ramp compiles nothing, and a resumed run needs no state of a schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dmf.method import intervals
from dmf.method.curriculum import (
    CurriculumConfig,
    Stage,
    extent,
    progress_at,
    rho_at,
    stage_at,
)
from dmf.method.objectives import KINDS
from dmf.optim import EMAConfig, OptimizerConfig

Params = Any
Array = jax.Array


class Second(NamedTuple):
    """A second network that trains beside the first, with its optimiser's state."""

    params: Params
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    step: () int32, steps done. ema: one tree like params per configured half-life.
    intervals: the table of `dmf.method.intervals`, () where the curriculum has none.
    second: () where no stage trains a second network.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: tuple[Params, ...]
    intervals: jax.Array | tuple[()] = ()
    second: Second | tuple[()] = ()


def create(
    params: Params,
    optimizer: optax.GradientTransformation,
    ema: EMAConfig,
    curriculum: CurriculumConfig | None = None,
) -> TrainState:
    """The state before the first step.

    Every EMA starts at the weights, and so does a second network. The adaptive interval starts
    with an empty table.
    """
    curriculum = curriculum or CurriculumConfig()
    table = intervals.empty() if curriculum.interval == intervals.ADAPTIVE else ()
    second = _second(params, optimizer) if has_second(curriculum) else ()
    return TrainState(
        jnp.zeros((), jnp.int32),
        params,
        optimizer.init(params),
        _copies(params, ema),
        table,
        second,
    )


def has_second(curriculum: CurriculumConfig) -> bool:
    """Whether a stage trains a second network."""
    return any(KINDS[kind].second for kind in curriculum.kinds)


def _second(params: Params, optimizer: optax.GradientTransformation) -> Second:
    return Second(jax.tree.map(jnp.copy, params), optimizer.init(params))


def evaluated(state: TrainState, ema: EMAConfig) -> Params:
    """The weights that are sampled and scored: the configured EMA, or the raw ones."""
    index = ema.index()
    return state.params if index is None else state.ema[index]


def switches(before: Stage, curriculum: CurriculumConfig) -> bool:
    """Whether `switch` changes anything as the stage after `before` starts."""
    return before.index < 0 or "reset" in (curriculum.switch_optimizer, curriculum.switch_ema)


def switch(
    state: TrainState,
    before: Stage,
    curriculum: CurriculumConfig,
    ema: EMAConfig,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The state as the stage after `before` starts.

    After pretraining the run goes on as if it had loaded the flow model from a file. It takes the
    evaluated weights, a fresh optimiser and fresh EMAs.
    Between curriculum stages the config decides what is kept.
    """
    handover = before.index < 0
    if handover:
        state = replace(state, params=jax.tree.map(jnp.copy, evaluated(state, ema)))
    if handover or curriculum.switch_optimizer == "reset":
        state = replace(state, opt_state=optimizer.init(state.params))
        if state.second:  # after pretraining it starts from the flow model too
            now = state.params if handover else state.second.params
            state = replace(state, second=_second(now, optimizer))
    if handover or curriculum.switch_ema == "reset":
        state = replace(state, ema=_copies(state.params, ema))
    return state


def _copies(params: Params, ema: EMAConfig) -> tuple[Params, ...]:
    # Real copies: the step donates the whole state, and one buffer cannot be donated twice.
    return tuple(jax.tree.map(jnp.copy, params) for _ in ema.halflife_images)


def optimizer_steps(step: int, stages: tuple[Stage, ...], curriculum: CurriculumConfig) -> int:
    """Steps that the optimiser has done since it was last reset, with this one (0-based)."""
    stage = stage_at(stages, step)
    kept = stage.index > 0 and curriculum.switch_optimizer == "keep"
    return step - extent(stages, 0 if kept else stage.index)[0] + 1


class Scalars(NamedTuple):
    """The numbers that a step is told.

        rho             how far a row looks back, as a share of t - r (`method/intervals.py`)
        learning_rate   of the step
        ema_decays      of the step, one per average
        seed            of the run
        progress        share of the curriculum that is done, in [0, 1]

    They are traced, so no program depends on their values.
    """

    rho: np.float32 | Array
    learning_rate: np.float32 | Array
    ema_decays: np.ndarray | Array
    seed: np.uint32 | Array
    progress: np.float32 | Array = np.float32(0)


def step_scalars(step: int, stage: Stage, stages: tuple[Stage, ...], config: Any) -> Scalars:
    """The traced numbers of a step, all float32 except the seed. config: `dmf.config.Config`."""
    rate = learning_rate(step, stages, config.curriculum, config.optimizer)
    decays = ema_decays(step, stages, config.curriculum, config.ema, config.batch_size)
    return Scalars(
        np.float32(rho_at(stage, step)),
        np.float32(rate),
        np.asarray(decays, np.float32),
        np.uint32(config.seed),
        np.float32(progress_at(stages, step)),
    )


def learning_rate(
    step: int, stages: tuple[Stage, ...], curriculum: CurriculumConfig, config: OptimizerConfig
) -> float:
    """The rate of a step (0-based): warm-up and decay of its phase, times its stage's factors.

    A phase is pretraining or the curriculum. A stage's factors are its entry of
    stage_learning_rates, the warm-up after its switch, and `Stage.rate`, which the guard may lower.
    """
    stage = stage_at(stages, step)
    began, ended = extent(stages, stage.index)
    if stage.index < 0:
        first, last = began, ended
        rate, warmup = config.pretrain_learning_rate, config.pretrain_warmup_steps
        decay = config.pretrain_decay_fraction
    else:
        first, last = extent(stages, 0)[0], stages[-1].last
        rate, warmup = config.learning_rate, config.warmup_steps
        decay = config.decay_fraction
    rate *= _ramp(step - first + 1, warmup)
    if decay:
        rate *= min(1.0, (last - step) / max(1.0, decay * (last - first)))
    if stage.index > 0:
        rate *= _ramp(step - began + 1, curriculum.switch_warmup_steps)
    if stage.index >= 0 and curriculum.stage_learning_rates:
        rate *= curriculum.stage_learning_rates[stage.index]
    return rate * stage.rate


def ema_decays(
    step: int,
    stages: tuple[Stage, ...],
    curriculum: CurriculumConfig,
    config: EMAConfig,
    batch_size: int,
) -> tuple[float, ...]:
    """Decay of every EMA at a step: .5 ** (batch / half-life).

    The half-life is bounded by the images seen since the last reset, see `EMAConfig`.
    """
    stage = stage_at(stages, step)
    kept = stage.index > 0 and curriculum.switch_ema == "keep"
    since, _ = extent(stages, 0 if kept else stage.index)
    images = (step - since + 1) * batch_size
    limit = config.rampup_ratio * images if config.rampup_ratio else float("inf")
    return tuple(0.5 ** (batch_size / min(halflife, limit)) for halflife in config.halflife_images)


def _ramp(count: int, steps: int) -> float:
    return min(1.0, count / steps) if steps else 1.0
