"""Files and folders that are there whole or not at all: made beside their place under a hidden name, and renamed at the end.

The hidden name ends in the host and the number of the process, as not every file system has locks: another process writes
elsewhere, and what dead ones of this machine left can be told from what is at work. A bucket needs none of it: `dmf.storage.paths`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 50  # looks, a tenth of a second apart, for what a thread still writes into a folder that is to go


def partial(place: Path) -> Path:
    """Where this process makes what is to become `place`."""
    return place.with_name(f".{place.name}.partial-{socket.gethostname()}-{os.getpid()}")


@contextmanager
def made(place: Path) -> Iterator[Path]:
    """A path to make a file or a folder at, which becomes `place` if the block ends well and is removed if it does not.

    What dead processes of this machine left of the same place is removed too. Raises OSError where the disk does not do.
    """
    try:
        clear(place.parent, place.name)
        yield partial(place)
        partial(place).replace(place)
    finally:
        clear(place.parent, place.name)


def clear(folder: Path, name: str = "") -> None:
    """Removes what this process, and dead ones of this machine, left unfinished in a folder. Raises OSError.

    name: of one place in it, "" for all. Orbax's own temporary folders beside ours go with them; its threads may still write
    for a moment.
    """
    of = re.escape(name) if name else ".+"
    known = re.compile(
        rf"\.{of}\.partial-{re.escape(socket.gethostname())}-(\d+)(\.orbax-checkpoint-tmp)?"
    )
    for _ in range(PATIENCE):
        matches = [(path, known.fullmatch(path.name)) for path in folder.iterdir()]
        found = [
            path
            for path, match in matches
            if match and (int(match[1]) == os.getpid() or not _alive(int(match[1])))
        ]
        for path in found:
            _remove(path)
        if not any(path.is_dir() for path in found):
            return
        time.sleep(0.1)


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Whether a process of this number is at work, ours or somebody else's."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True
