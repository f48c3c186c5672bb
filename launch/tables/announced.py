"""Writes random values that no network may have into a weight file's metadata, and converts it.

    python launch/tables/announced.py --count=200 --out=runs/announced.json

The files are tiny exports of every kind of network. Each edit changes one field: a number outside
its range, a value of another type, a size that the file's tensors cannot fill. Every conversion
must end with one line within two seconds, and leave nothing. All run in one process.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import safetensors.numpy

from dmf import fields
from dmf.convert import audit
from dmf.convert.command import convert
from dmf.convert.native import METADATA, NATIVE
from dmf.errors import DmfError
from dmf.networks.every import build, network_config
from tests.test_config import outside

SECONDS, MEGABYTES = 2.0, 600.0
NETWORKS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "dit": (dict(depth=1, width=8, heads=2, patch=4), [8, 8, 1]),
    "unet": (dict(channels=8, channel_mult=(1,), blocks=1, attention_resolutions=(8,)), [8, 8, 1]),
    "adm": (
        dict(channels=32, channel_mult=(1,), blocks=1, attention_resolutions=(), head_channels=8),
        [8, 8, 1],
    ),
    "mlp": (dict(width=8, depth=1), [8, 8, 1]),
    "vae": (dict(channels=(4,), blocks=1, groups=2), []),
    "dinov2": (dict(depth=1, width=8, heads=2, grid=2), [224, 224, 3]),
}
FOREIGN = (
    [],
    ["dit"],
    {},
    {"a": 1},
    None,
    "NaN",
    "x" * 1000,
    "a\nERROR: all good\x1b[31m",
    10**400,
)
SHAPES = (
    [2**62, 8, 1],
    [2**62],
    [8192, 8192, 3],
    [0, 8, 1],
    [-8, 8, 1],
    [8, 8, 1, 1],
    [8.0, 8, 1],
    [True, 8, 1],
    [float("nan")] * 3,
    ["8", 8, 1],
    [1] * 100_000,
)
LARGE = {"depth": 1024, "width": 2**16, "blocks": 1024, "channels": 2**16}  # each in its range


def write(kind: str, path: Path) -> dict[str, Any]:
    """Writes a tiny file of our own layout; returns what its metadata announce."""
    values, shape = NETWORKS[kind]
    config = network_config({"kind": kind, **values})
    params = jax.jit(build(config, tuple(shape)).init)(jax.random.key(0))
    leaves = {name: np.asarray(x) for name, x in audit.flat(params).items()}
    tensors = audit.write(NATIVE.rules(config, tuple(shape), None), leaves)
    about = {"network": dataclasses.asdict(config), "image_shape": shape, "licence": "none"}
    safetensors.numpy.save_file(tensors, path, {METADATA: json.dumps(about)})
    return about


def announce(path: Path, about: Any, out: Path) -> None:
    """The same tensors with other metadata."""
    safetensors.numpy.save_file(
        safetensors.numpy.load_file(path), out, {METADATA: json.dumps(about)}
    )


def edited(rng: random.Random, about: dict[str, Any]) -> tuple[str, Any, dict[str, Any]]:
    """(field, value, metadata) after one edit that no network may have."""
    new = copy.deepcopy(about)
    place = rng.choice(("network.",) * 9 + ("network", "image_shape", "image_shape", "licence"))
    if place != "network.":
        foreign = [x for x in FOREIGN if place != "licence" or not isinstance(x, str)]
        foreign = [x for x in foreign if place != "image_shape" or x != []]
        new[place] = rng.choice(
            SHAPES if place == "image_shape" and rng.random() < 0.7 else foreign
        )
        return place, new[place], new
    config = network_config(new["network"])
    field = rng.choice(dataclasses.fields(config))
    value = new["network"][field.name] = _wrong(rng, field, new["network"][field.name])
    return f"network.{field.name}", value, new


def _wrong(rng: random.Random, field: Any, old: Any) -> Any:
    if fields.RANGE not in field.metadata or rng.random() < 0.2:
        free = isinstance(old, str) and field.name not in ("kind", *LARGE)
        foreign = [x for x in FOREIGN if not (isinstance(old, list | tuple) and x == [])]
        return rng.choice(foreign if free or not isinstance(old, str) else FOREIGN)
    number = outside(rng, field.metadata[fields.RANGE], "int" in str(field.type))
    if field.name in LARGE and rng.random() < 0.5:
        number = LARGE[field.name]
    return [number] if "tuple" in str(field.type) else number


def attempt(file: Path, out: Path) -> tuple[str, float, str]:
    """(the line of a conversion, its seconds, what was wrong)."""
    began, line = time.monotonic(), ""
    try:
        convert("dmf", file, out, check="none")
        fault = "it was converted"
    except DmfError as error:
        line, fault = str(error), ""
    except Exception as error:  # whatever else comes is what this command looks for
        fault = f"{type(error).__name__}: {error}"[:200]
    seconds = time.monotonic() - began
    if not fault and (not line.isprintable() or str(file) not in line):
        fault = "no clear line"
    if not fault and (seconds > SECONDS or out.exists()):
        fault = "too slow" if seconds > SECONDS else "it left something"
    return line, seconds, fault


def table(count: int, seed: int, work: Path) -> dict[str, Any]:
    """Edits and converts `count` times; returns the counts and everything that was wrong."""
    rng, wrong, slowest, lines = random.Random(seed), [], 0.0, []
    known = {kind: write(kind, work / kind) for kind in NETWORKS}
    for n in range(count):
        kind = rng.choice(list(NETWORKS))
        field, value, about = edited(rng, known[kind])
        announce(work / kind, about, work / "file.safetensors")
        line, seconds, fault = attempt(work / "file.safetensors", work / f"out{n}")
        slowest = max(slowest, seconds)
        lines.append(f"{kind}, {field}: {line}")
        if fault:
            wrong.append([n, kind, field, repr(value)[:80], fault])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {
        "seed": seed,
        "edits": count,
        "refused": count - len(wrong),
        "wrong": wrong,
        "slowest_s": round(slowest, 3),
        "peak_mb": round(peak),
        "lines": [line.replace(str(work), "")[:300] for line in lines],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = table(args.count, args.seed, Path(work))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "lines"}, indent=1))
    sys.exit(bool(found["wrong"]) or found["peak_mb"] > MEGABYTES)


if __name__ == "__main__":
    main()
