"""The tree that a weight file holds: its tensors, and flat dictionaries of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dmf.errors import DmfError
from dmf.storage.readers.span import Span, short

MAX_VISITS = 1_000_000  # a few shared lists can stand for more names than memory holds
MAX_NAME = 1000
MAX_DIMS = 32
MAX_REPEATED = 2**26  # bytes of a tensor that repeats values: it is larger than its file
MAX_SIZE = 2**58  # of a shape: its bytes can be counted in 63 bits
PREFIXES = ("module.", "_orig_mod.")  # added by DistributedDataParallel and torch.compile
INTEGERS = [f"{sign}int{bits}" for sign in ("u", "") for bits in (8, 16, 32, 64)]
PLAIN = ["bool", *INTEGERS, "float16", "float32", "float64"]
NARROW = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
DTYPES = {np.dtype(kind).name: np.dtype(kind) for kind in (*PLAIN, *NARROW)}


def pairs(text: str) -> list[list[str]]:
    """The pairs of a text such as "a:b c:d", for tables."""
    return [pair.split(":") for pair in text.split()]


class Tensor(NamedTuple):
    """A tensor of a file. `read()` reads its bytes alone and gives a C-contiguous array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Inert:
    """What a pickle says of an object: the name of its class and its fields. Nothing was run."""

    class_name: str
    state: Any


def shape_of(span: Span, shape: Sequence[Any]) -> tuple[int, ...]:
    """A shape that NumPy can have; DmfError for another one."""
    sane = len(shape) <= MAX_DIMS and all(isinstance(n, int) and 0 <= n < MAX_SIZE for n in shape)
    if not sane or math.prod(max(n, 1) for n in shape) >= MAX_SIZE:
        raise span.error(f"shape {short(shape)}", f"up to {MAX_DIMS} sizes >= 0 of sane extent")
    return tuple(shape)


def tensor(
    span: Span, dtype: np.dtype, shape: Sequence[Any], strides: Any = None, offset: Any = 0
) -> Tensor:
    """A tensor over a span; DmfError where it is not all inside.

    strides, offset: in values. Without strides it is row-major and fills the span exactly.
    """
    sizes, held = shape_of(span, shape), span.size // dtype.itemsize
    steps = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))] if strides is None else strides
    count, reach = math.prod(sizes), held + 1
    fills = strides is not None or count * dtype.itemsize == span.size
    sane = all(isinstance(n, int) and n >= 0 for n in (*steps, offset))
    most = max(held, MAX_REPEATED // dtype.itemsize)
    if sane and fills and len(steps) == len(sizes) and count <= most:
        steps = [step if n > 1 else 0 for n, step in zip(sizes, steps, strict=True)]
        reach = 1 + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
        reach = reach + offset if count else 0
    if reach > held:
        where = f"with strides {short(steps)} from value {short(offset)}"
        what = f"{dtype} of shape {short(shape)} {where} (is the file cut off?)"
        raise span.error(f"holds {span.size} bytes, {held} values", what)

    def read() -> np.ndarray:
        if not count:
            return np.empty(sizes, dtype)
        flat = span.array(dtype, offset, reach - offset)
        apart = [step * dtype.itemsize for step in steps]
        return np.asarray(np.lib.stride_tricks.as_strided(flat, sizes, apart), order="C")

    return Tensor(sizes, dtype, read)


def float32(name: str, values: np.ndarray) -> np.ndarray:
    """Values in float32, row-major. Raises DmfError where one is not finite after the cast."""
    with np.errstate(over="ignore"):
        found = np.asarray(values, np.float32, order="C")
    if lost := found.size - int(np.isfinite(found).sum()):
        raise DmfError(
            f"tensor {name}: {lost} of its {found.size} values are not finite in float32; "
            "expected weights of a working network"
        )
    return found


def flatten(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """{dotted name: tensor} of a tree, in its order.

    Positions in a list become numbers. A pickled torch.nn.Module gives the names of its state
    dict. Leaves that are no tensors are dropped.
    prefix: put before every name, with a dot. Raises DmfError where two tensors get one name, or
    names have no end.
    """
    found: dict[str, Tensor] = {}
    todo: list[tuple[str, Any]] = [(prefix, tree)]
    visits = 0
    while todo:
        name, node = todo.pop()
        inner = _inner(node)
        visits += 1 + len(inner)
        if visits > MAX_VISITS or len(name) > MAX_NAME:
            limits = f"over {MAX_VISITS} entries, or a name of over {MAX_NAME} letters"
            raise DmfError(f"the tree under {name[:40]!r} has {limits}: expected a network's")
        if isinstance(node, Tensor):
            if name in found:
                raise DmfError(f"tensor name {name!r} is used twice: expected one for each tensor")
            found[name] = node
        below = [(f"{name}.{key}" if name else str(key), value) for key, value in inner.items()]
        todo.extend(reversed(below))
    return found


def _inner(node: Any) -> Mapping[Any, Any]:
    if isinstance(node, Inert):
        return _of_module(node) or {}
    listed = isinstance(node, list | tuple) and not isinstance(node, Tensor)
    return node if isinstance(node, Mapping) else dict(enumerate(node)) if listed else {}


def _of_module(inert: Inert) -> dict[str, Any] | None:
    """Parameters, persistent buffers and inner modules of a torch.nn.Module, or None."""
    fields = inert.state if isinstance(inert.state, dict) else {}
    parts = [fields.get(key) for key in ("_parameters", "_buffers", "_modules")]
    if not all(isinstance(part, dict) for part in parts):
        return None
    parameters, buffers, modules = (dict(part or {}) for part in parts)
    hidden = x if isinstance(x := fields.get("_non_persistent_buffers_set"), frozenset) else ()
    buffers = {key: value for key, value in buffers.items() if key not in hidden}
    held = {key: value for key, value in modules.items() if value is not None}
    return {**parameters, **buffers, **held}


def strip_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the 'module.' and '_orig_mod.' that begin every one of their names."""
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) and name != prefix for name in tensors):
            return strip_prefix({k.removeprefix(prefix): x for k, x in tensors.items()})
    return dict(tensors)


def module_tensors(inert: Inert) -> dict[str, Tensor]:
    """The state dict of a pickled torch.nn.Module, in PyTorch's order. Raises DmfError."""
    if _of_module(inert) is None:
        raise DmfError(f"the network is a {inert.class_name!r:.80}: expected a torch.nn.Module")
    return flatten(inert)
