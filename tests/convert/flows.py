"""Random flow models as files, for the tests of conversions."""

import jax
import numpy as np
import safetensors.numpy

from dmf import pretrained
from dmf.convert import audit
from tests.conversion import export_arrays, small_noise

SIT_GIVEN = {"heads": 4}


def random_flow(kind, config, shape, file):
    """Writes random weights of a flow model, in the layout of `kind`, to `file`."""
    network = pretrained.build(config, shape)
    params = small_noise(network.init(jax.random.key(0)))
    flat = {
        k: np.zeros_like(v) if k.split("/")[0] == "interval" else v
        for k, v in audit.flat(params).items()
    }
    safetensors.numpy.save_file(
        export_arrays(kind, config, shape, network, audit.nested(flat)), file
    )
