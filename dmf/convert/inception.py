"""The FID's Inception weights: pt_inception-2015-12-05-6726825d.pth of pytorch-fid.

torch-fidelity hosts the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dmf.convert.copies import Copies
from dmf.convert.kind import Kind, Shape, Tensors, check_given, nhwc, tensor_of
from dmf.convert.leaves import leaf_shapes
from dmf.convert.rules import Rule, conv_layer, linear_layer, norm_layer, plain, unread
from dmf.errors import DmfError
from dmf.networks.frozen.inception import (
    SIZE,
    SPATIAL_CHANNELS,
    Inception,
    InceptionConfig,
    build_inception,
)

NAME = "fid_inception"
COPIES = Copies(r"Conv2d_1a_3x3\.conv\.weight", (), "weights")
NOT_FID = (
    "with AuxLogits tensors or 1000 classes this is torchvision's ImageNet classifier, "
    "whose features give no FID: expected the port of the TensorFlow graph, "
    "pt_inception-2015-12-05-6726825d.pth"
)
# Branches of a block in the order in which their channels are joined; each block has some.
BRANCHES = (
    "branch1x1",
    "branch5x5",
    "branch3x3",
    "branch3x3dbl",
    "branch7x7",
    "branch7x7dbl",
    "branch7x7x3",
)


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[InceptionConfig, Shape]:
    check_given(given, [], NAME)
    tensor_of(tensors, "Conv2d_1a_3x3.conv.weight", NAME)
    classes = tensor_of(tensors, "fc.weight", NAME).shape[0]
    if classes == 1000 or any(name.startswith("AuxLogits.") for name in tensors):
        raise DmfError(NOT_FID)
    return InceptionConfig(), (SIZE, SIZE, 3)


def _counter(norm: str) -> Rule:
    """The norm's count of training batches; no output depends on it."""
    note = "a counter of training batches, ignored: the running statistics are final; 0 on export"
    zero = np.zeros((), np.int64)
    return unread(f"{norm}.num_batches_tracked", lambda: zero, note, note)


def _unit(name: str) -> list[Rule]:
    """One convolution with its batch norm."""
    room = name.replace(".", "/")
    return [
        *conv_layer(f"{name}.conv", f"{room}/conv", bias=False),
        *norm_layer(f"{name}.bn", f"{room}/bn"),
        plain(f"{name}.bn.running_mean", f"{room}/bn/mean"),
        plain(f"{name}.bn.running_var", f"{room}/bn/var"),
        _counter(f"{name}.bn"),
    ]


def _rules(config: InceptionConfig, image_shape: Shape, tensors: Tensors | None) -> list[Rule]:
    end = "/conv/kernel"
    leaves = leaf_shapes(build_inception(config))
    units = [leaf.removesuffix(end).replace("/", ".") for leaf in leaves if leaf.endswith(end)]
    return [*(rule for unit in units for rule in _unit(unit)), *linear_layer("fc", "fc")]


def _outputs(
    network: Inception, params: Any, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    if "x" not in arrays:
        return {}
    features = jax.jit(network.apply)(params, nhwc(arrays["x"]))
    return {name: np.asarray(value) for name, value in features._asdict().items()}


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    import torch
    from torch.nn import functional

    net = _Torch({name: value.float() for name, value in tensors.items()})
    with torch.no_grad():
        x = net.unit(torch.from_numpy(arrays["x"]), "Conv2d_1a_3x3", stride=2, padded=False)
        x = net.unit(net.unit(x, "Conv2d_2a_3x3", padded=False), "Conv2d_2b_3x3")
        x = net.unit(functional.max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
        x = functional.max_pool2d(net.unit(x, "Conv2d_4a_3x3", padded=False), 3, 2)
        for name in sorted({key.split(".")[0] for key in tensors if key.startswith("Mixed_")}):
            x = net.block(x, name)
            if name == "Mixed_6d":
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        pool = x.mean((2, 3))
        logits = pool @ net.tensors["fc.weight"].T
        biased = logits + net.tensors["fc.bias"]
    found = {"pool": pool, "spatial": spatial, "logits": logits, "biased_logits": biased}
    return {name: value.numpy() for name, value in found.items()}


class _Torch:
    """The parts of the network in PyTorch on the source's names, which show its structure."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        from torch.nn import functional

        self.f, self.tensors = functional, tensors

    def has(self, unit: str) -> bool:
        return f"{unit}.conv.weight" in self.tensors

    def unit(self, x: Any, name: str, stride: int = 1, padded: bool = True) -> Any:
        """A convolution, its batch norm and a relu."""
        weight = self.tensors[f"{name}.conv.weight"]
        padding = [n // 2 for n in weight.shape[2:]] if padded else 0
        x = self.f.conv2d(x, weight, stride=stride, padding=padding)
        leaves = ("running_mean", "running_var", "weight", "bias")
        norm = [self.tensors[f"{name}.bn.{leaf}"] for leaf in leaves]
        return self.f.relu(self.f.batch_norm(x, *norm, eps=1e-3))

    def branch(self, x: Any, name: str, halving: bool) -> Any:
        """The units name_1, name_2, ..., or the only unit, `name`.

        The last step may halve the resolution, or be a pair of units "a" and "b".
        """
        steps = [f"{name}_{k}" for k in range(1, 9) if self.has(f"{name}_{k}")]
        pair = [f"{name}_{len(steps) + 1}{side}" for side in "ab"]
        split = [unit for unit in pair if self.has(unit)]
        for step in steps or [name]:
            last = halving and step == (steps or [name])[-1]
            x = self.unit(x, step, stride=2 if last else 1, padded=not last)
        return self.joined([self.unit(x, side) for side in split]) if split else x

    def block(self, x: Any, name: str) -> Any:
        halving = not self.has(f"{name}.branch_pool")
        stems = [f"{name}.{stem}" for stem in BRANCHES]
        stems = [stem for stem in stems if self.has(stem) or self.has(f"{stem}_1")]
        if halving:
            pool = self.f.max_pool2d(x, 3, 2)
        elif name == "Mixed_7c":
            pool = self.unit(self.f.max_pool2d(x, 3, 1, 1), f"{name}.branch_pool")
        else:
            mean = self.f.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            pool = self.unit(mean, f"{name}.branch_pool")
        return self.joined([*(self.branch(x, stem, halving) for stem in stems), pool])

    def joined(self, parts: list[Any]) -> Any:
        """The channels of all parts."""
        import torch

        return torch.cat(parts, 1)


def _probe(config: InceptionConfig, image_shape: Shape) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).uniform(-1, 1, (1, image_shape[2], *image_shape[:2]))
    return {"x": x.astype(np.float32)}


FID_INCEPTION = Kind(
    name=NAME,
    network="inception",
    licence="published by pytorch-fid (Apache-2.0), a port of TensorFlow's inception-2015-12-05",
    conventions=(
        "no time; x RGB, channels first, 299 x 299, in about [-1, 1]: "
        "(byte - 128) / 128 or 2 byte / 255 - 1 before it; logits without the bias, "
        "spatial = the first 7 channels of Mixed_6d by (row, column, channel)"
    ),
    select=COPIES.select,
    describe=_describe,
    rules=_rules,
    outputs=_outputs,
    torch_outputs=_torch_outputs,
    probe=_probe,
)
