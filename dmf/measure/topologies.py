"""TPUs that are not there, by name: libtpu compiles for them on any machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from dmf.errors import DmfError


@dataclass(frozen=True)
class Generation:
    """TPUs of one kind as libtpu knows them.

    cores: how many cores of a chip a Cloud name such as v4-32 counts.

    shapes: number of chips -> their grid.

    hbm_gib: how much memory of one device the compiler may use.
    It says so where a program does not fit.

    options: for libtpu, to get the devices that jax shows on such a machine.
    """

    cores: int
    shapes: dict[int, str]
    hbm_gib: float
    options: dict[str, str]


PLANE = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
OLDER_PLANE = {4: "2x2", 16: "4x4", 64: "8x8", 128: "8x16", 256: "16x16"}
SPACE = {
    **{4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4"},
    **{64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"},
}
GENERATIONS = {
    "v2": Generation(2, OLDER_PLANE, 7.48, {}),
    "v3": Generation(2, OLDER_PLANE, 15.48, {}),
    # libtpu lists the two cores of a v4 chip as two devices. This option joins them.
    "v4": Generation(2, SPACE, 30.75, {"chip_config_name": "megacore"}),
    "v5e": Generation(1, PLANE, 15.75, {}),
    "v5p": Generation(2, SPACE, 95.74, {}),
    "v6e": Generation(1, PLANE, 31.25, {}),
}
# libtpu expects hosts of four chips. These smaller grids have one host.
ONE_HOST = {"1x1": (1, 1, 1), "2x4": (2, 4, 1)}
# With these, libtpu does not look for a TPU and its metadata server, and serves many processes.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def libtpu_name(topology: str) -> str:
    """libtpu's name of a topology: v4-32 -> v4:2x2x4.

    The number counts cores up to v5p, and chips of v5e and v6e. libtpu's own names stay.
    Raises DmfError for an unknown name.
    """
    generation, mark, grid = topology.partition(":")
    if mark and generation in GENERATIONS and re.fullmatch(r"\d+(x\d+){1,2}", grid):
        return topology
    generation, _, count = topology.partition("-")
    generation = {"v5litepod": "v5e"}.get(generation, generation)
    if generation not in GENERATIONS:
        raise DmfError(
            f"--topology={topology}: expected a name such as v4-32, of {', '.join(GENERATIONS)}, "
            "or libtpu's own, such as v5e:4x4"
        )
    found = GENERATIONS[generation]
    names = {str(chips * found.cores): grid for chips, grid in found.shapes.items()}
    if count not in names:
        raise DmfError(
            f"--topology={topology}: expected {generation}- and one of {', '.join(names)}"
        )
    return f"{generation}:{names[count]}"


def hbm_gib(target: str) -> float:
    """The memory of one device that the compiler may use, of a topology by libtpu's name."""
    return GENERATIONS[target.partition(":")[0]].hbm_gib


def prepare() -> None:
    """Makes libtpu usable on a machine without a TPU. Call it before libtpu is loaded.

    Raises DmfError where libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise DmfError(
            'libtpu is not installed: expected it, by pip install "jax[tpu]" '
            "(it compiles on any Linux machine)"
        )
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")


def libtpu_version() -> str:
    """The version of the installed libtpu."""
    return importlib.metadata.version("libtpu")


def devices(given: str, target: str) -> list[jax.Device]:
    """The devices of a topology by libtpu's name; `given` is the user's name.

    Raises DmfError where libtpu does not know it.
    """
    from jax.experimental import topologies

    generation, _, grid = target.partition(":")
    options: dict[str, Any] = dict(GENERATIONS[generation].options)
    if GENERATIONS[generation].shapes is PLANE and grid in ONE_HOST:
        options["chips_per_host_bounds"] = ONE_HOST[grid]
    try:
        found = topologies.get_topology_desc(topology_name=target, platform="tpu", **options)
        return list(found.devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DmfError(
            f"--topology={given}: libtpu does not know {target} ({reason}); "
            "expected one such as v5e:4x4"
        ) from error
