"""SHA-256 of files and folders."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dmf.errors import DmfError


def sha256(path: Path) -> str:
    """The SHA-256 of a file, local or in a bucket, in hexadecimal digits. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def of_weights(path: str | Path) -> str:
    """The SHA-256 of a local file; for a folder, of the names and digests of its files.

    Raises DmfError where it cannot be read.
    """
    place = Path(path)
    try:
        if not place.is_dir():
            return sha256(place)
        names = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
        lines = [f"{sha256(place / name)}  {name}\n" for name in names]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    except OSError as error:
        raise DmfError(f"{path}: cannot be read ({error}); expected a readable file") from error
