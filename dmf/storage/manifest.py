"""The manifest of a checkpoint's folder: what was written, by which a damage shows.

Size and SHA-256 of every file. It is written last and whole, so a folder without it is an unfinished save. It holds no checksum
of itself: it has to be, byte for byte, what is written here of the files that it names.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dmf.errors import DmfError, short
from dmf.storage import paths

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Completes a step folder: relative path, size and SHA-256 of every file, written whole or not at all."""
    paths.write(folder / MANIFEST, _as_text(_contents(folder)), ".json.tmp")


def verify(folder: Path) -> None:
    """Raises DmfError naming the first file of a step folder that is missing, cut short or altered, the manifest included."""
    try:
        text = (folder / MANIFEST).read_text()
        expected = json.loads(text)
    except (OSError, ValueError) as error:
        raise DmfError(
            f"checkpoint {folder}: no readable {MANIFEST}; expected a folder that was saved to its end"
        ) from error
    if not isinstance(expected, dict) or not expected or text != _as_text(expected):
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
            raise DmfError(
                f"checkpoint {folder}: file {name} is missing; expected it with size and SHA-256 {listed}"
            )
        if found[name] != listed:
            raise DmfError(
                f"checkpoint {folder}: file {name} has {found[name][0]} bytes and another checksum; expected size and SHA-256 "
                f"{listed}"
            )


def _as_text(contents: Any) -> str:
    return json.dumps(contents, indent=1) + "\n"


def _contents(folder: Path) -> dict[str, list[Any]]:
    files = [p for p in paths.files(folder) if not p.name.startswith(MANIFEST)]
    found: dict[str, list[Any]] = {}
    for path in files:
        try:
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = [
                    paths.size(path),
                    hashlib.file_digest(file, "sha256").hexdigest(),
                ]
        except OSError as error:
            raise OSError(
                error.errno, error.strerror or str(error), str(path)
            ) from error  # reading tells no name
    return found
