"""Set-up of all tests: eight fake devices, one cache of programs, float64 where it is needed."""

import atexit
import gc
import itertools
import os
import shutil
import signal
import tempfile
from dataclasses import replace

from tests import GOLDEN, devices

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests of sharding need eight devices. Without a mesh, a test stays on the first one.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices(8)}"
# Tests build the same small programs again and again, so each is compiled once.
# The workers and all processes that they start share this folder: it is named before they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dmf-test-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import numpy as np
import pytest

# A shell makes its background processes ignore interrupts, and the tests' processes would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# As in dmf/main.py: a fifth of the time went into looking through what jax keeps.
gc.set_threshold(100_000, 50)
# These start processes.
LONGEST = ("test_survive", "test_processes", "test_notebooks", "test_train", "test_guard")


def pytest_collection_modifyitems(items):
    """The longest files first: no worker is left alone with them at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


MODULES = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def forgetful():
    """Programs and traces of past modules are let go now and then: they took 8 GB of a worker."""
    yield
    if next(MODULES) % 15 == 0:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def float64():
    """Oracles are compared in float64; everything else runs in float32 as in training."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def shared_programs():
    """All runs of a module share the programs of a config: a run alone would trace them again.

    For modules whose tests change nothing inside a step, a probe or a sampler.
    """
    from dmf import step
    from dmf.config import GuardConfig, RunConfig
    from dmf.evaluation.sampling import Sampler
    from dmf.run.probe import Probe

    made = {}

    def trained(config):
        return replace(config, run=RunConfig(), guard=GuardConfig())

    def one_step(kind, network, optimizer, config, mesh, place):
        key = "step", kind, trained(config), mesh
        if key not in made:
            made[key] = make_step(kind, network, optimizer, config, mesh, place)
        return made[key]

    def probe(self, kind):
        key = "probe", kind, trained(self._config), self._split, self._mesh
        return made.setdefault(key, made.get(key) or make_probe(self, kind))

    def sampler(self, network, config, shape, labels, mesh, guidance=None, *more, **how):
        make_sampler(self, network, config, shape, labels, mesh, guidance, *more, **how)
        if not (guidance or more or how):
            key = "sampler", trained(config), config.run.sampler, shape, mesh
            self._draw = made.setdefault(key, self._draw)

    make_step, make_probe, make_sampler = step.make_train_step, Probe._jit, Sampler.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "make_train_step", one_step)
        patch.setattr(Probe, "_jit", probe)
        patch.setattr(Sampler, "__init__", sampler)
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def golden():
    """Opens an array file of tests/golden."""
    return lambda name: np.load(GOLDEN / name, allow_pickle=False)
