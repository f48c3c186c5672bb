"""The curriculum: which identity is enforced at which step, and how far the finite difference looks back.

Discrete MeanFlow (Hsu & Wood, arXiv 2604.08837, Eq. 5) runs K stages of equal length from a pretrained flow model:

    stage 0            "trajectory"  u(z,r,t) = v for every r <= t
    stages 1 .. K-2    "discrete"    finite difference over D_i = d_i (t - r), d_i = q^-i (linear) or its dagger form
    stage K-1          "jvp"         the MeanFlow identity with the exact derivative

A fourth kind, "flow", is plain flow matching on r = t with the interval branch frozen: the pretraining of v itself. Two
more, "guided_discrete" and "guided_jvp", put classifier-free guidance into the weights: the identity of "discrete" and
"jvp" with the velocity of `dmf.method.guidance` in place of v, for an optional stage after the others.
Stage and interval are pure functions of the step number, so a resumed run cannot disagree with its curriculum; within a kind
the interval is a traced number, so a switch between two discrete stages, or one that shrinks with every step, compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from dmf.errors import DmfError
from dmf.fields import INF, LEAST, limited
from dmf.method import intervals

Array = jax.Array
Interval = Callable[[Array, Array, Array], Array]  # (rho, r, t) -> d, times (B,)

# Kind -> (forward passes per row, extra passes per row with r < t); a backward pass counts as two forward passes.
PASSES = {"flow": (3, 0), "trajectory": (3, 0), "discrete": (3, 1), "jvp": (3, 1)}
# Guided kind -> the kind whose identity it enforces, with the guided velocity in place of v.
GUIDED = {"guided_discrete": "discrete", "guided_jvp": "jvp"}
UNITS = ("steps", "epochs", "images")
TINY = 1e-30
SCHEDULES = ("steps", "smooth")


def linear(rho: Array, r: Array, t: Array) -> Array:
    """d = rho: the interval is the same share of t - r everywhere (arXiv 2604.08837, Eq. 5). r, t: (B,)."""
    return rho + 0 * (t - r)


def dagger(rho: Array, r: Array, t: Array) -> Array:
    """d = rho (1 - t) / ((1 - rho)(1 - r) + rho (1 - t)): the share rho taken in the noise ratio t / (1 - t).

    Closed form of t' = s' / (1 + s'), s' = F(t) - rho (F(t) - F(r)), F(t) = t / (1 - t), D = t - t' = d (t - r) (the
    paper's dagger variant). The literal form is inf / inf at t = 1 and loses half its digits near it; this one is finite
    on all of 0 <= r <= t <= 1, and 0 where it is 0 / 0: r = t = 1, and t = 1 with rho = 1. rho in (0, 1]; r, t: (B,). Returns
    d (B,) in [0, rho].
    """
    return rho * (1 - t) / jnp.maximum((1 - rho) * (1 - r) + rho * (1 - t), TINY)


def floored(rho: Array, r: Array, t: Array, floor: float) -> Array:
    """d = max(dagger, rho floor): dagger, but no row near t = 1 goes idle. floor in (0, 1]; 1 is linear. r, t: (B,)."""
    return jnp.maximum(dagger(rho, r, t), rho * floor)


INTERVALS: dict[str, Interval] = {"linear": linear, "dagger": dagger}
RULES = (*INTERVALS, "floor", "adaptive")


@dataclass(frozen=True)
class CurriculumConfig:
    """The curriculum as data. Unknown in the paper and chosen here: K = 10 and q = 2 (read off its Figure 1)."""

    stages: int = 10  # * K, pretraining not counted
    kinds: tuple[str, ...] = ()  # one per stage; () = trajectory, discrete x (K - 2), jvp
    # * d_i = q^-i; a guided_discrete stage takes the d of the last discrete stage before it, or q^-1
    q: float = 2.0
    # linear | dagger | floor = dagger with a least d | adaptive = by a table that training keeps
    interval: str = "dagger"
    interval_floor: float = limited(0.1, LEAST, 1)  # of rho: the least d of floor and adaptive
    # adaptive: the table forgets half of a bin in so many images, while it has rows
    interval_halflife_images: float = limited(50e3, LEAST, INF)
    # steps: d falls between discrete stages | smooth: d falls with every discrete step
    schedule: str = "steps"
    length: float = limited(96000.0, LEAST, INF)  # of the K stages together, in length_unit
    # explicit lengths that add up to `length`; () = equal
    stage_lengths: tuple[float, ...] = limited((), LEAST, INF)
    length_unit: str = "steps"  # steps | epochs | images; also of pretrain_length
    # a "flow" stage before the curriculum; 0 = start from config.init
    pretrain_length: float = limited(0.0, 0, INF)
    # * factor on the learning rate per stage; () = 1
    stage_learning_rates: tuple[float, ...] = limited((), LEAST, INF)
    switch_optimizer: str = "keep"  # * keep | reset the optimiser state at a stage switch
    switch_ema: str = "keep"  # * keep | reset the EMAs to the raw weights at a stage switch
    # * linear warm-up of the learning rate after a switch
    switch_warmup_steps: int = limited(0, 0, INF)


@dataclass(frozen=True)
class Stage:
    """One stage of a run: steps first .. first + steps - 1. index counts within the curriculum; pretraining is -1.

    rho: of its first step; guidance_passes: forward passes of every row for the guided velocity; tangent_passes: those of a row
    with r < t for the direction of the step back; fall: rho of a step by that of the step before it, 1 but in the discrete
    stages of a smooth schedule; rate: a factor on the learning rate, 1 unless `dmf.run.guard` has lowered it.
    """

    index: int
    kind: str
    rho: float
    first: int
    steps: int
    guidance_passes: int = 0
    tangent_passes: int = 0
    fall: float = 1.0
    rate: float = 1.0

    @property
    def last(self) -> int:
        """The first step that no longer belongs to the stage."""
        return self.first + self.steps

    @property
    def name(self) -> str:
        return "pretrain" if self.index < 0 else f"stage {self.index}"


def interval_rule(config: CurriculumConfig, sums: Any = ()) -> Interval:
    """(rho, r, t) -> the share a of t - r that one step back covers. sums: the table of `dmf.method.intervals`, if the rule has one."""
    if config.interval == "floor":
        return lambda rho, r, t: floored(rho, r, t, config.interval_floor)
    if config.interval == "adaptive":
        return lambda rho, r, t: intervals.share(rho, r, t, sums, config.interval_floor)
    return INTERVALS[config.interval]


def identity_of(kind: str) -> str:
    """The kind whose identity a stage of this kind enforces: of a guided kind the one without guidance, else itself."""
    return GUIDED.get(kind, kind)


def build_stages(
    config: CurriculumConfig,
    batch_size: int,
    dataset_size: int,
    guidance_passes: int = 0,
    tangent_passes: int = 0,
) -> tuple[Stage, ...]:
    """The run as consecutive stages, in steps. Raises DmfError naming the config key where the curriculum makes no sense.

    guidance_passes: what the guided velocity costs a row of a guided stage, `guidance.passes`; tangent_passes: what the
    direction of the step back costs a row with r < t of a stage that takes one, `objectives.passes`.
    """
    kinds = _kinds(config)
    _check(config, kinds)
    per_unit = {"steps": 1.0, "epochs": dataset_size // batch_size, "images": 1 / batch_size}[
        config.length_unit
    ]
    lengths = config.stage_lengths or (config.length / len(kinds),) * len(kinds)
    stages = []
    first = 0
    if config.pretrain_length:
        first = round(config.pretrain_length * per_unit)
        if not first:
            raise DmfError(
                f"config.curriculum.pretrain_length = {config.pretrain_length:g} {config.length_unit}: expected 0, or "
                "at least one step"
            )
        stages.append(Stage(-1, "flow", 1.0, 0, first))
    start, done, rho = first, 0.0, 1 / config.q
    for i, (kind, length) in enumerate(zip(kinds, lengths, strict=True)):
        done += length
        end = start + round(
            done * per_unit
        )  # the cumulated length is rounded, so that the stages add up to the whole
        if end <= first:
            raise DmfError(
                f"config.curriculum: stage {i} has no step; expected length {config.length:g} {config.length_unit} "
                f"to give each of the {len(kinds)} stages at least one"
            )
        rho = config.q**-i if kind == "discrete" else rho
        extra = guidance_passes if kind in GUIDED else 0
        at = rho if identity_of(kind) == "discrete" else 1.0
        stages.append(Stage(i, kind, at, first, end - first, extra, tangent_passes))
        first = end
    return _smooth(stages) if config.schedule == "smooth" else tuple(stages)


def stage_at(stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that step (0-based) belongs to; the last one for step = total."""
    for stage in stages:
        if step < stage.last:
            return stage
    return stages[-1]


def extent(stages: tuple[Stage, ...], index: int) -> tuple[int, int]:
    """(first step, first step after it) of the stage of this index, all its parts where `dmf.run.guard` has cut it."""
    parts = [s for s in stages if s.index == index]
    return parts[0].first, parts[-1].last


def rho_at(stage: Stage, step: int) -> float:
    """rho of a step of the stage: rho fall^n, n steps after its first."""
    return stage.rho * stage.fall ** (step - stage.first)


def passes(stage: Stage, r_neq_t_fraction: float) -> float:
    """Forward passes per row that a step of this stage needs (backward = 2; one JVP tangent = 1)."""
    base, extra = PASSES[identity_of(stage.kind)]
    extra += stage.tangent_passes if extra else 0
    return base + stage.guidance_passes + extra * r_neq_t_fraction


def table(stages: tuple[Stage, ...], config: CurriculumConfig, r_neq_t_fraction: float) -> str:
    """The curriculum as a printed table: stage, kind, d, steps, cost in forward passes per row."""
    mark = {"linear": "", "adaptive": "*"}.get(config.interval, "+")
    width = 24 if any(s.fall != 1 for s in stages) else 12
    lines = [f"{'stage':<10}{'kind':<16}{'d':>{width}}{'steps':>10}{'first':>10}{'passes/row':>12}"]
    for s in stages:
        d = f"{s.rho:.6g}" if s.fall == 1 else f"{s.rho:.6g}..{rho_at(s, s.last - 1):.6g}"
        d = f"{d}{mark}" if identity_of(s.kind) == "discrete" else "-"
        cost = passes(s, r_neq_t_fraction)
        lines.append(f"{s.name:<10}{s.kind:<16}{d:>{width}}{s.steps:>10}{s.first:>10}{cost:>12.2f}")
    total = sum(s.steps * passes(s, r_neq_t_fraction) for s in stages)
    steps = stages[-1].last
    lines.append(f"{'all':<10}{'':<16}{'':>{width}}{steps:>10}{'':>10}{total / steps:>12.2f}")
    if mark and any(identity_of(s.kind) == "discrete" for s in stages):
        lines.append(_legend(config))
    return "\n".join(lines)


def _legend(config: CurriculumConfig) -> str:
    """What the mark at a d says."""
    if config.interval == "adaptive":
        return f"* times a ratio that training measures by t and t - r, at least {config.interval_floor:g}; 1 at the start"
    least = f", to {config.interval_floor:g} d at least" if config.interval == "floor" else ""
    return f"+ largest d of the stage: the dagger interval is d at t = r and shrinks towards t = 1{least}"


def _smooth(stages: list[Stage]) -> tuple[Stage, ...]:
    """The stages with rho falling geometrically over all discrete steps, from the first discrete stage's to the last one's.

    A guided_discrete stage keeps the rho that was reached before it.
    """
    ladder = [s for s in stages if s.kind == "discrete"]
    count = sum(s.steps for s in ladder)
    if count < 2:
        return tuple(stages)
    fall = (ladder[-1].rho / ladder[0].rho) ** (1 / (count - 1))
    found, done, reached = [], 0, ladder[0].rho
    for s in stages:
        if s.kind == "discrete":
            s = replace(s, rho=ladder[0].rho * fall**done, fall=fall)
            done, reached = done + s.steps, rho_at(s, s.last - 1)
        elif identity_of(s.kind) == "discrete" and done:
            s = replace(s, rho=reached)
        found.append(s)
    return tuple(found)


def _kinds(config: CurriculumConfig) -> tuple[str, ...]:
    if config.kinds:
        return config.kinds
    if config.stages < 3:
        raise DmfError(
            f"config.curriculum.stages = {config.stages}: expected at least 3 (trajectory, discrete, jvp), "
            "or config.curriculum.kinds with one kind per stage"
        )
    return ("trajectory", *("discrete",) * (config.stages - 2), "jvp")


def _check(config: CurriculumConfig, kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        if identity_of(kind) not in PASSES:
            raise DmfError(
                f"config.curriculum.kinds has {kind!r}: expected only {', '.join((*PASSES, *GUIDED))}"
            )
    if len(kinds) != config.stages:
        raise DmfError(
            f"config.curriculum.kinds has {len(kinds)} entries: expected config.curriculum.stages = {config.stages}"
        )
    if not 1 < config.q < float("inf"):
        raise DmfError(
            f"config.curriculum.q = {config.q}: expected a ratio above 1 (d = q^-i has to shrink)"
        )
    if config.interval not in RULES:
        raise DmfError(
            f"config.curriculum.interval = {config.interval!r}: expected {' or '.join(RULES)}"
        )
    if config.schedule not in SCHEDULES:
        raise DmfError(
            f"config.curriculum.schedule = {config.schedule!r}: expected {' or '.join(SCHEDULES)}"
        )
    if config.length_unit not in UNITS:
        raise DmfError(
            f"config.curriculum.length_unit = {config.length_unit!r}: expected one of {', '.join(UNITS)}"
        )
    if config.stage_lengths and len(config.stage_lengths) != len(kinds):
        raise DmfError(
            f"config.curriculum.stage_lengths has {len(config.stage_lengths)} entries: expected {len(kinds)}, one per stage"
        )
    total = sum(config.stage_lengths)
    if config.stage_lengths and abs(total - config.length) > 1e-6 * max(total, config.length):
        raise DmfError(
            f"config.curriculum.stage_lengths add up to {total:g}: expected config.curriculum.length = "
            f"{config.length:g} {config.length_unit}"
        )
    if config.stage_learning_rates and len(config.stage_learning_rates) != len(kinds):
        raise DmfError(
            f"config.curriculum.stage_learning_rates has {len(config.stage_learning_rates)} entries: expected "
            f"{len(kinds)}, one per stage"
        )
    for key in ("switch_optimizer", "switch_ema"):
        if getattr(config, key) not in ("keep", "reset"):
            raise DmfError(
                f"config.curriculum.{key} = {getattr(config, key)!r}: expected 'keep' or 'reset'"
            )
