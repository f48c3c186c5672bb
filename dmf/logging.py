"""What a run says while it goes: JSON lines, TensorBoard where installed, a progress line."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmf.errors import short
from dmf.storage import paths, records

STEP = {"step": records.COUNT}  # the least that a row tells
ASIDE = ".bad"  # ends the name of the file that keeps the bad lines of another
log = logging.getLogger(__name__)


class JsonLines:
    """A file of JSON objects, one per line, each with its step; flushed at every line."""

    def __init__(self, path: Path, writes: bool = True, form: Any = STEP):
        """writes: False for a process that only reads the file. form: of a row."""
        self.path, self._writes, self._form = path, writes, form

    def resume(self, step: int) -> None:
        """Drops rows beyond the step that a run resumes from, and a line that a kill has cut.

        A bad line before the last one is kept aside, in a file beside it. Lines that are there
        twice or out of order are put right. Each of these is told.
        """
        if not self._writes or not self.path.exists():
            return
        found = records.lines(self.path, self._form)
        kept = [row for row in _in_order(found) if row["step"] <= step]
        content = "".join(json.dumps(row) + "\n" for row in kept).encode()
        if content == b"".join(line.content for line in found):
            return
        self._tell(found, step)
        with paths.writing(self.path):
            aside = [line.content for line in found if line.fault and not records.is_torn(line)]
            if aside:  # first, so that a kill loses none
                text = b"".join(aside).decode(errors="backslashreplace")
                paths.append(self.path.with_name(self.path.name + ASIDE), text)
            paths.write(self.path, content)

    def _tell(self, found: list[records.Line], step: int) -> None:
        """Warns of what `resume` is about to change."""
        for line in found:
            if line.fault:
                rest = "it was cut off and is left out"
                if not records.is_torn(line):
                    rest = f"it is kept in {self.path.name}{ASIDE}"
                log.warning("%s line %d: %s; %s", self.path, line.number, line.fault, rest)
        good = [line for line in found if not line.fault]
        order, rows = _in_order(found), [line.value for line in good]
        if len(order) < len(rows):
            log.warning("%s has %d lines twice; once is kept", self.path, len(rows) - len(order))
        steps = [row["step"] for row in rows]
        if steps != sorted(steps):
            log.warning("%s has lines out of order; they are sorted by step", self.path)
        if beyond := sum(row["step"] > step for row in order):
            print(
                f"note      {self.path}: {beyond} rows after step {step} are left out", flush=True
            )

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds a row. Raises DmfError where the disk is full."""
        if self._writes:
            with paths.writing(self.path):
                paths.append(self.path, json.dumps(row) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All good rows by their step; a last line that a kill has cut is ignored."""
        return _in_order(records.lines(self.path, self._form))


def _in_order(found: list[records.Line]) -> list[dict[str, Any]]:
    """The values of the good lines, each once, sorted by step."""
    once = {json.dumps(line.value, sort_keys=True): line.value for line in found if not line.fault}
    return sorted(once.values(), key=lambda row: row["step"])


class TensorBoard:
    """Scalars as event files through clu; nothing where tensorflow or tensorboard is missing.

    A run does not need these files. An error in writing them is told once, as a warning.
    """

    def __init__(self, directory: Path, wanted: bool):
        self._directory = directory
        self._wanted = wanted and all(
            importlib.util.find_spec(name) for name in ("clu", "tensorflow", "tensorboard")
        )
        self._writer: Any = None

    def open(self) -> None:
        """Imports tensorflow, unless a `write` has done so. It takes seconds: not before a step."""
        with self._optional():
            if self._wanted and self._writer is None:
                # No notices: tensorflow only writes files here.
                os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}
                from clu import metric_writers

                self._writer = metric_writers.SummaryWriter(str(self._directory))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds the scalars of a step."""
        if not scalars:
            return
        self.open()
        with self._optional():
            if self._writer is not None:
                self._writer.write_scalars(step, dict(scalars))

    def close(self) -> None:
        """Writes what is left."""
        with self._optional():
            if self._writer is not None:
                self._writer.close()

    @contextmanager
    def _optional(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # errors of tensorflow have no common base
            self._wanted, self._writer = False, None
            log.warning("%s: %s; no more event files are written", self._directory, short(error))


class _Line:
    """A line of progress. A terminal shows it rewritten; elsewhere it comes every ten seconds."""

    def __init__(self, printed: float):
        """printed: when a line was last printed, by time.monotonic."""
        self._printed = printed

    def is_due(self, now: float, ended: bool) -> bool:
        """Whether to print now, which is noted."""
        if not sys.stdout.isatty() and now - self._printed < 10 and not ended:
            return False
        self._printed = now
        return True

    def show(self, text: str, end: bool = False) -> None:
        """Prints the line that is due. end: the last one, which a terminal keeps."""
        live = sys.stdout.isatty()
        print(f"\r{text}\033[K" if live else text, end="" if live and not end else "\n", flush=True)


class Progress:
    """One line with stage, step, loss, rate and time left."""

    def __init__(self, total: int, start: int):
        self._total, self._count, self._mark = total, start, time.monotonic()
        self._line = _Line(float("-inf"))
        self._rate = 0.0

    def show(self, step: int, stage: str, loss: float) -> None:
        """Called at the logged steps. The rate counts the steps since the last call."""
        now = time.monotonic()
        if step > self._count:
            rate = (step - self._count) / max(now - self._mark, 1e-9)
            self._rate = rate if not self._rate else 0.7 * self._rate + 0.3 * rate
        self._count, self._mark = step, now
        if not self._line.is_due(now, step >= self._total):
            return
        text = f"{stage:<10} step {step}/{self._total}  loss {loss:.4g}"
        if self._rate:
            text += f"  {self._rate:.1f} steps/s  {_clock((self._total - step) / self._rate)} left"
        self._line.show(text)

    def pause(self) -> None:
        """Ends the rewritten line before something else is printed."""
        if sys.stdout.isatty():
            print()

    def restart(self, step: int) -> None:
        """The time since the last `show` was no training: the rate leaves it out."""
        self._count, self._mark = step, time.monotonic()


class Count:
    """One line with how many are done, the rate and the time left."""

    def __init__(self, name: str, total: int, unit: str, start: int = 0):
        self._name, self._total, self._unit, self._start = name, total, unit, start
        self._began = time.monotonic()
        self._line = _Line(self._began)

    def show(self, done: int) -> None:
        """Says that `done` of all are done."""
        now = time.monotonic()
        if not self._line.is_due(now, done >= self._total):
            return
        rate = (done - self._start) / max(now - self._began, 1e-9)
        ended = done == self._total
        clock = (
            _clock(now - self._began)
            if ended
            else f"{_clock((self._total - done) / max(rate, 1e-9))} left"
        )
        text = f"{self._name:<10} {done:,}/{self._total:,} {self._unit}  {rate:.3g}/s  {clock}"
        self._line.show(text, ended)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _is_of_others(record: logging.LogRecord) -> bool:
    late = record.name == "asyncio" and "exception was never retrieved" in record.getMessage()
    return not late and "orbax" not in Path(record.pathname).parts


@functools.cache
def quieten() -> None:
    """Keeps Orbax's threads from printing tracebacks: the error itself arrives and is told once."""
    for name in ("absl", "asyncio", None):  # Orbax uses all three
        logging.getLogger(name).addFilter(_is_of_others)
    before = sys.unraisablehook

    def others(found: sys.UnraisableHookArgs) -> None:
        if str(found.exc_value) != "Event loop is closed":  # by a save that has failed
            before(found)

    sys.unraisablehook = others
