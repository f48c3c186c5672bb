"""The one exception a user is meant to read."""


class DmfError(Exception):
    """Bad input, stated in one sentence: the thing, its value, and what was expected instead.

    `main.py` prints it as one line and exits with status 2; everything else keeps its traceback, since it is our bug. Not a
    ValueError: flag parsers catch those and bury the sentence in text of their own.
    """


class NotFinite(DmfError):
    """Samples, or what was computed of them, are NaN or infinite: the model that drew them has diverged."""


def short(error: Exception) -> str:
    """The kind of somebody else's error and what it says, on one line and not too long, for the sentence of a DmfError."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
