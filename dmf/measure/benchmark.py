"""Step times side by side: what rows with r < t cost, and the forward passes they need.

There is one line per kind of stage and share of r < t rows.
With all rows, the kind jvp is the JVP of the whole batch, as in the official JAX code.
The programs take turns, so a change of the machine's speed hits all of them.
A ratio of two steps is the median over rounds of the ratio within a round.
Attention kernels, remat and mesh are those of the config.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import jax
from jax.sharding import Mesh

from dmf import sharding
from dmf.config import Config, check
from dmf.data import load
from dmf.errors import DmfError
from dmf.measure import cost, layout, roofline
from dmf.measure.cost import Compilations
from dmf.measure.programs import Program, compile_cases, fits, take_turns
from dmf.method import flow
from dmf.method.curriculum import Stage
from dmf.method.objectives import BETWEEN, KINDS, LAST, PRETRAINING
from dmf.networks import attention
from dmf.storage import paths

ROUNDS = 9
WHOLE_JVP = (LAST, 1.0)
# (kind, share of r < t rows). All cases are compared with the first.
# The config's own curriculum adds its kinds, with its own share.
CASES = (
    (PRETRAINING, 0.0),
    (BETWEEN, 0.25),
    (BETWEEN, 0.75),
    (LAST, 0.25),
    (LAST, 0.75),
    WHOLE_JVP,
)

# Key of a row, heading, width, format. A column without any number is left out.
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
LEGEND = """\
/flow: divided by the flow-matching step; limit: /flow by forward passes (backward = 2)
jvp/it: JVP of the whole batch, divided by this step; GFLOP, GB: compiled, per device
all_MB: arguments + temp_MB; peak_MB: the device's highest so far
MFU: forward passes x the plain network's FLOPs, as a share of the bfloat16 peak"""


def benchmark(config: Config, out: str = "", rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Times every case of `CASES`, for a config's network and batch, on random images.

    out: a JSON file. A case that does not fit the memory is a row of dashes.

    Raises DmfError where flow matching does not fit, and where a share of `CASES` is no whole
    number of the batch's rows.
    """
    config, dataset = layout.settled(config), load(config.data, "train")
    shape = dataset.image_shape
    stages = check(config, dataset.num_classes, len(dataset))
    mesh = sharding.make_mesh(config.mesh)
    _check_cases(config, mesh)
    with Compilations() as seen:
        cases, averages = _cases(config, stages), len(config.ema.halflife_images)
        made = compile_cases(config, shape, dataset.num_classes, cases, mesh, seen)
        programs, fresh, batch = made
        take_turns([p for p in programs if fits(p)], rounds, fresh, batch, averages, seen)
    forward = cost.forward_flops(config, shape)
    rows = _rows(programs, config.batch_size, forward, mesh)
    about = _about(config, shape, mesh, rounds, forward)
    total = _total(rows, stages, config.times.r_neq_t_fraction)
    print(_report(about, rows, total))
    if out:
        stored = {**about, "programs": rows, "total": total}
        paths.write(paths.at(out), json.dumps(stored, indent=1) + "\n")
    return rows


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The rows as a printed table, with a dash where a number is missing."""
    first = max(14, 1 + max(len(row["kind"]) for row in rows))
    columns = [c for c in COLUMNS if any(row[c[0]] is not None for row in rows)]
    lines = [f"{'kind':>{first}}" + "".join(f"{heading:>{n}}" for _, heading, n, _ in columns)]
    for row in rows:
        line = f"{row['kind']:>{first}}"
        for key, _, width, form in columns:
            line += f"{'-' if row[key] is None else format(row[key], form):>{width}}"
        lines.append(line)
    return "\n".join(lines)


def format_least(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the least times of the rows on this chip, none where the chip is unknown."""
    if not any(row["roofline"]["ms"] for row in rows):
        return []
    lines = [f"{'kind':>16}{'r<t':>6}{'ms':>10}{roofline.heading()}"]
    for row in rows:
        ms = "-" if row["step_ms"] is None else f"{row['step_ms']:.3f}"
        start = f"{row['kind']:>16}{row['r_neq_t']:>6.2f}{ms:>10}"
        lines.append(start + roofline.format_row(row["roofline"]))
    return [*lines, roofline.LEGEND]


def _cases(config: Config, stages: Sequence[Stage]) -> list[tuple[str, float]]:
    kinds = {stage.kind for stage in stages if not KINDS[stage.kind].flow_matching}
    own = {(kind, config.times.r_neq_t_fraction) for kind in kinds}
    return [*CASES, *sorted(own - set(CASES))]


def _check_cases(config: Config, mesh: Mesh) -> None:
    """Raises DmfError where a share of `CASES` is no whole number of rows.

    The rows are those of one device and one microbatch.
    """
    parts = mesh.devices.size * config.microbatches
    for kind, fraction in CASES:
        try:
            flow.row_split(config.batch_size, fraction, parts)
        except DmfError as error:
            whole = 4 * parts  # the shares are quarters
            raise DmfError(
                f"config.batch_size = {config.batch_size}: "
                f"the case {kind} with {fraction:.0%} of r < t rows does not come out even on "
                f"{mesh.devices.size} devices x {config.microbatches} microbatches; "
                f"expected a multiple of {whole}, "
                f"such as {max(config.batch_size // whole, 1) * whole}"
            ) from error


def _rows(
    programs: list[Program], batch_size: int, forward: float | None, mesh: Mesh
) -> list[dict[str, Any]]:
    base = programs[0]
    whole = next((p for p in programs if (p.kind, p.fraction) == WHOLE_JVP), None)
    known = roofline.chip(mesh.devices.flat[0].device_kind)
    peak = known.flops["bfloat16"] if known else None
    official = whole.least.seconds * 1e3 if whole and whole.least else None
    rows = []
    for p in programs:
        seconds = statistics.median(p.seconds) if p.seconds else None
        ratio, limit = _paired(p, base), p.passes / base.passes
        model = None if forward is None else p.passes * forward
        speed = None if model is None or seconds is None else model / seconds / mesh.devices.size
        least = roofline.columns(p.least, batch_size, p.counts.compiler_seconds)
        least["over_official"] = roofline.over(official, least["ms"])
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
                "roofline": least,
            }
        )
    return rows


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _paired(a: Program, b: Program) -> float | None:
    """The median ratio of two steps' times. Both steps of a ratio ran in the same round."""
    if not a.seconds or not b.seconds:
        return None
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def _total(rows: list[dict[str, Any]], stages: Sequence[Stage], fraction: float) -> dict[str, Any]:
    """Hours of the config's whole run by these step times.

    Beside them: the hours of as many steps of flow matching, and of the JVP of the whole batch.
    All steps of flow matching count the same, whatever their times: they have the same passes.
    """
    ms = {(row["kind"], row["r_neq_t"]): row["step_ms"] for row in rows}

    def hours(of: Callable[[Stage], tuple[str, float]]) -> float | None:
        found = [(s.steps, ms.get(of(s))) for s in stages]
        known = [n * m for n, m in found if m is not None]
        return sum(known) / 3.6e6 if len(known) == len(found) else None

    def own(s: Stage) -> tuple[str, float]:
        return CASES[0] if KINDS[s.kind].flow_matching else (s.kind, fraction)

    return {
        "steps": stages[-1].last,
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
        f"{about['network']['kind']}, batch {about['batch_size']}, {tuple(about['image_shape'])}, "
        f"{about['compute_dtype']}, {about['device']} ({parts}), jax {about['jax']}, "
        f"median of {about['rounds']} rounds",
        format_rows(rows),
        LEGEND,
        *format_least(rows),
    ]
    lines += _uncounted(about, [row["kind"] for row in rows])
    if None not in total.values():
        lines.append(
            f"this config's run of {total['steps']:,} steps: {total['hours']:.3g} h; "
            f"as many of flow matching: {total['flow_hours']:.3g} h, "
            f"of whole-batch JVP: {total['whole_jvp_hours']:.3g} h"
        )
    return "\n".join(lines)


def _uncounted(about: dict[str, Any], kinds: Sequence[str]) -> list[str]:
    """Notes on what XLA's counts of these kinds' programs leave out."""
    kernels = {kind: about["attention"][KINDS[kind].arithmetic] for kind in kinds}
    loops, lines = [], []
    if about["microbatches"] > 1:
        loops.append(f"one of {about['microbatches']} microbatches")
    if about["scan_blocks"]:
        loops.append("one block")
    chunked = [kind for kind, kernel in kernels.items() if kernel == "chunked"]
    if chunked:
        loops.append(f"one chunk of attention's keys ({', '.join(chunked)})")
    if loops:
        lines.append(f"GFLOP and GB count the body of a loop once: they are of {', '.join(loops)}")
    fused = [f"{kind}: {name}" for kind, name in kernels.items() if name in attention.PLATFORMS]
    if fused:
        lines.append(f"GFLOP and GB count a fused attention kernel as 0 ({', '.join(fused)})")
    return lines
