"""Training steps compiled for TPUs that are not there: what they cost, and whether they fit.

libtpu (`pip install "jax[tpu]"`) compiles ahead of time, on any machine, and allocates nothing.
There is one row per kind of stage, and one for the JVP of the whole batch, as in the official
code. It has FLOPs, bytes, memory, collectives, compile time, and the least time on the chip.

Rows are kept in a JSON file and not compiled again: a compilation takes minutes.
Many convolutions take most of an hour.
With JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1, which jax reads from its environment, they take a tenth.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dmf import fields, networks, optim, sharding, state, step
from dmf.config import Config, check, to_dict
from dmf.errors import DmfError
from dmf.measure import cost, hlo, products, roofline, topologies
from dmf.method import curriculum
from dmf.method.curriculum import Stage
from dmf.method.objectives import AUTO, FORMER, KINDS, LAST, SPLIT, WHOLE
from dmf.storage import atomic, records

# Data set -> image shape, classes, images of its training split. A plan reads no data.
DATA = {
    "digits": ((8, 8, 1), 10, 1352),
    "photos": ((16, 16, 3), 12, 3864),
    "cifar10": ((32, 32, 3), 10, 50_000),
    "imagenet256_latents": ((32, 32, 4), 1000, 1_281_167),
    "imagenet256_features": ((16, 16, 768), 1000, 1_281_167),
}
# Sections of the config that change a program and have no column. A row has a digest of them.
SHAPING = (
    *("network", "data", "times", "loss", "guidance"),
    *("optimizer", "ema", "precision", "label_dropout"),
)
# Fields that are younger than stored rows. With these values the program is the same.
LATER: dict[str, dict[str, Any]] = {
    "loss": dict(tangent="data", tangent_data=0.0, target_data=1.0, target_clip=0.0, delta=0.005)
    | dict(weight="adaptive", interval_weight="none", interval_power=1.0)
    | dict(border_weight="none", snr_limit=5.0, logvar="off", velocity="data")
    | dict(rectify_weight=1.0, rectify_from=0.0, rectify_ramp=0.1, rectify_guidance=1.0),
    "optimizer": dict(name="adam", rate_factor=1.0, momentum=0.95, decompose_every_steps=100)
    | dict(largest_side=10_000, other_scale=1e-3, convolutions=False, second_rate=1.0),
    "network": {
        "interval_input": "t-r",
        "time_input": "features",
        "init": "lecun",
        "time_routing": "interval",
        "t_blocks": 0,
        "qk_norm": False,
        "logvar": False,
    },
    "guidance": {"most": 1.0, "power": 1.0},
    "times": dict(base="logit_normal", border="pairs", border_mean=0.0, border_std=1.0)
    | dict(difficulty_clusters=0, difficulty_share=0.25, shift=1.0),
}
OFFICIAL, GUIDED_LAST = "official", "guided_jvp"
EARLIER = {"effort": 0.0, "rows": SPLIT}  # columns that old rows lack
LEGEND = """\
per device. TFLOP: of the model, forward passes x the plain network's FLOPs
GB: 1e9 bytes moved to and from memory, an estimate; state (with the batch), temp, total, HBM: GiB
collectives: how many, and GB sent; those in loops count as often as they run"""
UNKNOWN = (
    "* has a loop whose number of rounds is not known, counted as one: "
    "GB and collectives are too low"
)
HURRIED = (
    "compiled with JAX_EXEC_TIME_OPTIMIZATION_EFFORT = {}: "
    "a program compiled without it may need less memory and time"
)
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def plan(
    config: Config, names: list[str], out: str = "", name: str = "", only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Compiles a config's steps for every topology, prints the table and returns its rows.

    names: of topologies, Cloud's such as v4-32 and v5e-16, or libtpu's such as v5e:4x4.

    out: a JSON file. A new row is added to it as soon as it is known.

    name: the rows' label, such as the config's file.

    only: kinds to compile, with "official" for the JVP of all rows. Without any, all are compiled.

    Raises DmfError for a missing libtpu, an unknown topology, a batch that does not divide, and a
    wrong config. It does so before anything is compiled.
    Raises DmfError for a program that does not compile.
    """
    if config.data.name not in DATA:
        raise DmfError(
            f"config.data.name is {config.data.name!r}: expected one of {', '.join(DATA)}"
        )
    shape, classes, images = DATA[config.data.name]
    every = check(config, classes, images)
    stages = {stage.kind: stage for stage in every}
    targets = [(given, topologies.libtpu_name(given)) for given in names]
    topologies.prepare()
    meshes = [sharding.make_mesh(config.mesh, topologies.devices(*target)) for target in targets]
    for mesh in meshes:
        sharding.check_batch(mesh, config.batch_size)
        for kind in stages:
            step.split_for(kind, config, mesh)
    rows, kept, forward = [], read(out), None
    for (given, target), mesh in zip(targets, meshes, strict=True):
        hbm = topologies.hbm_gib(target)
        for case, stage in _cases(config, list(stages.values()), only):
            about = _about(case, name, given, target, mesh, stage.kind)
            row = next((row for row in kept if _same(row, about)), None)
            if row is None:
                forward = forward or cost.forward_flops(config, shape) or float("nan")
                passes = curriculum.passes(stage, case.times.r_neq_t_fraction, case.rows)
                row = about | {"model_flops": passes * forward / mesh.devices.size}
                row |= _compile(case, mesh, stage, shape, hbm)
                kept = [*(read(out) or kept), row]  # another process may have added rows meanwhile
                _write(out, kept)
            rows.append(row)
            print(format_rows(rows[-1:], heading=len(rows) == 1), flush=True)
    least = roofline.of_plan(rows, config)
    auto = roofline.of_auto(least, every, config) if config.rows == AUTO and not only else []
    print("\n".join([legend(rows), roofline.format_plan(least), *auto]), flush=True)
    return rows


def _cases(config: Config, stages: list[Stage], only: Sequence[str]) -> list[tuple[Config, Stage]]:
    """(config, stage) of every program: the kinds of the run, then the official step.

    With `rows` = auto the kinds are there in every layout that makes another program.
    A run of flow matching alone has no official step beside it. only: as in `plan`.
    """
    given = [stage for stage in stages if not only or stage.kind in only]
    found = [(config, stage) for stage in given]
    if config.rows == AUTO:
        differing = roofline.programs(given, config.times.r_neq_t_fraction)
        found = [(replace(config, rows=layout), stage) for stage, layout in differing]
    learners = [stage for stage in stages if not KINDS[stage.kind].flow_matching]
    if not learners or (only and OFFICIAL not in only):
        return found
    guided = next((stage for stage in learners if KINDS[stage.kind].guided), None)
    official = replace(guided or learners[-1], kind=GUIDED_LAST if guided else LAST)
    there = any((case.rows, stage.kind) == (WHOLE, official.kind) for case, stage in found)
    return found if there else [*found, (replace(config, rows=WHOLE), official)]


ROW = {"kind": str, "fits": bool, "program": str}  # the least that a stored row tells


def read(path: str) -> list[dict[str, Any]]:
    """The rows of a file, or none without a file. Kinds get the names that they have now.

    Raises DmfError for a file that `plan` has not written.
    """
    if not path or not Path(path).exists():
        return []
    rows = records.read(Path(path), {"rows": [ROW]}, "the JSON of a plan, or no file")["rows"]
    return [row | {"kind": FORMER.get(row["kind"], row["kind"])} for row in rows]


def verdict(message: str) -> dict[str, Any] | None:
    """The bytes used and allowed, from the compiler's message about too much memory.

    Both are None where the message has no numbers. Returns None for any other message.
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
    """Memory, bytes and collectives of a compiled program, on one device of several.

        state_bytes     all arguments, in the padded layouts of a TPU
        total_bytes     these, temporaries, new results and the program itself
        flops           of matrix products (`products.flops`)
        bytes_accessed  to and from the chip's main memory (`hlo.traffic`)
        xla_bytes       XLA's count, with the memory on the chip;
                        None where it leaves out rounds of a loop
        compiler_seconds  the compiler's own estimate; None as above
        loops           rounds of each loop; None where unknown, counted as one
        xla_remat       instructions with which the compiler computes a value again

    hbm_gib: the memory of one device that the compiler may use.
    """
    memory: Any = compiled.memory_analysis()
    module = hlo.parse(compiled.as_text() or "")
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    walk = hlo.walk(module)
    rounds = [hlo.trips(module, i, where) for where, i, _ in walk if i.opcode == "while"]
    looped = any(n != 1 for n in rounds)
    names = (name for instructions in module.computations.values() for name in instructions)
    moved = hlo.collectives(module, devices)
    estimates: dict[str, Any] = {} if looped else compiled.cost_analysis() or {}
    return {
        "fits": total <= hbm_gib * UNITS["G"],
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "total_bytes": total,
        "hbm_bytes": round(hbm_gib * UNITS["G"]),
        "flops": products.flops(module),
        "bytes_accessed": hlo.traffic(module),
        "xla_bytes": estimates.get("bytes accessed"),
        "compiler_seconds": estimates.get("optimal_seconds"),
        "collectives": {kind: asdict(total) for kind, total in moved.items()},
        "loops": rounds,
        "xla_remat": sum(".remat" in name for name in names),
    }


def format_rows(rows: list[dict[str, Any]], heading: bool = True) -> str:
    """The rows as a printed table; `legend` explains its columns."""
    lines = []
    if heading:
        lines.append(
            f"{'topology':<10}{'mesh':>8}  "
            f"{'kind':<16}{'TFLOP':>9}{'GB':>9}{'state':>8}{'temp':>8}{'total':>8}{'HBM':>7}  "
            f"{'fits':<5}{'compile s':>10}  collectives: count, GB sent"
        )
    for row in rows:
        memory = _gib(row.get("state_bytes"), 8) + _gib(row.get("temporary_bytes"), 8)
        memory += _gib(row["total_bytes"], 8) + _gib(row["hbm_bytes"], 7)
        moved = ", ".join(
            f"{kind} {m['count']} {m['bytes'] / 1e9:.2f}"
            for kind, m in row.get("collectives", {}).items()
        )
        read = row.get("bytes_accessed")
        whole = " whole" * (row.get("rows") == WHOLE)
        kind = row["kind"] + whole + "*" * _unknown(row)
        lines.append(
            f"{row['topology']:<10}{'x'.join(map(str, row['mesh'])):>8}  "
            f"{kind:<16}{row['model_flops'] / 1e12:>9.2f}"
            f"{'-' if read is None else f'{read / 1e9:.1f}':>9}{memory}  "
            f"{'yes' if row['fits'] else 'no':<5}"
            f"{row['compile_s']:>10.0f}  {moved}"
        )
    return "\n".join(lines)


def legend(rows: list[dict[str, Any]]) -> str:
    """What the columns of `format_rows` mean, and a star at one of these rows."""
    efforts = sorted({row.get("effort", 0.0) for row in rows} - {0.0})
    return "\n".join(
        [LEGEND]
        + [UNKNOWN] * any(map(_unknown, rows))
        + [HURRIED.format(effort) for effort in efforts]
    )


def _unknown(row: dict[str, Any]) -> bool:
    return None in row.get("loops", ())


def _about(
    config: Config, name: str, given: str, target: str, mesh: Any, kind: str
) -> dict[str, Any]:
    """What makes a row another row. "config" and "topology" are only labels."""
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
        "rows": config.rows,
        "attention": getattr(config.attention, KINDS[kind].arithmetic),
        "program": _digest(config),
        "effort": getattr(jax.config, "jax_exec_time_optimization_effort", 0.0),
        "jax": jax.__version__,
        "libtpu": topologies.libtpu_version(),
    }


def _same(row: dict[str, Any], about: dict[str, Any]) -> bool:
    """Whether a stored row is about this program."""
    stored = EARLIER | row
    return all(stored.get(k) == v for k, v in about.items() if k not in ("config", "topology"))


def _digest(config: Config) -> str:
    """A digest of the sections that change a program. It stays as stored rows have it."""
    values = to_dict(config)
    shaping = {key: values[key] for key in SHAPING} | {"interval": config.curriculum.interval}
    if config.path != Config.path:  # which old rows do not name
        shaping["path"] = config.path
    if config.rows != Config.rows:
        shaping["rows"] = config.rows
    if config.taught:
        shaping["teacher"] = asdict(replace(config.teacher, place="given"))
    if config.network.kind == "unet" and not config.network.num_classes:  # a field since then
        shaping["network"] = {k: v for k, v in shaping["network"].items() if k != "num_classes"}
    for key, later in LATER.items():
        kept = {k: v for k, v in shaping[key].items() if k not in later or v != later[k]}
        shaping[key] = kept
    precision, former = shaping["precision"], fields.FORMER["precision"]
    shaping["precision"] = {old: precision[now] for old, now in former.items()}
    data = shaping["data"]
    shaping["data"] = {k: v for k, v in data.items() if k not in ("data_dir", "mock")}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:12]


def lower(config: Config, mesh: Any, kind: str, shape: tuple[int, ...]) -> jax.stages.Lowered:
    """The step program of a kind on the mesh's devices. It takes shapes, not arrays."""
    network, optimizer = step.network_for(kind, config, shape, mesh), optim.build(config.optimizer)
    plain = networks.build(config.network, shape)
    params, rules = jax.eval_shape(plain.init, jax.random.key(0)), config.curriculum
    now = jax.eval_shape(lambda given: state.create(given, optimizer, config.ema, rules), params)
    batch = cost.batch_shapes(config, shape)
    scalars = step.Scalars(
        np.float32(1),
        np.float32(0),
        np.zeros(len(config.ema.halflife_images), np.float32),
        np.uint32(0),
    )
    place = sharding.placed(mesh, now)
    run = step.make_train_step(kind, network, optimizer, config, mesh, place)
    return run.lower(now, batch, scalars, *([params] if config.taught else []))


def _compile(
    config: Config, mesh: Any, stage: Stage, shape: tuple[int, ...], hbm_gib: float
) -> dict[str, Any]:
    """The columns of a row about the compiled program of a stage, or about its refusal."""
    started = time.perf_counter()
    try:
        lowered = lower(config, mesh, stage.kind, shape)
        started = time.perf_counter()
        compiled = lowered.compile()
    except Exception as error:
        if not _of_compiler(error):
            raise
        refusal = verdict(str(error))
        if refusal is None:
            reason = " ".join(str(error).split())[:300]
            raise DmfError(
                f"the {stage.kind} step does not compile: {reason}; "
                "expected other attention or precision"
            ) from error
        return refusal | {"compile_s": time.perf_counter() - started}
    seconds = time.perf_counter() - started
    return measure(compiled, mesh.devices.size, hbm_gib) | {"compile_s": seconds}


def _of_compiler(error: Exception) -> bool:
    """Whether XLA, a lowering or Pallas' compiler refused."""
    if isinstance(error, jax.errors.JaxRuntimeError | NotImplementedError):
        return True
    # Pallas' MosaicError is an Exception, and has no public name.
    return "MosaicError" in [found.__name__ for found in type(error).__mro__]


def _gib(value: float | None, width: int) -> str:
    text = "-" if value is None else f"{value / UNITS['G']:.2f}"
    return f"{text:>{width}}"


def _write(path: str, rows: list[dict[str, Any]]) -> None:
    """Writes the file. A reader finds the old file or the new one, whole."""
    if not path:
        return
    try:
        with atomic.made(Path(path)) as partial:
            partial.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    except OSError as error:
        raise DmfError(
            f"--out={path} could not be written: {error}; expected a writable directory with room"
        ) from error
