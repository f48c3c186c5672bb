"""EDM's and ECT's preconditioned networks, DDPM++ and NCSN++, without classes.

EDM's network has no features of t - r, so our interval layer is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dmf.convert import song_unet, song_unet_torch
from dmf.convert.kind import (
    TRAINING,
    Fact,
    Kind,
    Shape,
    Tensors,
    axes,
    expect,
    fact_of,
    nchw,
    nhwc,
    pick_copy,
)
from dmf.convert.rules import Arrays, Rule, mirrored, unread
from dmf.errors import DmfError
from dmf.networks import Condition, UNetConfig
from dmf.storage.readers.tree import Inert, Tensor, flatten, module_tensors, strip_prefix

NAME = "edm"
COPIES = ("ema", "net")
PREFIX = "model."  # of every tensor, in EDM's and ECT's wrappers around the network
SIGMA_DATA = "sigma_data"  # an attribute of the wrapper; `_select` puts it beside the tensors
WRAPPERS = ("EDMPrecond", "ECMPrecond")
ECT_EVAL = "ect_eval"  # 1 takes ECT's denoiser in its form of evaluation
GIVEN = {"dropout": 0.13, SIGMA_DATA: 0.5, ECT_EVAL: 0}  # the first two as trained on CIFAR-10
FIELDS: dict[str, Any] = {"kind": "unet", "time_input": "log_sigma", "precond": "edm"}


def _select(tree: Any, which: str) -> tuple[dict[str, Tensor], str]:
    held = tree if isinstance(tree, Mapping) else {"net": tree}
    found = [copy for copy in COPIES if isinstance(held.get(copy), Inert | Mapping)]
    copy = pick_copy(which, found or ["net"])
    module = held.get(copy, tree)
    if isinstance(module, Inert):
        return _unwrapped(module), copy
    tensors = strip_prefix(flatten(module))
    bare = {name for name in tensors if name != SIGMA_DATA and not name.startswith(PREFIX)}
    return {PREFIX + name if name in bare else name: x for name, x in tensors.items()}, copy


def _unwrapped(module: Inert) -> dict[str, Tensor]:
    """The tensors of a pickled wrapper, and its sigma_data. Raises DmfError."""
    if module.class_name not in WRAPPERS:
        raise DmfError(
            f"the network is a {module.class_name}: expected {' or '.join(WRAPPERS)}, "
            "for no other denoiser is written as a velocity here"
        )
    value = module.state.get(SIGMA_DATA, GIVEN[SIGMA_DATA])
    if not isinstance(value, int | float):
        raise DmfError(f"{SIGMA_DATA} of the network is {value!r:.40}: expected a number")
    sigma = Tensor((), np.dtype(np.float64), lambda: np.array(value, np.float64))
    return {**module_tensors(module), SIGMA_DATA: sigma}


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[UNetConfig, Shape]:
    values = song_unet.numbers(given, GIVEN, NAME)
    ect = values.pop(ECT_EVAL)
    if ect not in (0, 1):
        raise DmfError(f"--set={ECT_EVAL}={ect:g}: expected 1 for ECT's evaluation, else 0")
    if f"{PREFIX}map_label.weight" in tensors:
        classes = tensors[f"{PREFIX}map_label.weight"].shape[-1]
        raise DmfError(
            f"the network is conditioned on {classes} classes: "
            "expected an unconditional one, as our U-Net takes no class"
        )
    fields, shape = song_unet.structure(tensors, NAME, PREFIX)
    columns = axes(tensors, f"{PREFIX}map_layer0.weight", 2, NAME)[1]
    if columns % fields["channels"]:
        raise DmfError(
            f"tensor {PREFIX}map_layer0.weight has {columns} columns: "
            f"expected a multiple of {fields['channels']}"
        )
    if SIGMA_DATA in tensors and SIGMA_DATA not in given:
        values[SIGMA_DATA] = float(tensors[SIGMA_DATA].read())
    config = UNetConfig(
        **fields,
        **values,
        resample=song_unet.resample(tensors, len(fields["channel_mult"]), NAME),
        residual_encoder=any("_aux_residual." in name for name in tensors),
        embedding="fourier" if f"{PREFIX}map_noise.freqs" in tensors else "positional",
        embedding_mult=columns // fields["channels"],
        **FIELDS | {"precond": "ect" if ect else "edm"},
    )
    return config, shape


def _rules(config: UNetConfig, image_shape: Shape, tensors: Tensors | None) -> list[Rule]:
    # The tensors are the same in both forms of ECT.
    expect(config, NAME, FIELDS | ({"precond": "ect"} if config.precond == "ect" else {}))
    leaves = song_unet.leaves_of(config, image_shape)
    packed = [
        _deinterleaved(mirrored(leaf, ndim, PREFIX))
        for leaf, ndim in leaves.items()
        if "/qkv/" in leaf
    ]
    special = [*song_unet.one_time(config, tensors, PREFIX), *packed]
    rules = song_unet.completed(special, leaves, config.resample, PREFIX)
    if SIGMA_DATA in tensors if tensors else config.sigma_data != GIVEN[SIGMA_DATA]:
        note = f"an attribute of the wrapper: network.sigma_data = {config.sigma_data}"
        rules.append(unread(SIGMA_DATA, lambda: np.array(config.sigma_data), note))
    return rules


def _deinterleaved(rule: Rule) -> Rule:
    """The same rule for rows q0 k0 v0 q1 k1 v1 ... in the file, q ... k ... v ... in the leaf."""

    def forward(x: np.ndarray) -> Arrays:
        return rule.forward(x.reshape(-1, 3, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape))

    def backward(x: np.ndarray) -> Arrays:
        (y,) = rule.backward(x)
        return (y.reshape(3, -1, *y.shape[1:]).swapaxes(0, 1).reshape(y.shape),)

    note = "query, key and value are interleaved in the file"
    return rule._replace(forward=forward, backward=backward, note=note)


def _outputs(network: Any, params: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """D = z - t v. The velocity is part of it, so the check covers the wrapper too."""
    if not {"x", "sigma"} <= set(arrays):
        return {}
    x, sigma = nhwc(arrays["x"]), jnp.asarray(arrays["sigma"])
    t, rows = sigma / (1 + sigma), (-1, 1, 1, 1)
    z = x / (1 + sigma).reshape(rows)
    out = {"D": nchw(z - t.reshape(rows) * network.apply(params, z, t, t))}
    if "augment_labels" in arrays:
        label = Condition(augment=jnp.asarray(arrays["augment_labels"]))
        v = network.apply(params, z, t, t, condition=label)
        out["D_aug"] = nchw(z - t.reshape(rows) * v)
    return out


def _probe(config: UNetConfig, image_shape: Shape) -> dict[str, np.ndarray]:
    # sigma = 63 is exactly t = 63 / 64. A rounded t near 1 would be another sigma,
    # and Fourier features see the difference.
    (size, _, channels), rng = image_shape, np.random.default_rng(0)
    sigma = np.array([0.01, 0.3, 1.0, 63.0], np.float32)
    x = rng.standard_normal((4, channels, size, size)) * np.hypot(0.5, sigma)[:, None, None, None]
    arrays = {"x": x.astype(np.float32), "sigma": sigma}
    arrays[SIGMA_DATA] = np.array(config.sigma_data, np.float32)
    arrays[ECT_EVAL] = np.array(config.precond == "ect", np.float32)
    if config.augment_dim:
        labels = rng.standard_normal((4, config.augment_dim))
        arrays["augment_labels"] = labels.astype(np.float32)
    return arrays


def _is_ect(precond: str) -> int:
    return int(("edm", "ect").index(precond))


EDM = Kind(
    name=NAME,
    network="unet",
    licence=(
        "EDM: CC BY-NC-SA 4.0; ECT: its repository has no licence file that we found, "
        "its network code and the weights that it starts from are EDM's"
    ),
    conventions=(
        "source: denoiser D(x, sigma); the network's precond 'edm' writes it as the velocity "
        "v = (z - D) / t at x = z / (1 - t), sigma = t / (1 - t). "
        "For ECT, D is the denoiser as trained. In evaluation, which --set=ect_eval=1 takes, "
        "c_skip = s^2 / ((sigma - .003)^2 + s^2) and "
        "c_out = (sigma - .003) s / sqrt(sigma^2 + s^2): the root keeps sigma. "
        "A consistency model (ECT) is no flow: its v is u(z, 0, t), the average velocity"
    ),
    copies=COPIES,
    select=_select,
    describe=_describe,
    rules=_rules,
    outputs=_outputs,
    torch_outputs=song_unet_torch.edm,
    probe=_probe,
    facts=(
        fact_of("dropout", note=TRAINING),
        fact_of(SIGMA_DATA, told=lambda tensors: SIGMA_DATA in tensors),
        Fact(ECT_EVAL, lambda config, _: int(config.precond == "ect"), {"precond": _is_ect}),
    ),
    hint="outputs of ECT in evaluation need --set=ect_eval=1",
)
