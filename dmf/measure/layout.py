"""`config.rows` = auto: the layout of the rows that is the fastest on this chip.

It is decided once, before the first step. The run's config.json then names the layout, and a later
start with `auto` takes it from there. A start that names a layout takes that one instead.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import jax
from jax.sharding import Mesh

from dmf import processes, sharding
from dmf.config import Config, check
from dmf.data import load
from dmf.measure import cost, roofline, tpu_plan
from dmf.method.objectives import AUTO, SPLIT
from dmf.run import workdir as directory


def settled(config: Config, workdir: Path | None = None) -> Config:
    """The config with a layout in place of `auto`. Says which layout, and why.

    workdir: of the run; None for a command without one. Raises DmfError as the run itself would.
    """
    if config.rows != AUTO:
        return config
    with processes.together():
        kept = directory.layout(workdir) if workdir else ""
        layout, why = (kept, "as this run began") if kept else chosen(config)
    print(f"rows      {layout}: {why}", flush=True)
    return replace(config, rows=layout)


def chosen(config: Config) -> tuple[str, str]:
    """(layout, why, in words): the least time by the roofline, or "split" on an unknown chip.

    Compiles the step of every kind in every layout, and runs none.
    """
    mesh = sharding.make_mesh(config.mesh)
    device = mesh.devices.flat[0].device_kind
    if roofline.chip(device) is None:
        return SPLIT, f"the default, as the peaks of {device!r} are unknown"
    sharding.check_batch(mesh, config.batch_size)
    dataset = load(config.data, "train")
    stages = check(config, dataset.num_classes, len(dataset))

    @lru_cache
    def ms(kind: str, layout: str) -> float | None:
        return least_ms(replace(config, rows=layout), mesh, kind, dataset.image_shape)

    layout, why = roofline.decided(stages, config.times.r_neq_t_fraction, ms)
    return layout, f"{why} ({device})"


def least_ms(config: Config, mesh: Mesh, kind: str, shape: tuple[int, ...]) -> float | None:
    """The least time of a step on the chip, in ms; None where it does not fit the memory."""
    try:
        compiled = tpu_plan.lower(config, mesh, kind, shape).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    needed = cost.counts(compiled).memory_bytes
    found = roofline.of_program(compiled, mesh, config, kind)
    if found is None or (needed or 0) > sharding.device_bytes(mesh):
        return None
    return 1e3 * found.seconds
