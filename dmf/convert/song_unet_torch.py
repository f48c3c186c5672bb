"""EDM's SongUNet in PyTorch, from a state dict alone; conversions are compared with it.

The names show the structure. Arrays are NCHW, and have the dtype of the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

Weights = Mapping[str, Any]
MODULE = r"(enc|dec)\.(\d+)x\d+_(conv|down|in|up|aux_residual|block|aux_norm|aux_conv)(\d*)\."
# The order within a resolution.
RUN = ("conv", "in", "down", "up", "aux_residual", "block", "aux_norm", "aux_conv")


def meanflow(tensors: Weights, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """u_noaug from z, t and r or h.

    With aug_cond it gives u_aug too, and with v also dudt_aug, along (v, dr = 0, dt = 1).
    """
    import torch

    a = _inputs(tensors, arrays)
    # Each time has half as many features as the first layer has rows.
    rows, columns = tensors["map_layer0.weight"].shape
    width, both = rows // 2, rows == columns

    def u(z: Any, t: Any, h: Any, label: Any = None) -> Any:
        features = torch.cat([_positional(t, width), _positional(h, width)], 1)
        features = features if both or "interval.weight" in tensors else features[:, :width]
        return _song_unet(tensors, z, _embedding(tensors, features, label), interleaved=False)

    z, t, h = a["z"], a["t"], a["h"] if "h" in a else a["t"] - a["r"]
    out = {"u_noaug": u(z, t, h).numpy()}
    if "aug_cond" not in a:
        return out
    if "v" not in a:
        return {**out, "u_aug": u(z, t, h, a["aug_cond"]).numpy()}
    tangents = a["v"], torch.ones_like(t), torch.ones_like(h)

    def labelled(z: Any, t: Any, h: Any) -> Any:
        return u(z, t, h, a["aug_cond"])

    # This takes two reverse passes. PyTorch's forward mode would first compile for seconds.
    found = torch.autograd.functional.jvp(labelled, (z, t, h), tangents)
    return {**out, "u_aug": found[0].numpy(), "dudt_aug": found[1].numpy()}


def edm(tensors: Weights, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """D from x and sigma, and D_aug with augment_labels too; class_labels join both.

    From F_in and c_noise it gives F_raw, the network without its wrapper.
    """
    import torch
    from torch.nn import functional

    a = _inputs(tensors, arrays)
    w = {name.removeprefix("model."): x for name, x in tensors.items()}
    width, hot = w["map_layer0.weight"].shape[1], a.get("class_labels")

    def raw(x: Any, c_noise: Any, label: Any = None) -> Any:
        if "map_noise.freqs" in w:
            angle = c_noise[:, None] * (2 * np.pi * w["map_noise.freqs"])
            features = torch.cat([angle.sin(), angle.cos()], 1)
        else:
            features = _positional(c_noise, width)
        if "map_label.weight" in w:  # no labels are zeros, the null class
            chosen = 0 * w["map_label.weight"][:1] if hot is None else hot
            layer = w["map_label.weight"], w["map_label.bias"]
            features = features + functional.linear(chosen * math.sqrt(chosen.shape[1]), *layer)
        if "interval.weight" in w:  # a denoiser has an empty interval
            features = torch.cat([features, _positional(torch.zeros_like(c_noise), width)], 1)
        return _song_unet(w, x, _embedding(w, features, label), interleaved=True)

    def denoise(x: Any, sigma: Any, label: Any = None) -> Any:
        data = a.get("sigma_data", 0.5)
        rows = sigma[:, None, None, None]
        total = data**2 + rows**2
        inner = raw(x / total.sqrt(), sigma.log() / 4, label)
        shifted = rows - 0.003 * a.get("ect_eval", 0)  # the roots keep sigma
        skip = data**2 / (shifted**2 + data**2)
        return skip * x + shifted * data / total.sqrt() * inner

    out = {}
    if {"x", "sigma"} <= set(a):
        out["D"] = denoise(a["x"], a["sigma"]).numpy()
    if {"x", "sigma", "augment_labels"} <= set(a):
        out["D_aug"] = denoise(a["x"], a["sigma"], a["augment_labels"]).numpy()
    if {"F_in", "c_noise"} <= set(a):
        out["F_raw"] = raw(a["F_in"], a["c_noise"]).numpy()
    return out


def _inputs(tensors: Weights, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The arrays as tensors of the weights' dtype, without labels that the network lacks."""
    import torch

    like = next(x for name, x in tensors.items() if name.endswith("map_layer0.weight"))
    labelled = any(name.endswith("map_augment.weight") for name in tensors)
    names = [name for name in arrays if labelled or name not in ("aug_cond", "augment_labels")]
    return {
        name: torch.as_tensor(arrays[name]).to(like.dtype)
        for name in names
        if np.issubdtype(arrays[name].dtype, np.floating)
    }


def _positional(time: Any, width: int) -> Any:
    import torch

    angle = time[:, None] * 1e-4 ** (torch.arange(width // 2, dtype=time.dtype) / (width // 2 - 1))
    return torch.cat([angle.sin(), angle.cos()], 1)


def _embedding(w: Weights, features: Any, label: Any) -> Any:
    import torch
    from torch.nn import functional as F

    if label is not None:
        shift = label @ w["map_augment.weight"].T
        features = features + F.pad(shift, (0, features.shape[1] - shift.shape[1]))
    layer = w["map_layer0.weight"]
    if "interval.weight" in w:
        layer = torch.cat([layer, w["interval.weight"]], 1)
    emb = F.silu(F.linear(features, layer, w["map_layer0.bias"]))
    return F.silu(F.linear(emb, w["map_layer1.weight"], w["map_layer1.bias"]))


def _song_unet(w: Weights, x: Any, emb: Any, interleaved: bool) -> Any:
    import torch
    from torch.nn import functional as F

    matches = (re.match(MODULE, name) for name in w)
    found: set[Any] = {match.groups() for match in matches if match}
    sign = {"enc": -1, "dec": 1}  # to lower resolutions, then to higher ones

    def place(found: tuple[str, str, str, str]) -> tuple[int, ...]:
        part, size, sort, number = found
        return sign[part], sign[part] * int(size), RUN.index(sort), int(number or 0)

    skips: list[Any] = []
    aux = x
    for part, size, sort, number in sorted(found, key=place):
        name = f"{part}.{size}x{size}_{sort}{number}"
        if sort == "aux_residual":
            x = skips[-1] = aux = (x + _shrunk(w, name, aux)) / math.sqrt(2)
            continue
        if sort == "aux_norm":
            x = F.silu(_norm(w, name, x))
        elif sort in ("conv", "aux_conv"):
            x = _conv(w, name, x)
        else:
            x = torch.cat([x, skips.pop()], 1) if (part, sort) == ("dec", "block") else x
            x = _block(w, name, x, emb, sort, interleaved)
        if part == "enc":
            skips.append(x)
    return x


def _norm(w: Weights, name: str, x: Any) -> Any:
    from torch.nn import functional as F

    groups = max(1, min(32, x.shape[1] // 4))
    return F.group_norm(x, groups, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def _conv(w: Weights, name: str, x: Any) -> Any:
    from torch.nn import functional as F

    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)


def _resampled(w: Weights, name: str, x: Any, sort: str) -> Any:
    from torch.nn import functional as F

    if sort not in ("down", "up"):
        return x
    window, channels = w[f"{name}.resample_filter"], x.shape[1]
    depthwise = {"groups": channels, "stride": 2, "padding": (window.shape[-1] - 1) // 2}
    kernel = window.expand(channels, 1, -1, -1)
    if sort == "down":
        return F.conv2d(x, kernel, **depthwise)
    return F.conv_transpose2d(x, 4 * kernel, **depthwise)


def _shrunk(w: Weights, name: str, x: Any) -> Any:
    """Convolution and halving of the zero-extended image, with no border between the two."""
    from torch.nn import functional as F

    weight, window = w[f"{name}.weight"], w[f"{name}.resample_filter"]
    y = F.conv2d(x, weight, padding=1 + (window.shape[-1] - 1) // 2)
    y = F.conv2d(y, window.expand(len(weight), 1, -1, -1), groups=len(weight), stride=2)
    return y + w[f"{name}.bias"][:, None, None]


def _block(w: Weights, name: str, x: Any, emb: Any, sort: str, interleaved: bool) -> Any:
    from torch.nn import functional as F

    y = _resampled(w, f"{name}.conv0", F.silu(_norm(w, f"{name}.norm0", x)), sort)
    y = _conv(w, f"{name}.conv0", y)
    y = y + F.linear(emb, w[f"{name}.affine.weight"], w[f"{name}.affine.bias"])[:, :, None, None]
    y = _conv(w, f"{name}.conv1", F.silu(_norm(w, f"{name}.norm1", y)))
    if f"{name}.skip.weight" in w:
        x = _conv(w, f"{name}.skip", _resampled(w, f"{name}.skip", x, sort))
    x = (x + y) / math.sqrt(2)
    if f"{name}.qkv.weight" not in w:
        return x
    return (x + _attention(w, name, x, interleaved)) / math.sqrt(2)


def _attention(w: Weights, name: str, x: Any, interleaved: bool) -> Any:
    batch, channels, *_ = x.shape
    qkv = _conv(w, f"{name}.qkv", _norm(w, f"{name}.norm2", x))
    if interleaved:
        packed = qkv.reshape(batch, channels, 3, -1).transpose(1, 2)
    else:
        packed = qkv.reshape(batch, 3, channels, -1)
    q, k, v = packed.unbind(1)
    attention = (q.transpose(1, 2) @ k / math.sqrt(channels)).softmax(-1)
    return _conv(w, f"{name}.proj", (v @ attention.transpose(1, 2)).reshape(x.shape))
