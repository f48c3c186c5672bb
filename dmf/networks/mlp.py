"""A small smooth MLP for flat data: oracles, examples in the plane, tests."""

from __future__ import annotations

import math
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """`depth` hidden layers of `width` units.

    interval_init "zero" starts from u(z, r, t) = u(z, t, t).
    """

    num_classes = 0  # no field: this network takes no class
    kind: str = "mlp"  # tells the networks apart
    width: int = limited(128, 1, WIDEST)  # of every hidden layer
    depth: int = limited(3, 1, MOST_BLOCKS)  # hidden layers
    # * zero | random: the branch of t - r at the start
    interval_init: str = choice("zero", layers.INTERVAL_INITS)
    logvar: bool = False  # a head for the log variance of the loss (`loss.logvar`)


class MLP(nn.Module):
    """u(z, r, t) by an MLP on z and the sine-cosine features of t and of h = t - r."""

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
        width = self.config.width
        of_t = layers.time_features(t, FREQUENCIES, sin_first=True)
        of_h = layers.time_features(t - r, FREQUENCIES, sin_first=True)
        init = nn.initializers.lecun_normal()
        interval_init = init if self.config.interval_init == "random" else nn.initializers.zeros
        x = nn.Dense(width, dtype=self.dtype, name="input")(z.reshape(z.shape[0], -1))
        x = x + nn.Dense(width, use_bias=False, name="time")(of_t)
        x = nn.silu(
            x + nn.Dense(width, use_bias=False, kernel_init=interval_init, name="interval")(of_h)
        )
        for i in range(1, self.config.depth):
            x = nn.silu(nn.Dense(width, dtype=self.dtype, name=f"hidden_{i}")(x))
        x = layers.at_least_float32(x)
        return nn.Dense(math.prod(z.shape[1:]), name="output")(x).reshape(z.shape)


def make_mlp(
    config: MLPConfig, image_shape: tuple[int, ...], dtype: jnp.dtype | None, how: layers.Execution
) -> MLP:
    """The module. Raises DmfError naming the field that does not fit."""
    for size in image_shape:
        layers.check_positive("image_shape", size)
    for field in ("width", "depth"):
        layers.check_positive(f"config.network.{field}", getattr(config, field))
    layers.check_choice("config.network.interval_init", config.interval_init, layers.INTERVAL_INITS)
    if how.remat != "none":
        raise DmfError(
            f"config.remat is {how.remat!r} with network.kind 'mlp'; "
            "expected 'none': the MLP has no blocks."
        )
    return MLP(config, dtype)
