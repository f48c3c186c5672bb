"""The table of docs/performance.md for TPUs: what a step computes, moves, holds and sends.

    python launch/tables/tpu_table.py --out=docs/tpu_table.json             prints; needs libtpu
    python launch/tables/tpu_table.py --out=docs/tpu_table.json --cases=dit_b4_256 --depth=3
    python launch/tables/tpu_table.py --out=docs/tpu_table.json --print     stored rows alone

Every program is compiled for chips that are not there, by --mode=plan's own code. Nothing runs.
A row in the file is not compiled again, so a stopped command goes on where it stopped.
Times on two cores: minutes for a program of few blocks, an hour for a deep one.
With JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 it is a tenth; a row stores the effort and the depth.
A second table has all blocks of a transformer, by the rows of two depths.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dmf.config import Config, parse
from dmf.measure import roofline, tpu_plan
from dmf.method.objectives import JOINT, SHARED, SPLIT, WHOLE


@dataclass(frozen=True)
class Case:
    """A network and batch; its FSDP shards; the chips and the methods it is for."""

    config: str
    batch_size: int
    patch: int = 0
    fsdp: int = 1
    topologies: tuple[str, ...] = ("v5e-8", "v4-8")
    methods: tuple[str, ...] = ("", "guided")


CASES = {
    "dit_b4_256": Case("imagenet256:B", 256, patch=4),
    "dit_b4_1024": Case("imagenet256:B", 1024, patch=4),
    "unet_1024": Case("cifar10", 1024, methods=("",)),
    "sit_xl2_256": Case("imagenet256:XL", 256),
    "sit_xl2_256_fsdp": Case("imagenet256:XL", 256, fsdp=0),
}
PRECISION = "default"  # of every kind, so that kinds differ by their layout alone
# Of configs/methods.py: the kinds of the paper, and the guided ones. The official step is beside.
KINDS = {"": ("all_pairs", "discrete", "jvp"), "guided": ("guided_jvp",)}


def config_of(case: Case, method: str, depth: int) -> Config:
    """The config of a case. depth: blocks of the transformer, 0 for all."""
    file, _, size = case.config.partition(":")
    argument = ",".join(part for part in (size, method) if part)
    found = parse(importlib.import_module(f"configs.{file}").get_config(argument))
    network = found.network
    if case.patch:
        network = replace(network, patch=case.patch)
    if depth and network.kind == "dit":
        network = replace(network, depth=depth)
    precision = replace(
        found.precision, plain=PRECISION, difference=PRECISION, derivative=PRECISION
    )
    mesh = replace(found.mesh, fsdp=case.fsdp)
    changed = dict(batch_size=case.batch_size, network=network, precision=precision, mesh=mesh)
    return replace(found, **changed)  # type: ignore[arg-type]


def _measure(name: str, method: str, given: argparse.Namespace) -> None:
    """Compiles what the file lacks of one case."""
    case = CASES[name]
    config = config_of(case, method, given.depth)
    targets = given.topology.split(",") if given.topology else list(case.topologies)
    kinds = given.kinds.split(",") if given.kinds else [*KINDS[method], tpu_plan.OFFICIAL]
    label = " ".join(part for part in (name, method) if part)
    depth = f" depth {config.network.depth}" if config.network.kind == "dit" else ""
    for layout in given.rows.split(","):
        laid_out = replace(config, rows=layout)
        tpu_plan.plan(laid_out, targets, given.out, label + depth, kinds)


def of_all_blocks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of whole transformers: what two depths of a program give, continued in a straight line.

    Blocks are alike, so FLOPs, bytes and memory grow by the same amount with each.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, dict[str, Any]]]] = {}
    for row in rows:
        name, _, depth = row["config"].rpartition(" depth ")
        if name and row["fits"]:
            key = name, row["kind"], row["rows"], *_group(row)[1:]
            groups.setdefault(key, []).append((int(depth), row))
    found = []
    for (name, *_), depths in groups.items():
        if len(depths) > 1:
            depths = sorted(depths, key=lambda pair: pair[0])
            (few, low), (more, high) = depths[0], depths[-1]
            case, _, method = name.partition(" ")
            blocks = config_of(CASES[case], method, 0).network.depth
            found.append(_continued(low, high, (blocks - few) / (more - few), name, blocks))
    return found


def _continued(
    low: dict[str, Any], high: dict[str, Any], far: float, name: str, blocks: int
) -> dict[str, Any]:
    """low + far (high - low) of every number of a row."""

    def at(a: float, b: float) -> float:
        return a + far * (b - a)

    keys = ("flops", "bytes_accessed", "temporary_bytes", "compiler_seconds")
    row = low | {key: at(low[key], high[key]) for key in keys}
    moved = {
        kind: {"count": "", "bytes": at(low["collectives"].get(kind, m)["bytes"], m["bytes"])}
        for kind, m in high["collectives"].items()
    }
    return row | {"config": f"{name}, {blocks} blocks", "collectives": moved}


def table(rows: list[dict[str, Any]]) -> str:
    """The stored rows as the table of docs/performance.md, each beside its official step."""
    lines = ["| program | chips | step | rows |" + "".join(f" {name} |" for name in HEADINGS)]
    lines.append("|---" * (4 + len(HEADINGS)) + "|")
    config = config_of(CASES["dit_b4_256"], "", 0)  # all cases have the same arithmetic
    found = roofline.of_plan([row for row in rows if row["fits"]], config)
    for row in found:
        same = [other for other in found if _group(other) == _group(row)]
        whole = next((other for other in same if other["rows"] == WHOLE), None)
        cells = [row["config"], row["topology"], row["kind"], row["rows"], *_cells(row, whole)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


HEADINGS = (
    *("GFLOP", "x", "HBM GB", "x", "temporary MB", "x", "sent MB", "collectives"),
    *("least ms", "binds", "official / this", "libtpu's ms", "official / this"),
)


def _group(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["config"], row["topology"], tuple(row["mesh"]), row["effort"]


def _cells(row: dict[str, Any], whole: dict[str, Any] | None) -> list[str]:
    """The numbers of a row; x: divided by those of the official step."""
    cells = []
    for key, unit in (("flops", 1e9), ("bytes_accessed", 1e9), ("temporary_bytes", 1e6)):
        ratio = f"{row[key] / whole[key]:.2f}" if whole else "-"
        cells += [f"{row[key] / unit:.4g}", ratio]
    moved = row["collectives"]
    cells.append(f"{sum(m['bytes'] for m in moved.values()) / 1e6:.0f}")
    cells.append(", ".join(f"{kind} {m['count']}".strip() for kind, m in moved.items()) or "none")
    for key in ("ms", "compiler_ms"):
        value, other = row[key], whole and whole[key]
        cells.append("-" if value is None else f"{value:.2f}")
        cells += [row["binds"] or "-"] * (key == "ms")
        cells.append(f"{other / value:.2f}" if value and other else "-")
    return cells


def main(arguments: list[str]) -> None:
    """Compiles what is missing, row by row, and prints the table."""
    parser = argparse.ArgumentParser(description="What training steps cost on TPUs.")
    parser.add_argument("--out", default=str(ROOT / "docs" / "tpu_table.json"))
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--topology", default="", help="instead of the case's, such as v5e-8")
    parser.add_argument("--methods", default=",".join(KINDS), help="such as ,guided")
    parser.add_argument("--depth", type=int, default=0, help="blocks of a transformer; 0: all")
    parser.add_argument("--kinds", default="", help="only these, such as jvp,official")
    parser.add_argument(
        "--rows", default=f"{SPLIT},{SHARED},{JOINT}", help="layouts beside the official one"
    )
    parser.add_argument("--print", action="store_true", help="only print what is stored")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.cases.split(",") if name not in CASES]
    if unknown:
        parser.error(f"--cases={given.cases}: expected some of {', '.join(CASES)}")
    if not given.print:
        for name in given.cases.split(","):
            for method in given.methods.split(","):
                if method in CASES[name].methods:  # a network without classes is not guided
                    _measure(name, method, given)
    rows = tpu_plan.read(given.out)
    print(table(rows))
    print(f"\n{table(of_all_blocks(rows))}")


if __name__ == "__main__":
    main(sys.argv[1:])
