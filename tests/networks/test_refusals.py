"""What a network refuses names the field or the argument."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from dmf.errors import DmfError
from dmf.networks import (
    DiTConfig,
    MLPConfig,
    UNetConfig,
    build,
)
from tests.networks.small import (
    SMALL,
    condition,
    small,
)


@pytest.mark.parametrize(
    ("config", "shape", "dtype", "message"),
    [
        (
            DiTConfig(depth=1, width=16, heads=2, patch=4),
            (6, 8, 1),
            "float32",
            r"network\.patch is 4.*6x8",
        ),
        (
            DiTConfig(depth=1, width=16, heads=3),
            (4, 4, 1),
            "float32",
            r"network\.width is 16.*heads, 3",
        ),
        (DiTConfig(depth=0, width=16, heads=2), (4, 4, 1), "float32", r"network\.depth is 0"),
        (
            DiTConfig(depth=1, width=16, heads=2, interval_init="one"),
            (4, 4, 1),
            "float32",
            r"interval_init is 'one'",
        ),
        (
            DiTConfig(depth=1, width=16, heads=2, num_classes=-1),
            (4, 4, 1),
            "float32",
            r"network\.num_classes is -1",
        ),
        (UNetConfig(), (30, 30, 3), "float32", r"network\.channel_mult.*divisible by 4; got 30"),
        (UNetConfig(), (32, 16, 3), "float32", r"image_shape.*square"),
        (UNetConfig(dropout=1.0), (32, 32, 3), "float32", r"network\.dropout is 1\.0"),
        (
            UNetConfig(interval_init="zeros"),
            (32, 32, 3),
            "float32",
            r"interval_init is 'zeros'.*'zero', 'random'",
        ),
        (
            UNetConfig(resample="bilinear"),
            (32, 32, 3),
            "float32",
            r"resample is 'bilinear'.*'binomial', 'box'",
        ),
        (
            UNetConfig(embedding="learned"),
            (32, 32, 3),
            "float32",
            r"embedding is 'learned'.*'fourier'",
        ),
        (UNetConfig(embedding_mult=0), (32, 32, 3), "float32", r"network\.embedding_mult is 0"),
        (
            UNetConfig(channels=5, embedding_mult=1),
            (32, 32, 3),
            "float32",
            r"channels is 5; expected an even number",
        ),
        (
            UNetConfig(time_input="sigma"),
            (32, 32, 3),
            "float32",
            r"time_input is 'sigma'.*'log_sigma'",
        ),
        (
            UNetConfig(time_scale=0.0),
            (32, 32, 3),
            "float32",
            r"time_scale is 0\.0; expected a finite number above 0",
        ),
        (
            UNetConfig(time_input="log_sigma", time_scale=999.0),
            (32, 32, 3),
            "float32",
            r"time_scale is 999\.0 with time_input",
        ),
        (UNetConfig(precond="vp"), (32, 32, 3), "float32", r"precond is 'vp'.*'none', 'edm'"),
        (
            UNetConfig(sigma_data=0.4),
            (32, 32, 3),
            "float32",
            r"sigma_data is 0\.4 with precond 'none'",
        ),
        (
            UNetConfig(precond="edm", sigma_data=math.inf),
            (32, 32, 3),
            "float32",
            r"sigma_data is inf",
        ),
        (UNetConfig(kind="resnet"), (32, 32, 3), "float32", r"network\.kind is 'resnet'"),
        (UNetConfig(kind="dit"), (32, 32, 3), "float32", r"network\.kind is 'dit' in a UNetConfig"),
        (MLPConfig(interval_init=""), (2,), "float32", r"interval_init is ''"),
        (MLPConfig(width=0), (2,), "float32", r"network\.width is 0"),
        (MLPConfig(), (2,), "float16", r"dtype is float16"),
    ],
)
def test_build_names_the_field_that_does_not_fit(config, shape, dtype, message):
    with pytest.raises(DmfError, match=message):
        build(config, shape, dtype)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "dit",
            {"z": np.zeros((3, 6, 4, 2), np.float32)},
            r"z has shape \(3, 6, 4, 2\); expected \(B, 4, 6, 2\)",
        ),
        ("mlp", {"z": np.zeros((3, 4), np.float32)}, r"z has shape \(3, 4\); expected \(B, 5\)"),
        (
            "mlp",
            {"r": np.zeros((), np.float32)},
            r"r has shape \(\); expected one time per row, \(3,\)",
        ),
        ("mlp", {"t": np.zeros((3, 1), np.float32)}, r"t has shape \(3, 1\)"),
        ("mlp", {"label": np.zeros(3, np.int32)}, r"label.*expected None"),
        (
            "dit",
            {"label": np.zeros(3, np.float32)},
            r"label has shape \(3,\) of float32; expected \(3,\) of integers",
        ),
        (
            "unet",
            {"augment": np.zeros((3, 6), np.float32)},
            r"augment has shape \(3, 6\).*expected \(3, 2\) of floats",
        ),
        ("unet", {"train": True}, r"rngs is None.*network\.dropout is 0\.3"),
        ("unet", {"train": True, "rngs": np.zeros((3, 2), np.uint32)}, r"rngs.*of typed keys"),
    ],
)
def test_apply_names_the_argument_that_does_not_fit(kind, changes, message):
    config, shape, _ = SMALL[kind]
    network, changes = build(config, shape), dict(changes)
    z, r, t, label, _ = small(kind)
    given = condition(label)
    given = given._replace(**{k: changes.pop(k) for k in given._fields if k in changes})
    arguments = {"z": z, "r": r, "t": t, "condition": given} | changes
    params = jax.eval_shape(network.init, jax.random.key(0))
    with pytest.raises(DmfError, match=message):
        jax.eval_shape(lambda params: network.apply(params, **arguments), params)


def test_channels_that_do_not_group_are_named():
    network = build(
        UNetConfig(channels=132, channel_mult=(1,), blocks=1, attention_resolutions=()), (8, 8, 3)
    )
    with pytest.raises(DmfError, match=r"network\.channels: a layer of 132 channels"):
        jax.eval_shape(network.init, jax.random.key(0))


def test_attention_that_no_level_would_have_is_named():
    with pytest.raises(
        DmfError,
        match=r"attention_resolutions has 16; expected some of 24, 12, 6, .* images of 24 pixels",
    ):
        build(UNetConfig(), (24, 24, 3))
