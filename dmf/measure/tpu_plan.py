"""The training steps compiled for TPUs that are not there: what they cost, move and hold on each device, and whether they fit.

libtpu (`pip install "jax[tpu]"`) compiles on any machine for a named topology, ahead of time, with nothing allocated. One row
per kind of stage: model FLOPs, bytes, memory against what the compiler may use of the chip, collectives, compile time. Rows are
kept in a JSON file and not compiled again: a compilation takes minutes, of many convolutions most of an hour, or with
JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1, which jax reads from its environment, a tenth of that.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dmf import fields, networks, optim, sharding, state, step
from dmf.config import Config, check, to_dict
from dmf.errors import DmfError
from dmf.measure import cost, hlo
from dmf.method import curriculum
from dmf.method.curriculum import Stage
from dmf.method.objectives import KINDS
from dmf.storage import atomic


@dataclass(frozen=True)
class Generation:
    """TPUs of one kind as libtpu knows them.

    cores: how many a Cloud name such as v4-32 counts per chip; shapes: chips -> their grid; hbm_gib: what the compiler may use
    of the memory of one device, as it says where a program does not fit; options: for libtpu, so that a device is what jax
    shows on such a machine.
    """

    cores: int
    shapes: dict[int, str]
    hbm_gib: float
    options: dict[str, str]


PLANE = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
OLDER_PLANE = {4: "2x2", 16: "4x4", 64: "8x8", 128: "8x16", 256: "16x16"}
SPACE = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}
GENERATIONS = {
    "v2": Generation(2, OLDER_PLANE, 7.48, {}),
    "v3": Generation(2, OLDER_PLANE, 15.48, {}),
    # Without the option libtpu lists the two cores of a v4 chip as two devices; a real machine joins them.
    "v4": Generation(2, SPACE, 30.75, {"chip_config_name": "megacore"}),
    "v5e": Generation(1, PLANE, 15.75, {}),
    "v5p": Generation(2, SPACE, 95.74, {}),
    "v6e": Generation(1, PLANE, 31.25, {}),
}
# libtpu takes hosts of four chips for granted; these smaller ones have one host.
ONE_HOST = {"1x1": (1, 1, 1), "2x4": (2, 4, 1)}
# What libtpu asks of its surroundings; it would look for a TPU and its metadata server otherwise, and let one process in.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Data set -> image shape, classes, images of its training split. A plan reads no data.
DATA = {
    "digits": ((8, 8, 1), 10, 1352),
    "photos": ((16, 16, 3), 12, 3864),
    "cifar10": ((32, 32, 3), 10, 50_000),
    "imagenet256_latents": ((32, 32, 4), 1000, 1_281_167),
}
# What shapes a program, besides what a row says in words.
SHAPING = (
    "network",
    "data",
    "times",
    "loss",
    "guidance",
    "optimizer",
    "ema",
    "precision",
    "label_dropout",
)
# Fields that are younger than stored rows; at these values the program is the same.
LATER: dict[str, dict[str, Any]] = {
    "loss": {"tangent": "data", "delta": 0.005},
    "optimizer": {"name": "adam"},
}
EARLIER = {"effort": 0.0}  # of rows that are kept from before it was a column
LEGEND = (
    "per device. TFLOP: the model's, forward passes x the plain network's FLOPs; GB: 1e9 bytes moved to and from memory, an "
    "estimate;\nstate (with the batch), temp, total, HBM: GiB; collectives: how many, those in loops as often as they run, and "
    "GB sent"
)
UNKNOWN = "* has a loop whose rounds its text does not tell, counted as one: GB and collectives are too low"
HURRIED = "compiled with JAX_EXEC_TIME_OPTIMIZATION_EFFORT = {}: a program as it is by default may need less memory and time"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def plan(
    config: Config, topologies: list[str], out: str = "", name: str = ""
) -> list[dict[str, Any]]:
    """Compiles every step program of a config for every topology, prints the table and returns its rows.

    topologies: Cloud names such as v4-32 or v5e-16, or libtpu's such as v5e:4x4. out: a JSON file, where new rows are added to
    those it holds, each as soon as it is known. name: what the rows are called, such as the config's file. Raises DmfError
    where libtpu is missing, a topology is unknown, the batch does not divide or the config makes no sense, all of them before
    anything is compiled, and where a program cannot be.
    """
    if config.data.name not in DATA:
        raise DmfError(
            f"config.data.name is {config.data.name!r}: expected one of {', '.join(DATA)}"
        )
    shape, classes, images = DATA[config.data.name]
    stages = {stage.kind: stage for stage in check(config, classes, images)}
    targets = [(given, libtpu_name(given)) for given in topologies]
    _prepare()
    meshes = [sharding.make_mesh(config.mesh, _devices(given, target)) for given, target in targets]
    for mesh in meshes:
        sharding.check_batch(mesh, config.batch_size)
        for kind in stages:
            step.split_for(kind, config, mesh)
    rows, kept, forward = [], read(out), None
    for (given, target), mesh in zip(targets, meshes, strict=True):
        hbm = GENERATIONS[target.partition(":")[0]].hbm_gib
        for kind, stage in stages.items():
            about = _about(config, name, given, target, mesh, kind)
            same = {k: v for k, v in about.items() if k not in ("config", "topology")}
            row = next(
                (r for r in kept if all((EARLIER | r).get(k) == v for k, v in same.items())), None
            )
            if row is None:
                forward = forward or cost.forward_flops(config, shape) or float("nan")
                passes = curriculum.passes(stage, config.times.r_neq_t_fraction)
                row = (
                    about
                    | {"model_flops": passes * forward / mesh.devices.size}
                    | _compile(config, mesh, stage, shape, hbm)
                )
                kept = [*(read(out) or kept), row]  # another process may have added rows meanwhile
                _write(out, kept)
            rows.append(row)
            print(format_rows(rows[-1:], heading=len(rows) == 1), flush=True)
    print(legend(rows), flush=True)
    return rows


def libtpu_name(topology: str) -> str:
    """v4-32 -> v4:2x2x4 (the number counts cores up to v5p, chips of v5e and v6e); libtpu's own names as they are."""
    generation, mark, grid = topology.partition(":")
    if mark and generation in GENERATIONS and re.fullmatch(r"\d+(x\d+){1,2}", grid):
        return topology
    generation, _, count = topology.partition("-")
    generation = {"v5litepod": "v5e"}.get(generation, generation)
    if generation in GENERATIONS:
        found = GENERATIONS[generation]
        names = {str(chips * found.cores): grid for chips, grid in found.shapes.items()}
        if count in names:
            return f"{generation}:{names[count]}"
        raise DmfError(
            f"--topology={topology}: expected {generation}- and one of {', '.join(names)}"
        )
    raise DmfError(
        f"--topology={topology}: expected a name such as v4-32, of {', '.join(GENERATIONS)}, or libtpu's own, such as v5e:4x4"
    )


def read(path: str) -> list[dict[str, Any]]:
    """The rows that a file holds, none where there is no file. Raises DmfError for anything but a file of `plan`."""
    if not path or not Path(path).exists():
        return []
    try:
        rows = json.loads(Path(path).read_text())["rows"]
        if not all(
            isinstance(row, dict) and {"kind", "fits", "program"} <= row.keys() for row in rows
        ):
            raise KeyError("rows")
        return list(rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = " ".join(str(error).split())[:100]
        raise DmfError(
            f"--out={path} is not the JSON of a plan ({type(error).__name__}: {why}): expected one, or no file"
        ) from error


def verdict(message: str) -> dict[str, Any] | None:
    """What the compiler says where a program needs too much memory: bytes used (None if it does not say) and allowed.

    None for a message about anything else.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    number = r"([\d.]+)([KMGT]?)"
    used = re.search(rf"Used {number}i?B? of {number}", message)
    other = re.search(rf"\({number}i?B?\) exceeds available HBM \({number}", message)
    found = used or other
    if not found:
        return {"fits": False, "total_bytes": None, "hbm_bytes": None}
    total, total_unit, limit, limit_unit = found.groups()
    return {
        "fits": False,
        "total_bytes": round(float(total) * UNITS[total_unit]),
        "hbm_bytes": round(float(limit) * UNITS[limit_unit]),
    }


def measure(compiled: jax.stages.Compiled, devices: int, hbm_gib: float) -> dict[str, Any]:
    """Memory, bytes and collectives of a compiled program on one device of several.

    state_bytes: all arguments, in the padded layouts of a TPU; total_bytes: besides these temporaries, new results and the
    program itself; bytes_accessed: to and from the chip's main memory (`hlo.traffic`); xla_bytes: XLA's count, which has the
    memory on the chip in it, None where it leaves out rounds of a loop; loops: rounds of each loop, None where unknown, which
    is counted as one; xla_remat: instructions that the compiler added to compute something again rather than keep it.
    """
    memory: Any = compiled.memory_analysis()
    module = hlo.parse(compiled.as_text() or "")
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    rounds = [
        hlo.trips(module, i, where) for where, i, _ in hlo.walk(module) if i.opcode == "while"
    ]
    return {
        "fits": total <= hbm_gib * UNITS["G"],
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "total_bytes": total,
        "hbm_bytes": round(hbm_gib * UNITS["G"]),
        "bytes_accessed": hlo.traffic(module),
        "xla_bytes": None
        if any(n != 1 for n in rounds)
        else (compiled.cost_analysis() or {}).get("bytes accessed"),
        "collectives": {
            kind: asdict(moved) for kind, moved in hlo.collectives(module, devices).items()
        },
        "loops": rounds,
        "xla_remat": sum(
            ".remat" in name
            for instructions in module.computations.values()
            for name in instructions
        ),
    }


def format_rows(rows: list[dict[str, Any]], heading: bool = True) -> str:
    """The rows as a printed table, per device: model TFLOP, GB, GiB of HBM, collectives as count and GB sent."""
    lines = []
    if heading:
        lines.append(
            f"{'topology':<10}{'mesh':>8}  {'kind':<16}{'TFLOP':>9}{'GB':>9}{'state':>8}{'temp':>8}{'total':>8}{'HBM':>7}  "
            f"{'fits':<5}{'compile s':>10}  collectives: count, GB sent"
        )
    for row in rows:
        memory = "".join(
            _gib(row.get(key), width) for key, width in (("state_bytes", 8), ("temporary_bytes", 8))
        )
        memory += _gib(row["total_bytes"], 8) + _gib(row["hbm_bytes"], 7)
        moved = ", ".join(
            f"{kind} {m['count']} {m['bytes'] / 1e9:.2f}"
            for kind, m in row.get("collectives", {}).items()
        )
        read = row.get("bytes_accessed")
        kind = row["kind"] + "*" * _unknown(row)
        lines.append(
            f"{row['topology']:<10}{'x'.join(map(str, row['mesh'])):>8}  {kind:<16}{row['model_flops'] / 1e12:>9.2f}"
            f"{'-' if read is None else f'{read / 1e9:.1f}':>9}{memory}  {'yes' if row['fits'] else 'no':<5}"
            f"{row['compile_s']:>10.0f}  {moved}"
        )
    return "\n".join(lines)


def legend(rows: list[dict[str, Any]]) -> str:
    """What the columns of `format_rows` are, and what a star at one of these rows says."""
    efforts = sorted({row.get("effort", 0.0) for row in rows} - {0.0})
    return "\n".join(
        [LEGEND]
        + [UNKNOWN] * any(map(_unknown, rows))
        + [HURRIED.format(effort) for effort in efforts]
    )


def _unknown(row: dict[str, Any]) -> bool:
    return None in row.get("loops", ())


def _prepare() -> None:
    """Makes libtpu usable on a machine without a TPU, before it is loaded."""
    if importlib.util.find_spec("libtpu") is None:
        raise DmfError(
            'libtpu is not installed: expected it, by pip install "jax[tpu]" (it compiles on any Linux machine)'
        )
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")


def _libtpu_version() -> str:
    return importlib.metadata.version("libtpu")


def _devices(given: str, target: str) -> list[jax.Device]:
    from jax.experimental import topologies

    generation, _, grid = target.partition(":")
    options: dict[str, Any] = dict(GENERATIONS[generation].options)
    if GENERATIONS[generation].shapes is PLANE and grid in ONE_HOST:
        options["chips_per_host_bounds"] = ONE_HOST[grid]
    try:
        return list(
            topologies.get_topology_desc(topology_name=target, platform="tpu", **options).devices
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DmfError(
            f"--topology={given}: libtpu does not know {target} ({reason}); expected one such as v5e:4x4"
        ) from error


def _about(
    config: Config, name: str, given: str, target: str, mesh: Any, kind: str
) -> dict[str, Any]:
    """What tells a row from another one; config and topology are names alone."""
    values = to_dict(config)
    shaping: dict[str, Any] = {key: values[key] for key in SHAPING} | {
        "interval": config.curriculum.interval
    }
    for section, young in LATER.items():
        shaping[section] = {k: v for k, v in shaping[section].items() if young.get(k) != v}
    former = fields.FORMER["precision"]  # as stored rows have it
    shaping["precision"] = {old: shaping["precision"][now] for old, now in former.items()}
    shaping["data"] = {
        key: value for key, value in shaping["data"].items() if key not in ("data_dir", "mock")
    }
    return {
        "config": name,
        "topology": given,
        "libtpu_name": target,
        "mesh": list(mesh.devices.shape),
        "kind": kind,
        "batch_size": config.batch_size,
        "microbatches": config.microbatches,
        "compute_dtype": config.compute_dtype,
        "remat": config.remat,
        "scan_blocks": config.scan_blocks,
        "attention": getattr(config.attention, KINDS[kind].arithmetic),
        "program": hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:12],
        "effort": getattr(jax.config, "jax_exec_time_optimization_effort", 0.0),
        "jax": jax.__version__,
        "libtpu": _libtpu_version(),
    }


def _lower(config: Config, mesh: Any, kind: str, shape: tuple[int, ...]) -> jax.stages.Lowered:
    """The step program of a kind over the mesh's devices, from shapes alone."""
    network, optimizer = step.network_for(kind, config, shape, mesh), optim.build(config.optimizer)
    plain = networks.build(config.network, shape)
    params, interval = jax.eval_shape(plain.init, jax.random.key(0)), config.curriculum.interval
    now = jax.eval_shape(lambda given: state.create(given, optimizer, config.ema, interval), params)
    batch = cost.batch_shapes(config, shape)
    scalars = step.Scalars(
        np.float32(1),
        np.float32(0),
        np.zeros(len(config.ema.halflife_images), np.float32),
        np.uint32(0),
    )
    return step.make_train_step(
        kind, network, optimizer, config, mesh, sharding.placed(mesh, now)
    ).lower(now, batch, scalars)


def _compile(
    config: Config, mesh: Any, stage: Stage, shape: tuple[int, ...], hbm_gib: float
) -> dict[str, Any]:
    """What a row says of the compiled program of a stage, or of why there is none."""
    started = time.perf_counter()
    try:
        lowered = _lower(config, mesh, stage.kind, shape)
        started = time.perf_counter()
        compiled = lowered.compile()
    except Exception as error:
        if not _of_compiler(error):
            raise
        refusal = verdict(str(error))
        if refusal is None:
            reason = " ".join(str(error).split())[:300]
            raise DmfError(
                f"the {stage.kind} step does not compile: {reason}; expected other attention or precision"
            ) from error
        return refusal | {"compile_s": time.perf_counter() - started}
    seconds = time.perf_counter() - started
    return measure(compiled, mesh.devices.size, hbm_gib) | {"compile_s": seconds}


def _of_compiler(error: Exception) -> bool:
    """Whether XLA, a lowering or Pallas' compiler refused. The last one's MosaicError is an Exception without a public name."""
    names = [found.__name__ for found in type(error).__mro__]
    return (
        isinstance(error, jax.errors.JaxRuntimeError | NotImplementedError)
        or "MosaicError" in names
    )


def _gib(value: float | None, width: int) -> str:
    text = "-" if value is None else f"{value / UNITS['G']:.2f}"
    return f"{text:>{width}}"


def _write(path: str, rows: list[dict[str, Any]]) -> None:
    """Writes the file beside its place and moves it there: a reader finds the old one or the new one, whole."""
    if not path:
        return
    try:
        with atomic.made(Path(path)) as partial:
            partial.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    except OSError as error:
        raise DmfError(
            f"--out={path} could not be written: {error}; expected a writable directory with room"
        ) from error
