"""What breaks the curriculum and what helps it, on two small real sets: every variant from the same flow model, by seed.

    python launch/tables/study.py --out=docs/study.json --plot=docs/study.png --docs=docs/study.md    runs what is missing
    python launch/tables/study.py --table --out=docs/study.json                                       runs nothing, prints

Each set and seed has one flow model; every variant starts from that checkpoint (`scratch` from fresh weights, with the flow
model's steps on top) and takes the same number of steps. A run is one `python main.py ...` in runs/study/SET/seedN/VARIANT, on
a share of the cores; runs that are finished are not run again, one that was stopped goes on. A run that ends itself on values
that are not finite is a result. Weights of finished runs are removed, but those of the flow models: --keep keeps them all. What
--out holds already stays there but for runs made again, so that sets and seeds may be run on different machines.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import statistics
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
FLOW_STEPS, STEPS = 2000, 1200  # by cost: all of it within two hours on two cores
SAMPLES = 2000  # per score
MAIN = str(ROOT / "main.py")
COMMAND = "python launch/tables/study.py --out=docs/study.json --plot=docs/study.png --docs=docs/study.md"  # all of it, to be stored
FLOW_NFE, NFE = (1, 2, 4, 8, 16, 32), (1, 2)
KEYS = (
    "fd_hidden",
    "fd_hidden_heldout",
    "fd_pixels",
    "fd_pixels_heldout",
    "accuracy",
    "precision",
    "recall",
    "nn_ratio",
)
HELDOUT, TRAIN = "fd_hidden_heldout", "fd_hidden"
# What is compared, set by set. Held-out crops of two photographs are far from the training crops whatever a model does.
SCORE = {"digits": HELDOUT, "photos": TRAIN}
BASE = "dagger"  # what the others are compared with
WORSE = 1.2  # a last score above so many times the best stage's counts as worse
DIVERGED = 2.0  # a stage's score above so many times the best before it counts as diverged, as do values that are not finite
CURVES = ("dagger", "linear", "fine", "finest", "hot")  # score by stage in the plot
FINE = "curriculum.stages=12"
FINEST = "curriculum.stages=14 loss.p=1.0 optimizer.clip_norm=0.0"
HOT = f"{FINEST} optimizer.learning_rate=8e-3"
GUARD = "guard.every_steps=20 guard.action=jvp"
# Variant -> (fields that differ from configs/SET.py: dagger, K = 6, q = 2, p = .5, c = 1, clip 1, raw; what it is).
VARIANTS = {
    "scratch": (
        "curriculum.stages=1 curriculum.kinds=('jvp',)",
        "MeanFlow by JVP from fresh weights, with the flow model's steps",
    ),
    "meanflow": ("curriculum.stages=1 curriculum.kinds=('jvp',)", "MeanFlow by JVP, fine-tuning"),
    "linear": ("curriculum.interval=linear", "linear intervals"),
    "dagger": ("", "dagger intervals, the form of the paper"),
    "c0": ("loss.product_rule=0.0", "c = 0, alpha-Flow's target"),
    "p25": ("loss.p=0.25", "p = .25"),
    "p75": ("loss.p=0.75", "p = .75"),
    "p1": ("loss.p=1.0", "p = 1"),
    "meanflow_p1": (
        "curriculum.stages=1 curriculum.kinds=('jvp',) loss.p=1.0",
        "MeanFlow by JVP, fine-tuning, p = 1",
    ),
    "clip_off": ("optimizer.clip_norm=0.0", "gradients not clipped"),
    "unit": ("loss.residual_scale=unit", "residuals in unit scale"),
    "own": ("loss.tangent=own", "the step back along the network's own u(z, t, t)"),
    "adaptive": ("curriculum.interval=adaptive", "adaptive intervals"),
    "smooth": ("curriculum.schedule=smooth", "intervals that shrink with every step"),
    "no_stage0": (
        "curriculum.stages=5 curriculum.kinds=('discrete','discrete','discrete','discrete','jvp')",
        "without the stage of flow matching for all pairs",
    ),
    "no_jvp": (
        "curriculum.stages=5 curriculum.kinds=('trajectory','discrete','discrete','discrete','discrete')",
        "without the JVP stage",
    ),
    "fine": (FINE, "K = 12"),
    "fine_q4": ("curriculum.stages=9 curriculum.q=4.0", "K = 9, q = 4"),
    "finest": (FINEST, "K = 14, p = 1, gradients not clipped"),
    "dagger_guard": (GUARD, "dagger with the guard, which hands over to JVP"),
    "hot": (HOT, "K = 14, p = 1, gradients not clipped, four times the learning rate"),
    "hot_guard": (f"{HOT} {GUARD}", "the same with the guard"),
    "bf16": ("compute_dtype=bfloat16", "bfloat16"),
}
FRESH = ("scratch",)
SETS = {
    "digits": tuple(VARIANTS),
    "photos": (
        *("scratch", "meanflow", "linear", "dagger", "p1", "unit"),
        *("fine", "finest", "dagger_guard", "bf16"),
    ),
}
Record = dict[str, Any]
Results = dict[str, dict[str, dict[str, Record]]]  # set -> seed -> "flow" or variant -> record


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
        """Whether its last scores are there, or it has ended itself. Ends the program where it was run with other flags."""
        kept = self.outcome()
        if kept["flags"] != self.flags:
            other = sorted(set(kept["flags"]) ^ set(self.flags))
            raise SystemExit(
                f"error: {self.workdir} holds a run of other flags, {' '.join(other)}: remove it to run it again"
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
    """The line by which a run ends itself on values that are not finite, or by its guard, "" where there is none."""
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
        """Runs the jobs to their end; the first that fails otherwise than by its values ends the program."""
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
            f"[{self.done:>3}/{self.total}] {job.dataset} seed {job.seed} {job.name:<15} {score:>10} {seconds:>5.0f} s, "
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
    """The runs found, and those stored that were not: sets and seeds may be run on different machines."""
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


# ---- what came of it


def best(record: Record, key: str) -> float:
    """The best one-step score after a stage."""
    return min((s[key] for s in record["stages"] if s["stage"] != "init"), default=math.nan)


def last(record: Record, key: str, nfe: int = 1) -> float:
    """A score after the last step, nan where the run did not get there."""
    return record["last"].get(str(nfe), {}).get(key, math.nan)


def diverged(record: Record, key: str) -> bool:
    """Not finite, or a stage's score above `DIVERGED` times the best before it."""
    scores = [s[key] for s in record["stages"]]
    return bool(record["failed"]) or any(
        b > DIVERGED * min(scores[:i]) for i, b in enumerate(scores) if i
    )


def worse(record: Record, key: str) -> bool:
    """Not finite, or a last score above `WORSE` times that of the best stage."""
    return bool(record["failed"]) or last(record, key) > WORSE * best(record, key)


def spread(values: list[float], digits: int = 3, sign: str = "") -> str:
    """Mean ± sample standard deviation of the values that are there; with fewer than two of them no deviation."""
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def differences(seeds: dict[str, dict[str, Record]], name: str, key: str) -> list[float]:
    """Last one-step score minus that of `BASE` with the same seed."""
    return [
        last(s[name], key) - last(s[BASE], key) for s in seeds.values() if name in s and BASE in s
    ]


def table(results: Results) -> str:
    """The study as Markdown: per set the flow model by steps, then the variants."""
    parts = []
    for dataset, seeds in results.items():
        count = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
        parts.append(f"**{dataset}**, {count}; the flow model:\n")
        parts.append("| steps | held-out | train |\n|---|---|---|")
        flows = [s["flow"] for s in seeds.values() if "flow" in s]
        for nfe in FLOW_NFE:
            cells = (spread([last(r, key, nfe) for r in flows]) for key in (HELDOUT, TRAIN))
            parts.append(f"| {nfe} | {' | '.join(cells)} |")
        parts.append(f"\n**{dataset}**, after {STEPS:,} steps from the flow model:\n")
        word = "train" if SCORE[dataset] == TRAIN else "held-out"
        head = f"1 step, held-out | 2 steps, held-out | 1 step, train | minus {BASE}, {word} | best stage, {word}"
        parts.append(f"| variant | what | {head} | diverged | worse | guard | s |")
        parts.append("|---" * 11 + "|")
        parts.extend(
            _row(seeds, name, SCORE[dataset])
            for name in VARIANTS
            if any(name in s for s in seeds.values())
        )
        parts.append("")
    return "\n".join(parts).rstrip()


def _row(seeds: dict[str, dict[str, Record]], name: str, key: str) -> str:
    runs = [s[name] for s in seeds.values() if name in s]
    cells = [
        f"`{name}`",
        VARIANTS[name][1],
        spread([last(r, HELDOUT) for r in runs]),
        spread([last(r, HELDOUT, 2) for r in runs]),
        spread([last(r, TRAIN) for r in runs]),
        "" if name == BASE else spread(differences(seeds, name, key), sign="+"),
        spread([best(r, key) for r in runs]),
        f"{sum(diverged(r, key) for r in runs)} of {len(runs)}",
        f"{sum(worse(r, key) for r in runs)} of {len(runs)}",
        str(sum(r["interventions"] for r in runs) or ""),
        f"{statistics.mean(r['seconds'] for r in runs):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def paste(text: str, between: str) -> str:
    """`text` with what stands between its lines <!-- table --> and <!-- end of table --> replaced."""
    first, end = "<!-- table -->\n", "<!-- end of table -->"
    if text.count(first) != 1 or text.count(end) != 1 or text.index(first) > text.index(end):
        raise SystemExit(
            f"error: expected the lines {first.strip()} and {end} once each, in this order"
        )
    return text[: text.index(first) + len(first)] + f"\n{between}\n\n" + text[text.index(end) :]


def plot(results: Results, path: Path) -> None:
    """Per set: the last one-step score of every run by variant, and scores by stage; a cross has no last score."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    height = 1.2 + 0.24 * max(len(SETS[s]) for s in results)
    fig, axes = plt.subplots(len(results), 2, figsize=(12, height * len(results)), squeeze=False)
    for (left, right), (dataset, seeds) in zip(axes, results.items(), strict=True):
        key = SCORE[dataset]
        there = [v for v in VARIANTS if any(v in s for s in seeds.values())]
        for i, name in enumerate(there):
            runs = [s[name] for s in seeds.values() if name in s]
            scores = [last(r, key) for r in runs if not r["failed"]]
            left.plot(scores, [i] * len(scores), "o", ms=4, alpha=0.6, color="C0")
            stopped = [r["stages"][-1][key] for r in runs if r["failed"] and r["stages"]]
            left.plot(stopped, [i] * len(stopped), "x", color="C3")
            if scores:
                left.plot([statistics.mean(scores)], [i], "|", ms=12, color="k")
        left.set(
            yticks=range(len(there)),
            yticklabels=there,
            xscale="log",
            title=dataset,
            xlabel=f"{key}, 1 step",
        )
        left.invert_yaxis()
        for i, name in enumerate(n for n in CURVES if n in there):
            for j, record in enumerate(s[name] for s in seeds.values() if name in s):
                points = [(s["step"], s[key]) for s in record["stages"]]
                line = dict(color=f"C{i}", lw=0.9, marker=".", label=name if j == 0 else None)
                right.plot(*zip(*points, strict=True), **line)
        right.set(
            yscale="log", title=f"{dataset}, by stage", xlabel="step", ylabel=f"{key}, 1 step"
        )
        right.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)


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
