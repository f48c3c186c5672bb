"""The audit of a conversion: every tensor used once, every leaf filled once, shapes and dtypes as expected, and a report.

Names and shapes are checked before a byte of values is read; values are then read tensor by tensor, so that memory holds the
leaves and one tensor.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmf.convert.rules import FLOATS, Rule
from dmf.errors import DmfError
from dmf.storage.readers.read import Tensor

Shapes = Mapping[str, tuple[int, ...]]


def convert(
    rules: Sequence[Rule],
    tensors: Mapping[str, Tensor],
    network: Any,
    kind: str,
    progress: Callable[[int, int], None],
) -> tuple[Any, list[dict[str, Any]]]:
    """(parameters, the report's rows) of a network from the tensors of a file, checked before and while they are read."""
    shapes = leaf_shapes(network)
    check(rules, tensors, shapes, kind)
    leaves: dict[str, Any] = {}

    def fresh(names: Sequence[str]) -> Mapping[str, np.ndarray]:
        draw = jax.jit(
            lambda key: {name: flat(network.init(key))[name] for name in names}
        )  # computes these leaves alone
        return jax.device_get(draw(jax.random.key(0))) if names else {}

    def put(leaf: str, values: np.ndarray) -> None:
        leaves[leaf] = jnp.asarray(values)

    rows = read(rules, tensors, shapes, fresh, put, progress)
    return nested(leaves), rows


def flat(tree: Any) -> dict[str, Any]:
    """Nested dicts -> {'a/b/c': leaf}."""
    return {
        "/".join(k.key for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{'a/b/c': leaf} -> nested dicts; inverts `flat`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *rooms, name = path.split("/")
        node = tree
        for room in rooms:
            node = node.setdefault(room, {})
        node[name] = leaf
    return tree


def leaf_shapes(network: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of the network's parameters, by path; nothing is allocated."""
    return {
        path: tuple(x.shape)
        for path, x in flat(jax.eval_shape(network.init, jax.random.key(0))).items()
    }


def check(rules: Sequence[Rule], tensors: Mapping[str, Tensor], leaves: Shapes, kind: str) -> None:
    """Holds a key map against the names, shapes and dtypes of a file and of a network. Raises DmfError naming the first."""
    _once("leaf", [leaf for rule in rules for leaf in rule.leaves], leaves, kind)
    known = [name for rule in rules for name in rule.tensors]
    for name in tensors:
        if name not in known:
            raise DmfError(
                f"tensor {name} {list(tensors[name].shape)} has no place in this network: expected the {len(known)} tensors "
                f"of kind {kind}"
            )
    _once("tensor", known, known, kind)
    for rule in rules:
        absent = [name for name in rule.tensors if name not in tensors]
        if absent and not (rule.missing and len(absent) == len(rule.tensors)):
            raise DmfError(
                f"tensor {absent[0]} is missing: expected it in weights of kind {kind}, as there are {len(tensors)} others"
            )
        if not absent:
            _check_tensors(rule, tensors, leaves)


def _once(what: str, names: Sequence[str], wanted: Any, kind: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    lost = sorted(set(wanted) - set(names)) + sorted(set(names) - set(wanted))
    if twice or lost:
        raise DmfError(
            f"{what} {(twice or lost)[0]} is named {'twice' if twice else 'by the network or the key map alone'}: "
            f"expected this network to be one of kind {kind}"
        )


def _check_tensors(rule: Rule, tensors: Mapping[str, Tensor], leaves: Shapes) -> None:
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
) -> list[dict[str, Any]]:
    """Converts rule by rule, handing each leaf as C-contiguous float32 to `put(leaf, values)`; returns the report's rows.

    fresh(names) -> the network's own initial values, for leaves that a file may lack and that must not start at zero.
    progress(done, total) in bytes of the file's tensors. Raises DmfError for a value that is not finite.
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
            put(leaf, np.asarray(x, np.float32, order="C"))
        if (
            present or rule.leaves
        ):  # the rule of a tensor that may be absent, and is, has nothing to report
            rows.append(_row(rule, tensors, present))
        done += sum(_bytes(tensors[name]) for name in rule.tensors if name in tensors)
        progress(done, total)
    return rows


def write(rules: Sequence[Rule], leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leaves -> C-contiguous tensors by name. Empties `leaves` on the way.

    Rules that share a reason why a file may lack them are one branch; a branch whose leaves meant to start at zero are still
    zero has no say in the output, and is left out.
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
            out[name] = np.asarray(
                x, x.dtype if np.issubdtype(x.dtype, np.integer) else np.float32, order="C"
            )
    return out


def exceptions(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The report's rows that are no plain copies, each with its reason."""
    return [
        {"names": row["tensors"] or row["leaves"], "reason": row["note"]}
        for row in rows
        if row["note"]
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The report for a terminal: tensors, leaves and values per part of the network, then the exceptions with their reasons."""
    parts: dict[str, list[int]] = {}
    for row in rows:
        name = (row["leaves"] or row["tensors"])[0]
        room = name.replace(".", "/").rpartition("/")[0].split("/")[0] or name
        part = parts.setdefault(re.sub(r"_\d+$", "_*", room), [0, 0, 0])
        for i, more in enumerate((len(row["tensors"]), len(row["leaves"]), row["values"])):
            part[i] += more
    lines = [f"{'part':<24}{'tensors':>9}{'leaves':>8}{'values':>14}"]
    parts["all"] = [sum(column) for column in zip(*parts.values(), strict=True)]
    lines += [f"{part:<24}{a:>9}{b:>8}{c:>14,}" for part, (a, b, c) in parts.items()]
    grouped: dict[str, list[str]] = {}
    for row in exceptions(rows):
        grouped.setdefault(row["reason"], []).extend(row["names"])
    for reason, names in grouped.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{names[0]}{more}: {reason}")
    return "\n".join(lines)


def _row(rule: Rule, tensors: Mapping[str, Tensor], present: bool) -> dict[str, Any]:
    used = [name for name in rule.tensors if present]
    kinds = sorted({tensors[name].dtype.name for name in used})
    note = rule.note
    if rule.tensors and not present:
        note = f"not in the file: {rule.missing}"
    elif rule.leaves and kinds != ["float32"]:
        note = f"{note}{'; ' if note else ''}cast from {', '.join(kinds)} to float32"
    return {
        "tensors": used,
        "leaves": list(rule.leaves),
        "shapes": [list(tensors[name].shape) for name in used],
        "dtypes": kinds,
        "values": sum(int(np.prod(tensors[name].shape)) for name in used),
        "note": note,
    }


def _finite(name: str, tensor: Tensor) -> np.ndarray:
    found = tensor.read()
    if (
        found.dtype.name in FLOATS
        and not np.isfinite(found.astype(np.float32) if found.dtype.itemsize < 4 else found).all()
    ):
        count = int(found.size - np.isfinite(found.astype(np.float64)).sum())
        raise DmfError(
            f"tensor {name}: {count} of its {found.size} values are not finite; expected weights of a working network"
        )
    return found


def _bytes(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape)) * tensor.dtype.itemsize
