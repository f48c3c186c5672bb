"""A key map as data: which tensors of a checkpoint make which leaves of a network, in both directions.

A `Rule` is one line of a key map. The same list of rules converts (tensors -> leaves), audits (each tensor used once, each
leaf filled once) and exports (leaves -> tensors), so that the three cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dmf.errors import DmfError
from dmf.storage.readers.read import Tensor

Arrays = Sequence[np.ndarray]
FLOATS = ("float16", "bfloat16", "float32", "float64")


class Rule(NamedTuple):
    """One line of a key map.

    forward(*tensors) -> leaves and backward(*leaves) -> tensors, both sequences of arrays in the order of the names.
    note: why this is no plain copy; "" where it is one.
    missing: why a file may lack these tensors, all of them; leaves that then hold what `fill` says are left out of an
        export. "" where they must be there.
    fill: what the leaves hold where the tensors are missing: "zero", or "init", the network's own fresh draw. A branch
        whose layers are all zero is dead: it has no gradient to leave zero by.
    A rule without leaves is a constant that the network computes itself: forward raises DmfError if the file's values are
    other ones, backward makes them anew.
    """

    tensors: tuple[str, ...]
    leaves: tuple[str, ...]
    forward: Callable[..., Arrays]
    backward: Callable[..., Arrays]
    note: str = ""
    missing: str = ""
    fill: str = "zero"


class Kind(NamedTuple):
    """What a sort of checkpoint is, and how it is read. The arrays of outputs, torch_outputs and probe are named, laid out
    and scaled as in the source.

    network: the kind of network it makes, "" for any. licence: note on the weights' licence.
    conventions: the source's time, sign and scale, and where ours are folded.
    copies: names of the copies of the weights a file may hold, the default first.
    select(tree, which) -> (flat tensors, name of the copy taken); which "" = the default.
    describe(tensors, given) -> (network config, image shape): read off names and shapes; `given` are fields the user sets.
    rules(config, image_shape, tensors) -> key map; tensors: the file's, None on export.
    outputs(network, params, arrays) -> what our network makes of `arrays`, by name: only what these inputs allow.
    torch_outputs(tensors, arrays) -> the same names from PyTorch, written against the source's names (values: torch tensors).
    probe(config, image_shape) -> small random inputs for both.
    """

    name: str
    network: str
    licence: str
    conventions: str
    copies: tuple[str, ...]
    select: Callable[[Any, str], tuple[dict[str, Tensor], str]]
    describe: Callable[[Mapping[str, Tensor], Mapping[str, Any]], tuple[Any, tuple[int, ...]]]
    rules: Callable[[Any, tuple[int, ...], Mapping[str, Tensor] | None], list[Rule]]
    outputs: Callable[[Any, Any, Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    torch_outputs: Callable[[Mapping[str, Any], Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    probe: Callable[[Any, tuple[int, ...]], dict[str, np.ndarray]]


def plain(tensor: str, leaf: str) -> Rule:
    """A copy: biases, norm weights, embedding tables."""
    return Rule((tensor,), (leaf,), lambda x: (x,), lambda x: (x,))


def linear(tensor: str, leaf: str) -> Rule:
    """(out, in) <-> (in, out)."""
    return Rule((tensor,), (leaf,), lambda x: (x.T,), lambda x: (x.T,))


def conv(tensor: str, leaf: str) -> Rule:
    """OIHW <-> HWIO."""
    return Rule(
        (tensor,),
        (leaf,),
        lambda x: (x.transpose(2, 3, 1, 0),),
        lambda x: (x.transpose(3, 2, 0, 1),),
    )


def linear_layer(module: str, room: str, bias: bool = True) -> list[Rule]:
    """Weight and bias of `module` <-> kernel and bias of `room`."""
    return [
        linear(f"{module}.weight", f"{room}/kernel"),
        *([plain(f"{module}.bias", f"{room}/bias")] if bias else []),
    ]


def conv_layer(module: str, room: str, bias: bool = True) -> list[Rule]:
    """Weight and bias of the convolution `module` <-> kernel and bias of `room`."""
    return [
        conv(f"{module}.weight", f"{room}/kernel"),
        *([plain(f"{module}.bias", f"{room}/bias")] if bias else []),
    ]


def norm_layer(module: str, room: str) -> list[Rule]:
    """Weight and bias of a normalisation <-> its scale and bias."""
    return [plain(f"{module}.weight", f"{room}/scale"), plain(f"{module}.bias", f"{room}/bias")]


def optional(rules: Sequence[Rule], reason: str, fill: str = "zero") -> list[Rule]:
    """The rules, with leaves that are zero, or freshly initialised, where the file lacks their tensors (see Rule)."""
    return [rule._replace(missing=reason, fill=fill) for rule in rules]


def constant(tensor: str, value: Callable[[], np.ndarray], note: str, atol: float = 1e-6) -> Rule:
    """A buffer that the network computes itself: compared with the file's values, and made anew on export."""

    def forward(found: np.ndarray) -> Arrays:
        wanted = value()
        if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=0, atol=atol):
            raise DmfError(
                f"tensor {tensor}: other values than this network computes; expected {note}"
            )
        return ()

    return Rule((tensor,), (), forward, lambda: (value(),), note, f"computed: {note}")


def tensor_of(tensors: Mapping[str, Tensor], name: str, kind: str) -> Tensor:
    """The tensor of that name, or a DmfError that says the file is none of this kind."""
    if name not in tensors:
        some = ", ".join(list(tensors)[:3]) or "nothing"
        raise DmfError(
            f"no tensor {name} among {len(tensors)} (the first are {some}): expected the weights of kind {kind}"
        )
    return tensors[name]


def expect(config: Any, kind: str, wanted: Mapping[str, Any]) -> None:
    """Refuses a network that the names of a kind can spell and that its program would run as another one."""
    for field, value in wanted.items():
        found = getattr(config, field, None)
        if found != value:
            raise DmfError(
                f"network.{field} is {found!r}: expected {value!r}, as in weights of kind {kind}"
            )


def reversed_time(weight: np.ndarray, angles: np.ndarray, *, sin_first: bool) -> np.ndarray:
    """A layer (out, 2 n) on cosines and sines of f (1 - t) -> the one on those of f t, in float64; its own inverse.

    cos(f (1 - t)) = cos f cos(f t) + sin f sin(f t),  sin(f (1 - t)) = sin f cos(f t) - cos f sin(f t)

    angles: f (n,), radians per unit of time. sin_first: whether the sines come before the cosines.
    """
    first, second = np.split(weight.astype(np.float64), 2, axis=1)
    cosine, sine = (second, first) if sin_first else (first, second)
    halves = (
        cosine * np.cos(angles) + sine * np.sin(angles),
        cosine * np.sin(angles) - sine * np.cos(angles),
    )
    return np.concatenate(halves[::-1] if sin_first else halves, axis=1)


def reversed_layer(
    module: str, room: str, angles: Callable[[int], np.ndarray], *, sin_first: bool, note: str
) -> list[Rule]:
    """Weight and bias of the first layer of a time embedder, the weight by `reversed_time`; angles(n) -> (n,)."""

    def turned(weight: np.ndarray) -> np.ndarray:
        return reversed_time(weight, angles(weight.shape[1] // 2), sin_first=sin_first)

    names = (f"{module}.weight",), (f"{room}/kernel",)
    fold = Rule(*names, lambda w: (turned(w).T,), lambda k: (turned(k.T),), note)
    return [fold, plain(f"{module}.bias", f"{room}/bias")]


def negated(rule: Rule, note: str) -> Rule:
    """The rule with the sign of its values changed."""
    return rule._replace(
        forward=lambda *x: [-leaf for leaf in rule.forward(*x)],
        backward=lambda *x: [-tensor for tensor in rule.backward(*x)],
        note=note,
    )


def relative_l2(got: np.ndarray, want: np.ndarray) -> float:
    """|got - want| / |want| over all elements, in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want)) / max(float(np.linalg.norm(want)), 1e-300)
