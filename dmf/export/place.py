"""Where something is written before it is there: beside its place, renamed at the end, so that nobody finds half of it."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmf.errors import DmfError


def check_free(target: Path) -> None:
    """Raises DmfError where `target` is there already, or its directory is not."""
    if not target.parent.is_dir():
        raise DmfError(f"{target}: expected a place in a directory that exists")
    if os.path.lexists(target):
        raise DmfError(f"{target} is there already: expected a new place; nothing is overwritten")


@contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """A place to make a file or a folder at, which becomes `target` if the block ends well and is removed if it does not.

    What killed processes of this machine left for the same target is removed too. Raises DmfError where the disk does not do.
    """
    check_free(target)
    start = f".{target.name}.partial-{socket.gethostname()}-"
    partial = target.with_name(f"{start}{os.getpid()}")
    try:
        for left in target.parent.glob(f"{start}*"):
            if not _alive(left.name.removeprefix(start)):
                _remove(left)
        yield partial
        os.rename(partial, target)
    except OSError as error:
        raise DmfError(f"{target} could not be written: {error}; expected a writable directory with room") from error
    finally:
        _remove(partial)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _alive(pid: str) -> bool:
    """Whether a process of this number may still be at work; also where that is no number, or it is somebody else's."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return True
