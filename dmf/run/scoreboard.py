"""The scores of a run: at which steps it is pictured and scored, its scores.jsonl, its best one.

A judge pictures and scores the weights. main.py hands one in, so that the trainer needs neither
samplers nor feature networks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jax.sharding import Mesh

from dmf import data, networks, processes
from dmf.config import Config
from dmf.logging import JsonLines, TensorBoard
from dmf.method import curriculum
from dmf.method.curriculum import Stage
from dmf.method.objectives import FORMER
from dmf.storage import checkpoint, paths, records

FILE = "scores.jsonl"
CURVES, SAMPLES = "curves.png", "samples.png"
Row = dict[str, Any]
# More sampling steps are worse where their score is above so many times the best of fewer steps.
# The margin is ours.
WORSE = 1.05
ROW: dict[Any, Any] = {  # a line of the file; other names are those of scores
    "step": records.COUNT,
    "stage": records.Maybe(str),
    "kind": records.Maybe(str),
    "nfe": records.Maybe(records.POSITIVE),
    "n_samples": records.Maybe(float),
    "scored_by": records.Maybe(str),
    ...: (records.NUMBER, str),
}


class Judge(Protocol):
    """What pictures and scores weights. All processes of a run call it alike."""

    main: str  # the score that tells the best checkpoint, lower is better; "" for pictures alone
    scored_by: str  # scores are compared with rows of the same scored_by only
    floor: Mapping[str, float]  # what two halves of the real data score, by name of the score

    def picture(self, path: Path, params: Any, steps: Mapping[str, int]) -> None:
        """Draws a grid of samples per caption, at so many sampling steps, into the file."""

    def score(self, params: Any, steps: Sequence[int]) -> list[Row]:
        """One row of scores per number of sampling steps, with "nfe" and "n_samples"."""

    def table(self, rows: Sequence[Row]) -> str:
        """Rows of scores as a printed table."""

    def curves(
        self, path: Path, metrics: list[Row], scores: list[Row], stages: tuple[Stage, ...]
    ) -> None:
        """Draws rows of metrics.jsonl and of scores.jsonl over the steps into the file."""

    def stack(self, path: Path, pictures: Sequence[Path]) -> None:
        """Puts pictures below each other into the file."""


# Makes the judge of a run: (config, training data, network, mesh) -> judge.
OpenJudge = Callable[[Config, data.Source, networks.Network, Mesh], Judge]


@dataclass(frozen=True)
class Boundary:
    """A step at which the model is pictured and scored.

    It is the start of a run from `init`, the end of a stage, or a step in between.
    """

    step: int
    name: str
    kind: str
    full: bool  # all numbers of sampling steps, not only the first
    kept: bool = True  # its checkpoint is kept for good


def boundaries(stages: tuple[Stage, ...], from_init: bool, every: int) -> dict[int, Boundary]:
    """The boundaries of a run by their step. every: also every so many steps; 0 = not."""
    start = [Boundary(0, "init", "given", True)] if from_init else []
    between = range(every, stages[-1].last, every) if every else ()
    within = [(n, curriculum.stage_at(stages, n - 1)) for n in between]
    inner = [Boundary(n, s.name, s.kind, False, False) for n, s in within if n != s.last]
    ends = [Boundary(s.last, s.name, s.kind, s.index < 0 or s is stages[-1]) for s in stages]
    return {b.step: b for b in start + inner + ends}


def rises(scores: Mapping[int, float]) -> list[tuple[int, int]]:
    """Where more sampling steps are worse: pairs (the best number of fewer steps, the number).

    scores: by number of sampling steps, lower is better. [] where the curve falls or stays.
    """
    found: list[tuple[int, int]] = []
    best = min(scores, default=0)
    for n in sorted(scores):
        if scores[n] > WORSE * scores[best]:
            found.append((best, n))
        best = n if scores[n] < scores[best] else best
    return found


def curve(rows: Sequence[Row], main: str) -> str:
    """What the scores of one model say of more sampling steps, as one line.

    "" where fewer than two numbers of steps were scored.
    """
    scores = {row["nfe"]: row[main] for row in rows if "nfe" in row and main in row}
    if len(scores) < 2:
        return ""
    worse = [f"{n} ({scores[n]:.3f}) than {best} ({scores[best]:.3f})" for best, n in rises(scores)]
    if not worse:
        return f"curve     {main} falls or stays with more steps"
    return f"warning   more steps are worse: {main} is higher at {', at '.join(worse)}"


class Scoreboard:
    """The boundaries of a run, and its scores.jsonl, best.json and pictures."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        stages: tuple[Stage, ...],
        judge: Judge | None,
        tensorboard: TensorBoard,
    ):
        """judge: None for a run without pictures and scores."""
        self._config, self._workdir, self._tensorboard = config, workdir, tensorboard
        self.boundaries = boundaries(stages, bool(config.init), config.run.score_every_steps)
        self._rows = JsonLines(workdir / FILE, processes.is_first(), ROW)
        self._judge = judge
        self.main = judge.main if judge else ""
        self._scored_by = judge.scored_by if judge else ""

    def rows(self) -> list[Row]:
        """What scores.jsonl holds, with the names that kinds of stages have today."""
        former = {name: {"kind": now} for name, now in FORMER.items()}
        return [row | former.get(row.get("kind", ""), {}) for row in self._rows.read()]

    def resume(self, step: int) -> None:
        """Forgets what was written after `step`."""
        self._rows.resume(step)
        self._note_best()

    def is_done(self, boundary: Boundary) -> bool:
        """Whether nothing is left to do: an earlier start has pictured and scored it to its end."""
        found = sum(row["step"] == boundary.step for row in self.rows())
        found = int(processes.first_says(str(found)))
        return self._judge is None or found == (len(self._steps(boundary)) if self.main else 1)

    def add(self, boundary: Boundary, params: Any) -> None:
        """Pictures and scores the weights; what a kill left half done is done again."""
        if self._judge is None:
            return
        self._rows.resume(boundary.step - 1)
        steps = self._steps(boundary)
        captions = {f"{boundary.name}: {n} step{'s' * (n > 1)}": n for n in steps}
        self._judge.picture(self._picture(boundary), params, captions)
        rows: list[Row] = [{}]
        if self.main:
            rows = self._judge.score(params, steps)
            print(f"after {boundary.name} ({boundary.kind}), step {boundary.step}")
            print(_scored(self._judge, rows), flush=True)
        by = {"scored_by": self._scored_by} if self._scored_by else {}
        for row in rows:
            about = {"step": boundary.step, "stage": boundary.name, "kind": boundary.kind}
            self._rows.write({**about, **by, **row})
            scalars = {f"score/{row['nfe']}_steps/{k}": v for k, v in row.items() if k != "nfe"}
            self._tensorboard.write(boundary.step, scalars)
        self._note_best()

    def history(self) -> list[tuple[int, float]]:
        """(step, main score at the first of the numbers of sampling steps) of the run so far."""
        return [(row["step"], row[self.main]) for row in self._main_rows()]

    def best_step(self) -> int | None:
        """The step of the best score so far whose checkpoint is there, None where there is none."""
        best = self._best()
        return best["step"] if best else None

    def show(self, metrics: list[Row], stages: tuple[Stage, ...]) -> None:
        """The closing pictures and tables, from what the run wrote down.

        metrics: the rows of metrics.jsonl.
        """
        shown = [row for row in self.rows() if self.main and "nfe" in row and self.main in row]
        if self._judge:
            self._judge.curves(self._workdir / CURVES, metrics, shown, stages)
            full = [self._picture(b) for b in self.boundaries.values() if b.full]
            # A config that was changed may have had other boundaries.
            self._judge.stack(self._workdir / SAMPLES, [p for p in full if p.exists()])
        rules, times = self._config.curriculum, self._config.times
        print(curriculum.table(stages, rules, times.r_neq_t_fraction, self._config.rows))
        if self._judge and shown:
            self._print_scores(self._judge, shown)

    def show_places(self) -> None:
        """Prints where the closing pictures are."""
        if self._judge:
            print(f"samples   {self._workdir / SAMPLES}\ncurves    {self._workdir / CURVES}")

    def _steps(self, boundary: Boundary) -> tuple[int, ...]:
        return self._config.run.score_steps if boundary.full else self._config.run.score_steps[:1]

    def _best(self) -> Row | None:
        """The row with the lowest main score, the earliest of equals."""
        if self._judge is None:  # what an earlier start with a judge has found
            best = self._workdir / checkpoint.BEST
            return records.read(best, checkpoint.BEST_FORM) if best.is_file() else None
        folder = self._workdir / checkpoint.FOLDER
        rows = [
            row
            for row in self._main_rows()
            if (folder / str(row["step"]) / checkpoint.MANIFEST).is_file()
        ]
        return min(rows, key=lambda row: row[self.main], default=None)

    def _main_rows(self) -> list[Row]:
        """Rows at the first of the numbers of sampling steps, scored as this run scores."""
        nfe = self._config.run.score_steps[0]
        return [
            row
            for row in self.rows()
            if row.get("nfe") == nfe and self.main in row and self._is_like(row)
        ]

    def _is_like(self, row: Row) -> bool:
        """Whether a row was scored as this run does: settings may change on resume."""
        if by := row.get("scored_by"):
            return by == self._scored_by
        # Older rows of digits and photos tell the number of samples only.
        return row.get("n_samples") == self._config.run.score_samples

    def _note_best(self) -> None:
        """Writes best.json, for whoever looks for that checkpoint."""
        if self._judge is None or not processes.is_first():
            return
        best, path = self._best(), self._workdir / checkpoint.BEST
        with paths.writing(path):
            if best is None:
                path.unlink(missing_ok=True)
            else:
                paths.write(path, json.dumps(best) + "\n")

    def _picture(self, boundary: Boundary) -> Path:
        name = f"{boundary.step:08}_{boundary.name.replace(' ', '_')}.png"
        return self._workdir / "samples" / name

    def _print_scores(self, judge: Judge, scores: list[Row]) -> None:
        first, main = self._config.run.score_steps[0], self.main
        floor = judge.floor
        print(
            f"\n{main} by stage, {first} step(s), {scores[0]['n_samples']:.0f} samples; "
            "lower is better"
            + (f"; two halves of the real data: {floor[main]:.3f}" if main in floor else "")
        )
        for row in scores:
            if row["nfe"] == first:
                print(f"  {row['stage']:<10}{row['kind']:<16}step {row['step']:<8}{row[main]:.3f}")
        for b in self.boundaries.values():
            rows = [r for r in scores if r["step"] == b.step]
            if b.full and rows:
                print(f"\n{b.name}\n{_scored(judge, rows)}")


def _scored(judge: Judge, rows: Sequence[Row]) -> str:
    """Scores of one model as a printed table, and whether its curve falls."""
    said = curve(rows, judge.main)
    return judge.table(rows) + (f"\n{said}" if said else "")
