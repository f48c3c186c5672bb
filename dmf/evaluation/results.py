"""The JSON file of a run of scores, and the place beside it where unfinished sums wait."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from dmf.config import differences
from dmf.errors import DmfError
from dmf.evaluation.judge import Judge, accumulate
from dmf.storage import paths
from dmf.storage.digest import sha256 as sha256


class Results:
    """What all rows share, and the rows. A file that holds other scores is refused; rows that it has are not made again."""

    def __init__(self, path: Path, identity: dict[str, Any]):
        self.path, self._identity = path, json.loads(json.dumps(identity))
        self._rows = self._read() if path.exists() else []
        self._progress = Progress(path, self._identity)

    def _read(self) -> list[dict[str, Any]]:
        try:
            stored = json.loads(self.path.read_text())
        except (OSError, ValueError) as error:
            raise DmfError(
                f"{self.path} cannot be read ({error}); expected scores of ours, or a new file by --out"
            ) from error
        rows = stored.pop("rows", None) if isinstance(stored, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DmfError(
                f"{self.path} holds no rows of scores: expected what a score by protocol wrote, or a new file by --out"
            )
        changed = differences(stored, self._identity, "scores")
        if changed:
            raise DmfError(
                f"{self.path} holds other scores: {'; '.join(changed)[:400]}; expected another file, by --out"
            )
        return rows

    def add(
        self, row: dict[str, Any], judge: Judge, images: Callable[[int, int], np.ndarray]
    ) -> None:
        """Makes one row of scores of judge.protocol.count images, unless the file has it already, and writes it down."""
        if any(row.items() <= old.items() for old in self._rows):
            return
        judge.ready()
        folder = self._progress.folder(row)
        totals = judge.totals(judge.protocol.count, folder)
        accumulate(
            totals,
            images,
            judge.extract,
            ", ".join(f"{k} {v}" for k, v in row.items() if k in ("steps", "images")),
        )
        self._rows.append({**row, **totals.scores(judge.reference)})
        self._write()  # before the sums go: they are hours of work
        shutil.rmtree(folder)

    def finish(self) -> list[dict[str, Any]]:
        """Prints the table and where it is stored; returns the rows."""
        self._progress.end()
        shared = {
            k: self._identity[k] for k in ("sampler", "seed", "guidance") if k in self._identity
        }
        print(
            "\n".join(
                [
                    table(self._rows),
                    *(f"{k:<10}{v}" for k, v in shared.items()),
                    f"written   {self.path}",
                ]
            )
        )
        return self._rows

    def _write(self) -> None:
        partial = self.path.with_name(f".{self.path.name}.tmp")
        try:
            partial.write_text(json.dumps({**self._identity, "rows": self._rows}, indent=1) + "\n")
            partial.replace(self.path)
        except OSError as error:
            raise DmfError(
                f"{self.path} cannot be written: {error.strerror}; expected a folder with room"
            ) from error


class Progress:
    """The folder of one evaluation's unfinished sums: beside its result, told apart by all that the scores depend on.

    One process at a time has it. Raises DmfError where another one does, or where it cannot be made.
    """

    def __init__(self, out: Path, identity: dict[str, Any]):
        self._folder = out.with_name(f".{out.name}.{_digest(identity)}.progress")
        self._held = ExitStack()
        try:
            if out.is_dir():
                raise IsADirectoryError(0, "it is a directory")
            self._folder.mkdir(exist_ok=True)
            taken = f"{out}: another process is at work on it; expected one at a time"
            self._held.enter_context(paths.alone(self._folder / "lock", taken))
        except OSError as error:
            raise DmfError(
                f"{out} cannot be written: {error.strerror}; expected a file in a writable directory"
            ) from error
        for other in sorted(out.parent.glob(f".{out.name}.*.progress")):
            if other != self._folder:
                print(
                    f"note      {other} holds unfinished sums of another evaluation; delete it if that is not to go on"
                )

    def folder(self, row: dict[str, Any]) -> Path:
        """The place of one row's sums; named by a digest, never by what a user wrote."""
        found = self._folder / _digest(row)
        try:
            found.mkdir(exist_ok=True)
        except OSError as error:
            raise DmfError(
                f"{found} cannot be made: {error.strerror}; expected a writable directory with room"
            ) from error
        return found

    def end(self) -> None:
        """Removes the folder: everything is in the result."""
        self._held.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of scores as a printed table."""
    keys = [key for key in rows[0] if key != "images"]
    text = [
        {
            k: f"{row[k]:,.6g}" if isinstance(row.get(k), float) else f"{row.get(k, '-')}"
            for k in keys
        }
        for row in rows
    ]
    wide = {k: max(len(k), *(len(row[k]) for row in text)) + 2 for k in keys}
    return "\n".join(
        "".join(f"{row[k]:>{wide[k]}}" for k in keys)
        for row in [dict(zip(keys, keys, strict=True)), *text]
    )


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def free_name(text: str) -> str:
    """A file's name made of any text."""
    return "".join(
        c if c.isalnum() or c in "._-" else "_" for c in os.path.basename(text.rstrip("/"))
    )[:60]
