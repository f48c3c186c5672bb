"""Where an export is written: at a new place, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmf.errors import DmfError
from dmf.storage import atomic


def check_free(target: Path) -> None:
    """Raises DmfError if `target` is there already, or its directory is not."""
    if not target.parent.is_dir():
        raise DmfError(f"{target}: expected a place in a directory that exists")
    if os.path.lexists(target):
        raise DmfError(f"{target} is there already: expected a new place; nothing is overwritten")


@contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """`atomic.made` for a target that is not there yet. Raises DmfError."""
    check_free(target)
    try:
        with atomic.made(target) as partial:
            yield partial
    except OSError as error:
        raise DmfError(
            f"{target} could not be written: {error}; expected a writable directory with room"
        ) from error
