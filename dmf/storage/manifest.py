"""Which step folders there are, and the manifest of each: size and SHA-256 of every file.

It is written last and whole, so a folder without it is an unfinished save. It holds no checksum of
itself. Instead its bytes must be exactly what this file writes for the files that it names.
The digests of all other files are made here too.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dmf.errors import DmfError, short
from dmf.storage import paths, records

MANIFEST = "manifest.json"
FOLDER = "checkpoints"  # of a work directory
BEST = "best.json"  # in a work directory: the step of the best score so far
BEST_FORM = {"step": records.COUNT}
REPLACED = 20  # how often a reader starts again beside a run that replaces its checkpoints
T = TypeVar("T")
log = logging.getLogger(__name__)


def steps_in(folder: Path) -> list[int]:
    """The steps that name step folders in a folder of checkpoints, the newest first."""
    found = (step_of(path.name) for path in folder.glob("[0-9]*"))
    return sorted((n for n in found if n is not None), reverse=True)


def step_of(name: str) -> int | None:
    """The step that names a step folder, None for any other name."""
    # Other scripts have digits too: "\u00b2".isdigit() holds, and int("\u0663") is 3.
    if not name.isascii() or not name.isdecimal() or str(int(name)) != name:
        return None
    return int(name)


def lacking(folder: Path) -> str:
    """Why a step folder cannot be read as a whole; "" where its manifest can be seen."""
    try:
        if (folder / MANIFEST).is_file():
            return ""
    except OSError as error:  # no right to look inside
        return paths.reason(error)
    return f"no {MANIFEST}, so its save was not completed"


def read_newest(path: str | Path, read: Callable[[Path], T], first: Path | None = None) -> T:
    """read(step folder) of what `path` means, also while a run replaces its checkpoints.

    A run may remove a folder between the choice and the end of the read. The newest one is then
    read in its place. An error of a folder that is still the newest is raised.
    first: the folder to begin with, None for the one that `find` gives.
    """
    folder = first or find(path)
    for _ in range(REPLACED):
        try:
            return read(folder)
        except DmfError:
            now = find(path)
            if now == folder:
                raise
            folder = now
    what = f"checkpoint {path}: {REPLACED} times a run removed what was being read"
    raise DmfError(f"{what}; expected a run that saves less often, or a copy of its step folder")


def find(path: str | Path) -> Path:
    """The step folder that `path` means.

    It is `path` itself, or the newest complete one in a work directory or its checkpoints folder.
    WORKDIR/best means the one with the best score. Raises DmfError.
    """
    place = paths.reach(paths.at(path))
    try:
        return _find(place)
    except OSError as error:
        what = f"checkpoint {place}: {paths.reason(error)}"
        raise DmfError(f"{what}; expected a folder that may be read") from error


def _find(path: Path) -> Path:
    if path.name == "best" and not path.exists():
        path = path.parent / FOLDER / str(_best_step(path.parent))
    if not path.exists():
        what = f"checkpoint {path}: no such file or directory"
        raise DmfError(f"{what}; expected a work directory or one of its step folders")
    if (path / "params").is_dir():
        return path
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    for found in (folder / str(step) for step in steps_in(folder)):
        why = lacking(found)
        if not why:
            return found
        if MANIFEST not in why:
            log.warning("checkpoint %s: %s; the one before it is taken", found, why)
    what = "a step folder with an item 'params', or a work directory that holds one"
    raise DmfError(f"checkpoint {path}: expected {what}")


def _best_step(workdir: Path) -> int:
    return records.read(workdir / BEST, BEST_FORM, "a run that has been scored")["step"]


def write_manifest(folder: Path) -> None:
    """Completes a step folder with the path, size and SHA-256 of every file in it."""
    paths.write(folder / MANIFEST, _as_text(_contents(folder)))


def verify(folder: Path) -> None:
    """Raises DmfError that names the first missing, cut or altered file of a step folder.

    The manifest is checked too.
    """
    path = folder / MANIFEST
    try:
        expected = records.read(path, {...: [(int, str)]}, "a folder that was saved to its end")
        same = path.read_bytes() == _as_text(expected).encode()
    except (DmfError, OSError) as error:
        raise DmfError(f"checkpoint {folder}: {error}") from error
    if not expected or not same:
        raise DmfError(
            f"checkpoint {folder}: {MANIFEST} is altered; expected it as dmf has written it"
        )
    try:
        found = _contents(folder)
    except OSError as error:
        raise DmfError(
            f"checkpoint {folder}: {short(error)}; expected files that can be read"
        ) from error
    for name, listed in expected.items():
        if name not in found:
            what = f"checkpoint {folder}: file {name} is missing"
            raise DmfError(f"{what}; expected it with size and SHA-256 {listed}")
        if found[name] != listed:
            what = f"file {name} has {found[name][0]} bytes and another checksum"
            raise DmfError(f"checkpoint {folder}: {what}; expected size and SHA-256 {listed}")


def digest(folder: Path) -> str:
    """The SHA-256 of a step folder's manifest, which stands for all its files. Raises DmfError."""
    try:
        return paths.sha256(folder / MANIFEST)
    except OSError as error:
        what = f"checkpoint {folder}: {MANIFEST}: {paths.reason(error)}"
        raise DmfError(f"{what}; expected a folder that stays while it is read") from error


def _as_text(contents: Any) -> str:
    return json.dumps(contents, indent=1) + "\n"


def _contents(folder: Path) -> dict[str, list[Any]]:
    files = [p for p in paths.files(folder) if not p.name.startswith(MANIFEST)]
    found: dict[str, list[Any]] = {}
    for path in files:
        try:
            found[path.relative_to(folder).as_posix()] = [paths.size(path), paths.sha256(path)]
        except OSError as error:  # it may not name the file
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    return found


def sha256_of_weights(path: str | Path) -> str:
    """The SHA-256 of a local file; for a folder, of the names and digests of its files.

    Raises DmfError where it cannot be read.
    """
    place = Path(path)
    try:
        if not place.is_dir():
            return paths.sha256(place)
        names = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
        lines = [f"{paths.sha256(place / name)}  {name}\n" for name in names]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    except OSError as error:
        raise DmfError(f"{path}: cannot be read ({error}); expected a readable file") from error
