"""ECT's denoiser in evaluation: the form, and the refusal that points to it.

The outputs are made here in float64 from EDM's stored ones, by ECT's formula.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dmf.convert import check
from dmf.convert.edm import EDM
from dmf.convert.rules import relative_l2
from dmf.errors import DmfError
from dmf.networks.unet import ect_velocity
from tests.conversion import tensors_of
from tests.convert.unets import PARITY, converted, fast, stored

BOUND = 5e-7  # relative L2, float32


def evaluated(x, sigma, raw, data=0.5):
    """D in evaluation, in float64; raw: the network, a function of c_in x."""
    x, sigma = np.asarray(x, np.float64), np.asarray(sigma, np.float64)[:, None, None, None]
    root, less = np.sqrt(sigma**2 + data**2), sigma - 0.003
    return data**2 / (less**2 + data**2) * x + less * data / root * raw(x / root)


def test_the_form_of_evaluation():
    """Every sigma from .003, where D gives x back; below it the velocity is -x too."""
    rng = np.random.default_rng(0)
    sigma = np.float32([0.003, 0.01, 0.5, 80.0])
    x = (rng.standard_normal((4, 2, 2, 3)) * np.hypot(0.5, sigma)[:, None, None, None]).astype("f4")
    t = sigma / (1 + sigma)
    z = x / (1 + sigma)[:, None, None, None]
    v = ect_velocity(jnp.asarray(z), jnp.asarray(t), 0.5, jnp.tanh)
    got = z - t[:, None, None, None] * np.asarray(v)
    assert relative_l2(got, evaluated(x, sigma, np.tanh)) <= BOUND
    assert relative_l2(got[0], x[0]) <= BOUND
    v = ect_velocity(jnp.asarray(z), jnp.zeros(4), 0.5, jnp.tanh)
    np.testing.assert_allclose(v, -z * 1.003, rtol=1e-5, atol=1e-5)


def theirs():
    """EDM's stored inputs with ECT's outputs: F is what the stored D leaves beside c_skip x."""
    _, data, _ = stored("edm")
    x, d = data["x"].astype(np.float64), data["D"].astype(np.float64)
    sigma = data["sigma"].astype(np.float64)[:, None, None, None]
    skip, out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / np.sqrt(sigma**2 + 0.25)
    want = evaluated(x, data["sigma"], lambda _: (d - skip * x) / out)
    return {"x": data["x"], "sigma": data["sigma"], "D": want}


def test_outputs_of_ect_need_the_form_and_the_refusal_says_so(monkeypatch):
    monkeypatch.setattr(check, "_jitted", lambda network: network)  # compiled already, in less time
    config, shape, network, params = converted("edm")
    tensors = tensors_of(stored("edm")[2])
    wanted = ("ect.npz", theirs())
    with pytest.raises(DmfError, match="outputs of ECT in evaluation need --set=ect_eval=1"):
        check.run(EDM, config, shape, network, params, tensors, wanted)
    config, _ = EDM.describe(tensors, {"ect_eval": 1})
    assert config == dataclasses.replace(converted("edm")[0], precond="ect")
    (row,) = check.run(EDM, config, shape, fast(config, shape), params, tensors, wanted)
    assert row["relative_l2"] <= PARITY  # of the stored D, whose Fourier features enlarge rounding


def test_a_value_that_is_no_choice_is_refused():
    with pytest.raises(DmfError, match="--set=ect_eval=2: expected 1 for ECT's evaluation, else 0"):
        EDM.describe(tensors_of(stored("edm")[2]), {"ect_eval": 2})
