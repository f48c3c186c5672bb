"""The networks u(z, r, t), each behind one pure function apply(params, z, r, t, *, label, train, rngs).

All of them depend on r only through h = t - r, and every parameter of that branch lies under a module named
"interval". With interval_init = "zero" a network starts as a flow model: u(z, r, t) = u(z, t, t) = v(z, t).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmf.errors import DmfError
from dmf.networks.adm import ADMConfig, make_adm
from dmf.networks.dit import DIT_SIZES, DiTConfig, make_dit
from dmf.networks.layers import PLAIN, REMAT, Execution, check_choice
from dmf.networks.mlp import MLPConfig, make_mlp
from dmf.networks.unet import UNetConfig, make_unet

__all__ = [
    "ADMConfig",
    "DIT_SIZES",
    "DiTConfig",
    "Execution",
    "MLPConfig",
    "Network",
    "NetworkConfig",
    "Params",
    "UNetConfig",
    "build",
    "is_interval_path",
]

NetworkConfig = UNetConfig | DiTConfig | MLPConfig | ADMConfig
Params = dict[str, Any]

KINDS: dict[str, tuple[type, Callable[..., Any]]] = {
    "unet": (UNetConfig, make_unet),
    "dit": (DiTConfig, make_dit),
    "mlp": (MLPConfig, make_mlp),
    "adm": (ADMConfig, make_adm),
}
# Fields of a network's config that do not change what its weights mean.
FREE = ("dropout", "interval_init")


class Network(NamedTuple):
    """A network as two pure functions.

    init(key) -> params: nested dict of float32 arrays, complete whether or not labels will be given.

    apply(params, z, r, t, *, label=None, train=False, rngs=None) -> u, shaped as z, float32 (float64 if
    params and inputs are). z is (B, *image_shape); r and t are (B,). Wrong shapes raise DmfError.
    `label`: for the U-Net (B, augment_dim) floats, where None adds nothing; for the DiT (B,) integer classes,
    where None is the null class; None for the others. A class outside the table cannot be refused under jit: one
    beyond the end turns its row into NaN, a negative one counts from the end.
    `rngs`: one typed key per row, (B,), for dropout when `train`; ignored otherwise.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]


def is_interval_path(path: tuple[str, ...]) -> bool:
    """Whether the parameter at `path` belongs to the interval branch, the one that sees h = t - r."""
    return "interval" in path


def build(
    config: NetworkConfig,
    image_shape: tuple[int, ...],
    dtype: Any = jnp.float32,
    how: Execution = PLAIN,
) -> Network:
    """Build the network for images of `image_shape` (H, W, C); the MLP also takes (D,), and z flat or not.

    `how`: attention kernel, remat and scan; init and the tree of parameters do not depend on it, nor does u, but for rounding.
    `dtype` is the compute dtype, float32 or bfloat16. Parameters, times, the conditioning vector, softmax,
    norm statistics, the last layer and u are float32 in both cases; with float32, parameters and inputs in
    float64 give a computation in float64. Raises DmfError naming the field that does not fit.
    """
    shape = tuple(image_shape)
    plain, module = _module(config, shape, dtype, PLAIN), _module(config, shape, dtype, how)
    augment_dim = config.augment_dim if isinstance(config, UNetConfig) else 0

    def init(key: jax.Array) -> Params:
        z, time = (
            jax.ShapeDtypeStruct((1, *shape), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.float32),
        )
        label = jax.ShapeDtypeStruct((1, augment_dim), jnp.float32) if augment_dim else None
        return plain.lazy_init(key, z, time, time, label, None)["params"]

    def apply(
        params: Params,
        z: jax.Array,
        r: jax.Array,
        t: jax.Array,
        *,
        label: jax.Array | None = None,
        train: bool = False,
        rngs: jax.Array | None = None,
    ) -> jax.Array:
        _check_inputs(config, shape, z, r, t)
        if label is not None:
            _check_label(config, label, z.shape[0])
        keys = _row_keys(config, rngs, z.shape[0]) if train else None
        u = module.apply({"params": params}, z, r, t, label, keys)
        return u.astype(jnp.promote_types(u.dtype, jnp.float32))

    return Network(init, apply)


def _module(config: NetworkConfig, shape: tuple[int, ...], dtype: Any, how: Execution) -> Any:
    if config.kind not in KINDS or not isinstance(config, KINDS[config.kind][0]):
        raise DmfError(
            f"config.network.kind is {config.kind!r} in a {type(config).__name__}; expected one of "
            f"{', '.join(KINDS)}, each with the config class of its name."
        )
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise DmfError(f"dtype is {jnp.dtype(dtype).name}; expected float32 or bfloat16.")
    # Linen reads None as "follow parameters and inputs", which lets float64 through.
    compute_dtype = None if jnp.dtype(dtype) == jnp.float32 else jnp.bfloat16
    check_choice("config.remat", how.remat, tuple(REMAT))
    if how.scan and not isinstance(config, DiTConfig):
        raise DmfError(
            f"config.scan_blocks is True with network.kind {config.kind!r}; expected False: only a DiT's blocks are all alike."
        )
    return KINDS[config.kind][1](config, shape, compute_dtype, how)


def _check_inputs(
    config: NetworkConfig, shape: tuple[int, ...], z: jax.Array, r: jax.Array, t: jax.Array
) -> None:
    flat = isinstance(config, MLPConfig) and z.shape[1:] == (math.prod(shape),)
    if z.shape[1:] != shape and not flat:
        raise DmfError(f"z has shape {z.shape}; expected (B, {', '.join(map(str, shape))}).")
    for name, time in (("r", r), ("t", t)):
        if np.shape(time) != z.shape[:1]:
            raise DmfError(
                f"{name} has shape {np.shape(time)}; expected one time per row, {z.shape[:1]}."
            )


def _check_label(config: NetworkConfig, label: jax.Array, batch: int) -> None:
    if isinstance(config, UNetConfig) and config.augment_dim:
        shape: tuple[int, ...] = (batch, config.augment_dim)
        fits, name = jnp.issubdtype(label.dtype, jnp.floating), "floats"
    elif isinstance(config, DiTConfig) and config.num_classes:
        shape = (batch,)
        fits, name = jnp.issubdtype(label.dtype, jnp.integer), "integers"
    else:
        raise DmfError(f"label has shape {label.shape}; expected None: this network has no labels.")
    if label.shape != shape or not fits:
        raise DmfError(
            f"label has shape {label.shape} of {label.dtype}; expected {shape} of {name}."
        )


def _row_keys(config: NetworkConfig, rngs: jax.Array | None, batch: int) -> jax.Array | None:
    """The keys dropout uses in training, checked; None where the network has no dropout."""
    if not (isinstance(config, UNetConfig | ADMConfig) and config.dropout > 0):
        return None
    if rngs is None:
        raise DmfError(
            f"rngs is None; expected one key per row, since network.dropout is {config.dropout}."
        )
    if not jnp.issubdtype(rngs.dtype, jax.dtypes.prng_key) or rngs.shape != (batch,):
        raise DmfError(
            f"rngs has shape {rngs.shape} of {rngs.dtype}; expected {(batch,)} of typed keys."
        )
    return rngs
