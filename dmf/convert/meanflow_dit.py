"""MeanFlow's ImageNet transformer (Flax). It has our conventions, so all weights are copies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dmf.convert import dit
from dmf.convert.copies import Copies
from dmf.convert.kind import Kind, Shape, Tensors, axes, expect
from dmf.convert.rules import Rule, plain
from dmf.networks.dit import DiTConfig

NAME = "meanflow_dit"
COPIES = Copies(
    r"net\.x_embedder\.proj\.kernel", (("ema", "ema_params"), ("params", "params")), "flat"
)
RESOLUTION = 32  # a constant of its code: latents of 256 x 256 images
TABLE = "net.y_embedder.embedding_table._flax_embedding.embedding"
PATCHES = "net.x_embedder.proj"


def _flax(module: str) -> str:
    """SiT's name of a layer -> MeanFlow's.

    blocks.3.mlp.fc1 -> net.blocks.layers_3.mlp.fc1._flax_linear
    """
    return "net." + re.sub(r"\.(\d+)", r".layers_\1", module) + "._flax_linear"


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[DiTConfig, Shape]:
    dit.check_fields(given, NAME)
    patch, _, channels, width = axes(tensors, f"{PATCHES}.kernel", 4, NAME)
    _, hidden = axes(tensors, f"{_flax('blocks.0.mlp.fc1')}.kernel", 2, NAME)
    block, heads = r"net\.blocks\.layers_(\d+)\.", given.get("heads")
    config = dit.config_of(tensors, patch, hidden, width, TABLE, block, heads)
    resolution = given.get("resolution", RESOLUTION)
    return config, (resolution, resolution, channels)


def _rules(config: DiTConfig, shape: Shape, tensors: Tensors | None) -> list[Rule]:
    expect(config, NAME, {"kind": "dit", "interval_input": "t-r", **dit.PLAIN})
    modules = ["t_embedder.mlp.0", *dit.modules(config.depth), "final_layer.linear"]
    rooms = {_flax(module): dit.room(module) for module in modules}
    rooms |= {_flax(f"h_embedder.mlp.{i}"): f"interval/mlp_{i}" for i in (0, 2)}
    rooms |= {PATCHES: "x_embedder/proj"}
    copies = [
        plain(f"{name}.{leaf}", f"{room}/{leaf}")
        for name, room in rooms.items()
        for leaf in ("kernel", "bias")
    ]
    return [*copies, *dit.label_table(config, TABLE)]


def _outputs(network: Any, params: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """u(z, t - h, t), images as (B, H, W, C)."""
    if not {"x", "t", "h"} <= set(arrays):
        return {}
    t, h = np.asarray(arrays["t"], np.float32), np.asarray(arrays["h"], np.float32)
    return {"u": dit.u(network, params, arrays["x"], t - h, t, arrays.get("y"))}


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The network in PyTorch from its Flax tree: kernels are (in, out), images (B, H, W, C)."""
    import torch

    def weight(name: str) -> Any:
        return tensors[name].float()

    def linear(module: str, x: Any) -> Any:
        return x @ weight(f"{_flax(module)}.kernel") + weight(f"{_flax(module)}.bias")

    x, t, h = (torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in "xth")
    kernel = weight(f"{PATCHES}.kernel")
    patch, _, _, width = kernel.shape
    cond = dit.torch_embed(linear, "t_embedder", t) + dit.torch_embed(linear, "h_embedder", h)
    if TABLE in tensors:
        cond = cond + weight(TABLE)[torch.from_numpy(arrays["y"])]
    # (B, rows, columns, p, p, C)
    windows = x.unfold(1, patch, patch).unfold(2, patch, patch).permute(0, 1, 2, 4, 5, 3)
    patches = windows.flatten(3).flatten(1, 2) @ kernel.reshape(-1, width)
    patches = patches + weight(f"{PATCHES}.bias")
    depth = sum(name.endswith(".attn.qkv._flax_linear.kernel") for name in tensors)
    tokens = dit.torch_blocks(linear, patches, [cond] * (depth + 1), int(arrays["heads"]))
    return {"u": dit.torch_image(tokens, patch).numpy()}


MEANFLOW_DIT = Kind(
    name=NAME,
    network="dit",
    licence="MeanFlow's repository is under the MIT licence; the weights were trained on ImageNet.",
    conventions="t = 1 is noise, u(z, t, h = t - r) of noise - data: as here, nothing is folded.",
    select=COPIES.select,
    describe=_describe,
    rules=_rules,
    outputs=_outputs,
    torch_outputs=_torch_outputs,
    probe=dit.probe,
    facts=dit.facts(TABLE, resolution=False),
    time="noise_at_1",
    sign="noise_minus_data",
)
