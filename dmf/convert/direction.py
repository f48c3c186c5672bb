"""Time and sign of a flow in a file, and how they are folded into the key map.

A kind has the time and the sign of its authors' code. Other trainers use the same names and shapes
with another time or sign. `--set=time=...` and `--set=sign=...` say so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dmf.convert.kind import Kind
from dmf.convert.rules import Arrays, Rule, reversed_time
from dmf.errors import DmfError
from dmf.networks import UNetConfig, layers
from dmf.networks.layers import check_choice

TIMES = ("noise_at_1", "noise_at_0")  # ours is the first
SIGNS = ("noise_minus_data", "data_minus_noise")  # ours is the first
# First layer of t's embedder: its kernel, and the form of its frequencies and features.
EMBEDDER = {
    "dit": ("t_embedder/mlp_0/kernel", {"endpoint": False}, False),
    "adm": ("time_embed_0/kernel", {"endpoint": False}, False),
    "unet": ("map_layer0/kernel", {"endpoint": True}, True),
}
LAST = {
    "dit": r"final_layer/linear/",
    "in_context_dit": r"(head_)?final_layer/linear/",
    "dit_dh": r"final_layer/linear/",
    "adm": r"out_2/",
    "unet": r"dec/\d+x\d+_aux_conv/",
}


class Direction(NamedTuple):
    """Time and sign of a source, and whether each differs from its kind's."""

    time: str
    sign: str
    other_time: bool = False
    other_sign: bool = False

    @property
    def setting(self) -> str:
        """The flag that chooses it."""
        return f"--set=time={self.time},sign={self.sign}"

    def opposite(self, time: bool, sign: bool) -> Direction:
        """The direction with its time, its sign or both reversed."""
        times = TIMES[1 - TIMES.index(self.time)] if time else self.time
        signs = SIGNS[1 - SIGNS.index(self.sign)] if sign else self.sign
        return Direction(times, signs, self.other_time != time, self.other_sign != sign)


def split(kind: Kind, given: Mapping[str, Any]) -> tuple[Direction | None, dict[str, Any]]:
    """(direction of the source, the other given fields); None for a kind without a choice.

    Raises DmfError for a word that is none of TIMES or SIGNS.
    """
    if not kind.time:
        return None, dict(given)
    time, sign = given.get("time", kind.time), given.get("sign", kind.sign)
    check_choice("--set=time", time, TIMES)
    check_choice("--set=sign", sign, SIGNS)
    rest = {name: value for name, value in given.items() if name not in ("time", "sign")}
    return Direction(time, sign, time != kind.time, sign != kind.sign), rest


def of_source(kind: Kind, source: Mapping[str, Any] | None) -> Direction | None:
    """The direction of the file that a checkpoint was made from, for an export in its layout.

    source: what a conversion has stored; None where there was none. Another kind has its own.
    """
    values = source.get("values", []) if source and source["kind"] == kind.name else []
    return split(kind, {x["name"]: x["value"] for x in values if x["name"] in ("time", "sign")})[0]


def turned(rules: Sequence[Rule], config: Any, direction: Direction | None) -> list[Rule]:
    """The key map for a source with another time or sign than its kind's.

    Raises DmfError for a network whose time is not reversed by a change of weights.
    """
    if direction is None or not (direction.other_time or direction.other_sign):
        return list(rules)
    changes = _changes(config, direction, [leaf for rule in rules for leaf in rule.leaves])
    return [_turned(rule, changes) for rule in rules]


Change = tuple[str, Callable[[np.ndarray], np.ndarray]]  # (note, function: its own inverse)


def _turned(rule: Rule, changes: Mapping[str, Change]) -> Rule:
    notes = [changes[leaf][0] for leaf in rule.leaves if leaf in changes]
    if not notes:
        return rule

    def changed(values: Arrays) -> Arrays:
        pairs = zip(rule.leaves, values, strict=True)
        return [changes[leaf][1](x) if leaf in changes else x for leaf, x in pairs]

    return rule._replace(
        forward=lambda *x: changed(rule.forward(*x)),
        backward=lambda *x: rule.backward(*changed(x)),
        note="; ".join(filter(None, (rule.note, *notes))),
    )


def _changes(config: Any, direction: Direction, leaves: Sequence[str]) -> dict[str, Change]:
    found: dict[str, Change] = {}
    if direction.other_sign:
        note = f"negated: sign is {direction.sign}"
        last = [leaf for leaf in leaves if re.match(LAST[config.kind], leaf)]
        found |= {leaf: (note, np.negative) for leaf in last}
    if direction.other_time:
        if config.kind not in EMBEDDER:
            raise DmfError(
                f"--set=time={direction.time}: expected the other time, as no change of weights "
                f"reverses that of network.kind {config.kind}"
            )
        if getattr(config, "time_routing", "interval") == "decoupled":
            raise DmfError(
                f"--set=time={direction.time}: expected the other time, as no program with "
                "decoupled times has this one"
            )
        if getattr(config, "interval_input", "t-r") == "r":
            raise DmfError(
                f"--set=second=r,time={direction.time}: expected second=t-r or the other time, "
                "as no change of weights reverses r"
            )
        if isinstance(config, UNetConfig) and (config.time_input, config.embedding) != (
            "t",
            "positional",
        ):
            raise DmfError(
                f"--set=time={direction.time}: expected a network of t by sines and cosines, "
                "as no change of its weights reverses another embedding"
            )
        found |= _time_changes(config, f"time reversed: time is {direction.time}")
    return found


def _time_changes(config: Any, note: str) -> dict[str, Change]:
    kernel, form, sin_first = EMBEDDER[config.kind]
    scale = getattr(config, "time_scale", 1.0)

    def reverse(weight: np.ndarray) -> np.ndarray:
        angles = scale * layers.frequencies(weight.shape[1] // 2, **form)
        return reversed_time(weight, angles, sin_first=sin_first)

    found: dict[str, Change] = {kernel: (note, lambda x: reverse(x.T).T)}
    if isinstance(config, UNetConfig) and config.augment_dim:
        # The label is added to the features, so it turns with them.
        width = config.noise_width

        def of_label(x: np.ndarray) -> np.ndarray:
            return np.concatenate((reverse(x[:, :width]), x[:, width:]), axis=1)

        found["map_augment/kernel"] = (note, of_label)
    return found


def seen_as(network: Any, direction: Direction | None) -> Any:
    """The network in the time and the sign of its kind, for outputs of the source's program."""
    if direction is None or not (direction.other_time or direction.other_sign):
        return network

    def apply(params: Any, z: Any, r: Any, t: Any, **more: Any) -> Any:
        length, at = t - r, 1 - t if direction.other_time else t
        out = network.apply(params, z, at - length, at, **more)
        return -out if direction.other_sign else out

    return network._replace(apply=apply)


def note(direction: Direction | None) -> str:
    """What is added to the conventions of a kind."""
    if direction is None or not (direction.other_time or direction.other_sign):
        return ""
    return f". This file has another direction: {direction.setting}"
