"""The JSON file of an evaluation's scores, and the folder beside it with unfinished sums."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmf.config import differences
from dmf.errors import DmfError
from dmf.storage import atomic, paths, records

if TYPE_CHECKING:
    from dmf.evaluation.judge import Judge

FORM = {"rows": [{...: (records.NUMBER, str)}]}


class Results:
    """A file of scores: what all rows share, and the rows.

    Rows that the file has are not made again.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        """identity: what all rows share. Raises DmfError for a file with another identity."""
        self.path, self._identity = path, json.loads(json.dumps(identity))
        self._rows = self._read() if path.exists() else []
        self._progress = Progress(path, self._identity)

    def _read(self) -> list[dict[str, Any]]:
        stored = records.read(self.path, FORM, "scores of ours, or a new file by --out")
        rows = stored.pop("rows")
        changed = differences(stored, self._identity, "scores")
        if changed:
            raise DmfError(
                f"{self.path} holds other scores: {'; '.join(changed)[:400]}; "
                "expected another file, by --out"
            )
        return rows

    def add(
        self, row: dict[str, Any], judge: Judge, images: Callable[[int, int], np.ndarray]
    ) -> None:
        """Scores judge.protocol.count images and writes the row, unless the file has it."""
        if any(row.items() <= old.items() for old in self._rows):
            return
        judge.ready()
        folder = self._progress.folder(row)
        totals = judge.totals(judge.protocol.count, folder)
        name = ", ".join(f"{k} {v}" for k, v in row.items() if k in ("steps", "images"))
        judge.fill(totals, images, name)
        self._rows.append({**row, **totals.scores(judge.reference)})
        self._write()  # first the scores, then the sums may go: they are hours of work
        shutil.rmtree(folder)

    def finish(self) -> list[dict[str, Any]]:
        """Prints the table and the file's name, and returns the rows."""
        self._progress.end()
        print(table(self._rows))
        for key in ("sampler", "seed", "guidance"):
            if key in self._identity:
                print(f"{key:<10}{self._identity[key]}")
        print(f"written   {self.path}")
        return self._rows

    def _write(self) -> None:
        text = json.dumps({**self._identity, "rows": self._rows}, indent=1) + "\n"
        try:
            with atomic.made(self.path) as partial:
                partial.write_text(text)
        except OSError as error:
            raise DmfError(
                f"{self.path} cannot be written: {error.strerror}; expected a folder with room"
            ) from error


class Progress:
    """The folder of one evaluation's unfinished sums, beside its result.

    Its name is a digest of everything that the scores depend on. One process at a time uses it.
    """

    def __init__(self, out: Path, identity: dict[str, Any]):
        """Raises DmfError where another process uses the folder, or it cannot be made."""
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
                f"{out} cannot be written: {error.strerror}; "
                "expected a file in a writable directory"
            ) from error
        for other in sorted(out.parent.glob(f".{out.name}.*.progress")):
            if other != self._folder:
                print(
                    f"note      {other} holds unfinished sums of another evaluation; "
                    "delete it unless that will continue"
                )

    def folder(self, row: dict[str, Any]) -> Path:
        """The folder of one row's sums. Its name is a digest, never a user's text."""
        found = self._folder / _digest(row)
        try:
            found.mkdir(exist_ok=True)
        except OSError as error:
            raise DmfError(
                f"{found} cannot be made: {error.strerror}; expected a writable directory with room"
            ) from error
        return found

    def end(self) -> None:
        """Removes the folder: the result has everything."""
        self._held.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of scores as a printed table."""
    keys = [key for key in rows[0] if key != "images"]
    columns = [[key, *(_cell(row.get(key, "-")) for row in rows)] for key in keys]
    wide = [max(map(len, column)) + 2 for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join("".join(f"{c:>{w}}" for c, w in zip(x, wide, strict=True)) for x in lines)


def _cell(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, float) else f"{value}"


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def free_name(text: str) -> str:
    """A file name made of any text."""
    name = os.path.basename(text.rstrip("/"))
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:60]
