"""Step times side by side: what the rows with r < t really cost, against the forward passes the mathematics needs.

One line per kind of stage and share of r < t rows. jvp with all rows is the JVP of the whole batch, as the official JAX
code takes it. The programs take turns, so that a drift of the machine's speed hits all, and a ratio of two steps is the
median over rounds of the ratio within a round. Attention kernels, remat and mesh are those of the config.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dmf import networks, optim, sharding, state, step
from dmf.config import Config, check
from dmf.data import load
from dmf.errors import DmfError
from dmf.measure import cost
from dmf.measure.cost import Compilations, Counts
from dmf.method import curriculum, flow, guidance, velocity
from dmf.method.curriculum import Stage
from dmf.method.objectives import BETWEEN, KINDS, LAST, PRETRAINING
from dmf.networks import attention

ROUNDS = 9
WHOLE_JVP = (LAST, 1.0)
# Besides these, what the config's own curriculum has, with its own share of r < t rows. The first is what all are held against.
CASES = (
    (PRETRAINING, 0.0),
    (BETWEEN, 0.25),
    (BETWEEN, 0.75),
    (LAST, 0.25),
    (LAST, 0.75),
    WHOLE_JVP,
)

# Key of a row, heading, width, format. A column that no row has a number for is left out.
COLUMNS = (
    ("r_neq_t", "r<t", 6, ".2f"),
    ("step_ms", "ms", 10, ".2f"),
    ("images_per_s", "images/s", 10, ".1f"),
    ("ratio", "/flow", 8, ".3f"),
    ("limit", "limit", 7, ".3f"),
    ("over_limit", "/limit", 8, ".3f"),
    ("jvp_over", "jvp/it", 8, ".3f"),
    ("gflops", "GFLOP", 11, ".2f"),
    ("flops_ratio", "/flow", 7, ".3f"),
    ("gbytes", "GB", 9, ".3f"),
    ("bytes_ratio", "/flow", 7, ".3f"),
    ("temporary_mb", "temp_MB", 10, ".1f"),
    ("memory_mb", "all_MB", 10, ".1f"),
    ("device_peak_mb", "peak_MB", 10, ".1f"),
    ("utilisation", "MFU", 7, ".1%"),
    ("compile_s", "compile_s", 11, ".1f"),
    ("programs", "programs", 9, "d"),
)
LEGEND = (
    "/flow: to the flow-matching step; limit: /flow by forward passes (backward = 2); jvp/it: JVP of the whole batch / this "
    "step; GFLOP, GB: compiled,\nper device; all_MB: arguments + temp_MB; peak_MB: the device's highest so far; MFU: forward "
    "passes x the plain network's FLOPs, of the bfloat16 peak"
)


@dataclass
class Program:
    """One compiled step, its counts and the times it took. passes: forward passes per row; programs: compilations seen.

    compile_s: None where the memory did not suffice for compiling it.
    """

    kind: str
    fraction: float
    passes: float
    run: jax.stages.Wrapped
    compile_s: float | None
    counts: Counts
    programs: int
    device_peak: int | None = None
    seconds: list[float] = field(default_factory=list)

    def __call__(
        self, now: Any, batch: Any, scalars: step.Scalars, seen: Compilations
    ) -> tuple[Any, float]:
        """One step to its end: (state, seconds)."""
        before, started = seen.count, time.perf_counter()
        now, metrics = self.run(now, batch, scalars)
        jax.block_until_ready((now, metrics))
        seconds = time.perf_counter() - started
        self.programs += seen.count - before
        return now, seconds


def benchmark(config: Config, out: str = "", rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Times every case of `CASES` for a config's network and batch on random images; `out`: a JSON file.

    A case that does not fit the memory is a row of dashes. Raises DmfError where flow matching does not, and where a share of
    `CASES` is no whole number of the batch's rows.
    """
    dataset = load(config.data, "train")
    shape = dataset.image_shape
    stages = check(config, dataset.num_classes, len(dataset))
    mesh = sharding.make_mesh(config.mesh)
    _check_cases(config, mesh)
    with Compilations() as seen:
        programs, fresh, batch = compile_cases(
            config, shape, dataset.num_classes, _cases(config, stages), mesh, seen
        )
        _take_turns(
            [p for p in programs if _fits(p)],
            rounds,
            fresh,
            batch,
            len(config.ema.halflife_images),
            seen,
        )
    forward = cost.forward_flops(config, shape)
    rows = _rows(programs, config.batch_size, forward, mesh)
    about = _about(config, shape, mesh, rounds, forward)
    total = _total(rows, stages, config.times.r_neq_t_fraction)
    print(_report(about, rows, total))
    if out:
        Path(out).write_text(
            json.dumps({**about, "programs": rows, "total": total}, indent=1) + "\n"
        )
    return rows


def compile_cases(
    config: Config,
    shape: tuple[int, ...],
    num_classes: int,
    cases: Sequence[tuple[str, float]],
    mesh: Mesh,
    seen: Compilations,
) -> tuple[list[Program], Callable[[], Any], dict[str, jax.Array]]:
    """(one compiled program per case, what makes a fresh state, a random batch) of a config on a mesh."""
    sharding.check_batch(mesh, config.batch_size)
    optimizer = optim.build(config.optimizer)
    network = networks.build(config.network, shape)

    def fresh() -> state.TrainState:
        return state.create(
            network.init(jax.random.key(0)), optimizer, config.ema, config.curriculum.interval
        )

    place = sharding.placed(mesh, jax.eval_shape(fresh))
    start = jax.jit(fresh, out_shardings=place, compiler_options=sharding.compiler_options(mesh))
    now = start()  # lowered from shapes alone, a step would be compiled once more for the arrays
    batch = sharding.put_rows(mesh, _random_batch(config, shape, num_classes))
    programs = []
    for kind, fraction in cases:
        case = replace(config, times=replace(config.times, r_neq_t_fraction=fraction))
        run = step.make_train_step(
            kind, step.network_for(kind, case, shape, mesh), optimizer, case, mesh, place
        )
        lowered = run.lower(now, batch, _scalars(0, len(config.ema.halflife_images)))
        before, started = seen.count, time.perf_counter()
        found, seconds = Counts(None, None, None, None), None
        try:
            compiled = lowered.compile()
            seconds, found = time.perf_counter() - started, cost.counts(compiled)
        except jax.errors.JaxRuntimeError as error:
            _pass_over(kind, error)
        extra = guidance.passes(config.guidance) if KINDS[kind].guided else 0
        passes = curriculum.passes(
            Stage(0, kind, 1.0, 0, 1, extra, velocity.passes(config.loss.tangent)), fraction
        )
        programs.append(Program(kind, fraction, passes, run, seconds, found, seen.count - before))
    return programs, start, batch


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The rows as a printed table, a dash where there is no number."""
    first = max(14, 1 + max(len(row["kind"]) for row in rows))
    columns = [c for c in COLUMNS if any(row[c[0]] is not None for row in rows)]
    lines = [
        f"{'kind':>{first}}" + "".join(f"{heading:>{width}}" for _, heading, width, _ in columns)
    ]
    for row in rows:
        cells = ("-" if row[key] is None else format(row[key], form) for key, _, _, form in columns)
        lines.append(
            f"{row['kind']:>{first}}"
            + "".join(f"{x:>{c[2]}}" for x, c in zip(cells, columns, strict=True))
        )
    return "\n".join(lines)


def _cases(config: Config, stages: Sequence[Stage]) -> list[tuple[str, float]]:
    own = {
        (s.kind, config.times.r_neq_t_fraction) for s in stages if not KINDS[s.kind].flow_matching
    }
    return [*CASES, *sorted(own - set(CASES))]


def _check_cases(config: Config, mesh: Mesh) -> None:
    """Refuses a batch of which a share of `CASES` is no whole number of rows, on each device and in each microbatch."""
    parts = mesh.devices.size * config.microbatches
    for kind, fraction in CASES:
        try:
            flow.row_split(config.batch_size, fraction, parts)
        except DmfError as error:
            whole = 4 * parts  # the shares are quarters
            raise DmfError(
                f"config.batch_size = {config.batch_size}: the case {kind} with {fraction:.0%} of r < t rows does not come out "
                f"even on {mesh.devices.size} devices x {config.microbatches} microbatches; expected a multiple of {whole}, "
                f"such as {max(config.batch_size // whole, 1) * whole}"
            ) from error


def _random_batch(
    config: Config, shape: tuple[int, ...], num_classes: int
) -> dict[str, np.ndarray]:
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
    """Other numbers for every round, as in a run: rho, learning rate, EMA decays, seed."""
    rate = 1e-6 / (1 + turn)
    return step.Scalars(
        np.float32(0.5**turn),
        np.float32(rate),
        np.full(averages, 1 - rate, np.float32),
        np.uint32(turn),
    )


def _fits(program: Program) -> bool:
    """Whether the device has the memory; flow matching, against which all is measured, must have it."""
    if program.compile_s is None:
        return False
    limit, needed = cost.device_memory("bytes_limit"), program.counts.memory_bytes
    if limit is None or needed is None or needed <= limit:
        return True
    if program.kind == PRETRAINING:
        raise _too_much(f"needs {needed / 1e9:.1f} GB of each device's {limit / 1e9:.1f} GB")
    return False


def _pass_over(kind: str, error: jax.errors.JaxRuntimeError) -> None:
    """Lets an error pass that says the memory did not suffice, but for flow matching."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    if kind == PRETRAINING:
        reason = " ".join(str(error).split())[:200]
        raise _too_much(f"needs more memory than each device has ({reason})") from error


def _too_much(what: str) -> DmfError:
    return DmfError(f"config.batch_size: flow matching {what}; expected fewer rows")


def _take_turns(
    programs: list[Program],
    rounds: int,
    fresh: Callable[[], Any],
    batch: Any,
    averages: int,
    seen: Compilations,
) -> None:
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
                if any(
                    x.is_deleted() for x in jax.tree.leaves(now)
                ):  # the failed step may have consumed it
                    now = fresh()
                continue
            if turn:  # the first round warms up
                p.seconds.append(seconds)
            else:
                p.device_peak = cost.device_memory("peak_bytes_in_use")


def _rows(
    programs: list[Program], batch_size: int, forward: float | None, mesh: Mesh
) -> list[dict[str, Any]]:
    base = programs[0]
    whole = next((p for p in programs if (p.kind, p.fraction) == WHOLE_JVP), None)
    peak = cost.peak_flops(mesh.devices.flat[0].device_kind)
    rows = []
    for p in programs:
        seconds = statistics.median(p.seconds) if p.seconds else None
        ratio, limit = _paired(p, base), p.passes / base.passes
        model = None if forward is None else p.passes * forward
        speed = None if model is None or seconds is None else model / seconds / mesh.devices.size
        rows.append(
            {
                "kind": p.kind,
                "r_neq_t": p.fraction,
                "step_ms": _over(seconds, 1e-3),
                "images_per_s": _over(batch_size, seconds),
                "ratio": ratio,
                "limit": limit,
                "over_limit": _over(ratio, limit),
                "jvp_over": _paired(whole, p) if whole else None,
                "gflops": _over(p.counts.flops, 1e9),
                "flops_ratio": _over(p.counts.flops, base.counts.flops),
                "gbytes": _over(p.counts.bytes, 1e9),
                "bytes_ratio": _over(p.counts.bytes, base.counts.bytes),
                "temporary_mb": _over(p.counts.temporary_bytes, 1e6),
                "memory_mb": _over(p.counts.memory_bytes, 1e6),
                "device_peak_mb": _over(p.device_peak, 1e6),
                "model_gflops": _over(model, 1e9),
                "utilisation": _over(speed, peak),
                "compile_s": p.compile_s,
                "programs": None if p.compile_s is None else p.programs,
            }
        )
    return rows


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _paired(a: Program, b: Program) -> float | None:
    """Median of the rounds' own ratios of two steps' times: both ran within the same second."""
    if not a.seconds or not b.seconds:
        return None
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def _total(rows: list[dict[str, Any]], stages: Sequence[Stage], fraction: float) -> dict[str, Any]:
    """Hours of the config's whole run by these step times, and of as many steps of flow matching and of whole-batch JVP.

    A trajectory step is counted as one of flow matching: the same passes, at other times.
    """
    ms = {(row["kind"], row["r_neq_t"]): row["step_ms"] for row in rows}
    steps = stages[-1].last

    def hours(of: Any) -> float | None:
        found = [(s.steps, ms.get(of(s))) for s in stages]
        return (
            None
            if any(m is None for _, m in found)
            else sum(n * m for n, m in found if m is not None) / 3.6e6
        )

    def own(s: Stage) -> tuple[str, float]:
        return CASES[0] if KINDS[s.kind].flow_matching else (s.kind, fraction)

    return {
        "steps": steps,
        "hours": hours(own),
        "flow_hours": hours(lambda _: CASES[0]),
        "whole_jvp_hours": hours(lambda _: WHOLE_JVP),
    }


def _about(
    config: Config, shape: tuple[int, ...], mesh: Mesh, rounds: int, forward: float | None
) -> dict[str, Any]:
    return {
        "device": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
        "batch_size": config.batch_size,
        "microbatches": config.microbatches,
        "image_shape": list(shape),
        "compute_dtype": config.compute_dtype,
        "network": asdict(config.network),
        "attention": asdict(config.attention),
        "remat": config.remat,
        "scan_blocks": config.scan_blocks,
        "forward_gflops": _over(forward, 1e9),
        "rounds": rounds,
    }


def _report(about: dict[str, Any], rows: list[dict[str, Any]], total: dict[str, Any]) -> str:
    parts = " x ".join(f"{name} {size}" for name, size in about["mesh"].items())
    lines = [
        f"{about['network']['kind']}, batch {about['batch_size']}, {tuple(about['image_shape'])}, {about['compute_dtype']}, "
        f"{about['device']} ({parts}), jax {about['jax']}, median of {about['rounds']} rounds",
        format_rows(rows),
        LEGEND,
    ]
    lines += _uncounted(about, [row["kind"] for row in rows])
    if None not in total.values():
        lines.append(
            f"this config's run of {total['steps']:,} steps: {total['hours']:.3g} h; as many of flow matching: "
            f"{total['flow_hours']:.3g} h, of whole-batch JVP: {total['whole_jvp_hours']:.3g} h"
        )
    return "\n".join(lines)


def _uncounted(about: dict[str, Any], kinds: Sequence[str]) -> list[str]:
    """What XLA's counts leave out of these kinds' programs, in words."""
    kernels = {kind: about["attention"][KINDS[kind].arithmetic] for kind in kinds}
    loops = [f"one of {about['microbatches']} microbatches"] * (about["microbatches"] > 1) + [
        "one block"
    ] * about["scan_blocks"]
    chunked = [kind for kind, kernel in kernels.items() if kernel == "chunked"]
    if chunked:
        loops.append(f"one chunk of attention's keys ({', '.join(chunked)})")
    fused = [
        f"{kind}: {kernel}" for kind, kernel in kernels.items() if kernel in attention.PLATFORMS
    ]
    lines = (
        [f"GFLOP and GB count the body of a loop once: they are of {', '.join(loops)}"]
        if loops
        else []
    )
    return lines + (
        [f"GFLOP and GB count a fused attention kernel as nothing ({', '.join(fused)})"]
        if fused
        else []
    )
