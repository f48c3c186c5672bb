"""Checkpoints that the tests of exports share."""

import pytest

from tests.export.exports import STEPS, saved, to_folder
from tests.tiny import TINY, UNET


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoints")
    return {name: saved(base, place / name) for name, base in (("dit", TINY), ("unet", UNET))}


@pytest.fixture(scope="session")
def models(checkpoints, tmp_path_factory):
    """Model folders with samplers of 1, 2 and 4 steps."""
    place = tmp_path_factory.mktemp("models")
    for name, path in checkpoints.items():
        to_folder(path, place / name, steps=STEPS)
    return place
