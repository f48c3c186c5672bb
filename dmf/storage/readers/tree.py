"""The tree that a weight file holds, and the ways to make a flat dictionary of tensors from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dmf.errors import DmfError

MAX_VISITS = 1_000_000  # a few shared lists can stand for more names than memory holds
MAX_NAME = 1000
MAX_DEPTH = 100
PREFIXES = (
    "module.",
    "_orig_mod.",
)  # what DistributedDataParallel and torch.compile put before every name


class Tensor(NamedTuple):
    """A tensor of a file: `read()` returns its values as a C-contiguous array, and reads only its own bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Inert:
    """What a pickle says of an object of a foreign class: the class's name and the object's fields. Nothing was called."""

    class_name: str
    state: Any


def flatten(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """{dotted name: tensor} of a tree, in its order; positions are numbers; what is no tensor, `Inert` included, is dropped.

    prefix: put before every name, with a dot. Raises DmfError where two tensors get one name, or names have no end.
    """
    found: dict[str, Tensor] = {}
    todo: list[tuple[str, Any]] = [(prefix, tree)]
    visits = 0
    while todo:
        name, node = todo.pop()
        inner = node if isinstance(node, Mapping | list | tuple) else ()
        visits += 1 + len(inner)
        if visits > MAX_VISITS or len(name) > MAX_NAME:
            raise DmfError(
                f"the tree under {name[:40]!r} has over {MAX_VISITS} entries or a name of over {MAX_NAME} letters: "
                "expected the weights of a network"
            )
        if isinstance(node, Tensor):
            _add(found, name, node)
        items = inner.items() if isinstance(inner, Mapping) else enumerate(inner)
        todo.extend(
            reversed([(f"{name}.{key}" if name else str(key), value) for key, value in items])
        )
    return found


def strip_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the leading 'module.' and '_orig_mod.' that all their names share."""
    names = list(tensors)
    while names and (
        shared := [p for p in PREFIXES if all(n.startswith(p) and n != p for n in names)]
    ):
        names = [name.removeprefix(shared[0]) for name in names]
    return dict(zip(names, tensors.values(), strict=True))


def module_tensors(inert: Inert) -> dict[str, Tensor]:
    """The state dict of a pickled torch.nn.Module: its parameters and persistent buffers, then those of its modules."""
    found: dict[str, Tensor] = {}
    for visits, (name, value) in enumerate(_walk(inert, "", 0)):
        if isinstance(value, Tensor):
            _add(found, name, value)
        if visits > MAX_VISITS:
            raise DmfError(
                f"module {inert.class_name[:40]!r} has over {MAX_VISITS} entries: expected those of a network"
            )
    return found


def _walk(node: Any, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    state = node.state if isinstance(node, Inert) else None
    fields = state if isinstance(state, dict) else {}
    parts = [fields.get(key) for key in ("_parameters", "_buffers", "_modules")]
    if max(depth - MAX_DEPTH, len(prefix) - MAX_NAME) > 0 or not all(
        isinstance(part, dict) for part in parts
    ):
        what = node.class_name if isinstance(node, Inert) else type(node).__name__
        raise DmfError(
            f"module {(prefix or 'itself')[:80]!r} is a {what[:80]!r}: expected a pickled torch.nn.Module"
        )
    parameters, buffers, modules = (dict(part or {}) for part in parts)
    hidden = x if isinstance(x := fields.get("_non_persistent_buffers_set"), frozenset) else ()
    yield from ((f"{prefix}{name}", value) for name, value in parameters.items())
    yield from ((f"{prefix}{name}", value) for name, value in buffers.items() if name not in hidden)
    for name, child in modules.items():
        yield f"{prefix}{name}", None  # counted even where a module is empty
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.", depth + 1)


def _add(found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in found or len(name) > MAX_NAME:
        raise DmfError(
            f"tensor name {name[:80]!r} is used twice or too long: expected one short name for each tensor"
        )
    found[name] = tensor
