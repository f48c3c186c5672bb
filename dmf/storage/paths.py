"""Where a run is kept: a local directory, or gs://BUCKET/FOLDER in Google Cloud Storage.

A bucket knows objects alone. A folder is there as long as the name of an object begins with it.
Nothing is appended to or renamed, and an object is replaced as a whole or not at all. Both kinds of
place are used in the same way: `at` gives a pathlib.Path, or an epath.Path of etils for a bucket.
Orbax, JAX's cache of programs and TensorBoard take gs:// themselves.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from dmf.errors import DmfError, short
from dmf.storage import atomic

SCHEME = "gs://"
PACKAGES = "requirements-gcs.txt"
NAMED = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # pathlib leaves one slash of gs://
VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, on Linux


def expanded(text: str) -> str:
    """A path or address as a user writes it, with ~, $NAME and ${NAME} replaced as by a shell.

    A path that is there as it is written keeps its "$".
    Raises DmfError for a variable that is not set, and for a name that is too long for a disk.
    """
    path = os.path.expanduser(text)
    if not os.path.lexists(path):
        for name in VARIABLE.findall(path):
            if name.strip("{}") not in os.environ:
                raise DmfError(
                    f"{text:.200}: ${name} is not set; expected a variable of the environment"
                )
        path = os.path.expanduser(os.path.expandvars(text))
    whole, longest = len(os.fsencode(path)), max(len(os.fsencode(n)) for n in path.split("/"))
    if whole > LONGEST_PATH or longest > LONGEST_NAME:
        raise DmfError(
            f"{path:.60}...: the path has {whole} bytes, its longest name has {longest}; "
            f"expected at most {LONGEST_PATH} and {LONGEST_NAME}"
        )
    return path


def at(path: str | os.PathLike[str]) -> Path:
    """The place that a text names. For a bucket it is an epath.Path, which is used like a Path.

    Raises DmfError for other kinds of address, where the packages for a bucket are missing, and
    like `expanded`.
    """
    text = expanded(os.fspath(path))
    if not NAMED.match(text):
        return Path(text)
    if not is_bucket(text) or not text.removeprefix(SCHEME).strip("/"):
        raise DmfError(f"{text}: expected a local path or {SCHEME}BUCKET/FOLDER")
    _serve(text)
    from etils import epath  # of Orbax' own dependencies; here, as --help should load nothing

    return cast(Path, epath.Path(text))


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def local(path: str | os.PathLike[str], why: str) -> Path:
    """A local path; raises DmfError, with the reason `why`, for another one."""
    text = expanded(os.fspath(path))
    if NAMED.match(text):
        raise DmfError(f"{text}: expected a local path, {why}")
    return Path(text)


def absolute(path: Path) -> Path:
    """Path.absolute, which would put the present directory before gs://."""
    return path if is_bucket(path) else path.absolute()


def reach(path: Path) -> Path:
    """The path itself; raises DmfError where its bucket cannot be read."""
    if is_bucket(path):
        try:
            path.exists()
        except Exception as error:  # what a cloud's client raises has no common base
            raise DmfError(
                f"{path} cannot be reached: {short(error)}; expected a bucket that exists and "
                "credentials that may read and write it "
                "(gcloud auth application-default login, or the machine's own)"
            ) from error
    return path


def make(folder: Path) -> None:
    """Makes a folder and those it is in; a bucket needs none. Raises OSError or DmfError."""
    if not is_bucket(folder):
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)


def check_folder(folder: Path) -> None:
    """Raises DmfError where a file, or a link that leads nowhere, is in the place of a folder."""
    if os.path.lexists(folder) and not folder.is_dir():
        links = folder.is_symlink() and not folder.exists()
        what = f"a link to {os.readlink(folder)}, which is not there" if links else "a file"
        raise DmfError(f"{folder} is {what}; expected a directory, or nothing there yet")


def check_plain(path: Path) -> None:
    """Raises DmfError where Orbax would lose what it writes.

    It looks for its own files by patterns, and puts the whole path into them as it is.
    """
    whole = os.fspath(absolute(path))
    if glob.escape(whole) != whole:
        raise DmfError(
            f"{whole}: no checkpoint can be kept there; expected a path without *, ? and [, which "
            "Orbax takes for a pattern"
        )


def check_free(folder: Path) -> Path:
    """The place, links followed, at which a checkpoint may be made.

    It is new or an empty directory, in a writable one. Raises DmfError otherwise. Orbax itself
    would wait for minutes where it cannot write.
    """
    try:
        place = folder.resolve()
        check_plain(place)
        if place.is_file() or place.is_dir() and any(place.iterdir()):
            what = f"{folder} is there already and {'a file' if place.is_file() else 'not empty'}"
            raise DmfError(f"{what}: expected a new directory; nothing is overwritten")
        # In a container, this process may have the number of one that was killed.
        atomic.clear(place.parent, place.name)
        partial = atomic.partial(place)
        partial.mkdir()
        partial.rmdir()
    except (OSError, RuntimeError, ValueError) as error:
        what = f"{folder} cannot be made: {short(error)}"
        raise DmfError(f"{what}; expected a new directory in a writable one") from error
    return place


def write(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all. Raises OSError."""
    data = content.encode() if isinstance(content, str) else content
    if is_bucket(path):
        with _told(path):
            path.write_bytes(data)
        return
    atomic.write(path, data)


def append(path: Path, text: str) -> None:
    """Adds text to a file, or makes it. In a bucket it is written again whole. Raises OSError."""
    if not is_bucket(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
        return
    with _told(path):
        try:
            before = path.read_bytes()
        except FileNotFoundError:
            before = b""
        path.write_bytes(before + text.encode())


def files(folder: Path) -> list[Path]:
    """Every file below a folder, sorted."""
    if not is_bucket(folder):
        return sorted(p for p in folder.rglob("*") if p.is_file())
    tree: Any = folder  # a Path has walk only since Python 3.12
    found = [(os.fspath(root), name) for root, _, names in tree.walk() for name in names if name]
    # epath may leave out gs://
    return sorted(at(SCHEME + root.removeprefix(SCHEME)) / name for root, name in found)


def size(path: Path) -> int:
    """Bytes of a file."""
    found: Any = path.stat()
    return found.length if is_bucket(path) else found.st_size


def remove_tree(folder: Path) -> None:
    """Removes a folder with all that is in it. Raises OSError."""
    if not is_bucket(folder):
        shutil.rmtree(folder)
        return
    with _told(folder):
        tree: Any = folder
        tree.rmtree(missing_ok=True)  # a folder ends with its last object


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Turns an OSError of the block into a DmfError that names the file, or flag, `what`."""
    try:
        yield
    except OSError as error:
        why = f"{what} cannot be written: {reason(error)}"
        raise DmfError(f"{why}; expected a writable directory with room") from error


def reason(error: Exception) -> str:
    """Why something could not be written: the system's own words, where the error has them."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # TensorStore writes a long path before the number.
    found = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    return os.strerror(int(found[1])) if found else short(error)


@contextmanager
def alone(path: Path, refusal: str) -> Iterator[None]:
    """Keeps other processes out of such a block of the same path.

    path: a folder, or a file, which is made if it is missing, and stays.
    The end of a process, by SIGKILL too, ends its lock. Where a bucket or a file system has no
    locks, all enter. Raises DmfError with the sentence `refusal` where another process is inside,
    OSError where the path cannot be opened.
    """
    if is_bucket(path):
        yield
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DmfError(refusal) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def failures(path: Path) -> tuple[type[Exception], ...]:
    """What writing there may raise. The errors of a cloud's clients have no common base."""
    return (Exception,) if is_bucket(path) else (OSError, ValueError)


def _serve(text: str) -> None:
    """Makes epath use gcsfs. It would use TensorFlow, which is large and often not installed."""
    if os.environ.setdefault("EPATH_USE_TF", "false").lower() not in ("false", "no", "f", "0"):
        return  # the user's own choice
    try:
        import fsspec

        # Orbax and other processes write past gcsfs, so that its stored listings may be old.
        fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
        fsspec.get_filesystem_class("gcs")
    except ImportError as error:
        raise DmfError(
            f"{text}: the packages for {SCHEME} are missing; expected pip install -r {PACKAGES}"
        ) from error


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns any error of a cloud's client into an OSError, as a disk raises it."""
    try:
        yield
    except Exception as error:  # they have no common base
        raise OSError(errno.EIO, short(error), str(path)) from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, local or in a bucket, in hexadecimal digits. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
