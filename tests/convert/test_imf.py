"""Improved MeanFlow's network and loss against its public code, and its files both ways.

tests/golden/imeanflow_tiny_io.npz holds outputs of Lyy-iiis/imeanflow at commit bf60cd7, on random
weights (`imfs.tensors`) and fixed draws (`imfs.draws`), by JAX on a CPU.
"""

from dataclasses import asdict, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from dmf import networks, sharding, step
from dmf.config import parse
from dmf.convert import leaves
from dmf.convert.command import convert
from dmf.convert.imeanflow import IMEANFLOW
from dmf.convert.rules import relative_l2
from dmf.export.weights import export
from dmf.method.flow import VELOCITY, Condition, Rows, RowSplit, interpolate
from dmf.method.guidance import told_velocity
from dmf.networks.every import network_config
from dmf.pretrained import abstract_params
from dmf.storage import checkpoint
from tests import GOLDEN
from tests.convert import imfs
from tests.tiny import TINY

PATCHES = "net.x_embedder.proj.kernel"
LIMIT = 5e-6  # relative L2 in float32


@pytest.fixture(scope="module")
def public():
    with np.load(GOLDEN / "imeanflow_tiny_io.npz") as data:
        return {name: data[name] for name in data.files}


@pytest.fixture(scope="module")
def weights():
    return imfs.params(imfs.tensors())


NETWORK = networks.build(imfs.CONFIG, imfs.SHAPE)
SPLIT = RowSplit(8, 8, 4)


def rows():
    """The fixed draws as rows: the four with r < t first, as `SPLIT` has them."""
    d = {name: jnp.asarray(np.roll(x, 4, axis=0)) for name, x in imfs.draws().items()}
    z, v = interpolate(d["x"], d["e"], d["t"])
    return Rows(z, d["r"], d["t"], v, Condition(d["label"], guidance=d["told"]))


def compare(found, public, name):
    assert relative_l2(np.roll(np.asarray(found), -4, axis=0), public[name]) < LIMIT, name


def test_u_and_the_head_are_the_public_code_s(public, weights):
    here = rows()
    run = jax.jit(partial(NETWORK.apply_with_sides, condition=here.condition))
    u, sides = run(weights, here.z, here.r, here.t)
    compare(u, public, "u")
    compare(sides[VELOCITY], public, "v")


def test_the_guided_velocity_is_the_public_code_s(public, weights):
    def head(params, rows):
        at = params, rows.z, rows.r, rows.t
        return NETWORK.apply_with_sides(*at, condition=rows.condition)[1][VELOCITY]

    v_g, v_c = jax.jit(partial(told_velocity, head, null_class=5))(weights, rows())
    compare(v_g, public, "v_g")
    compare(v_c, public, "v_c")


def test_loss_and_gradient_are_the_public_code_s(public, weights):
    values = dict(TINY, batch_size=8, network=asdict(imfs.CONFIG))
    values |= dict(loss=dict(tangent="head", p=1.0, eps=0.01), guidance=dict(most=8.0))
    config = parse(values)
    how = dict(kind="guided_jvp", network=NETWORK, config=config, split=SPLIT)
    run = jax.jit(jax.value_and_grad(partial(step.stage_loss, **how), has_aux=True))
    (loss, _), found = run(weights, rows(), 0.0)
    assert abs(float(loss) - public["loss"]) < LIMIT * public["loss"]
    for name, gradient in imfs.named(found).items():
        assert relative_l2(gradient, public[f"grad.{name}"]) < LIMIT, name


def test_a_file_goes_both_ways_bit_for_bit(tmp_path):
    named = imfs.tensors()
    tree = leaves.nested({name.replace(".", "/"): x for name, x in named.items()})
    other = jax.tree.map(lambda x: x + 1, tree)
    state = {"params": other, "ema_params": tree}
    (tmp_path / "checkpoint_5").write_bytes(serialization.msgpack_serialize(state))
    given = dict(resolution=8, heads=2)
    source, out = tmp_path / "checkpoint_5", tmp_path / "out"
    report = convert("imeanflow", source, out, given=given, check="none")
    assert report["source"]["copy"] == "ema"
    assert report["network"]["velocity_head"] == 2
    # What is exported for use has no head; the code's own last layer of it is zero.
    used = export(out, tmp_path / "u.safetensors", kind="imeanflow")
    assert not [name for name in used if ".v_heads_" in name]
    assert not used["net.v_final_layer.norm.kernel"].any()
    np.testing.assert_array_equal(used[PATCHES], named[PATCHES])
    config, mesh = report["network"], sharding.make_mesh()
    whole = networks.build(network_config(config), imfs.SHAPE)
    found = checkpoint.read_params(out, None, abstract_params(whole, mesh))
    back = imfs.named(found)
    assert set(back) == set(named)
    for name, x in named.items():
        np.testing.assert_array_equal(back[name], x)


def test_a_file_for_inference_has_no_head_and_gives_the_same_u(weights):
    named = {name: x for name, x in imfs.tensors().items() if ".v_heads_" not in name}
    config, shape = IMEANFLOW.describe(named, dict(resolution=8, heads=2))
    assert (config, shape) == (replace(imfs.CONFIG, velocity_head=0), imfs.SHAPE)
    rules = IMEANFLOW.rules(config, shape, named)
    assert {x for rule in rules for x in rule.tensors} == set(named)
    found = imfs.params(named, config, shape)
    here = rows()
    with_head, without = (
        jax.jit(partial(network.apply, condition=here.condition))(params, here.z, here.r, here.t)
        for network, params in ((NETWORK, weights), (networks.build(config, shape), found))
    )
    np.testing.assert_array_equal(with_head, without)
