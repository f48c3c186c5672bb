"""The study of docs/study.md: what breaks the curriculum and what helps it, on two small sets.

    python launch/tables/study.py --out=docs/study.json --plot=docs/study.png --docs=docs/study.md
    python launch/tables/study.py --table --out=docs/study.json      runs nothing, prints the table

Each set and seed has one flow model. Every variant starts from it and takes the same steps.
The variant `scratch` starts from fresh weights and takes the flow model's steps as well.

A run is one `python main.py ...` in runs/study/SET/seedN/VARIANT, on a share of the cores.
A finished run is not run again; a stopped one resumes. A run that ends on values that are not
finite is a result. Only the flow models keep their weights, or all runs with --keep.

--out keeps the runs that it holds already, so several machines may share the sets and seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launch.tables.study_table import (
    BASE,
    FLOW_NFE,
    FLOW_STEPS,
    FRESH,
    HELDOUT,
    KEYS,
    NFE,
    SAMPLES,
    SCORE,
    SETS,
    STEPS,
    TRAIN,
    VARIANTS,
    Record,
    Results,
    last,
    paste,
    plot,
    table,
)

MAIN = str(ROOT / "main.py")
# The command of the whole study; study.json stores it.
COMMAND = (
    "python launch/tables/study.py --out=docs/study.json --plot=docs/study.png --docs=docs/study.md"
)


class Job:
    """One run: its directory, its command, and what it has come to."""

    def __init__(self, folder: Path, dataset: str, seed: int, name: str):
        self.dataset, self.seed, self.name = dataset, seed, name
        self.workdir = folder / dataset / f"seed{seed}" / name
        flow = folder / dataset / f"seed{seed}" / "flow"
        values = {
            "seed": str(seed),
            "guard.every_steps": "0",
            "guard.action": "off",
            "run.score_samples": str(SAMPLES),
            "run.sample_rows": "4",
            "run.checkpoint_every_steps": "500",
            "curriculum.pretrain_length": "0.0",
        }
        self.steps = FLOW_STEPS if name == "flow" else STEPS + FLOW_STEPS * (name in FRESH)
        self.nfe = FLOW_NFE if name == "flow" else NFE
        values |= {
            "curriculum.length": f"{self.steps}.0",
            "run.score_steps": f"({','.join(map(str, self.nfe))})",
        }
        if name != "flow":
            values |= dict(field.split("=", 1) for field in VARIANTS[name][0].split())
            if name not in FRESH:
                values["init"] = str(flow / "checkpoints" / str(FLOW_STEPS))
        recipe = "flow" if name == "flow" else BASE
        self.flags = [
            f"--config=configs/{dataset}.py:{recipe}",
            *(f"--config.{k}={v}" for k, v in values.items()),
        ]

    def rows(self) -> list[dict[str, Any]]:
        """What scores.jsonl holds, but a line that a kill has torn."""
        path = self.workdir / "scores.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def outcome(self) -> dict[str, Any]:
        """Seconds so far, the flags, and why it ended before its end, if it did."""
        path = self.workdir / "outcome.json"
        empty = {"seconds": 0.0, "flags": self.flags, "failed": ""}
        return json.loads(path.read_text()) if path.is_file() else empty

    def finished(self) -> bool:
        """Whether its last scores are there, or it has ended itself.

        Ends the program if the directory holds a run of other flags.
        """
        kept = self.outcome()
        if kept["flags"] != self.flags:
            other = sorted(set(kept["flags"]) ^ set(self.flags))
            raise SystemExit(
                f"error: {self.workdir} holds a run of other flags, {' '.join(other)}: "
                "remove it to run it again"
            )
        last = {row["nfe"] for row in self.rows() if row["step"] == self.steps}
        return bool(kept["failed"]) or last == set(self.nfe)

    def note(self, seconds: float, failed: str) -> None:
        """Writes outcome.json."""
        self.workdir.mkdir(parents=True, exist_ok=True)
        kept = self.outcome() | {"failed": failed}
        kept["seconds"] = round(kept["seconds"] + seconds, 1)
        partial = self.workdir / "outcome.tmp"
        partial.write_text(json.dumps(kept, indent=1) + "\n")
        partial.replace(self.workdir / "outcome.json")

    def record(self) -> Record:
        """What the study keeps of the run: the score of every stage, the last scores, seconds."""
        rows, kept = self.rows(), self.outcome()
        stages = [
            {
                "stage": r["stage"],
                "kind": r["kind"],
                "step": r["step"],
                TRAIN: r[TRAIN],
                HELDOUT: r[HELDOUT],
            }
            for r in rows
            if r["nfe"] == 1
        ]
        last = {
            str(r["nfe"]): {key: r[key] for key in KEYS} for r in rows if r["step"] == self.steps
        }
        path = self.workdir / "guard.json"
        guarded = len(json.loads(path.read_text())) if path.is_file() else 0
        return {
            "stages": stages,
            "last": last,
            "failed": kept["failed"],
            "seconds": kept["seconds"],
            "interventions": guarded,
        }


# ---- running


def not_finite(said: str) -> str:
    """The line that says why a run ended itself: not finite, or its guard. "" without one."""
    said_so = "expected finite values|non-finite values|the guard has stopped this run"
    found = re.findall(rf"^error: .*(?:{said_so}).*$", said, re.MULTILINE)
    return found[-1] if found else ""


class Runner:
    """Runs jobs side by side, each on its share of the cores, and says how far it is."""

    def __init__(self, folder: Path, side_by_side: int, keep: bool, todo: list[Job]):
        self.keep, self.total, self.done = keep, len(todo), 0
        self.left = self.all_steps = sum(job.steps for job in todo)
        self.began, self.lock, self.children = (
            time.monotonic(),
            threading.Lock(),
            set[subprocess.Popen](),
        )
        self.stopped = False
        self.side_by_side = side_by_side
        self.environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
        self.cores: SimpleQueue[set[int]] = SimpleQueue()
        here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        for i in range(side_by_side):
            self.cores.put({*here[i::side_by_side]} or {*here})

    def all(self, jobs: list[Job]) -> None:
        """Runs the jobs to their end. A failure that is not one of values ends the program."""
        with ThreadPoolExecutor(self.side_by_side) as pool:
            try:
                for found in as_completed([pool.submit(self.one, job) for job in jobs]):
                    found.result()
            except BaseException:
                self.stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                for child in list(self.children):
                    child.terminate()  # saves, and goes on next time
                raise

    def one(self, job: Job) -> None:
        """Runs one job to its end, and notes what came of it."""
        if self.stopped:
            return
        job.workdir.mkdir(parents=True, exist_ok=True)
        cores, began, said = self.cores.get(), time.monotonic(), job.workdir / "log.txt"
        if cores:
            os.sched_setaffinity(0, cores)  # of this thread, and of what it starts
        command = [sys.executable, MAIN, *job.flags, f"--workdir={job.workdir}"]
        with said.open("w") as out:
            child = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=out, stderr=subprocess.STDOUT
            )
            self.children.add(child)
            status = child.wait()
        self.children.discard(child)
        self.cores.put(cores)
        failed = not_finite(said.read_text()) if status == 2 else ""
        job.note(time.monotonic() - began, failed)
        if self.stopped:
            return
        if not job.finished():
            raise SystemExit(
                f"error: {job.workdir} ended with {status}:\n{said.read_text()[-2000:]}"
            )
        if not self.keep and job.name != "flow":
            shutil.rmtree(job.workdir / "checkpoints", ignore_errors=True)
        with self.lock:
            self.say(job, time.monotonic() - began)

    def say(self, job: Job, seconds: float) -> None:
        """The progress line."""
        self.done, self.left = self.done + 1, self.left - job.steps
        past = time.monotonic() - self.began
        left = past / (self.all_steps - self.left) * self.left
        record = job.record()
        score = "not finite" if record["failed"] else f"{last(record, SCORE[job.dataset]):.3f}"
        print(
            f"[{self.done:>3}/{self.total}] {job.dataset} seed {job.seed} {job.name:<15} "
            f"{score:>10} {seconds:>5.0f} s, "
            f"about {left / 60:.0f} min left",
            flush=True,
        )


def run(
    folder: Path, sets: list[str], seeds: list[int], only: list[str], side_by_side: int, keep: bool
) -> None:
    """Runs what is missing: the flow models, then the variants, seed by seed."""
    flows = [Job(folder, s, seed, "flow") for seed in seeds for s in sets]
    variants = [
        Job(folder, s, seed, v)
        for seed in seeds
        for s in sets
        for v in SETS[s]
        if not only or v in only
    ]
    flows, variants = ([job for job in jobs if not job.finished()] for jobs in (flows, variants))
    runner = Runner(folder, side_by_side, keep, flows + variants)
    runner.all(flows)
    if any(
        job.record()["failed"]
        for job in (Job(folder, s, seed, "flow") for seed in seeds for s in sets)
    ):
        raise SystemExit(
            "error: a flow model ended on values that are not finite, nothing can start from it"
        )
    runner.all(variants)


def merged(stored: Results, found: Results) -> Results:
    """The runs found, and the stored ones that were not found."""
    whole: Results = {}
    for dataset in SETS:
        seeds = {**stored.get(dataset, {}), **found.get(dataset, {})}
        for seed in sorted(seeds, key=int):
            both = stored.get(dataset, {}).get(seed, {}) | found.get(dataset, {}).get(seed, {})
            whole.setdefault(dataset, {})[seed] = both
    return whole


def collect(folder: Path) -> Results:
    """All finished runs below `folder`."""
    results: Results = {}
    for dataset, names in SETS.items():
        seeds = sorted(int(path.name[4:]) for path in (folder / dataset).glob("seed*"))
        for seed in seeds:
            jobs = [Job(folder, dataset, seed, name) for name in ("flow", *names)]
            found = {job.name: job.record() for job in jobs if job.finished()}
            if found:
                results.setdefault(dataset, {})[str(seed)] = found
    return results


# ---- the command


def some_of(choices: Collection[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names, all of them among the choices."""

    def parse(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in choices]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)}: expected some of {', '.join(choices)}"
            )
        return text.split(",")

    return parse


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", type=some_of(SETS), default=list(SETS), help="comma-separated")
    parser.add_argument(
        "--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2, 3, 4]
    )
    parser.add_argument(
        "--only", type=some_of(VARIANTS), default=[], help="variants, comma-separated; default: all"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs side by side, each on its share of the cores"
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "study", help="where the runs are kept"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the checkpoints of finished runs, 90 MB each"
    )
    parser.add_argument("--out", type=Path, help="JSON of all numbers; read where --table is given")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument(
        "--docs", type=Path, help="Markdown file that takes the table between its marks"
    )
    parser.add_argument(
        "--table",
        action="store_true",
        help="run nothing: table, plot and page of what is in --out, or there",
    )
    return parser.parse_args()


def main() -> None:
    """The command."""
    given = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = given.folder.absolute()
    stored = json.loads(given.out.read_text())["sets"] if given.out and given.out.is_file() else {}
    if given.table and stored:
        results = stored
    else:
        if not given.table:
            run(folder, given.sets, given.seeds, given.only, given.jobs, given.keep)
        results = merged(stored, collect(folder))
        if given.out:
            about = {"flow_steps": FLOW_STEPS, "steps": STEPS, "samples_per_score": SAMPLES}
            given.out.write_text(
                json.dumps({"command": COMMAND, **about, "sets": results}, indent=1) + "\n"
            )
    text = table(results)
    print(text)
    if given.plot:
        plot(results, given.plot)
    if given.docs:
        given.docs.write_text(paste(given.docs.read_text(), text))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from what is on disk")
