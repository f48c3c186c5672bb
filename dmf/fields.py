"""Dataclasses as sections of a config. A field carries what it may hold in its own metadata.

    p: float = limited(0.75, 0, 2)                  a number from 0 to 2
    remat: str = choice("none", ("none", "dots"))   one of these names

`section` makes a dataclass from nested plain values, and `check` compares every field with its
metadata. Both raise DmfError with the key's path, the value and what was expected. Old configs and
flags with a name of `FORMER` are still read: `current` and `current_flags` give them today's names.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from dmf.errors import DmfError

T = TypeVar("T")

# Numbers become float32 and int32 on the devices: none may become 0, infinite or negative.
LEAST = 2.0**-126  # the least positive number: the low end of a range without zero
ABOVE_1 = 1 + 1e-9  # the low end of a range without one
BELOW_1 = 1 - 1e-9  # the high end of a range without one
INF = (2 - 2.0**-23) * 2.0**127  # a range without a high end still refuses infinity
MOST = 2**31 - 1  # the high end of a whole number in a range without one
WIDEST, MOST_BLOCKS, MOST_CLASSES = 2**16, 2**10, 2**24  # of a network, beyond any that was built
MANY = 10_000  # numbers in a tuple, at most
REQUIRED: Any = dataclasses.MISSING  # a default that is none: the field must be given
RANGE, CHOICES = "range", "choices"  # keys of a field's metadata
# Former names of fields, which were kinds of stages, and what they are now: the kinds' arithmetic.
ARITHMETIC = {
    "flow": "plain",
    "trajectory": "plain",
    "discrete": "difference",
    "jvp": "derivative",
}
FORMER = {"precision": ARITHMETIC, "attention": ARITHMETIC}  # section -> former name -> name


class Range(NamedTuple):
    """The numbers from low to high, both included. empty: a tuple may hold no number at all."""

    low: float
    high: float
    empty: bool

    def __str__(self) -> str:
        """The range in words, as in "expected a number above 0 and at most 1"."""
        least = {LEAST: "above 0", ABOVE_1: "above 1", -INF: "that is finite"}
        most = {BELOW_1: " and below 1", INF: ""}
        low, high = f"of at least {self.low:.10g}", f" and at most {self.high:.10g}"
        return least.get(self.low, low) + most.get(self.high, high)

    def of(self, number: float) -> Range:
        """The same range for a number like this one: whole numbers have a high end."""
        whole = isinstance(number, int) and self.high == INF
        return self._replace(high=MOST) if whole else self


def limited(default: T, low: float, high: float, *, empty: bool = True) -> T:
    """A field whose number, or every number of its tuple, lies between low and high."""
    metadata = {RANGE: Range(low, high, empty)}
    return typing.cast(T, dataclasses.field(default=default, metadata=metadata))


def choice(default: str, options: Collection[str]) -> str:
    """A field that holds one of the given names."""
    metadata = {CHOICES: tuple(options)}
    return typing.cast(str, dataclasses.field(default=default, metadata=metadata))


def check(values: Any, path: str) -> None:
    """Compares every field of a dataclass, and of those inside it, with the field's metadata.

    Raises DmfError for the first value that its field may not hold.
    """
    for f in dataclasses.fields(values):
        value, where = getattr(values, f.name), f"{path}.{f.name}"
        if dataclasses.is_dataclass(value):
            check(value, where)
        elif CHOICES in f.metadata and value not in f.metadata[CHOICES]:
            options = ", ".join(f.metadata[CHOICES])
            raise DmfError(f"{where} = {value!r}: expected one of {options}")
        elif RANGE in f.metadata:
            _check_range(f.metadata[RANGE], value, where)


def section(cls: type, values: Any, path: str) -> Any:
    """An instance of the dataclass `cls` with the given values, which may be nested.

    Raises DmfError for an unknown key, a value of another type, and a missing value.
    """
    if not isinstance(values, Mapping):
        names = ", ".join(f.name for f in dataclasses.fields(cls))
        raise DmfError(f"{path} = {values!r:.100}: expected a section with the fields {names}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise unknown(path, key, hints)
    for f in dataclasses.fields(cls):
        if f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise DmfError(f"{path}.{f.name} is missing: expected a value, as it has no default")
    return cls(**{key: _value(hints[key], values[key], f"{path}.{key}") for key in values})


def current(values: Any) -> Any:
    """The nested values of a config with today's names in place of those in `FORMER`.

    Raises DmfError where two former names of one field have different values.
    """
    if not isinstance(values, Mapping):
        return values
    return {
        key: _renamed(value, FORMER[key], f"config.{key}")
        if key in FORMER and isinstance(value, Mapping)
        else value
        for key, value in values.items()
    }


def current_flags(argv: Sequence[str]) -> list[str]:
    """The arguments with today's names in flags such as --config.attention.jvp=chunked.

    Raises DmfError where flags by two former names of one field have different values.
    """
    out: list[str] = []
    seen: dict[str, dict[str, str]] = {section: {} for section in FORMER}
    for text in argv:
        flag = re.fullmatch(r"(--?config\.)(\w+)\.(\w+)(=.*)?", text, re.DOTALL)
        names = FORMER.get(flag[2], {}) if flag else {}
        if flag and flag[3] in names:
            seen[flag[2]][flag[3]] = (flag[4] or "")[1:]
            _renamed(seen[flag[2]], names, f"--config.{flag[2]}")
            text = f"{flag[1]}{flag[2]}.{names[flag[3]]}{flag[4] or ''}"
        out.append(text)
    return out


def unknown(path: str, key: Any, names: Collection[str]) -> DmfError:
    """The error for a key that is not among the names, with the nearest name."""
    near = difflib.get_close_matches(str(key)[:100], names, 1, 0.0)[0]
    return DmfError(f"{path}.{key}: no such field; did you mean {path}.{near}?")


def sections_of(hint: Any) -> list[type]:
    """The dataclasses that a field of this type may hold: one, several for a union, or none."""
    parts = typing.get_args(hint) or (hint,)
    return [part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)]


def _renamed(values: Mapping[str, Any], names: Mapping[str, str], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    given: dict[str, str] = {}
    for key, value in values.items():
        name = names.get(key, key)
        if found.get(name, value) != value:
            raise DmfError(
                f"{path}.{key} = {value!r} with {path}.{given[name]} = {found[name]!r}: expected "
                f"one value, as both are {path}.{name} now"
            )
        found[name], given[name] = value, key
    return found


def _check_range(allowed: Range, value: Any, where: str) -> None:
    numbers = value if isinstance(value, tuple) else (value,)
    if len(numbers) > MANY:
        raise DmfError(f"{where} has {len(numbers)} numbers: expected at most {MANY}")
    for number in numbers:
        fit = allowed.of(number)
        if not fit.low <= number <= fit.high:
            beyond = " and finite in float32" * (fit.high == INF and not number <= INF)
            raise DmfError(f"{where} = {value!s:.100}: expected a number {fit}{beyond}")
    if not numbers and not allowed.empty:
        raise DmfError(f"{where} = (): expected at least one number")


def _value(hint: Any, value: Any, path: str) -> Any:
    sections = sections_of(hint)
    if sections:
        return section(_of_kind(sections, value, path), value, path)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple | list):
            raise DmfError(f"{path} = {value!r}: expected a tuple")
        item = typing.get_args(hint)[0]
        if item is str:  # --config.curriculum.kinds=discrete,jvp arrives as one name
            value = [name for v in value for name in (v.split(",") if isinstance(v, str) else [v])]
        return tuple(_value(item, v, path) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > INF:  # a float of Python may not hold it either
            raise DmfError(f"{path} = {value!s:.100}: expected a number finite in float32")
        return float(value)
    if type(value) is not hint:
        raise DmfError(f"{path} = {value!r}: expected {hint.__name__}")
    return value


def _of_kind(sections: list[type], values: Any, path: str) -> type:
    """The dataclass of a union whose field `kind` has the default that the values give as kind."""
    if len(sections) == 1:
        return sections[0]
    kinds = {cls.kind: cls for cls in typing.cast(list[Any], sections)}
    kind = values.get("kind", "") if isinstance(values, Mapping) else ""
    if kind not in list(kinds):
        raise DmfError(f"{path}.kind = {kind!r}: expected one of {', '.join(kinds)}")
    return kinds[kind]
