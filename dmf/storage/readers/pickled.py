"""What the names in a pickled weight file stand for: which are known, what each call makes, and the tree of it all.

Every name is a label that is compared with the lists below; none is looked up, imported or called.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dmf.errors import DmfError
from dmf.storage.readers.span import DTYPES, MAX_LINE, PLAIN, Cursor, Span, packed, short, strided
from dmf.storage.readers.tree import MAX_DEPTH, Inert, Tensor

PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
STORAGES = {
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.storage.UntypedStorage": "uint8",
}
TORCH_DTYPES = {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
NUMPY_DTYPES = {np.dtype(name).str[1:]: np.dtype(name) for name in PLAIN}  # "f4" and the like
INERT = {
    "argparse.Namespace",
    "dnnlib.util.EasyDict",
    "ml_collections.config_dict.config_dict.ConfigDict",
    "ml_collections.config_dict.config_dict.FieldReference",
    "ml_collections.config_dict.config_dict.FrozenConfigDict",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "torch.device",
    "torch.nn.parallel.data_parallel.DataParallel",
    *(
        f"{pl}.callbacks.model_checkpoint.ModelCheckpoint"
        for pl in ("pytorch_lightning", "lightning.pytorch")
    ),
    *(
        f"builtins.{name}"
        for name in (
            "bool",
            "dict",
            "float",
            "int",
            "list",
            "long",
            "range",
            "str",
            "tuple",
            "xrange",
        )
    ),
    *(f"numpy.{name}" for name in PLAIN if name != "bool"),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
}
MODULE = re.compile(r"torch\.nn\.modules\.[a-z_]+\.[A-Z]\w*")
CLASSES = {
    "numpy.ndarray",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
}  # only ever arguments of the calls below
LOAD_FROM_BYTES = "torch.storage._load_from_bytes"
MAX_TENSOR_ARGS = 8
_OPEN = object()  # stands for a node whose inside is being looked at


@dataclass(frozen=True)
class Global:
    """The name of a class or function. It is never looked up."""

    label: str


@dataclass(eq=False)
class Storage:
    """A torch storage; its bytes may be found only after the pickle that speaks of it."""

    name: str
    dtype: np.dtype
    count: int
    span: Span | None = None


@dataclass(frozen=True, eq=False)
class View:
    """A torch tensor: a view on a storage."""

    storage: Storage
    dtype: np.dtype
    offset: int
    size: tuple[Any, ...]
    stride: tuple[Any, ...]


@dataclass(eq=False)
class Made:
    """An object of a foreign class, as far as the pickle has described it."""

    label: str
    args: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


def wrong(cursor: Cursor, what: str, *found: Any) -> DmfError:
    """The refusal of something in a form that nobody writes."""
    return cursor.span.error(
        f"{what} with {short(found)} in its pickle; expected the form that PyTorch or NumPy writes"
    )


def key_of(cursor: Cursor, value: Any) -> Any:
    """A dictionary key or member of a set; only those whose hash costs little."""
    if isinstance(value, str | float | None) or isinstance(value, int) and abs(value) < 2**63:
        return value
    if isinstance(value, Global):
        return value.label
    raise cursor.span.error(
        f"a key of type {type(value).__name__} in its pickle; expected text or a number"
    )


def allowed(cursor: Cursor, module: str, name: str) -> Global:
    """The label of a global, or the refusal of one that weight files do not need."""
    label = (
        f"{PYTHON2.get(module, module)}.{name}"
        if len(module) + len(name) <= MAX_LINE
        else "a long name"
    )
    if "." in name or not (label in KNOWN or MODULE.fullmatch(label)):
        raise cursor.span.error(
            f"its pickle asks for {short(label)}; refused, nothing of it was run; expected only tensors, numbers, text "
            "and lists or dictionaries of them (save the state_dict alone, best as safetensors)"
        )
    return Global(label)


def _rebuild_tensor(cursor: Cursor, args: tuple[Any, ...]) -> Any:
    match args if len(args) <= MAX_TENSOR_ARGS else ():
        case (Storage() as storage, int() as offset, tuple() as size, tuple() as stride, *rest):
            extra = rest[
                2:
            ]  # after requires_grad and hooks: a type, where it is not that of the storage, and marks
            named = [
                TORCH_DTYPES[x.label]
                for x in extra[:1]
                if isinstance(x, Global) and x.label in TORCH_DTYPES
            ]
            if not any(extra[len(named) :]):
                return View(storage, [*named, storage.dtype][0], offset, size, stride)
    raise wrong(cursor, "a tensor", *args[:MAX_TENSOR_ARGS])


def _rebuild_parameter(cursor: Cursor, args: tuple[Any, ...]) -> Any:
    match args:
        case (View() as view, bool(), *_):
            return view
    raise wrong(cursor, "a parameter", *args)


def _rebuild_typed(cursor: Cursor, args: tuple[Any, ...]) -> Any:
    """A tensor with attributes of its own, which are dropped."""
    match args:
        case (
            Global(label),
            Global("torch.Tensor" | "torch.nn.parameter.Parameter"),
            tuple() as inner,
            _,
        ) if label in TENSORS:
            return TENSORS[label](cursor, inner)
    raise wrong(cursor, "a tensor", *args)


def _persistence(cursor: Cursor, args: tuple[Any, ...]) -> Any:
    match args:
        case ({"class_name": str() as name, "state": state},):
            return Made("persistent", (name,), state)  # module_src, the code, goes no further
    raise wrong(cursor, "a persistent object", *args)


def _encode(cursor: Cursor, args: tuple[Any, ...]) -> Any:
    match args:
        case (str() as text, "latin1"):
            cursor.charge(len(text) // 64)
            if not text or max(text) <= "\xff":
                return text.encode("latin1")
    raise wrong(cursor, "a byte string", *args)


def _size(cursor: Cursor, args: tuple[Any, ...]) -> Any:
    match args:
        case (tuple() as size,):
            return size
    raise wrong(cursor, "a torch.Size", *args)


def _bound_method(cursor: Cursor, args: tuple[Any, ...]) -> Any:
    """getattr(object, name), as a loss that keeps one of its own methods has it; the object, which holds it, is dropped."""
    match args:
        case (Made("persistent"), str() as name):
            return Made("method", (name,))
    raise wrong(cursor, "a call of getattr", *args)


def _byte_string(cursor: Cursor, args: tuple[Any, ...]) -> Any:
    match args:
        case ():
            return b""
        case (bytes() | Span() as data,):
            return data
    raise wrong(cursor, "a byte string", *args)


def _dict(cursor: Cursor, args: tuple[Any, ...]) -> Any:
    """An OrderedDict, of Python 2 with its pairs; a defaultdict with the type of its values; a Counter with a dict."""
    match args:
        case () | (Global(),):
            return {}
        case (dict() as found,):
            return found
        case (list() as pairs,) if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            cursor.charge(len(pairs))
            return {key_of(cursor, key): value for key, value in pairs}
    raise wrong(cursor, "a dictionary", *args)


def _set(cursor: Cursor, args: tuple[Any, ...]) -> Any:
    match args:
        case (list() | tuple() as values,):
            cursor.charge(len(values))
            return {key_of(cursor, value) for value in values}
    raise wrong(cursor, "a set", *args)


def _numpy_dtype(cursor: Cursor, args: tuple[Any, ...]) -> Any:
    match args:
        case (str() as code, *_):
            return Made("numpy.dtype", (code,))
    raise wrong(cursor, "a NumPy type", *args)


def _numpy_empty(cursor: Cursor, args: tuple[Any, ...]) -> Any:
    match args:
        case (Global("numpy.ndarray"), tuple(), bytes()):
            return Made("numpy.ndarray", ())
    raise wrong(cursor, "a NumPy array", *args)


def _numpy_scalar(cursor: Cursor, args: tuple[Any, ...]) -> Any:
    match args:
        case (Made("numpy.dtype") as made, bytes() as data) if (dtype := _dtype(made)) and len(
            data
        ) == dtype.itemsize:
            return np.frombuffer(data, dtype)[0].item()
    raise wrong(cursor, "a NumPy number", *args)


def _dtype(made: Made) -> np.dtype | None:
    """The type of plain little-endian numbers."""
    match made.state:
        case None | (_, "<" | "|", *_):
            return NUMPY_DTYPES.get(made.args[0])
    return None


Call = Callable[[Cursor, tuple[Any, ...]], Any]
TENSORS: dict[str, Call] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
CALLS: dict[str, Call] = {
    **TENSORS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_typed,
    "torch.Size": _size,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistence,
    **{f"collections.{name}": _dict for name in ("OrderedDict", "defaultdict", "Counter")},
    **{f"builtins.{name}": _byte_string for name in ("bytes", "bytearray")},
    "builtins.getattr": _bound_method,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _numpy_empty for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in ("core", "_core")},
}
KNOWN = {*CALLS, *INERT, *STORAGES, *TORCH_DTYPES, *CLASSES, LOAD_FROM_BYTES}


def tree_of(value: Any, span: Span) -> Any:
    """The tree of what a pickle describes: see `dmf.storage.readers.read.Weights`."""
    return _tree(value, span, {}, 0)


def _tree(value: Any, span: Span, done: dict[int, Any], depth: int) -> Any:
    if value is None or isinstance(value, str | int | float | bytes | frozenset):
        return value
    if id(value) in done and done[id(value)] is not _OPEN:
        return done[id(value)]
    if id(value) in done or depth > MAX_DEPTH:
        raise span.error(
            f"its pickle nests objects over {MAX_DEPTH} deep or within themselves; expected a plain tree"
        )
    done[id(value)] = _OPEN
    below = functools.partial(_tree, span=span, done=done, depth=depth + 1)
    done[id(value)] = made = _node(value, span, below)
    return made


def _node(value: Any, span: Span, below: Callable[[Any], Any]) -> Any:
    match value:
        case dict():
            return {key: below(x) for key, x in value.items()}
        case list() | tuple():
            return {i: below(x) for i, x in enumerate(value)}
        case set():
            return frozenset(value)
        case View() if value.storage.span is not None:
            return strided(value.storage.span, value.dtype, value.size, value.stride, value.offset)
        case Made("numpy.ndarray"):
            return _array(value.state, span)
        case Made("persistent", (str() as name,), state):
            return Inert(name, below(state))
        case Made():  # one of the three is made a tree once, however many objects share it
            return Inert(
                value.label, below(value.items or value.state or value.args or value.items)
            )
        case Global():
            return Inert(value.label, {})
        case Span() | Storage():
            return Inert(type(value).__name__, {"name": value.name})
    raise span.error(
        f"a {type(value).__name__} without its bytes in its pickle; expected the bytes of every tensor"
    )


def _array(state: Any, span: Span) -> Tensor | Inert:
    """Row-major little-endian numbers; other arrays, which no network has, are not read."""
    match state:
        case (
            _,
            tuple() as shape,
            Made("numpy.dtype") as made,
            False,
            Span() | bytes() as data,
        ) if dtype := _dtype(made):
            return packed(
                data
                if isinstance(data, Span)
                else span.memory(data, "a NumPy array in its pickle"),
                dtype,
                shape,
            )
    return Inert("numpy.ndarray", {})
