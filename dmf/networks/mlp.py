"""A small smooth MLP for flat data: oracles, examples in the plane, tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dmf.errors import DmfError
from dmf.fields import MOST_BLOCKS, WIDEST, choice, limited
from dmf.method.flow import Condition
from dmf.networks import layers

# Radians per unit of time. du/dt grows with the largest, so higher ones cost more than they give.
FREQUENCIES = np.array([1.0, 2.0, 4.0, 8.0])
# Times (B,) as the first layer sees them, (B, n).
TIME_INPUTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "features": partial(layers.time_features, freqs=FREQUENCIES, sin_first=True),
    "raw": lambda time: time[:, None],
}
INITS = ("lecun", "torch")


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """`depth` hidden layers of `width` units.

    With interval_init "zero" a network starts from u(z, r, t) = u(z, t, t). With time_input "raw"
    the first layer gets t and t - r themselves, which span the same functions as t and r.
    """

    num_classes = 0  # no field: this network takes no class
    kind: str = "mlp"  # tells the networks apart
    width: int = limited(128, 1, WIDEST)  # of every hidden layer
    depth: int = limited(3, 1, MOST_BLOCKS)  # hidden layers
    # * zero | random: the branch of t - r at the start
    interval_init: str = choice("zero", layers.INTERVAL_INITS)
    # * features = sines and cosines of the times | raw = the times themselves
    time_input: str = choice("features", TIME_INPUTS)
    # * of the weights: lecun = normal, biases 0 | torch = as PyTorch's layers start, biases too
    init: str = choice("lecun", INITS)
    logvar: bool = False  # a head for the log variance of the loss (`loss.logvar`)


class MLP(nn.Module):
    """u(z, r, t) by an MLP on z and on t and h = t - r, as features or raw."""

    config: MLPConfig
    dtype: jnp.dtype | None

    @nn.compact
    def __call__(
        self,
        z: jax.Array,
        r: jax.Array,
        t: jax.Array,
        condition: Condition,
        rngs: jax.Array | None,
    ) -> jax.Array:
        """Map z (B, ...) and r, t (B,) to u, shaped as z. `condition` and `rngs` are unused."""
        width, flat = self.config.width, z.reshape(z.shape[0], -1)
        seen = TIME_INPUTS[self.config.time_input]
        of_t, of_h = seen(t), seen(t - r)
        # The first layer has three parts. PyTorch's start depends on their inputs together.
        first = _starts(self.config.init, flat.shape[1] + of_t.shape[1] + of_h.shape[1])
        later, kernel = _starts(self.config.init, width), first["kernel_init"]
        interval = kernel if self.config.interval_init == "random" else nn.initializers.zeros
        x = nn.Dense(width, dtype=self.dtype, name="input", **first)(flat)
        x = x + nn.Dense(width, use_bias=False, kernel_init=kernel, name="time")(of_t)
        x = nn.silu(
            x + nn.Dense(width, use_bias=False, kernel_init=interval, name="interval")(of_h)
        )
        for i in range(1, self.config.depth):
            x = nn.silu(nn.Dense(width, dtype=self.dtype, name=f"hidden_{i}", **later)(x))
        x = layers.at_least_float32(x)
        return nn.Dense(math.prod(z.shape[1:]), name="output", **later)(x).reshape(z.shape)


def _starts(name: str, inputs: int) -> dict[str, Any]:
    """How the weights of a layer with so many inputs start, as arguments of `nn.Dense`."""
    if name == "lecun":
        return {"kernel_init": nn.initializers.lecun_normal()}
    bound = inputs**-0.5

    def uniform(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return {"kernel_init": uniform, "bias_init": uniform}


def make_mlp(
    config: MLPConfig, image_shape: tuple[int, ...], dtype: jnp.dtype | None, how: layers.Execution
) -> MLP:
    """The module. Raises DmfError naming the field that does not fit."""
    for size in image_shape:
        layers.check_positive("image_shape", size)
    for field in ("width", "depth"):
        layers.check_positive(f"config.network.{field}", getattr(config, field))
    layers.check_choice("config.network.interval_init", config.interval_init, layers.INTERVAL_INITS)
    layers.check_choice("config.network.init", config.init, INITS)
    layers.check_choice("config.network.time_input", config.time_input, tuple(TIME_INPUTS))
    if how.remat != "none":
        raise DmfError(
            f"config.remat is {how.remat!r} with network.kind 'mlp'; "
            "expected 'none': the MLP has no blocks."
        )
    return MLP(config, dtype)
