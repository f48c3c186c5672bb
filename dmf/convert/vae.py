"""Checkpoints of Stable Diffusion's autoencoder: diffusers' names, the older attention names, and the original LDM names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmf.convert.rules import Kind, Rule, conv_layer, linear_layer, norm_layer, tensor_of
from dmf.errors import DmfError
from dmf.networks.frozen.vae import PARTS, VAE, VAEConfig, sample_latent
from dmf.networks.layers import check_choice, check_positive
from dmf.storage.readers.read import Tensor, flatten, strip_prefix

NAME = "sd_vae"
INSIDE = "first_stage_model."  # where a whole Stable Diffusion checkpoint keeps its autoencoder
# What an autoencoder's training leaves in its file beside the weights.
TRAINING = re.compile(r"loss\.|model_ema\.(decay|num_updates)$")
# Other spellings -> diffusers' present one, each line applied to what the lines above have made of a name.
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
GIVEN = ("groups", "scale", "part")
LEFT_OUT = "of the encoder, left out: part is 'decoder'"


def _spelling(names: Mapping[str, Any]) -> dict[str, str]:
    """Each name of a file -> diffusers' present name of the same tensor."""
    levels = [int(found[1]) for name in names if (found := re.match(r"decoder\.up\.(\d+)\.", name))]
    last = max(levels, default=0)

    def renamed(name: str) -> str:
        # LDM counts the decoder's levels from the finest, diffusers from the coarsest
        new = re.sub(
            r"^(decoder\.up\.)(\d+)", lambda found: f"{found[1]}{last - int(found[2])}", name
        )
        for pattern, replacement in SPELLINGS:
            new = re.sub(pattern, replacement, new)
        return new

    return {name: renamed(name) for name in names}


def _select(tree: Any, which: str) -> tuple[dict[str, Tensor], str]:
    if which not in ("", *SD_VAE.copies):
        raise DmfError(
            f"copy {which!r} of the weights is unknown: expected {SD_VAE.copies[0]!r}, the only one of kind {NAME}"
        )
    inner = tree.get("state_dict", tree) if isinstance(tree, dict) else tree
    tensors = strip_prefix(flatten(inner))
    inside = {
        name.removeprefix(INSIDE): x for name, x in tensors.items() if name.startswith(INSIDE)
    }
    found = {name: x for name, x in (inside or tensors).items() if not TRAINING.match(name)}
    new: dict[str, Tensor] = {}
    for name, renamed in _spelling(found).items():
        if renamed in new:
            raise DmfError(
                f"tensor {renamed} is there twice, in two spellings, one of them {name}: expected one autoencoder"
            )
        new[renamed] = found[name]
    return new, SD_VAE.copies[0]


def _conv_shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    shape = tuple(tensor_of(tensors, name, NAME).shape)
    if len(shape) != 4:
        raise DmfError(
            f"tensor {name} has shape {list(shape)}: expected the four axes of a convolution"
        )
    return shape


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How long the list is whose indices `pattern` finds in the names."""
    return 1 + max(
        (int(found[1]) for name in tensors if (found := re.match(pattern, name))), default=-1
    )


def _describe(
    tensors: Mapping[str, Tensor], given: Mapping[str, Any]
) -> tuple[VAEConfig, tuple[int, ...]]:
    """The configuration; the shape is (), for an autoencoder takes images of many sizes."""
    for field in given:
        if field not in GIVEN:
            raise DmfError(
                f"{field} is no field of kind {NAME} that can be given: expected one of {', '.join(GIVEN)}"
            )
    levels = max(1, _count(tensors, r"decoder\.up_blocks\.(\d+)\."))
    config = VAEConfig(
        channels=tuple(
            _conv_shape(tensors, f"decoder.up_blocks.{i}.resnets.0.conv1.weight")[0]
            for i in reversed(range(levels))
        ),
        blocks=_count(tensors, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1,
        latent_channels=_conv_shape(tensors, "post_quant_conv.weight")[1],
        image_channels=_conv_shape(tensors, "decoder.conv_out.weight")[0],
        part="both" if "encoder.conv_in.weight" in tensors else "decoder",
    )
    if config.part == "decoder" and given.get("part") == "both":
        raise DmfError(
            "part is 'both', but there is no encoder among the tensors: expected 'decoder'"
        )
    config = replace(config, **given)
    check_choice("part", config.part, PARTS)
    check_positive("groups", config.groups)
    odd = [width for width in config.channels if width % config.groups]
    if odd:
        raise DmfError(
            f"groups is {config.groups}, but a level has {odd[0]} channels: give groups, a divisor of all of "
            f"{', '.join(map(str, config.channels))}, for no file tells how many groups its norms have"
        )
    return config, ()


def _room(module: str) -> str:
    return re.sub(r"\.(\d+)", r"_\1", module).replace(".", "/")


def _conv(module: str) -> list[Rule]:
    return conv_layer(module, _room(module))


def _norm(module: str) -> list[Rule]:
    return norm_layer(module, _room(module))


def _projection(module: str, tensors: Mapping[str, Tensor] | None) -> list[Rule]:
    """A linear layer of the attention, which LDM files hold as a 1x1 convolution."""
    weight, bias = linear_layer(module, _room(module))
    name = weight.tensors[0]
    if tensors is None or name not in tensors or len(tensors[name].shape) != 4:
        return [weight, bias]
    note = "a linear layer, in the file as a 1x1 convolution"
    return [
        Rule(
            weight.tensors,
            weight.leaves,
            lambda x: (x[:, :, 0, 0].T,),
            lambda x: (x.T[:, :, None, None],),
            note,
        ),
        bias,
    ]


def _resnet(module: str, shortcut: bool) -> list[Rule]:
    rules = [
        *_norm(f"{module}.norm1"),
        *_conv(f"{module}.conv1"),
        *_norm(f"{module}.norm2"),
        *_conv(f"{module}.conv2"),
    ]
    return [*rules, *(_conv(f"{module}.conv_shortcut") if shortcut else [])]


def _middle(module: str, tensors: Mapping[str, Tensor] | None) -> list[Rule]:
    attention = f"{module}.attentions.0"
    rules = [
        *_resnet(f"{module}.resnets.0", False),
        *_resnet(f"{module}.resnets.1", False),
        *_norm(f"{attention}.group_norm"),
    ]
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        rules += _projection(f"{attention}.{name}", tensors)
    return rules


def _tower(
    side: str, widths: tuple[int, ...], blocks: int, way: str, tensors: Mapping[str, Tensor] | None
) -> list[Rule]:
    """Encoder or decoder, its levels in the order of computation."""
    rules = [*_conv(f"{side}.conv_in"), *_middle(f"{side}.mid_block", tensors)]
    for i, width in enumerate(widths):
        level = f"{side}.{way}_blocks.{i}"
        for j in range(blocks):
            rules += _resnet(
                f"{level}.resnets.{j}", shortcut=j == 0 and widths[max(i - 1, 0)] != width
            )
        if i < len(widths) - 1:
            rules += _conv(f"{level}.{way}samplers.0.conv")
    return [*rules, *_norm(f"{side}.conv_norm_out"), *_conv(f"{side}.conv_out")]


def _left_out(name: str, shape: tuple[int, ...]) -> Rule:
    return Rule(
        (name,), (), lambda x: (), lambda: (np.broadcast_to(np.float32(0), shape),), LEFT_OUT
    )


def _rules(
    config: VAEConfig, shape: tuple[int, ...], tensors: Mapping[str, Tensor] | None
) -> list[Rule]:
    rules = [
        *_conv("post_quant_conv"),
        *_tower("decoder", config.channels[::-1], config.blocks + 1, "up", tensors),
    ]
    if config.part == "both":
        return [
            *_tower("encoder", config.channels, config.blocks, "down", tensors),
            *_conv("quant_conv"),
            *rules,
        ]
    encoder = [name for name in tensors or () if name.startswith(("encoder.", "quant_conv."))]
    return [*rules, *(_left_out(name, tuple((tensors or {})[name].shape)) for name in encoder)]


def _nhwc(x: np.ndarray) -> Any:
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def _nchw(x: Any) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def _outputs(network: VAE, params: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """x -> enc_mean, enc_logvar (clamped), moments (both, as channels); with noise, sample_scaled. Unscaled z -> dec."""
    found: dict[str, np.ndarray] = {}
    if "x" in arrays:
        mean, logvar = jax.jit(network.encode)(params, _nhwc(arrays["x"]))
        found = {"enc_mean": _nchw(mean), "enc_logvar": _nchw(logvar)}
        found["moments"] = np.concatenate((found["enc_mean"], found["enc_logvar"]), axis=1)
        if "noise" in arrays:
            found["sample_scaled"] = _nchw(
                sample_latent(mean, logvar, _nhwc(arrays["noise"]), network.scale)
            )
    if "z" in arrays:
        found["dec"] = _nchw(jax.jit(network.decode)(params, _nhwc(arrays["z"])))
    return found


def _probe(config: VAEConfig, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Oblong images, so that no exchange of the axes passes; groups and scale tell PyTorch what no tensor does."""
    rng, (height, width) = np.random.default_rng(0), (4, 6)
    latent = (2, config.latent_channels, height, width)
    found = {
        "z": rng.standard_normal(latent, np.float32),
        "groups": np.array(config.groups),
        "scale": np.array(config.scale, np.float32),
    }
    if config.part == "both":
        image = (2, config.image_channels, config.factor * height, config.factor * width)
        found |= {
            "x": rng.uniform(-1, 1, image).astype(np.float32),
            "noise": rng.standard_normal(latent, np.float32),
        }
    return found


class _Torch:
    """PyTorch's functions on the tensors of a state dict, by the name of the module they belong to."""

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

        y = self.f.scaled_dot_product_attention(
            *(linear(tokens, name) for name in ("to_q", "to_k", "to_v"))
        )
        return x + linear(y, "to_out.0").transpose(1, 2).reshape(x.shape)

    def middle(self, x: Any, module: str) -> Any:
        x = self.attention(self.resnet(x, f"{module}.resnets.0"), f"{module}.attentions.0")
        return self.resnet(x, f"{module}.resnets.1")

    def level(self, x: Any, module: str) -> Any:
        """The residual blocks that are there, then the change of resolution that is there."""
        j = 0
        while f"{module}.resnets.{j}.conv1.weight" in self.tensors:
            x, j = self.resnet(x, f"{module}.resnets.{j}"), j + 1
        if f"{module}.downsamplers.0.conv.weight" in self.tensors:
            return self.conv(self.f.pad(x, (0, 1, 0, 1)), f"{module}.downsamplers.0.conv", stride=2)
        if f"{module}.upsamplers.0.conv.weight" in self.tensors:
            return self.conv(
                self.f.interpolate(x, scale_factor=2, mode="nearest"),
                f"{module}.upsamplers.0.conv",
                padding=1,
            )
        return x

    def levels(self, x: Any, module: str) -> Any:
        i = 0
        while f"{module}.{i}.resnets.0.conv1.weight" in self.tensors:
            x, i = self.level(x, f"{module}.{i}"), i + 1
        return x

    def last(self, x: Any, side: str) -> Any:
        return self.conv(
            self.f.silu(self.norm(x, f"{side}.conv_norm_out")), f"{side}.conv_out", padding=1
        )

    def encode(self, x: Any) -> Any:
        x = self.levels(self.conv(x, "encoder.conv_in", padding=1), "encoder.down_blocks")
        return self.conv(self.last(self.middle(x, "encoder.mid_block"), "encoder"), "quant_conv")

    def decode(self, z: Any) -> Any:
        x = self.middle(
            self.conv(self.conv(z, "post_quant_conv"), "decoder.conv_in", padding=1),
            "decoder.mid_block",
        )
        return self.last(self.levels(x, "decoder.up_blocks"), "decoder")


def _torch_outputs(
    tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs of `_outputs`; groups and scale are among the arrays where they are not 32 and 0.18215."""
    import torch

    net = _Torch(tensors, int(arrays.get("groups", 32)))
    found: dict[str, Any] = {}
    with torch.no_grad():
        if "x" in arrays:
            mean, logvar = net.encode(torch.tensor(arrays["x"])).chunk(2, dim=1)
            logvar = logvar.clamp(-30, 20)
            found = {
                "enc_mean": mean,
                "enc_logvar": logvar,
                "moments": torch.cat((mean, logvar), dim=1),
            }
            if "noise" in arrays:
                drawn = mean + torch.exp(logvar / 2) * torch.tensor(arrays["noise"])
                found["sample_scaled"] = float(arrays.get("scale", 0.18215)) * drawn
        if "z" in arrays:
            found["dec"] = net.decode(torch.tensor(arrays["z"]))
    return {name: x.numpy() for name, x in found.items()}


SD_VAE = Kind(
    name=NAME,
    network="vae",
    licence="stabilityai/sd-vae-ft-ema and -ft-mse: MIT; inside a Stable Diffusion 1.x checkpoint: CreativeML Open RAIL-M",
    conventions=(
        "images in [-1, 1]; the decoder takes unscaled latents; scaled = scale * unscaled, where scale is 0.18215 unless given "
        "(SDXL's is 0.13025); 32 groups in every norm unless given; older spellings are reported in diffusers' present one"
    ),
    copies=("weights",),
    select=_select,
    describe=_describe,
    rules=_rules,
    outputs=_outputs,
    torch_outputs=_torch_outputs,
    probe=_probe,
)
