"""A reader of pickles that runs nothing: a pickle is taken as a description, and only what weight files need is understood.

Python's own unpickler calls whatever a file names. This one has no way to call or import: a global is a label, a class of
another library becomes an `Inert` with its fields, and byte strings and storages stay in the file until a tensor is read.
What `dmf.storage.readers.pickled` does not list is refused by name.
"""

from __future__ import annotations

import functools
import pickletools
from collections.abc import Callable
from typing import Any

from dmf.errors import DmfError
from dmf.storage.readers.pickled import (
    CALLS,
    INERT,
    LOAD_FROM_BYTES,
    MODULE,
    Global,
    Made,
    allowed,
    key_of,
    wrong,
)
from dmf.storage.readers.span import Cursor, Span

MAX_PROTOCOL = 5
MAX_INT_BYTES = 1000
OPCODES = {ord(op.code): op.name for op in pickletools.opcodes}


class Machine:
    """Reads one pickle at the cursor.

    storage: makes a `Storage` of a persistent id. nested: makes one of the bytes of a stream within the pickle.
    """

    def __init__(
        self,
        cursor: Cursor,
        storage: Callable[[Any], Any] | None,
        nested: Callable[[Span], Any] | None,
    ):
        self.cursor, self.storage, self.nested = cursor, storage, nested
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object, raw: `tree_of` makes a tree of it."""
        while (name := OPCODES.get(self.cursor.take(1)[0], "of no known sort")) != "STOP":
            if name not in ACTIONS:
                raise self.error(
                    f"opcode {name} in its pickle; expected a pickle as PyTorch writes it"
                )
            ACTIONS[name](self)
        if len(self.stack) != 1 or self.marks:
            raise self.error("its pickle ends with objects left over; expected exactly one object")
        return self.stack.pop()

    def error(self, text: str) -> DmfError:
        """A refusal that names the file."""
        return self.cursor.span.error(text)

    def push(self, value: Any) -> None:
        """Puts a value on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Takes the top of the stack."""
        if not self.stack:
            raise self.error("its pickle takes more objects than it has; expected a whole pickle")
        return self.stack.pop()

    def top(self) -> Any:
        """The top of the stack, left there."""
        if not self.stack:
            raise self.error(
                "its pickle changes an object that it has not made; expected a whole pickle"
            )
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        """Takes everything above the last mark."""
        if not self.marks:
            raise self.error("its pickle lacks a mark; expected a whole pickle")
        found, self.stack = self.stack, self.marks.pop()
        return found


def _value(make: Callable[[Cursor], Any], m: Machine) -> None:
    m.push(make(m.cursor))


def _mark(m: Machine) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _protocol(m: Machine) -> None:
    if (found := m.cursor.number("<B")) > MAX_PROTOCOL:
        raise m.error(f"pickle protocol {found}; expected one up to {MAX_PROTOCOL}")


def _integer(m: Machine, form: str) -> None:
    size = m.cursor.number(form)
    if not 0 <= size <= MAX_INT_BYTES:
        raise m.error(f"an integer of {size} bytes in its pickle; expected at most {MAX_INT_BYTES}")
    m.push(int.from_bytes(m.cursor.take(size), "little", signed=True))


def _bytes(m: Machine, form: str) -> None:
    m.push(m.cursor.skip(m.cursor.number(form), "a byte string in its pickle"))


def _tuple(m: Machine, count: int) -> None:
    m.push(tuple(reversed([m.pop() for _ in range(count)])))


def _put(m: Machine, index: int) -> None:
    m.memo[index] = m.top()


def _get(m: Machine, index: int) -> None:
    if index not in m.memo:
        raise m.error(
            f"object {index} in its pickle is used before it is made; expected a whole pickle"
        )
    m.push(m.memo[index])


def _append(m: Machine, values: list[Any]) -> None:
    if not isinstance(m.top(), list):
        raise wrong(m.cursor, "an APPEND", m.top())
    m.top().extend(values)


def _set_items(m: Machine, flat: list[Any]) -> None:
    target = m.top()
    items = target.items if isinstance(target, Made) else target
    if not isinstance(items, dict) or len(flat) % 2:
        raise wrong(m.cursor, "a SETITEM", target)
    items.update(
        {key_of(m.cursor, key): value for key, value in zip(flat[::2], flat[1::2], strict=True)}
    )


def _add_items(m: Machine) -> None:
    values = m.since_mark()
    if not isinstance(m.top(), set):
        raise wrong(m.cursor, "an ADDITEMS", m.top())
    m.top().update(key_of(m.cursor, value) for value in values)


def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise wrong(m.cursor, "a global", module, name)
    m.push(allowed(m.cursor, module, name))


def _persistent(m: Machine) -> None:
    found = m.pop()
    if m.storage is None:
        raise wrong(m.cursor, "a persistent id", found)
    m.push(m.storage(found))


def _reduce(m: Machine) -> None:
    args, function = m.pop(), m.pop()
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise wrong(m.cursor, "a call", function, args)
    if function.label == LOAD_FROM_BYTES:
        m.push(_load_from_bytes(m, args))
    elif function.label in CALLS:
        m.push(CALLS[function.label](m.cursor, args))
    elif function.label in INERT:
        m.push(Made(function.label, args))
    else:
        raise wrong(m.cursor, f"a call of {function.label}", *args)


def _load_from_bytes(m: Machine, args: tuple[Any, ...]) -> Any:
    match args:
        case (Span() as data,) if m.nested is not None:
            return m.nested(data)
        case (bytes() as data,) if m.nested is not None:
            return m.nested(m.cursor.span.memory(data, "a storage in its pickle"))
    raise wrong(m.cursor, "a storage as bytes", *args)


def _new(m: Machine) -> None:
    args, cls = m.pop(), m.pop()
    label = cls.label if isinstance(cls, Global) else ""
    if not isinstance(args, tuple) or not (label in INERT or MODULE.fullmatch(label)):
        raise wrong(m.cursor, f"a new object of {label or 'no class'}", cls, args)
    m.push(Made(label, args))


def _build(m: Machine) -> None:
    state = m.pop()
    if isinstance(m.top(), Made):
        m.top().state = state
    elif not isinstance(
        m.top(), dict
    ):  # an OrderedDict's attributes, such as a state_dict's _metadata, are dropped
        raise wrong(m.cursor, "a BUILD", m.top())


VALUES: dict[str, Callable[[Cursor], Any]] = {
    "NONE": lambda c: None,
    "NEWTRUE": lambda c: True,
    "NEWFALSE": lambda c: False,
    "BININT": lambda c: c.number("<i"),
    "BININT1": lambda c: c.number("<B"),
    "BININT2": lambda c: c.number("<H"),
    "BINFLOAT": lambda c: c.number(">d"),
    "SHORT_BINUNICODE": lambda c: c.text(c.number("<B")),
    "BINUNICODE": lambda c: c.text(c.number("<I")),
    "BINUNICODE8": lambda c: c.text(c.number("<Q")),
    "SHORT_BINSTRING": lambda c: c.text(c.number("<B")),
    "BINSTRING": lambda c: c.text(c.number("<i")),
    "SHORT_BINBYTES": lambda c: c.take(c.number("<B")),
    "EMPTY_LIST": lambda c: [],
    "EMPTY_DICT": lambda c: {},
    "EMPTY_SET": lambda c: set(),
    "EMPTY_TUPLE": lambda c: (),
}
ACTIONS: dict[str, Callable[[Machine], None]] = {
    **{name: functools.partial(_value, make) for name, make in VALUES.items()},
    "POP": lambda m: m.pop(),  # of an object that was made a second time while it was being made
    "PROTO": _protocol,
    "FRAME": lambda m: m.cursor.number("<Q"),
    "MARK": _mark,
    "LONG1": lambda m: _integer(m, "<B"),
    "LONG4": lambda m: _integer(m, "<i"),
    "BINBYTES": lambda m: _bytes(m, "<I"),
    "BINBYTES8": lambda m: _bytes(m, "<Q"),
    "BYTEARRAY8": lambda m: _bytes(m, "<Q"),
    "TUPLE1": lambda m: _tuple(m, 1),
    "TUPLE2": lambda m: _tuple(m, 2),
    "TUPLE3": lambda m: _tuple(m, 3),
    "TUPLE": lambda m: m.push(tuple(m.since_mark())),
    "FROZENSET": lambda m: m.push(frozenset(key_of(m.cursor, value) for value in m.since_mark())),
    "APPEND": lambda m: _append(m, [m.pop()]),
    "APPENDS": lambda m: _append(m, m.since_mark()),
    "SETITEM": lambda m: _set_items(m, [m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m: _set_items(m, m.since_mark()),
    "ADDITEMS": _add_items,
    "BINPUT": lambda m: _put(m, m.cursor.number("<B")),
    "LONG_BINPUT": lambda m: _put(m, m.cursor.number("<I")),
    "MEMOIZE": lambda m: _put(m, len(m.memo)),
    "BINGET": lambda m: _get(m, m.cursor.number("<B")),
    "LONG_BINGET": lambda m: _get(m, m.cursor.number("<I")),
    "GLOBAL": lambda m: m.push(allowed(m.cursor, m.cursor.line(), m.cursor.line())),
    "STACK_GLOBAL": _stack_global,
    "BINPERSID": _persistent,
    "REDUCE": _reduce,
    "NEWOBJ": _new,
    "BUILD": _build,
}
