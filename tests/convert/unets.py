"""The stored U-Nets of MeanFlow and EDM, and their weights, for the tests of both kinds."""

from __future__ import annotations

import functools

import jax
import numpy as np

from dmf.convert.edm import EDM
from dmf.convert.meanflow_unet import MEANFLOW_UNET
from dmf.networks import UNetConfig, build
from tests import GOLDEN
from tests.conversion import (
    convert_arrays,
    recipe_weights,
)

PARITY = 5e-6  # relative L2: float32 round-off between two implementations of the same network
CASES = {
    "meanflow": (MEANFLOW_UNET, "pymf_tiny_io.npz"),
    "edm": (EDM, "edm_tiny_ncsnpp_io.npz"),
    # EDM's own code, commit 008a4e5: DDPM++, 5 classes, the last row without a class.
    "edm_classes": (EDM, "edm_classes_tiny_io.npz"),
}
OUTPUTS = {
    "meanflow": {"u_noaug", "u_aug", "dudt_aug"},
    "edm": {"D", "D_aug"},
    "edm_classes": {"D", "D_aug"},
}
LAYER0, LABEL = "map_layer0.weight", "map_augment.weight"


@functools.cache
def stored(case):
    """(kind, arrays of the reference, its weights)."""
    kind, name = CASES[case]
    data = dict(np.load(GOLDEN / name))
    return kind, data, recipe_weights(data)


@functools.cache
def fast(config, shape):
    """The network compiled without LLVM's optimisations to save seconds."""
    network = build(config, shape)
    return network._replace(
        apply=jax.jit(network.apply, compiler_options={"xla_backend_optimization_level": 0})
    )


@functools.cache
def converted(case):
    kind, _, weights = stored(case)
    config, shape, _, params = convert_arrays(kind, weights)
    return config, shape, fast(config, shape), params


def torch_outputs(kind, weights, arrays):
    import torch

    return kind.torch_outputs(
        {name: torch.from_numpy(np.array(x)) for name, x in weights.items()}, arrays
    )


VP = UNetConfig(
    channels=8,
    channel_mult=(1, 2),
    blocks=1,
    attention_resolutions=(8,),
    dropout=0.13,
    augment_dim=9,
    resample="box",
    embedding_mult=1,
    time_input="log_sigma",
    precond="edm",
    sigma_data=0.7,
)
