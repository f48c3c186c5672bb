"""What a run reads of itself, says of itself, and heeds: metrics, probes, scores, printed lines."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import jax

from dmf import processes, sharding, state
from dmf.errors import DmfError, NotFinite, printable
from dmf.logging import Progress
from dmf.method import curriculum
from dmf.method.curriculum import Stage
from dmf.run import guard
from dmf.run.guard import Diverged
from dmf.run.scoreboard import Boundary
from dmf.run.workdir import kept_by_changes, note_change, note_start
from dmf.state import TrainState
from dmf.storage import checkpoint

if TYPE_CHECKING:
    from dmf.run.context import Context


class Report:
    """One start of a run as it is told. Raises `Diverged` where a number is not a healthy run's."""

    def __init__(self, run: Context):
        self._run = run
        self._progress = Progress(run.total, 0)
        self._pending: tuple[int, Stage, Any] | None = None  # a step whose metrics are not read yet
        # Seconds in all steps after the first, and their part spent waiting for batches.
        self._stepped_s = self._waited_s = 0.0

    def start(self, now: TrainState) -> None:
        """Sets the logs back to the step of this state, notes the start, and prints what starts.

        Raises DmfError where the config ends earlier, or where the guard has stopped the run.
        """
        run, start = self._run, int(now.step)
        if start > run.total:
            raise DmfError(
                f"step {start} is on disk: expected a config that ends no earlier, "
                f"not at {run.total}"
            )
        with processes.together():
            if processes.is_first():
                self._refuse_if_stopped(start)
                note_change(run.workdir, start, run.config)
                kept_by_changes(run.workdir)  # a damaged file is told before a step, not at a save
                note_start(run.workdir, start, run.config)
        for log in (run.metrics, run.watched, run.scoreboard):
            log.resume(start)
        self._announce(start, now)

    def _refuse_if_stopped(self, start: int) -> None:
        """Raises DmfError where the guard has ended the run here; tells the run up to this end."""
        if reason := self._run.guard.stopped(start):
            self._run.scoreboard.show(self._run.metrics.read(), self._run.stages)
            self._interventions()
            raise DmfError(reason)

    def _announce(self, start: int, now: TrainState) -> None:
        """Prints network, data, stages, and the step that the run starts from."""
        run, config, dataset = self._run, self._run.config, self._run.dataset
        count = sum(x.size for x in jax.tree.leaves(now.params))
        print(
            f"network   {config.network.kind}, {count:,} parameters ({count / 1e6:.2f} M), "
            f"{config.compute_dtype}"
        )
        name = printable(dataset.name)
        print(
            f"data      {name}, {len(dataset.labels):,} images {dataset.image_shape}, "
            f"batch {config.batch_size} on {run.mesh.devices.size} device(s)"
        )
        if run.mesh.devices.size > 1:
            print(f"mesh      {sharding.describe(run.mesh, now)}")
        share = config.times.r_neq_t_fraction
        print(curriculum.table(run.stages, config.curriculum, share, config.rows))
        self._interventions()
        if run.probe:
            print(
                f"watch     {run.probe.rows} {run.probe.source} images every "
                f"{config.guard.every_steps} steps, to {run.watched.path}"
            )
        found = f"step {start} of {run.total}, resuming" if start else config.init
        print(f"start     {found or 'fresh weights (config.init names no flow model)'}", flush=True)

    def _interventions(self) -> None:
        for row in self._run.guard.rows:
            print(f"guard     {guard.describe(row)}", flush=True)

    def first_step(self, n: int, began: float, metrics: dict[str, jax.Array]) -> None:
        """Waits for the first step, n, and tells how long it took."""
        jax.block_until_ready(metrics)
        took = time.monotonic() - began
        print(
            f"first step begun after {began - self._run.began:.1f} s, compilation included; "
            f"it took {took:.1f} s",
            flush=True,
        )
        self._run.tensorboard.open()
        self._progress.restart(n + 1)

    def later_step(self, began: float, waited_s: float) -> None:
        """Counts the seconds since `began`, and those among them spent waiting for the batch."""
        self._stepped_s += time.monotonic() - began
        self._waited_s += waited_s

    def hold(self, n: int, stage: Stage, metrics: dict[str, jax.Array]) -> None:
        """Keeps the metrics of the step that led to n. They are read while the next one runs."""
        self._pending = n, stage, metrics

    def settle(self) -> None:
        """Reads the metrics that are held, checks them, and logs them at the configured steps."""
        if self._pending is None:
            return
        (n, stage, held), self._pending = self._pending, None
        run, config = self._run, self._run.config
        values = {k: float(v) for k, v in jax.device_get(held).items()}
        guard.check_finite(n, stage, values, self._leaves)
        values.pop("nonfinite_leaf")
        if n % config.run.log_every_steps == 0 or n == 1 or n == run.total:
            rate = state.learning_rate(n - 1, run.stages, config.curriculum, config.optimizer)
            values = {"rho": curriculum.rho_at(stage, n - 1), "learning_rate": rate, **values}
            run.metrics.write({"step": n, "stage": stage.index, "kind": stage.kind, **values})
            run.tensorboard.write(n, {"stage": stage.index, **values})
            self._progress.show(n, stage.name, values["loss"])

    def _leaves(self) -> list[str]:
        paths = jax.tree_util.tree_leaves_with_path(self._run.like.params)
        return [jax.tree_util.keystr(path) for path, _ in paths]

    def probe(self, n: int, stage: Stage, now: TrainState) -> None:
        """Probes the weights after n steps, writes the numbers down and heeds them."""
        run, rho = self._run, curriculum.rho_at(stage, n - 1)
        if run.probe is None:
            return
        values = run.probe(stage.kind, now.params, rho)
        about = {"step": n, "stage": stage.index, "kind": stage.kind, "rho": rho}
        run.watched.write({**about, **run.probe.about, **values})
        run.tensorboard.write(n, {f"watch/{name}": value for name, value in values.items()})
        self._progress.restart(n)
        if run.guard.active:
            first = processes.is_first()
            self._heed(n, run.guard.probe_alarm(run.watched.read(), stage) if first else "")

    def boundary(self, boundary: Boundary, now: TrainState) -> None:
        """Pictures and scores the weights, unless an earlier start has done so; heeds the score."""
        run = self._run
        if not run.scoreboard.is_done(boundary):
            self._progress.pause()
            try:
                run.scoreboard.add(boundary, state.evaluated(now, run.config.ema))
            except NotFinite as error:
                raise Diverged(boundary.step, str(error), str(error)) from error
            self._progress.restart(boundary.step)
        if run.guard.active:
            seen = run.scoreboard.history(), run.scoreboard.main, run.stages
            alarm = run.guard.score_alarm(*seen) if processes.is_first() else ""
            self._heed(boundary.step, alarm)

    def _heed(self, n: int, reason: str) -> None:
        """Raises Diverged, on all processes, where the first one has a reason."""
        if reason := processes.first_says(reason):
            raise Diverged(n, reason)

    def pause(self) -> None:
        """Ends the rewritten progress line before something else is printed."""
        self._progress.pause()

    def finish(self) -> list[dict[str, Any]]:
        """Makes the closing pictures and prints the tables; returns the rows of scores.jsonl."""
        run = self._run
        if not processes.is_first():
            return []
        run.scoreboard.show(run.metrics.read(), run.stages)
        self._interventions()
        if self._stepped_s:
            print(
                f"input     steps waited {self._waited_s:.2f} s of {self._stepped_s:.1f} s for "
                f"batches ({self._waited_s / self._stepped_s:.2%})"
            )
        run.scoreboard.show_places()
        print(f"weights   {run.workdir / checkpoint.FOLDER / str(run.total)}")
        return run.scoreboard.rows()
