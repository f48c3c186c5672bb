r"""The family table: every method of configs/methods.py, from one flow model, for equal steps.

    python launch/tables/family.py --out=docs/family.json --picture=docs/family.png \
        --docs=docs/family.md
    python launch/tables/family.py --methods=dagger,meanflow        these alone
    python launch/tables/family.py --table --out=docs/family.json   runs nothing, prints the table

The data are digits. The flow model takes 2,000 steps, every method 1,200 from its weights.
A run is one `python main.py ...` in runs/family/METHOD, one after another. A row is stored as
its run ends. A stopped command goes on where it was, and a finished run is not run again.
A run that fails gives a row with its error line. The same command tries it again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from configs import digits, methods

Row = dict[str, Any]
FLOW, FLOW_STEPS, STEPS = "flow", 2000, 1200
STEPS_SCORED = (1, 2, 4, 8, 32)
SHOWN = (1, 2, 4, 32)
SCORE, HELDOUT = "fd_hidden", "fd_hidden_heldout"
SAMPLES = 2000  # per score
PICTURED, COLUMNS = 20, 10  # samples per method in the picture, and in a row
BROKEN = 1 / 3  # of the flow model's own one-step score: what one step has to reach
SHAPE = (8, 8, 1)
# Entries that are not compared: the start, another target, other optimisers.
LEFT_OUT = (FLOW, "guided", "splus", "muon")
COMMAND = (
    "python launch/tables/family.py --out=docs/family.json --picture=docs/family.png "
    "--docs=docs/family.md"
)


def names() -> list[str]:
    """The methods that are compared, in the order of configs/methods.py."""
    return [name for name in methods.METHODS if name not in LEFT_OUT]


def flags_of(method: str, seed: int, folder: Path) -> list[str]:
    """The flags of a method's run. Stages with lengths of their own shrink with the whole."""
    found = digits.get_config(method)
    steps = FLOW_STEPS if method == FLOW else STEPS
    lengths = found.curriculum.stage_lengths
    values: dict[str, Any] = {
        "seed": seed,
        "guard.every_steps": 0,
        "guard.action": "off",
        "run.score_samples": SAMPLES,
        "run.score_steps": STEPS_SCORED,
        "run.checkpoint_every_steps": 500,
        "curriculum.pretrain_length": 0.0,
        "curriculum.length": float(steps),
    }
    if lengths:
        share = steps / sum(lengths)
        values["curriculum.stage_lengths"] = tuple(share * length for length in lengths)
    if method != FLOW:
        values["init"] = str(folder / FLOW / "checkpoints" / str(FLOW_STEPS))
    said = [f"--config.{k}={str(v).replace(' ', '')}" for k, v in values.items()]
    return [f"--config=configs/digits.py:{method}", *said]


def run(method: str, seed: int, folder: Path) -> Row:
    """Trains one method to its end, or goes on with it; returns its row."""
    workdir, flags = folder / method, flags_of(method, seed, folder)
    workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "main.py", *flags, f"--workdir={workdir}"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with (workdir / "log.txt").open("w") as log:
        status = subprocess.call(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    row: Row = {
        "method": method,
        "seed": seed,
        "flags": [flag.replace(f"{folder}/", "") for flag in flags],
        "wall_seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1
        ),
    }
    if status:
        said = (workdir / "log.txt").read_text()
        if status < 0 or not (errors := re.findall(r"^error: .*$", said, re.MULTILINE)):
            raise SystemExit(f"error: {workdir} ended with {status}:\n{said[-2000:]}")
        return row | {"failed": errors[-1]}
    return row | scores_of(workdir, FLOW_STEPS if method == FLOW else STEPS) | cost_of(workdir)


def scores_of(workdir: Path, step: int) -> Row:
    """The last scores of a run, by number of sampling steps, and how often it was started."""
    read = [json.loads(line) for line in (workdir / "scores.jsonl").read_text().splitlines()]
    last = {str(r["nfe"]): r for r in read if r["step"] == step}
    starts = len((workdir / "starts.jsonl").read_text().splitlines())
    found = {key: {n: r[key] for n, r in last.items()} for key in (SCORE, HELDOUT)}
    return {**found, "starts": starts}


def cost_of(workdir: Path) -> Row:
    """Passes per row, the most temporary memory of a step, and compiled FLOPs by counted passes.

    The FLOPs of a kind are divided by those of flow matching with the same network, and by the
    passes of the kind over those of flow matching. The largest of all kinds of the run counts.
    """
    from dmf.config import parse
    from dmf.method import curriculum, guidance, velocity

    config = parse(json.loads((workdir / "config.json").read_text()))
    extra = guidance.passes(config.guidance), velocity.passes(config.loss.tangent)
    stages = curriculum.build_stages(config.curriculum, config.batch_size, 1352, *extra)
    share = config.times.r_neq_t_fraction
    passes = {s.kind: curriculum.passes(s, share) for s in stages}
    counted = {kind: counts(config, kind) for kind in {FLOW, *passes}}
    base = counted[FLOW].flops / 3
    total = sum(s.steps * curriculum.passes(s, share) for s in stages)
    return {
        "passes": round(total / stages[-1].last, 4),
        "temporary_bytes": max(counted[kind].temporary_bytes for kind in passes),
        "flops_by_passes": {
            kind: round(counted[kind].flops / base / n, 4) for kind, n in passes.items()
        },
    }


def counts(config: Any, kind: str) -> Any:
    """XLA's counts of a step of this kind. LLVM's part, which they do not need, is kept short."""
    import jax
    import jax.numpy as jnp

    from dmf import networks, optim, sharding, state, step
    from dmf.measure import cost, programs

    mesh, optimizer = sharding.make_mesh(config.mesh), optim.build(config.optimizer)
    network = networks.build(config.network, SHAPE, jnp.dtype(config.compute_dtype))
    params = jax.eval_shape(network.init, jax.random.key(0))
    rules = config.curriculum
    now = jax.eval_shape(lambda p: state.create(p, optimizer, config.ema, rules), params)
    place = sharding.placed(mesh, now)
    made = step.make_train_step(kind, network, optimizer, config, mesh, place)
    scalars = programs._scalars(0, len(config.ema.halflife_images))
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    lowered = made.lower(now, cost.batch_shapes(config, SHAPE), scalars)
    return cost.counts(lowered.compile(compiler_options=quick))


def samples_of(workdir: Path, steps: int) -> Any:
    """Samples (PICTURED, 8, 8, 1) of a run, from noise and classes that are the same for all."""
    import jax
    import numpy as np

    from dmf.method.samplers import few_step
    from dmf.pretrained import load

    network, params = load(workdir)
    label = jax.numpy.arange(PICTURED) % 10
    e = jax.random.normal(jax.random.key(0), (PICTURED, *SHAPE))
    return np.asarray(
        few_step(lambda z, r, t: network.apply(params, z, r, t, label=label), e, steps)
    )


def picture(rows: list[Row], folder: Path, path: Path) -> None:
    """One grid of one-step samples per method, and the flow model's at 1 and 32 steps."""
    from dmf.evaluation import pictures

    named = {}
    if (folder / FLOW / "checkpoints").is_dir():
        named["flow model, 32 steps"] = samples_of(folder / FLOW, 32)
    for row in rows:
        if "failed" not in row and (folder / row["method"] / "checkpoints").is_dir():
            called = "flow model" if row["method"] == FLOW else row["method"]
            named[f"{called}, 1 step"] = samples_of(folder / row["method"], 1)
    if not named:
        raise SystemExit(f"error: {folder} holds no runs to draw; expected those of --out")
    parts, of = [], list(named.items())
    for first in range(0, len(of), 3):
        parts.append(folder / f"part{first}.png")
        pictures.panels(parts[-1], dict(of[first : first + 3]), COLUMNS)
    pictures.stack(path, parts)


def worse_at(scores: dict[str, float]) -> str:
    """Where more sampling steps are worse, as "4 to 32"; "-" where the curve falls."""
    from dmf.run.scoreboard import rises

    found = rises({int(n): score for n, score in scores.items()})
    return ", ".join(f"{best} to {n}" for best, n in found) or "-"


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    heads = [f"{n} step{'s' * (n > 1)}" for n in SHOWN]
    lines = [
        f"| method | {' | '.join(heads)} | worse with more steps | passes per row | FLOPs / passes "
        "| memory, MB | CPU seconds |",
        "|---" * (len(heads) + 6) + "|",
    ]
    flow = next((r[SCORE]["1"] for r in rows if r["method"] == FLOW and SCORE in r), None)
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['method']} | {row['failed']} |")
            continue
        scores = row[SCORE]
        broken = row["method"] != FLOW and flow and scores["1"] > BROKEN * flow
        cells = [f"{scores[str(n)]:.3f}" for n in SHOWN]
        cells[0] += " (broken)" if broken else ""
        cells += [worse_at(scores), f"{row['passes']:.2f}"]
        cells += [f"{max(row['flops_by_passes'].values()):.3f}"]
        # A run that was stopped has lost the seconds of its earlier starts.
        seconds = f"{row['cpu_seconds']:.0f}" if row["starts"] == 1 else "-"
        cells += [f"{row['temporary_bytes'] / 1e6:.1f}", seconds]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def paste(page: Path, name: str, table: str) -> None:
    """Puts a table on a page, between <!-- NAME --> and <!-- end of NAME -->."""
    text, first, end = page.read_text(), f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if not 0 <= text.find(first) < text.find(end):
        raise SystemExit(f"error: {page}: expected the lines {first.strip()} and {end}")
    before, after = text.partition(first)[0], text.partition(end)[2]
    page.write_text(f"{before}{first}\n{table}\n\n{end}{after}")


def stored(path: Path) -> list[Row]:
    """The rows of the file, [] where there is none."""
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def keep(path: Path, rows: list[Row]) -> None:
    """Writes the rows in the order of the methods, whole or not at all."""
    order = [FLOW, *methods.METHODS]
    rows = sorted(rows, key=lambda row: order.index(row["method"]))
    about = {"command": COMMAND, "flow_steps": FLOW_STEPS, "steps": STEPS, "samples": SAMPLES}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    partial.replace(path)


def missing(wanted: list[str], rows: list[Row], seed: int, folder: Path) -> list[str]:
    """The methods whose rows are not there, failed, or come from other flags."""
    done = {row["method"]: row["flags"] for row in rows if "failed" not in row}
    found = []
    for method in wanted:
        flags = [f.replace(f"{folder}/", "") for f in flags_of(method, seed, folder)]
        if done.get(method) != flags:
            found.append(method)
    return found


def run_all(wanted: list[str], seed: int, folder: Path, out: Path) -> None:
    """Runs what is missing, storing each row as it comes."""
    todo = missing([FLOW, *wanted], stored(out), seed, folder)
    start = folder / FLOW / "checkpoints" / str(FLOW_STEPS)
    if todo and FLOW not in todo and not start.is_dir():
        todo = [FLOW, *todo]  # its row is stored, and the weights that the others need are gone
    began = time.monotonic()
    for i, method in enumerate(todo):
        row = run(method, seed, folder)
        others = [r for r in stored(out) if r["method"] != method]
        keep(out, [*others, row])
        left = (time.monotonic() - began) / (i + 1) * (len(todo) - i - 1)
        said = row.get("failed") or f"{row[SCORE]['1']:.3f}"
        print(
            f"[{i + 1}/{len(todo)}] {method:<16} {said}, about {left / 60:.0f} min left", flush=True
        )


def some(text: str) -> list[str]:
    """A parser of comma-separated methods."""
    for name in text.split(","):
        if name not in names():
            raise argparse.ArgumentTypeError(f"{name}: expected some of {', '.join(names())}")
    return text.split(",")


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", type=some, default=names(), help="comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "family")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "family" / "family.json")
    parser.add_argument("--picture", type=Path, help="PNG of one-step samples, one grid per method")
    parser.add_argument("--docs", type=Path, help="page that takes the table between its marks")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is stored")
    return parser.parse_args()


def main() -> None:
    """The command."""
    given = arguments()
    folder = given.folder.absolute()
    if not given.table:
        run_all(given.methods, given.seed, folder, given.out)
    rows = stored(given.out)
    print(table(rows))
    if given.docs:
        paste(given.docs, "family", table(rows))
    if given.picture:
        picture(rows, folder, given.picture)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from what is on disk")
