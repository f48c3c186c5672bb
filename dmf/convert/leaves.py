"""Parameters by their paths: {"a/b/kernel": leaf}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax


def flat(tree: Any) -> dict[str, Any]:
    """Nested dicts -> {"a/b/c": leaf}."""
    return {
        "/".join(k.key for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/c": leaf} -> nested dicts; inverts `flat`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *rooms, name = path.split("/")
        node = tree
        for room in rooms:
            node = node.setdefault(room, {})
        node[name] = leaf
    return tree


def leaf_shapes(network: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of a network's parameters, by path; nothing is allocated."""
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return {path: tuple(x.shape) for path, x in flat(shapes).items()}
