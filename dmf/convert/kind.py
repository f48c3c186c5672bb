"""What a kind of weight file is, and what the kinds share: names, copies, given fields, layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmf.convert.rules import Rule
from dmf.errors import DmfError
from dmf.storage.readers.tree import Tensor

Tensors = Mapping[str, Tensor]
NamedArrays = Mapping[str, np.ndarray]
Shape = tuple[int, ...]
ASSUMED = "only stored outputs or samples can tell"
TRAINING = "it matters in training alone"


class Fact(NamedTuple):
    """A value that the names and shapes of a file may not tell (`dmf.convert.sides`)."""

    name: str  # as in --set
    value: Callable[[Any, Shape], Any]  # (config, image shape) -> the value that is taken
    # Its names in a config.json, in stored arguments and in metadata, each with what turns the
    # value there into ours, or into None where it says nothing. It raises TypeError, ValueError or
    # AttributeError for a wrong type.
    side: Mapping[str, Callable[[Any], Any]] = {}
    settable: bool = True  # whether --set can name it
    told: Callable[[Tensors], bool] = lambda _: False  # whether this file's tensors show it
    note: str = ASSUMED  # of a value that is assumed


class Kind(NamedTuple):
    """A kind of weight file, and how it is read.

    The forward check draws inputs by `probe` and compares `outputs` with `torch_outputs`. All three
    have arrays by name, in the layout, time and scale of the source.
    """

    name: str
    network: str  # the kind of network it makes; "" for any
    licence: str  # note on the licence of the weights
    conventions: str  # the source's time, sign and scale, and where ours are folded in
    # (tree, copy) -> (tensors by dotted name, the copy taken); copy "" is the default.
    select: Callable[[Any, str], tuple[dict[str, Tensor], str]]
    # (tensors, given) -> (network config, image shape), from names and shapes.
    # `given` holds the fields that the user sets.
    describe: Callable[[Tensors, Mapping[str, Any]], tuple[Any, Shape]]
    # (config, image shape, the file's tensors or None on export) -> key map.
    rules: Callable[[Any, Shape, Tensors | None], list[Rule]]
    # (network, params, inputs) -> our outputs, of those kinds that the inputs allow.
    outputs: Callable[[Any, Any, NamedArrays], dict[str, np.ndarray]]
    # (torch tensors, inputs) -> outputs of the same names, by the source's network in PyTorch.
    torch_outputs: Callable[[Mapping[str, Any], NamedArrays], dict[str, np.ndarray]]
    # (config, image shape) -> small random inputs for both.
    probe: Callable[[Any, Shape], dict[str, np.ndarray]]
    facts: tuple[Fact, ...] = ()  # what names and shapes may not tell
    # Of a flow: the words of `dmf.convert.direction` for the source's time and sign; "" elsewhere.
    time: str = ""
    sign: str = ""
    hint: str = ""  # what a failed forward check may point to
    several: bool = False  # whether its parts may lie in several files


def tensor_of(tensors: Tensors, name: str, kind: str) -> Tensor:
    """The tensor of that name. Raises DmfError where the file, then of another kind, has none."""
    if name not in tensors:
        some = ", ".join(list(tensors)[:3]) or "nothing"
        raise DmfError(
            f"no tensor {name} among {len(tensors)} (the first are {some}): "
            f"expected the weights of kind {kind}"
        )
    return tensors[name]


def axes(tensors: Tensors, name: str, count: int, kind: str) -> Shape:
    """The shape of a tensor, which must have `count` axes, none empty. Raises DmfError."""
    shape = tuple(tensor_of(tensors, name, kind).shape)
    if len(shape) != count or not all(shape):
        raise DmfError(
            f"tensor {name} has shape {list(shape)}: "
            f"expected {count} axes, none empty, in weights of kind {kind}"
        )
    return shape


def check_given(given: Mapping[str, Any], fields: Sequence[str], kind: str) -> None:
    """Raises DmfError for a given field that is none of `fields`."""
    for field, value in given.items():
        if field not in fields:
            raise DmfError(
                f"--set={field}={value}: "
                f"expected {' or '.join(fields) or 'no field'} for kind {kind}"
            )


def number(field: str, value: Any) -> float:
    """The value of a given field as a float. Raises DmfError for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DmfError(f"{field} is {value!r}: expected a number")
    return float(value)


def heads_of(sizes: Mapping[str, Mapping[str, int]], width: int, depth: int, given: Any) -> int:
    """Attention heads of a transformer, which its weights do not show.

    sizes: the named sizes. given: the number that the user sets, or None.
    Raises DmfError where neither tells, or where both do and differ.
    """
    shape = (width, depth)
    named = [s["heads"] for s in sizes.values() if (s["width"], s["depth"]) == shape]
    if given is None and not named:
        raise DmfError(
            "the weights do not show the number of attention heads, and width "
            f"{width} with depth {depth} is none of the named sizes ({', '.join(sizes)}): "
            "expected --set=heads=N"
        )
    if given is not None and named and given != named[0]:
        raise DmfError(
            f"--set=heads={given}: expected {named[0]}, "
            f"as in the named size of width {width} and depth {depth}"
        )
    return given or named[0]


def fact_of(name: str, *keys: str, **more: Any) -> Fact:
    """The fact of a network's field of that name. keys: its names in side files, as numbers."""
    return Fact(name, lambda config, _: getattr(config, name), dict.fromkeys(keys, exact), **more)


def shown(name: str, **side: Callable[[Any], Any]) -> Fact:
    """The fact of a network's field that the tensors show, for a comparison with side files."""
    return Fact(name, lambda config, _: getattr(config, name), side, False, lambda _: True)


def exact(value: Any) -> Any:
    """The value of a side file that is a number, or text that says one; None says nothing.

    Raises ValueError.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("no number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return int(number) if number.is_integer() and not isinstance(value, float) else number


def expect(config: Any, kind: str, wanted: Mapping[str, Any]) -> None:
    """Refuses a network that the source's program would compute in another way.

    The names of a kind fit more networks than its program runs. Raises DmfError.
    """
    for field, value in wanted.items():
        found = getattr(config, field, None)
        if found != value:
            raise DmfError(
                f"network.{field} is {found!r}: expected {value!r}, as in weights of kind {kind}"
            )


def nhwc(x: Any) -> jax.Array:
    """Images of PyTorch's layout in ours."""
    return jnp.asarray(x).transpose(0, 2, 3, 1)


def nchw(x: Any) -> np.ndarray:
    """Images of our layout in PyTorch's."""
    return np.asarray(x).transpose(0, 3, 1, 2)
