"""Pairs of noise and sample, made by a sampler of a checkpoint, to files in shards.

Rectified flows and Re-MeanFlow (arXiv 2511.23342) train on them. The files are those of
`dmf.data.shards`: a killed command goes on when it is called again, with the same bytes.

Pair i is decided by the seed, by i and by the weights. So no number of devices changes it.
Which pairs training reads is decided last, from the distances that stand beside the shards.
The same command with another `keep` therefore draws nothing again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import re
import shutil
import time
from collections.abc import Generator
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dmf import pretrained, sharding
from dmf.config import Config
from dmf.convert import encode
from dmf.convert.encode_claim import claimed, intact
from dmf.data import shards
from dmf.errors import DmfError
from dmf.evaluation import draw, sampling
from dmf.evaluation.draw import Choice
from dmf.logging import Count
from dmf.method.keys import PAIRS
from dmf.method.samplers import SAMPLERS, TIMES
from dmf.storage import paths, records
from dmf.storage.manifest import step_of

STEPS = 32  # of the sampler: the nodes of the paper's
SAMPLER = "heun"
RUNS_OWN = Choice()
NOISES = ("stored", "redrawn")
Part = tuple[np.ndarray, dict[str, np.ndarray]]  # as `shards.write_shard` takes it


def write_pairs(
    path: str | Path,
    out: str,
    count: int,
    *,
    ema: float | None = None,
    choice: Choice = RUNS_OWN,
    steps: int = STEPS,
    noise: str = "stored",
    dtype: str = "float32",
    keep: str = "1",
    shard_size: int = 4096,
) -> Path:
    """Draws `count` pairs, or goes on with them; returns their folder.

    - path, ema: as for `pretrained.load`. choice: as for samples; the sampler is Heun by default.
    - noise: "stored", or "redrawn" from its key as training reads it.
    - dtype: float32 or float16, of the stored values.
    - keep: share of the pairs that training reads, those of the least distance; see `kept`.

    Raises DmfError for bad input, a directory begun with other settings, or a full disk.
    """
    rule = rule_of(keep)
    if jax.process_count() > 1:
        raise DmfError(f"{jax.process_count()} processes: expected one to write pairs")
    found = pretrained.open_weights(path, ema)
    config = sampling.config_of(path, found.stored, choice.sampler or SAMPLER, choice.seed)
    labels = draw.labels_of(found, config, choice.labels)
    if config.num_classes and labels.max() >= config.num_classes:
        raise DmfError(f"--labels: {labels.max()} means no class; expected classes for pairs")
    if choice.guidance:
        draw.check_guidance(found, config, choice.guidance)
    folder = Path(paths.expanded(out))
    plan = _plan(found, config, choice, labels, count, steps, noise, dtype, shard_size)
    total = -(-count // shard_size)
    files = [folder / shards.name(k, total, shards.PAIRS.stem) for k in range(total)]
    identities = [f"{records.seal_of(plan)}-{k}" for k in range(total)]
    with claimed(folder, plan, dict(zip(files, identities, strict=True))):
        whole = intact(files, identities)
        missing = [k for k in range(total) if not whole[k]]
        _announce(folder, plan, len(missing), total)
        if missing:
            encode.note_other_versions([f for f, good in zip(files, whole, strict=True) if good])
            shards.remove(folder / shards.METADATA)
            sampler = _sampler(found, config, labels, choice)
            _draw_shards(sampler, found.params, plan, files, missing, identities)
        _finish(folder, plan, files, rule)
    return folder


def _sampler(
    found: pretrained.Opened, config: Config, labels: np.ndarray, choice: Choice
) -> sampling.Sampler:
    shape, mesh = tuple(found.stored["image_shape"]), sharding.make_mesh()
    by, times = choice.guidance, TIMES[choice.times]
    return sampling.Sampler(found.network, config, shape, labels, mesh, by, times, PAIRS)


def rule_of(keep: str) -> tuple[str, Fraction]:
    """("share", q) of --keep=0.9, or ("distance", d) of --keep=<0.87. Raises DmfError."""
    by, text = ("distance", keep[1:]) if keep.startswith("<") else ("share", keep)
    if re.fullmatch(r"[0-9]{0,9}\.?[0-9]{1,18}", text):
        value = Fraction(text)
        if value > 0 and (by == "distance" or value <= 1):
            return by, value
    raise DmfError(
        f"--keep={keep:.60}: expected a share above 0 and up to 1, such as 0.9, or '<' and a "
        "distance, such as '<0.87'"
    )


def kept(distances: np.ndarray, rule: tuple[str, Fraction]) -> np.ndarray:
    """The numbers (n,) int32 of the pairs that training reads, in their order.

    A share q keeps the floor(q N) pairs of the least distance, of equal ones the first. A distance
    keeps the pairs below it. distances: (N,) mean over the dimensions of (noise - sample)^2.
    Raises DmfError where no pair is left.
    """
    by, value = rule
    if by == "share":
        first = np.argsort(distances, kind="stable")[: math.floor(value * len(distances))]
        found = np.sort(first)
    else:
        found = np.flatnonzero(distances < float(value))
    if not len(found):
        wanted = "a larger share" if by == "share" else f"one above {distances.min():.6g}"
        raise DmfError(
            f"--keep={'<' * (by == 'distance')}{float(value):g} keeps none of {len(distances)} "
            f"pairs: expected {wanted}"
        )
    return found.astype(np.int32)


def verify(out: str | Path) -> dict[str, Any]:
    """Compares every file of the pairs in `out` with its SHA-256; returns the metadata.

    Raises DmfError that names the first file that is missing or damaged.
    """
    folder = Path(paths.expanded(str(out)))
    about = shards.metadata(folder, shards.PAIRS)
    entries = list(shards.files(about))
    progress = Count("verify", len(entries), "files")
    for done, (name, size, digest) in enumerate(entries, 1):
        shards.check_sum(folder / name, size, digest)
        progress.show(done)
    return about


def _plan(
    found: pretrained.Opened,
    config: Config,
    choice: Choice,
    labels: np.ndarray,
    count: int,
    steps: int,
    noise: str,
    dtype: str,
    shard_size: int,
) -> dict[str, Any]:
    """All that the values depend on, as plain JSON."""
    stored = found.stored
    known = {} if pretrained.is_converted(stored) else stored["config"]["data"]
    return {
        "format": shards.FORMAT,
        "count": count,
        "num_classes": config.num_classes,
        "image_shape": list(stored["image_shape"]),
        "dtype": dtype,
        "noise": noise,
        "seed": config.seed,
        "sampler": config.run.sampler,
        "steps": steps,
        "times": choice.times,
        "guidance": asdict(choice.guidance) if choice.guidance else {},
        "shard_size": shard_size,
        "labels_sha256": hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest(),
        "weights": {
            "step": step_of(found.folder.name),
            "manifest_sha256": found.manifest_sha256,
            "network": asdict(config.network),
        },
        "data": known,
    }


def _announce(folder: Path, plan: dict[str, Any], missing: int, total: int) -> None:
    """Prints what is drawn, its size with and without noise. Raises DmfError without room."""
    one = plan["count"] * math.prod(plan["image_shape"]) * np.dtype(plan["dtype"]).itemsize
    sizes = {"stored": 2 * one, "redrawn": one}
    size, other = sizes[plan["noise"]], next(n for n in NOISES if n != plan["noise"])
    cost = SAMPLERS[plan["sampler"]].evaluations * plan["steps"]
    print(
        f"pairs     {plan['count']:,} to {folder}, {total - missing} of {total} shards are there: "
        f"{plan['sampler']} with {plan['steps']} steps, {cost} evaluations\n"
        f"size      {size / 1e9:.3g} GB with the noise {plan['noise']}; "
        f"{sizes[other] / 1e9:.3g} GB with --noise={other}",
        flush=True,
    )
    needed, free = size * missing / total, shutil.disk_usage(folder).free
    if needed > free:
        raise DmfError(
            f"{folder} has {free / 1e9:.3g} GB of room: expected {needed / 1e9:.3g} GB for the "
            "pairs that are missing"
        )


def _draw_shards(
    sampler: sampling.Sampler,
    params: Any,
    plan: dict[str, Any],
    files: list[Path],
    missing: list[int],
    identities: list[str],
) -> None:
    """Writes the missing shards, one after the other."""
    size, dtype = plan["shard_size"], np.dtype(shards.DTYPES[plan["dtype"]])
    counts = {k: min(size, plan["count"] - k * size) for k in missing}
    _estimate(sampler, params, plan, sum(counts.values()))
    progress, done = Count("pairs", sum(counts.values()), "pairs"), 0

    def parts(k: int) -> Generator[Part]:
        nonlocal done
        first = k * size
        for noise, x in sampler.pairs(params, counts[k], plan["steps"], first):
            rows = np.arange(first, first + len(x))
            first += len(x)
            yield _part(noise, x, sampler.labels_at(rows), rows, plan["noise"], dtype)
            done += len(x)
            progress.show(done)

    for k in missing:
        with contextlib.closing(parts(k)) as found:
            shards.write_shard(files[k], found, encode.made_with(), identities[k])


def _estimate(sampler: sampling.Sampler, params: Any, plan: dict[str, Any], count: int) -> None:
    """Prints how long so many pairs will take, from a second piece; the first one compiles."""
    rows = min(sampler.rows, plan["shard_size"], plan["count"])
    seconds = 0.0
    for _ in range(2 if count >= 20 * rows else 0):
        began = time.monotonic()
        list(itertools.islice(sampler.pairs(params, rows, plan["steps"]), 1))
        seconds = time.monotonic() - began
    if seconds:
        print(f"estimate  {count / rows * seconds / 60:.1f} minutes, by one piece", flush=True)


def _part(
    noise: np.ndarray,
    x: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    stored: str,
    dtype: np.dtype,
) -> Part:
    """Values (n, 1, k, h, w, c), labels and distances. Raises DmfError where one is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.stack([noise, x] if stored == "stored" else [x], axis=1).astype(dtype)
        apart = np.square(noise.astype(np.float64) - x)
        distances = apart.mean(axis=tuple(range(1, x.ndim)))
    bad = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
    if len(bad):
        raise DmfError(
            f"pair {rows[bad[0]]} has a sample that is not finite in {dtype.name}: expected "
            "weights and a sampler that give finite samples"
        )
    return values[:, None], {"labels": labels, "distances": distances}


def _finish(
    folder: Path, plan: dict[str, Any], files: list[Path], rule: tuple[str, Fraction]
) -> None:
    """Chooses the pairs that training reads, and writes their numbers and the metadata."""
    sidecars = [shards.read_sidecar(file) for file in files]
    distances = np.concatenate([np.array(s["distances"], np.float64) for s in sidecars])
    chosen = kept(distances, rule)
    truncation = {
        "by": rule[0],
        "value": str(rule[1]),
        "kept": len(chosen),
        "largest": float(distances[chosen].max()),
        "largest_of_all": float(distances.max()),
    }
    shards.remove(folder / shards.METADATA)
    entry = encode.write_array(folder / shards.KEPT, chosen)
    largest = f"{truncation['largest']:.4g}"
    what = f"{plan['count']:,} pairs, {len(chosen):,} kept, of distances up to {largest}"
    encode.finish(folder, plan, files, what, {"truncation": truncation, "kept": entry})
