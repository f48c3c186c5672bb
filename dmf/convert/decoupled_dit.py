"""Decoupled MeanFlow's transformer in PyTorch (arXiv 2510.24474, kyungmnlee/dmf).

Its layout is SiT's. One embedder serves both times: the first blocks see t, the later ones and the
last layer see r. No tensor tells how many see t: `--set=t_blocks=N`, or stored arguments. Time and
sign are MeanFlow's, as here.

Files of 512 px normalise queries and keys. Training checkpoints also hold the head for the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from dmf.convert import dit, sit
from dmf.convert.kind import Fact, Kind, Shape, Tensors, check_given, expect, fact_of
from dmf.convert.rules import Rule, conv_layer, linear_layer, plain
from dmf.errors import DmfError
from dmf.networks import layers
from dmf.networks.dit import DiTConfig

NAME = "decoupled_dit"
# Blocks that see t, by depth: the paper's of XL and L.
T_BLOCKS = {28: 20, 24: 18}


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[DiTConfig, Shape]:
    check_given(given, (*dit.GIVEN, "t_blocks"), NAME)
    sizes = {name: value for name, value in given.items() if name != "t_blocks"}
    config, shape, outputs = sit.described(tensors, sizes, NAME, norms=True)
    if outputs != 1:
        raise DmfError(
            f"tensor {sit.LAST}.weight has rows for a velocity and a variance: "
            "expected those of a velocity alone"
        )
    t_blocks = given.get("t_blocks", T_BLOCKS.get(config.depth))
    if t_blocks is None:
        raise DmfError(
            f"the weights do not show how many of the {config.depth} blocks see t: "
            "expected --set=t_blocks=N"
        )
    layers.check_positive("--set=t_blocks", t_blocks)
    norms, head = (any(mark in name for name in tensors) for mark in (".q_norm.", "logvar_linear."))
    routed = replace(config, time_routing="decoupled", t_blocks=t_blocks)
    return replace(routed, qk_norm=norms, logvar=head), shape


def _rules(config: DiTConfig, shape: Shape, tensors: Tensors | None) -> list[Rule]:
    expect(config, NAME, {"kind": "dit", "time_routing": "decoupled"})
    modules = ("t_embedder.mlp.0", *dit.modules(config.depth), sit.LAST)
    rooms = {name: dit.room(name) for name in modules}
    rooms |= {layers.VARIANCE: layers.VARIANCE} if config.logvar else {}
    norms = [f"blocks.{i}.attn.{x}_norm" for i in range(config.depth) for x in "qk"]
    return [
        sit.positions(config.width, config.patch, shape, tensors),
        *conv_layer("x_embedder.proj", "x_embedder/proj"),
        *dit.label_table(config, sit.TABLE),
        *(rule for module, room in rooms.items() for rule in linear_layer(module, room)),
        *(plain(f"{x}.scale", f"{dit.room(x)}/scale") for x in norms if config.qk_norm),
        *sit.projectors(tensors),
    ]


def _probe(config: DiTConfig, shape: Shape) -> dict[str, np.ndarray]:
    ours = dit.probe(config, shape)
    t_blocks = np.array(config.t_blocks)  # which no tensor shows PyTorch's side
    return ours | {"x": ours["x"].transpose(0, 3, 1, 2), "t_blocks": t_blocks}


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    late = dit.r_of(arrays), int(arrays["t_blocks"])
    return {"u": sit.torch_forward(tensors, arrays, {}, late)}


DECOUPLED_DIT = Kind(
    name=NAME,
    network="dit",
    licence="kyungmnlee/dmf: no licence file that we found; trained on ImageNet.",
    conventions=(
        "Decoupled MeanFlow, which is called DMF too: t = 1 is noise, u of noise - data, as here; "
        "nothing is folded. The first t_blocks blocks see t, the others and the last layer see r. "
        "The label table's last row is taken for the null class"
    ),
    select=sit.SIT.select,
    describe=_describe,
    rules=_rules,
    outputs=dit.average_outputs,
    torch_outputs=_torch_outputs,
    probe=_probe,
    facts=(
        *dit.facts(sit.TABLE, resolution=True),
        fact_of("t_blocks", "dmf_depth"),
        Fact("path", lambda *_: "linear", {"path_type": str.lower}, settable=False),
    ),
    time="noise_at_1",
    sign="noise_minus_data",
)
