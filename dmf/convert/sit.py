"""SiT (PyTorch), which runs time the other way.

For SiT t = 0 is noise, and it predicts data - noise: v(z, t) = -SiT(z, 1 - t).
Both reversals are folded into the weights.

SiT itself sees one time. The tensors h_embedder.* are ours: an export in SiT's layout writes the
interval branch under this name. A file without them gets a branch that starts at zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dmf.convert import dit
from dmf.convert.copies import Copies
from dmf.convert.kind import Fact, Kind, Shape, Tensors, axes, expect, nchw, tensor_of
from dmf.convert.rules import (
    Rule,
    constant,
    conv_layer,
    linear_layer,
    optional,
    reversed_layer,
    unread,
)
from dmf.errors import DmfError
from dmf.networks import layers
from dmf.networks.dit import DiTConfig

NAME = "sit"
COPIES = Copies(
    r"x_embedder\.proj\.weight", (("ema", "ema"), ("model", "model")), "flat", ("pos_embed",)
)
TABLE = "y_embedder.embedding_table.weight"
LAST = "final_layer.linear"
NO_INTERVAL = (
    "a flow model sees no interval; the branch starts silent: "
    "last layer zero, first layer as freshly initialised"
)


def described(
    tensors: Tensors, given: Mapping[str, Any], name: str, norms: bool = False
) -> tuple[DiTConfig, Shape, int]:
    """(config, image shape, rows of the last layer over those of a velocity), which is 1 or 2.

    name: of the kind. norms: its queries and keys may be normalised. Raises DmfError.
    """
    dit.check_fields(given, name)
    width, channels, patch, _ = axes(tensors, "x_embedder.proj.weight", 4, name)
    hidden, _ = axes(tensors, "blocks.0.mlp.fc1.weight", 2, name)
    out, _ = axes(tensors, f"{LAST}.weight", 2, name)
    for name in tensors:
        if not norms and (".q_norm." in name or ".k_norm." in name):
            raise DmfError(
                f"tensor {name} normalises queries or keys: "
                "expected attention without that, as in this network"
            )
    rows = patch**2 * channels
    if out not in (rows, 2 * rows):
        raise DmfError(
            f"tensor {LAST}.weight has {out} rows: expected {rows} ({channels} channels in patches "
            f"of {patch}x{patch}), or twice as many, with a variance half"
        )
    block, heads = r"blocks\.(\d+)\.", given.get("heads")
    config = dit.config_of(tensors, patch, hidden, width, TABLE, block, heads)
    resolution = resolution_of(tensors, patch, given.get("resolution"))
    return config, (resolution, resolution, channels), out // rows


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[DiTConfig, Shape]:
    if any(name.startswith("r_embedder.") for name in tensors):
        raise DmfError("the network has an r_embedder, as MeanFlow's: expected --kind=meanflow_sit")
    if any(name.startswith("h_embedder.") for name in tensors):
        # A file with half of this branch must not pass for a file without the branch.
        for name in (f"h_embedder.mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")):
            tensor_of(tensors, name, NAME)
    return described(tensors, given, NAME)[:2]


def resolution_of(tensors: Tensors, patch: int, given: int | None) -> int:
    """Side of the square image, from the rows of the position table. Raises DmfError."""
    if "pos_embed" not in tensors:
        if given is None:
            raise DmfError(
                "no tensor pos_embed to show the image size: "
                "expected --set=resolution=N, 32 for 256x256 images"
            )
        return given
    tokens = axes(tensors, "pos_embed", 3, NAME)[1]
    resolution = math.isqrt(tokens) * patch
    if math.isqrt(tokens) ** 2 != tokens:
        raise DmfError(
            f"tensor pos_embed has {tokens} rows: "
            "expected a square number, one row per patch of a square image"
        )
    if given not in (None, resolution):
        raise DmfError(
            f"--set=resolution={given}: expected {resolution}: "
            f"pos_embed has {tokens} rows, patches are {patch} wide"
        )
    return resolution


def _rules(config: DiTConfig, shape: Shape, tensors: Tensors | None) -> list[Rule]:
    expect(config, NAME, {"kind": "dit", "interval_input": "t-r", **dit.PLAIN})
    velocity = config.patch**2 * shape[-1]
    rows = tensors[f"{LAST}.weight"].shape[0] if tensors else 2 * velocity
    note = "time reversed: the embedder of t becomes the embedder of 1 - t"
    angles = functools.partial(layers.frequencies, endpoint=False)
    copies = [
        rule for name in dit.modules(config.depth) for rule in linear_layer(name, dit.room(name))
    ]
    return [
        positions(config.width, config.patch, shape, tensors),
        *conv_layer("x_embedder.proj", "x_embedder/proj"),
        *reversed_layer("t_embedder.mlp.0", "t_embedder/mlp_0", angles, sin_first=False, note=note),
        *optional(linear_layer("h_embedder.mlp.0", "interval/mlp_0"), NO_INTERVAL, fill="init"),
        *optional(linear_layer("h_embedder.mlp.2", "interval/mlp_2"), NO_INTERVAL),
        *dit.label_table(config, TABLE),
        *copies,
        *_last_layer(config.patch, shape[-1], rows != velocity),
        *projectors(tensors),
    ]


def projectors(tensors: Tensors | None) -> list[Rule]:
    """Rules of REPA's projectors, which are left out where a file has them."""
    note = "a projector of REPA onto features of images, which only its training reads"
    found = {name: x for name, x in (tensors or {}).items() if name.startswith("projectors.")}
    none = functools.partial(np.broadcast_to, np.float32(0))
    return [
        unread(name, functools.partial(none, tuple(x.shape)), note) for name, x in found.items()
    ]


def positions(width: int, patch: int, shape: Shape, tensors: Tensors | None) -> Rule:
    """The rule of the table of positions, which the network computes itself."""
    rows, columns = shape[0] // patch, shape[1] // patch

    def table() -> np.ndarray:
        return layers.position_embedding(rows, columns, width)[None].astype(np.float32)

    note = f"the sine-cosine table of {rows}x{columns} patches, column first"
    return constant("pos_embed", table, note, rounding("pos_embed", tensors))


def rounding(name: str, tensors: Tensors | None) -> float:
    """By how much a table of sines in a file may differ from ours.

    Half precision rounds a sine by up to 2^-9, float32 an angle of 64 radians by 4e-6.
    A table in another order would be wrong by about 1.
    """
    half = tensors and name in tensors and tensors[name].dtype.itemsize == 2
    return 2**-8 if half else 1e-5


def _last_layer(patch: int, channels: int, sigma: bool) -> list[Rule]:
    """Rules of the last layer: the velocity is kept and negated, a variance is dropped.

    The layer's rows are (patch row, patch column, channel). The first `channels` rows of each
    position in a patch are the velocity. sigma: as many rows for a variance follow them.
    """
    positions = patch**2

    def to_ours(x: np.ndarray) -> np.ndarray:
        velocity = -x.reshape(positions, -1, *x.shape[1:])[:, :channels]
        return velocity.reshape(positions * channels, *x.shape[1:])

    def to_sit(x: np.ndarray) -> np.ndarray:
        velocity = -x.reshape(positions, channels, *x.shape[1:])
        parts = (velocity, np.zeros_like(velocity)) if sigma else (velocity,)
        return np.concatenate(parts, axis=1).reshape(-1, *x.shape[1:])

    note = "negated: data - noise becomes noise - data"
    if sigma:
        note += (
            "; the half for a variance, which no sampler of a flow reads, "
            "is dropped, and is zero in an export"
        )
    kernel = (f"{LAST}.weight",), ("final_layer/linear/kernel",)
    bias = (f"{LAST}.bias",), ("final_layer/linear/bias",)
    return [
        Rule(*kernel, lambda x: (to_ours(x).T,), lambda x: (to_sit(x.T),), note),
        Rule(*bias, lambda x: (to_ours(x),), lambda x: (to_sit(x),), note),
    ]


def _outputs(network: Any, params: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """SiT's output by our network: out = -u(z, t - h, t), with our t = 1 - SiT's time.

    h is 0 where it is not given.
    """
    if not {"x", "t"} <= set(arrays):
        return {}
    t = 1 - np.asarray(arrays["t"], np.float32)
    h = np.asarray(arrays.get("h", np.zeros_like(t)), np.float32)
    z = np.transpose(arrays["x"], (0, 2, 3, 1))
    return {"out": nchw(-dit.u(network, params, z, t - h, t, arrays.get("y")))}


def _probe(config: DiTConfig, shape: Shape) -> dict[str, np.ndarray]:
    ours = dit.probe(config, shape)
    return ours | {"x": ours["x"].transpose(0, 3, 1, 2), "t": 1 - ours["t"]}


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """SiT in PyTorch at SiT's time; its h_embedder, where there is one, sees h."""
    import torch

    seconds = {}
    if "h_embedder.mlp.0.weight" in tensors:
        h = torch.from_numpy(arrays["h"]) if "h" in arrays else torch.zeros(len(arrays["t"]))
        seconds = {"h_embedder": h}
    return {"out": torch_forward(tensors, arrays, seconds)}


def torch_forward(
    tensors: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    seconds: Mapping[str, Any],
    late: tuple[np.ndarray, int] | None = None,
) -> np.ndarray:
    """The network in PyTorch on x, t, y and heads.

    seconds: what further embedders see, by their names.
    late: (time, n) where the blocks after the first n, and the last layer, see a time of their own.
    """
    import torch
    from torch.nn import functional as F

    def weight(name: str) -> Any:
        return tensors[name].float()

    def linear(module: str, x: Any) -> Any:
        return F.linear(x, weight(f"{module}.weight"), weight(f"{module}.bias"))

    kernel = weight("x_embedder.proj.weight")
    x, t = torch.from_numpy(np.ascontiguousarray(arrays["x"])), torch.from_numpy(arrays["t"])

    def condition(time: Any) -> Any:
        cond = dit.torch_embed(linear, "t_embedder", time)
        for name, seen in seconds.items():
            cond = cond + dit.torch_embed(linear, name, seen)
        return cond + weight(TABLE)[torch.from_numpy(arrays["y"])] if TABLE in tensors else cond

    def norm(name: str, x: Any) -> Any:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight(f"{name}.scale")

    depth = sum(name.endswith(".attn.qkv.weight") for name in tensors)
    conds = [condition(t)] * (depth + 1)
    if late:
        conds[late[1] :] = [condition(torch.from_numpy(late[0]))] * (depth + 1 - late[1])
    norms = norm if "blocks.0.attn.q_norm.scale" in tensors else None
    grid = F.conv2d(x, kernel, weight("x_embedder.proj.bias"), stride=kernel.shape[2:])
    patches = grid.flatten(2).transpose(1, 2)
    tokens = dit.torch_blocks(linear, patches, conds, int(arrays["heads"]), norms)
    out = dit.torch_image(tokens, kernel.shape[2])
    return out[..., : x.shape[1]].permute(0, 3, 1, 2).numpy()


def _prediction(text: str) -> str:
    return "velocity" if text.lower() == "v" else text.lower()


def _of_model(value: Any) -> str | None:
    """What a model predicts by its name, such as SiT-XL/2; DiT's weights have SiT's names."""
    known = {"SiT": "velocity", "DiT": "noise"}
    return known.get(value[:3]) if isinstance(value, str) else None


SIT = Kind(
    name=NAME,
    network="dit",
    licence="SiT's repository is under the MIT licence; the weights were trained on ImageNet.",
    conventions=(
        "SiT: t = 0 is noise, velocity data - noise; v(z, t) = -SiT(z, 1 - t). "
        "Folded into the first layer of the time embedder and into the last layer. "
        "DiT's files have the same names and shapes but predict noise: no tensor shows it. "
        "The label table's last row is taken for the null class: "
        "a SiT trained without label dropout has none."
    ),
    select=COPIES.select,
    describe=_describe,
    rules=_rules,
    outputs=_outputs,
    torch_outputs=_torch_outputs,
    probe=_probe,
    facts=(
        *dit.facts(TABLE, resolution=True),
        Fact(
            "prediction",
            lambda *_: "velocity",
            {"prediction": _prediction, "model": _of_model},
            settable=False,
        ),
        Fact("path", lambda *_: "linear", {"path_type": str.lower}, settable=False),
    ),
    time="noise_at_0",
    sign="data_minus_noise",
)
