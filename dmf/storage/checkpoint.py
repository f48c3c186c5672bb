"""Checkpoints: the training state on disk, through Orbax.

A checkpoint is a step folder with four items: `params`, `ema`, `opt_state` and `step`. A curriculum
that keeps a table adds a fifth, `intervals`. One that trains a second network adds `second`.
Its metadata hold the whole config of the run, so weights can be read without the optimiser.
Orbax writes into a temporary folder and renames it. What it wrote is read back. The manifest, with
size and SHA-256 of every file, comes last. A folder without its manifest is an unfinished save, and
one that does not match it is damaged. Neither is ever loaded.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dmf import processes
from dmf.errors import DmfError, short
from dmf.logging import quieten
from dmf.storage import atomic, paths, records
from dmf.storage.manifest import BEST as BEST
from dmf.storage.manifest import BEST_FORM as BEST_FORM
from dmf.storage.manifest import FOLDER as FOLDER
from dmf.storage.manifest import MANIFEST as MANIFEST
from dmf.storage.manifest import find as find
from dmf.storage.manifest import lacking, steps_in, verify, write_manifest

if TYPE_CHECKING:
    from dmf.state import TrainState

ITEMS = ("params", "ema", "opt_state", "step")
OPTIONAL = ("intervals", "second")  # not every run has one
SLICE = 2**22  # bytes: of larger arrays that all devices hold, each device writes a slice
NEWEST = 200  # complete checkpoints that are tried, one after the other
ABOUT = {  # what stands beside the weights
    "config": records.Maybe(dict),
    "network": records.Maybe(dict),
    "image_shape": records.Maybe([records.POSITIVE]),
    "source": records.Maybe((dict, None)),
    "data": records.Maybe(dict),
}
COMMITTED = "commit_success.txt"  # Orbax looks whether it is there, and writes its own path into it
log = logging.getLogger(__name__)


class _Kept:
    """Orbax's interface of a policy: keeps the steps that `kept` names at the moment."""

    def __init__(self, kept: Callable[[], Collection[int]]):
        self._kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        kept = self._kept()
        return [found.step in kept for found in checkpoints]


class Checkpoints:
    """The checkpoints of one run. Stage boundaries are kept for good, and the newest good ones.

    - keep: how many of the newest are kept.
    - besides: gives more steps to keep at the moment, such as the step of the best score.
    - scheduled: whether a save is due after a step. A save that is not due, because a run was
      asked to stop, replaces no other.
    """

    def __init__(
        self,
        workdir: Path,
        keep: int,
        boundaries: Sequence[int],
        metadata: dict[str, Any],
        besides: Callable[[], Collection[int]] = tuple,
        scheduled: Callable[[int], bool] = lambda step: True,
    ):
        self.directory = workdir / FOLDER
        self._metadata, self._besides, self._scheduled = metadata, besides, scheduled
        self._keep, self._boundaries = keep, frozenset(boundaries)
        self._kept: frozenset[int] = frozenset()
        self._damaged: set[int] = set()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        quieten()
        with paths.writing(self.directory):
            paths.make(self.directory)
        self._checkpointer = ocp.training.Checkpointer(
            paths.absolute(self.directory),
            preservation_policy=_Kept(lambda: self._kept),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # reads no step's own files, which may be damaged
        )

    def save(self, step: int, state: TrainState, wait: bool = True) -> None:
        """Writes the state after `step` steps and returns when it is safe on disk.

        Without `wait` it returns once the state is copied, and steps may go on. The method `wait`
        then tells when the save is done.
        """
        self.wait()
        items = _items(state)
        self._kept = self._boundaries | set(
            json.loads(processes.first_says(json.dumps(self._worth_keeping(step))))
        )
        with self._one_sentence(step), _saving():
            written = self._checkpointer.save_checkpointables_async(
                step, items, force=True, overwrite=True, custom_metadata=self._metadata
            )
        like = {name: _abstract(item) for name, item in items.items()}
        self._pending = step, self._thread.submit(self._complete_save, step, written, like)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is safe on disk. Raises DmfError where it failed."""
        if self._pending is not None:
            (step, completed), self._pending = self._pending, None
            with self._one_sentence(step), processes.together():
                completed.result()

    def _complete_save(self, step: int, written: Any, like: dict[str, Any]) -> None:
        written.result()
        if processes.is_first():
            seal(self.directory / str(step), like)

    @contextmanager
    def _one_sentence(self, step: int) -> Iterator[None]:
        try:
            yield
        except paths.failures(self.directory) as error:
            what = f"checkpoint of step {step} could not be written to {self.directory}"
            rest = "checkpoints of other steps are untouched; expected a writable directory with"
            raise DmfError(f"{what}: {paths.reason(error)}; {rest} enough room") from error

    def restore_latest(self, state: TrainState) -> TrainState | None:
        """The newest readable state, placed like `state`; None where no save was ever completed.

        A damaged newest folder is named, and the one before it is taken. Raises DmfError if there
        are complete saves and none can be read, as a fresh start would overwrite them.
        """
        steps = json.loads(processes.first_says(json.dumps(self._complete()[:NEWEST])))
        target = {name: _abstract(item) for name, item in _items(state).items()}
        for step in steps:
            folder = self.directory / str(step)
            try:
                with processes.together():
                    if processes.is_first():
                        verify(folder)
                with processes.together():
                    return type(state)(**_load(folder, target))
            except DmfError as error:
                log.warning("%s; it is skipped", error)
                self._damaged.add(step)
        if steps:
            what = f"{self.directory}: none of the checkpoints of steps {steps} can be read"
            wanted = "at least one intact step folder, or none to start afresh"
            raise DmfError(f"{what}; expected {wanted}")
        return None

    def _complete(self) -> list[int]:
        """Steps whose save was completed, the newest first."""
        if not processes.is_first():
            return []
        found = self.complete()
        for step in sorted(set(steps_in(self.directory)) - set(found)):
            folder = self.directory / str(step)
            log.warning("checkpoint %s: %s; it is skipped", folder, lacking(folder))
        return found

    def complete(self) -> list[int]:
        """Steps of the folders with a manifest, the newest first."""
        return [n for n in steps_in(self.directory) if not lacking(self.directory / str(n))]

    def _worth_keeping(self, step: int) -> list[int]:
        """The step about to be saved, the newest good ones, and the steps that the run asks for.

        A damaged one, or one without manifest, does not count. If only such ones were left, a kill
        before the manifest of `step` would leave nothing to load.
        """
        if not processes.is_first():
            return []
        good = [n for n in self.complete() if n not in self._damaged | {step}]
        scheduled = [n for n in good if self._scheduled(n)]
        return [step, *good[:1], *scheduled[: self._keep - self._scheduled(step)], *self._besides()]

    def close(self) -> None:
        """Ends a save that is being written. A failed save is logged: the run reports its error."""
        try:
            self.wait()
        except DmfError as error:
            log.warning("%s", error)
        self._thread.shutdown()
        with suppress(*paths.failures(self.directory)):  # Orbax repeats that of the last save
            self._checkpointer.close()


def seal(folder: Path, items: dict[str, Any]) -> None:
    """Completes a step folder that Orbax has written: reads it back, then writes the manifest.

    items: what was to be saved, as shapes and types of arrays. Raises DmfError where the folder
    holds something else. The values of one small array of each item are read too, unless there are
    several processes: the first one reads alone here, and Orbax loads on all of them together.
    """
    try:
        found = ocp.checkpointables_metadata(paths.absolute(folder)).metadata
        for name, item in items.items():
            if differs := _difference(found[name], item):
                raise ValueError(f"in {name}, {differs}")
        if not processes.several():
            small = {name: _smallest(found[name]) for name in items}
            ocp.load_checkpointables(paths.absolute(folder), small)
    except Exception as error:  # the errors of Orbax have no common base
        what = f"checkpoint {folder} was written but cannot be read back: {short(error)}"
        wanted = "what was saved; this save does not count, and older ones are untouched"
        raise DmfError(f"{what}; expected {wanted}") from error
    for place in (folder, *(folder / name for name in items)):
        if (place / COMMITTED).exists():
            # It named the host, the process and the path, in folders that people share.
            (place / COMMITTED).write_text("saved\n")
    write_manifest(folder)


def _smallest(tree: Any) -> Any:
    """A target of Orbax that reads the smallest array of a tree and no other."""
    leaves, structure = jax.tree.flatten(tree)
    least = min(leaves, key=lambda x: math.prod(x.shape))
    wanted = [np.zeros(x.shape, x.dtype) if x is least else ocp.PLACEHOLDER for x in leaves]
    return jax.tree.unflatten(structure, wanted)


def _saving() -> ocp.Context:
    """How arrays are written. Small slices cost more, in compiled programs, than they save."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = SLICE
    return context


def _items(state: TrainState) -> dict[str, Any]:
    """The parts of a state that are saved, by name. An optional part without arrays is left out."""
    optional = {name: getattr(state, name) for name in OPTIONAL}
    return {name: getattr(state, name) for name in ITEMS} | {
        k: x for k, x in optional.items() if jax.tree.leaves(x)
    }


def _load(folder: Path, target: dict[str, Any]) -> dict[str, Any]:
    with _readable(folder, f"the items {', '.join(target)}"):
        return ocp.load_checkpointables(paths.absolute(folder), target)


@contextmanager
def _readable(folder: Path, wanted: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the errors of Orbax have no common base
        what = f"checkpoint {folder} cannot be read: {short(error)}"
        raise DmfError(f"{what}; expected {wanted}") from error


def metadata(folder: Path) -> dict[str, Any]:
    """The run's config and image shape, from beside the weights. Verifies the folder first."""
    quieten()
    verify(folder)
    with _readable(folder, "metadata"):
        found = ocp.metadata(paths.absolute(folder)).custom_metadata
    if not isinstance(found, dict) or not {"config", "network"} & set(found):
        what = f"checkpoint {folder}: no config in its metadata"
        raise DmfError(f"{what}; expected a checkpoint that dmf has written")
    records.check(found, ABOUT, f"checkpoint {folder}: its metadata")
    if "config" in found:
        found = {**found, "config": without_kernel(found["config"])}
    return found


def without_kernel(config: dict[str, Any]) -> dict[str, Any]:
    """A stored config without network.attention, which older versions kept with the weights."""
    network = config.get("network") if isinstance(config, dict) else None
    if not isinstance(network, dict) or "attention" not in network:
        return config
    return {**config, "network": {k: v for k, v in network.items() if k != "attention"}}


def save_weights(
    folder: Path, params: Any, metadata: dict[str, Any], files: dict[str, str]
) -> None:
    """Writes weights alone as a step folder, with `files`, {name: text}. Whole or not at all."""
    place = paths.check_free(folder)
    quieten()
    try:
        with atomic.made(place) as partial:
            ocp.save_checkpointables(partial, {"params": params}, custom_metadata=metadata)
            for name, text in files.items():
                (partial / name).write_text(text)
            seal(partial, {"params": jax.eval_shape(lambda: params)})
            if place.exists():
                place.rmdir()
    except (OSError, ValueError) as error:
        what = f"{folder} could not be written: {paths.reason(error)}"
        raise DmfError(f"{what}; expected a writable directory with room") from error


def read_params(folder: Path, ema: int | None, like: Any) -> Any:
    """Weights of one checkpoint, placed like the abstract tree `like`: shape, dtype and sharding.

    ema: which of its EMAs, None for the raw weights.
    Raises DmfError that names the first leaf that does not fit. `metadata` verifies the folder.
    """
    item = "params" if ema is None else "ema"
    with _readable(folder, item):
        items = ocp.checkpointables_metadata(paths.absolute(folder)).metadata
    if items.get(item) is None:
        what = f"checkpoint {folder} holds no {item}, or none that can be read"
        raise DmfError(f"{what}; expected one that a run has written")
    stored = items[item]
    _check_like(stored if ema is None else stored[ema], like, folder)
    if ema is None:
        return _load(folder, {item: like})[item]
    return _load(folder, {item: [_with_sharding(tree, like) for tree in stored]})[item][ema]


def _check_like(stored: Any, like: Any, folder: Path) -> None:
    if differs := _difference(stored, like):
        count = len(jax.tree.leaves(like))
        what = f"checkpoint {folder}: {differs}"
        raise DmfError(f"{what}; expected the {count} weights of config.network")


def _difference(stored: Any, like: Any) -> str:
    """The first array that differs in name, shape or type; "" where all are alike."""
    found, wanted = _by_name(stored), _by_name(like)
    for name in [*wanted, *found]:
        if name not in found or name not in wanted:
            return f"it {'lacks' if name not in found else 'has an unexpected'} weight {name}"
    for name, w in wanted.items():
        f = found[name]
        if tuple(f.shape) != tuple(w.shape) or f.dtype != w.dtype:
            return f"weight {name} is {f.dtype}{list(f.shape)}, not {w.dtype}{list(w.shape)}"
    return ""


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _with_sharding(stored: Any, like: Any) -> Any:
    return jax.tree.map(
        lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w.sharding), stored, like
    )


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
