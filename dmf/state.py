"""The training state and what happens to it at a stage switch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dmf.method import intervals
from dmf.method.curriculum import CurriculumConfig, Stage
from dmf.optim import EMAConfig

Params = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    step: () int32, steps done. ema: one tree like params per configured half-life.
    intervals: the table of `dmf.method.intervals`, () where the curriculum has none.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: tuple[Params, ...]
    intervals: jax.Array | tuple[()] = ()


def create(
    params: Params, optimizer: optax.GradientTransformation, ema: EMAConfig, interval: str = ""
) -> TrainState:
    """The state before the first step.

    Every EMA starts at the weights. interval: a rule of `dmf.method.intervals`; the adaptive one
    starts with an empty table.
    """
    table = intervals.empty() if interval == intervals.ADAPTIVE else ()
    return TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params), _copies(params, ema), table
    )


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
    if handover or curriculum.switch_ema == "reset":
        state = replace(state, ema=_copies(state.params, ema))
    return state


def _copies(params: Params, ema: EMAConfig) -> tuple[Params, ...]:
    # Real copies: the step donates the whole state, and one buffer cannot be donated twice.
    return tuple(jax.tree.map(jnp.copy, params) for _ in ema.halflife_images)
