"""EDM's and ECT's preconditioned networks, DDPM++ and NCSN++, with and without classes.

EDM's network has no features of t - r, so our interval layer is zero.
Its label layer acts on sqrt(n) times the one-hot label, and on zeros for the null class. Our
table holds the results, a row for each of the n classes and one for the null class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dmf.convert import song_unet, song_unet_torch
from dmf.convert.copies import Copies
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
)
from dmf.convert.rules import Arrays, Rule, mirrored, unread
from dmf.errors import DmfError
from dmf.networks import Condition, UNetConfig
from dmf.storage.readers.tree import Inert, Tensor, module_tensors

NAME = "edm"
COPIES = Copies(r"(?:model\.)?map_layer0\.weight", (("ema", "ema"), ("net", "net")), "net")
PREFIX = "model."  # of every tensor, in EDM's and ECT's wrappers around the network
SIGMA_DATA = "sigma_data"  # an attribute of the wrapper; `_select` puts it beside the tensors
# An attribute of the network, put beside the tensors too: the share of rows without a class.
LABEL_DROPOUT = "label_dropout"
BESIDE = (SIGMA_DATA, LABEL_DROPOUT)
TABLE = "map_label/embedding_table/embedding"
WRAPPERS = ("EDMPrecond", "ECMPrecond")
ECT_EVAL = "ect_eval"  # 1 takes ECT's denoiser in its form of evaluation
GIVEN = {"dropout": 0.13, SIGMA_DATA: 0.5, ECT_EVAL: 0}  # the first two as trained on CIFAR-10
FIELDS: dict[str, Any] = {"kind": "unet", "time_input": "log_sigma", "precond": "edm"}


def _select(tree: Any, which: str) -> tuple[dict[str, Tensor], str]:
    tensors, copy = COPIES.select(tree, which, _unwrapped)
    bare = {name for name in tensors if name not in BESIDE and not name.startswith(PREFIX)}
    return {PREFIX + name if name in bare else name: x for name, x in tensors.items()}, copy


def _unwrapped(module: Inert) -> dict[str, Tensor]:
    """The tensors of a pickled wrapper, and its sigma_data. Raises DmfError."""
    if module.class_name not in WRAPPERS:
        raise DmfError(
            f"the network is a {module.class_name}: expected {' or '.join(WRAPPERS)}, "
            "for no other denoiser is written as a velocity here"
        )
    tensors = module_tensors(module)
    inner = module.state["_modules"].get("model")
    held = inner.state if isinstance(inner, Inert) else {}
    if isinstance(inner, Inert) and inner.class_name == "DhariwalUNet":
        raise DmfError("the network is a DhariwalUNet, ADM's: expected a SongUNet")
    tensors[SIGMA_DATA] = _attribute(module.state, SIGMA_DATA, GIVEN[SIGMA_DATA])
    if LABEL_DROPOUT in held and f"{PREFIX}map_label.weight" in tensors:
        tensors[LABEL_DROPOUT] = _attribute(held, LABEL_DROPOUT, 0)
    return tensors


def _attribute(state: Mapping[str, Any], name: str, default: float) -> Tensor:
    """A number among a module's fields, as a tensor. Raises DmfError."""
    value = state.get(name, default)
    if not isinstance(value, int | float):
        raise DmfError(f"{name} of the network is {value!r:.40}: expected a number")
    return Tensor((), np.dtype(np.float64), lambda: np.array(value, np.float64))


def _describe(tensors: Tensors, given: Mapping[str, Any]) -> tuple[UNetConfig, Shape]:
    values = song_unet.numbers(given, GIVEN, NAME)
    ect = values.pop(ECT_EVAL)
    if ect not in (0, 1):
        raise DmfError(f"--set={ECT_EVAL}={ect:g}: expected 1 for ECT's evaluation, else 0")
    label = f"{PREFIX}map_label.weight"
    classes = axes(tensors, label, 2, NAME)[1] if label in tensors else 0
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
        num_classes=classes,
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
    special += [_label_table(config.num_classes)] if config.num_classes else []
    rules = song_unet.completed(special, leaves, config.resample, PREFIX)
    if SIGMA_DATA in tensors if tensors else config.sigma_data != GIVEN[SIGMA_DATA]:
        note = f"an attribute of the wrapper: network.sigma_data = {config.sigma_data}"
        rules.append(unread(SIGMA_DATA, lambda: np.array(config.sigma_data), note))
    if tensors and LABEL_DROPOUT in tensors:
        share = float(tensors[LABEL_DROPOUT].read())
        note = f"the network was trained without a class on {share:g} of the rows"
        note += "" if share else ": no guidance can rely on its null class"
        rules.append(unread(LABEL_DROPOUT, lambda: np.array(share), note))
    return rules


def _label_table(classes: int) -> Rule:
    """The layer of n classes <-> the table of n + 1 rows, sqrt(n) W[:, k] + b and b."""
    names = tuple(f"{PREFIX}map_label.{part}" for part in ("weight", "bias"))
    root = np.sqrt(np.float64(classes))

    def forward(weight: np.ndarray, bias: np.ndarray) -> Arrays:
        rows = root * weight.T.astype(np.float64) + bias
        return (np.concatenate((rows, bias[None].astype(np.float64))).astype(np.float32),)

    def backward(table: np.ndarray) -> Arrays:
        rows, bias = table[:-1].astype(np.float64), table[-1]
        return (((rows - bias) / root).T.astype(np.float32), bias)

    note = f"a row for each class, sqrt({classes}) W[:, k] + b, and b for the null class"
    return Rule(names, (TABLE,), forward, backward, note)


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
    """D = z - t v. The velocity is part of it, so the check covers the wrapper too.

    class_labels: one-hot rows (B, n), or zeros for the null class.
    """
    if not {"x", "sigma"} <= set(arrays):
        return {}
    x, sigma = nhwc(arrays["x"]), jnp.asarray(arrays["sigma"])
    t, rows = sigma / (1 + sigma), (-1, 1, 1, 1)
    z = x / (1 + sigma).reshape(rows)
    chosen = Condition()
    if "class_labels" in arrays:
        hot = jnp.asarray(arrays["class_labels"])
        chosen = Condition(jnp.where(hot.any(axis=1), hot.argmax(axis=1), hot.shape[1]))
    v = network.apply(params, z, t, t, condition=chosen)
    out = {"D": nchw(z - t.reshape(rows) * v)}
    if "augment_labels" in arrays:
        label = chosen._replace(augment=jnp.asarray(arrays["augment_labels"]))
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
    if config.num_classes:  # the last row is the null class
        hot = np.eye(config.num_classes + 1, config.num_classes, dtype=np.float32)
        arrays["class_labels"] = hot[[0, config.num_classes // 2, config.num_classes - 1, -1]]
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
