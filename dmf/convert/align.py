"""A new embedding for a pretrained U-Net with another form of time.

It is the alignment of Re-MeanFlow (arXiv 2511.23342).
In a network of ln(sigma), of 999 t or of high random frequencies, du/dt is as steep as the
embedding. MeanFlow's form takes raw t. Its layers are fitted to the output of the old ones,

    min E_t |emb_new(t, t) - emb_old(t, t)|^2,   t ~ U(0, 1)

The rest of the network stays as it is.
The layer `interval` stays zero, so u ignores r exactly, as the flow does.

The old embedding may be capped: sigma = t / (1 - t) stays within [0.002, 80].
The new one learns the cap too, for a single step starts there, at t = 1.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dmf import networks
from dmf.errors import DmfError
from dmf.networks import Condition, UNetConfig
from dmf.networks.unet import UNet

STEPS = 10_000
BATCH = 1024
CHUNK = 100  # steps between two calls of `progress`
GRID = 1001  # times of the report, evenly over [0, 1]
ROWS = 4  # random inputs of the report
FORM: dict[str, Any] = {
    "embedding": "positional",
    "embedding_mult": 2,
    "time_input": "t",
    "time_scale": 1.0,
}
# The whole embedding.
OLD = ("map_noise", "map_augment", "map_label", "map_layer0", "map_layer1", "interval")

Params = dict[str, Any]
Report = dict[str, float | int]


def align(
    config: UNetConfig,
    params: Params,
    steps: int = STEPS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[UNetConfig, Params, Report]:
    """Replaces the embedding of a flow by one of MeanFlow's form; all other leaves stay.

    Adam runs at 1e-3 on batches of 1024 times.
    Where the network takes an augmentation label, half of a batch has a standard normal one.
    Classes, where there are any, are drawn evenly, the null class among them.
    The result depends on `seed` alone. progress(done, total) counts steps.

    The report holds relative L2 errors:

    - of the embedding, before and after: mean and max over an even grid of t, and at t = 1;
    - of u on random inputs: relative_change_of_u.

    Raises DmfError where nothing can be aligned, or the network has learnt r already.
    """
    check(config, steps)
    if np.any(params["interval"]["kernel"]):
        raise DmfError(
            "the network has learnt to see r (its interval layer is not zero): "
            "expected a flow, which sees t alone"
        )
    new_config = dataclasses.replace(config, **FORM)
    key, given = jax.random.key(seed), _conditions(config, 1)
    first = jax.random.fold_in(key, 0)
    start = UNet(new_config, None).init(first, None, *jnp.zeros((2, 1)), given, None)["params"]
    interval = jnp.zeros_like(start.pop("interval")["kernel"])
    if config.augment_dim:  # no label reaches the features of t - r, as in the old embedding
        kernel = start["map_augment"]["kernel"]
        start["map_augment"]["kernel"] = kernel.at[:, new_config.noise_width :].set(0.0)
    with jax.default_matmul_precision("highest"):
        draws = jax.random.fold_in(key, 1)
        fitted = _regress(config, new_config, params, (start, interval), steps, draws, progress)
        found = _with_interval(fitted, interval)
        before = _errors(config, params, new_config, _with_interval(start, interval))
        after = _errors(config, params, new_config, found)
        new = {**{name: x for name, x in params.items() if name not in OLD}, **found}
        change = _change_of_u(config, params, new_config, new)
    report: Report = {"steps": steps, "batch": BATCH, "seed": seed}
    report |= {f"embedding_error_{name}_before": x for name, x in before.items()}
    report |= {f"embedding_error_{name}_after": x for name, x in after.items()}
    return new_config, new, {**report, "relative_change_of_u": change}


def check(config: Any, steps: int) -> None:
    """Raises DmfError where a network of this config cannot be aligned."""
    if not isinstance(config, UNetConfig):
        raise DmfError(
            f"network.kind is {config.kind!r}: "
            "expected 'unet', the only network whose embedding can be aligned"
        )
    if all(getattr(config, field) == value for field, value in FORM.items()):
        form = ", ".join(f"{field} {value!r}" for field, value in FORM.items())
        raise DmfError(
            f"the network needs no alignment: its embedding has the form already ({form})"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise DmfError(f"steps is {steps!r}: expected an integer of at least 1")


def _conditions(config: UNetConfig, rows: int) -> Condition:
    """No augmentation, and every class in turn."""
    label = jnp.arange(rows) % (config.num_classes + 1) if config.num_classes else None
    augment = jnp.zeros((rows, config.augment_dim)) if config.augment_dim else None
    return Condition(label, augment)


def _with_interval(layers: Params, interval: jax.Array) -> Params:
    return {**layers, "interval": {"kernel": interval}}


def _embed(config: UNetConfig, params: Params, t: jax.Array, given: Condition) -> jax.Array:
    """The network's embedding (B, 4 * channels) of an empty interval at t (B,)."""
    network: Any = UNet(config, None)
    return network.apply({"params": params}, None, t, t, given, None)


def _regress(
    config: UNetConfig,
    new_config: UNetConfig,
    params: Params,
    start: tuple[Params, jax.Array],
    steps: int,
    key: jax.Array,
    progress: Callable[[int, int], None] | None,
) -> Params:
    """The layers after `steps` steps of Adam; step i draws with fold_in(key, i).

    start: the new layers and the interval layer of zeros.
    """
    adam = optax.adam(1e-3, b2=0.99)  # b2 as in Re-MeanFlow's code
    layers, interval = start
    old = {name: params[name] for name in OLD if name in params}

    def step(carry: tuple[Params, Any], key: jax.Array) -> tuple[tuple[Params, Any], None]:
        t, given = _draw(config, key)

        def loss(layers: Params) -> jax.Array:
            found = _embed(new_config, _with_interval(layers, interval), t, given)
            return jnp.mean((found - _embed(config, old, t, given)) ** 2)

        layers, state = carry
        updates, state = adam.update(jax.grad(loss)(layers), state)
        return (optax.apply_updates(layers, updates), state), None

    @jax.jit
    def chunk(carry: tuple[Params, Any], numbers: jax.Array) -> tuple[Params, Any]:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        return jax.lax.scan(step, carry, keys)[0]

    carry = layers, adam.init(layers)
    for done in range(0, steps, CHUNK):
        last = min(done + CHUNK, steps)
        carry = chunk(carry, jnp.arange(done, last))
        if progress is not None:
            jax.block_until_ready(carry)
            progress(last, steps)
    return carry[0]


def _draw(config: UNetConfig, key: jax.Array) -> tuple[jax.Array, Condition]:
    """Times and conditions of one batch."""
    of_time, of_label, of_row = jax.random.split(key, 3)
    t, label, augment = jax.random.uniform(of_time, (BATCH,)), None, None
    if config.augment_dim:
        drawn = jax.random.normal(of_label, (BATCH, config.augment_dim))
        augment = jax.random.bernoulli(of_row, 0.5, (BATCH, 1)) * drawn
    if config.num_classes:
        of_class = jax.random.fold_in(key, 0)
        label = jax.random.randint(of_class, (BATCH,), 0, config.num_classes + 1)
    return t, Condition(label, augment)


def _errors(
    config: UNetConfig, params: Params, new_config: UNetConfig, new: Params
) -> dict[str, float]:
    """|emb_new - emb_old| / |emb_old| without augmentation, with every class in turn.

    The values are the mean and the maximum over the grid of t, and the error at t = 1.
    """
    t, given = jnp.linspace(0.0, 1.0, GRID), _conditions(config, GRID)
    old = _embed(config, params, t, given)
    change = jnp.linalg.norm(_embed(new_config, new, t, given) - old, axis=1)
    error = change / jnp.linalg.norm(old, axis=1)
    return {"mean": float(error.mean()), "max": float(error.max()), "at_1": float(error[-1])}


def _change_of_u(config: UNetConfig, params: Params, new_config: UNetConfig, new: Params) -> float:
    """|u_new - u_old| / |u_old| on random z, at times evenly over [0, 1]."""
    shape = _image_shape(params)
    z = jax.random.normal(jax.random.key(0), (ROWS, *shape))
    t, label = jnp.linspace(0.0, 1.0, ROWS), _conditions(config, ROWS).label
    old = networks.build(config, shape).apply(params, z, t, t, label=label)
    change = networks.build(new_config, shape).apply(new, z, t, t, label=label) - old
    return math.sqrt(float(jnp.sum(change**2) / jnp.sum(old**2)))


def _image_shape(params: Params) -> tuple[int, int, int]:
    """The shape of the images, from the name and the kernel of the first convolution."""
    name = next(name for name in params["enc"] if re.fullmatch(r"(\d+)x\1_conv", name))
    size = int(name.partition("x")[0])
    return size, size, params["enc"][name]["kernel"].shape[2]
