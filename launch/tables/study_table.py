"""What the study compares, and its table and plot. launch/tables/study.py makes the runs."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

FLOW_STEPS, STEPS = 2000, 1200  # by cost: all of it within two hours on two cores
SAMPLES = 2000  # per score
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
# The score that is compared, by set. Photos are compared on training crops, because held-out
# crops of two photographs are far from the training crops whatever a model does.
SCORE = {"digits": HELDOUT, "photos": TRAIN}
BASE = "dagger"  # what the others are compared with
WORSE = 1.2  # a last score above so many times the best stage's counts as worse
# A stage diverged if its score is above so many times the best before it, or is not finite.
DIVERGED = 2.0
CURVES = ("dagger", "linear", "fine", "finest", "hot")  # score by stage in the plot
FINE = "curriculum.stages=12"
FINEST = "curriculum.stages=14 loss.p=1.0 optimizer.clip_norm=0.0"
HOT = f"{FINEST} optimizer.learning_rate=8e-3"
GUARD = "guard.every_steps=20 guard.action=jvp"
# Variant -> (the fields that differ from configs/SET.py, what it is).

# That config has dagger intervals, K = 6, q = 2, p = .5, c = 1, clip 1 and raw weights.
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
        "curriculum.stages=5 "
        "curriculum.kinds=('trajectory','discrete','discrete','discrete','discrete')",
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
    """Mean ± sample standard deviation of the finite values; one value has no deviation."""
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
        head = "1 step, held-out | 2 steps, held-out | 1 step, train | "
        head += f"minus {BASE}, {word} | best stage, {word}"
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
    """Replaces the lines of `text` from <!-- table --> to <!-- end of table -->."""
    first, end = "<!-- table -->\n", "<!-- end of table -->"
    if text.count(first) != 1 or text.count(end) != 1 or text.index(first) > text.index(end):
        raise SystemExit(
            f"error: expected the lines {first.strip()} and {end} once each, in this order"
        )
    return text[: text.index(first) + len(first)] + f"\n{between}\n\n" + text[text.index(end) :]


def plot(results: Results, path: Path) -> None:
    """Draws, per set, the last one-step score of every run by variant, and scores by stage.

    A cross is a run without a last score.
    """
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
