"""The tree of an Orbax directory that another program has written."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dmf.errors import DmfError, short
from dmf.storage.readers.tree import Inert, Tensor

STEP = "_CHECKPOINT_METADATA"  # in a folder of Orbax that holds one tree or several


def read_orbax(path: Path) -> Any:
    """The tree of somebody else's Orbax directory, as nested dicts. None where `path` is none.

    Leaves are lazy `Tensor`s, numbers and texts. A list, which only optimisers have, is inert.
    Raises DmfError where it cannot be read.
    """
    for folder in (path.absolute(), path.absolute() / "default"):  # the latter of a manager's step
        if not os.path.isfile(folder / "_METADATA"):
            continue
        inner = not os.path.isfile(folder / STEP) and os.path.isfile(folder.parent / STEP)
        where = (folder.parent, folder.name) if inner else (folder, "AUTO")
        try:
            tree = ocp.metadata(*where).metadata
        except Exception as error:  # Orbax raises errors of many kinds
            what = f"{where[0]} cannot be read: {short(error)}"
            raise DmfError(f"{what}; expected an Orbax checkpoint of one tree") from error
        return _tree(where, tree, ())
    return None


def _tree(where: tuple[Path, str], node: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(node, Mapping):
        inner = {name: below for name, below in node.items() if below is not None}
        return {name: _tree(where, x, (*keys, name)) for name, x in inner.items()}
    if not hasattr(node, "shape") or not hasattr(node, "dtype"):
        return node if isinstance(node, int | float | str) else Inert(type(node).__name__, {})
    shape, dtype = tuple(node.shape), np.dtype(node.dtype)
    return Tensor(shape, dtype, functools.partial(read_leaf, *where, keys, shape, dtype))


def read_leaf(
    folder: Path, name: str, path: Sequence[str], shape: tuple[int, ...], dtype: Any
) -> Any:
    """The values of one leaf of a tree, below the keys `path`. Nothing else is read."""
    target: Any = np.zeros(shape, dtype)
    for key in reversed(path):
        target = {key: target}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            return jax.tree.leaves(ocp.load(folder.absolute(), target, checkpointable_name=name))[0]
    except Exception as error:  # Orbax raises errors of many kinds
        what = f"{folder}: {'.'.join(path)} cannot be read: {short(error)}"
        raise DmfError(f"{what}; expected an undamaged Orbax checkpoint") from error
