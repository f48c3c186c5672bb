"""The optimisers, one row each, and the configs of the optimiser and of the averages.

A row gives a direction U per parameter. Weight decay is added to it, and its scale follows:

    parameter <- parameter - learning_rate rate_factor scale (U + weight_decay parameter)

SPlus and Muon treat a matrix as a whole. A matrix is a layer's "kernel" with two axes. With
`config.optimizer.convolutions` a convolution is one too: all axes but the last are its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dmf import fields, sharding
from dmf.errors import DmfError
from dmf.fields import BELOW_1, INF, LEAST, choice, limited

Array = jax.Array
TINY = 1e-30  # on the diagonal before a decomposition, as in the code of SPlus
exact = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980) without its learning rate."""
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon by optax for matrices, Adam for all other parameters.

    A matrix gets an orthogonal direction times .2 sqrt(max(m, n)) (arXiv 2502.16982). It is then
    about as large as a direction of Adam, so one learning rate serves both.
    """

    def label(path: tuple[Any, ...], x: Array) -> str:
        return "matrix" if _is_matrix(path, x, config) else "other"

    def axes(params: Any) -> Any:
        numbers = optax.contrib.MuonDimensionNumbers
        return jax.tree.map(lambda x: numbers(tuple(range(x.ndim - 1)), x.ndim - 1), params)

    def scale(u: Array) -> Array:
        return u * 0.2 * max(_sides(u.shape).values()) ** 0.5

    matrix = optax.chain(
        optax.contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=axes),
        optax.stateless(lambda u, _: jax.tree.map(scale, u)),
    )
    return optax.partition(
        {"matrix": matrix, "other": adam(config)},
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


class SPlusState(NamedTuple):
    """What SPlus keeps.

        mean      M, the mean of the gradient, a tree as the parameters
        sums      per matrix, by its path: {"left": L, "right": R}, means of G G' and of G' G
        turns     as sums: the eigenvectors of each, in columns, of the last decomposition

    A side of `config.optimizer.largest_side` or more has neither.
    """

    mean: Any
    sums: dict[str, dict[str, Array]]
    turns: dict[str, dict[str, Array]]


def splus(config: OptimizerConfig) -> optax.GradientTransformation:
    """SPlus (arXiv 2506.07254), in the order of its public code.

        M <- b1 M + (1 - b1) G,  L <- b2 L + (1 - b2) G G',  R <- b2 R + (1 - b2) G' G
        U = Q_L sign(Q_L' M Q_R) Q_R'   of a matrix,  U = sign(M) elsewhere

    Q_L and Q_R are the eigenvectors of L and R from the last decomposition, at first the identity.
    The loop decomposes between steps, see `decomposed`. |U|^2 is the number of entries.
    """

    def init(params: Any) -> SPlusState:
        sides = {
            _name(path): {side: n for side, n in _sides(x.shape).items() if n < config.largest_side}
            for path, x in jax.tree_util.tree_leaves_with_path(params)
            if _is_matrix(path, x, config)
        }
        return SPlusState(
            jax.tree.map(jnp.zeros_like, params),
            {k: {side: jnp.zeros((n, n)) for side, n in of.items()} for k, of in sides.items()},
            {k: {side: jnp.eye(n) for side, n in of.items()} for k, of in sides.items()},
        )

    def update(grads: Any, state: SPlusState, params: Any = None) -> tuple[Any, SPlusState]:
        mean = jax.tree.map(lambda m, g: config.b1 * m + (1 - config.b1) * g, state.mean, grads)
        sums = dict(state.sums)
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            if (name := _name(path)) in sums:
                sums[name] = _summed(sums[name], g, config.b2)

        def direction(path: tuple[Any, ...], m: Array) -> Array:
            return _signs(m, state.turns.get(_name(path), {}))

        found = jax.tree_util.tree_map_with_path(direction, mean)
        return found, SPlusState(mean, sums, state.turns)

    return optax.GradientTransformation(init, update)


def splus_scale(config: OptimizerConfig) -> optax.GradientTransformation:
    """2 / (m + n) for a matrix of m x n that SPlus turns on both sides, .001 for all others."""

    def scale(path: tuple[Any, ...], u: Array) -> Array:
        sides = _sides(u.shape).values() if _is_matrix(path, u, config) else (math.inf,)
        turned = max(sides) < config.largest_side
        return u * (2 / sum(sides) if turned else config.other_scale)

    return optax.stateless(lambda u, _: jax.tree_util.tree_map_with_path(scale, u))


class Optimizer(NamedTuple):
    """The facts about one optimiser.

    direction    config -> a transformation of the gradient into a direction
    scale        config -> what scales the direction after weight decay, or None
    decomposes   whether the loop is to call `decomposed` between steps
    """

    direction: Callable[[OptimizerConfig], optax.GradientTransformation]
    scale: Callable[[OptimizerConfig], optax.GradientTransformation] | None = None
    decomposes: bool = False


OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Optimizer(adam),
    "muon": Optimizer(muon),
    "splus": Optimizer(splus, splus_scale, decomposes=True),
}


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser. The paper's values are unknown; each config says whose recipe its numbers are.

    The pretrain_* fields are for a flow stage before the curriculum. *_decay_fraction is the
    share of a phase, at its end, over which the rate falls linearly to zero; 0 = constant.
    """

    name: str = choice("adam", OPTIMIZERS)  # a row of OPTIMIZERS
    learning_rate: float = limited(6e-4, LEAST, INF)  # * of the curriculum, after its warm-up
    # * steps of the curriculum over which the rate rises linearly
    warmup_steps: int = limited(9600, 0, INF)
    # * share of the curriculum, at its end, over which the rate falls linearly to zero
    decay_fraction: float = limited(0.0, 0, 1)
    # * the same three for a flow stage before the curriculum
    pretrain_learning_rate: float = limited(6e-4, LEAST, INF)
    pretrain_warmup_steps: int = limited(9600, 0, INF)  # * as warmup_steps
    pretrain_decay_fraction: float = limited(0.0, 0, 1)  # * as decay_fraction
    b1: float = limited(0.9, 0, BELOW_1)  # * decay of Adam's mean of the gradient
    b2: float = limited(0.999, 0, BELOW_1)  # * decay of Adam's mean of the squared gradient
    eps: float = limited(1e-8, LEAST, INF)  # * added to the root of the mean square
    weight_decay: float = limited(0.0, 0, INF)  # * decoupled (AdamW)
    # * learning rate of the second network of a rectify stage, as a factor on the first one's
    second_rate: float = limited(1.0, LEAST, INF)
    clip_norm: float = limited(0.0, 0, INF)  # * global gradient norm; 0 = off
    # multiplies every learning rate: an optimiser's own unit, with Adam's rates beside it
    rate_factor: float = limited(1.0, LEAST, INF)
    momentum: float = limited(0.95, 0, BELOW_1)  # decay of Muon's mean of the gradient
    # SPlus decomposes its matrices after the first step and after every so many
    decompose_every_steps: int = limited(100, 1, INF)
    largest_side: int = limited(10_000, 1, INF)  # SPlus turns no side of so many entries or more
    other_scale: float = limited(1e-3, LEAST, INF)  # of SPlus, for what it does not turn
    convolutions: bool = False  # SPlus and Muon treat a convolution's kernel as a matrix too


@dataclass(frozen=True)
class EMAConfig:
    """Exponential moving averages of the weights, all kept at once.

    A decay b per step of B images is the half-life B ln(1/2) / ln(b) images.
    It is at most rampup_ratio times the images seen since the last reset.
    A young average then forgets the start; 0 = no bound.
    """

    # * one average each
    halflife_images: tuple[float, ...] = limited(
        (709e3, 1.774e6, 7.097e6, 14.195e6), LEAST, INF, empty=False
    )
    # * largest half-life as a share of the images seen since the last reset; 0 = no ramp
    rampup_ratio: float = limited(0.05, 0, INF)
    # * half-life of the EMA that is sampled, scored and handed over; 0 = the raw weights
    evaluate: float = limited(1.774e6, 0, INF)

    def index(self) -> int | None:
        """Position of the evaluated EMA, None for the raw weights."""
        if not self.evaluate:
            return None
        if self.evaluate not in self.halflife_images:
            raise DmfError(
                f"config.ema.evaluate = {self.evaluate:g}: expected 0 (raw weights) or one of "
                f"config.ema.halflife_images = {self.halflife_images}"
            )
        return self.halflife_images.index(self.evaluate)


def build(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradient -> direction; the step multiplies by minus the learning rate.

    Raises DmfError for an unknown name.
    """
    fields.check(config, "config.optimizer")
    row = OPTIMIZERS[config.name]
    parts = [row.direction(config)]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_decays))
    if row.scale:
        parts.append(row.scale(config))
    if config.rate_factor != 1:
        parts.append(optax.scale(config.rate_factor))
    return optax.chain(*parts)


def is_due(config: OptimizerConfig, steps: int) -> bool:
    """Whether `decomposed` is due after so many steps of the optimiser, from 1."""
    due = steps == 1 or steps % config.decompose_every_steps == 0
    return OPTIMIZERS[config.name].decomposes and due


def decomposed(opt_state: Any, mesh: Mesh) -> Any:
    """The optimiser's state with new eigenvectors of SPlus's sums; other states as they are.

    It runs outside the step, so that no step's program holds a decomposition. Sums of one size go
    through one program, and each device decomposes its share of them. All in float32.
    """
    is_splus = lambda x: isinstance(x, SPlusState)  # noqa: E731
    return jax.tree.map(
        lambda x: x._replace(turns=_turns(x.sums, mesh)) if is_splus(x) else x,
        opt_state,
        is_leaf=is_splus,
    )


def _turns(sums: dict[str, dict[str, Array]], mesh: Mesh) -> dict[str, dict[str, Array]]:
    """The eigenvectors of each sum, in columns, placed as the sum."""
    by_size: dict[int, list[tuple[str, str]]] = {}
    for name, sides in sums.items():
        for side, x in sides.items():
            by_size.setdefault(len(x), []).append((name, side))
    found: dict[str, dict[str, Array]] = {name: {} for name in sums}
    for keys in by_size.values():
        given = [sums[name][side] for name, side in keys]
        turns = _solver(mesh, tuple(x.sharding for x in given))(given)
        for (name, side), q in zip(keys, turns, strict=True):
            found[name][side] = q
    return found


@lru_cache
def _solver(mesh: Mesh, places: tuple[Any, ...]) -> Callable[[list[Array]], list[Array]]:
    """The jitted eigenvectors of symmetric matrices of one size, which the devices share out.

    places: where each of them lives, and its eigenvectors.
    """

    def own(stack: Array) -> Array:
        return jnp.linalg.eigh(stack + TINY * jnp.eye(stack.shape[-1]))[1]

    def solve(given: list[Array]) -> list[Array]:
        spare = -len(given) % mesh.devices.size
        stack = jnp.stack([*given, *(jnp.eye(len(given[0])),) * spare])
        return list(sharding.on_rows(mesh, own)(stack)[: len(given)])

    options = sharding.compiler_options(mesh)
    return jax.jit(solve, out_shardings=list(places), compiler_options=options)


def _is_matrix(path: tuple[Any, ...], x: Array, config: OptimizerConfig) -> bool:
    kernel = path[-1:] == (jax.tree_util.DictKey("kernel"),)
    return kernel and (x.ndim == 2 or (x.ndim > 2 and config.convolutions))


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


def _sides(shape: tuple[int, ...]) -> dict[str, int]:
    """The sides m and n of a kernel as a matrix."""
    return {"left": math.prod(shape[:-1]), "right": shape[-1]}


def _summed(sums: dict[str, Array], g: Array, b2: float) -> dict[str, Array]:
    """SPlus's means L and R after a gradient."""
    g = g.reshape(-1, g.shape[-1])
    new = {"left": lambda: exact(g, g.T), "right": lambda: exact(g.T, g)}
    return {side: b2 * x + (1 - b2) * new[side]() for side, x in sums.items()}


def _signs(m: Array, turns: dict[str, Array]) -> Array:
    """sign(M), or Q_L sign(Q_L' M Q_R) Q_R' with the turns that there are. Shape as m."""
    if not turns:
        return jnp.sign(m)
    found = m.reshape(-1, m.shape[-1])
    left, right = turns.get("left"), turns.get("right")
    found = found if left is None else exact(left.T, found)
    found = jnp.sign(found if right is None else exact(found, right))
    found = found if left is None else exact(left, found)
    return (found if right is None else exact(found, right.T)).reshape(m.shape)


def _decays(params: Any) -> Any:
    """False for a network's fixed frequencies, which no gradient would restore."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1:] != (jax.tree_util.DictKey("freqs"),), params
    )
