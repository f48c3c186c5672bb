"""The converted tiny SiT that the tests of conversions share."""

import numpy as np
import pytest
import safetensors.numpy

from dmf.convert.command import convert
from tests import GOLDEN
from tests.conversion import recipe_weights
from tests.convert.flows import SIT_GIVEN


@pytest.fixture(scope="session")
def weights():
    return recipe_weights(np.load(GOLDEN / "sit_tiny_io.npz"))


@pytest.fixture(scope="session")
def sit(weights, tmp_path_factory):
    """(file, converted directory) of the stored tiny SiT, checked against its stored outputs."""
    folder = tmp_path_factory.mktemp("sit")
    file = folder / "sit.safetensors"
    safetensors.numpy.save_file(weights, file)
    convert(
        "sit", file, folder / "converted", given=SIT_GIVEN, check=str(GOLDEN / "sit_tiny_io.npz")
    )
    return file, folder / "converted"
