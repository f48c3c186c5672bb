"""Our own weights under PyTorch names: what an export writes by default, and reads back exactly.

It fits any network of ours: the leaf a/b/kernel is the tensor a.b.weight in PyTorch's layout.
It has the conventions of this code. The metadata of the file hold the network's config.
"""

from __future__ import annotations

import json
import math
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
FORM = {"network": dict, "image_shape": list, "licence": records.Maybe(str)}
WHERE, WANTED = "its metadata", "a file that dmf has exported"
CONVENTIONS = (
    "t = 1 noise, t = 0 data, z = (1 - t) x + t e, v = e - x; "
    "u(z, r, t) sees r through h = t - r; x = e - u(e, 0, 1)"
)


def described(weights: Any) -> dict[str, Any]:
    """{"network", "image_shape"} as JSON text, from an export's metadata; {} for another file.

    weights: an opened file with `metadata`, as is the argument of `licence`. Raises DmfError where
    the metadata are not what an export writes.
    """
    found = _about(weights)
    return {name: json.dumps(found[name]) for name in ("network", "image_shape") if found}


def licence(weights: Any) -> str:
    """The licence note that an export carries on."""
    licence: str = _about(weights).get("licence", "")
    return licence or NATIVE.licence


def _about(weights: Any) -> dict[str, Any]:
    if METADATA not in weights.metadata:
        return {}
    about = records.parse(weights.metadata[METADATA], FORM | {...: records.ANY}, WHERE, WANTED)
    return dict(about)


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
    config = every.network_config(records.parse(given["network"], dict, WHERE, WANTED))
    shape = every.image_shape(records.parse(given["image_shape"], list, WHERE, WANTED))
    layers, values = every.least(config)
    held = sum(math.prod(x.shape) for x in tensors.values())
    if layers > len(tensors) or values > held:  # building such a network might never end
        raise DmfError(
            f"its metadata announce a network of at least {layers:,} tensors and {values:,} "
            f"values: expected one that fits the {len(tensors):,} tensors and {held:,} values here"
        )
    return config, shape


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
