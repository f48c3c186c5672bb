"""Decoupled times: the first layers see t, the later ones r, by the parameters of a flow model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dmf.errors import DmfError
from dmf.networks import Execution, build
from tests.networks.small import (
    DIT,
    SMALL,
    fast_compile,
    leaf_paths,
    nested,
    random_params,
    relative_l2,
    shapes,
    small,
)

FIELDS = {"unet": {}, "dit": {"t_blocks": 1}}
# What reads the embedding of the later layers.
LATE = {
    "unet": lambda path: path[0] == "dec" and "_in" not in path[1] and path[2:3] == ("affine",),
    "dit": lambda path: path[0] in ("blocks_1", "final_layer") and "adaLN_modulation_1" in path,
}
EARLY = {
    "unet": lambda path: "affine" in path and not LATE["unet"](path),
    "dit": lambda path: path[0] == "blocks_0" and "adaLN_modulation_1" in path,
}
KINDS = pytest.mark.parametrize("kind", FIELDS)


def decoupled(kind, how=None, **fields):
    config, shape, _ = SMALL[kind]
    given = {"time_routing": "decoupled", **FIELDS[kind], **fields}
    return build(dataclasses.replace(config, **given), shape, **({"how": how} if how else {}))


def flow_params(kind):
    """Random weights of a flow model: those of the network without its interval branch."""
    flat = leaf_paths(random_params(kind))
    return nested({path: x for path, x in flat.items() if "interval" not in path})


def apply(network, params, z, r, t, label):
    floats = label is not None and np.issubdtype(label.dtype, np.floating)
    given = {} if floats else {"label": label}
    return np.asarray(fast_compile(network.apply)(params, z, r, t, **given))


@KINDS
def test_a_decoupled_network_has_the_parameters_of_a_flow_model(kind):
    config, shape, _ = SMALL[kind]
    flow = {p: s for p, s in shapes(build(config, shape)).items() if "interval" not in p}
    assert shapes(decoupled(kind)) == flow


@KINDS
def test_at_r_equal_t_it_is_the_flow_model_bit_for_bit(kind):
    z, r, t, label, _ = small(kind)
    config, shape, _ = SMALL[kind]
    params, silent = flow_params(kind), leaf_paths(random_params(kind))
    silent = {p: 0 * x if "interval" in p else x for p, x in silent.items()}
    v = apply(build(config, shape), nested(silent), z, t, t, label)
    network = decoupled(kind)
    assert np.std(v) > 0.05
    np.testing.assert_array_equal(apply(network, params, z, t, t, label), v)
    assert relative_l2(apply(network, params, z, r, t, label), v) > 1e-3


@KINDS
def test_late_layers_alone_see_r_and_early_ones_alone_see_t(kind):
    z, r, t, label, _ = small(kind)
    network, flat = decoupled(kind), leaf_paths(flow_params(kind))
    for late, others in ((True, (0.5 * r, t)), (False, (r, 0.5 + 0.5 * t))):
        blind = (LATE if late else EARLY)[kind]
        assert any(map(blind, flat))
        params = nested({p: 0 * x if blind(p) else x for p, x in flat.items()})
        u = apply(network, params, z, r, t, label)
        np.testing.assert_array_equal(u, apply(network, params, z, *others, label))
        same = (r, 0.5 + 0.5 * t) if late else (0.5 * r, t)
        assert relative_l2(apply(network, params, z, *same, label), u) > 1e-5


def test_scanned_blocks_see_the_same_times():
    z, r, t, label, _ = small("dit")
    params = flow_params("dit")
    plain = apply(decoupled("dit"), params, z, r, t, label)
    scanned = apply(decoupled("dit", Execution(scan=True)), params, z, r, t, label)
    assert relative_l2(scanned, plain) < 1e-6


def test_queries_and_keys_are_scaled_to_unit_mean_square():
    """With a norm a factor on the rows of q and k changes nothing; without, it does."""
    z, r, t, label, _ = small("dit")
    network = build(dataclasses.replace(DIT, qk_norm=True), SMALL["dit"][1])
    extra = {p: np.ones(s, np.float32) for p, s in shapes(network).items() if p[-1] == "scale"}
    assert {p[-2] for p in extra} == {"q_norm", "k_norm"}
    assert {x.shape for x in extra.values()} == {(DIT.width // DIT.heads,)}
    flat = leaf_paths(random_params("dit")) | extra
    louder = dict(flat)
    for path in flat:
        if path[-2] == "qkv":
            louder[path] = flat[path].copy()
            louder[path][..., : 2 * DIT.width] *= 64
    u = apply(network, nested(flat), z, r, t, label)
    assert relative_l2(apply(network, nested(louder), z, r, t, label), u) < 1e-4
    plain = build(DIT, SMALL["dit"][1])
    flat, louder = ({p: x for p, x in f.items() if p not in extra} for f in (flat, louder))
    u = apply(plain, nested(flat), z, r, t, label)
    assert relative_l2(apply(plain, nested(louder), z, r, t, label), u) > 1e-2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"t_blocks": 1}, "t_blocks is 1; expected 0, or time_routing 'decoupled'"),
        ({"time_routing": "decoupled"}, "t_blocks is 0; expected 1 to 2, some of the blocks"),
        ({"time_routing": "decoupled", "t_blocks": 3}, "t_blocks is 3; expected 1 to 2"),
        (
            {"time_routing": "decoupled", "t_blocks": 1, "interval_input": "r"},
            "interval_input is 'r'; expected 't-r'",
        ),
        ({"time_routing": "late"}, "time_routing is 'late'; expected one of"),
    ],
)
def test_a_routing_without_meaning_is_refused(fields, message):
    with pytest.raises(DmfError, match=message):
        build(dataclasses.replace(DIT, **fields), SMALL["dit"][1])
