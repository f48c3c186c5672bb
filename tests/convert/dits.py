"""The stored transformers of SiT and MeanFlow, and their weights, for the tests of both kinds."""

from __future__ import annotations

import functools

import numpy as np

from dmf.convert.meanflow_dit import MEANFLOW_DIT
from dmf.convert.sit import SIT
from tests import GOLDEN, conversion

PARITY = 5e-6  # relative L2: float32 round-off between two implementations of the same network
SILENT = [f"h_embedder.mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")]


@functools.cache
def reference(kind):
    """(weights, inputs and outputs) of the reference network of a kind."""
    name = {SIT: "sit_tiny_io.npz", MEANFLOW_DIT: "meanflow_dit_tiny_io.npz"}[kind]
    with np.load(GOLDEN / name) as data:
        io = {key: data[key] for key in data.files if "/" not in key}
        return conversion.recipe_weights(data), {"heads": np.array(4)} | io


@functools.cache
def converted(kind):
    """(config, image shape, network, params) of the reference network."""
    weights, io = reference(kind)
    given = {"heads": int(io["heads"])} | ({"resolution": 8} if kind is MEANFLOW_DIT else {})
    return conversion.convert_arrays(kind, weights, given)
