"""JSON that is read again: every value is compared with the form that is expected of it.

A form is one of

    int, float, str, bool, dict, list, None   a value of this type; a float is a finite number
    {name: form, ...}   an object with these names; a form of `...` holds for all other names
    [form]              a list of such values
    (form, form)        one of these
    Maybe(form)         a name of an object that may be missing
    Is(words, test)     a value that passes the test; the words say what was expected

An entry may be sealed: it then holds the SHA-256 of its other values, which shows an alteration.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dmf.errors import DmfError, short

OURS = "what dmf wrote there"
SEAL = "seal"


class Is(NamedTuple):
    """A form by a test, and the words for what was expected."""

    words: str
    test: Callable[[Any], bool]


class Maybe(NamedTuple):
    """The form of a name that an object may lack."""

    form: Any


class Line(NamedTuple):
    """A line of a file: its number from 1, its bytes, and its value or what is wrong with it."""

    number: int
    content: bytes
    value: Any
    fault: str


COUNT = Is("a whole number, 0 or more", lambda x: type(x) is int and 0 <= x < 2**63)
POSITIVE = Is("a whole number above 0", lambda x: type(x) is int and 0 < x < 2**63)
ANY = Is("any value", lambda x: True)
NUMBER = Is("a number", lambda x: type(x) in (int, float))  # JSON of Python has NaN and Infinity
WORDS = {
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    None: "null",
}


def read(path: Path, form: Any, wanted: str = OURS) -> Any:
    """The value of a JSON file.

    Raises DmfError that names the file, the place in it and what was expected. `wanted` says the
    latter where the file cannot be read or is no JSON.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DmfError(f"{path} cannot be read: {short(error)}; expected {wanted}") from error
    return parse(content, form, str(path), wanted)


def parse(content: bytes | str, form: Any, where: str, wanted: str = OURS) -> Any:
    """The value of JSON text, as `read`. where: names the text, "FILE" or "FILE line 3"."""
    value, line, fault = _decoded(content)
    if fault:
        raise DmfError(f"{where}{f' line {line}' if line else ''}: {fault}; expected {wanted}")
    if fault := _fault(value, form, ""):
        raise DmfError(f"{where}: {fault}")
    return value


def lines(path: Path, form: Any) -> list[Line]:
    """The lines of a file of JSON lines, also bad ones; none without a file.

    The last one is torn where it is bad and does not end. Raises DmfError where it cannot be read.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise DmfError(f"{path} cannot be read: {short(error)}; expected {OURS}") from error
    return [
        _line(n, part, form) for n, part in enumerate(content.splitlines(keepends=True), 1) if part
    ]


def is_torn(line: Line) -> bool:
    """Whether a bad line does not end, as a kill or a full disk leaves the last one."""
    return bool(line.fault) and not line.content.endswith(b"\n")


def fits(value: Any, form: Any) -> bool:
    """Whether the form allows the value."""
    return not _fault(value, form, "")


def check(value: Any, form: Any, where: str) -> None:
    """Raises DmfError for the first value that the form does not allow."""
    if fault := _fault(value, form, ""):
        raise DmfError(f"{where}: {fault}")


def sealed(entry: dict[str, Any]) -> dict[str, Any]:
    """Plain values with their own SHA-256, which shows an alteration."""
    return {**entry, SEAL: seal_of(entry)}


def unsealed(entry: dict[str, Any], where: str, wanted: str = OURS) -> dict[str, Any]:
    """The values of an entry without its seal, where it has one. Raises DmfError if it is wrong."""
    plain = {name: value for name, value in entry.items() if name != SEAL}
    if SEAL in entry and entry[SEAL] != seal_of(plain):
        raise DmfError(f"{where}: its values were altered; expected {wanted}")
    return plain


def seal_of(entry: dict[str, Any]) -> str:
    """The SHA-256 of an entry's values, which `sealed` stores with them."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _line(number: int, content: bytes, form: Any) -> Line:
    value, _, fault = _decoded(content)
    return Line(number, content, value, fault or _fault(value, form, ""))


def _decoded(content: bytes | str) -> tuple[Any, int, str]:
    """(value, 0, "") of JSON text, or (None, line, what is wrong with it)."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        return json.loads(text, object_pairs_hook=_once), 0, ""
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        return None, line, f"the byte {error.object[error.start]:#04x} is no text in UTF-8"
    except json.JSONDecodeError as error:
        return None, error.lineno, f"no JSON ({error.msg})"
    except RecursionError:
        return None, 0, "no JSON (its values are nested too deeply)"
    except ValueError as error:  # a name given twice, a number of thousands of digits
        return None, 0, f"no JSON ({str(error)[:100]})"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{reprlib.repr(name)} is given twice")
        found[name] = value
    return found


def _fault(value: Any, form: Any, at: str) -> str:
    """What is wrong with a value, "" where the form allows it. at: its path."""
    if isinstance(form, dict) and isinstance(value, dict):
        return _of_object(value, form, at)
    if isinstance(form, list) and isinstance(value, list):
        faults = (_fault(item, form[0], f"{at}[{i}]") for i, item in enumerate(value))
        return next((fault for fault in faults if fault), "")
    if _is(value, form):
        return ""
    return f"{at or 'it'} is {reprlib.repr(value)}, expected {_words(form)}"


def _of_object(value: dict[str, Any], form: dict[Any, Any], at: str) -> str:
    for name, part in form.items():
        inner, optional = (part.form, True) if isinstance(part, Maybe) else (part, name is ...)
        here = f"{at}.{name}" if at else f"{name}"
        if name in value and (fault := _fault(value[name], inner, here)):
            return fault
        if name not in value and not optional:
            return f"{here} is missing, expected {_words(inner)}"
    others = (name for name in value if name not in form) if ... in form else ()
    faults = (_fault(value[name], form[...], f"{at}[{reprlib.repr(name)}]") for name in others)
    return next((fault for fault in faults if fault), "")


def _is(value: Any, form: Any) -> bool:
    """Whether a value without parts is of the form."""
    if isinstance(form, Is):
        return form.test(value)
    if isinstance(form, tuple):
        return any(fits(value, part) for part in form)
    if form is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return value is None if form is None else type(value) is form


def _words(form: Any) -> str:
    if isinstance(form, Is):
        return form.words
    if isinstance(form, tuple):
        return " or ".join(map(_words, form))
    return WORDS[dict if isinstance(form, dict) else list if isinstance(form, list) else form]
