"""The one exception a user is meant to read."""


class DmfError(Exception):
    """Bad input, stated in one sentence: the thing, its value, and what was expected instead.

    `main.py` prints it as one line and exits with status 2; everything else keeps its traceback, since it is our bug. Not a
    ValueError: flag parsers catch those and bury the sentence in text of their own.
    """


class NotFinite(DmfError):
    """Samples, or what was computed of them, are NaN or infinite: the model that drew them has diverged."""
