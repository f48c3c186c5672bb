"""A key map as data: which tensors of a file make which leaves of a network, and back.

A `Rule` is one line of a key map. One list of rules has three uses, so they cannot disagree:

- a conversion: tensors -> leaves;
- an audit: each tensor is used once, each leaf is filled once;
- an export: leaves -> tensors.

Weight and bias of a layer are two rules. Its name in the file is a `module`, blocks.3.mlp.fc1. Its
path in our parameters is a `room`, blocks_3/mlp/fc1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dmf.errors import DmfError

Arrays = Sequence[np.ndarray]


class Rule(NamedTuple):
    """One line of a key map.

    A rule without leaves is a constant, which the network computes itself.
    Its `forward` compares the file's values with it, and its `backward` makes them.
    """

    tensors: tuple[str, ...]  # names in the file
    leaves: tuple[str, ...]  # paths in the network's parameters
    # Both take and return arrays in the order of the names.
    forward: Callable[..., Arrays]  # tensors -> leaves; DmfError where a constant differs
    backward: Callable[..., Arrays]  # leaves -> tensors
    # Why this is no plain copy; "" for a copy.
    note: str = ""
    # Why a file may lack all of these tensors; "" where it must hold them.
    # Rules with one reason are a branch. An export leaves it out while its "zero" leaves are zero.
    missing: str = ""
    # What fills the leaves of missing tensors: "zero", or "init", the network's own fresh draw.
    # A branch needs one layer that is not zero, or no gradient reaches any of its layers.
    fill: str = "zero"


def plain(tensor: str, leaf: str) -> Rule:
    """A copy: biases, norm weights, embedding tables."""
    return Rule((tensor,), (leaf,), lambda x: (x,), lambda x: (x,))


def linear(tensor: str, leaf: str) -> Rule:
    """A linear layer's weight: (out, in) <-> (in, out)."""
    return Rule((tensor,), (leaf,), lambda x: (x.T,), lambda x: (x.T,))


def conv(tensor: str, leaf: str) -> Rule:
    """A convolution's weight: OIHW <-> HWIO."""

    def forward(x: np.ndarray) -> Arrays:
        return (x.transpose(2, 3, 1, 0),)

    def backward(x: np.ndarray) -> Arrays:
        return (x.transpose(3, 2, 0, 1),)

    return Rule((tensor,), (leaf,), forward, backward)


def linear_layer(module: str, room: str, bias: bool = True) -> list[Rule]:
    """Weight and bias of a linear layer `module` <-> kernel and bias of `room`."""
    biases = [plain(f"{module}.bias", f"{room}/bias")] if bias else []
    return [linear(f"{module}.weight", f"{room}/kernel"), *biases]


def conv_layer(module: str, room: str, bias: bool = True) -> list[Rule]:
    """Weight and bias of a convolution `module` <-> kernel and bias of `room`."""
    biases = [plain(f"{module}.bias", f"{room}/bias")] if bias else []
    return [conv(f"{module}.weight", f"{room}/kernel"), *biases]


def norm_layer(module: str, room: str) -> list[Rule]:
    """Weight and bias of a normalisation <-> its scale and bias."""
    return [plain(f"{module}.weight", f"{room}/scale"), plain(f"{module}.bias", f"{room}/bias")]


def mirrored(leaf: str, ndim: int, prefix: str = "") -> Rule:
    """The leaf a/b/kernel of `ndim` axes <-> the tensor a.b.weight, in PyTorch's layout.

    prefix: stands before the tensor's name.
    """
    *rooms, name = leaf.split("/")
    torch_name = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(name, name)
    layout = {("kernel", 2): linear, ("kernel", 4): conv}.get((name, ndim), plain)
    return layout(prefix + ".".join((*rooms, torch_name)), leaf)


def optional(rules: Sequence[Rule], reason: str, fill: str = "zero") -> list[Rule]:
    """The same rules for tensors that a file may lack; see `Rule.missing` and `Rule.fill`."""
    return [rule._replace(missing=reason, fill=fill) for rule in rules]


def constant(tensor: str, value: Callable[[], np.ndarray], note: str, atol: float = 1e-6) -> Rule:
    """A buffer that the network computes itself.

    A conversion compares the file's values with value(); an export writes value().
    """

    def forward(found: np.ndarray) -> Arrays:
        wanted = value()
        if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=0, atol=atol):
            raise DmfError(
                f"tensor {tensor}: other values than this network computes; expected {note}"
            )
        return ()

    return Rule((tensor,), (), forward, lambda: (value(),), note, f"computed: {note}")


def unread(tensor: str, value: Callable[[], np.ndarray], note: str, missing: str = "") -> Rule:
    """A tensor that the network does not need; an export writes value()."""
    return Rule((tensor,), (), lambda _: (), lambda: (value(),), note, missing)


def negated(rule: Rule, note: str) -> Rule:
    """The rule with the sign of its values changed."""
    return rule._replace(
        forward=lambda *x: [-leaf for leaf in rule.forward(*x)],
        backward=lambda *x: [-tensor for tensor in rule.backward(*x)],
        note=note,
    )


def reversed_time(weight: np.ndarray, angles: np.ndarray, *, sin_first: bool) -> np.ndarray:
    """Folds t -> 1 - t into a layer on cosines and sines of time; it is its own inverse.

    - weight: (out, 2 n), acts on cos and sin of f (1 - t).
    - angles: f (n,), radians per unit of time.
    - sin_first: the columns of the sines stand before the columns of the cosines.

    The result acts on cos and sin of f t. It computes in float64, by

        cos(f (1 - t)) = cos f cos(f t) + sin f sin(f t)

        sin(f (1 - t)) = sin f cos(f t) - cos f sin(f t)
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
    """The first layer of a time embedder, with time reversed in its weight.

    angles(n) -> (n,); see `reversed_time`.
    """

    def turned(weight: np.ndarray) -> np.ndarray:
        return reversed_time(weight, angles(weight.shape[1] // 2), sin_first=sin_first)

    names = (f"{module}.weight",), (f"{room}/kernel",)
    fold = Rule(*names, lambda w: (turned(w).T,), lambda k: (turned(k.T),), note)
    return [fold, plain(f"{module}.bias", f"{room}/bias")]


def relative_l2(got: np.ndarray, want: np.ndarray) -> float:
    """|got - want| / |want| over all elements, in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want)) / max(float(np.linalg.norm(want)), 1e-300)
