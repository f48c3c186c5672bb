"""Checkpoints of Stable Diffusion's and FLUX's autoencoders, in three spellings.

They are diffusers' names, its older names of the attention, and the original names of LDM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from dmf.convert.copies import Copies
from dmf.convert.kind import (
    Fact,
    Kind,
    Shape,
    Tensors,
    axes,
    check_given,
    exact,
    fact_of,
    nchw,
    nhwc,
    shown,
)
from dmf.convert.rules import Rule, conv_layer, linear_layer, norm_layer, unread
from dmf.errors import DmfError
from dmf.networks.frozen.vae import PARTS, VAE, VAEConfig, sample_latent
from dmf.networks.layers import check_choice, check_positive
from dmf.storage.readers.tree import Tensor

NAME = "sd_vae"
# A whole Stable Diffusion checkpoint keeps its autoencoder in first_stage_model.
COPIES = Copies(r"decoder\.conv_in\.weight", (("weights", "first_stage_model"),), "weights")
# Tensors of an autoencoder's training, beside the weights.
TRAINING = re.compile(r"loss\.|model_ema\.(decay|num_updates)$")
# Other spellings -> diffusers' present names. Each line applies to the result of those above.
SPELLINGS = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
    (r"\.attentions\.0\.(q|query)\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.(k|key)\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.(v|value)\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.(proj_out|proj_attn)\.", ".attentions.0.to_out.0."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)
GIVEN = ("groups", "scale", "shift", "part")
POST = "post_quant_conv.weight"
# Scale and shift of released autoencoders without quant layers, for the hint.
SHIFTED = "1.5305 and 0.0609 for SD3, 0.3611 and 0.1159 for FLUX"
LEFT_OUT = "of the encoder, left out: part is 'decoder'"


def _spelling(names: Mapping[str, Any]) -> dict[str, str]:
    """Each name of a file -> diffusers' present name of the same tensor."""
    levels = [int(found[1]) for name in names if (found := re.match(r"decoder\.up\.(\d+)\.", name))]
    last = max(levels, default=0)

    def renamed(name: str) -> str:
        # LDM counts the decoder's levels from the finest, diffusers from the coarsest.
        level = r"^(decoder\.up\.)(\d+)"
        new = re.sub(level, lambda found: f"{found[1]}{last - int(found[2])}", name)
        for pattern, replacement in SPELLINGS:
            new = re.sub(pattern, replacement, new)
        return new

    return {name: renamed(name) for name in names}


def _select(tree: Any, which: str) -> tuple[dict[str, Tensor], str]:
    tensors, copy = COPIES.select(tree, which)
    found = {name: x for name, x in tensors.items() if not TRAINING.match(name)}
    new: dict[str, Tensor] = {}
    for name, renamed in _spelling(found).items():
        if renamed in new:
            raise DmfError(
                f"tensor {renamed} is there twice, in two spellings, one of them {name}: "
                "expected one autoencoder"
            )
        new[renamed] = found[name]
    return new, copy


def _count(tensors: Tensors, pattern: str) -> int:
    """How many numbers `pattern` finds in the names; a gap is noticed as a missing tensor."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[VAEConfig, Shape]:
    """The config. The shape is (), for an autoencoder takes images of many sizes."""
    check_given(given, GIVEN, NAME)
    levels = max(1, _count(tensors, r"decoder\.up_blocks\.(\d+)\."))
    convs = [f"decoder.up_blocks.{i}.resnets.0.conv1.weight" for i in reversed(range(levels))]
    quant = POST in tensors or "quant_conv.weight" in tensors
    config = VAEConfig(
        channels=tuple(axes(tensors, conv, 4, NAME)[0] for conv in convs),
        blocks=_count(tensors, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1,
        latent_channels=axes(tensors, POST if quant else "decoder.conv_in.weight", 4, NAME)[1],
        quant=quant,
        image_channels=axes(tensors, "decoder.conv_out.weight", 4, NAME)[0],
        part="both" if "encoder.conv_in.weight" in tensors else "decoder",
    )
    if config.part == "decoder" and given.get("part") == "both":
        raise DmfError(
            "part is 'both', but there is no encoder among the tensors: expected 'decoder'"
        )
    config = replace(config, **given)
    if not quant and not {"scale", "shift"} <= set(given):
        raise DmfError(
            f"no quant layers: expected --set=scale=...,shift=..., which no tensor shows: {SHIFTED}"
        )
    check_choice("part", config.part, PARTS)
    check_positive("groups", config.groups)
    odd = [width for width in config.channels if width % config.groups]
    if odd:
        raise DmfError(
            f"groups is {config.groups}, but a level has {odd[0]} channels: expected --set=groups=N"
            f", a divisor of all of {', '.join(map(str, config.channels))}; no file shows it"
        )
    return config, ()


def _room(module: str) -> str:
    return re.sub(r"\.(\d+)", r"_\1", module).replace(".", "/")


def _conv(module: str) -> list[Rule]:
    return conv_layer(module, _room(module))


def _norm(module: str) -> list[Rule]:
    return norm_layer(module, _room(module))


def _projection(module: str, tensors: Tensors | None) -> list[Rule]:
    """A linear layer of the attention, which LDM files hold as a 1x1 convolution."""
    weight, bias = linear_layer(module, _room(module))
    name = weight.tensors[0]
    if tensors is None or name not in tensors or len(tensors[name].shape) != 4:
        return [weight, bias]
    window = weight._replace(
        forward=lambda x: (x[:, :, 0, 0].T,),
        backward=lambda x: (x.T[:, :, None, None],),
        note="a linear layer, in the file as a 1x1 convolution",
    )
    return [window, bias]


def _resnet(module: str, shortcut: bool) -> list[Rule]:
    rules = [
        *_norm(f"{module}.norm1"),
        *_conv(f"{module}.conv1"),
        *_norm(f"{module}.norm2"),
        *_conv(f"{module}.conv2"),
    ]
    return [*rules, *(_conv(f"{module}.conv_shortcut") if shortcut else [])]


def _middle(module: str, tensors: Tensors | None) -> list[Rule]:
    attention = f"{module}.attentions.0"
    rules = [
        *_resnet(f"{module}.resnets.0", False),
        *_resnet(f"{module}.resnets.1", False),
        *_norm(f"{attention}.group_norm"),
    ]
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        rules += _projection(f"{attention}.{name}", tensors)
    return rules


def _tower(side: str, widths: Shape, blocks: int, way: str, tensors: Tensors | None) -> list[Rule]:
    """Encoder or decoder, with its levels in the order of computation."""
    rules = [*_conv(f"{side}.conv_in"), *_middle(f"{side}.mid_block", tensors)]
    for i, width in enumerate(widths):
        level = f"{side}.{way}_blocks.{i}"
        for j in range(blocks):
            wider = j == 0 and widths[max(i - 1, 0)] != width
            rules += _resnet(f"{level}.resnets.{j}", shortcut=wider)
        if i < len(widths) - 1:
            rules += _conv(f"{level}.{way}samplers.0.conv")
    return [*rules, *_norm(f"{side}.conv_norm_out"), *_conv(f"{side}.conv_out")]


def _left_out(name: str, shape: Shape) -> Rule:
    return unread(name, lambda: np.broadcast_to(np.float32(0), shape), LEFT_OUT)


def _rules(config: VAEConfig, shape: Shape, tensors: Tensors | None) -> list[Rule]:
    rules = [
        *(_conv("post_quant_conv") if config.quant else []),
        *_tower("decoder", config.channels[::-1], config.blocks + 1, "up", tensors),
    ]
    if config.part == "both":
        return [
            *_tower("encoder", config.channels, config.blocks, "down", tensors),
            *(_conv("quant_conv") if config.quant else []),
            *rules,
        ]
    found = tensors or {}
    encoder = [name for name in found if name.startswith(("encoder.", "quant_conv."))]
    return [*rules, *(_left_out(name, tuple(found[name].shape)) for name in encoder)]


def _outputs(network: VAE, params: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs that the inputs allow.

    - x: enc_mean, enc_logvar (clamped) and moments, both as channels;
    - x and noise: sample_scaled;
    - unscaled z: dec.
    """
    found: dict[str, np.ndarray] = {}
    if "x" in arrays:
        mean, logvar = jax.jit(network.encode)(params, nhwc(arrays["x"]))
        found = {"enc_mean": nchw(mean), "enc_logvar": nchw(logvar)}
        found["moments"] = np.concatenate((found["enc_mean"], found["enc_logvar"]), axis=1)
        if "noise" in arrays:
            noise = nhwc(arrays["noise"])
            sample = sample_latent(mean, logvar, noise, network.scale, network.shift)
            found["sample_scaled"] = nchw(sample)
    if "z" in arrays:
        found["dec"] = nchw(jax.jit(network.decode)(params, nhwc(arrays["z"])))
    return found


def _probe(config: VAEConfig, shape: Shape) -> dict[str, np.ndarray]:
    """Oblong images, to show exchanged axes; groups, scale and shift, which no tensor shows."""
    rng, (height, width) = np.random.default_rng(0), (4, 6)
    latent = (2, config.latent_channels, height, width)
    found = {
        "z": rng.standard_normal(latent, np.float32),
        "groups": np.array(config.groups),
        "scale": np.array(config.scale, np.float32),
        "shift": np.array(config.shift, np.float32),
    }
    if config.part == "both":
        image = (2, config.image_channels, config.factor * height, config.factor * width)
        found["x"] = rng.uniform(-1, 1, image).astype(np.float32)
        found["noise"] = rng.standard_normal(latent, np.float32)
    return found


class _Torch:
    """PyTorch's functions on a state dict; each takes the name of its module."""

    def __init__(self, tensors: Mapping[str, Any], groups: int) -> None:
        import torch

        self.f, self.groups = torch.nn.functional, groups
        self.tensors = {name: x.float() for name, x in tensors.items()}

    def of(self, module: str) -> tuple[Any, Any]:
        return self.tensors[f"{module}.weight"], self.tensors[f"{module}.bias"]

    def conv(self, x: Any, module: str, **options: Any) -> Any:
        return self.f.conv2d(x, *self.of(module), **options)

    def norm(self, x: Any, module: str) -> Any:
        return self.f.group_norm(x, self.groups, *self.of(module), eps=1e-6)

    def resnet(self, x: Any, module: str) -> Any:
        y = self.conv(self.f.silu(self.norm(x, f"{module}.norm1")), f"{module}.conv1", padding=1)
        y = self.conv(self.f.silu(self.norm(y, f"{module}.norm2")), f"{module}.conv2", padding=1)
        skip = f"{module}.conv_shortcut"
        return y + (self.conv(x, skip) if f"{skip}.weight" in self.tensors else x)

    def attention(self, x: Any, module: str) -> Any:
        tokens = self.norm(x, f"{module}.group_norm").flatten(2).transpose(1, 2)

        def linear(y: Any, name: str) -> Any:
            weight, bias = self.of(f"{module}.{name}")
            return self.f.linear(y, weight.flatten(1), bias)

        qkv = (linear(tokens, name) for name in ("to_q", "to_k", "to_v"))
        y = self.f.scaled_dot_product_attention(*qkv)
        return x + linear(y, "to_out.0").transpose(1, 2).reshape(x.shape)

    def middle(self, x: Any, module: str) -> Any:
        x = self.attention(self.resnet(x, f"{module}.resnets.0"), f"{module}.attentions.0")
        return self.resnet(x, f"{module}.resnets.1")

    def level(self, x: Any, module: str) -> Any:
        """The residual blocks of a level, then its change of resolution, if any."""
        j = 0
        while f"{module}.resnets.{j}.conv1.weight" in self.tensors:
            x, j = self.resnet(x, f"{module}.resnets.{j}"), j + 1
        down, up = f"{module}.downsamplers.0.conv", f"{module}.upsamplers.0.conv"
        if f"{down}.weight" in self.tensors:
            return self.conv(self.f.pad(x, (0, 1, 0, 1)), down, stride=2)
        if f"{up}.weight" in self.tensors:
            x = self.f.interpolate(x, scale_factor=2, mode="nearest")
            return self.conv(x, up, padding=1)
        return x

    def levels(self, x: Any, module: str) -> Any:
        i = 0
        while f"{module}.{i}.resnets.0.conv1.weight" in self.tensors:
            x, i = self.level(x, f"{module}.{i}"), i + 1
        return x

    def last(self, x: Any, side: str) -> Any:
        x = self.f.silu(self.norm(x, f"{side}.conv_norm_out"))
        return self.conv(x, f"{side}.conv_out", padding=1)

    def encode(self, x: Any) -> Any:
        x = self.levels(self.conv(x, "encoder.conv_in", padding=1), "encoder.down_blocks")
        x = self.last(self.middle(x, "encoder.mid_block"), "encoder")
        return self.conv(x, "quant_conv") if "quant_conv.weight" in self.tensors else x

    def decode(self, z: Any) -> Any:
        z = self.conv(z, "post_quant_conv") if POST in self.tensors else z
        x = self.conv(z, "decoder.conv_in", padding=1)
        x = self.middle(x, "decoder.mid_block")
        return self.last(self.levels(x, "decoder.up_blocks"), "decoder")


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs of `_outputs`.

    The arrays hold groups, scale and shift, unless they are 32, 0.18215 and 0.
    """
    import torch

    net = _Torch(tensors, int(arrays.get("groups", 32)))
    found: dict[str, Any] = {}
    with torch.no_grad():
        if "x" in arrays:
            mean, logvar = net.encode(torch.tensor(arrays["x"])).chunk(2, dim=1)
            logvar = logvar.clamp(-30, 20)
            moments = torch.cat((mean, logvar), dim=1)
            found = {"enc_mean": mean, "enc_logvar": logvar, "moments": moments}
            if "noise" in arrays:
                drawn = mean + torch.exp(logvar / 2) * torch.tensor(arrays["noise"])
                drawn = drawn - float(arrays.get("shift", 0))
                found["sample_scaled"] = float(arrays.get("scale", 0.18215)) * drawn
        if "z" in arrays:
            found["dec"] = net.decode(torch.tensor(arrays["z"]))
    return {name: x.numpy() for name, x in found.items()}


SD_VAE = Kind(
    name=NAME,
    network="vae",
    licence=(
        "stabilityai/sd-vae-ft-ema and -ft-mse: MIT; "
        "inside a Stable Diffusion 1.x checkpoint: CreativeML Open RAIL-M; "
        "SD3's: Stability AI Community License; "
        "FLUX.1's: Apache-2.0 with [schnell], non-commercial with [dev]"
    ),
    conventions=(
        "images in [-1, 1]; the decoder takes unscaled latents; "
        "scaled = scale * (unscaled - shift), "
        "where scale is 0.18215 unless given (SDXL's is 0.13025), and shift is 0; "
        f"a file without quant layers needs both ({SHIFTED}); "
        "32 groups in every norm unless given; "
        "older spellings are reported in diffusers' present one"
    ),
    select=_select,
    describe=_describe,
    rules=_rules,
    outputs=_outputs,
    torch_outputs=_torch_outputs,
    probe=_probe,
    facts=(
        fact_of("groups", "norm_num_groups"),
        fact_of("scale", "scaling_factor"),
        Fact("shift", lambda config, _: config.shift, {"shift_factor": lambda x: exact(x or 0)}),
        shown("blocks", layers_per_block=exact),
        shown("latent_channels", latent_channels=exact),
        shown("image_channels", out_channels=exact),
        shown("channels", block_out_channels=tuple),
    ),
)
