"""The run: data, network and curriculum become a trained model in a work directory.

    workdir/config.json       the run's config; a later command with another one is refused, or noted in changes.jsonl
    workdir/starts.jsonl      a line per start: step, time, command, git revision, versions, devices
    workdir/checkpoints/N     state after N steps; every stage boundary is kept, and the best by one-step score
    workdir/best.json         its step and score; WORKDIR/best stands for that checkpoint
    workdir/origin.json       where the weights of config.init came from, if they were converted
    workdir/data.json         what identifies the data; a later command with other data is refused
    workdir/programs/         compiled programs, kept by main.py for the next start;  workdir/.lock  held while it trains
    workdir/metrics.jsonl     logged steps;  workdir/scores.jsonl  scores at the stage boundaries
    workdir/watch.jsonl       probes of the weights (`dmf.run.probe`);  workdir/guard.json  what followed from them (`dmf.run.guard`)
    workdir/samples/*.png     a grid per stage boundary;  samples.png, curves.png  at the end

Running the same command again resumes from the newest checkpoint and ends in the same bits: data and randomness are
functions of (seed, step), and a boundary is scored, pictured and switched by the step number alone. Of several processes
(`dmf.processes`) all compute, each on its own rows of a batch, and the first one writes; checkpoints are written by all.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dmf import data, networks, optim, pretrained, processes, sharding, state, step
from dmf.config import Config, RunConfig, check, to_dict
from dmf.data.feed import Feed
from dmf.errors import DmfError, NotFinite
from dmf.logging import JsonLines, Progress, TensorBoard
from dmf.method import curriculum
from dmf.method.curriculum import Stage
from dmf.run import ahead, guard
from dmf.run.guard import Diverged, Guard
from dmf.run.probe import Watch
from dmf.run.scoreboard import Boundary, Scoreboard
from dmf.run.sigterm import AGAIN, Stop
from dmf.run.workdir import claim, held, kept_by_changes, note_change, note_start, origin
from dmf.state import TrainState
from dmf.storage import checkpoint, paths


def train(
    config: Config,
    workdir: str | Path,
    began: float | None = None,
    allow_change: bool = False,
    stop: Stop | None = None,
) -> list[dict[str, Any]]:
    """Trains, or goes on training, in `workdir`; returns the rows of scores.jsonl. Raises DmfError on bad input.

    began: when the process started, by time.monotonic; now, if it is not given. allow_change: a run in `workdir` with another
    config goes on with this one (`dmf.run.workdir.claim`). stop: asks the run to stop before its end (`dmf.run.sigterm`).
    """
    place, rows = paths.reach(paths.at(workdir)), None
    with held(place):
        while rows is None:
            run = Run(config, place, began, allow_change, stop)
            try:
                rows = run.to_its_end()
            except BaseException:
                if (
                    jax.process_count() == 1
                ):  # of several, the others would have to close theirs at the same time
                    run.close()
                raise
            run.close()
            del run  # the device may not hold two
            began = None
    return rows


class Run:
    """Everything a run holds open, put together once; the loop itself is `loop`."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        began: float | None = None,
        allow_change: bool = False,
        stop: Stop | None = None,
    ):
        self.config, self.workdir, self.stop = config, workdir, stop or Stop()
        self.start = self.saved = 0
        self.began = time.monotonic() if began is None else began
        self.stepped_s = self.waited_s = (
            0.0  # seconds in steps but the first, and those of them spent waiting for batches
        )
        with processes.together():
            empty = not any((workdir / checkpoint.FOLDER).glob("[0-9]*"))
            fresh = empty and (bool(config.init) or not guard.begins_again(workdir / guard.FILE))
            files = workdir / guard.FILE, workdir / checkpoint.FOLDER
            self.guard = Guard(*files, config.guard, fresh, drawn=not config.init)
            self._prepare(fresh, allow_change)
        processes.check_shared(workdir)
        shape, about = self.dataset.image_shape, data.identity(self.dataset)
        processes.same(
            "config, data or jax",
            json.dumps([to_dict(replace(config, run=RunConfig())), about, jax.__version__]),
        )
        processes.same(
            "guard.json", self.guard.told()
        )  # a network file system may still show the one before
        self.metrics, self.watched = (
            JsonLines(workdir / f"{name}.jsonl", processes.is_first())
            for name in ("metrics", "watch")
        )
        self.tensorboard = TensorBoard(
            workdir / "tensorboard", config.run.tensorboard and processes.is_first()
        )
        with processes.together():
            self.scores = Scoreboard(
                config,
                workdir,
                self.stages,
                self.dataset,
                self.network,
                self.mesh,
                self.tensorboard,
            )
            probed = config, self.dataset, self.mesh, self.place.params
            self.watch = Watch(*probed) if config.guard.every_steps else None
        processes.same("set of images to probe", self.watch.source if self.watch else "")
        kept = [0, *(n for n, b in self.scores.boundaries.items() if b.kept)]
        metadata = {
            "config": to_dict(config),
            "image_shape": list(shape),
            "source": origin(workdir),
            "data": about,
        }
        which = config.run.keep_checkpoints, kept, metadata, self._also_kept, self._is_scheduled
        self.checkpoints = checkpoint.Checkpoints(workdir, *which)

    def _prepare(self, fresh: bool, allow_change: bool) -> None:
        """Data, stages, networks, mesh and programs, all checked; the work directory claimed. Raises DmfError."""
        config, workdir = self.config, self.workdir
        self.dataset = data.load(config.data, "train")
        shape = self.dataset.image_shape
        self.stages = self.guard.stages(check(config, self.dataset.num_classes, len(self.dataset)))
        self.mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch(self.mesh, config.batch_size)
        self.network = networks.build(config.network, shape, jnp.dtype(config.compute_dtype))
        self.optimizer = optim.build(config.optimizer)
        self.fresh = jax.jit(self._fresh)  # which is traced once so, for its shapes and for itself
        shapes = jax.eval_shape(self.fresh)
        self.place = sharding.placed(self.mesh, shapes)
        self.like = jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, self.place
        )
        self.local_rows = sharding.local_rows(self.mesh, config.batch_size)
        self.steps = {
            kind: step.make_train_step(
                kind,
                step.network_for(kind, config, shape, self.mesh),
                self.optimizer,
                config,
                self.mesh,
                self.place,
            )
            for kind in {s.kind for s in self.stages}
        }
        self.init = pretrained.find_init(config, shape) if config.init and fresh else None
        if processes.is_first():
            origin = self.init[2] if self.init else None
            claim(workdir, config, origin, data.identity(self.dataset), fresh, allow_change)
            self.guard.settle()

    def _also_kept(self) -> set[int]:
        best = self.scores.best_step()
        return kept_by_changes(self.workdir) | (set() if best is None else {best})

    def _fresh(self) -> TrainState:
        return self._started(self.network.init(jax.random.key(self.config.seed)))

    def _started(self, params: Any) -> TrainState:
        return state.create(
            params, self.optimizer, self.config.ema, self.config.curriculum.interval
        )

    def _jit(
        self, make: Callable[..., TrainState], donate_argnums: tuple[int, ...] | int = ()
    ) -> Callable[..., TrainState]:
        options = sharding.compiler_options(self.mesh)
        return jax.jit(
            make, donate_argnums=donate_argnums, out_shardings=self.place, compiler_options=options
        )

    def _batch(self, n: int) -> dict[str, jax.Array]:
        config = self.config
        found = data.batch(self.dataset, config.seed, n, config.batch_size, rows=self.local_rows)
        return sharding.put_rows(self.mesh, found)

    def _scalars(self, n: int) -> step.Scalars:
        return step.step_scalars(n, curriculum.stage_at(self.stages, n), self.stages, self.config)

    def _compile_ahead(self) -> threading.Thread | None:
        """Makes the program of the step that comes first, unless the newest checkpoint turns out to be damaged."""
        n = max(self.checkpoints.complete(), default=0)
        if n >= self.stages[-1].last:
            return None
        kind = curriculum.stage_at(self.stages, n).kind
        return ahead.compiling(self.steps[kind], self.like, self._batch(n), self._scalars(n))

    def to_its_end(self) -> list[dict[str, Any]] | None:
        """The rows of scores.jsonl as the run ends or is stopped; None where the guard sends it back to an earlier step."""
        try:
            return self.finish() if self.loop() else self.scores.rows()
        except Diverged as found:
            if not self.guard.active or found.step == 0:
                raise
            self.checkpoints.wait()
            with processes.together():
                if processes.is_first():
                    seen = self.watched.read(), self.scores.history(), kept_by_changes(self.workdir)
                    self.guard.intervene(found, self.stages, *seen, self._is_scheduled)
            self.stop.saved()
            if self.stop.here():
                print(f"stopped, nothing was unsaved; {AGAIN}", flush=True)
                return self.scores.rows()
        return None

    def loop(self) -> bool:
        """Step by step: boundary work, one step dispatched, the metrics of the step before it read.

        Returns whether the end was reached; if not, the run was asked to stop.
        """
        compiling = self._compile_ahead()
        now = self._start()
        total, start = self.stages[-1].last, self.start
        self._announce(now)
        if compiling:
            compiling.join()
        progress = Progress(total, start)
        pending: tuple[int, Stage, Any] | None = None
        with Feed(self._batch, start, total) as feed:
            for n in range(start, total + 1):
                stopped = self.stop.here()
                if stopped or n in self.scores.boundaries:
                    self._report(pending, progress)
                    pending = None
                    if stopped or not self._at_boundary(self.scores.boundaries[n], now, progress):
                        return self._leave(n, now, progress)
                if n == total:
                    break
                stage = curriculum.stage_at(self.stages, n)
                now = self._switched(now, n, stage)
                if n == start:
                    jax.block_until_ready(now)  # what follows is the step alone
                began, waited = time.monotonic(), feed.waited_s
                now, metrics = self.steps[stage.kind](now, feed.get(n), self._scalars(n))
                self.stop.unsaved()
                if n == start:
                    self._announce_first(began, metrics)
                    self.tensorboard.open()
                    progress.restart(n + 1)
                self._report(pending, progress)
                if n > start:
                    self.stepped_s += time.monotonic() - began
                    self.waited_s += feed.waited_s - waited
                pending = (n + 1, stage, metrics)
                if self.watch and self._is_probed(n + 1, stage):
                    self._report(pending, progress)
                    pending = None
                    self._probe(self.watch, n + 1, stage, now, progress)
                if self._is_scheduled(n + 1) and n + 1 not in self.scores.boundaries:
                    self._report(
                        pending, progress
                    )  # never save a state whose step has not been checked
                    pending = None
                    self._save(n + 1, now, wait=False)
        return True

    def _save(self, n: int, now: TrainState, wait: bool = True) -> None:
        if n > self.saved:
            self.checkpoints.save(n, now, wait)
            self.saved = n
        elif wait:
            self.checkpoints.wait()

    def _leave(self, n: int, now: TrainState, progress: Progress) -> bool:
        """The state is saved, and the run ends here; False."""
        progress.pause()
        self._save(n, now)
        print(
            f"stopped after step {n} of {self.stages[-1].last}, which is saved; the same command goes on from there",
            flush=True,
        )
        return False

    def _probe(
        self, watch: Watch, n: int, stage: Stage, now: TrainState, progress: Progress
    ) -> None:
        rho = curriculum.rho_at(stage, n - 1)
        values = watch(stage.kind, now.params, rho)
        self.watched.write(
            {
                "step": n,
                "stage": stage.index,
                "kind": stage.kind,
                "rho": rho,
                **watch.about,
                **values,
            }
        )
        self.tensorboard.write(n, {f"watch/{name}": value for name, value in values.items()})
        progress.restart(n)
        if self.guard.active:
            reason = (
                self.guard.probe_alarm(self.watched.read(), stage) if processes.is_first() else ""
            )
            self._heed(n, processes.first_says(reason))

    def _is_probed(self, n: int, stage: Stage) -> bool:
        """Whether the weights after n steps are: every so often, after a stage's first step and at its end."""
        return n % self.config.guard.every_steps == 0 or n in (stage.first + 1, stage.last)

    def _is_scheduled(self, n: int) -> bool:
        """Whether a checkpoint is due after n steps, be the run asked to stop or not."""
        return n % self.config.run.checkpoint_every_steps == 0 or n in self.scores.boundaries

    def _heed(self, n: int, reason: str) -> None:
        if reason:
            raise Diverged(n, reason)

    def _switched(self, now: TrainState, n: int, stage: Stage) -> TrainState:
        """The state as step n starts: changed by `state.switch` where a stage begins."""
        if n != stage.first or stage is self.stages[0]:
            return now
        before = self.stages[self.stages.index(stage) - 1]
        if before.index == stage.index or not state.switches(before, self.config.curriculum):
            return now  # the one: two parts of a stage, which the guard has cut
        of = dict(
            before=before,
            curriculum=self.config.curriculum,
            ema=self.config.ema,
            optimizer=self.optimizer,
        )
        switch = partial(state.switch, **of)  # fresh parts are placed as well
        return self._jit(switch, donate_argnums=0)(now)

    def _announce_first(self, began: float, metrics: dict[str, jax.Array]) -> None:
        jax.block_until_ready(metrics)
        took = time.monotonic() - began
        print(
            f"first step begun after {began - self.began:.1f} s, compilation included; it took {took:.1f} s",
            flush=True,
        )

    def finish(self) -> list[dict[str, Any]]:
        """The closing table and pictures, made from what the run wrote down."""
        if not processes.is_first():
            return []
        self.scores.show(self.metrics.read(), self.stages)
        self._tell_interventions()
        if self.stepped_s:
            share = self.waited_s / self.stepped_s
            print(
                f"input     steps waited {self.waited_s:.2f} s of {self.stepped_s:.1f} s for batches ({share:.2%})"
            )
        print(
            f"samples   {self.workdir / 'samples.png'}\ncurves    {self.workdir / 'curves.png'}\n"
            f"weights   {self.workdir / checkpoint.FOLDER / str(self.stages[-1].last)}"
        )
        return self.scores.rows()

    def close(self) -> None:
        self.checkpoints.close()
        self.tensorboard.close()

    def _start(self) -> TrainState:
        found = self.checkpoints.restore_latest(self.like)  # two states may be one too many
        if found is None and self.config.init:
            folder, ema, _ = self.init or pretrained.find_init(
                self.config, self.dataset.image_shape
            )
            params = checkpoint.read_params(
                folder, ema, pretrained.abstract_params(self.network, self.mesh)
            )
            found = self._jit(self._started)(params)
            self.checkpoints.save(
                0, found, wait=False
            )  # a resumed run starts from these weights, whatever init holds then
        now = (
            found if found is not None else self._jit(self.fresh)()
        )  # which the guard may go back to: they are the same again
        self.start = self.saved = int(
            now.step
        )  # what a run starts from is on disk already, but for fresh weights
        if self.start > self.stages[-1].last:
            raise DmfError(
                f"step {self.start} is on disk: expected a config that ends no earlier, not at {self.stages[-1].last}"
            )
        with processes.together():
            if processes.is_first():
                self._refuse_if_stopped()
                note_change(self.workdir, self.start, self.config)
                note_start(self.workdir, self.start, self.config)
        self.metrics.resume(self.start)
        self.watched.resume(self.start)
        self.scores.resume(self.start)
        return now

    def _refuse_if_stopped(self) -> None:
        """With the report of the run, up to what it was stopped for. Raises DmfError."""
        if reason := self.guard.stopped(self.start):
            self.scores.show(self.metrics.read(), self.stages)
            self._tell_interventions()
            raise DmfError(reason)

    def _announce(self, now: TrainState) -> None:
        count = sum(x.size for x in jax.tree.leaves(now.params))
        print(
            f"network   {self.config.network.kind}, {count:,} parameters ({count / 1e6:.2f} M), {self.config.compute_dtype}"
        )
        print(
            f"data      {self.dataset.name}, {len(self.dataset.labels):,} images {self.dataset.image_shape}, "
            f"batch {self.config.batch_size} on {self.mesh.devices.size} device(s)"
        )
        if self.mesh.devices.size > 1:
            print(f"mesh      {sharding.describe(self.mesh, now)}")
        print(
            curriculum.table(
                self.stages, self.config.curriculum, self.config.times.r_neq_t_fraction
            )
        )
        self._tell_interventions()
        if self.watch:
            every = self.config.guard.every_steps
            print(
                f"watch     {self.watch.rows} {self.watch.source} images every {every} steps, to {self.watched.path}"
            )
        origin = (
            f"step {self.start} of {self.stages[-1].last}, resuming"
            if self.start
            else self.config.init
        )
        print(
            f"start     {origin or 'fresh weights (config.init names no flow model)'}", flush=True
        )

    def _tell_interventions(self) -> None:
        for row in self.guard.rows:
            print(f"guard     {guard.describe(row)}", flush=True)

    def _report(self, pending: tuple[int, Stage, Any] | None, progress: Progress) -> None:
        """Reads a step's metrics, stops on the first non-finite one, logs at the configured steps."""
        if pending is None:
            return
        n, stage, device_values = pending
        values = {k: float(v) for k, v in jax.device_get(device_values).items()}
        guard.check_finite(n, stage, values, self._leaves)
        values.pop("nonfinite_leaf")
        if n % self.config.run.log_every_steps == 0 or n == 1 or n == self.stages[-1].last:
            rate = optim.learning_rate(
                n - 1, self.stages, self.config.curriculum, self.config.optimizer
            )
            values = {"rho": curriculum.rho_at(stage, n - 1), "learning_rate": rate, **values}
            self.metrics.write({"step": n, "stage": stage.index, "kind": stage.kind, **values})
            self.tensorboard.write(n, {"stage": stage.index, **values})
            progress.show(n, stage.name, values["loss"])

    def _leaves(self) -> list[str]:
        params = pretrained.abstract_params(self.network, self.mesh)
        return [
            jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]

    def _at_boundary(self, boundary: Boundary, now: TrainState, progress: Progress) -> bool:
        """Keeps the state, then pictures and scores it; a part that an earlier run has done is not done again.

        Returns False where the run was asked to stop before the latter.
        """
        self._save(boundary.step, now)
        self.stop.saved()  # from here to the end of the next step's compilation the process may end at once
        if self.stop.here():
            return False
        if not self.scores.is_done(boundary):
            progress.pause()
            try:
                self.scores.add(boundary, state.evaluated(now, self.config.ema))
            except NotFinite as error:
                raise Diverged(boundary.step, str(error), str(error)) from error
            progress.restart(boundary.step)
        if self.guard.active:
            seen = self.scores.history(), self.scores.main, self.stages
            self._heed(
                boundary.step,
                processes.first_says(self.guard.score_alarm(*seen) if processes.is_first() else ""),
            )
        return True
