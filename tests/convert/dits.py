"""The stored transformers of SiT and MeanFlow, and their weights, for the tests of both kinds."""

from __future__ import annotations

import functools

import numpy as np

from dmf.convert.meanflow_dit import MEANFLOW_DIT
from dmf.convert.meanflow_sit import MEANFLOW_SIT
from dmf.convert.sit import SIT
from tests import GOLDEN, conversion

PARITY = 5e-6  # relative L2: float32 round-off between two implementations of the same network
SILENT = [f"h_embedder.mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")]


# That of meanflow_sit was made by zhuyu-cs/MeanFlow, commit 04d183c, with timm's layers.
KINDS = {kind.name: kind for kind in (SIT, MEANFLOW_DIT, MEANFLOW_SIT)}


def reference(kind):
    """(weights, inputs and outputs) of the reference network of a kind."""
    return _stored(kind.name)


def converted(kind):
    """(config, image shape, network, params) of the reference network."""
    return _converted(kind.name)


@functools.cache
def _stored(name):
    with np.load(GOLDEN / f"{name}_tiny_io.npz") as data:
        io = {key: data[key] for key in data.files if "/" not in key}
        return conversion.recipe_weights(data), {"heads": np.array(4)} | io


@functools.cache
def _converted(name):
    weights, io = _stored(name)
    given = {"heads": int(io["heads"])} | ({"resolution": 8} if name == "meanflow_dit" else {})
    return conversion.convert_arrays(KINDS[name], weights, given)
