"""Compiled programs in a run's directory, for its next start.

jax keeps each program in a file of programs/. It writes them as they come, so that a kill or a full
disk cuts them short. It never replaces one, and does not notice two that are swapped. So the list
sha256sums names each file that is whole: `sha256sum -c sha256sums` reads it too. What it does not
confirm is deleted at the next start, and compiled anew.
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
        listed = sift(folder) if processes.is_first() else {}
    if processes.is_first():
        watch(folder, listed)


def sift(folder: Path) -> dict[str, str]:
    """Deletes what the list does not confirm; returns the digests of the others by name."""
    if not folder.is_dir():
        return {}
    entries, listed = sorted(folder.glob(ENTRIES)), _listed(folder)
    good = {}
    for path in entries:
        with suppress(OSError):
            if path.name in listed and paths.sha256(path) == listed[path.name]:
                good[path.name] = listed[path.name]
            else:
                path.unlink()
    with suppress(OSError):
        paths.write(folder / LIST, "".join(f"{x}  {name}\n" for name, x in good.items()))
    if len(good) < len(entries):
        bad = len(entries) - len(good)
        log.warning("%s: %d of %d programs are not whole, and made anew", folder, bad, len(entries))
    return good


def _listed(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / LIST).read_text(errors="replace").splitlines()
    except OSError:
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def watch(folder: Path, listed: dict[str, str]) -> None:
    """From now on lists what jax writes, and deletes what it cannot read or write, told once."""
    told: list[str] = []

    def note(event: str, duration: float, **_: Any) -> None:
        if event != COMPILED:
            return
        for path in folder.glob(ENTRIES):
            if path.name not in listed:
                with suppress(OSError):
                    listed[path.name] = paths.sha256(path)
                    paths.append(folder / LIST, f"{listed[path.name]}  {path.name}\n")

    def show(message: Any, *rest: Any) -> None:
        found = re.fullmatch(FAILED, str(message), re.DOTALL)
        if not found:
            return before(message, *rest)
        # The warning names no file, only what all files of this function begin with.
        for path in folder.glob(f"{glob.escape(found[1])}-{ENTRIES}"):
            listed.pop(path.name, None)
            with suppress(OSError):
                path.unlink()
        if not told:
            log.warning("%s: a program is not kept: %s", folder, " ".join(found[2].split())[:200])
        told.append(found[1])

    before = warnings.showwarning
    warnings.showwarning = show
    warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation")
    jax.monitoring.register_event_duration_secs_listener(note)
