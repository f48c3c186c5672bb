"""FLOPs of the matrix products and convolutions of a compiled program, as often as loops run.

They are the work of the matrix units, whose peak a maker states.
XLA's own count has the body of a loop once, and sums of numbers besides.
"""

from __future__ import annotations

import math
import re

import numpy as np

from dmf.measure import hlo
from dmf.measure.hlo import Instruction, Module


def flops(module: Module) -> float:
    """FLOPs of the products of one run. A multiplication with its sum counts two.

    A kernel that XLA does not know (cuDNN, Pallas, cuBLAS) counts as 0.
    """
    return float(sum(times * _of(module, where, i) for where, i, times in hlo.walk(module)))


def _of(module: Module, where: dict[str, Instruction], found: Instruction) -> int:
    """FLOPs of one instruction, or of all inside a fusion."""
    inside = hlo.inside_of(module, found)
    if inside:
        return sum(_of(module, inside, i) for i in inside.values())
    if found.opcode not in ("dot", "convolution"):
        return 0
    given, kernel = (_lengths(where[name].result) for name in found.operands[:2])
    if found.opcode == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", found.rest)
        axes = [int(a) for a in summed.group(1).split(",") if a] if summed else []
        return 2 * math.prod(_lengths(found.result)) * math.prod(given[a] for a in axes)
    return _convolution(found, given, kernel, _lengths(found.result))


def _convolution(found: Instruction, given: list[int], kernel: list[int], made: list[int]) -> int:
    """FLOPs of a convolution, which is also how a TPU writes matrix products.

    There dim_labels=b01f_01io->b01f names the axes: batch, features, and a number per axis of
    the window.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", found.rest)
    if labels is None:
        return 0
    x, k, y = (
        dict(zip(names, lengths, strict=True))
        for names, lengths in zip(labels.groups(), (given, kernel, made), strict=True)
    )
    around = re.search(r"window=\{(.*?)\}", found.rest)
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", around.group(1) if around else ""))
    pairs = (_met(x[a], k[a], y[a], window, int(a)) for a in sorted(set(k) - {"i", "o"}))
    return 2 * y["b"] * y["f"] * k["i"] * math.prod(pairs)


def _met(given: int, kernel: int, made: int, window: dict[str, str], axis: int) -> int:
    """How many pairs of a result's and a kernel's position meet an input, not padding or a gap."""

    def of(key: str, usual: int) -> int:
        return int(window[key].split("x")[axis].split("_")[0]) if key in window else usual

    starts, steps = of("stride", 1) * np.arange(made), of("rhs_dilate", 1) * np.arange(kernel)
    at, apart = np.add.outer(starts, steps) - of("pad", 0), of("lhs_dilate", 1)
    return int(np.sum((at >= 0) & (at <= (given - 1) * apart) & (at % apart == 0)))


def _lengths(shape: str) -> list[int]:
    """The lengths of the axes of one array."""
    return [int(n) for n in hlo.SHAPE.findall(shape)[0][1].split(",") if n]
