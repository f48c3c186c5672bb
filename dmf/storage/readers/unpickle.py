"""Pickles of weights, read by the standard library's Unpickler with a closed table of names.

No name in a file is imported, built or called. A name becomes a label. `_made` says what a call of
the label stands for. A call of a class that is neither Python's nor in the table becomes an inert
object. `tree_of` makes a tree of it all. Anything else is refused in one line.

pickle._Unpickler is the standard library's Unpickler in Python. The one in C takes the memory that
a memo index announces, and hashes any key. In Python a subclass can bound both.
"""

from __future__ import annotations

import functools
import pickle
import re
import struct
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dmf.errors import DmfError
from dmf.storage.readers.span import Span, Stream, short
from dmf.storage.readers.tree import DTYPES, PLAIN, Inert, Tensor, pairs, tensor

STORAGES = {
    f"torch.{name}Storage": DTYPES[dtype]
    for name, dtype in pairs("""Float:float32 Double:float64 Half:float16 BFloat16:bfloat16
        Long:int64 Int:int32 Short:int16 Char:int8 Byte:uint8 Bool:bool storage.Untyped:uint8""")
}
TYPES = {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
NUMPY_TYPES = {np.dtype(name).str[1:]: np.dtype(name) for name in PLAIN}  # "f4" and the like
# Names by what a call of each makes. Of Python's own, and of hidden functions of PyTorch and NumPy,
# a file may call no other. Objects of other packages are inert, so they need no name here.
NAMED = {
    "tensor": "torch._utils._rebuild_tensor torch._utils._rebuild_tensor_v2 "
    "torch._utils._rebuild_tensor_v3",
    "parameter": "torch._utils._rebuild_parameter torch._utils._rebuild_parameter_with_state",
    "tensor with notes": "torch._tensor._rebuild_from_type_v2",
    "storage as bytes": "torch.storage._load_from_bytes",
    "size": "torch.Size",
    "persistent object": "torch_utils.persistence._reconstruct_persistent_obj",
    "dictionary": "collections.OrderedDict collections.defaultdict collections.Counter",
    "set": "builtins.set builtins.frozenset",
    "byte string": "builtins.bytes builtins.bytearray",
    "text as bytes": "_codecs.encode",
    "method of getattr": "builtins.getattr",
    "NumPy type": "numpy.dtype",
    "NumPy array": "numpy.core.multiarray._reconstruct",
    "NumPy number": "numpy.core.multiarray.scalar",
    "call of a type": "numpy.ndarray torch.Tensor torch.nn.parameter.Parameter "
    + " ".join(STORAGES | TYPES),
    "object": """argparse.Namespace types.SimpleNamespace collections.deque functools.partial
        datetime.date datetime.datetime datetime.time datetime.timedelta datetime.timezone
        decimal.Decimal fractions.Fraction uuid.UUID random.Random
        pathlib.Path pathlib.PosixPath pathlib.PurePosixPath pathlib.WindowsPath
        pathlib.PureWindowsPath operator.attrgetter operator.itemgetter copyreg._reconstructor
        builtins.bool builtins.complex builtins.dict builtins.float builtins.int builtins.list
        builtins.long builtins.object builtins.range builtins.slice builtins.str builtins.tuple
        builtins.xrange numpy.core.numeric._frombuffer numpy.random._pickle.__randomstate_ctor
        numpy.random._pickle.__generator_ctor numpy.random._pickle.__bit_generator_ctor
        torch.serialization._get_layout""",
}
KINDS = {name: kind for kind, names in NAMED.items() for name in names.split()}
NAME = re.compile(r"[^\W\d]\w{0,99}(\.[^\W\d]\w{0,99}){1,9}")
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}
RENAMED |= {f"numpy._core.{name}": f"numpy.core.{name}" for name in ("multiarray", "numeric")}
MAX_ARGUMENTS = 100
MAX_DEPTH = 100
OPCODES = """
    PROTO MARK POP STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINSTRING
    BINSTRING SHORT_BINBYTES SHORT_BINUNICODE BINUNICODE BINUNICODE8 EMPTY_LIST EMPTY_DICT EMPTY_SET
    EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE APPEND APPENDS BINPUT LONG_BINPUT MEMOIZE BINGET
    LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID"""
CODES = [getattr(pickle, name)[0] for name in OPCODES.split()]
LIBRARY: dict[int, Any] = pickle._Unpickler.dispatch  # type: ignore[assignment]
# What the opcodes of a damaged pickle raise: a wrong index, key, type, value or end.
BROKEN = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, EOFError)


class _Opcodes(dict[int, Any]):
    def __missing__(self, code: int) -> None:
        raise pickle.UnpicklingError(f"opcode {code:#x}, which weights do not need")


class Global(str):
    """The name of a class or function, which is never looked up."""


class Storage(NamedTuple):
    """A torch storage. Where its bytes lie may be found after the pickle that speaks of it."""

    span: Span
    dtype: np.dtype


@dataclass(eq=False)
class Made:
    """An object of a class that is not ours, as far as the pickle has described it."""

    label: str
    args: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Adds to what is a kind of list."""
        self.items[len(self.items)] = value


class Unpickler(pickle._Unpickler):
    """Reads one pickle from the stream. `load` gives raw objects, `tree_of` makes a tree of them.

    storage: makes a `Storage` of a key, type and count; nested: of a storage as bytes.
    """

    stack: list[Any]  # these four are of the standard library's
    metastack: list[list[Any]]
    append: Any
    read: Any

    def __init__(self, stream: Stream, storage: Any = None, nested: Any = None) -> None:
        super().__init__(stream, encoding="utf-8")
        self.stream, self.storage, self.nested = stream, storage, nested

    def load(self) -> Any:
        """The object; DmfError, in one line, for whatever is no pickle of weights."""
        try:
            found = super().load()
        except (*BROKEN, pickle.UnpicklingError, struct.error) as error:
            why = f"{type(error).__name__}: {short(error)}"
            raise self.stream.span.error(f"its pickle cannot be read ({why})") from error
        if self.stack or self.metastack:
            raise self.stream.span.error("its pickle has objects left over", "one object")
        return found

    def wrong(self, what: str, *found: Any) -> DmfError:
        """The refusal of something in a form that nobody writes."""
        what = f"a {what} with {short(found)} in its pickle"
        return self.stream.span.error(what, "the form of PyTorch or NumPy")

    def find_class(self, module: str, name: str) -> Global:
        """The label of a name. Nothing is looked up, so any sound name will do."""
        label = f"{RENAMED.get(module, module)}.{name}"
        if not NAME.fullmatch(label):
            raise self.refused(label)
        return Global(label)

    def refused(self, label: str) -> DmfError:
        """The refusal of a name, or of its call."""
        what = f"its pickle asks for {short(label)}; refused, nothing of it was run"
        plain = "tensors, numbers, text, lists and dictionaries (save the state_dict alone)"
        return self.stream.span.error(what, plain)

    def persistent_load(self, pid: Any) -> Any:
        """The storage, or the class of a module, that a persistent id names."""
        match pid:
            case ("module", Global() as label, *_):
                return label
            case ("storage", Global() as label, str() as key, _, int() as count, *view):
                if label not in STORAGES:
                    raise self.refused(label)
                if self.storage and all(x is None for x in view):
                    return self.storage(key, STORAGES[label], count)
        raise self.wrong("persistent id", pid)

    def key(self, key: Any) -> Any:
        """The key, if its hash costs little: a tuple's can take for ever."""
        if isinstance(key, str | float | None) or isinstance(key, int) and abs(key) < 2**63:
            return key
        what = f"a key of type {type(key).__name__} in its pickle"
        raise self.stream.span.error(what, "text or a number")

    def _checked(self, code: bytes, keys: slice) -> None:
        self.stack[keys] = [self.key(key) for key in self.stack[keys]]
        LIBRARY[code[0]](self)

    def _bytes(self, form: str) -> None:
        size = struct.unpack(form, self.read(struct.calcsize(form)))[0]
        self.append(self.stream.skip(size, "a byte string"))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Made):
            target.state = state
        elif not isinstance(target, dict):  # attributes of an OrderedDict are dropped
            raise self.wrong("BUILD", target)

    def _call(self) -> None:
        args, label = self.stack.pop(), self.stack.pop()
        sane = isinstance(label, Global) and isinstance(args, tuple)
        if not sane or len(args) > MAX_ARGUMENTS:
            raise self.wrong("call", label, args)
        if label not in KINDS and _closed(label):
            raise self.refused(label)
        self.append(_made(self, label, args))

    dispatch = _Opcodes((code, LIBRARY[code]) for code in CODES)
    dispatch[pickle.FRAME[0]] = lambda self: self.read(8)  # its length; nothing is read ahead
    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = _call
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.BINBYTES[0]] = lambda self: self._bytes("<I")
    dispatch[pickle.BINBYTES8[0]] = lambda self: self._bytes("<Q")
    dispatch[pickle.BYTEARRAY8[0]] = lambda self: self._bytes("<Q")
    dispatch[pickle.SETITEM[0]] = lambda self: self._checked(pickle.SETITEM, slice(-2, -1))
    dispatch[pickle.SETITEMS[0]] = lambda self: self._checked(pickle.SETITEMS, slice(0, None, 2))
    dispatch[pickle.ADDITEMS[0]] = lambda self: self._checked(pickle.ADDITEMS, slice(None))
    dispatch[pickle.FROZENSET[0]] = lambda self: self._checked(pickle.FROZENSET, slice(None))


def _made(m: Unpickler, label: Global, args: tuple[Any, ...]) -> Any:
    """What a call stands for."""
    match (KINDS.get(label, "object"), *args):
        case ("tensor", Storage() as on, int() as at, tuple() as size, tuple() as steps, *more):
            # requires_grad and hooks; then a type, where the storage has another, and marks
            types = [TYPES[x] for x in more[2:3] if isinstance(x, Global) and x in TYPES]
            if not any(more[2 + len(types) :]):
                return tensor(on.span, [*types, on.dtype][0], size, steps, at)
        case ("parameter", Tensor() as found, bool(), *_):
            return found
        case ("tensor with notes", Global() as inner, Global(), tuple() as of, _):
            if KINDS.get(inner) in ("tensor", "parameter"):
                return _made(m, inner, of[:MAX_ARGUMENTS])
        case ("storage as bytes", Span() | bytes() as data) if m.nested is not None:
            return m.nested(m.stream.span.of(data))
        case ("size", tuple() as size):
            return size
        case ("persistent object", {"class_name": str() as name, "state": state}):
            return Made("persistent", (name,), state)  # the code beside it goes no further
        case ("dictionary",) | ("dictionary", Global()):
            return {}
        case ("dictionary", dict() as found):
            return found
        case ("dictionary", list() as listed):  # as Python 2 wrote it
            m.stream.charge(len(listed))
            return {m.key(key): value for key, value in listed}
        case ("set", list() | tuple() as values):
            m.stream.charge(len(values))
            return {m.key(value) for value in values}
        case ("byte string",):
            return b""
        case ("byte string", bytes() | Span() as data):
            return data
        case ("text as bytes", str() as text, "latin1"):
            m.stream.charge(len(text) // 64)
            return text.encode("latin1")
        case ("method of getattr", Made("persistent"), str() as name):
            return Made("method", (name,))
        case ("method of getattr", Global() as outer, str() as name):  # a class within a class
            return m.find_class(outer, name)
        case ("NumPy type", str() as code, *_):
            return Made("numpy.dtype", (code,))
        case ("NumPy array", "numpy.ndarray", tuple(), bytes()):
            return Made("numpy.ndarray", ())
        case ("NumPy number", Made("numpy.dtype") as made, bytes() as data):
            if (dtype := _dtype(made)) and len(data) == dtype.itemsize:
                return np.frombuffer(data, dtype)[0].item()
        case ("object", *_):
            return Made(label, args)
    raise m.wrong(KINDS[label], *args)


def _closed(label: str) -> bool:
    """Whether only names of the table may be called: Python's own, and functions on tensors."""
    root, _, rest = label.partition(".")
    own = root in ("torch", "numpy") and rest.rpartition(".")[2].startswith("_")
    return own or root in sys.stdlib_module_names or root == "__builtin__"


def _dtype(made: Made) -> np.dtype | None:
    """The type of plain little-endian numbers."""
    match made.state:
        case None | (_, "<" | "|", *_):
            return NUMPY_TYPES.get(made.args[0])
    return None


def tree_of(value: Any, span: Span, done: dict[int, Any] | None = None, depth: int = 0) -> Any:
    """The tree of what a pickle describes: see `dmf.storage.readers.read.Weights`.

    done: the trees that were made already, by the id of the object.
    """
    done = {} if done is None else done
    if id(value) in done:
        return done[id(value)]
    if depth > MAX_DEPTH:
        what = f"its pickle nests objects over {MAX_DEPTH} deep or within themselves"
        raise span.error(what, "a plain tree")
    below = functools.partial(tree_of, span=span, done=done, depth=depth + 1)
    made = value
    if isinstance(value, Made):  # an object may hold itself, as a config that its parts know
        done[id(value)] = Inert(value.label, {})
    match value:
        case Global() | Storage() | Span():
            made = Inert(value if isinstance(value, Global) else type(value).__name__, {})
        case dict():
            made = {key: below(x) for key, x in value.items()}
        case list() | tuple() if not isinstance(value, Tensor):
            made = {i: below(x) for i, x in enumerate(value)}
        case set():
            made = frozenset(value)
        case Made("numpy.ndarray"):
            made = _array(value, span)
        case Made("persistent", (name,)):
            made = Inert(name, below(value.state))
        case Made():  # whatever is made a tree must stay: `done` knows it by its id
            kept = value.items or value.state or value.args or value.items
            made = Inert(value.label, below(kept))
    done[id(value)] = made
    return made


def _array(made: Made, span: Span) -> Any:
    """A row-major array of plain numbers; others, which no network has, stay unread."""
    match made.state:
        case (_, tuple() as size, Made("numpy.dtype") as kind, False, bytes() | Span() as data):
            if dtype := _dtype(kind):
                return tensor(span.of(data), dtype, size)
    return Inert(made.label, {})
