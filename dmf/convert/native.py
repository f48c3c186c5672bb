"""Our own weights under PyTorch names: what an export writes by default, and reads back exactly.

It fits any network of ours: the leaf a/b/kernel is the tensor a.b.weight in PyTorch's layout.
It has the conventions of this code. The metadata of the file hold the network's config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dmf.convert.kind import Kind, Shape, Tensors
from dmf.convert.leaves import flat
from dmf.convert.rules import Rule, mirrored
from dmf.errors import DmfError
from dmf.networks import every
from dmf.storage import records
from dmf.storage.readers.tree import Tensor, flatten

METADATA = "dmf"  # its key: JSON with network, image_shape, conventions, licence
COPY = "weights"
CONVENTIONS = (
    "t = 1 noise, t = 0 data, z = (1 - t) x + t e, v = e - x; "
    "u(z, r, t) sees r through h = t - r; x = e - u(e, 0, 1)"
)


def described(weights: Any) -> dict[str, Any]:
    """{"network", "image_shape"} as JSON text, from an export's metadata; {} for another file.

    weights: an opened file with `metadata`, as is the argument of `licence`.
    """
    found = _about(weights)
    names = ("network", "image_shape")
    return {name: json.dumps(found[name]) for name in names} if {*names} <= set(found) else {}


def licence(weights: Any) -> str:
    """The licence note that an export carries on."""
    found = _about(weights).get("licence", "")
    return found if isinstance(found, str) and found else NATIVE.licence


def _about(weights: Any) -> dict[str, Any]:
    try:
        found = json.loads(weights.metadata[METADATA])
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _select(tree: Any, which: str) -> tuple[dict[str, Tensor], str]:
    if which not in ("", COPY):
        raise DmfError(f"--copy={which} is not in this file: expected {COPY}")
    return flatten(tree), COPY


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[Any, Shape]:
    if set(given) != {"network", "image_shape"}:
        raise DmfError(
            f"no metadata under {METADATA!r}: "
            "expected a .safetensors file that dmf has exported, and no --set"
        )
    wanted = "a file that dmf has exported"
    values = records.parse(given["network"], dict, "its metadata, network", wanted)
    sizes = [records.POSITIVE]
    shape = records.parse(given["image_shape"], sizes, "its metadata, image_shape", wanted)
    return every.network_config(values), tuple(shape)


def _rules(config: Any, image_shape: Shape, tensors: Tensors | None) -> list[Rule]:
    network = every.build(config, image_shape)
    shapes = flat(jax.eval_shape(network.init, jax.random.key(0)))
    return [mirrored(leaf, x.ndim) for leaf, x in shapes.items()]


def _nothing(*_: Any) -> dict[str, np.ndarray]:
    return {}


NATIVE = Kind(
    name="dmf",
    network="",
    licence="that of the weights it was made from",
    conventions=CONVENTIONS,
    select=_select,
    describe=_describe,
    rules=_rules,
    outputs=_nothing,
    torch_outputs=_nothing,
    probe=_nothing,
)
