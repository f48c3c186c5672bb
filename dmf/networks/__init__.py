"""The networks u(z, r, t), each behind one pure function apply(params, z, r, t, ...).

All of them depend on r only through h = t - r, except a DiT with interval_input = "r". The layers
that see h, or r, are the interval branch. Their parameters lie under a module named "interval".
With interval_init = "zero" a network starts as a flow model:

    u(z, r, t) = u(z, t, t) = v(z, t)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmf.errors import DmfError
from dmf.method.flow import VELOCITY, Condition
from dmf.networks import layers
from dmf.networks.adm import ADMConfig, make_adm
from dmf.networks.dit import DIT_SIZES, DiTConfig, make_dit
from dmf.networks.dit_dh import DIT_DH_SIZES, DiTDHConfig, make_dit_dh
from dmf.networks.in_context import IN_CONTEXT_SIZES, InContextConfig, make_in_context_dit
from dmf.networks.layers import PLAIN, REMAT, Execution, check_choice
from dmf.networks.mlp import MLPConfig, make_mlp
from dmf.networks.unet import UNetConfig, make_unet

__all__ = [
    "ADMConfig",
    "Condition",
    "DIT_DH_SIZES",
    "DIT_SIZES",
    "DiTConfig",
    "DiTDHConfig",
    "Execution",
    "IN_CONTEXT_SIZES",
    "InContextConfig",
    "MLPConfig",
    "Network",
    "NetworkConfig",
    "Params",
    "UNetConfig",
    "build",
    "freeze_interval",
    "is_head",
    "is_interval_path",
    "without_head",
]

SideOutputs = dict[str, jax.Array]
NetworkConfig = UNetConfig | DiTConfig | MLPConfig | ADMConfig | InContextConfig | DiTDHConfig
Params = dict[str, Any]

KINDS: dict[str, tuple[type, Callable[..., Any]]] = {
    "unet": (UNetConfig, make_unet),
    "dit": (DiTConfig, make_dit),
    "mlp": (MLPConfig, make_mlp),
    "adm": (ADMConfig, make_adm),
    "in_context_dit": (InContextConfig, make_in_context_dit),
    "dit_dh": (DiTDHConfig, make_dit_dh),
}
# Fields of a network's config that do not change what its weights mean.
HEADS: dict[str, Any] = {"logvar": False, "velocity_head": 0}  # of the loss alone, when left out
FREE = ("dropout", "interval_init", *HEADS)


def is_interval_path(path: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to the interval branch, which sees h = t - r."""
    return "interval" in path


class Network(NamedTuple):
    """A network as pure functions.

    init(key) -> params, nested dicts of float32 arrays, complete with and without classes.

    apply(params, z, r, t, *, label=None, condition=None, train=False, rngs=None) -> u

        z          (B, *image_shape)
        r, t       (B,)
        label      (B,) integer classes, short for condition = Condition(label=label)
        condition  a `Condition`; None in it is the null class, or no augmentation
        rngs       (B,) typed keys, one per row, for dropout; only read in training
        u          shaped as z, float32, or float64 if params and inputs are

    Wrong shapes raise DmfError. The values of labels are not checked, because jit cannot. A class
    beyond the end of the label table turns the row into NaN. A negative one counts from the end.

    apply_with_sides(...) -> (u, side outputs by name). Most networks have no side outputs, {}.

    sides: the names of the side outputs. The loss trains them beside u (`objectives.Residuals`).
    Where `apply` alone is used, a compiler leaves them out.

    logvar(params, r, t) -> (B,), the learned log variance of the loss; only with config.logvar.

    is_interval(path) -> whether the parameter at a path belongs to the interval branch.

    dtypes(params) -> the dtype in which each weight is used. It is the compute dtype where the
    weight is cast to it before anything else, and the weight's own elsewhere.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    apply_with_sides: Callable[..., tuple[jax.Array, SideOutputs]]
    is_interval: Callable[[tuple[str, ...]], bool] = is_interval_path
    sides: tuple[str, ...] = ()
    logvar: Callable[[Params, jax.Array, jax.Array], jax.Array] | None = None
    dtypes: Callable[[Params], Any] = lambda params: jax.tree.map(lambda x: x.dtype, params)


def build(
    config: NetworkConfig,
    image_shape: tuple[int, ...],
    dtype: Any = jnp.float32,
    how: Execution = PLAIN,
) -> Network:
    """Build the network for images of `image_shape` (H, W, C). The MLP also takes (D,).

    dtype: of the computation, float32 or bfloat16. These stay float32 in both cases: parameters,
    times, the conditioning vector, softmax, norm statistics, the last layer and u.
    With float32, parameters and inputs in float64 give a computation in float64.

    how: attention kernel, remat and scan. They leave the parameters alone, and change u by
    rounding only. Raises DmfError naming the field that does not fit.
    """
    shape = tuple(image_shape)
    # `plain` makes the weights: a scan over blocks reads weights that are there already.
    plain, module = _module(config, shape, dtype, PLAIN), _module(config, shape, dtype, how)
    row = _one_row(shape, config.augment_dim if isinstance(config, UNetConfig) else 0)

    def init(key: jax.Array) -> Params:
        found = plain.lazy_init(key, *row, None)["params"]
        return {**found, layers.VARIANCE: layers.variance_start()} if config.logvar else found

    def apply_with_sides(
        params: Params,
        z: jax.Array,
        r: jax.Array,
        t: jax.Array,
        *,
        label: jax.Array | None = None,
        condition: Condition | None = None,
        train: bool = False,
        rngs: jax.Array | None = None,
    ) -> tuple[jax.Array, SideOutputs]:
        _check_inputs(config, shape, z, r, t)
        condition = _condition(config, label, condition, z.shape[0])
        keys = _row_keys(config, rngs, z.shape[0]) if train else None
        out = module.apply({"params": params}, z, r, t, condition, keys)
        u, sides = out if isinstance(out, tuple) else (out, {})
        return u.astype(jnp.promote_types(u.dtype, jnp.float32)), sides

    def apply(*args: Any, **how: Any) -> jax.Array:
        return apply_with_sides(*args, **how)[0]

    logvar, dtypes = _logvar if config.logvar else None, partial(_dtypes, plain, row)
    sides = (VELOCITY,) if getattr(config, "velocity_head", 0) else ()
    return Network(init, apply, apply_with_sides, is_interval_path, sides, logvar, dtypes)


def _logvar(params: Params, r: jax.Array, t: jax.Array) -> jax.Array:
    return layers.log_variance(params[layers.VARIANCE], r, t)


def is_head(name: str) -> bool:
    """Whether a module of this name serves the loss alone; name: the first part of a path."""
    return name == layers.VARIANCE or name.startswith("head_")


def without_head(config: Any, params: Params | None = None) -> tuple[Any, Params]:
    """(config, params) of any network without the heads for the loss, which only training reads."""
    kept = {name: x for name, x in (params or {}).items() if not is_head(name)}
    heads = {name: off for name, off in HEADS.items() if getattr(config, name, off) != off}
    return (replace(config, **heads) if heads else config), kept


def _one_row(shape: tuple[int, ...], augment_dim: int) -> tuple[Any, Any, Any, Condition]:
    """Shapes of z, r, t and condition of one row, for tracing. It has no class."""

    def of(*size: int) -> Any:
        return jax.ShapeDtypeStruct(size, jnp.float32)

    condition = Condition(augment=of(1, augment_dim) if augment_dim else None)
    return of(1, *shape), of(1), of(1), condition


def _dtypes(module: Any, row: tuple[Any, ...], params: Params) -> Any:
    """The dtype to which a module casts each weight before anything else, or the weight's own."""

    def u(weights: Params, *row: Any) -> Any:
        return module.apply({"params": weights}, *row, None)

    program = jax.make_jaxpr(u)(params, *row).jaxpr
    leaves, tree = jax.tree.flatten(params)

    def of(leaf: Any, variable: Any) -> Any:
        uses = [e for e in program.eqns if any(v is variable for v in e.invars)]
        cast = uses and all(e.primitive.name == "convert_element_type" for e in uses)
        found = {e.params["new_dtype"] for e in uses} if cast else set()
        return found.pop() if len(found) == 1 else leaf.dtype

    return jax.tree.unflatten(tree, map(of, leaves, program.invars))


def _module(config: NetworkConfig, shape: tuple[int, ...], dtype: Any, how: Execution) -> Any:
    if config.kind not in KINDS or not isinstance(config, KINDS[config.kind][0]):
        raise DmfError(
            f"config.network.kind is {config.kind!r} in a {type(config).__name__}; "
            f"expected one of {', '.join(KINDS)}, each with the config class of its name."
        )
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise DmfError(f"dtype is {jnp.dtype(dtype).name}; expected float32 or bfloat16.")
    # Linen reads None as "follow parameters and inputs", which lets float64 through.
    compute_dtype = None if jnp.dtype(dtype) == jnp.float32 else jnp.bfloat16
    check_choice("config.remat", how.remat, tuple(REMAT))
    if how.scan and not isinstance(config, DiTConfig):
        raise DmfError(
            f"config.scan_blocks is True with network.kind {config.kind!r}; expected False: "
            "only a DiT's blocks are all alike."
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


def _condition(
    config: NetworkConfig, label: jax.Array | None, condition: Condition | None, batch: int
) -> Condition:
    """The condition that a network is given, checked."""
    if label is not None and condition is not None:
        raise DmfError("label and condition are both given; expected one of them.")
    found = Condition(label=label) if condition is None else condition
    told = isinstance(config, InContextConfig) and config.takes_guidance
    classes = config.num_classes
    width = config.augment_dim if isinstance(config, UNetConfig) else 0
    if found.label is not None:
        _check("label", found.label, (batch,) if classes else None, jnp.integer)
    if found.augment is not None:
        _check("augment", found.augment, (batch, width) if width else None, jnp.floating)
    if found.guidance is not None:
        _check("guidance", found.guidance, (batch, 3) if told else None, jnp.floating)
    return found


def _check(name: str, given: jax.Array, shape: tuple[int, ...] | None, number: Any) -> None:
    """Raises DmfError unless a part of the condition has this shape and sort of number."""
    if shape is None:
        raise DmfError(
            f"{name} has shape {given.shape}; expected None: this network has no {name}."
        )
    if given.shape != shape or not jnp.issubdtype(given.dtype, number):
        sort = "integers" if number is jnp.integer else "floats"
        raise DmfError(
            f"{name} has shape {given.shape} of {given.dtype}; expected {shape} of {sort}."
        )


def _row_keys(config: NetworkConfig, rngs: jax.Array | None, batch: int) -> jax.Array | None:
    """The keys dropout uses in training, checked; None where the network has no dropout."""
    if not (isinstance(config, UNetConfig | ADMConfig) and config.dropout > 0):
        return None
    if rngs is None:
        raise DmfError(
            f"rngs is None; expected one key per row, as network.dropout is {config.dropout}."
        )
    if not jnp.issubdtype(rngs.dtype, jax.dtypes.prng_key) or rngs.shape != (batch,):
        raise DmfError(
            f"rngs has shape {rngs.shape} of {rngs.dtype}; expected {(batch,)} of typed keys."
        )
    return rngs


def freeze_interval(params: Any, is_interval: Callable[[tuple[str, ...]], bool]) -> Any:
    """No gradient into the interval branch.

    Pure flow matching leaves the branch at its zero start, so u = v for every r.
    is_interval: the network's, of a parameter's path.
    """

    def freeze(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(x) if is_interval(tuple(p.key for p in path)) else x

    return jax.tree_util.tree_map_with_path(freeze, params)
