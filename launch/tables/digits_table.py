"""The digits table: a flow model and three ways to one step from it, for several seeds.

    python launch/tables/digits_table.py          runs what is missing in runs/table, prints
    python launch/tables/digits_table.py --out=docs/digits_table.json --seeds=0,1,2

Each seed pretrains one flow model. The dagger curriculum, the linear curriculum and JVP MeanFlow
start from that checkpoint and take the same number of steps. A seed takes about ten minutes.
Runs resume, so the command may be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "dagger": "discrete MeanFlow, dagger",
    "linear": "discrete MeanFlow, linear",
    "meanflow": "JVP MeanFlow",
}
SAMPLES = 2000  # per score
KEYS = (
    "fd_hidden",
    "fd_hidden_heldout",
    "fd_pixels",
    "accuracy",
    "precision",
    "recall",
    "nn_ratio",
)


def run(variant: str, workdir: Path, *flags: str) -> None:
    """Trains one run to its end, or goes on with it."""
    command = [
        sys.executable,
        "main.py",
        f"--config=configs/digits.py:{variant}",
        f"--workdir={workdir}",
    ]
    command += [f"--config.run.score_samples={SAMPLES}", *flags]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def read(workdir: Path, step: int) -> dict[int, dict[str, float]]:
    """Scores of one run at one step, by number of sampling steps."""
    rows = [json.loads(line) for line in (workdir / "scores.jsonl").read_text().splitlines()]
    return {r["nfe"]: {k: r[k] for k in KEYS} for r in rows if r["step"] == step}


def seed_results(folder: Path, seed: int) -> dict[str, dict[int, dict[str, float]]]:
    """Scores of every method of one seed, training what is not there yet."""
    base = folder / f"seed{seed}_dagger"
    run("dagger", base, f"--config.seed={seed}")
    config = json.loads((base / "config.json").read_text())
    start = round(config["curriculum"]["pretrain_length"])
    steps = round(config["curriculum"]["length"])
    results = {"flow": read(base, start), "dagger": read(base, start + steps)}
    for variant in ("linear", "meanflow"):
        workdir = folder / f"seed{seed}_{variant}"
        run(
            variant,
            workdir,
            f"--config.seed={seed}",
            f"--config.init={base / 'checkpoints' / str(start)}",
            "--config.curriculum.pretrain_length=0",
        )
        results[variant] = read(workdir, steps)
    return results


def table(results: dict[int, dict[str, dict[int, dict[str, float]]]]) -> str:
    """Mean and sample standard deviation over the seeds, as Markdown."""
    lines = [f"| model | steps | {' | '.join(KEYS)} |", "|---|---|" + "---|" * len(KEYS)]
    names = {"flow": "flow model", **METHODS}
    for method, name in names.items():
        for nfe in results[min(results)][method]:
            cells = []
            for key in KEYS:
                values = [results[s][method][nfe][key] for s in results]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
            lines.append(f"| {name} | {nfe} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "table", help="where the runs are kept"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    flags = parser.parse_args()
    results = {
        int(s): seed_results(flags.folder.absolute(), int(s)) for s in flags.seeds.split(",")
    }
    print(table(results))
    if flags.out:
        command = f"python launch/tables/digits_table.py --seeds={flags.seeds} --out={flags.out}"
        stored = {"command": command, "samples_per_score": SAMPLES, "seeds": results}
        flags.out.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
