"""The model scored and pictured where a run asks for it, and what those scores say: the best checkpoint, the closing table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dmf import data, networks, processes
from dmf.config import Config
from dmf.evaluation import pictures, sampling, scoring
from dmf.logging import JsonLines, TensorBoard
from dmf.method import curriculum
from dmf.method.curriculum import Stage
from dmf.storage import checkpoint, paths

FILE = "scores.jsonl"


@dataclass(frozen=True)
class Boundary:
    """A step at which the model is scored and pictured: the start of a run from `init`, the end of a stage, or in between."""

    step: int
    name: str
    kind: str
    full: bool  # all numbers of sampling steps, not only the first
    kept: bool = True  # its checkpoint is kept for good


def boundaries(stages: tuple[Stage, ...], from_init: bool, every: int) -> dict[int, Boundary]:
    """The boundaries of a run by their step. every: also within the stages, every so many steps; 0 = not."""
    start = [Boundary(0, "init", "given", True)] if from_init else []
    between = range(every, stages[-1].last, every) if every else ()
    within = [(n, curriculum.stage_at(stages, n - 1)) for n in between]
    inner = [Boundary(n, s.name, s.kind, False, False) for n, s in within if n != s.last]
    ends = [Boundary(s.last, s.name, s.kind, s.index < 0 or s is stages[-1]) for s in stages]
    return {b.step: b for b in start + inner + ends}


class Scoreboard:
    """Scores and pictures of a run's boundaries, and its scores.jsonl, best.json and samples."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        stages: tuple[Stage, ...],
        dataset: data.Source,
        network: networks.Network,
        mesh: Mesh,
        tensorboard: TensorBoard,
    ):
        self._config, self._workdir, self._tensorboard = config, workdir, tensorboard
        self.boundaries = boundaries(stages, bool(config.init), config.run.score_every_steps)
        self._rows = JsonLines(workdir / FILE, processes.is_first())
        labels = scoring.labels_of_run(config, dataset)
        self._sampler = sampling.Sampler(network, config, dataset.image_shape, labels, mesh)
        self._score: Any = None
        self.main = ""  # name of the score by which the best checkpoint is told
        if scorer := scoring.make_scorer(config, dataset, mesh):
            self._score, self.main = scorer
        self._scored_by = self._score.scored_by if self._score else ""
        self._decode = sampling.make_decoder(
            config.run.vae, dataset.image_shape, mesh, data.identity(dataset)
        )

    def rows(self) -> list[dict[str, Any]]:
        """What scores.jsonl holds."""
        return self._rows.read()

    def resume(self, step: int) -> None:
        """Forgets what was written after `step`."""
        self._rows.resume(step)
        self._note_best()

    def is_done(self, boundary: Boundary) -> bool:
        """Whether an earlier run has scored and pictured this boundary to its end."""
        found = int(
            processes.first_says(str(sum(row["step"] == boundary.step for row in self.rows())))
        )
        return found == (len(self._steps(boundary)) if self._score else 1)

    def add(self, boundary: Boundary, params: Any) -> None:
        """Pictures and scores the weights; what a kill left half done is done again."""
        self._rows.resume(boundary.step - 1)
        side, steps = self._config.run.sample_rows, self._steps(boundary)
        draw = {
            f"{boundary.name}: {n} step{'s' * (n > 1)}": self._sampler(params, side * side, n)
            for n in steps
        }
        grids = {name: self._decode(x) for name, x in draw.items()}
        if processes.is_first():
            with paths.writing(self._picture(boundary)):
                pictures.panels(self._picture(boundary), grids, side)
        rows: list[dict[str, Any]] = [{}]
        if self._score:
            rows = sampling.score(
                self._sampler, self._score, params, self._config.run.score_samples, steps
            )
            print(f"after {boundary.name} ({boundary.kind}), step {boundary.step}")
            print(sampling.format_scores(rows, self._score.floor), flush=True)
        by = {"scored_by": self._scored_by} if self._scored_by else {}
        for row in rows:
            self._rows.write(
                {"step": boundary.step, "stage": boundary.name, "kind": boundary.kind, **by, **row}
            )
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

    def show(self, metrics: list[dict[str, Any]], stages: tuple[Stage, ...]) -> None:
        """The closing pictures and tables, from what the run wrote down. metrics: the rows of metrics.jsonl."""
        shown = [row for row in self.rows() if self._score and "nfe" in row and self.main in row]
        full = [self._picture(b) for b in self.boundaries.values() if b.full]
        with paths.writing(curves := self._workdir / "curves.png"):
            pictures.curves(curves, metrics, shown, stages, self.main)
        with paths.writing(samples := self._workdir / "samples.png"):
            pictures.stack(
                samples, [p for p in full if p.exists()]
            )  # a changed config may have had others
        rules, times = self._config.curriculum, self._config.times
        print(curriculum.table(stages, rules, times.r_neq_t_fraction))
        if self._score and shown:
            self._print_scores(shown, self._score.floor)

    def _steps(self, boundary: Boundary) -> tuple[int, ...]:
        return self._config.run.score_steps if boundary.full else self._config.run.score_steps[:1]

    def _best(self) -> dict[str, Any] | None:
        """The row with the lowest main score at the first of the numbers of sampling steps, the earliest of equals."""
        folder = self._workdir / checkpoint.FOLDER
        rows = [
            row
            for row in self._main_rows()
            if (folder / str(row["step"]) / checkpoint.MANIFEST).is_file()
        ]
        return min(rows, key=lambda row: row[self.main], default=None)

    def _main_rows(self) -> list[dict[str, Any]]:
        nfe = self._config.run.score_steps[0]
        return [
            row
            for row in self.rows()
            if row.get("nfe") == nfe and self.main in row and self._is_like(row)
        ]

    def _is_like(self, row: dict[str, Any]) -> bool:
        """Whether a row was scored as this run does: settings may change on resume."""
        by = row.get(
            "scored_by"
        )  # older rows of digits and photos say nothing but the number of samples
        return (
            by == self._scored_by if by else row.get("n_samples") == self._config.run.score_samples
        )

    def _note_best(self) -> None:
        """Writes best.json, for whoever looks for that checkpoint."""
        if not processes.is_first():
            return
        best, path = self._best(), self._workdir / checkpoint.BEST
        with paths.writing(path):
            if best is None:
                path.unlink(missing_ok=True)
            else:
                paths.write(path, json.dumps(best) + "\n", ".json.tmp")

    def _picture(self, boundary: Boundary) -> Path:
        return (
            self._workdir / "samples" / f"{boundary.step:08}_{boundary.name.replace(' ', '_')}.png"
        )

    def _print_scores(self, scores: list[dict[str, Any]], floor: dict[str, float]) -> None:
        first, main = self._config.run.score_steps[0], self.main
        print(
            f"\n{main} by stage, {first} step(s), {scores[0]['n_samples']:.0f} samples; lower is better"
            + (f"; two halves of the real data: {floor[main]:.3f}" if main in floor else "")
        )
        for row in scores:
            if row["nfe"] == first:
                print(f"  {row['stage']:<10}{row['kind']:<16}step {row['step']:<8}{row[main]:.3f}")
        for b in self.boundaries.values():
            rows = [r for r in scores if r["step"] == b.step]
            if b.full and rows:
                print(f"\n{b.name}\n{sampling.format_scores(rows, floor)}")
