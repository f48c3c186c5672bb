"""The one exception a user is meant to read."""


class DmfError(Exception):
    """Bad input in one sentence: the thing, its value, and what was expected instead.

    The command line prints it as one line and ends with status 2. Any other exception is our bug
    and keeps its traceback. It is no ValueError: flag parsers catch those and add text.
    """


class NotFinite(DmfError):
    """Samples or their scores are NaN or infinite: the model that drew them has diverged."""


def short(error: BaseException) -> str:
    """The kind and the text of a library's error on one short line, for a DmfError."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
