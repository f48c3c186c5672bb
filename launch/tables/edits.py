"""Edits the JSON of a run at random, starts the run again, and compares its end bit for bit.

    python launch/tables/edits.py --count=400 --out=docs/edits.json

Every JSON, JSON lines and manifest file of a finished and of a killed run is edited, one place at
a time. The run has scores, probes, an intervention of the guard and a change of its config. It
must end in the same bits, or stop with one line that names the file. Lines that it loses must be
told. The same command goes on where it was stopped. All starts share their compiled programs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from dmf import train as trainer
from dmf.config import Config, parse
from dmf.errors import DmfError
from dmf.evaluation import pictures
from dmf.evaluation.sampling import format_scores
from dmf.run import context, workdir
from dmf.run.probe import Probe
from dmf.run.report import Report
from tests.runs import QUICK
from tests.test_train import leaves
from tests.tiny import merged

VALUES = merged(
    QUICK,
    batch_size=max(8, 4 * jax.device_count()),
    guard=dict(every_steps=1, rows=8, action="rate"),
    run=dict(score_steps=(1, 2)),
)
LONGER = merged(VALUES, curriculum=dict(length=20.0))
ALARM, KILLED = 5, 17  # the probe that is an alarm, the step in which the run is killed
CALM = {"residual_border": 1.0, "residual_median": 2.0}
LOGS = ("metrics.jsonl", "watch.jsonl", "scores.jsonl")
STATE = "state.json"  # the outcomes so far


class Kill(BaseException):
    """Ends a run as a kill does: nothing more is written."""


class Judged:
    """A judge whose scores cost nothing: they are a function of the weights."""

    main, scored_by, floor = "score", "edits", {}

    def picture(self, path: Path, params: Any, steps: Any) -> None:
        """Draws nothing."""

    def score(self, params: Any, steps: Any) -> list[dict[str, Any]]:
        """The mean size of a weight."""
        value = float(np.mean([np.abs(x).mean() for x in jax.tree.leaves(jax.device_get(params))]))
        return [{"nfe": n, "n_samples": 8.0, "score": value, "other": value} for n in steps]

    def table(self, rows: Any) -> str:
        """As a run prints it."""
        return format_scores(rows, self.floor)

    def curves(self, path: Path, metrics: Any, scores: Any, stages: Any) -> None:
        """As a run draws it."""
        pictures.curves(path, metrics, scores, stages, self.main)

    def stack(self, path: Path, parts: Any) -> None:
        """Draws nothing."""


@contextlib.contextmanager
def cheap(alarm: int = 0, kill: int = 0) -> Iterator[None]:
    """Starts within the block share data and programs, and take probes that cost nothing.

    alarm: the number of the probe that is one. kill: the step in which the run is killed.
    """
    kept, seen = (context._prepare, Probe.__call__, workdir.revision, Report.settle), []

    def probe(self: Any, kind: str, params: Any, rho: float) -> dict[str, float]:
        seen.append(rho)
        return CALM | ({"residual_median": 9.0} if len(seen) == alarm else {})

    def settle(report: Any) -> None:
        if kill and report._pending and report._pending[0] == kill:
            report._run.checkpoints.wait()
            raise Kill
        kept[3](report)

    context._prepare, Probe.__call__, Report.settle = _prepared, probe, settle
    workdir.revision = lambda source: {"revision": "unknown"}
    try:
        yield
    finally:
        context._prepare, Probe.__call__, workdir.revision, Report.settle = kept


@functools.cache
def _parts(config: Config, rows: str, guard: Any) -> dict[str, Any]:
    return _PREPARE(config, guard)


_PREPARE = context._prepare


def _prepared(config: Config, guard: Any) -> dict[str, Any]:
    """`context._prepare`, once for each config and interventions of the guard."""
    return dict(_parts(config, guard.told(), _Once(guard)))


class _Once:
    """A guard that all guards equal, so that the cache looks at its rows alone."""

    def __init__(self, guard: Any):
        self.stages = guard.stages

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Once)

    def __hash__(self) -> int:
        return 0


def start(folder: Path, values: dict[str, Any] = LONGER, change: bool = False) -> None:
    """One start of the run, to its end."""
    trainer.train(parse(values), folder, allow_change=change, judge=lambda *_: Judged())


def prepare(root: Path) -> dict[str, Path]:
    """Makes the finished and the killed run."""
    finished, killed, begun = (root / name for name in ("finished", "killed", "begun"))
    if not killed.exists():
        for folder in (begun, finished):
            shutil.rmtree(folder, ignore_errors=True)
        with cheap(alarm=ALARM):
            start(begun, VALUES)
        shutil.copytree(begun, finished)
        with cheap():
            start(finished, change=True)
        partial = root / "killing"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(begun, partial)
        with cheap(kill=KILLED), contextlib.suppress(Kill):
            start(partial, change=True)
        partial.rename(killed)
    return {"finished": finished, "killed": killed}


def files(folder: Path) -> list[str]:
    """Every file of a work directory that holds JSON, weights left out."""
    found = [p for p in folder.rglob("*") if p.is_file() and "programs" not in p.parts]
    names = [p for p in found if p.suffix in (".json", ".jsonl") or p.name.startswith("_")]
    return sorted(p.relative_to(folder).as_posix() for p in names)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    pairs = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else pairs:
        yield from _places(inner, (*path, key))


def _typed(rng: random.Random, line: bytes, indent: Any) -> bytes:
    """A value of the JSON becomes one of another type."""
    value = json.loads(line)
    path = rng.choice(list(_places(value)))
    other = rng.choice([None, True, -1, 3.5, "x", [], {}, [1], {"a": 1}, 10**30, float("nan")])
    if not path:
        value = other
    else:
        room = functools.reduce(lambda found, key: found[key], path[:-1], value)
        room[path[-1]] = other
    return json.dumps(value, indent=indent).encode()


def _types(rng: random.Random, content: bytes) -> bytes:
    parts = content.splitlines()
    try:
        k = rng.randrange(len(parts))
        parts[k] = _typed(rng, parts[k], None)
        return b"\n".join(parts) + b"\n"
    except ValueError:  # one value over several lines
        return _typed(rng, content, 1) + b"\n"


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def _byte(rng: random.Random, content: bytes) -> bytes:
    at, new = rng.randrange(len(content)), rng.randrange(256)
    return content[:at] + bytes([new]) + content[at + 1 :]


def _hole(rng: random.Random, content: bytes) -> bytes:
    """A part in the middle of a line is lost."""
    at = rng.randrange(len(content))
    return content[:at] + content[at + rng.randrange(1, 20) :]


def _nested(rng: random.Random, content: bytes) -> bytes:
    at = rng.choice([i for i, b in enumerate(content) if b in b":[,{"] or [0])
    return content[: at + 1] + b"[" * 100_000 + content[at + 1 :]


def _twice(rng: random.Random, content: bytes) -> bytes:
    parts = content.splitlines(keepends=True)
    at = rng.randrange(len(parts))
    return b"".join([*parts[:at], parts[at], *parts[at:]])


def _swapped(rng: random.Random, content: bytes) -> bytes:
    parts = content.splitlines(keepends=True)
    a, b = (rng.randrange(len(parts)) for _ in range(2))
    parts[a], parts[b] = parts[b], parts[a]
    return b"".join(parts)


EDITS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "types": _types,
    "cut": _cut,
    "byte": _byte,
    "hole": _hole,
    "nested": _nested,
    "twice": _twice,
    "swapped": _swapped,
}


def edit(folder: Path, name: str, how: str, rng: random.Random) -> bool:
    """Edits a file; returns whether it has changed."""
    path = folder / name
    before = path.read_bytes()
    if not before:
        return False
    path.write_bytes(EDITS[how](rng, before))
    return path.read_bytes() != before


def end(folder: Path) -> str:
    """A digest of the last state."""
    found = hashlib.sha256()
    last = max(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    for leaf in leaves(folder / "checkpoints" / str(last)):
        found.update(leaf.tobytes())
    return found.hexdigest()


def kept(folder: Path) -> dict[str, Any]:
    """What must not get lost: the rows of the logs, and the steps of the checkpoints."""
    counts: dict[str, Any] = {n: (folder / n).read_bytes().count(b"\n") for n in LOGS}
    found = {p.name for p in (folder / "checkpoints").iterdir() if (p / "manifest.json").exists()}
    return {**counts, "checkpoints": found}


def outcome(folder: Path, name: str, reference: dict[str, Any]) -> tuple[str, str]:
    """(what becomes of the run, what it said). reference: of the unharmed run."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger().addHandler(handler)
    try:
        with cheap(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            start(folder, reference["values"])
    except DmfError as error:
        text = str(error)
        if "\n" in text:
            return "several lines", text
        if Path(name).name in text or f"{folder} holds a run with another config" in text:
            return "one line", text
        return "a line without the file", text
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"[:2000]
    finally:
        logging.getLogger().removeHandler(handler)
    if end(folder) != reference["end"]:
        return "other bits", said.getvalue()
    told, now = name in said.getvalue(), kept(folder)
    lost = [n for n in LOGS if now[n] < reference["kept"][n]]
    if not reference["kept"]["checkpoints"] <= now["checkpoints"]:
        lost.append("checkpoints")
    if lost and not told:
        return "silent loss", f"{', '.join(lost)}: {said.getvalue()}"
    return f"same bits{', told' if told else ''}", said.getvalue()


def once(base: Path, name: str, how: str, seed: str, reference: dict[str, Any]) -> dict[str, Any]:
    """One edit of a copy of a run, and what becomes of it."""
    rng = random.Random(seed)
    copy = base.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(base, copy)
    for _ in range(20):
        if edit(copy, name, how, rng):
            break
    found, said = outcome(copy, name, reference)
    row = {"run": base.name, "file": name, "edit": how, "seed": seed, "outcome": found}
    return row | ({} if found.startswith(("same bits", "one line")) else {"said": said[-2000:]})


def reference_of(root: Path, bases: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """End and kept things of both runs, the killed one gone on with unharmed."""
    copy = root / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bases["killed"], copy)
    with cheap(), contextlib.redirect_stdout(io.StringIO()):
        start(copy)
    ends = {"finished": bases["finished"], "killed": copy}
    return {name: unharmed(folder, LONGER) for name, folder in ends.items()}


def unharmed(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What a run with these values ends with."""
    return {"values": values, "end": end(folder), "kept": kept(folder)}


def plan(bases: dict[str, Path], count: int, seed: int) -> list[tuple[str, str, str]]:
    """(run, file, kind of edit) of every edit: all pairs of run and kind, files drawn at random."""
    rng = random.Random(seed)
    # Manifests and Orbax's own files are many: half of the edits are of the others.
    found = []
    for i in range(count):
        run, how = sorted(bases)[i % 2], list(EDITS)[i // 2 % len(EDITS)]
        names = files(bases[run])
        top = [n for n in names if "/" not in n]
        found.append((run, rng.choice(top if rng.random() < 0.7 else names), how))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="", help="where the runs are; default: a temporary one")
    parser.add_argument("--out", default="", help="JSON of the counts")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dmf-edits-") as temporary:
        root = Path(given.folder or temporary)
        root.mkdir(parents=True, exist_ok=True)
        rows = run(root, given.count, given.seed)
    counts = Counter(row["outcome"] for row in rows)
    for name, number in counts.most_common():
        print(f"  {name:<26}{number:>5}")
    bad = [row for row in rows if "said" in row]
    for row in bad:
        print(json.dumps(row))
    if given.out:
        command = f"python launch/tables/edits.py --count={given.count} --out={given.out}"
        kinds = Counter(f"{row['edit']}: {row['outcome']}" for row in rows)
        told = {"command": command, "seed": given.seed, "count": len(rows), "outcomes": counts}
        Path(given.out).write_text(
            json.dumps({**told, "kinds": kinds, "bad": bad}, indent=1) + "\n"
        )
    raise SystemExit(bool(bad))


def run(root: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """The outcomes of all edits; those that the folder has already are not made again."""
    bases = prepare(root)
    reference = reference_of(root, bases)
    state = root / STATE
    found = [json.loads(line) for line in state.read_text().splitlines()] if state.exists() else []
    rows = {row["seed"]: row for row in found}
    for i, (name, file, how) in enumerate(plan(bases, count, seed)):
        key = f"{seed}-{i}"
        if key not in rows:
            rows[key] = once(bases[name], file, how, key, reference[name])
            with state.open("a") as out:
                out.write(json.dumps(rows[key]) + "\n")
    return list(rows.values())


if __name__ == "__main__":
    main()
