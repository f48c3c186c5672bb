"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dmf.errors import DmfError


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    For a directory it is the SHA-256 of the names and digests of its files. Raises DmfError.
    """
    place = Path(path) if isinstance(path, str) else path
    try:
        if place.is_dir():
            names = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())
            lines = [f"{sha256(place / name)}  {name}\n" for name in names]
            return hashlib.sha256("".join(lines).encode()).hexdigest()
        with place.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DmfError(f"{path}: cannot be read ({error}); expected a readable file") from error
