"""Checkpoints of EDM's SongUNet: MeanFlow's CIFAR-10 U-Net, and EDM's and ECT's preconditioned DDPM++ and NCSN++.

Our names are the sources' names, '.' read as '/', but for the first layer of the embedding: MeanFlow's acts on [features of t |
features of t - r], whose column blocks are our map_layer0 and interval; EDM's has no features of t - r, so interval is zero.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmf import networks
from dmf.convert import unet_torch
from dmf.convert.rules import (
    Arrays,
    Kind,
    Rule,
    constant,
    conv,
    expect,
    linear,
    optional,
    plain,
    tensor_of,
)
from dmf.errors import DmfError
from dmf.networks import Condition, UNetConfig
from dmf.storage.readers.read import Inert, Tensor, flatten, module_tensors, strip_prefix

PREFIX = "model."  # of every tensor of EDM's and ECT's wrappers around the network
SIGMA_DATA = "sigma_data"  # an attribute of the wrapper, which `select` puts beside the tensors
WRAPPERS = ("EDMPrecond", "ECMPrecond")
FILTERS = {"box": (1, 1), "binomial": (1, 3, 3, 1)}
MEANFLOW_GIVEN = {"dropout": 0.2}  # what they are trained with on CIFAR-10
EDM_GIVEN = {"dropout": 0.13, SIGMA_DATA: 0.5}
MEANFLOW_FIELDS: dict[str, Any] = {
    "kind": "unet",
    "residual_encoder": False,
    "embedding": "positional",
    "embedding_mult": 2,
    "time_input": "t",
    "time_scale": 1.0,
    "precond": "none",
}
EDM_FIELDS: dict[str, Any] = {"kind": "unet", "time_input": "log_sigma", "precond": "edm"}


def _select_meanflow(tree: Any, which: str) -> tuple[dict[str, Tensor], str]:
    copies = MEANFLOW_UNET.copies
    whole = isinstance(tree, Mapping) and isinstance(tree.get("model"), Mapping)
    tensors = strip_prefix(flatten(tree["model"] if whole else tree))
    found = [copy for copy in copies if any(name.startswith(f"{copy}.") for name in tensors)]
    copy = which or (found or ["net"])[0]
    if copy not in (found or ["net"]):
        raise DmfError(
            f"copy {which!r} of the weights is not in the file: expected one of {', '.join(found or ['net'])}"
        )
    if not found:
        return tensors, copy
    chosen = {
        name.removeprefix(f"{copy}."): x
        for name, x in tensors.items()
        if name.startswith(f"{copy}.")
    }
    return strip_prefix(chosen), copy


def _select_edm(tree: Any, which: str) -> tuple[dict[str, Tensor], str]:
    held = tree if isinstance(tree, Mapping) else {"net": tree}
    found = [copy for copy in EDM.copies if isinstance(held.get(copy), Inert | Mapping)] or ["net"]
    copy = which or found[0]
    if copy not in found:
        raise DmfError(
            f"copy {which!r} of the weights is not in the file: expected one of {', '.join(found)}"
        )
    module = held.get(copy, tree)
    if not isinstance(module, Inert):
        tensors = strip_prefix(flatten(module))
        bare = {name for name in tensors if name != SIGMA_DATA and not name.startswith(PREFIX)}
        return {PREFIX + name if name in bare else name: x for name, x in tensors.items()}, copy
    if module.class_name not in WRAPPERS:
        raise DmfError(
            f"the network is a {module.class_name}: expected {' or '.join(WRAPPERS)}, whose denoiser is the only one that is "
            "written here as a velocity"
        )
    tensors = module_tensors(module)
    value = module.state.get(SIGMA_DATA, EDM_GIVEN[SIGMA_DATA])
    if not isinstance(value, int | float):
        raise DmfError(f"{SIGMA_DATA} of the network is {value!r:.40}: expected a number")
    return {
        **tensors,
        SIGMA_DATA: Tensor((), np.dtype(np.float64), lambda: np.array(value, np.float64)),
    }, copy


def _taken(given: Mapping[str, Any], known: Mapping[str, float], kind: str) -> dict[str, Any]:
    """The known fields, with the values that are given; refuses others."""
    for field, value in given.items():
        if field not in known:
            raise DmfError(
                f"{field} is no field of kind {kind} that can be given: expected one of {', '.join(known)}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DmfError(f"{field} is {value!r}: expected a number")
    return {**known, **{field: float(value) for field, value in given.items()}}


def _axes(tensors: Mapping[str, Tensor], name: str, count: int, kind: str) -> tuple[int, ...]:
    shape = tuple(tensor_of(tensors, name, kind).shape)
    if len(shape) != count or not all(shape):
        raise DmfError(
            f"tensor {name} has shape {list(shape)}: expected {count} axes in weights of kind {kind}"
        )
    return shape


def _structure(
    tensors: Mapping[str, Tensor], kind: str, prefix: str = ""
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """What names and shapes tell of a U-Net, as fields of its config, and its image shape."""
    tensor_of(tensors, f"{prefix}map_layer0.weight", kind)
    found = [
        re.fullmatch(rf"{prefix}enc\.(\d+)x\1_block(\d+)\.conv0\.weight", name) for name in tensors
    ]
    counts: dict[int, int] = {}
    for size in (int(m[1]) for m in found if m):
        counts[size] = counts.get(size, 0) + 1
    sizes = sorted(counts, reverse=True)
    if (
        not sizes
        or len(set(counts.values())) > 1
        or any(sizes[0] != size << i for i, size in enumerate(sizes))
    ):
        levels = ", ".join(f"{counts[size]} at {size}x{size}" for size in sizes) or "none"
        raise DmfError(
            f"blocks of the encoder: {levels}; expected as many at every resolution, each half the one before"
        )
    channels, image_channels, *_ = _axes(
        tensors, f"{prefix}enc.{sizes[0]}x{sizes[0]}_conv.weight", 4, kind
    )
    widths = [
        _axes(tensors, f"{prefix}enc.{size}x{size}_block0.conv0.weight", 4, kind)[0]
        for size in sizes
    ]
    if any(width % channels for width in widths):
        raise DmfError(
            f"resolutions of {', '.join(map(str, widths))} channels: expected multiples of {channels}"
        )
    label = f"{prefix}map_augment.weight"
    fields = {
        "channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "blocks": counts[sizes[0]],
        "attention_resolutions": tuple(
            size for size in sizes if f"{prefix}enc.{size}x{size}_block0.qkv.weight" in tensors
        ),
        "augment_dim": _axes(tensors, label, 2, kind)[1] if label in tensors else 0,
    }
    return fields, (sizes[0], sizes[0], image_channels)


def _resample(tensors: Mapping[str, Tensor], levels: int, kind: str) -> str:
    """The filter's name, by its length; the values are compared later."""
    name = next((name for name in tensors if name.endswith("resample_filter")), "")
    if not name and levels > 1:
        raise DmfError(
            f"no tensor resample_filter among {len(tensors)}: expected the buffers of kind {kind} beside its parameters"
        )
    lengths = {(len(taps),) * 2: filter for filter, taps in FILTERS.items()}
    found = tuple(tensors[name].shape[-2:]) if name else (4, 4)
    if found not in lengths:
        raise DmfError(
            f"tensor {name} has shape {list(tensors[name].shape)}: expected a filter of 2 x 2 or 4 x 4"
        )
    return lengths[found]


def _describe_meanflow(
    tensors: Mapping[str, Tensor], given: Mapping[str, Any]
) -> tuple[UNetConfig, tuple[int, ...]]:
    kind, values = MEANFLOW_UNET.name, _taken(given, MEANFLOW_GIVEN, MEANFLOW_UNET.name)
    fields, shape = _structure(tensors, kind)
    width = 2 * fields["channels"]
    columns = _axes(tensors, "map_layer0.weight", 2, kind)[1]
    if columns not in (width, 2 * width):
        raise DmfError(
            f"tensor map_layer0.weight has {columns} columns: expected {2 * width}, for t and t - r, or {width}, for t alone"
        )
    return UNetConfig(
        **fields,
        **values,
        **MEANFLOW_FIELDS,
        resample=_resample(tensors, len(fields["channel_mult"]), kind),
    ), shape


def _describe_edm(
    tensors: Mapping[str, Tensor], given: Mapping[str, Any]
) -> tuple[UNetConfig, tuple[int, ...]]:
    kind, values = EDM.name, _taken(given, EDM_GIVEN, EDM.name)
    if f"{PREFIX}map_label.weight" in tensors:
        classes = tensors[f"{PREFIX}map_label.weight"].shape[-1]
        raise DmfError(
            f"the network is conditioned on {classes} classes: expected an unconditional one, as our U-Net takes no class"
        )
    fields, shape = _structure(tensors, kind, PREFIX)
    columns = _axes(tensors, f"{PREFIX}map_layer0.weight", 2, kind)[1]
    if columns % fields["channels"]:
        raise DmfError(
            f"tensor {PREFIX}map_layer0.weight has {columns} columns: expected a multiple of {fields['channels']}"
        )
    if SIGMA_DATA in tensors and SIGMA_DATA not in given:
        values[SIGMA_DATA] = float(tensors[SIGMA_DATA].read())
    config = UNetConfig(
        **fields,
        **values,
        resample=_resample(tensors, len(fields["channel_mult"]), kind),
        residual_encoder=any("_aux_residual." in name for name in tensors),
        embedding="fourier" if f"{PREFIX}map_noise.freqs" in tensors else "positional",
        embedding_mult=columns // fields["channels"],
        **EDM_FIELDS,
    )
    return config, shape


def _leaves(config: UNetConfig, image_shape: tuple[int, ...]) -> dict[str, int]:
    """Every leaf of the network and its number of axes."""
    shapes = jax.eval_shape(networks.build(config, image_shape).init, jax.random.key(0))
    return {
        "/".join(k.key for k in path): x.ndim
        for path, x in jax.tree_util.tree_leaves_with_path(shapes)
    }


def _completed(
    special: list[Rule], leaves: Mapping[str, int], resample: str, prefix: str = ""
) -> list[Rule]:
    """The rules, one for every leaf that is in none of them, and one for the filter of every layer that resamples."""
    done = {leaf for rule in special for leaf in rule.leaves}
    rules = [
        *special,
        *(_rule(leaf, ndim, prefix) for leaf, ndim in leaves.items() if leaf not in done),
    ]
    note = f"the filter {list(FILTERS[resample])} of resample = {resample!r}"
    filtered = [
        leaf
        for leaf in leaves
        if re.search(r"(x\d+_(down|up)/(conv0|skip)|_aux_residual)/kernel", leaf)
    ]
    values = functools.partial(_filter, resample)
    filters = [
        constant(f"{prefix}{_tensor(leaf, 'resample_filter')}", values, note) for leaf in filtered
    ]
    return rules + [rule._replace(missing="") for rule in filters]


def _rule(leaf: str, ndim: int, prefix: str) -> Rule:
    name = leaf.rpartition("/")[2]
    layout = {("kernel", 2): linear, ("kernel", 4): conv}.get((name, ndim), plain)
    return layout(
        f"{prefix}{_tensor(leaf, {'kernel': 'weight', 'scale': 'weight'}.get(name, name))}", leaf
    )


def _tensor(leaf: str, name: str) -> str:
    return f"{leaf.rpartition('/')[0].replace('/', '.')}.{name}"


def _filter(resample: str) -> np.ndarray:
    taps = np.array(FILTERS[resample], np.float32)
    return (np.outer(taps, taps) / taps.sum() ** 2)[None, None]


def _one_time(
    config: UNetConfig, tensors: Mapping[str, Tensor] | None, prefix: str = ""
) -> list[Rule]:
    """What a network that sees t alone lacks: the features of t - r, and the half of the augmentation label beside them."""
    rules = optional([linear(f"{prefix}interval.weight", "interval/kernel")], "a flow has one time")
    name, leaf, width = f"{prefix}map_augment.weight", "map_augment/kernel", config.noise_width
    if not config.augment_dim:
        return rules
    if tensors and tensors[name].shape[0] == 2 * width:
        return [*rules, linear(name, leaf)]

    def halves(weight: np.ndarray) -> Arrays:
        return (np.concatenate((weight.T, np.zeros_like(weight.T)), 1),)

    def half(kernel: np.ndarray) -> Arrays:  # or both, after training with an interval
        return ((kernel if np.any(kernel[:, width:]) else kernel[:, :width]).T,)

    return [
        *rules,
        Rule(
            (name,),
            (leaf,),
            halves,
            half,
            "[for t | zeros for t - r]: the file's network sees t alone",
        ),
    ]


def _rules_meanflow(
    config: UNetConfig, image_shape: tuple[int, ...], tensors: Mapping[str, Tensor] | None
) -> list[Rule]:
    expect(config, MEANFLOW_UNET.name, MEANFLOW_FIELDS)
    name, leaves = "map_layer0.weight", _leaves(config, image_shape)
    if tensors and tensors[name].shape[1] == config.noise_width:
        return _completed(_one_time(config, tensors), leaves, config.resample)

    def join(of_t: np.ndarray, of_h: np.ndarray) -> Arrays:
        return (np.concatenate((of_t, of_h)).T,)

    halves = ("map_layer0/kernel", "interval/kernel")
    both = Rule(
        (name,),
        halves,
        lambda w: np.split(w.T, 2),
        join,
        "split in its columns for t and for t - r",
    )
    return _completed([both], leaves, config.resample)


def _rules_edm(
    config: UNetConfig, image_shape: tuple[int, ...], tensors: Mapping[str, Tensor] | None
) -> list[Rule]:
    expect(config, EDM.name, EDM_FIELDS)
    leaves = _leaves(config, image_shape)
    packed = [
        _deinterleaved(_rule(leaf, ndim, PREFIX))
        for leaf, ndim in leaves.items()
        if "/qkv/" in leaf
    ]
    rules = _completed(
        [*_one_time(config, tensors, PREFIX), *packed], leaves, config.resample, PREFIX
    )
    if SIGMA_DATA in tensors if tensors else config.sigma_data != EDM_GIVEN[SIGMA_DATA]:
        note = f"an attribute of the wrapper: network.sigma_data = {config.sigma_data}"
        rules.append(
            Rule((SIGMA_DATA,), (), lambda _: (), lambda: (np.array(config.sigma_data),), note)
        )
    return rules


def _deinterleaved(rule: Rule) -> Rule:
    """The same rule with rows q0 k0 v0 q1 k1 v1 .. in the file, q .. k .. v .. in the leaf."""

    def forward(x: np.ndarray) -> Arrays:
        return rule.forward(x.reshape(-1, 3, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape))

    def backward(x: np.ndarray) -> Arrays:
        (y,) = rule.backward(x)
        return (y.reshape(3, -1, *y.shape[1:]).swapaxes(0, 1).reshape(y.shape),)

    return rule._replace(
        forward=forward, backward=backward, note="query, key and value are interleaved in the file"
    )


def _nhwc(x: Any) -> jax.Array:
    return jnp.asarray(x).transpose(0, 2, 3, 1)


def _nchw(x: Any) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def _outputs_meanflow(
    network: Any, params: Any, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    if not {"z", "t"} <= set(arrays) or not {"r", "h"} & set(arrays):
        return {}
    z, t = _nhwc(arrays["z"]), jnp.asarray(arrays["t"])
    r = jnp.asarray(arrays["r"]) if "r" in arrays else t - jnp.asarray(arrays["h"])
    out = {"u_noaug": _nchw(network.apply(params, z, r, t))}
    if "aug_cond" not in arrays:
        return out
    label = jnp.asarray(arrays["aug_cond"])
    if "v" not in arrays:
        return {
            **out,
            "u_aug": _nchw(network.apply(params, z, r, t, condition=Condition(augment=label))),
        }
    tangents = _nhwc(arrays["v"]), jnp.ones_like(t)
    u, dudt = jax.jvp(
        lambda z, t: network.apply(params, z, r, t, condition=Condition(augment=label)),
        (z, t),
        tangents,
    )
    return {**out, "u_aug": _nchw(u), "dudt_aug": _nchw(dudt)}


def _outputs_edm(
    network: Any, params: Any, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """D = z - t v, from the velocity: it checks the wrapper too."""
    if not {"x", "sigma"} <= set(arrays):
        return {}
    x, sigma = _nhwc(arrays["x"]), jnp.asarray(arrays["sigma"])
    t, rows = sigma / (1 + sigma), (-1, 1, 1, 1)
    z = x / (1 + sigma).reshape(rows)
    out = {"D": _nchw(z - t.reshape(rows) * network.apply(params, z, t, t))}
    if "augment_labels" in arrays:
        label = jnp.asarray(arrays["augment_labels"])
        out["D_aug"] = _nchw(
            z - t.reshape(rows) * network.apply(params, z, t, t, condition=Condition(augment=label))
        )
    return out


def _probe_meanflow(config: UNetConfig, image_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    (size, _, channels), rng = image_shape, np.random.default_rng(0)
    z, v = rng.standard_normal((2, 4, channels, size, size)).astype(np.float32)
    t, r = np.array([[0.01, 0.3, 0.6, 1.0], [0.01, 0.3, 0.25, 0.0]], np.float32)
    label = (
        {"aug_cond": rng.standard_normal((4, config.augment_dim)).astype(np.float32)}
        if config.augment_dim
        else {}
    )
    return {"z": z, "v": v, "t": t, "r": r, **label}


def _probe_edm(config: UNetConfig, image_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    # sigma = 63 is t = 63/64 exactly: near 1, a rounded t would be another sigma, which Fourier features tell apart.
    (size, _, channels), rng = image_shape, np.random.default_rng(0)
    sigma = np.array([0.01, 0.3, 1.0, 63.0], np.float32)
    x = rng.standard_normal((4, channels, size, size)) * np.hypot(0.5, sigma)[:, None, None, None]
    arrays = {
        "x": x.astype(np.float32),
        "sigma": sigma,
        SIGMA_DATA: np.array(config.sigma_data, np.float32),
    }
    label = (
        {"augment_labels": rng.standard_normal((4, config.augment_dim)).astype(np.float32)}
        if config.augment_dim
        else {}
    )
    return {**arrays, **label}


MEANFLOW_UNET = Kind(
    name="meanflow_unet",
    network="unet",
    licence="py-meanflow: CC BY-NC-SA 4.0",
    conventions="ours: t = 1 noise, u = average of e - x; the network sees t and h = t - r. A flow of t alone is exported in "
    "that form too, with zeros for h",
    copies=("net_ema1", "net_ema", "net_ema2", "net"),
    select=_select_meanflow,
    describe=_describe_meanflow,
    rules=_rules_meanflow,
    outputs=_outputs_meanflow,
    torch_outputs=unet_torch.meanflow,
    probe=_probe_meanflow,
)
EDM = Kind(
    name="edm",
    network="unet",
    licence="EDM: CC BY-NC-SA 4.0; ECT: its repository has no licence file that we found, its network code and the weights "
    "that it starts from are EDM's",
    conventions="source: denoiser D(x, sigma); the network's precond 'edm' writes it as the velocity v = (z - D) / t at "
    "x = z / (1 - t), sigma = t / (1 - t). Of ECT it is the denoiser as trained: in evaluation ECT has sigma - 0.003 for "
    "sigma in c_skip and c_out. A consistency model's (ECT) v is u(z, 0, t), the average velocity, and no flow",
    copies=("ema", "net"),
    select=_select_edm,
    describe=_describe_edm,
    rules=_rules_edm,
    outputs=_outputs_edm,
    torch_outputs=unet_torch.edm,
    probe=_probe_edm,
)
