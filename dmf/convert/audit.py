"""The audit of a conversion: each tensor is used once, each leaf is filled once, and a report.

Names, shapes and dtypes are checked before any value is read.
Values are then read rule by rule, so memory holds the leaves and one rule's tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmf.convert.leaves import flat, leaf_shapes, nested
from dmf.convert.rules import Rule
from dmf.errors import DmfError, printable
from dmf.storage.readers.tree import Tensor, float32

FLOATS = ("float16", "bfloat16", "float32", "float64")

Shapes = Mapping[str, tuple[int, ...]]
Row = dict[str, Any]


def convert(
    rules: Sequence[Rule],
    tensors: Mapping[str, Tensor],
    network: Any,
    kind: str,
    progress: Callable[[int, int], None],
) -> tuple[Any, list[Row]]:
    """Parameters of a network from a file's tensors, and the rows of the report.

    progress(done, total) counts bytes of tensors. Raises DmfError.
    """
    shapes = leaf_shapes(network)
    check(rules, tensors, shapes, kind)
    leaves: dict[str, Any] = {}

    def fresh(names: Sequence[str]) -> Mapping[str, np.ndarray]:
        # jit drops what is not returned, so only these leaves are computed.
        draw = jax.jit(lambda key: {name: flat(network.init(key))[name] for name in names})
        return jax.device_get(draw(jax.random.key(0))) if names else {}

    def put(leaf: str, values: np.ndarray) -> None:
        leaves[leaf] = jnp.asarray(values)

    rows = read(rules, tensors, shapes, fresh, put, progress)
    return nested(leaves), rows


def check(rules: Sequence[Rule], tensors: Mapping[str, Tensor], leaves: Shapes, kind: str) -> None:
    """Compares a key map with the names, shapes and dtypes of a file and of a network.

    Raises DmfError that names the first tensor or leaf that does not fit.
    """
    _once("leaf", [leaf for rule in rules for leaf in rule.leaves], leaves, kind)
    known = [name for rule in rules for name in rule.tensors]
    for name in tensors:
        if name not in known:
            raise DmfError(
                f"tensor {name} {list(tensors[name].shape)} has no place in this network: "
                f"expected the {len(known)} tensors of kind {kind}, or --drop with its name"
            )
    _once("tensor", known, known, kind)
    for rule in rules:
        absent = [name for name in rule.tensors if name not in tensors]
        if absent and not (rule.missing and len(absent) == len(rule.tensors)):
            raise DmfError(
                f"tensor {absent[0]} is missing: expected it in weights of kind {kind}, "
                f"as there are {len(tensors)} others"
            )
        if not absent:
            _check_tensors(rule, tensors, leaves)


def _once(what: str, names: Sequence[str], wanted: Any, kind: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    lost = sorted(set(wanted) - set(names)) + sorted(set(names) - set(wanted))
    if twice or lost:
        how = "twice" if twice else "by the network or the key map alone"
        raise DmfError(
            f"{what} {(twice or lost)[0]} is named {how}: "
            f"expected this network to be one of kind {kind}"
        )


def _check_tensors(rule: Rule, tensors: Mapping[str, Tensor], leaves: Shapes) -> None:
    # Leaves of zeros, turned back into tensors, have the shapes that the file must have.
    wanted = rule.backward(*(np.broadcast_to(np.float32(0), leaves[leaf]) for leaf in rule.leaves))
    for name, like in zip(rule.tensors, wanted, strict=True):
        found = tensors[name]
        if tuple(found.shape) != like.shape:
            raise DmfError(
                f"tensor {name} has shape {list(found.shape)}: expected {list(like.shape)}"
            )
        if rule.leaves and found.dtype.name not in FLOATS:
            raise DmfError(
                f"tensor {name} is {found.dtype.name}: expected one of {', '.join(FLOATS)}"
            )


def read(
    rules: Sequence[Rule],
    tensors: Mapping[str, Tensor],
    leaves: Shapes,
    fresh: Callable[[Sequence[str]], Mapping[str, np.ndarray]],
    put: Callable[[str, np.ndarray], None],
    progress: Callable[[int, int], None],
) -> list[Row]:
    """Converts rule by rule and returns the rows of the report.

    - fresh(names) gives initial values of leaves that the file lacks and that must not be zero.
    - put(leaf, values) is called with each leaf as C-contiguous float32.
    - progress(done, total) counts bytes of tensors.

    Raises DmfError for a value that is not finite.
    """
    total = sum(_bytes(tensors[name]) for rule in rules for name in rule.tensors if name in tensors)
    done, rows = 0, []
    absent = {rule for rule in rules if not all(name in tensors for name in rule.tensors)}
    start = fresh([leaf for rule in absent if rule.fill == "init" for leaf in rule.leaves])
    for rule in rules:
        present = rule not in absent
        if present:
            values = rule.forward(*(_finite(name, tensors[name]) for name in rule.tensors))
        else:
            values = [
                start[leaf] if leaf in start else np.zeros(leaves[leaf]) for leaf in rule.leaves
            ]
        for leaf, x in zip(rule.leaves, values, strict=True):
            put(leaf, float32(", ".join(rule.tensors) or leaf, x))
        if present or rule.leaves:  # else a constant that the file lacks: nothing to report
            rows.append(_row(rule, tensors, present))
        done += sum(_bytes(tensors[name]) for name in rule.tensors if name in tensors)
        progress(done, total)
    return rows


def write(rules: Sequence[Rule], leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leaves -> C-contiguous tensors by name; it empties `leaves` to free memory.

    Rules with the same `missing` are one branch of the network.
    A branch is left out while all of its leaves with fill "zero" are zero:
    the output then does not depend on it.
    """
    used = {
        rule.missing
        for rule in rules
        if rule.leaves and rule.fill == "zero" and any(np.any(leaves[leaf]) for leaf in rule.leaves)
    }
    out: dict[str, np.ndarray] = {}
    for rule in rules:
        values = [leaves.pop(leaf) for leaf in rule.leaves]
        if rule.missing and rule.leaves and rule.missing not in used:
            continue
        for name, x in zip(rule.tensors, rule.backward(*values), strict=True):
            dtype = x.dtype if np.issubdtype(x.dtype, np.integer) else np.float32
            out[name] = np.asarray(x, dtype, order="C")
    return out


def exceptions(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The rows that are no plain copies, each with its reason."""
    return [
        {"names": row["tensors"] or row["leaves"], "reason": row["note"]}
        for row in rows
        if row["note"]
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The report for a terminal: counts for each part of the network, then the exceptions."""
    parts: dict[str, list[int]] = {}
    for row in rows:
        name = (row["leaves"] or row["tensors"])[0]
        room = name.replace(".", "/").rpartition("/")[0].split("/")[0] or name
        part = parts.setdefault(re.sub(r"_\d+$", "_*", room), [0, 0, 0])
        for i, more in enumerate((len(row["tensors"]), len(row["leaves"]), row["values"])):
            part[i] += more
    lines = [f"{'part':<24}{'tensors':>9}{'leaves':>8}{'values':>14}"]
    parts["all"] = [sum(column) for column in zip(*parts.values(), strict=True)]
    lines += [f"{printable(p):<24}{a:>9}{b:>8}{c:>14,}" for p, (a, b, c) in parts.items()]
    grouped: dict[str, list[str]] = {}
    for row in exceptions(rows):
        grouped.setdefault(row["reason"], []).extend(row["names"])
    for reason, names in grouped.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(printable(f"{names[0]}{more}: {reason}"))
    return "\n".join(lines)


def _row(rule: Rule, tensors: Mapping[str, Tensor], present: bool) -> Row:
    used = [name for name in rule.tensors if present]
    dtypes = sorted({tensors[name].dtype.name for name in used})
    note = rule.note
    if rule.tensors and not present:
        note = f"not in the file: {rule.missing}"
    elif rule.leaves and dtypes != ["float32"]:
        note = f"{note}{'; ' if note else ''}cast from {', '.join(dtypes)} to float32"
    return {
        "tensors": used,
        "leaves": list(rule.leaves),
        "shapes": [list(tensors[name].shape) for name in used],
        "dtypes": dtypes,
        "values": sum(int(np.prod(tensors[name].shape)) for name in used),
        "note": note,
    }


def _finite(name: str, tensor: Tensor) -> np.ndarray:
    found = tensor.read()
    if found.dtype.name in FLOATS:
        float32(name, found)
    return found


def _bytes(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape)) * tensor.dtype.itemsize
