"""The alignment of embeddings: it fits, changes nothing else, and depends on its seed alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.convert.align import align
from dmf.convert.audit import leaf_shapes
from dmf.errors import DmfError
from dmf.networks import Condition, MLPConfig, UNetConfig, build

EDM = UNetConfig(
    channels=8,
    channel_mult=(1,),
    blocks=1,
    attention_resolutions=(),
    dropout=0.0,
    augment_dim=2,
    resample="box",
    embedding_mult=1,
    time_input="log_sigma",
    precond="edm",
)
SHAPE = (4, 4, 3)
EMBEDDING = {"map_layer0", "map_layer1", "map_augment", "map_noise", "interval"}
STEPS = 300


def random_flow(config, seed=0):
    """Dense random weights in every layer, with an interval of zero."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        scale = 0.5 if len(x.shape) == 1 else np.prod(x.shape[:-1]) ** -0.5
        return jnp.asarray(
            0 if path[0].key == "interval" else scale, jnp.float32
        ) * rng.standard_normal(x.shape, np.float32)

    return jax.tree_util.tree_map_with_path(
        draw, jax.eval_shape(build(config, SHAPE).init, jax.random.key(0))
    )


@functools.cache
def aligned(seed=0):
    calls = []
    params = random_flow(EDM)
    return params, *align(EDM, params, STEPS, seed, lambda *x: calls.append(x)), calls


def silu(x):
    return x / (1 + np.exp(-x))


def embedding(params, time, label, count):
    """The embedding written again in NumPy: features, label, two layers.

    time: (B,). label: (augment_dim,). count: number of frequencies.
    """
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    angle = time[:, None] * 1e4 ** (-np.arange(count) / (count - 1))
    features = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    features = features + (label @ weights["map_augment"]["kernel"])[: 2 * count]
    hidden = silu(features @ weights["map_layer0"]["kernel"] + weights["map_layer0"]["bias"])
    return silu(hidden @ weights["map_layer1"]["kernel"] + weights["map_layer1"]["bias"])


def errors(new, label):
    """Relative error of the new embedding at each of 1001 even times."""
    t = np.linspace(0, 1, 1001)
    sigma = np.clip(t / np.maximum(1 - t, 1e-9), 0.002, 80)
    old = embedding(aligned()[0], np.log(sigma) / 4, label, 4)
    return np.linalg.norm(embedding(new, t, label, 8) - old, axis=1) / np.linalg.norm(old, axis=1)


def test_the_error_falls_and_is_what_the_report_says():
    _, _, new, report, _ = aligned()
    assert report["embedding_error_mean_before"] > 0.9
    assert report["embedding_error_mean_after"] < report["embedding_error_mean_before"] / 10
    found = errors(new, np.zeros(2))
    assert report["embedding_error_mean_after"] == pytest.approx(found.mean(), rel=1e-3)
    assert report["embedding_error_max_after"] == pytest.approx(found.max(), rel=1e-3)
    assert report["embedding_error_at_1_after"] == pytest.approx(found[-1], rel=1e-3)


@pytest.mark.parametrize("label", [(1.0, 0.0), (-0.5, 1.5)])
def test_labels_are_carried_over(label):
    # Without its label layer the error would be 0.5 or more.
    unlabelled = {**aligned()[2], "map_augment": {"kernel": np.zeros((2, 32))}}
    assert errors(aligned()[2], np.array(label)).mean() < 0.2
    assert errors(unlabelled, np.array(label)).mean() > 0.4


def test_u_changes_by_what_the_report_says():
    old, config, new, report, _ = aligned()
    z, t = jax.random.normal(jax.random.key(0), (4, *SHAPE)), jnp.linspace(0, 1, 4)
    before, after = build(EDM, SHAPE).apply(old, z, t, t), build(config, SHAPE).apply(new, z, t, t)
    change = float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before))
    assert 1e-4 < report["relative_change_of_u"] < 0.1
    assert report["relative_change_of_u"] == pytest.approx(change, rel=1e-3)


def test_u_does_not_see_r_bit_for_bit():
    _, config, new, _, _ = aligned()
    z, t = jax.random.normal(jax.random.key(1), (6, *SHAPE)), jnp.linspace(0.01, 1, 6)
    label = jax.random.normal(jax.random.key(2), (6, 2))
    apply = jax.jit(build(config, SHAPE).apply)
    at_t = apply(new, z, t, t, condition=Condition(augment=label))
    for r in (0 * t, t / 2):
        assert np.array_equal(apply(new, z, r, t, condition=Condition(augment=label)), at_t)


def test_the_rest_of_the_network_is_kept_bit_for_bit():
    old, config, new, _, _ = aligned()
    for name in set(old) - EMBEDDING:
        jax.tree.map(np.testing.assert_array_equal, new[name], old[name])
    form = {"embedding": "positional", "embedding_mult": 2, "time_input": "t", "time_scale": 1.0}
    assert config == dataclasses.replace(EDM, **form)
    network = build(config, SHAPE)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), jax.eval_shape(network.init, jax.random.key(0))
    )


def test_the_seed_decides_alone():
    params, config, new, report, calls = aligned()
    again = align(EDM, params, STEPS, 0)
    assert again[0] == config and again[2] == report
    jax.tree.map(np.testing.assert_array_equal, again[1], new)
    other = align(EDM, params, 1, 1)[1]
    assert not np.array_equal(
        other["map_layer1"]["kernel"], align(EDM, params, 1, 0)[1]["map_layer1"]["kernel"]
    )
    assert calls == [(100, 300), (200, 300), (300, 300)]


@pytest.mark.parametrize(
    "form",
    [
        {"embedding": "fourier", "embedding_mult": 2},
        {"time_input": "t", "time_scale": 999.0, "precond": "none", "augment_dim": 0},
        {"num_classes": 3},
    ],
    ids=["fourier", "999 t", "classes"],
)
def test_every_other_form_becomes_the_one(form):
    config = dataclasses.replace(EDM, **form)
    new_config, new, report = align(config, random_flow(config), 1)
    assert (new_config.embedding, new_config.time_input, new_config.time_scale) == (
        "positional",
        "t",
        1.0,
    )
    if new_config.num_classes:  # Adam's first step moves every row of the table
        table = new["map_label"]["embedding_table"]["embedding"]
        assert table.shape == (4, 16) and np.all(table[3])  # which starts at zero
    leaves = jax.tree_util.tree_leaves_with_path(new)
    assert {"/".join(k.key for k in path) for path, _ in leaves} == set(
        leaf_shapes(build(new_config, SHAPE))
    )
    assert np.isfinite(list(report.values())).all()


def test_what_cannot_be_aligned_is_refused():
    params = random_flow(EDM)
    with pytest.raises(
        DmfError,
        match="needs no alignment: .*embedding 'positional', embedding_mult 2, time_input 't'",
    ):
        align(UNetConfig(), params, 1)
    with pytest.raises(DmfError, match="network.kind is 'mlp': expected 'unet'"):
        align(MLPConfig(), params, 1)
    with pytest.raises(DmfError, match="steps is 0: expected an integer of at least 1"):
        align(EDM, params, 0)
    seen = {**params, "interval": {"kernel": params["interval"]["kernel"] + 0.1}}
    with pytest.raises(DmfError, match="has learnt to see r"):
        align(EDM, seen, 1)
