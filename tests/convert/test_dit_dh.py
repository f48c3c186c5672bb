"""DiT-DH: its public code's outputs, its names at full size, and the way back.

The stored arrays come from bytetriper/RAE at commit a4d18c4 (the teacher) and sony/mf-rae at
fffc544 (the student), run by PyTorch on a CPU. A trunk of 2 blocks has 32 channels, and a head of
one block 48. Its layer of patches came from us: timm needs more than there was.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import networks, step
from dmf.config import parse
from dmf.convert.direction import Direction, turned
from dmf.convert.dit_dh import DIT_DH, rotary_table
from dmf.convert.leaves import flat
from dmf.convert.rules import relative_l2
from dmf.convert.sit import NO_INTERVAL
from dmf.errors import DmfError
from dmf.method.flow import Condition, Rows, RowSplit, interpolate
from tests import GOLDEN, conversion
from tests.conversion import needs_torch
from tests.tiny import TINY

PARITY = 5e-6  # relative L2 in float32


@functools.cache
def reference():
    """(weights of the student, inputs and outputs) of the public code."""
    with np.load(GOLDEN / "dit_dh_tiny_io.npz") as data:
        io = {key: data[key] for key in data.files if not key.startswith(("recipe/", "fixed/"))}
        return conversion.recipe_weights(data), io


def of_teacher(weights):
    return {name: x for name, x in weights.items() if not name.startswith("r_embedder.")}


@functools.cache
def student():
    return conversion.convert_arrays(DIT_DH, reference()[0])


@functools.cache
def teacher():
    return conversion.convert_arrays(DIT_DH, {"ema": of_teacher(reference()[0]), "steps": {}})


def test_the_converted_student_is_the_public_one():
    _, io = reference()
    config, shape, network, params = student()
    assert (config.depth, config.width, config.heads) == (2, 32, 2)
    assert (config.head_depth, config.head_width, config.head_heads) == (1, 48, 2)
    assert (shape, config.num_classes, config.mlp_ratio) == ((4, 4, 5), 7, 4.0)
    assert relative_l2(DIT_DH.outputs(network, params, io)["u"], io["u"]) <= PARITY


def test_the_converted_teacher_is_the_public_one_for_every_interval():
    """The new branch is silent, and its other layers are not zero: a gradient can reach them."""
    _, io = reference()
    _, _, network, params = teacher()
    for r in (io["r"], io["t"]):
        found = DIT_DH.outputs(network, params, io | {"r": r})["u"]
        assert relative_l2(found, io["v"]) <= PARITY
    branch = flat(params["interval"])
    assert not branch["mlp_2/kernel"].any() and not branch["mlp_2/bias"].any()
    assert branch["mlp_0/kernel"].any() and branch["fourier/freqs"].std() > 0.8
    # A student without the last layer of its branch is its teacher.
    _, _, _, trained = student()
    silent = trained | {"interval": trained["interval"] | {"mlp_2": params["interval"]["mlp_2"]}}
    found = DIT_DH.outputs(network, silent, io)["u"]
    np.testing.assert_array_equal(found, DIT_DH.outputs(network, params, io)["u"])


@needs_torch
@pytest.mark.parametrize("made", [student, teacher])
def test_the_forward_check_in_pytorch_is_the_public_network(made):
    import torch

    weights, io = reference()
    config, shape, network, params = made()
    named = weights if made is student else of_teacher(weights)
    tensors = {name: torch.from_numpy(x) for name, x in named.items()}
    given = io | {"heads": np.array(2), "head_heads": np.array(2)}
    want = io["u" if made is student else "v"]
    assert relative_l2(DIT_DH.torch_outputs(tensors, given)["u"], want) <= PARITY
    probe = DIT_DH.probe(config, shape)
    theirs = DIT_DH.torch_outputs(tensors, probe)["u"]
    assert relative_l2(DIT_DH.outputs(network, params, probe)["u"], theirs) <= PARITY


def test_the_way_back_gives_the_file_bit_for_bit():
    weights, _ = reference()
    for made, named in ((student(), weights), (teacher(), of_teacher(weights))):
        back = conversion.export_arrays(DIT_DH, *made)
        assert set(back) == set(named)
        for key, x in back.items():
            if key == "pos_embed" or "rope" in key:  # tables that the network computes
                np.testing.assert_allclose(x, named[key], atol=1e-6)
            else:
                np.testing.assert_array_equal(x, named[key])


def test_every_name_of_the_published_size_is_used():
    """Of a student, and of a teacher, which has no second embedder."""
    names = conversion.key_list(GOLDEN / "keys_dit_dh_xl.txt")
    second = {f"r{x[1:]}": s for x, s in names.items() if x.startswith("t_embedder.")}
    both = names | second
    config, shape = conversion.check_names(DIT_DH, both)
    trunk = {x: getattr(config, x) for x in ("depth", "width", "heads")}
    assert trunk == networks.DIT_DH_SIZES["XL"] and shape == (16, 16, 768)
    assert (config.head_depth, config.head_width, config.head_heads) == (2, 2048, 16)
    assert (config.hidden(1152), config.hidden(2048)) == (3072, 5461)
    for found, count, values in ((names, 382, 838_778_196), (both, 387, 840_697_684)):
        assert (len(found), sum(int(np.prod(s)) for s in found.values())) == (count, values)
        tensors = conversion.hollow(found)
        assert DIT_DH.describe(tensors, {}) == (config, shape)
        rules = DIT_DH.rules(config, shape, tensors)
        used = {x for rule in rules for x in rule.tensors}
        assert used == set(both)
        kept = {x for rule in rules for x in rule.tensors if rule.missing != NO_INTERVAL}
        assert kept == set(names)
    bare = {f"model.module.{x}": s for x, s in names.items() if "rope" not in x}
    tensors, copy = DIT_DH.select(conversion.hollow(bare), "")
    assert copy == "model" and DIT_DH.describe(tensors, {})[0] == config  # by the named size


def test_the_rotary_table_turns_pairs_by_row_then_by_column():
    _, io = reference()
    angle = rotary_table(16, 16, 72)
    assert angle.shape == (256, 72)
    for name, function in (("cos", np.cos), ("sin", np.sin)):
        np.testing.assert_allclose(function(angle)[io["xl/rows"]], io[f"xl/{name}"], atol=1e-6)
    row, column, k = 13, 4, 7
    angles = angle[16 * row + column]
    assert angles[2 * k] == angles[2 * k + 1] == pytest.approx(row * 1e4 ** (-2 * k / 36))
    assert angles[36 + 2 * k] == angles[37 + 2 * k] == pytest.approx(column * 1e4 ** (-2 * k / 36))


def test_a_fresh_network_knows_no_interval_and_bfloat16_is_near():
    config, shape, _, params = student()
    fresh = networks.build(replace(config, interval_init="zero"), shape)
    start = conversion.small_noise(fresh.init(jax.random.key(0)))
    start["interval"] = fresh.init(jax.random.key(0))["interval"]
    z, times = jax.random.normal(jax.random.key(1), (2, *shape)), jnp.array([0.9, 0.4])
    u = jax.jit(fresh.apply)
    np.testing.assert_array_equal(u(start, z, times / 3, times), u(start, z, times, times))
    half = networks.build(config, shape, jnp.bfloat16)
    found = jax.jit(half.apply)(params, z, times / 3, times)
    assert found.dtype == jnp.float32
    assert relative_l2(found, u(params, z, times / 3, times)) < 3e-2


def test_a_step_reaches_the_silent_branch_and_leaves_the_frequencies():
    config, shape, network, params = teacher()
    x, e = jax.random.normal(jax.random.key(2), (2, 4, *shape))
    t, label = jnp.array([0.9, 0.8, 0.7, 0.3]), jnp.array([0, 1, 7, 2])
    z, v = interpolate(x, e, t)
    rows = Rows(z, jnp.array([0.2, 0.1, 0.7, 0.3]), t, v, Condition(label))
    values = dict(TINY, batch_size=4, network=asdict(config), label_dropout=0.1)
    how = dict(kind="discrete", network=network, config=parse(values), split=RowSplit(4, 4, 2))
    loss = jax.grad(lambda p: step.stage_loss(p, rows, 0.5, **how)[0])
    found = flat(jax.jit(loss)(params))
    assert all(np.isfinite(x).all() for x in found.values())
    assert found["interval/mlp_2/kernel"].any() and found["t_embedder/mlp_0/kernel"].any()
    assert not found["t_embedder/fourier/freqs"].any()
    assert network.is_interval(("interval", "mlp_2", "kernel"))


def test_what_does_not_fit_is_one_line():
    weights, _ = reference()
    bare = {name: x for name, x in weights.items() if "rope" not in name}
    widths = {"x_embedder.proj.weight": np.zeros((32, 5, 1, 1), np.float32)}
    turned_table = {"enc_feat_rope.freqs_cos": weights["enc_feat_rope.freqs_cos"][::-1].copy()}
    cases = [
        (bare, {}, "expected --set=heads=N"),
        (weights, {"heads": 4}, "--set=heads=4: expected 2, as the rotary tables show"),
        (weights, {"second": "r"}, "--set=second=r: expected heads or head_heads or resolution"),
        (weights, {"resolution": 8}, "--set=resolution=8: expected 4"),
        (weights | widths, {}, "trunk and head of 32 and 32 channels"),
        (weights | turned_table, {}, "freqs_cos: other values than this network computes"),
        (weights | {"blocks.0.attn.q_norm.weight": np.ones(16)}, {}, "has no place in this netwo"),
    ]
    for file, given, message in cases:
        with pytest.raises(DmfError, match=message):
            conversion.convert_arrays(DIT_DH, file, given)
    config, shape, network, params = student()
    rules = DIT_DH.rules(config, shape, None)
    other = Direction("noise_at_0", "noise_minus_data", other_time=True)
    with pytest.raises(DmfError, match="--set=time=noise_at_0: expected the other time"):
        turned(rules, config, other)
    back = turned(rules, config, Direction("noise_at_1", "data_minus_noise", other_sign=True))
    assert sum("negated" in rule.note for rule in back) == 2
    for field, value in (("width", 36), ("head_width", 44), ("heads", 3)):
        with pytest.raises(DmfError, match="expected a multiple of four times network."):
            networks.build(replace(config, **{field: value}), shape)
