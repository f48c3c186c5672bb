"""Compiled programs in a run's directory, for its next start.

jax keeps each program in a file of programs/. It writes them as they come, so that a kill or a full
disk cuts them short. It never replaces one, and does not notice two that are swapped. So the list
sha256sums names the files that are whole. What it does not confirm is deleted at the next start,
and compiled anew.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from dmf import processes
from dmf.errors import DmfError
from dmf.run.workdir import LOCK
from dmf.storage import paths

FOLDER, LIST = "programs", "sha256sums"
# jax's own names: the event after a program was compiled or found, its warning, its files.
COMPILED = "/jax/core/compile/backend_compile_duration"
FAILED = r"Error (?:reading|writing) persistent compilation cache entry for '(.+?)': (.*)"
ENTRIES = "*-cache"
log = logging.getLogger(__name__)


def keep(workdir: Path) -> None:
    """Keeps compiled programs in the work directory. Raises DmfError where a file is in the way."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # which names another place
        return
    folder = paths.absolute(workdir) / FOLDER
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Without it the folder's path is part of each program's key, so a moved directory would
    # compile everything again.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if paths.is_bucket(workdir):  # objects are written whole
        return
    with processes.together():
        paths.check_folder(folder)
        if processes.is_first():
            # Where another run holds the directory, this one is about to be refused.
            with suppress(DmfError, OSError), paths.alone(workdir / LOCK, "in use"):
                sift(folder)
            watch(folder)


def sift(folder: Path) -> None:
    """Deletes the programs that the list does not confirm, and says how many. Raises OSError."""
    entries, listed, good = sorted(folder.glob(ENTRIES)), _listed(folder), {}
    for path in entries:
        digest = paths.sha256(path) if path.name in listed else None
        if digest and digest == listed[path.name]:
            good[path.name] = digest
        else:
            path.unlink()
    if len(good) < len(entries):
        bad = f"{len(entries) - len(good)} of {len(entries)}"
        log.warning("%s: %s programs are altered or not in %s; made anew", folder, bad, LIST)
        paths.write(folder / LIST, "".join(f"{x}  {name}\n" for name, x in good.items()))


def _listed(folder: Path) -> dict[str, str]:
    """The last digest of each name in the list. A line that a kill has cut names nothing."""
    try:
        lines = (folder / LIST).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def watch(folder: Path) -> None:
    """From now on lists what jax writes, and deletes what it cannot read or write, told once."""
    known = {path.name: path.stat().st_size for path in folder.glob(ENTRIES)}
    told: list[str] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event != COMPILED:
            return
        for path in folder.glob(ENTRIES):
            with suppress(OSError):
                # Another thread may be writing it. It grows then, and is listed once more.
                size = path.stat().st_size
                if known.get(path.name) != size:
                    paths.append(folder / LIST, f"{paths.sha256(path)}  {path.name}\n")
                    known[path.name] = size

    def show(message: Any, *rest: Any, **more: Any) -> None:
        found = re.fullmatch(FAILED, str(message), re.DOTALL)
        if not found:
            return before(message, *rest, **more)
        # The warning names the function alone, with which the names of its files begin.
        for path in folder.glob(f"{glob.escape(found[1])}-{ENTRIES}"):
            known.pop(path.name, None)
            with suppress(OSError):
                path.unlink()
        if not told:
            told.append(found[2])
            log.warning("%s: a program is not kept: %s", folder, " ".join(found[2].split())[:200])

    before = warnings.showwarning
    warnings.showwarning = show
    warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation")
    jax.monitoring.register_event_duration_secs_listener(note)
