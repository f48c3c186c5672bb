"""The head for the loss: zero at the start, trained with the rest, dropped for use."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import networks, pretrained, step
from dmf.config import check, parse
from dmf.errors import DmfError
from dmf.export import model, weights
from dmf.networks.layers import VARIANCE
from tests.export.exports import saved
from tests.networks.small import SMALL, leaf_paths, random_params, shapes, small
from tests.tiny import TINY, Setup, merged

LEARNED = merged(TINY, network=dict(logvar=True), loss=dict(logvar="paper"))


@pytest.mark.parametrize("kind", SMALL)
def test_every_network_may_have_the_head_which_starts_at_zero(kind):
    config, shape, _ = SMALL[kind]
    network = networks.build(dataclasses.replace(config, logvar=True), shape)
    _, r, t, _, _ = small(kind)
    extra = {path for path in shapes(network) if path[0] == VARIANCE}
    assert set(shapes(network)) - extra == set(leaf_paths(random_params(kind)))
    head = {VARIANCE: jax.jit(network.init)(jax.random.key(0))[VARIANCE]} if kind == "mlp" else {}
    if head:
        np.testing.assert_array_equal(network.logvar(head, r, t), np.zeros(len(t)))
    assert networks.build(config, shape).logvar is None


def test_the_head_reads_the_features_of_t_before_those_of_r_cosine_first():
    network = networks.build(networks.MLPConfig(logvar=True), (5,))
    r, t = np.float32([0.2, 0.5]), np.float32([0.7, 0.5])
    w = np.random.default_rng(0).standard_normal((256, 1)).astype(np.float32)
    found = network.logvar({VARIANCE: {"kernel": w, "bias": np.float32([3.0])}}, r, t)
    f = np.exp(-math.log(1e4) * np.arange(64) / 64)
    parts = [g(x[:, None] * f) for x in (t, r) for g in (np.cos, np.sin)]
    np.testing.assert_allclose(found, (np.concatenate(parts, 1) @ w)[:, 0] + 3, rtol=1e-4)


def test_a_step_moves_the_head_and_the_loss_is_that_of_its_scale():
    setup = Setup(LEARNED)
    params = setup.network.init(jax.random.key(1))
    split = step.split_for("jvp", setup.config, setup.mesh)
    rows = step.draw_rows(jnp.int32(0), setup.batch(0), split=split, config=setup.config)
    how = dict(kind="jvp", network=setup.network, config=setup.config, split=split)
    loss = jax.jit(jax.value_and_grad(lambda p: step.stage_loss(p, rows, 1.0, **how), has_aux=True))
    (total, metrics), grads = loss(params)
    m = (float(metrics["squares_border"]) * 0.25 + float(metrics["squares_pairs"]) * 0.75) / 64
    assert float(total) <= math.log1p(m)  # log(1 + m) is concave, and lv = 0 at the start
    assert float(total) > 0.5 * math.log1p(m)
    # By the bias, the mean over rows of 1/2 - m / (1 + m), which is above 1/2 - m / (1 + m) of m.
    slope = float(grads[VARIANCE]["bias"][0])
    assert 0.5 - m / (1 + m) <= slope < 0.5 and np.abs(grads[VARIANCE]["kernel"]).max() > 1e-3


def test_what_is_loaded_or_exported_has_no_head(tmp_path):
    folder = saved(LEARNED, tmp_path / "learned")
    network, params = pretrained.load(folder)
    assert VARIANCE not in params and network.logvar is None
    tensors = weights.export(folder, tmp_path / "out.safetensors")
    opened = model.open_model(folder)
    assert not any(VARIANCE in name for name in (*tensors, *opened.tensors()))
    assert opened.about()["network"]["logvar"] is False
    assert not opened.config.network.logvar


@pytest.mark.parametrize(
    ("head", "form", "message"),
    [
        (True, "off", "'off' with config.network.logvar = True: expected paper or released"),
        (False, "paper", "'paper' with config.network.logvar = False: expected config.loss.logvar"),
    ],
)
def test_a_head_without_its_loss_and_a_loss_without_its_head_are_refused(head, form, message):
    values = merged(TINY, network=dict(logvar=head), loss=dict(logvar=form))
    with pytest.raises(DmfError, match=message):
        check(parse(values), 10, 1000)
