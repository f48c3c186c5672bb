"""The optimisers, one row each, and the configs of the optimiser and of the averages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax

from dmf import fields
from dmf.errors import DmfError
from dmf.fields import BELOW_1, INF, LEAST, choice, limited


def adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980) without its learning rate."""
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {"adam": adam}


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
    clip_norm: float = limited(0.0, 0, INF)  # * global gradient norm; 0 = off


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
    parts = [OPTIMIZERS[config.name](config)]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_decays))
    return optax.chain(*parts)


def _decays(params: Any) -> Any:
    """False for a network's fixed frequencies, which no gradient would restore."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1:] != (jax.tree_util.DictKey("freqs"),), params
    )
