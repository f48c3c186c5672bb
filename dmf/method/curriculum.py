"""The curriculum: which identity holds at each step, and how far its difference looks back.

Discrete MeanFlow (arXiv 2604.08837, Eq. 5) starts from a flow model and runs K equal stages:

    stage 0            all_pairs   u(z, r, t) = v for every r <= t
    stages 1 .. K-2    discrete    finite difference, with rho = q^-i in stage i
    stage K-1          jvp         the MeanFlow identity with the exact derivative

rho, the d of the paper, says how far a row looks back: `dmf.method.intervals` has the rules.
`dmf.method.objectives` has all kinds of stages. A stage of kind flow before stage 0, the
pretraining, is plain flow matching. It trains v itself.

Stage and interval are pure functions of the step number, so a resumed run finds the same ones.
A compiled step takes rho as an input. So a switch between two stages of one kind compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dmf import fields
from dmf.errors import DmfError
from dmf.fields import ABOVE_1, BELOW_1, INF, LEAST, MANY, MOST, choice, limited
from dmf.method.intervals import ADAPTIVE, RULES
from dmf.method.objectives import (
    BETWEEN,
    FIRST,
    JOINT,
    KINDS,
    LAST,
    PRETRAINING,
    SHARED,
    SPLIT,
    WHOLE,
)

UNITS = ("steps", "epochs", "images")
SCHEDULES = ("steps", "smooth", "sigmoid")
SWITCHES = ("keep", "reset")


@dataclass(frozen=True)
class CurriculumConfig:
    """The curriculum as data.

    Unknown in the paper and chosen here: K = 10 and q = 2, read off its Figure 1.
    """

    stages: int = limited(10, 1, MANY)  # * K, pretraining not counted
    kinds: tuple[str, ...] = ()  # one per stage; () = all_pairs, discrete x (K - 2), jvp
    # * d_i = q^-i; a guided_discrete stage takes the d of the discrete stage before it, or q^-1
    q: float = limited(2.0, ABOVE_1, INF)
    # linear | dagger | floor = dagger with a least d | adaptive = by a table that training keeps.
    # Also sigmoid = ECT's, larger near data | fixed = d is a time itself
    interval: str = choice("dagger", RULES)
    interval_floor: float = limited(0.1, LEAST, 1)  # of rho: the least d of floor and adaptive
    # adaptive: the table forgets half of a bin in so many images, while it has rows
    interval_halflife_images: float = limited(50e3, LEAST, INF)
    # steps: d falls between discrete stages | smooth: d falls with every discrete step.
    # Also sigmoid: d / (1 - d) falls so, and d follows a sigmoid
    schedule: str = choice("steps", SCHEDULES)
    # smooth, sigmoid: the d of the first and of the last discrete step; () = q^-i of their stages
    ends: tuple[float, ...] = limited((), LEAST, 1)
    length: float = limited(96000.0, LEAST, INF)  # of the K stages together, in length_unit
    # explicit lengths that add up to `length`; () = equal
    stage_lengths: tuple[float, ...] = limited((), LEAST, INF)
    # steps | epochs | images; also of pretrain_length
    length_unit: str = choice("steps", UNITS)
    # a flow stage before the curriculum; 0 = start from config.init
    pretrain_length: float = limited(0.0, 0, INF)
    # * factor on the learning rate per stage; () = 1
    stage_learning_rates: tuple[float, ...] = limited((), LEAST, INF)
    # * keep | reset the optimiser state at a stage switch
    switch_optimizer: str = choice("keep", SWITCHES)
    # * keep | reset the EMAs to the raw weights at a stage switch
    switch_ema: str = choice("keep", SWITCHES)
    # * linear warm-up of the learning rate after a switch
    switch_warmup_steps: int = limited(0, 0, INF)


@dataclass(frozen=True)
class Stage:
    """One stage of a run: steps first .. first + steps - 1.

        index: within the curriculum; pretraining is -1.
        rho: of its first step; 1 for kinds that do not step back.
        guidance_passes: forward passes of every row for the guided velocity.
        tangent_passes: forward passes of an r < t row for the direction of the step back.
        teacher_passes: forward passes by the teacher, for every row or every path.
        fall: each step multiplies rho by it. It is 1 where the schedule is by steps.
        odds: fall multiplies rho / (1 - rho) instead, as a sigmoid schedule has it.
        rate: a factor on the learning rate, 1 unless `dmf.run.guard` has lowered it.

    `dmf.run.guard` may cut a stage into parts, which share its index.
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
    odds: bool = False
    teacher_passes: float = 0.0

    @property
    def last(self) -> int:
        """The first step that no longer belongs to the stage."""
        return self.first + self.steps

    @property
    def name(self) -> str:
        """The stage in words."""
        return "pretrain" if self.index < 0 else f"stage {self.index}"


def build_stages(
    config: CurriculumConfig,
    batch_size: int,
    dataset_size: int,
    guidance_passes: int = 0,
    tangent_passes: int = 0,
    by_teacher: Callable[[bool, int], float] = lambda on_path, each: 0.0,
) -> tuple[Stage, ...]:
    """The run as consecutive stages, in steps.

        guidance_passes   of a row of a guided stage for its velocity, `guidance.passes`
        tangent_passes    of an r < t row for the direction of its step back, `velocity.passes`
        by_teacher        `TeacherConfig.passes` of a kind

    Raises DmfError naming the config key where the curriculum makes no sense.
    """
    kinds = _kinds(config)
    _check(config, kinds)
    per_unit = {"steps": 1.0, "epochs": dataset_size // batch_size, "images": 1 / batch_size}[
        config.length_unit
    ]
    lengths = config.stage_lengths or (config.length / len(kinds),) * len(kinds)
    stages, first = list[Stage](), 0
    if config.pretrain_length:
        first = round(config.pretrain_length * per_unit)
        if not first:
            raise DmfError(
                f"config.curriculum.pretrain_length = {config.pretrain_length:g} "
                f"{config.length_unit}: expected 0, or at least one step"
            )
        stages.append(Stage(-1, PRETRAINING, 1.0, 0, first, teacher_passes=by_teacher(False, 3)))
    start, done, rho = first, 0.0, 1 / config.q
    for i, (kind, length) in enumerate(zip(kinds, lengths, strict=True)):
        done += length
        # The sum of lengths is rounded, so that the stages add up to the whole.
        end = start + round(done * per_unit)
        if end <= first:
            raise DmfError(
                f"config.curriculum: stage {i} has no step; expected length {config.length:g} "
                f"{config.length_unit} to give each of the {len(kinds)} stages at least one"
            )
        rho = config.q**-i if _shrinks(kind) else rho
        extra = guidance_passes if KINDS[kind].guided else 0
        at = rho if KINDS[kind].steps_back else 1.0
        taught = by_teacher(KINDS[kind].taught, KINDS[kind].passes)
        passes = extra, tangent_passes, 1.0, 1.0, False, taught
        stages.append(Stage(i, kind, at, first, end - first, *passes))
        first = end
    _check_sizes(config, stages)
    return tuple(stages) if config.schedule == "steps" else _smooth(stages, config)


def _check_sizes(config: CurriculumConfig, stages: list[Stage]) -> None:
    """Raises DmfError where a device's float32 or int32 cannot hold an interval or a step."""
    for stage in stages:
        if stage.rho < LEAST:
            raise DmfError(
                f"config.curriculum.q = {config.q:g}: stage {stage.index} has the interval "
                f"{stage.rho:.3g}; expected at least {LEAST:.3g}, the least number of float32"
            )
    if stages[-1].last >= MOST:
        raise DmfError(
            f"config.curriculum.length = {config.length:g} {config.length_unit}: the run has "
            f"{stages[-1].last:g} steps; expected less than {MOST}"
        )


def stage_at(stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that step (0-based) belongs to; the last one for step = total."""
    for stage in stages:
        if step < stage.last:
            return stage
    return stages[-1]


def extent(stages: tuple[Stage, ...], index: int) -> tuple[int, int]:
    """(first step, first step after it) of the stage of this index.

    `dmf.run.guard` may have cut it into parts; all of them count.
    """
    parts = [s for s in stages if s.index == index]
    return parts[0].first, parts[-1].last


def rho_at(stage: Stage, step: int) -> float:
    """rho of a step of the stage: rho fall^n, n steps after its first. odds: of rho / (1 - rho)."""
    if not stage.odds:
        return stage.rho * stage.fall ** (step - stage.first)
    return 1 / (1 + (1 / stage.rho - 1) / stage.fall ** (step - stage.first))


def progress_at(stages: tuple[Stage, ...], step: int) -> float:
    """The share of the curriculum's steps that are done at a step, in [0, 1]; 0 in pretraining."""
    first, last = extent(stages, min(0, stages[-1].index))[0], stages[-1].last
    return min(1.0, max(0.0, (step - first) / (last - first)))


def passes(stage: Stage, r_neq_t_fraction: float, layout: str = SPLIT) -> float:
    """Forward passes per row of a step of this stage. A backward pass counts as two.

    layout: `config.rows`. "whole" makes all rows pay like those with r < t. "shared" and "joint"
    have v_c of r = t rows from u where there is no dropout. An own direction that is v_c costs
    nothing there, and is counted all the same. "joint" repeats u of r < t rows for a JVP.
    """
    kind = KINDS[stage.kind]
    guided = stage.guidance_passes
    share = 1.0 if layout == WHOLE else r_neq_t_fraction
    extra = kind.extra + (stage.tangent_passes if kind.extra else 0)
    if layout in (SHARED, JOINT) and kind.extra and guided == 2:  # v_u and v_c
        guided, extra = 1, extra + 1
    if layout == JOINT:
        extra += kind.repeats
    return kind.passes + guided + extra * share + stage.teacher_passes


def table(
    stages: tuple[Stage, ...],
    config: CurriculumConfig,
    r_neq_t_fraction: float,
    layout: str = SPLIT,
) -> str:
    """The curriculum as a printed table: stage, kind, d, steps, cost in forward passes per row."""
    mark = {"linear": "", "fixed": "", ADAPTIVE: "*"}.get(config.interval, "+")
    width = 24 if any(s.fall != 1 for s in stages) else 12
    lines = [f"{'stage':<10}{'kind':<16}{'d':>{width}}{'steps':>10}{'first':>10}{'passes/row':>12}"]
    for s in stages:
        d = f"{s.rho:.6g}" if s.fall == 1 else f"{s.rho:.6g}..{rho_at(s, s.last - 1):.6g}"
        d = f"{d}{mark}" if KINDS[s.kind].steps_back else "-"
        cost = passes(s, r_neq_t_fraction, layout)
        lines.append(f"{s.name:<10}{s.kind:<16}{d:>{width}}{s.steps:>10}{s.first:>10}{cost:>12.2f}")
    total = sum(s.steps * passes(s, r_neq_t_fraction, layout) for s in stages)
    steps = stages[-1].last
    lines.append(f"{'all':<10}{'':<16}{'':>{width}}{steps:>10}{'':>10}{total / steps:>12.2f}")
    if mark and any(KINDS[s.kind].steps_back for s in stages):
        lines.append(_legend(config))
    return "\n".join(lines)


def _legend(config: CurriculumConfig) -> str:
    """What the mark at a d says."""
    least = f"{config.interval_floor:g}"
    if config.interval == ADAPTIVE:
        ratio = "* times a ratio that training measures by t and t - r"
        return f"{ratio}, at least {least}; 1 at the start"
    if config.interval == "sigmoid":
        return "+ the interval is dagger's, with up to 5 d near data"
    end = f", to {least} d at least" if config.interval == "floor" else ""
    dagger = "the dagger interval is d at t = r and shrinks towards t = 1"
    return f"+ largest d of the stage: {dagger}{end}"


def _smooth(stages: list[Stage], config: CurriculumConfig) -> tuple[Stage, ...]:
    """The stages with rho falling by one factor per discrete step, from first d to last d.

    In a sigmoid schedule the factor is of rho / (1 - rho). A guided stage that steps back keeps the
    rho that was reached before it.
    """
    ladder = [s for s in stages if _shrinks(s.kind)]
    count = sum(s.steps for s in ladder)
    if not ladder or count < 2 and not config.ends:
        return tuple(stages)
    first, last = config.ends or (ladder[0].rho, ladder[-1].rho)
    odds = config.schedule == "sigmoid"
    drop = last / first if not odds else (1 / first - 1) / (1 / last - 1)
    fall = drop ** (1 / max(1, count - 1))
    whole = Stage(0, BETWEEN, first, 0, count, fall=fall, odds=odds)  # all their steps in a row
    found, done, reached = [], 0, first
    for s in stages:
        if _shrinks(s.kind):
            s = replace(s, rho=rho_at(whole, done), fall=fall, odds=odds)
            done, reached = done + s.steps, rho_at(s, s.last - 1)
        elif KINDS[s.kind].steps_back and done:
            s = replace(s, rho=reached)
        found.append(s)
    return tuple(found)


def _shrinks(kind: str) -> bool:
    """Whether rho falls from one stage of this kind to the next."""
    return KINDS[kind].steps_back and not KINDS[kind].guided


def _kinds(config: CurriculumConfig) -> tuple[str, ...]:
    if config.kinds:
        return config.kinds
    if config.stages < 3:
        raise DmfError(
            f"config.curriculum.stages = {config.stages}: expected at least 3 "
            f"({FIRST}, {BETWEEN}, {LAST}), or config.curriculum.kinds with one kind per stage"
        )
    return (FIRST, *(BETWEEN,) * (config.stages - 2), LAST)


def _check(config: CurriculumConfig, kinds: tuple[str, ...]) -> None:
    fields.check(config, "config.curriculum")
    for kind in kinds:
        if kind not in KINDS:
            raise DmfError(
                f"config.curriculum.kinds has {kind!r}: expected only {', '.join(KINDS)}"
            )
    if len(kinds) != config.stages:
        raise DmfError(
            f"config.curriculum.kinds has {len(kinds)} entries: expected "
            f"config.curriculum.stages = {config.stages}"
        )
    if config.stage_lengths and len(config.stage_lengths) != len(kinds):
        raise DmfError(
            f"config.curriculum.stage_lengths has {len(config.stage_lengths)} entries: "
            f"expected {len(kinds)}, one per stage"
        )
    _check_ends(config)
    total = sum(config.stage_lengths)
    if config.stage_lengths and abs(total - config.length) > 1e-6 * max(total, config.length):
        raise DmfError(
            f"config.curriculum.stage_lengths add up to {total:g}: "
            f"expected config.curriculum.length = {config.length:g} {config.length_unit}"
        )
    if config.stage_learning_rates and len(config.stage_learning_rates) != len(kinds):
        raise DmfError(
            f"config.curriculum.stage_learning_rates has {len(config.stage_learning_rates)} "
            f"entries: expected {len(kinds)}, one per stage"
        )


def _check_ends(config: CurriculumConfig) -> None:
    """Two ends, for a schedule that has them; a sigmoid never reaches 1."""
    most = BELOW_1 if config.schedule == "sigmoid" else 1
    fits = len(config.ends) == 2 and config.schedule != "steps" and max(config.ends) <= most
    if config.ends and not fits:
        raise DmfError(
            f"config.curriculum.ends = {config.ends} with schedule = {config.schedule!r}: expected "
            "(), or two numbers with schedule = smooth, or two numbers below 1 with sigmoid"
        )
