"""What a run holds open: its data, network, programs, logs and checkpoints, in one frozen value.

    open_run     prepares everything, checks it, and claims the work directory for this run
    opened       does the same for a with block, and closes the files at its end
    first_state  gives the state that a start goes on from

The rest of a run reads these fields and never changes them.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dmf import data, networks, optim, processes, sharding, state, step
from dmf.config import Config, RunConfig, check, to_dict
from dmf.errors import DmfError
from dmf.logging import JsonLines, TensorBoard
from dmf.method import curriculum
from dmf.method.curriculum import Stage
from dmf.run import guard as rules
from dmf.run import init as starts
from dmf.run import scoreboard as scores
from dmf.run.guard import Guard
from dmf.run.probe import Probe
from dmf.run.scoreboard import OpenJudge, Scoreboard
from dmf.run.sigterm import Stop
from dmf.run.workdir import claim, kept_by_changes, origin
from dmf.state import TrainState
from dmf.storage import checkpoint, manifest, records

METRICS: dict[Any, Any] = {  # a line of metrics.jsonl
    "step": records.POSITIVE,
    "stage": int,  # -1 is that before the first
    "kind": rules.KIND,
    "rho": float,
    ...: records.NUMBER,
}
WATCHED: dict[Any, Any] = {  # a line of watch.jsonl
    **METRICS,
    "rows": records.Maybe(records.POSITIVE),
    "source": records.Maybe(str),
    **dict.fromkeys(rules.WORSE, records.NUMBER),
}


@dataclass(frozen=True, eq=False)  # jax.jit of its methods takes its hash
class Context:
    """Everything a run holds open. Its fields never change; logs, guard and stop have a state."""

    config: Config
    workdir: Path
    began: float  # when the process or this start began, by time.monotonic
    dataset: data.Source
    stages: tuple[Stage, ...]  # of the config, as the guard's interventions have left them
    network: networks.Network
    mesh: Mesh
    optimizer: optax.GradientTransformation
    fresh: Callable[[], TrainState]  # draws the weights of step 0
    place: TrainState  # where each array of the state lives: a tree of shardings
    like: TrainState  # shape, dtype and place of each array
    local_rows: np.ndarray  # positions in the global batch of this process's rows
    steps: dict[str, Any]  # the program of one step by kind of stage
    teacher: tuple[Any, ...]  # the weights of the frozen teacher, () without one
    init: starts.Init | None  # weights that the first start takes, where config.init names some
    guard: Guard
    stop: Stop
    metrics: JsonLines  # metrics.jsonl
    watched: JsonLines  # watch.jsonl
    tensorboard: TensorBoard
    scoreboard: Scoreboard
    probe: Probe | None
    checkpoints: checkpoint.Checkpoints

    @property
    def total(self) -> int:
        """The number of steps of the whole run."""
        return self.stages[-1].last

    def batch(self, n: int) -> dict[str, jax.Array]:
        """The batch of step n on the devices, split by rows."""
        seed, size = self.config.seed, self.config.batch_size
        found = data.batch(self.dataset, seed, n, size, rows=self.local_rows)
        return sharding.put_rows(self.mesh, found)

    def scalars(self, n: int) -> step.Scalars:
        """What step n is given besides state and batch."""
        stage = curriculum.stage_at(self.stages, n)
        return step.step_scalars(n, stage, self.stages, self.config)

    def started(self, params: Any) -> TrainState:
        """The state before the first step from these weights."""
        return _started(self.config, self.optimizer, params)

    def jit(self, make: Callable[..., TrainState], donate: tuple[int, ...] = ()) -> Any:
        """`make` as a program whose state is placed as this run's. donate: as for `jax.jit`."""
        options = sharding.compiler_options(self.mesh)
        return jax.jit(
            make, donate_argnums=donate, out_shardings=self.place, compiler_options=options
        )

    def switched(self, now: TrainState, n: int, stage: Stage) -> TrainState:
        """The state as step n starts: changed by `state.switch` where a stage begins."""
        if n != stage.first or stage is self.stages[0]:
            return now
        before = self.stages[self.stages.index(stage) - 1]
        rules = self.config.curriculum
        # The guard may have cut a stage in two parts. Between them nothing is switched.
        if before.index == stage.index or not state.switches(before, rules):
            return now
        ema, optimizer = self.config.ema, self.optimizer
        switch = partial(
            state.switch, before=before, curriculum=rules, ema=ema, optimizer=optimizer
        )
        return self.jit(switch, donate=(0,))(now)  # a program, so that fresh parts are placed too

    def advance(
        self, now: TrainState, n: int, stage: Stage, batch: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """(the state after step n, its metrics). An optimiser's decomposition follows if due."""
        now, metrics = self.steps[stage.kind](now, batch, self.scalars(n), *self.teacher)
        done = state.optimizer_steps(n, self.stages, self.config.curriculum)
        if optim.is_due(self.config.optimizer, done):
            parts = optim.decomposed((now.opt_state, now.second), self.mesh)
            now = replace(now, opt_state=parts[0], second=parts[1])
        return now, metrics

    def is_scheduled(self, n: int) -> bool:
        """Whether a checkpoint is due after n steps, also where nobody asks the run to stop."""
        return _is_scheduled(self.config, self.scoreboard, n)

    def is_probed(self, n: int, stage: Stage) -> bool:
        """Whether the weights after n steps are probed.

        They are every so many steps, after the first step of a stage and at its end.
        """
        every = self.config.guard.every_steps
        return self.probe is not None and (n % every == 0 or n in (stage.first + 1, stage.last))

    def close(self) -> None:
        """Waits for the last checkpoint and closes all files."""
        self.checkpoints.close()
        self.tensorboard.close()


@contextmanager
def opened(*arguments: Any) -> Iterator[Context]:
    """`open_run` for a with block; closes the run at its end."""
    run = open_run(*arguments)
    try:
        yield run
    except BaseException:
        # Of several processes the others would have to close theirs at the same time.
        if not processes.several():
            run.close()
        raise
    run.close()


def open_run(
    config: Config,
    workdir: Path,
    began: float | None = None,
    allow_change: bool = False,
    stop: Stop | None = None,
    judge: OpenJudge | None = None,
) -> Context:
    """Prepares and checks everything, and claims the work directory. Arguments: `dmf.train.train`.

    Raises DmfError on bad input, on all processes alike.
    """
    with processes.together():
        guard, fresh = _guard(config, workdir)
        parts = _prepare(config, guard)
        dataset = parts["dataset"]
        about, shape = data.identity(dataset) | parts.pop("taught"), dataset.image_shape
        init = starts.find(config, dataset) if config.init and fresh else None
        if processes.is_first():
            came_from = init.origin if init else None
            forget = rules.FILE, scores.FILE
            claim(workdir, config, came_from, about, fresh, allow_change, forget)
            guard.settle()
    _check_same(config, workdir, about, guard)
    first = processes.is_first()
    tensorboard = TensorBoard(workdir / "tensorboard", config.run.tensorboard and first)
    stages, mesh = parts["stages"], parts["mesh"]
    with processes.together():
        judged = judge(config, dataset, parts["network"], mesh) if judge else None
        scoreboard = Scoreboard(config, workdir, stages, judged, tensorboard)
        probed = config.guard.every_steps
        probe = Probe(config, dataset, mesh, parts["place"].params) if probed else None
    processes.same("set of images to probe", probe.source if probe else "")
    return Context(
        config=config,
        workdir=workdir,
        began=time.monotonic() if began is None else began,
        **parts,
        init=init,
        guard=guard,
        stop=stop or Stop(),
        metrics=JsonLines(workdir / "metrics.jsonl", first, METRICS),
        watched=JsonLines(workdir / "watch.jsonl", first, WATCHED),
        tensorboard=tensorboard,
        scoreboard=scoreboard,
        probe=probe,
        checkpoints=_checkpoints(config, workdir, scoreboard, shape, about),
    )


def _guard(config: Config, workdir: Path) -> tuple[Guard, bool]:
    """The guard, and whether the run starts afresh: there is no checkpoint to go on from."""
    file, folder = workdir / rules.FILE, workdir / checkpoint.FOLDER
    empty = not any(folder.glob("[0-9]*"))
    fresh = empty and (bool(config.init) or not rules.begins_again(file))
    return Guard(file, folder, config.guard, fresh, drawn=not config.init), fresh


def _prepare(config: Config, guard: Guard) -> dict[str, Any]:
    """Data, stages, mesh, network and programs, all checked: the fields of Context of this name."""
    dataset = data.load(config.data, "train")
    shape = dataset.image_shape
    stages = guard.stages(check(config, dataset.num_classes, len(dataset)))
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, config.batch_size)
    network = networks.build(config.network, shape, jnp.dtype(config.compute_dtype))
    optimizer = optim.build(config.optimizer)

    def draw() -> TrainState:
        return _started(config, optimizer, network.init(jax.random.key(config.seed)))

    fresh = jax.jit(draw)  # traced once so, for its shapes and for itself
    shapes = jax.eval_shape(fresh)
    place = sharding.placed(mesh, shapes)
    steps = {
        kind: step.make_train_step(
            kind, step.network_for(kind, config, shape, mesh), optimizer, config, mesh, place
        )
        for kind in {s.kind for s in stages}
    }
    like = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, place
    )
    more = (like.params,) if config.taught else ()
    sharding.check_memory(mesh, (like, *more), like.params)
    *teacher, taught = starts.taught(config, dataset, mesh, like.params) or ({},)
    return dict(
        dataset=dataset,
        stages=stages,
        network=network,
        mesh=mesh,
        optimizer=optimizer,
        fresh=fresh,
        place=place,
        like=like,
        local_rows=sharding.local_rows(mesh, config.batch_size),
        steps=steps,
        teacher=tuple(teacher),
        taught=taught,
    )


def _started(config: Config, optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    return state.create(params, optimizer, config.ema, config.curriculum)


def _check_same(config: Config, workdir: Path, about: dict[str, Any], guard: Guard) -> None:
    """Raises DmfError, on all processes, where they differ in what decides a step."""
    processes.check_shared(workdir)
    values = [to_dict(replace(config, run=RunConfig())), about, jax.__version__]
    processes.same("config, data or jax", json.dumps(values))
    # A network file system may still show an older file.
    processes.same("guard.json", guard.told())


def _checkpoints(
    config: Config,
    workdir: Path,
    scoreboard: Scoreboard,
    shape: tuple[int, ...],
    about: dict[str, Any],
) -> checkpoint.Checkpoints:
    kept = [0, *(n for n, b in scoreboard.boundaries.items() if b.kept)]
    metadata = {
        "config": to_dict(config),
        "image_shape": list(shape),
        "source": origin(workdir),
        "data": about,
    }

    def also_kept() -> set[int]:
        best = scoreboard.best_step()
        return kept_by_changes(workdir) | (set() if best is None else {best})

    scheduled = partial(_is_scheduled, config, scoreboard)
    keep = config.run.keep_checkpoints
    return checkpoint.Checkpoints(workdir, keep, kept, metadata, also_kept, scheduled)


def _is_scheduled(config: Config, scoreboard: Scoreboard, n: int) -> bool:
    return n % config.run.checkpoint_every_steps == 0 or n in scoreboard.boundaries


def first_state(run: Context) -> TrainState:
    """The state of the newest checkpoint; else config.init's weights, or fresh ones."""
    found = run.checkpoints.restore_latest(run.like)  # one state: a device may not hold two
    if found is not None:
        return found
    if not run.config.init:
        return run.jit(run.fresh)()  # the guard may go back to step 0: they are the same again
    init = run.init or starts.find(run.config, run.dataset)
    if processes.is_first() and (said := starts.described(run.config, init)):
        print(said, flush=True)
    found = run.jit(run.started)(_init_params(run, init))
    # A resumed run starts from these weights, whatever config.init holds by then.
    run.checkpoints.save(0, found, wait=False)
    return found


def _init_params(run: Context, init: starts.Init) -> Any:
    """The weights of config.init. The run that it names may have replaced them meanwhile."""
    config, shape = run.config, run.dataset.image_shape

    def read(folder: Path) -> tuple[Any, str]:
        same = folder == init.folder
        found = init if same else starts.opened(config, run.dataset, folder)
        return starts.weights(config, found, shape, run.mesh, run.like.params), str(folder)

    with processes.together():
        params, taken = manifest.read_newest(config.init, read, init.folder)
    processes.same("checkpoint of config.init", taken)
    return params


class Ahead:
    """Programs that a thread compiles before their first call, in the given order.

    A later call with such arguments finds the program. An error is not told here: the call meets
    it again and tells it.
    """

    def __init__(self, programs: dict[Any, Callable[[], Any]]):
        """programs: what compiles each program, by its name."""
        self._left, self._made = dict(programs), {name: threading.Event() for name in programs}
        # Not a daemon: a process that ends while a daemon compiles would abort.
        threading.Thread(target=self._work, name="compiling").start()

    def _work(self) -> None:
        for name, made in self._made.items():
            try:
                with suppress(DmfError, RuntimeError, TypeError, ValueError):
                    self._left.pop(name, lambda: None)()
            finally:
                made.set()

    def wait(self, name: Any) -> None:
        """Waits while this program is being made. If that has not begun, its call makes it."""
        if self._left.pop(name, None) is None and name in self._made:
            self._made[name].wait()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._left.clear()  # the thread begins no further program


def compile_ahead(run: Context) -> Ahead:
    """Starts to compile the programs ("step", kind) and ("probe", kind), the next ones first.

    The order is wrong only where the newest checkpoint turns out to be damaged.
    """
    n, programs = max(run.checkpoints.complete(), default=0), dict[Any, Callable[[], Any]]()
    batch = run.batch(n) if n < run.total else {}  # of any step: the programs take its shapes

    def make(kind: str, at: int, first: bool) -> None:
        made = run.steps[kind].lower(run.like, batch, run.scalars(at), *run.teacher).compile()
        if first and (line := sharding.memory(run.mesh, made)):
            print(f"memory    {line}", flush=True)

    for stage in run.stages:
        if n < stage.last:
            kind, first = stage.kind, not programs
            programs.setdefault(("step", kind), partial(make, kind, max(n, stage.first), first))
            if run.probe:
                probe = partial(run.probe.compile, kind, run.like.params)
                programs.setdefault(("probe", kind), probe)
    return Ahead(programs)
