"""Kills a short run again and again by SIGKILL, resumes it, and compares its end bit for bit.

    python launch/tables/kills.py --kills=100 --out=docs/kills.json

There are three kinds of kills, equally many of each:

    at a random time after the start
    at a random time after a random number of further steps
    inside a save, at a random part of its duration

A run that nobody killed must end with the same weights, averages, optimiser's state,
metrics.jsonl and scores.jsonl. The command prints which phases the kills hit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAVE_S = 0.15  # about what a save takes
SCORED = 50  # steps from one score to the next


def command(workdir: Path, total: int) -> list[str]:
    """The training command, of so many steps: all kinds of stages, a save every 5 steps."""
    values = {
        "curriculum.length": total * 2 // 3,
        "curriculum.stages": 4,
        "curriculum.pretrain_length": total - total * 2 // 3,
        "network.depth": 1,
        "network.width": 32,
        "run.checkpoint_every_steps": 5,
        "run.score_every_steps": SCORED,
        "run.score_samples": 64,
        "run.score_steps": "(1,2)",
        "run.log_every_steps": 1,
        "run.sample_rows": 2,
    }
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return [sys.executable, "main.py", "--config=configs/digits.py", *flags, f"--workdir={workdir}"]


class Life:
    """One start of the command, up to its kill or its end."""

    def __init__(self, workdir: Path, total: int):
        self.workdir, self.total, self.said = workdir, total, workdir.with_suffix(".txt")
        self.left_over = self.unfinished()
        workdir.parent.mkdir(parents=True, exist_ok=True)
        with self.said.open("w") as out:
            programs = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
                workdir.parent / "programs"
            )
            environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": programs}
            self.process = subprocess.Popen(
                command(workdir, total),
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def steps(self) -> int:
        """Steps in the log."""
        path = self.workdir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def unfinished(self) -> set[tuple[str, int]]:
        """Name and number of every step folder without its manifest."""
        found = set()
        for folder in (self.workdir / "checkpoints").glob("[0-9]*"):
            with suppress(FileNotFoundError):  # it has just been renamed
                if not (folder / "manifest.json").exists():
                    found.add((folder.name, folder.stat().st_ino))
        return found

    def saving(self) -> bool:
        """Whether a save has begun and not ended, but those that earlier kills have cut."""
        return bool(self.unfinished() - self.left_over)

    def phase(self) -> str:
        """What a kill has interrupted, by what is on disk and was said."""
        said = self.said.read_text()
        if "start   " not in said:
            return "start"
        if self.saving():
            return "save"
        if "first step begun" not in said:
            return "compilation, first step"
        done = max(
            (int(p.parent.name) for p in self.workdir.glob("checkpoints/*/manifest.json")),
            default=0,
        )
        if done == self.steps() and not self.scored(done):
            return "pictures, scores"
        return "steps"

    def scored(self, step: int) -> bool:
        """Whether a score of that step is there, or none is due."""
        path = self.workdir / "scores.jsonl"
        return bool(step % SCORED) or path.exists() and f'"step": {step},' in path.read_text()

    def kill(self) -> str:
        """Ends it at once; returns what that has interrupted."""
        self.process.kill()
        self.process.wait()
        return self.phase()


def wait_and_kill(life: Life, how: str, start_s: float, rng: random.Random) -> str | None:
    """Kills a life at its time. Returns the interrupted phase, None if the life had ended.

    start_s: seconds that a start takes.
    """
    target = life.steps() + rng.randint(1, 12)
    until = {"start": lambda: True, "steps": lambda: life.steps() >= target, "save": life.saving}[
        how
    ]
    extra = rng.uniform(0, {"start": 1.2 * start_s, "steps": 0.05, "save": SAVE_S}[how])
    while life.running() and not until():
        time.sleep(0.001)
    time.sleep(extra)
    return life.kill() if life.running() else None


def survive(folder: Path, kills: int, seed: int, total: int) -> dict[str, Any]:
    """Runs the whole trial in `folder`.

    Returns kills by phase, starts, and the names of what differs from a run without kills.
    """
    rng, phases, starts = random.Random(seed), Counter[str](), 0
    finished(folder / "plain", total)
    began = time.monotonic()
    finished(folder / "plain", total)  # does nothing more: this is what a start takes
    start_s, killed = time.monotonic() - began, folder / "killed"
    while sum(phases.values()) < kills:
        life, starts = Life(killed, total), starts + 1
        near = life.steps() > total - 30
        phase = wait_and_kill(
            life, "start" if near else ("start", "steps", "save")[starts % 3], start_s, rng
        )
        if phase is None:
            check(life)
            break
        phases[phase] += 1
        if sum(phases.values()) % 10 == 0:
            print(
                f"{sum(phases.values())} kills, step {life.steps()} of {total}, "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
    finished(killed, total)
    return {
        "kills": sum(phases.values()),
        "phases": dict(phases),
        "steps": total,
        "different": compare(folder / "plain", killed, total),
        "seconds": round(time.monotonic() - began),
    }


def finished(workdir: Path, total: int) -> None:
    """Starts the command and waits for its end."""
    life = Life(workdir, total)
    life.process.wait()
    check(life)


def check(life: Life) -> None:
    """Ends this program where the command has failed."""
    if life.process.returncode:
        raise SystemExit(f"the command failed:\n{life.said.read_text()}")


def compare(a: Path, b: Path, total: int) -> list[str]:
    """The names of the logs, and of arrays of the last checkpoint, that differ between two runs."""
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    def arrays(workdir: Path) -> dict[str, np.ndarray]:
        found = ocp.load_checkpointables((workdir / "checkpoints" / str(total)).absolute())
        return {
            jax.tree_util.keystr(p): np.asarray(x)
            for p, x in jax.tree_util.tree_leaves_with_path(found)
        }

    x, y = arrays(a), arrays(b)
    names = [
        name
        for name in x.keys() | y.keys()
        if name not in x or name not in y or x[name].tobytes() != y[name].tobytes()
    ]
    return sorted(names) + [
        log
        for log in ("metrics.jsonl", "scores.jsonl")
        if (a / log).read_text() != (b / log).read_text()
    ]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument(
        "--steps", type=int, default=600, help="of the run; about four times the kills are needed"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", default="", help="where the runs go; default: a temporary directory"
    )
    parser.add_argument("--out", default="", help="JSON of the outcome")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dmf-kills-") as temporary:
        outcome = survive(Path(given.folder or temporary), given.kills, given.seed, given.steps)
    for phase, count in outcome["phases"].items():
        print(f"  {phase:<26}{count:>5}")
    print(f"  {'all':<26}{outcome['kills']:>5}")
    print(f"different {', '.join(outcome['different']) or 'nothing: the same bits'}")
    if given.out:
        command = f"python launch/tables/kills.py --kills={given.kills} --out={given.out}"
        Path(given.out).write_text(json.dumps({"command": command, **outcome}, indent=1) + "\n")
    raise SystemExit(bool(outcome["different"]) or outcome["kills"] < given.kills)


if __name__ == "__main__":
    main()
