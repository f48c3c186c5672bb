"""Step programs of several kinds, compiled, and run in turns on random images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dmf import networks, optim, sharding, state, step
from dmf.config import Config
from dmf.errors import DmfError
from dmf.measure import cost, roofline
from dmf.measure.cost import Compilations, Counts
from dmf.measure.roofline import Bounds
from dmf.method import curriculum, guidance
from dmf.method.curriculum import Stage
from dmf.method.objectives import KINDS, PRETRAINING


@dataclass
class Program:
    """One compiled step, its counts and its times.

    passes: forward passes per row.

    compile_s: None where the memory was too small to compile it.

    programs: how many compilations were seen.

    least: the bounds of its time, None for an unknown chip.

    teacher: the weights of a frozen teacher, where the config has one.
    """

    kind: str
    fraction: float
    passes: float
    run: jax.stages.Wrapped
    compile_s: float | None
    counts: Counts
    programs: int
    device_peak: int | None = None
    least: Bounds | None = None
    seconds: list[float] = field(default_factory=list)
    teacher: tuple[Any, ...] = ()

    def __call__(
        self, now: Any, batch: Any, scalars: step.Scalars, seen: Compilations
    ) -> tuple[Any, float]:
        """Runs one step to its end and returns (state, seconds)."""
        before, started = seen.count, time.perf_counter()
        now, metrics = self.run(now, batch, scalars, *self.teacher)
        jax.block_until_ready((now, metrics))
        seconds = time.perf_counter() - started
        self.programs += seen.count - before
        return now, seconds


def compile_cases(
    config: Config,
    shape: tuple[int, ...],
    num_classes: int,
    cases: Sequence[tuple[str, float]],
    mesh: Mesh,
    seen: Compilations,
) -> tuple[list[Program], Callable[[], Any], dict[str, jax.Array]]:
    """Compiles one program per case of a config on a mesh.

    Returns the programs, a function that makes a fresh state, and a random batch.
    """
    sharding.check_batch(mesh, config.batch_size)
    optimizer = optim.build(config.optimizer)
    network = networks.build(config.network, shape)

    def fresh() -> state.TrainState:
        params = network.init(jax.random.key(0))
        return state.create(params, optimizer, config.ema, config.curriculum)

    place = sharding.placed(mesh, jax.eval_shape(fresh))
    start = jax.jit(fresh, out_shardings=place, compiler_options=sharding.compiler_options(mesh))
    now = start()  # real arrays: a step lowered from shapes would be compiled again for arrays
    batch = sharding.put_rows(mesh, random_batch(config, shape, num_classes))
    taught = (jax.tree.map(jnp.copy, now.params),) if config.taught else ()
    programs = []
    for kind, fraction in cases:
        case = replace(config, times=replace(config.times, r_neq_t_fraction=fraction))
        run = step.make_train_step(
            kind, step.network_for(kind, case, shape, mesh), optimizer, case, mesh, place
        )
        lowered = run.lower(now, batch, _scalars(0, len(config.ema.halflife_images)), *taught)
        before, started = seen.count, time.perf_counter()
        found, seconds, least = Counts(None, None, None, None), None, None
        try:
            compiled = lowered.compile()
            seconds, found = time.perf_counter() - started, cost.counts(compiled)
            least = roofline.of_program(compiled, mesh, case, kind)
        except jax.errors.JaxRuntimeError as error:
            _pass_over(kind, error)
        extra = guidance.passes(config.guidance) if KINDS[kind].guided else 0
        by_teacher = config.teacher.passes(config.loss, KINDS[kind].taught, KINDS[kind].passes)
        along = config.teacher.tangent_passes(config.loss)
        stage = Stage(0, kind, 1.0, 0, 1, extra, along, teacher_passes=by_teacher)
        passes = curriculum.passes(stage, fraction, config.rows)
        made = Program(kind, fraction, passes, run, seconds, found, seen.count - before)
        made.least, made.teacher = least, taught
        programs.append(made)
    return programs, start, batch


def take_turns(
    programs: list[Program],
    rounds: int,
    fresh: Callable[[], Any],
    batch: Any,
    averages: int,
    seen: Compilations,
) -> None:
    """Runs every program once per round. The first round only warms up.

    A program that runs out of memory is dropped, with its times.

    fresh: a function that makes a new state.

    averages: how many EMAs the state has.
    """
    now = fresh()
    for turn in range(rounds + 1):
        scalars = _scalars(turn, averages)
        for p in list(programs):
            try:
                now, seconds = p(now, batch, scalars, seen)
            except jax.errors.JaxRuntimeError as error:
                _pass_over(p.kind, error)
                programs.remove(p)
                p.seconds.clear()
                # The failed step may have consumed the state.
                if any(x.is_deleted() for x in jax.tree.leaves(now)):
                    now = fresh()
                continue
            if turn:  # the first round warms up
                p.seconds.append(seconds)
            else:
                p.device_peak = cost.device_memory("peak_bytes_in_use")


def fits(program: Program) -> bool:
    """Whether a program fits the device's memory. Raises DmfError if flow matching does not."""
    if program.compile_s is None:
        return False
    limit, needed = cost.device_memory("bytes_limit"), program.counts.memory_bytes
    if limit is None or needed is None or needed <= limit:
        return True
    if program.kind == PRETRAINING:
        raise _too_much(f"needs {needed / 1e9:.1f} GB of each device's {limit / 1e9:.1f} GB")
    return False


def _pass_over(kind: str, error: jax.errors.JaxRuntimeError) -> None:
    """Ignores the error of a full memory, unless flow matching caused it."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    if kind == PRETRAINING:
        reason = " ".join(str(error).split())[:200]
        raise _too_much(f"needs more memory than each device has ({reason})") from error


def _too_much(what: str) -> DmfError:
    return DmfError(f"config.batch_size: flow matching {what}; expected fewer rows")


def random_batch(config: Config, shape: tuple[int, ...], num_classes: int) -> dict[str, np.ndarray]:
    """A batch of random numbers, with the arrays of the config's data."""
    rng = np.random.default_rng(0)
    draw: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
        "x": lambda size: rng.uniform(-1, 1, size),
        "label": lambda size: rng.integers(0, num_classes, size),
        "std": lambda size: rng.uniform(0, 1, size),
    }
    return {
        key: draw[key](s.shape).astype(s.dtype)
        for key, s in cost.batch_shapes(config, shape).items()
    }


def _scalars(turn: int, averages: int) -> step.Scalars:
    """New numbers for every round, as in a run."""
    rate = 1e-6 / (1 + turn)
    return step.Scalars(
        np.float32(0.5**turn),
        np.float32(rate),
        np.full(averages, 1 - rate, np.float32),
        np.uint32(turn),
    )
