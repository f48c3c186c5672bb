"""What a work directory says of its run: config, data, and the origin of its first weights.

starts.jsonl has a line per start: time, step, command, code, libraries and devices.
changes.jsonl has a line per change of the config by --allow_change, with the config before it.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from dmf import processes
from dmf.config import Config, differences, parse, to_dict
from dmf.errors import DmfError
from dmf.method.objectives import AUTO, KINDS
from dmf.storage import checkpoint, paths, records
from dmf.storage.manifest import steps_in

CONFIG, ORIGIN, DATA = "config.json", "origin.json", "data.json"
STARTS, CHANGES = "starts.jsonl", "changes.jsonl"
KEPT = "what dmf wrote there, which names checkpoints to keep"
CHANGE = {"kept": [records.COUNT]}  # what is read again of a line of CHANGES
LOCK = ".lock"
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
SOURCE = Path(__file__).parents[2]  # the checkout
# These may change. Data and flow model may have moved, and a resumed run reads no flow model.
FREE = (
    "config.run.",
    "config.data.data_dir:",
    "config.init:",
    "config.init_labels:",
    "config.guard.every_steps:",
    "config.guard.rows:",
)
# How a step is computed: it changes values by rounding only, and the devices may be others.
COMPUTED = (
    "config.mesh.",
    "config.attention.",
    "config.remat:",
    "config.scan_blocks:",
    "config.rows:",
)
# What no flag lets through, and why. Of SWITCHES only turning them on or off is refused,
# of INTERVAL only a change to or from adaptive, of CURRICULUM only one that makes a second network.
OPTIMIZER = "the optimiser's state on disk has other parts"
FIXED = {
    "config.network.": "the weights on disk are those of this network",
    "config.data.name:": "the weights have seen these data",
    "config.data.holdout_fraction:": "the weights have seen these data",
    "config.data.mock:": "the weights have seen these data",
    "config.ema.halflife_images:": "the averages on disk have these half-lives",
    "config.optimizer.clip_norm:": OPTIMIZER,
    "config.optimizer.weight_decay:": OPTIMIZER,
    "config.curriculum.interval:": "the state on disk has a table of intervals for adaptive, "
    "and none for any other",
    "config.curriculum.kinds:": "the state on disk has a second network for stages that train one, "
    "and none for any other",
    "data.": "the weights have seen these data",
}
SWITCHES = ("config.optimizer.clip_norm", "config.optimizer.weight_decay")
INTERVAL = "config.curriculum.interval"
CURRICULUM = "config.curriculum.kinds"
RECTIFYING = [repr(name) for name, kind in KINDS.items() if kind.second]
log = logging.getLogger(__name__)


@contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Makes the work directory, and keeps other runs out of it until the block is left.

    A bucket has no lock (`dmf.storage.paths`). Raises DmfError, on all processes of this run, where
    another run holds the directory, it cannot be written, or Orbax would lose what it writes there.
    """
    paths.check_plain(workdir)
    paths.check_folder(workdir / checkpoint.FOLDER)
    new = processes.is_first() and not workdir.exists()
    with ExitStack() as lock:
        with processes.together():
            if processes.is_first():
                with paths.writing(f"--workdir={workdir}"):
                    paths.make(workdir)
                    taken = (
                        f"--workdir={workdir} is in use by another process; expected one at a "
                        "time, or another directory"
                    )
                    lock.enter_context(paths.alone(workdir / LOCK, taken))
        try:
            yield
        except BaseException:
            # A refused run leaves nothing behind. In a bucket it has not even made a folder.
            if new and not paths.is_bucket(workdir) and os.listdir(workdir) == [LOCK]:
                (workdir / LOCK).unlink()
                workdir.rmdir()
            raise


def claim(
    workdir: Path,
    config: Config,
    origin: dict[str, Any] | None,
    about: dict[str, Any],
    fresh: bool,
    allow_change: bool = False,
    forget: Iterable[str] = (),
) -> None:
    """Makes the work directory and ties it to config and data.

    Args:
        origin: where the weights of config.init came from, if they were converted.
        about: `data.identity` of the data.
        fresh: the directory holds no run yet.
        allow_change: takes another config, unless the state on disk does not fit it. The config
            becomes the directory's by `note_change`.
        forget: files of a run before that a fresh run must not find.

    Raises DmfError where the directory holds another run's checkpoints, and where the layout of
    the rows is not decided.
    """
    if config.rows == AUTO:
        raise DmfError(
            f"config.rows = {AUTO!r}: expected split, joint or whole; main.py decides it by "
            "dmf.measure.layout.settled"
        )
    mine = to_dict(config)
    with paths.writing(f"--workdir={workdir}"):
        paths.make(workdir)
        if fresh:
            _begin(workdir, {ORIGIN: origin, DATA: about, CONFIG: mine}, forget)
    theirs = _stored(workdir)
    seen = records.read(workdir / DATA, dict) if (workdir / DATA).is_file() else about
    _refuse(workdir, changes(theirs, mine) + differences(seen, about, "data"), allow_change)


def _begin(workdir: Path, files: dict[str, Any], forget: Iterable[str]) -> None:
    """Writes the files of a fresh run, and deletes those of a run before. None: no file."""
    for old in (ORIGIN, CHANGES, *forget):
        (workdir / old).unlink(missing_ok=True)
    for name, values in files.items():
        if values is not None:
            _write(workdir / name, values)


def _refuse(workdir: Path, changed: list[str], allow_change: bool) -> None:
    """Raises DmfError where a run may not go on with these changes."""
    fixed = [f"{d} ({reason})" for d in changed for reason in [_why_fixed(d)] if reason]
    if fixed and allow_change:
        raise DmfError(
            f"--allow_change does not go as far as {'; '.join(fixed)}; expected another directory "
            "for such a run"
        )
    if changed and not allow_change:
        raise DmfError(
            f"--workdir={workdir} holds a run with another config: {'; '.join(changed)}; expected "
            "the same config, or another directory"
            + ("" if fixed else ", or --allow_change to go on with this one from here")
        )


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences of two configs that change a run; in the words of `config.differences`."""
    return [d for d in differences(old, new) if not d.startswith((*FREE, *COMPUTED))]


def _why_fixed(difference: str) -> str:
    """Why no run can go on with this difference, "" where one can."""
    name, _, values = difference.partition(": ")
    both = values.split(" -> ")
    if (
        name in SWITCHES
        and 0.0 not in map(float, both)
        or name == INTERVAL
        and "adaptive" not in both
        or name == CURRICULUM
        and len({any(k in old for k in RECTIFYING) for old in both}) == 1
    ):
        return ""
    return next((reason for start, reason in FIXED.items() if difference.startswith(start)), "")


def note_change(workdir: Path, step: int, config: Config) -> None:
    """Makes `config` the directory's, where it is another one; notes and prints the change.

    step: the last step that was taken with the config before. The checkpoints that are on disk by
    then are kept for good (`kept_by_changes`).
    """
    theirs, mine = _stored(workdir), to_dict(config)
    changed = changes(theirs, mine)
    if not changed:
        return
    folder = workdir / checkpoint.FOLDER
    kept = sorted(
        n
        for n in steps_in(folder)
        if n <= step and (folder / str(n) / checkpoint.MANIFEST).exists()
    )
    row = {"utc": utc(), "step": step, "changed": changed, "kept": kept, "before": theirs}
    append(workdir / CHANGES, records.sealed(row))
    with paths.writing(workdir / CONFIG):
        _write(workdir / CONFIG, mine)  # last: a start before it refuses or makes the change again
    print(f"changed   after step {step}: {'; '.join(changed)}", flush=True)


def kept_by_changes(workdir: Path) -> set[int]:
    """Steps of the checkpoints that were there when the config was changed.

    They hold the boundaries from before, and the way back. Raises DmfError for a damaged file.
    """
    path = workdir / CHANGES
    found = records.lines(path, CHANGE)
    if path.exists() and not found:
        raise DmfError(f"{path} is empty; expected {KEPT}")
    kept: set[int] = set()
    for line, after in itertools.zip_longest(found, found[1:]):
        where = f"{path} line {line.number}"
        if not line.fault:
            kept.update(records.unsealed(line.value, where)["kept"])
        elif after is None or not _again(line.content, after.content):
            raise DmfError(f"{where}: {line.fault}; expected {KEPT}")
    return kept


def _again(torn: bytes, after: bytes) -> bool:
    """Whether a line is the next one up to where a kill has cut it. Their times may differ."""
    cut, first, last = torn.rstrip(b"\n"), len('{"utc": "'), len('{"utc": "' + utc())
    return cut[:first] == after[: len(cut)][:first] and cut[last:] == after[last : len(cut)]


def layout(workdir: Path) -> str:
    """The layout of the rows that the run in a directory began with, "" without a checkpoint."""
    begun = steps_in(workdir / checkpoint.FOLDER)
    return str(_stored(workdir)["rows"]) if begun else ""


def _stored(workdir: Path) -> dict[str, Any]:
    """The directory's config as plain values. New fields have their defaults."""
    path = workdir / CONFIG
    stored = records.read(path, dict, "what dmf wrote there, beside the checkpoints")
    try:
        return to_dict(parse(checkpoint.without_kernel(stored)))
    except DmfError as error:
        raise DmfError(f"{path}: {error}") from error


def _write(path: Path, values: Any) -> None:
    paths.write(path, json.dumps(values, indent=2) + "\n")


def origin(workdir: Path) -> dict[str, Any] | None:
    """What was written beside the weights that the run started from, if they were converted."""
    path = workdir / ORIGIN
    return records.read(path, dict) if path.is_file() else None


def note_start(workdir: Path, step: int, config: Config) -> None:
    """Appends a line to starts.jsonl; it holds no environment variable. step: where it starts."""
    devices = jax.devices()
    kinds = [device.device_kind for device in devices]
    row = {
        "utc": utc(),
        "step": step,
        "command": shlex.join(sys.orig_argv),
        "git": revision(SOURCE),
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: metadata.version(name) for name in LIBRARIES},
        "platform": devices[0].platform,
        "devices": [f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds))],
        "processes": jax.process_count(),
        "differs": differences(_stored(workdir), to_dict(config)),
    }
    append(workdir / STARTS, row)


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds a line of JSON to a file; one that a kill or a full disk has cut is replaced by it."""
    found = records.lines(path, dict)
    with paths.writing(path):
        if found and records.is_torn(found[-1]):
            log.warning("%s line %d was cut off and is left out", path, found[-1].number)
            paths.write(path, b"".join(line.content for line in found[:-1]))
        elif found and not found[-1].content.endswith(b"\n"):
            paths.append(path, "\n")
        paths.append(path, json.dumps(row) + "\n")


def utc() -> str:
    """Now, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def revision(source: Path) -> dict[str, Any]:
    """The commit of the code in `source`, and whether files differ from it.

    It is "unknown" where `source` is not in a git repository, or the repository is another one's.
    """
    options: dict[str, Any] = dict(
        cwd=source, capture_output=True, text=True, check=True, timeout=20
    )
    try:
        top, commit, changed = (
            subprocess.run(["git", "--no-optional-locks", *args], **options)
            for args in (
                ("rev-parse", "--show-toplevel"),
                ("rev-parse", "HEAD"),
                ("status", "--porcelain"),
            )
        )
        inside = Path(top.stdout.strip()).samefile(source)
    except (OSError, subprocess.SubprocessError):
        inside = False
    return (
        {"revision": commit.stdout.strip(), "dirty": bool(changed.stdout.strip())}
        if inside
        else {"revision": "unknown"}
    )
