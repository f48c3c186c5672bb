"""Our own weights under PyTorch names: what `dmf.export` writes when no other layout is asked for, and reads back bit for bit.

Any network of ours: 'a/b/kernel' is the tensor 'a.b.weight' in PyTorch's layout, conventions as everywhere in this
code (t = 1 noise, v = e - x). The network's config travels in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dmf import pretrained
from dmf.convert.rules import Kind, Rule, conv, linear, plain
from dmf.errors import DmfError
from dmf.storage.readers.read import Tensor, Weights, flatten

METADATA = (
    "dmf"  # key of a safetensors file's metadata: JSON with network, image_shape, conventions
)
CONVENTIONS = "t = 1 noise, t = 0 data, z = (1 - t) x + t e, v = e - x; u(z, r, t) sees r through h = t - r; x = e - u(e, 0, 1)"


def described(weights: Weights) -> dict[str, Any]:
    """{"network", "image_shape"} as JSON text where the file is one of our exports, else nothing."""
    found = _about(weights)
    if not {"network", "image_shape"} <= set(found):
        return {}
    return {
        "network": json.dumps(found["network"]),
        "image_shape": json.dumps(found["image_shape"]),
    }


def licence(weights: Weights) -> str:
    """The licence note that an export carries on."""
    found = _about(weights).get("licence", "")
    return found if isinstance(found, str) and found else NATIVE.licence


def _about(weights: Weights) -> dict[str, Any]:
    try:
        found = json.loads(weights.metadata[METADATA])
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _select(tree: Any, which: str) -> tuple[dict[str, Tensor], str]:
    if which not in ("", "weights"):
        raise DmfError(f"copy = {which!r}: expected none, an export holds one copy")
    return flatten(tree), "weights"


def _describe(
    tensors: Mapping[str, Tensor], given: Mapping[str, Any]
) -> tuple[Any, tuple[int, ...]]:
    if set(given) != {"network", "image_shape"}:
        raise DmfError(
            f"no metadata under {METADATA!r}: expected a .safetensors file that dmf has exported, and no --set"
        )
    try:
        values, shape = json.loads(given["network"]), json.loads(given["image_shape"])
    except ValueError as error:
        raise DmfError(
            f"its metadata is no JSON ({error}): expected a file that dmf has exported"
        ) from error
    if (
        not isinstance(values, dict)
        or not isinstance(shape, list)
        or not all(type(n) is int and n > 0 for n in shape)
    ):
        raise DmfError(
            "its metadata names no network and image shape: expected a file that dmf has exported"
        )
    return pretrained.network_config(values), tuple(shape)


def _rules(
    config: Any, image_shape: tuple[int, ...], tensors: Mapping[str, Tensor] | None
) -> list[Rule]:
    network = pretrained.build(config, image_shape)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return [
        _rule("/".join(k.key for k in path), x.ndim)
        for path, x in jax.tree_util.tree_leaves_with_path(shapes)
    ]


def _rule(leaf: str, ndim: int) -> Rule:
    room, _, name = leaf.rpartition("/")
    torch_name = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(name, name)
    layouts = {("kernel", 2): linear, ("kernel", 4): conv}
    return layouts.get((name, ndim), plain)(
        ".".join(filter(None, (room.replace("/", "."), torch_name))), leaf
    )


def _nothing(*_: Any) -> dict[str, np.ndarray]:
    return {}


NATIVE = Kind(
    name="dmf",
    network="",
    licence="that of the weights it was made from",
    conventions=CONVENTIONS,
    copies=("weights",),
    select=_select,
    describe=_describe,
    rules=_rules,
    outputs=_nothing,
    torch_outputs=_nothing,
    probe=lambda config, image_shape: {},
)
