"""Decoupled MeanFlow: its public code's outputs, loss and gradients, its names, and the way back.

The stored arrays come from kyungmnlee/dmf, commit a6db0f6, with its own plain attention on a CPU,
at depth 3 with 2 blocks that see t. Its layer of patches came from us: timm needs more than there
was. Its loss pairs the log variance of each row with the errors of all rows; stored is the pairing
of a row with itself, as in the paper.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import networks, step
from dmf.config import parse
from dmf.convert.decoupled_dit import DECOUPLED_DIT
from dmf.convert.direction import Direction, turned
from dmf.convert.leaves import flat
from dmf.convert.meanflow_sit import MEANFLOW_SIT
from dmf.convert.rules import relative_l2
from dmf.convert.sit import SIT
from dmf.errors import DmfError
from dmf.method.flow import Condition, Rows, RowSplit, interpolate
from tests import GOLDEN, conversion
from tests.conversion import needs_torch
from tests.convert.dits import PARITY

GIVEN = {"heads": 4, "t_blocks": 2}
FILES = pytest.mark.parametrize("name", ["decoupled_dit", "decoupled_dit_qk"])


@functools.cache
def reference(name):
    """(weights, inputs and outputs) of the public network."""
    with np.load(GOLDEN / f"{name}_tiny_io.npz") as data:
        io = {key: data[key] for key in data.files if not key.startswith(("recipe/", "fixed/"))}
        return conversion.recipe_weights(data), io


@functools.cache
def converted(name):
    return conversion.convert_arrays(DECOUPLED_DIT, reference(name)[0], GIVEN)


@FILES
def test_converted_network_equals_the_public_one(name):
    _, io = reference(name)
    config, shape, network, params = converted(name)
    assert (shape, config.num_classes, config.t_blocks) == ((8, 8, 4), 1000, 2)
    assert config.qk_norm == name.endswith("qk") and config.logvar
    assert relative_l2(DECOUPLED_DIT.outputs(network, params, io)["u"], io["u"]) <= PARITY
    assert relative_l2(network.logvar(params, io["r"], io["t"]), io["logvar"]) <= PARITY
    other = networks.build(config.__class__(**{**vars(config), "t_blocks": 1}), shape)
    assert relative_l2(DECOUPLED_DIT.outputs(other, params, io)["u"], io["u"]) > 1e-2


@needs_torch
@FILES
def test_the_forward_check_in_pytorch_is_the_public_network(name):
    import torch

    weights, io = reference(name)
    config, shape, network, params = converted(name)
    tensors = {name: torch.from_numpy(x) for name, x in weights.items()}
    given = io | {"t_blocks": np.array(2)}
    assert relative_l2(DECOUPLED_DIT.torch_outputs(tensors, given)["u"], io["u"]) <= PARITY
    probe = DECOUPLED_DIT.probe(config, shape)
    theirs = DECOUPLED_DIT.torch_outputs(tensors, probe)["u"]
    assert relative_l2(DECOUPLED_DIT.outputs(network, params, probe)["u"], theirs) <= PARITY


def test_the_released_loss_and_its_gradients_are_those_of_a_guided_jvp_step():
    """On fixed draws: flow matching where r = t, the average elsewhere, half and half."""
    weights, io = reference("decoupled_dit")
    network_config, shape, network, params = converted("decoupled_dit")
    rows = {name: io[f"loss/{name}"] for name in ("x", "y", "drop", "e_fm", "e_mf")}
    label = np.where(rows["drop"], 1000, rows["y"]).astype(np.int32)
    t_mf, r_mf, t_fm = (io[f"loss/{name}"] for name in ("t_mf", "r_mf", "t_fm"))
    t, r = np.concatenate([t_mf, t_fm]), np.concatenate([r_mf, t_fm])
    x = np.concatenate([rows["x"]] * 2).transpose(0, 2, 3, 1)
    e = np.concatenate([rows["e_mf"], rows["e_fm"]]).transpose(0, 2, 3, 1)
    z, v = interpolate(jnp.asarray(x), jnp.asarray(e), jnp.asarray(t))
    given = Rows(z, r, t, v, Condition(label=jnp.concatenate([label, label])))
    config = parse(
        dict(
            batch_size=8,
            label_dropout=0.1,
            network=vars(network_config),
            loss=dict(logvar="released"),
            guidance=dict(omega=1.0, kappa=0.6, t_start=0.0, t_end=0.7),
        )
    )
    how = dict(kind="guided_jvp", network=network, config=config, split=RowSplit(8, 8, 4))
    loss = jax.value_and_grad(lambda p: step.stage_loss(p, given, 1.0, **how), has_aux=True)
    with jax.default_matmul_precision("highest"):
        (total, metrics), grads = jax.jit(loss)(params)
    assert float(total) == pytest.approx(io["loss/total"].mean(), rel=2e-6)
    border, pairs = io["loss/fm_squares"].mean(), io["loss/mf_squares"].mean()
    assert float(metrics["squares_border"]) == pytest.approx(border, rel=5e-6)
    assert float(metrics["squares_pairs"]) == pytest.approx(pairs, rel=5e-6)
    theirs = {key.removeprefix("loss/grad/"): x for key, x in io.items() if "/grad/" in key}
    rules = DECOUPLED_DIT.rules(network_config, shape, None)
    where = {rule.tensors[0]: rule for rule in rules if rule.leaves}
    ours = flat(grads)
    assert len(theirs) >= 6
    for name, want in theirs.items():
        (found,) = where[name].backward(*(np.asarray(ours[leaf]) for leaf in where[name].leaves))
        assert relative_l2(found, want) <= 2e-5, name


@FILES
def test_the_way_back_gives_the_file_bit_for_bit(name):
    weights, _ = reference(name)
    back = conversion.export_arrays(DECOUPLED_DIT, *converted(name))
    assert set(back) == set(weights)
    for key, x in back.items():
        if key == "pos_embed":  # a table that the network computes
            np.testing.assert_allclose(x, weights[key], atol=1e-6)
        else:
            np.testing.assert_array_equal(x, weights[key])


def test_the_names_of_the_published_sizes():
    """256 px, and 512 px with norms of queries and keys; with the head of training and without."""
    small = conversion.key_list(GOLDEN / "keys_decoupled_xl2_256.txt")
    norms = {f"blocks.{i}.attn.{x}_norm.scale": (72,) for i in range(28) for x in "qk"}
    large = small | norms | {"pos_embed": (1, 1024, 1152)}
    for names, side, count in ((small, 32, 294), (large, 64, 350)):
        assert len(names) == count
        config, shape = conversion.check_names(DECOUPLED_DIT, names)
        assert (config.t_blocks, config.depth, config.heads) == (20, 28, 16)
        assert (shape, config.qk_norm, config.logvar) == ((side, side, 4), side == 64, True)
    bare = {name: s for name, s in small.items() if not name.startswith("logvar")}
    assert not conversion.check_names(DECOUPLED_DIT, bare)[0].logvar
    projectors = {"projectors.0.0.weight": (2048, 1152), "projectors.0.0.bias": (2048,)}
    wrapped = {f"ema.module._orig_mod.{name}": s for name, s in (bare | projectors).items()}
    assert conversion.check_names(DECOUPLED_DIT, wrapped)[0].t_blocks == 20


def test_what_the_tensors_do_not_tell_or_contradict_is_one_line():
    weights, _ = reference("decoupled_dit")
    more = weights | {"blocks.0.norm.weight": np.ones(3, np.float32)}
    wide = np.concatenate([weights["final_layer.linear.weight"]] * 2)
    cases = [
        (weights, {"heads": 4}, "how many of the 3 blocks see t: expected --set=t_blocks=N"),
        (weights, {"heads": 4, "t_blocks": 0}, "--set=t_blocks is 0; expected an integer of at"),
        (weights, {"heads": 4, "t_blocks": 4}, "t_blocks is 4; expected 1 to 3"),
        (weights, {"heads": 4, "second": "r"}, "--set=second=r: expected heads or resolution or t"),
        (more, GIVEN, "tensor blocks.0.norm.weight .* has no place in this network"),
        (weights | {"final_layer.linear.weight": wide}, GIVEN, "a velocity and a variance"),
    ]
    for file, given, message in cases:
        with pytest.raises(DmfError, match=message):
            conversion.convert_arrays(DECOUPLED_DIT, file, given)
    config, shape, _, _ = converted("decoupled_dit")
    for kind in (SIT, MEANFLOW_SIT):
        with pytest.raises(DmfError, match="network.time_routing is 'decoupled': expected 'interv"):
            kind.rules(config, shape, None)
    reversed_time = Direction("noise_at_0", "noise_minus_data", other_time=True)
    with pytest.raises(DmfError, match="--set=time=noise_at_0: expected the other time"):
        turned(DECOUPLED_DIT.rules(config, shape, None), config, reversed_time)
