"""The least time that a step can take on a chip: by its FLOPs, its bytes and its messages.

The largest of the three is the predicted time. It is what a perfect program would need, with
all work of the other two hidden behind it. No figure here was compared with a real chip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from dmf.config import Config
from dmf.measure import hlo, products
from dmf.method import curriculum
from dmf.method.curriculum import Stage
from dmf.method.objectives import KINDS, LAYOUTS, SPLIT, WHOLE


@dataclass(frozen=True)
class Chip:
    """What one device does per second at most, by its maker.

    flops   arithmetic -> FLOP/s of matrix products, without sparsity;
            see `arithmetic`
    memory  bytes to and from its main memory
    links   bytes that it sends to other devices, one way, over all of its links;
            0 where the maker gives none
    source  of these numbers
    """

    flops: dict[str, float]
    memory: float
    links: float
    source: str


def _tpu(peak: float, memory: float, links: float, source: str) -> Chip:
    """Float32 products take one, three or six passes of bfloat16 (jax.lax.Precision)."""
    flops = {"bfloat16": peak, "default": peak, "high": peak / 3, "highest": peak / 6}
    return Chip(flops, memory, links, source)


def _gpu(bf16: float, tf32: float, fp32: float, memory: float, links: float, sheet: str) -> Chip:
    """Float32 products take TF32 below "highest" (jax.lax.Precision)."""
    flops = {"bfloat16": bf16, "default": tf32, "high": tf32, "highest": fp32}
    return Chip(flops, memory, links, f"NVIDIA, {sheet} data sheet")


CLOUD = "docs.cloud.google.com/tpu/docs"
# Part of jax's device_kind -> chip. The first entry that fits counts.
# Makers give the links of both directions together; one way is half of that.
CHIPS = {
    "TPU v4 lite": _tpu(138e12, 614e9, 0, "Jouppi et al. 2021, table 1 (TPU v4i)"),
    "TPU v4": _tpu(275e12, 1200e9, 300e9, f"{CLOUD}/v4; links: Jouppi et al. 2023, 6 x 50 GB/s"),
    "TPU v5 lite": _tpu(197e12, 819e9, 200e9, f"{CLOUD}/v5e"),
    "TPU v5e": _tpu(197e12, 819e9, 200e9, f"{CLOUD}/v5e"),
    "TPU v5": _tpu(459e12, 2765e9, 600e9, f"{CLOUD}/v5p"),
    "TPU v6": _tpu(918e12, 1638e9, 400e9, f"{CLOUD}/v6e"),
    "A100-SXM4-40GB": _gpu(312e12, 156e12, 19.5e12, 1555e9, 300e9, "A100"),
    "A100-SXM": _gpu(312e12, 156e12, 19.5e12, 2039e9, 300e9, "A100"),
    "A100 80GB PCIe": _gpu(312e12, 156e12, 19.5e12, 1935e9, 300e9, "A100"),
    "A100": _gpu(312e12, 156e12, 19.5e12, 1555e9, 300e9, "A100"),
    "H100 PCIe": _gpu(756e12, 378e12, 51e12, 2000e9, 300e9, "H100"),
    "H100 NVL": _gpu(835e12, 417e12, 60e12, 3900e9, 300e9, "H100"),
    "H100": _gpu(989e12, 494e12, 67e12, 3350e9, 450e9, "H100"),
    "H200 NVL": _gpu(835e12, 417e12, 60e12, 4800e9, 450e9, "H200"),
    "H200": _gpu(989e12, 494e12, 67e12, 4800e9, 450e9, "H200"),
}
COLUMNS = (
    # key, heading, width, format
    ("flops_ms", "by FLOP", 10, ".3f"),
    ("memory_ms", "by HBM", 10, ".3f"),
    ("links_ms", "by links", 10, ".3f"),
    ("ms", "least ms", 10, ".3f"),
    ("compiler_ms", "XLA's ms", 10, ".3f"),
    ("images_per_s", "images/s", 11, ".0f"),
    ("over_official", "official/", 10, ".2f"),
)
LEGEND = """\
least ms: the largest of the three, a bound that no program of these counts can beat, with
all links of a chip busy; images/s: at that time, of all devices; XLA's ms: the compiler's own
estimate; official/: least ms of the whole-batch JVP, as in the official code, divided by this"""


@dataclass(frozen=True)
class Bounds:
    """Seconds of a step by FLOPs, by memory and by links. 0 where the count is unknown."""

    flops: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The predicted time: the largest of the three."""
        return max(self.flops, self.memory, self.links)

    @property
    def binds(self) -> str:
        """Which of the three is the largest: FLOP, HBM or links."""
        found = {"FLOP": self.flops, "HBM": self.memory, "links": self.links}
        return max(found, key=lambda name: found[name])


def bounds(flops: float, memory: float, sent: float, chip: Chip, arithmetic: str) -> Bounds:
    """Bounds of a step from the FLOPs, the bytes and the sent bytes of one device."""
    links = sent / chip.links if chip.links else 0.0
    return Bounds(flops / chip.flops[arithmetic], memory / chip.memory, links)


def arithmetic(config: Config, kind: str) -> str:
    """The arithmetic of a kind's matrix products: bfloat16, or float32 by its precision."""
    if config.compute_dtype == "bfloat16":
        return "bfloat16"
    return str(getattr(config.precision, KINDS[kind].arithmetic))


def chip(device_kind: str) -> Chip | None:
    """The chip of a device kind, such as "TPU v5 lite" or "NVIDIA H200".

    None for a device that is not in `CHIPS`, and for a slice of one (MIG).
    """
    if "MIG" in device_kind:
        return None
    return next((chip for name, chip in CHIPS.items() if name in device_kind), None)


def of_program(
    compiled: jax.stages.Compiled, mesh: Mesh, config: Config, kind: str
) -> Bounds | None:
    """Bounds of a compiled step on the chip of the mesh, or None for an unknown chip.

    Of XLA's count of FLOPs and ours the larger counts: XLA leaves out rounds of loops, and ours
    leaves out kernels that the text does not show.
    """
    known = chip(mesh.devices.flat[0].device_kind)
    if known is None:
        return None
    module = hlo.parse(compiled.as_text() or "")
    flops = max((compiled.cost_analysis() or {}).get("flops", 0.0), products.flops(module))
    sent = sum(moved.bytes for moved in hlo.collectives(module, mesh.devices.size).values())
    return bounds(flops, hlo.traffic(module), sent, known, arithmetic(config, kind))


def program_of(stage: Stage, share: float, layout: str) -> str:
    """The first layout in which a stage's program is the same: as many passes of a row.

    share: of rows with r < t.
    """
    wanted = curriculum.passes(stage, share, layout)
    return next(x for x in LAYOUTS if curriculum.passes(stage, share, x) == wanted)


def programs(stages: Sequence[Stage], share: float) -> list[tuple[Stage, str]]:
    """(stage, layout) of every program that the layouts make. share: as in `program_of`."""
    every = [(stage, layout) for layout in LAYOUTS for stage in stages]
    return [
        (stage, layout) for stage, layout in every if program_of(stage, share, layout) == layout
    ]


def decided(
    stages: Sequence[Stage], share: float, ms: Callable[[str, str], float | None]
) -> tuple[str, str]:
    """(the layout with the least time of all steps of a run, why, in words).

    ms: (kind, layout) -> least time of a step; None where it does not fit, or is unknown.
        It is asked about layouts of `program_of` alone.
    Of equal layouts the first of `LAYOUTS` counts, and "split" where no time is known.
    """
    hours = {}
    for layout in LAYOUTS:
        found = [(s.steps, ms(s.kind, program_of(s, share, layout))) for s in stages]
        known = [steps * step_ms for steps, step_ms in found if step_ms is not None]
        hours[layout] = sum(known) / 3.6e6 if len(known) == len(found) else float("inf")
    best = min(LAYOUTS, key=lambda layout: hours[layout])
    if hours[best] == float("inf"):
        return SPLIT, "no layout fits, or its time is unknown"
    told = (
        f"{layout} {hours[layout]:.3g} h" if hours[layout] < float("inf") else f"{layout} unknown"
        for layout in LAYOUTS
    )
    return best, f"by the roofline all steps take at least: {', '.join(told)}"


def columns(found: Bounds | None, batch_size: int, compiler_s: float | None) -> dict[str, Any]:
    """The numbers of `COLUMNS` for one step, except its ratio to the official one."""
    keys = [key for key, *_ in COLUMNS] + ["binds"]
    row: dict[str, Any] = dict.fromkeys(keys)
    row["compiler_ms"] = compiler_s and 1e3 * compiler_s
    if found is None or not found.seconds:
        return row
    times = {"flops_ms": found.flops, "memory_ms": found.memory, "links_ms": found.links}
    row |= {key: 1e3 * value for key, value in times.items()} | {"ms": 1e3 * found.seconds}
    return row | {"images_per_s": batch_size / found.seconds, "binds": found.binds}


def format_row(row: dict[str, Any]) -> str:
    """One line of a table: `COLUMNS`, and which bound binds. A dash is an unknown number."""
    line = "".join(
        f"{'-' if row[key] is None else format(row[key], form):>{width}}"
        for key, _, width, form in COLUMNS
    )
    return f"{line}  {row['binds'] or '-'}"


def heading() -> str:
    """The line above those of `format_row`."""
    return "".join(f"{name:>{width}}" for _, name, width, _ in COLUMNS) + "  binds"


def of_plan(rows: list[dict[str, Any]], config: Config) -> list[dict[str, Any]]:
    """The rows of a config's plan with the numbers of `COLUMNS`.

    A row without a count of FLOPs takes the model's.
    """
    found = []
    for row in rows:
        known = chip("TPU " + row["libtpu_name"].partition(":")[0])
        bound = None
        if known and row.get("bytes_accessed"):
            flops = row.get("flops") or row["model_flops"]
            sent = sum(moved["bytes"] for moved in row["collectives"].values())
            how = arithmetic(config, row["kind"])
            bound = bounds(flops, row["bytes_accessed"], sent, known, how)
        seconds = row.get("compiler_seconds")
        found.append(row | columns(bound, row["batch_size"], seconds))
    whole = {row["libtpu_name"]: row["ms"] for row in found if _layout(row) == WHOLE}
    for row in found:
        row["over_official"] = over(whole.get(row["libtpu_name"]), row["ms"])
    return found


def of_auto(rows: list[dict[str, Any]], stages: Sequence[Stage], config: Config) -> list[str]:
    """Lines that say what `config.rows` = auto takes on each topology. rows: from `of_plan`."""
    ms = {
        (row["libtpu_name"], row["kind"], _layout(row)): row["ms"] if row["fits"] else None
        for row in rows
    }

    def of_step(target: str, kind: str, layout: str) -> float | None:
        return ms[target, kind, layout]

    lines = []
    for target in dict.fromkeys(row["libtpu_name"] for row in rows):
        share = config.times.r_neq_t_fraction
        layout, why = decided(stages, share, partial(of_step, target))
        lines.append(f"rows = auto takes {layout} on {target}: {why}")
    return lines


def over(official: float | None, ms: float | None) -> float | None:
    """The ratio of two times, None where one is unknown."""
    return official / ms if official and ms else None


def format_plan(rows: list[dict[str, Any]]) -> str:
    """The least times of rows from `of_plan` as a printed table."""
    lines = [f"{'topology':<10}{'mesh':>8}  {'kind':<16}{'rows':<7}{heading()}"]
    for row in rows:
        mesh = "x".join(map(str, row["mesh"]))
        start = f"{row['topology']:<10}{mesh:>8}  {row['kind']:<16}{_layout(row):<7}"
        lines.append(start + format_row(row))
    return "\n".join([*lines, LEGEND])


def _layout(row: dict[str, Any]) -> str:
    """How the step lays out its rows. Old rows do not say it."""
    return str(row.get("rows", SPLIT))
