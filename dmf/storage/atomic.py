"""Files and folders that are there whole or not at all.

They are made beside their place under a hidden name, and renamed at the end. The hidden name ends
in the host and the number of the process, as not every file system has locks. So another process
writes elsewhere, and leftovers of dead processes of this machine can be told from work in progress.
A bucket replaces objects whole by itself: see `dmf.storage.paths`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_begun: list[Path] = []  # what this process makes at the moment
_beginning = threading.Lock()
ORBAX = ".orbax-checkpoint-tmp"  # at the end of its temporary folders
PATIENCE = 50  # tries, 0.1 s apart, to remove a folder into which a thread still writes


def partial(place: Path) -> Path:
    """Where this process makes what is to become `place`."""
    return place.with_name(f".{place.name}.partial-{socket.gethostname()}-{os.getpid()}")


def room() -> int:
    """How many bytes the name of a place may have. The name of unfinished work is longer."""
    return 256 - len(os.fsencode(partial(Path("x")).name + ORBAX))


@contextmanager
def made(place: Path) -> Iterator[Path]:
    """A path at which to make a file or a folder. It becomes `place` if the block ends well.

    Otherwise it is removed. Leftovers of dead processes of this machine, for the same place, are
    removed too. Raises OSError where the disk fails.
    """
    with _beginning:
        _begun.append(place)
    try:
        clear(place.parent, place.name)
        yield partial(place)
        partial(place).replace(place)
    finally:
        clear(place.parent, place.name)
        with _beginning:  # after `give_up` nothing more is said
            _begun.remove(place)


def give_up() -> None:
    """Removes what this process has begun, and lets it begin nothing more. Called before its end.

    Any thread may call it, once. A thread that makes something then stands still. Files that cannot
    be removed are left to the next process.
    """
    _beginning.acquire()
    for place in [*_begun]:
        with suppress(OSError):
            clear(place.parent, place.name)


def write(place: Path, content: bytes, durable: bool = False) -> None:
    """Writes a file whole or not at all. Raises OSError.

    durable: returns only when the file would survive a loss of power.
    """
    with made(place) as unfinished:
        unfinished.write_bytes(content)
        if durable:
            sync(unfinished)
    if durable:
        sync(place.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear(folder: Path, name: str = "") -> None:
    """Removes unfinished work of this process, and of dead ones of this machine, from a folder.

    name: of one place in it, "" for all.
    Orbax's own temporary folders beside ours are removed too. Its threads may write for a moment
    longer. Raises OSError.
    """
    of = re.escape(name) if name else ".+"
    known = re.compile(
        rf"\.{of}\.partial-{re.escape(socket.gethostname())}-(\d+)({re.escape(ORBAX)})?"
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
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it belongs to another user
        return True
    return True
