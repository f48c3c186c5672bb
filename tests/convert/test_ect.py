"""ECT's denoiser in evaluation: the form, and the refusal that points to it.

The outputs are made here in float64 by ECT's formula.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.convert import check
from dmf.convert.edm import EDM
from dmf.convert.rules import relative_l2
from dmf.errors import DmfError
from dmf.networks.unet import ect_velocity, edm_velocity
from tests.conversion import small_noise, tensors_of
from tests.convert.unets import VP, fast, stored

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


class Fake(NamedTuple):
    apply: Any


def fake(velocity):
    """A network whose F is tanh."""
    return Fake(lambda params, z, r, t, **_: velocity(z, t, 0.5, jnp.tanh))


def test_a_refusal_of_outputs_of_ect_points_to_the_form():
    rng = np.random.default_rng(0)
    sigma, x = np.float32([0.01, 0.5, 80.0]), rng.standard_normal((3, 3, 2, 2), np.float32)
    wanted = ("ect.npz", {"x": x, "sigma": sigma, "D": evaluated(x, sigma, np.tanh)})
    with pytest.raises(DmfError, match="outputs of ECT in evaluation need --set=ect_eval=1"):
        check.run(EDM, None, (), fake(edm_velocity), {}, {}, wanted)
    (row,) = check.run(EDM, None, (), fake(ect_velocity), {}, {}, wanted)
    assert row["relative_l2"] <= BOUND


def test_the_field_gives_the_form_and_a_value_that_is_no_choice_is_refused():
    tensors = tensors_of(stored("edm")[2])
    config, shape = EDM.describe(tensors, {"ect_eval": 1})
    assert config == dataclasses.replace(EDM.describe(tensors, {})[0], precond="ect")
    with pytest.raises(DmfError, match="--set=ect_eval=2: expected 1 for ECT's evaluation, else 0"):
        EDM.describe(tensors, {"ect_eval": 2})


def test_a_network_of_the_form_is_the_same_f_in_the_other_wrapper():
    trained = dataclasses.replace(
        VP, channel_mult=(1,), attention_resolutions=(), augment_dim=0, sigma_data=0.5
    )
    network = fast(trained, (8, 8, 1))
    params = small_noise(network.init(jax.random.key(0)))
    sigma = np.float32([0.01, 0.5, 60.0])
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8), np.float32)
    arrays, wide = {"x": x, "sigma": sigma}, sigma.astype(np.float64)[:, None, None, None]
    skip, out = 0.25 / (wide**2 + 0.25), 0.5 * wide / np.sqrt(wide**2 + 0.25)
    d = EDM.outputs(network, params, arrays)["D"].astype(np.float64)
    want = evaluated(x, sigma, lambda _: (d - skip * x) / out)
    other = fast(dataclasses.replace(trained, precond="ect"), (8, 8, 1))
    assert relative_l2(d, want) > 1e-4
    assert relative_l2(EDM.outputs(other, params, arrays)["D"], want) <= BOUND
