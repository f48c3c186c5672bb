"""The one exception a user is meant to read, and how text from outside is printed."""

from __future__ import annotations

import re

LONG = re.compile(r"\S{600,}")


def printable(text: str) -> str:
    """Text that may hold names from a file, safe to print as one line.

    Control characters, escape codes and lone surrogates become "?". Endless words are cut.
    """
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return LONG.sub(lambda found: f"{found[0][:200]}...{found[0][-50:]}", clean)


class DmfError(Exception):
    """Bad input in one sentence: the thing, its value, and what was expected instead.

    The command line prints it as one line and ends with status 2. Any other exception is our bug
    and keeps its traceback. It is no ValueError: flag parsers catch those and add text.
    """

    def __init__(self, text: str):
        super().__init__(printable(text))


class NotFinite(DmfError):
    """Samples or their scores are NaN or infinite: the model that drew them has diverged."""


def short(error: BaseException) -> str:
    """The kind and the text of a library's error on one short line, for a DmfError."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
