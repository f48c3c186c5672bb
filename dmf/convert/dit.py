"""SiT and MeanFlow's ImageNet transformers, two spellings of one network, `dmf.networks.dit`.

SiT runs time the other way (t = 0 is noise) and predicts data - noise: v(z, t) = -SiT(z, 1 - t). Both are folded into its
weights. MeanFlow has our conventions and the layout of Flax: all of its weights are copies.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dmf.convert.rules import (
    Kind,
    Rule,
    constant,
    conv_layer,
    expect,
    linear_layer,
    optional,
    plain,
    reversed_layer,
    tensor_of,
)
from dmf.errors import DmfError
from dmf.networks import layers
from dmf.networks.dit import DIT_SIZES, DiTConfig, position_embedding
from dmf.storage.readers import read
from dmf.storage.readers.read import Tensor

MEANFLOW_RESOLUTION = 32  # a constant of its code: latents of 256 x 256 images
FIELDS = ("heads", "resolution")
NO_INTERVAL = "a flow model sees no interval; the branch starts silent: last layer zero, first layer as freshly initialised"

Shape = tuple[int, ...]
Linear = Callable[[str, Any], Any]


def _select(tree: Any, which: str, places: Mapping[str, str]) -> tuple[dict[str, Tensor], str]:
    """The copy `which` of the weights, lying at tree[places[copy]]; a tree with none of these places is "flat" itself."""
    held = {}
    if isinstance(tree, Mapping):
        held = {
            copy: tree[key] for copy, key in places.items() if isinstance(tree.get(key), Mapping)
        }
    held = held or {"flat": tree}
    copy = which or next(iter(held))
    if copy not in held:
        raise DmfError(f"--copy={which} is not in this file: expected {' or '.join(held)}")
    return read.strip_prefix(read.flatten(held[copy])), copy


def _modules(depth: int) -> list[str]:
    """SiT's names of the linear layers that are plain copies in both kinds."""
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    blocks = [f"blocks.{i}.{part}" for i in range(depth) for part in parts]
    return ["t_embedder.mlp.2", *blocks, "final_layer.adaLN_modulation.1"]


def _room(module: str) -> str:
    """SiT's name of a layer -> ours: blocks.3.mlp.fc1 -> blocks_3/mlp/fc1."""
    return re.sub(r"\.(\d+)", r"_\1", module).replace(".", "/")


def _flax(module: str) -> str:
    """SiT's name of a layer -> MeanFlow's: blocks.3.mlp.fc1 -> net.blocks.layers_3.mlp.fc1._flax_linear."""
    return "net." + re.sub(r"\.(\d+)", r".layers_\1", module) + "._flax_linear"


def _axes(tensors: Mapping[str, Tensor], name: str, count: int, kind: str) -> Shape:
    shape = tuple(tensor_of(tensors, name, kind).shape)
    if len(shape) != count or 0 in shape:
        raise DmfError(
            f"tensor {name} has shape {list(shape)}: expected {count} axes, none empty, in weights of kind {kind}"
        )
    return shape


def _check_given(given: Mapping[str, Any]) -> None:
    for field, value in given.items():
        if field not in FIELDS:
            raise DmfError(
                f"--set={field}={value}: expected one of {', '.join(FIELDS)}, the fields these weights may not show"
            )
        layers.check_positive(f"--set={field}", value)


def _config(
    tensors: Mapping[str, Tensor],
    patch: int,
    hidden: int,
    width: int,
    table: str,
    block: str,
    heads: int | None,
) -> DiTConfig:
    """The config from the sizes read so far, the label table's rows and the blocks' numbers, which `block` matches."""
    depth = len({found[1] for name in tensors if (found := re.match(block, name))})
    named = [
        size["heads"]
        for size in DIT_SIZES.values()
        if (size["width"], size["depth"]) == (width, depth)
    ]
    if heads is None and not named:
        raise DmfError(
            f"the weights do not show the number of attention heads, and width {width} with depth {depth} is none of the named "
            f"sizes ({', '.join(DIT_SIZES)}): expected --set=heads=N"
        )
    if heads is not None and named and heads != named[0]:
        raise DmfError(
            f"--set=heads={heads}: expected {named[0]}, as in the named size of width {width} and depth {depth}"
        )
    classes = tensors[table].shape[0] - 1 if table in tensors else 0
    if table in tensors and not classes:
        raise DmfError(
            f"tensor {table} has 1 row: expected one per class and one for the null class"
        )
    return DiTConfig(
        depth=depth,
        width=width,
        heads=heads or named[0],
        patch=patch,
        mlp_ratio=hidden / width,
        num_classes=classes,
    )


def _describe_sit(
    tensors: Mapping[str, Tensor], given: Mapping[str, Any]
) -> tuple[DiTConfig, Shape]:
    _check_given(given)
    width, channels, patch, _ = _axes(tensors, "x_embedder.proj.weight", 4, "sit")
    hidden, _ = _axes(tensors, "blocks.0.mlp.fc1.weight", 2, "sit")
    out, _ = _axes(tensors, "final_layer.linear.weight", 2, "sit")
    for name in tensors:
        if ".q_norm." in name or ".k_norm." in name:
            raise DmfError(
                f"tensor {name} normalises queries or keys: expected attention without that, as in this network"
            )
    if out not in (patch**2 * channels, 2 * patch**2 * channels):
        raise DmfError(
            f"tensor final_layer.linear.weight has {out} rows: expected {patch**2 * channels} ({channels} channels in patches "
            f"of {patch}x{patch}), or twice as many, with a variance half"
        )
    if any(name.startswith("h_embedder.") for name in tensors):
        for name in (f"h_embedder.mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")):
            tensor_of(
                tensors, name, "sit"
            )  # all of the branch or nothing: half of it would pass for a file without one
    table = "y_embedder.embedding_table.weight"
    config = _config(tensors, patch, hidden, width, table, r"blocks\.(\d+)\.", given.get("heads"))
    resolution = _sit_resolution(tensors, patch, given.get("resolution"))
    return config, (resolution, resolution, channels)


def _sit_resolution(tensors: Mapping[str, Tensor], patch: int, given: int | None) -> int:
    """Side of the square image, from the rows of the position table."""
    if "pos_embed" not in tensors:
        if given is None:
            raise DmfError(
                "no tensor pos_embed to show the image size: expected --set=resolution=N, 32 for 256x256 images"
            )
        return given
    tokens = _axes(tensors, "pos_embed", 3, "sit")[1]
    resolution = math.isqrt(tokens) * patch
    if math.isqrt(tokens) ** 2 != tokens:
        raise DmfError(
            f"tensor pos_embed has {tokens} rows: expected a square number, one row per patch of a square image"
        )
    if given not in (None, resolution):
        raise DmfError(
            f"--set=resolution={given}: expected {resolution}: pos_embed has {tokens} rows, patches are {patch} wide"
        )
    return resolution


def _last_layer(patch: int, channels: int, sigma: bool) -> list[Rule]:
    """Rows (patch row, patch column, channel), of which the first `channels` of a position are the velocity: keep, negate."""
    positions = patch**2

    def to_ours(x: np.ndarray) -> np.ndarray:
        return -x.reshape(positions, -1, *x.shape[1:])[:, :channels].reshape(
            positions * channels, *x.shape[1:]
        )

    def to_sit(x: np.ndarray) -> np.ndarray:
        velocity = -x.reshape(positions, channels, *x.shape[1:])
        parts = (velocity, np.zeros_like(velocity)) if sigma else (velocity,)
        return np.concatenate(parts, axis=1).reshape(-1, *x.shape[1:])

    note = "negated: data - noise becomes noise - data"
    if sigma:
        note += "; the half for a variance, which no sampler of a flow reads, is dropped, and is zero in an export"
    name, room = "final_layer.linear", "final_layer/linear"
    return [
        Rule(
            (f"{name}.weight",),
            (f"{room}/kernel",),
            lambda x: (to_ours(x).T,),
            lambda x: (to_sit(x.T),),
            note,
        ),
        Rule(
            (f"{name}.bias",),
            (f"{room}/bias",),
            lambda x: (to_ours(x),),
            lambda x: (to_sit(x),),
            note,
        ),
    ]


def _positions(config: DiTConfig, shape: Shape, tensors: Mapping[str, Tensor] | None) -> Rule:
    rows, columns = shape[0] // config.patch, shape[1] // config.patch
    half = (
        tensors is not None and "pos_embed" in tensors and tensors["pos_embed"].dtype.itemsize == 2
    )
    # Half precision rounds a sine by up to 2^-9. Angles reach 64 radians, which float32 may hold to 4e-6 only. A table of
    # another layout is wrong by 1.
    atol = 2**-8 if half else 1e-5

    def table() -> np.ndarray:
        return position_embedding(rows, columns, config.width)[None].astype(np.float32)

    return constant(
        "pos_embed", table, f"the sine-cosine table of {rows}x{columns} patches, column first", atol
    )


def _rules_sit(config: DiTConfig, shape: Shape, tensors: Mapping[str, Tensor] | None) -> list[Rule]:
    rows = (
        tensors["final_layer.linear.weight"].shape[0]
        if tensors
        else 2 * config.patch**2 * shape[-1]
    )
    expect(config, "sit", {"kind": "dit"})
    note = "time reversed: the embedder of t becomes the embedder of 1 - t"
    angles = functools.partial(layers.frequencies, endpoint=False)
    return [
        _positions(config, shape, tensors),
        *conv_layer("x_embedder.proj", "x_embedder/proj"),
        *reversed_layer("t_embedder.mlp.0", "t_embedder/mlp_0", angles, sin_first=False, note=note),
        *optional(linear_layer("h_embedder.mlp.0", "interval/mlp_0"), NO_INTERVAL, fill="init"),
        *optional(linear_layer("h_embedder.mlp.2", "interval/mlp_2"), NO_INTERVAL),
        *_table(config, "y_embedder.embedding_table.weight"),
        *(
            rule
            for module in _modules(config.depth)
            for rule in linear_layer(module, _room(module))
        ),
        *_last_layer(config.patch, shape[-1], rows != config.patch**2 * shape[-1]),
    ]


def _table(config: DiTConfig, name: str) -> list[Rule]:
    return [plain(name, "y_embedder/embedding_table/embedding")] if config.num_classes else []


def _outputs_sit(
    network: Any, params: Any, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """out = -u(z, t - h, t) at our time t, one minus SiT's; h = 0 where it is not given."""
    if not {"x", "t"} <= set(arrays):
        return {}
    t = 1 - np.asarray(arrays["t"], np.float32)
    h = np.asarray(arrays.get("h", np.zeros_like(t)), np.float32)
    u = _u(network, params, np.transpose(arrays["x"], (0, 2, 3, 1)), t - h, t, arrays.get("y"))
    return {"out": -u.transpose(0, 3, 1, 2)}


def _u(network: Any, params: Any, z: Any, r: Any, t: Any, label: Any) -> np.ndarray:
    label = None if label is None else np.asarray(label, np.int32)
    return np.asarray(jax.jit(network.apply)(params, np.asarray(z, np.float32), r, t, label=label))


def _probe(config: DiTConfig, shape: Shape) -> dict[str, np.ndarray]:
    """Three images near both ends of time and within, with intervals and one null class; heads, which no name shows."""
    rng = np.random.default_rng(0)
    label = (
        {"y": np.array([0, config.num_classes - 1, config.num_classes])}
        if config.num_classes
        else {}
    )
    x = rng.standard_normal((3, *shape), np.float32)
    times = {
        "t": np.array([0.998, 0.6, 0.003], np.float32),
        "h": np.array([0.9, 0.25, 0.002], np.float32),
    }
    return {"x": x, **times, **label, "heads": np.array(config.heads)}


def _probe_sit(config: DiTConfig, shape: Shape) -> dict[str, np.ndarray]:
    ours = _probe(config, shape)
    return ours | {"x": ours["x"].transpose(0, 3, 1, 2), "t": 1 - ours["t"]}


def _torch_embed(linear: Linear, module: str, time: Any) -> Any:
    import torch

    angle = time[:, None] * torch.exp(torch.arange(128) * (-math.log(1e4) / 128))
    features = torch.cat((angle.cos(), angle.sin()), dim=1)
    return linear(f"{module}.mlp.2", torch.nn.functional.silu(linear(f"{module}.mlp.0", features)))


def _torch_blocks(linear: Linear, x: Any, cond: Any, depth: int, heads: int) -> Any:
    """Patches (B, N, width), with no positions yet, -> what the last layer makes of them."""
    import torch
    from torch.nn import functional as F

    side, quarter = math.isqrt(x.shape[1]), x.shape[2] // 4
    angle = torch.arange(side)[:, None] * 1e4 ** (
        -torch.arange(quarter, dtype=torch.float64) / quarter
    )
    line = torch.cat((angle.sin(), angle.cos()), dim=1).float()
    x = x + torch.cat((line.repeat(side, 1), line.repeat_interleave(side, 0)), dim=1)
    cond = F.silu(cond)[:, None]

    def modulated(x: Any, shift: Any, scale: Any) -> Any:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    for i in range(depth):
        name = f"blocks.{i}"
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = linear(
            f"{name}.adaLN_modulation.1", cond
        ).chunk(6, dim=-1)
        qkv = linear(f"{name}.attn.qkv", modulated(x, shift, scale)).unflatten(-1, (3, heads, -1))
        mixed = (
            F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        )
        x = x + gate * linear(f"{name}.attn.proj", mixed)
        wide = F.gelu(
            linear(f"{name}.mlp.fc1", modulated(x, shift_mlp, scale_mlp)), approximate="tanh"
        )
        x = x + gate_mlp * linear(f"{name}.mlp.fc2", wide)
    shift, scale = linear("final_layer.adaLN_modulation.1", cond).chunk(2, dim=-1)
    return linear("final_layer.linear", modulated(x, shift, scale))


def _torch_image(tokens: Any, patch: int) -> Any:
    """(B, N, p * p * C) -> (B, H, W, C)."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side)).transpose(2, 3)
    return grid.flatten(3, 4).flatten(1, 2)


def _torch_sit(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """SiT from its state dict, at SiT's time; h_embedder, where there is one, sees h."""
    import torch
    from torch.nn import functional as F

    def weight(name: str) -> Any:
        return tensors[name].float()

    def linear(module: str, x: Any) -> Any:
        return F.linear(x, weight(f"{module}.weight"), weight(f"{module}.bias"))

    kernel = weight("x_embedder.proj.weight")
    x, t = torch.from_numpy(np.ascontiguousarray(arrays["x"])), torch.from_numpy(arrays["t"])
    cond = _torch_embed(linear, "t_embedder", t)
    if "h_embedder.mlp.0.weight" in tensors:
        cond = cond + _torch_embed(
            linear, "h_embedder", torch.from_numpy(arrays["h"]) if "h" in arrays else 0 * t
        )
    if "y_embedder.embedding_table.weight" in tensors:
        cond = cond + weight("y_embedder.embedding_table.weight")[torch.from_numpy(arrays["y"])]
    patches = (
        F.conv2d(x, kernel, weight("x_embedder.proj.bias"), stride=kernel.shape[2:])
        .flatten(2)
        .transpose(1, 2)
    )
    depth = sum(name.endswith(".attn.qkv.weight") for name in tensors)
    out = _torch_image(
        _torch_blocks(linear, patches, cond, depth, int(arrays["heads"])), kernel.shape[2]
    )
    return {"out": out[..., : x.shape[1]].permute(0, 3, 1, 2).numpy()}


def _describe_meanflow(
    tensors: Mapping[str, Tensor], given: Mapping[str, Any]
) -> tuple[DiTConfig, Shape]:
    _check_given(given)
    patch, _, channels, width = _axes(tensors, "net.x_embedder.proj.kernel", 4, "meanflow_dit")
    _, hidden = _axes(tensors, f"{_flax('blocks.0.mlp.fc1')}.kernel", 2, "meanflow_dit")
    table = "net.y_embedder.embedding_table._flax_embedding.embedding"
    config = _config(
        tensors, patch, hidden, width, table, r"net\.blocks\.layers_(\d+)\.", given.get("heads")
    )
    resolution = given.get("resolution", MEANFLOW_RESOLUTION)
    return config, (resolution, resolution, channels)


def _rules_meanflow(
    config: DiTConfig, shape: Shape, tensors: Mapping[str, Tensor] | None
) -> list[Rule]:
    expect(config, "meanflow_dit", {"kind": "dit"})
    places = {
        _flax(module): _room(module)
        for module in ("t_embedder.mlp.0", *_modules(config.depth), "final_layer.linear")
    }
    places |= {_flax(f"h_embedder.mlp.{i}"): f"interval/mlp_{i}" for i in (0, 2)}
    places |= {"net.x_embedder.proj": "x_embedder/proj"}
    copies = [
        plain(f"{name}.{leaf}", f"{room}/{leaf}")
        for name, room in places.items()
        for leaf in ("kernel", "bias")
    ]
    return [*copies, *_table(config, "net.y_embedder.embedding_table._flax_embedding.embedding")]


def _outputs_meanflow(
    network: Any, params: Any, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """u(z, t - h, t), images as (B, H, W, C)."""
    if not {"x", "t", "h"} <= set(arrays):
        return {}
    t, h = np.asarray(arrays["t"], np.float32), np.asarray(arrays["h"], np.float32)
    return {"u": _u(network, params, arrays["x"], t - h, t, arrays.get("y"))}


def _torch_meanflow(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """MeanFlow's network from its Flax tree: kernels are (in, out), images (B, H, W, C)."""
    import torch

    def linear(module: str, x: Any) -> Any:
        return (
            x @ tensors[f"{_flax(module)}.kernel"].float()
            + tensors[f"{_flax(module)}.bias"].float()
        )

    x, t, h = (torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in "xth")
    kernel = tensors["net.x_embedder.proj.kernel"].float()
    patch, _, _, width = kernel.shape
    cond = _torch_embed(linear, "t_embedder", t) + _torch_embed(linear, "h_embedder", h)
    table = tensors.get("net.y_embedder.embedding_table._flax_embedding.embedding")
    cond = cond if table is None else cond + table.float()[torch.from_numpy(arrays["y"])]
    windows = (
        x.unfold(1, patch, patch).unfold(2, patch, patch).permute(0, 1, 2, 4, 5, 3)
    )  # (B, rows, columns, p, p, C)
    patches = (
        windows.flatten(3).flatten(1, 2) @ kernel.reshape(-1, width)
        + tensors["net.x_embedder.proj.bias"].float()
    )
    depth = sum(name.endswith(".attn.qkv._flax_linear.kernel") for name in tensors)
    return {
        "u": _torch_image(
            _torch_blocks(linear, patches, cond, depth, int(arrays["heads"])), patch
        ).numpy()
    }


SIT = Kind(
    name="sit",
    network="dit",
    licence="SiT's repository is under the MIT licence; the weights were trained on ImageNet.",
    conventions=(
        "SiT: t = 0 is noise, velocity data - noise; v(z, t) = -SiT(z, 1 - t). Folded into the first layer of the time "
        "embedder and into the last layer. DiT's files have the same names and shapes but predict noise: no tensor tells. "
        "The label table's last row is taken for the null class: a SiT trained without label dropout has none."
    ),
    copies=("ema", "model", "flat"),
    select=lambda tree, which: _select(tree, which, {"ema": "ema", "model": "model"}),
    describe=_describe_sit,
    rules=_rules_sit,
    outputs=_outputs_sit,
    torch_outputs=_torch_sit,
    probe=_probe_sit,
)

MEANFLOW_DIT = Kind(
    name="meanflow_dit",
    network="dit",
    licence="MeanFlow's repository is under the MIT licence; the weights were trained on ImageNet.",
    conventions="t = 1 is noise, u(z, t, h = t - r) of noise - data: as here, nothing is folded.",
    copies=("ema", "params", "flat"),
    select=lambda tree, which: _select(tree, which, {"ema": "ema_params", "params": "params"}),
    describe=_describe_meanflow,
    rules=_rules_meanflow,
    outputs=_outputs_meanflow,
    torch_outputs=_torch_meanflow,
    probe=_probe,
)
