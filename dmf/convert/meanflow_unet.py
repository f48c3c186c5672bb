"""MeanFlow's CIFAR-10 U-Net (PyTorch), and a flow model in the same network.

Its first layer acts on [features of t | features of t - r].
The two blocks of its columns are our map_layer0 and interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmf.convert import song_unet, song_unet_torch
from dmf.convert.copies import Copies
from dmf.convert.kind import (
    TRAINING,
    Kind,
    Shape,
    Tensors,
    axes,
    expect,
    fact_of,
    nchw,
    nhwc,
)
from dmf.convert.rules import Arrays, Rule
from dmf.errors import DmfError
from dmf.networks import Condition, UNetConfig

NAME = "meanflow_unet"
NAMES = ("net_ema1", "net_ema", "net_ema2", "net")
COPIES = Copies(r"map_layer0\.weight", tuple((name, name) for name in NAMES), "net")
GIVEN = {"dropout": 0.2}  # as trained on CIFAR-10
FIELDS: dict[str, Any] = {
    "kind": "unet",
    "residual_encoder": False,
    "embedding": "positional",
    "embedding_mult": 2,
    "time_input": "t",
    "time_scale": 1.0,
    "precond": "none",
    "num_classes": 0,
}
LAYER0 = "map_layer0.weight"


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[UNetConfig, Shape]:
    values = song_unet.numbers(given, GIVEN, NAME)
    fields, shape = song_unet.structure(tensors, NAME)
    width = 2 * fields["channels"]
    columns = axes(tensors, LAYER0, 2, NAME)[1]
    if columns not in (width, 2 * width):
        raise DmfError(
            f"tensor {LAYER0} has {columns} columns: "
            f"expected {2 * width}, for t and t - r, or {width}, for t alone"
        )
    resample = song_unet.resample(tensors, len(fields["channel_mult"]), NAME)
    return UNetConfig(**fields, **values, **FIELDS, resample=resample), shape


def _rules(config: UNetConfig, image_shape: Shape, tensors: Tensors | None) -> list[Rule]:
    expect(config, NAME, FIELDS)
    leaves = song_unet.leaves_of(config, image_shape)
    if tensors and tensors[LAYER0].shape[1] == config.noise_width:
        one = song_unet.one_time(config, tensors)
        return song_unet.completed(one, leaves, config.resample)

    def join(of_t: np.ndarray, of_h: np.ndarray) -> Arrays:
        return (np.concatenate((of_t, of_h)).T,)

    note = "split in its columns for t and for t - r"
    halves = ("map_layer0/kernel", "interval/kernel")
    both = Rule((LAYER0,), halves, lambda w: np.split(w.T, 2), join, note)
    return song_unet.completed([both], leaves, config.resample)


def _outputs(network: Any, params: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """u without a label; with aug_cond also u with it; with v its derivative along (v, 0, 1)."""
    if not {"z", "t"} <= set(arrays) or not {"r", "h"} & set(arrays):
        return {}
    z, t = nhwc(arrays["z"]), jnp.asarray(arrays["t"])
    r = jnp.asarray(arrays["r"]) if "r" in arrays else t - jnp.asarray(arrays["h"])
    out = {"u_noaug": nchw(network.apply(params, z, r, t))}
    if "aug_cond" not in arrays:
        return out
    label = Condition(augment=jnp.asarray(arrays["aug_cond"]))

    def labelled(z: jax.Array, t: jax.Array) -> jax.Array:
        return network.apply(params, z, r, t, condition=label)

    if "v" not in arrays:
        return {**out, "u_aug": nchw(labelled(z, t))}
    u, dudt = jax.jvp(labelled, (z, t), (nhwc(arrays["v"]), jnp.ones_like(t)))
    return {**out, "u_aug": nchw(u), "dudt_aug": nchw(dudt)}


def _probe(config: UNetConfig, image_shape: Shape) -> dict[str, np.ndarray]:
    (size, _, channels), rng = image_shape, np.random.default_rng(0)
    z, v = rng.standard_normal((2, 4, channels, size, size)).astype(np.float32)
    t, r = np.array([[0.01, 0.3, 0.6, 1.0], [0.01, 0.3, 0.25, 0.0]], np.float32)
    arrays = {"z": z, "v": v, "t": t, "r": r}
    if config.augment_dim:
        arrays["aug_cond"] = rng.standard_normal((4, config.augment_dim)).astype(np.float32)
    return arrays


MEANFLOW_UNET = Kind(
    name=NAME,
    network="unet",
    licence="py-meanflow: CC BY-NC-SA 4.0",
    conventions=(
        "ours: t = 1 noise, u = average of e - x; the network sees t and h = t - r; "
        "a flow of t alone is exported in this form too, with zeros for h"
    ),
    select=COPIES.select,
    describe=_describe,
    rules=_rules,
    outputs=_outputs,
    torch_outputs=song_unet_torch.meanflow,
    probe=_probe,
    facts=(fact_of("dropout", note=TRAINING),),
    time="noise_at_1",
    sign="noise_minus_data",
)
