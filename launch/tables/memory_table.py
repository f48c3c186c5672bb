"""The tables of docs/memory.md: bytes of a run's state, and of a step by remat policy.

    python launch/tables/memory_table.py                              prints; about three minutes
    python launch/tables/memory_table.py --out=docs/memory.json       stores the numbers as well

Shapes are counted, and programs are compiled for this machine's device but not run.
Nothing is allocated and no data are read.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax
import numpy as np

from dmf import networks, optim, sharding, state, step
from dmf.config import Config, parse
from dmf.measure import cost, tpu_plan

STATES = ("digits", "cifar10", "imagenet256")
# Program -> (config, kinds, changed fields).
# Four blocks as in docs/benchmark_dit_cpu.json; 16 rows are two microbatches.
PROGRAMS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "digits": ("digits", ("discrete", "jvp"), {}),
    "sit": ("imagenet256:S", ("discrete",), {"batch_size": 16, "depth": 4}),
}
# Without a scan, XLA's CPU compiler merges the repeated computation with the first one.
# Remat then saves nothing.
POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "blocks": {"remat": "blocks"},
    "none, scan": {"scan_blocks": True},
    "dots, scan": {"remat": "dots", "scan_blocks": True},
    "blocks, scan": {"remat": "blocks", "scan_blocks": True},
    "blocks, scan, 2 microbatches": {"remat": "blocks", "scan_blocks": True, "microbatches": 2},
}


def config_of(name: str, **changes: Any) -> Config:
    """A config of configs/ (NAME or NAME:VARIANT) with fields changed; depth: the network's."""
    file, _, variant = name.partition(":")
    made = importlib.import_module(f"configs.{file}").get_config(*([variant] if variant else []))
    found = parse(made)
    depth = changes.pop("depth", None)
    return (
        replace(found, **changes)
        if depth is None
        else replace(found, network=replace(found.network, depth=depth), **changes)
    )


def size(tree: Any) -> int:
    """Bytes of all leaves, arrays or their shapes."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def state_of(config: Config) -> dict[str, Any]:
    """Parameters and bytes of each part of a run's state; nothing is allocated."""
    shape = tpu_plan.DATA[config.data.name][0]
    params = jax.eval_shape(networks.build(config.network, shape).init, jax.random.key(0))
    optimizer = optim.build(config.optimizer)
    now = jax.eval_shape(
        lambda given: state.create(given, optimizer, config.ema, config.curriculum), params
    )
    return {
        "parameters": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params)),
        "weights": size(now.params),
        "adam": size(now.opt_state),
        "averages": [size(average) for average in now.ema],
        "state": size(now),
        "batch": size(cost.batch_shapes(config, shape)),
    }


def temporary(config: Config, kind: str) -> int:
    """Temporary bytes of a compiled step on the first device: all but state and batch."""
    shape, optimizer = tpu_plan.DATA[config.data.name][0], optim.build(config.optimizer)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    params = jax.eval_shape(networks.build(config.network, shape).init, jax.random.key(0))
    now = jax.eval_shape(
        lambda given: state.create(given, optimizer, config.ema, config.curriculum), params
    )
    scalars = step.Scalars(
        np.float32(1),
        np.float32(0),
        np.zeros(len(config.ema.halflife_images), np.float32),
        np.uint32(0),
    )
    network = step.network_for(kind, config, shape, mesh)
    program = step.make_train_step(
        kind, network, optimizer, config, mesh, sharding.placed(mesh, now)
    )
    found = cost.counts(
        program.lower(now, cost.batch_shapes(config, shape), scalars).compile()
    ).temporary_bytes
    return int(found or 0)


def state_table(states: dict[str, Any]) -> str:
    """Markdown: bytes by part."""
    lines = [
        "| config | parameters | weights | Adam | averages | state |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in states.items():
        mb = (of["weights"], of["adam"], sum(of["averages"]), of["state"])
        cells = [f"{of['parameters']:,}", *(f"{n / 1e6:,.1f}" for n in mb)]
        cells[3] = f"{len(of['averages'])} x {of['averages'][0] / 1e6:,.1f}"
        lines.append(f"| `configs/{name}.py` | {' | '.join(cells)} |")
    return "\n".join(lines)


def policy_table(programs: dict[str, dict[str, dict[str, int]]]) -> str:
    """Markdown: temporary MB by program, kind and policy."""
    lines = [f"| program | step | {' | '.join(POLICIES)} |", "|---|---|" + "---|" * len(POLICIES)]
    for name, kinds in programs.items():
        for kind, of in kinds.items():
            cells = " | ".join(f"{of[policy] / 1e6:,.1f}" for policy in POLICIES)
            lines.append(f"| {name} | {kind} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON file for the numbers; programs that are in it are not compiled again",
    )
    flags = parser.parse_args()
    about = {
        "command": f"python launch/tables/memory_table.py --out={flags.out}",
        "jax": jax.__version__,
    }
    stored: dict[str, Any] = {**about, "device": jax.devices()[0].platform, "temporary_bytes": {}}
    if flags.out and flags.out.is_file():
        stored |= {"temporary_bytes": json.loads(flags.out.read_text())["temporary_bytes"]}
    stored["states"] = {name: state_of(config_of(name)) for name in STATES}
    print(state_table(stored["states"]), flush=True)
    for name, (file, kinds, changes) in PROGRAMS.items():
        for kind, policy in itertools.product(kinds, POLICIES):
            found = stored["temporary_bytes"].setdefault(name, {}).setdefault(kind, {})
            if policy not in found:
                found[policy] = temporary(config_of(file, **changes, **POLICIES[policy]), kind)
                if flags.out:
                    flags.out.write_text(json.dumps(stored, indent=1) + "\n")
    print(policy_table(stored["temporary_bytes"]))


if __name__ == "__main__":
    main()
