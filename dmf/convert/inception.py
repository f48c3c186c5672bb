"""The FID's Inception weights: pt_inception-2015-12-05-6726825d.pth of pytorch-fid, which torch-fidelity hosts as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmf.convert.rules import (
    Arrays,
    Kind,
    Rule,
    conv_layer,
    linear_layer,
    norm_layer,
    plain,
    tensor_of,
)
from dmf.errors import DmfError
from dmf.networks.frozen.inception import (
    SIZE,
    SPATIAL_CHANNELS,
    Inception,
    InceptionConfig,
    build_inception,
)
from dmf.storage.readers.read import Tensor, flatten, strip_prefix

NAME = "fid_inception"
COPY = "weights"
NOT_FID = (
    "with AuxLogits tensors or 1000 classes this is torchvision's ImageNet classifier, whose features give no FID: expected "
    "the port of the TensorFlow graph, pt_inception-2015-12-05-6726825d.pth"
)
# Branches of a block in the order in which their channels are joined; each block has some of them.
BRANCHES = (
    "branch1x1",
    "branch5x5",
    "branch3x3",
    "branch3x3dbl",
    "branch7x7",
    "branch7x7dbl",
    "branch7x7x3",
)


def _select(tree: Any, which: str) -> tuple[dict[str, Tensor], str]:
    if which not in ("", COPY):
        raise DmfError(
            f"copy {which!r} of the weights is unknown: expected {COPY!r}, the only one of kind {NAME}"
        )
    return strip_prefix(flatten(tree, "")), COPY


def _describe(
    tensors: Mapping[str, Tensor], given: Mapping[str, Any]
) -> tuple[InceptionConfig, tuple[int, ...]]:
    for field in given:
        raise DmfError(
            f"{field} is no field of kind {NAME} that can be given: expected none, all of it is fixed"
        )
    tensor_of(tensors, "Conv2d_1a_3x3.conv.weight", NAME)
    classes = tensor_of(tensors, "fc.weight", NAME).shape[0]
    if classes == 1000 or any(name.startswith("AuxLogits.") for name in tensors):
        raise DmfError(NOT_FID)
    return InceptionConfig(), (SIZE, SIZE, 3)


def _counter(norm: str) -> Rule:
    """The norm's count of training batches: nothing that is applied depends on it."""

    def forward(found: np.ndarray) -> Arrays:
        return ()

    note = "a counter of training batches, ignored: the running statistics are final; 0 on export"
    return Rule(
        (f"{norm}.num_batches_tracked",), (), forward, lambda: (np.zeros((), np.int64),), note, note
    )


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


def _rules(
    config: InceptionConfig, image_shape: tuple[int, ...], tensors: Mapping[str, Tensor] | None
) -> list[Rule]:
    shapes = jax.eval_shape(build_inception(config).init, jax.random.key(0))
    paths = [[part.key for part in path] for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    units = [".".join(path[:-2]) for path in paths if path[-2:] == ["conv", "kernel"]]
    return [*(rule for unit in units for rule in _unit(unit)), *linear_layer("fc", "fc")]


def _outputs(
    network: Inception, params: Any, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    if "x" not in arrays:
        return {}
    features = jax.jit(network.apply)(params, jnp.asarray(arrays["x"].transpose(0, 2, 3, 1)))
    return {name: np.asarray(value) for name, value in features._asdict().items()}


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    import torch
    from torch.nn import functional

    tensors = {name: value.float() for name, value in tensors.items()}

    def unit(x: Any, name: str, stride: int = 1, padded: bool = True) -> Any:
        weight = tensors[f"{name}.conv.weight"]
        x = functional.conv2d(
            x, weight, stride=stride, padding=[n // 2 for n in weight.shape[2:]] if padded else 0
        )
        mean, var, scale, bias = (
            tensors[f"{name}.bn.{leaf}"]
            for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.relu(functional.batch_norm(x, mean, var, scale, bias, eps=1e-3))

    def branch(x: Any, name: str, halving: bool) -> Any:
        """The units name_1, name_2, ... or the only one, `name`; the last one may halve, or be a pair 'a' and 'b'."""
        steps = [f"{name}_{k}" for k in range(1, 9) if f"{name}_{k}.conv.weight" in tensors]
        split = [
            f"{name}_{len(steps) + 1}{side}"
            for side in "ab"
            if f"{name}_{len(steps) + 1}{side}.conv.weight" in tensors
        ]
        for step in steps or [name]:
            last = halving and step == (steps or [name])[-1]
            x = unit(x, step, stride=2 if last else 1, padded=not last)
        return torch.cat([unit(x, side) for side in split], 1) if split else x

    def block(x: Any, name: str) -> Any:
        halving = f"{name}.branch_pool.conv.weight" not in tensors
        stems = [f"{name}.{stem}" for stem in BRANCHES]
        stems = [
            stem
            for stem in stems
            if f"{stem}.conv.weight" in tensors or f"{stem}_1.conv.weight" in tensors
        ]
        if halving:
            pool = functional.max_pool2d(x, 3, 2)
        elif name == "Mixed_7c":
            pool = unit(functional.max_pool2d(x, 3, 1, 1), f"{name}.branch_pool")
        else:
            pool = unit(
                functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False), f"{name}.branch_pool"
            )
        return torch.cat([*(branch(x, stem, halving) for stem in stems), pool], 1)

    with torch.no_grad():
        x = unit(torch.from_numpy(arrays["x"]), "Conv2d_1a_3x3", stride=2, padded=False)
        x = unit(unit(x, "Conv2d_2a_3x3", padded=False), "Conv2d_2b_3x3")
        x = unit(functional.max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
        x = functional.max_pool2d(unit(x, "Conv2d_4a_3x3", padded=False), 3, 2)
        for name in sorted({key.split(".")[0] for key in tensors if key.startswith("Mixed_")}):
            x = block(x, name)
            if name == "Mixed_6d":
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        pool = x.mean((2, 3))
        logits = pool @ tensors["fc.weight"].T
        found = {
            "pool": pool,
            "spatial": spatial,
            "logits": logits,
            "biased_logits": logits + tensors["fc.bias"],
        }
    return {name: value.numpy() for name, value in found.items()}


def _probe(config: InceptionConfig, image_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).uniform(-1, 1, (1, image_shape[2], *image_shape[:2]))
    return {"x": x.astype(np.float32)}


FID_INCEPTION = Kind(
    name=NAME,
    network="inception",
    licence="published by pytorch-fid (Apache-2.0), a port of TensorFlow's inception-2015-12-05",
    conventions=(
        "no time; x RGB, channels first, 299 x 299, in about [-1, 1]: (byte - 128) / 128 or 2 byte / 255 - 1 before it; "
        "logits without the bias, spatial = the first 7 channels of Mixed_6d by (row, column, channel)"
    ),
    copies=(COPY,),
    select=_select,
    describe=_describe,
    rules=_rules,
    outputs=_outputs,
    torch_outputs=_torch_outputs,
    probe=_probe,
)
