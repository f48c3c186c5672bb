"""The first line of the program: before the long imports it hears signals and guards its output.

This file, `dmf.run.sigterm` and `dmf.storage.atomic` import the standard library alone.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any, cast

from dmf.run import sigterm

TRAIN = "train"
RESUMED = (
    "score",
    "reference",
    "encode",
    "pairs",
)  # besides training: they go on from what is on disk
_stop: sigterm.Stop | None = None


def begin(argv: Sequence[str]) -> sigterm.Stop:
    """Guards the standard streams and hears SIGTERM and SIGINT; a second call changes nothing.

    Training alone ends well by SIGTERM, with status 0: it saves before it leaves.
    """
    global _stop
    if _stop is None:
        open_streams()
        sys.stdout = cast(Any, Lasting(sys.stdout))
        sys.stderr = cast(Any, Lasting(sys.stderr))
        mode = last(argv, "mode", TRAIN)
        end = f"; {sigterm.AGAIN}" if mode in RESUMED else ""
        _stop = sigterm.listen() if mode == TRAIN else sigterm.listen(end, training=False)
    return _stop


def last(argv: Sequence[str], name: str, default: str) -> str:
    """The last value of a flag among the words of a command: --name=value or --name value."""
    found = default
    for word, following in pairwise([*argv, ""]):
        given, equals, value = word.lstrip("-").partition("=")
        if given == name and word.startswith("-"):
            found = value if equals else following
    return found


def open_streams() -> None:
    """Leads closed standard streams nowhere. Else the next file that is opened takes their place.

    What is printed would go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


class Lasting:
    """A standard stream that raises no error: the work is worth more than what is said of it.

    After its reader has gone, all output is dropped. On a full disk output is dropped until there
    is room again, and standard error tells it once. A character that the terminal does not know is
    written as an escape.
    """

    def __init__(self, stream: Any):
        self._stream, self._told = stream, False
        with suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes the text, or drops it. Returns its length."""
        with self._kept():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is held back, or drops it."""
        with self._kept():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.EPIPE:
                with suppress(OSError):  # what is held back would fail again at the end
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            elif not self._told and self is sys.stdout:
                self._told = True
                print(
                    f"warning: output is lost: {error.strerror}; the work goes on", file=sys.stderr
                )
