"""The structure of EDM's SongUNet, which EDM, ECT and MeanFlow's CIFAR-10 U-Net share.

Our names are the sources' names, with "." read as "/". Two layers differ in each kind:

- the first layer of the embedding, map_layer0;
- the layer of the augmentation label, map_augment.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dmf import networks
from dmf.convert.kind import Shape, Tensors, axes, check_given, number, tensor_of
from dmf.convert.leaves import flat
from dmf.convert.rules import Arrays, Rule, constant, linear, mirrored, optional
from dmf.errors import DmfError
from dmf.networks import UNetConfig

FILTERS = {"box": (1, 1), "binomial": (1, 3, 3, 1)}


def numbers(given: Mapping[str, Any], known: Mapping[str, float], kind: str) -> dict[str, Any]:
    """The known fields as numbers, with the values that the user gives. Raises DmfError."""
    check_given(given, list(known), kind)
    return {**known, **{field: number(field, value) for field, value in given.items()}}


def structure(tensors: Tensors, kind: str, prefix: str = "") -> tuple[dict[str, Any], Shape]:
    """Fields of the U-Net's config, and its image shape, from names and shapes.

    prefix: stands before every name. Raises DmfError for what is no such U-Net.
    """
    tensor_of(tensors, f"{prefix}map_layer0.weight", kind)
    sizes, blocks = _levels(tensors, prefix)
    first = axes(tensors, f"{prefix}enc.{sizes[0]}x{sizes[0]}_conv.weight", 4, kind)
    channels, image_channels = first[:2]
    convs = [f"{prefix}enc.{size}x{size}_block0.conv0.weight" for size in sizes]
    widths = [axes(tensors, name, 4, kind)[0] for name in convs]
    if any(width % channels for width in widths):
        raise DmfError(
            f"resolutions of {', '.join(map(str, widths))} channels: "
            f"expected multiples of {channels}"
        )
    label = f"{prefix}map_augment.weight"
    fields = {
        "channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "blocks": blocks,
        "attention_resolutions": tuple(
            size for size in sizes if f"{prefix}enc.{size}x{size}_block0.qkv.weight" in tensors
        ),
        "augment_dim": axes(tensors, label, 2, kind)[1] if label in tensors else 0,
    }
    return fields, (sizes[0], sizes[0], image_channels)


def _levels(tensors: Tensors, prefix: str) -> tuple[list[int], int]:
    """The resolutions of the encoder, from the finest, and the blocks at each. Raises DmfError."""
    pattern = rf"{prefix}enc\.(\d+)x\1_block(\d+)\.conv0\.weight"
    counts: dict[int, int] = {}
    for found in (re.fullmatch(pattern, name) for name in tensors):
        if found:
            counts[int(found[1])] = counts.get(int(found[1]), 0) + 1
    sizes = sorted(counts, reverse=True)
    halved = all(sizes[0] == size << i for i, size in enumerate(sizes))
    if not sizes or len(set(counts.values())) > 1 or not halved:
        levels = ", ".join(f"{counts[size]} at {size}x{size}" for size in sizes) or "none"
        raise DmfError(
            f"blocks of the encoder: {levels}; "
            "expected as many at every resolution, each half the one before"
        )
    return sizes, counts[sizes[0]]


def resample(tensors: Tensors, levels: int, kind: str) -> str:
    """The name of the resampling filter, from its length. Its values are compared later."""
    name = next((name for name in tensors if name.endswith("resample_filter")), "")
    if not name and levels > 1:
        raise DmfError(
            f"no tensor resample_filter among {len(tensors)}: "
            f"expected the buffers of kind {kind} beside its parameters"
        )
    lengths = {(len(taps),) * 2: filter for filter, taps in FILTERS.items()}
    found = tuple(tensors[name].shape[-2:]) if name else (4, 4)
    if found not in lengths:
        raise DmfError(
            f"tensor {name} has shape {list(tensors[name].shape)}: "
            "expected a filter of 2 x 2 or 4 x 4"
        )
    return lengths[found]


def leaves_of(config: UNetConfig, image_shape: Shape) -> dict[str, int]:
    """Every leaf of the network, and its number of axes."""
    shapes = jax.eval_shape(networks.build(config, image_shape).init, jax.random.key(0))
    return {leaf: x.ndim for leaf, x in flat(shapes).items()}


def completed(
    special: list[Rule], leaves: Mapping[str, int], resample: str, prefix: str = ""
) -> list[Rule]:
    """The key map: the special rules, one rule for every other leaf, and the filters.

    Each layer that resamples has a filter.
    """
    done = {leaf for rule in special for leaf in rule.leaves}
    others = [mirrored(leaf, ndim, prefix) for leaf, ndim in leaves.items() if leaf not in done]
    note = f"the filter {list(FILTERS[resample])} of resample = {resample!r}"
    filtered = r"(x\d+_(down|up)/(conv0|skip)|_aux_residual)/kernel"
    rooms = [leaf.rpartition("/")[0] for leaf in leaves if re.search(filtered, leaf)]
    names = [f"{prefix}{room.replace('/', '.')}.resample_filter" for room in rooms]
    values = functools.partial(_filter, resample)
    filters = [constant(name, values, note)._replace(missing="") for name in names]
    return [*special, *others, *filters]


def _filter(resample: str) -> np.ndarray:
    taps = np.array(FILTERS[resample], np.float32)
    return (np.outer(taps, taps) / taps.sum() ** 2)[None, None]


def one_time(config: UNetConfig, tensors: Tensors | None, prefix: str = "") -> list[Rule]:
    """The rules of a network that sees t alone, for what it lacks of ours.

    It lacks the features of t - r, and the half of the augmentation label beside them.
    """
    rules = optional([linear(f"{prefix}interval.weight", "interval/kernel")], "a flow has one time")
    name, leaf, width = f"{prefix}map_augment.weight", "map_augment/kernel", config.noise_width
    if not config.augment_dim:
        return rules
    if tensors and tensors[name].shape[0] == 2 * width:
        return [*rules, linear(name, leaf)]

    def halves(weight: np.ndarray) -> Arrays:
        return (np.concatenate((weight.T, np.zeros_like(weight.T)), 1),)

    def half(kernel: np.ndarray) -> Arrays:  # both halves, after a training with an interval
        return ((kernel if np.any(kernel[:, width:]) else kernel[:, :width]).T,)

    note = "[for t | zeros for t - r]: the file's network sees t alone"
    return [*rules, Rule((name,), (leaf,), halves, half, note)]
