"""Step times side by side: what the rows with r < t really cost, against the forward passes the mathematics needs.

One line per kind of stage and share of r < t rows: median step time and its ratio to a flow-matching step of the same
network and batch, the counted limit of that ratio (a backward pass is two forward passes), compiled FLOPs and bytes with
their ratios, temporary memory, compile time. The programs take turns, so that a drift of the machine's speed hits all.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmf import curriculum, guidance, networks, optim, sharding, state, step
from dmf.config import Config, check
from dmf.curriculum import Stage
from dmf.data import load

ROUNDS = 9
# Besides these, the guided kinds of the config's own curriculum with its own share of r < t rows.
CASES = (("flow", 0.0), ("discrete", 0.25), ("discrete", 0.75), ("jvp", 0.25), ("jvp", 0.75))


@dataclass
class Program:
    """One compiled step, its counts and the times it took."""

    kind: str
    fraction: float
    passes: float
    run: Callable[..., Any]
    compile_s: float
    flops: float
    bytes: float
    temporary_bytes: int
    seconds: list[float]

    def row(self, base: Program) -> dict[str, Any]:
        median = statistics.median(self.seconds)
        # Each round's own ratio: the two steps ran within the same second.
        ratio = statistics.median(a / b for a, b in zip(self.seconds, base.seconds, strict=True))
        return {
            "kind": self.kind,
            "r_neq_t": self.fraction,
            "step_ms": 1e3 * median,
            "ratio": ratio,
            "limit": self.passes / base.passes,
            "gflops": self.flops / 1e9,
            "flops_ratio": self.flops / base.flops,
            "gbytes": self.bytes / 1e9,
            "bytes_ratio": self.bytes / base.bytes,
            "temporary_mb": self.temporary_bytes / 1e6,
            "compile_s": self.compile_s,
        }


def benchmark(config: Config, out: str = "", rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Times every case of `CASES` for a config's network and batch on random images; `out`: a JSON file."""
    dataset = load(config.data, "train")
    shape = dataset.image_shape
    network = networks.build(config.network, shape, jnp.dtype(config.compute_dtype))
    stages = check(config, dataset.num_classes, len(dataset), network.has_jvp)
    cases = [c for c in CASES if c[0] != "jvp" or network.has_jvp]
    guided = {s.kind for s in stages} & set(curriculum.GUIDED)
    cases += [(kind, config.times.r_neq_t_fraction) for kind in sorted(guided)]
    programs, now, batch, scalars = _compile(config, network, shape, dataset.num_classes, cases)
    for i in range(rounds + 1):
        for p in programs:
            started = time.perf_counter()
            now, metrics = p.run(now, batch, scalars)
            jax.block_until_ready((now, metrics))
            if i:  # the first round warms up
                p.seconds.append(time.perf_counter() - started)
    rows = [p.row(programs[0]) for p in programs]
    print(
        f"{config.network.kind}, batch {config.batch_size}, {shape}, {config.compute_dtype}, {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}, median of {rounds} rounds\n{format_rows(rows)}"
    )
    if out:
        Path(out).write_text(
            json.dumps(
                {
                    "device": jax.devices()[0].device_kind,
                    "batch_size": config.batch_size,
                    "rounds": rounds,
                    "programs": rows,
                },
                indent=1,
            )
            + "\n"
        )
    return rows


def _compile(
    config: Config, network: networks.Network, shape: tuple[int, ...], num_classes: int, cases: list[tuple[str, float]]
) -> tuple[list[Program], Any, Any, Any]:
    mesh, optimizer = sharding.make_mesh(), optim.build(config.optimizer)
    sharding.check_batch(mesh, config.batch_size)
    rng = np.random.default_rng(0)
    batch = sharding.put_rows(
        mesh,
        {
            "x": rng.uniform(-1, 1, (config.batch_size, *shape)).astype(np.float32),
            "label": rng.integers(0, num_classes, config.batch_size).astype(np.int32),
        },
    )
    now = jax.jit(lambda key: state.create(network.init(key), optimizer, config.ema), out_shardings=sharding.replicated(mesh))(
        jax.random.key(0)
    )
    scalars = step.Scalars(np.float32(0.125), np.float32(1e-6), np.full(len(config.ema.halflife_images), 0.999, np.float32))
    programs = []
    for kind, fraction in cases:
        case = replace(config, times=replace(config.times, r_neq_t_fraction=fraction))
        lowered = step.make_train_step(kind, network, optimizer, case, mesh).lower(now, batch, scalars)
        started = time.perf_counter()
        compiled = lowered.compile()
        extra = guidance.passes(config.guidance) if kind in curriculum.GUIDED else 0
        cost = compiled.cost_analysis() or {}
        programs.append(
            Program(
                kind,
                fraction,
                curriculum.passes(Stage(0, kind, 1.0, 0, 1, extra), fraction),
                compiled,
                time.perf_counter() - started,
                cost.get("flops", float("nan")),
                cost.get("bytes accessed", float("nan")),
                getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0),
                [],
            )
        )
    return programs, now, batch, scalars


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The rows as a printed table."""
    names = list(rows[0])
    first = max(14, 1 + max(len(row["kind"]) for row in rows))
    lines = [f"{'kind':>{first}}" + "".join(f"{n:>14}" for n in names[1:])]
    for row in rows:
        lines.append(f"{row['kind']:>{first}}" + "".join(f"{row[n]:>14.3f}" for n in names[1:]))
    return "\n".join(lines)
