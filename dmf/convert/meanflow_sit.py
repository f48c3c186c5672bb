"""MeanFlow's transformer in PyTorch: SiT's layout, with a second embedder for the interval.

Ports of MeanFlow call the second embedder `r_embedder` or `h_embedder`. In all that we read,
`t_embedder` sees t. The second one sees t - r in most, and r itself in some. No tensor tells which:
`--set=second=r` takes the other form. Time and sign are MeanFlow's, as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from dmf.convert import dit, sit
from dmf.convert.kind import Fact, Kind, Shape, Tensors, check_given, expect
from dmf.convert.rules import Rule, conv_layer, linear_layer
from dmf.errors import DmfError
from dmf.networks.dit import INTERVAL_INPUTS, DiTConfig
from dmf.networks.layers import check_choice

NAME = "meanflow_sit"
EMBEDDERS = ("r_embedder", "h_embedder")  # an export writes the first


def _second(names: Mapping[str, Any]) -> str:
    """The name of the second embedder. Raises DmfError."""
    found = [e for e in EMBEDDERS if any(name.startswith(f"{e}.") for name in names)]
    if len(found) != 1:
        raise DmfError(
            f"second embedders in the file: {' and '.join(found) or 'none'}; expected one of "
            f"{' or '.join(EMBEDDERS)} (a flow has none: --kind=sit)"
        )
    return found[0]


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[DiTConfig, Shape]:
    check_given(given, (*dit.GIVEN, "second"), NAME)
    seen = given.get("second", INTERVAL_INPUTS[0])
    check_choice("--set=second", seen, INTERVAL_INPUTS)
    _second(tensors)
    sizes = {name: value for name, value in given.items() if name != "second"}
    config, shape, outputs = sit.described(tensors, sizes, NAME)
    if outputs != 1:
        raise DmfError(
            f"tensor {sit.LAST}.weight has rows for a velocity and a variance: "
            "expected those of a velocity alone"
        )
    return replace(config, interval_input=seen), shape


def _rules(config: DiTConfig, shape: Shape, tensors: Tensors | None) -> list[Rule]:
    expect(config, NAME, {"kind": "dit", **dit.PLAIN})
    second = _second(tensors) if tensors else EMBEDDERS[0]
    rooms = {name: dit.room(name) for name in ("t_embedder.mlp.0", *dit.modules(config.depth))}
    rooms |= {f"{second}.mlp.{i}": f"interval/mlp_{i}" for i in (0, 2)}
    rooms |= {sit.LAST: dit.room(sit.LAST)}
    return [
        sit.positions(config.width, config.patch, shape, tensors),
        *conv_layer("x_embedder.proj", "x_embedder/proj"),
        *dit.label_table(config, sit.TABLE),
        *(rule for module, room in rooms.items() for rule in linear_layer(module, room)),
    ]


def _probe(config: DiTConfig, shape: Shape) -> dict[str, np.ndarray]:
    ours = dit.probe(config, shape)
    sees_r = np.array(config.interval_input == "r")  # which no tensor shows PyTorch's side
    return ours | {"x": ours["x"].transpose(0, 3, 1, 2), "sees_r": sees_r}


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    import torch

    r = dit.r_of(arrays)
    seen = r if arrays.get("sees_r", False) else np.asarray(arrays["t"], np.float32) - r
    return {"u": sit.torch_forward(tensors, arrays, {_second(tensors): torch.from_numpy(seen)})}


MEANFLOW_SIT = Kind(
    name=NAME,
    network="dit",
    licence="zhuyu-cs/MeanFlow: MIT; other ports have licences of their own",
    conventions=(
        "t = 1 is noise, u of noise - data: as here, nothing is folded. t_embedder sees t; the "
        "second embedder sees t - r, or r with --set=second=r. "
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
        Fact("second", lambda config, _: config.interval_input),
    ),
    time="noise_at_1",
    sign="noise_minus_data",
)
