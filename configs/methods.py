"""Published methods as choices on the axes of this code. Any data-set config takes them by name.

    python main.py --config=configs/digits.py:meanflow --config.init=runs/digits/checkpoints/3000
    python main.py --config=configs/imagenet256.py:B,alpha_flow ...
    python main.py --config=configs/cifar10.py:floor,own_velocity ...

A function gets the data set's config and returns the fields that its method sets, by section. All
other fields keep the data set's values. Methods combine, and with a size, in any order. Two
methods that set one field to different values are refused. Without a name a config is `dagger`.

Provenance: each docstring names the paper and the fields whose value is from it. "Ours" marks a
value that no paper states.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

from ml_collections import ConfigDict

from dmf.errors import DmfError

Fields = dict[str, dict[str, Any]]  # section -> field -> value


def dagger(config: ConfigDict) -> Fields:
    """Discrete MeanFlow with dagger intervals (arXiv 2604.08837).

    The paper's: the rule, and the kinds that the base config leaves at their default.
    """
    return dict(curriculum=dict(interval="dagger"))


def linear(config: ConfigDict) -> Fields:
    """Discrete MeanFlow with linear intervals (arXiv 2604.08837). The paper's: the rule."""
    return dict(curriculum=dict(interval="linear"))


def floor(config: ConfigDict) -> Fields:
    """Dagger intervals with a least share of t - r. Ours: the rule and `interval_floor`."""
    return dict(curriculum=dict(interval="floor"))


def adaptive(config: ConfigDict) -> Fields:
    """Intervals from a table that training keeps, after ADCM (arXiv 2510.17266).

    The paper's: the rule, for a single time. Ours: the table over (t, t - r), its half-life and its
    floor.
    """
    return dict(curriculum=dict(interval="adaptive"))


def flow(config: ConfigDict) -> Fields:
    """Flow matching alone: the model that a curriculum starts from (arXiv 2210.02747).

    Where the data set's config has a pretraining stage, this is that stage: its length and its
    learning rate. Elsewhere it is as long as the curriculum.
    """
    found: Fields = dict(curriculum=dict(stages=1, kinds=("flow",), pretrain_length=0.0))
    if config.curriculum.pretrain_length:
        found["curriculum"]["length"] = config.curriculum.pretrain_length
        found["optimizer"] = {
            name: config.optimizer[f"pretrain_{name}"]
            for name in ("learning_rate", "warmup_steps", "decay_fraction")
        }
    return found


def meanflow(config: ConfigDict) -> Fields:
    """MeanFlow by the exact derivative (arXiv 2505.13447), from the flow model in config.init.

    The paper's: the identity. Ours: to start from a flow model, for as long as the curriculum.
    """
    return _alone("jvp")


def central(config: ConfigDict) -> Fields:
    """MeanFlow with du/dt by a central difference, from the flow model in config.init.

    MF-RAE (arXiv 2511.13019) trains so in the latents of an autoencoder. Its paper's: the
    difference and delta. Missing here: the teacher that gives v there. Ours: a smaller delta near
    the ends of the times. It needs no forward mode, so every attention kernel can compute it.
    """
    return _alone("central") | dict(loss=dict(delta=5e-3))


def alpha_flow(config: ConfigDict) -> Fields:
    """alpha-Flow (arXiv 2510.20771): from all pairs to the exact derivative by a shrinking alpha.

    The paper's: c = 0, p = 1 and a weight of alpha, v of the data, the target cut to +-4 (its XL).
    So is its B/2 schedule, 1 - sigmoid(25 (x - 1/2)), with 1 above .995 and 0 below .005.

    Ours: the start from a flow model, and eps, which counts against the sum over pixels. A run of
    another length also needs config.curriculum.stage_lengths that add up to it.
    """
    least = 0.005
    edge = 0.5 - math.log((1 - least) / least) / 25
    return dict(
        loss=dict(
            product_rule=0.0,
            residual_scale="raw",
            weight="alpha",
            p=1.0,
            target_clip=4.0,
            tangent="data",
        ),
        curriculum=dict(
            stages=3,
            kinds=("all_pairs", "discrete", "jvp"),
            interval="linear",
            schedule="sigmoid",
            ends=(1 - least, least),
            stage_lengths=tuple(x * config.curriculum.length for x in (edge, 1 - 2 * edge, edge)),
        ),
    )


def soflow(config: ConfigDict) -> Fields:
    """SoFlow (arXiv 2512.15657): alpha-Flow's target in unit scale, with alpha falling by a factor.

    The released configs' (CIFAR-10 for a U-Net, else ImageNet): ends of alpha, p, times, share of
    r = t rows. Ours: eps, and the start from a flow model. Missing: its guidance.
    """
    if config.network.kind == "unet":
        p, pairs, ends = 0.75, 1.0, (1.0, 0.0003125)
        t, r, border = (-0.9, 1.6), (-4.0, 1.6), (-0.9, 1.6)
    else:
        p, pairs, ends = 1.0, 0.25, (0.1, 0.002)
        t, r, border = (0.2, 0.8), (-1.0, 0.8), (-0.2, 1.0)
    times = dict(pairing="min", border="own", r_neq_t_fraction=pairs)
    for name, law in (("t", t), ("r", r), ("border", border)):
        times |= {f"{name}_mean": law[0], f"{name}_std": law[1]}
    return dict(
        loss=dict(product_rule=0.0, residual_scale="unit", p=p),
        times=times,
        curriculum=_falling(*ends),
    )


def euler(config: ConfigDict) -> Fields:
    """Euler Mean Flows (arXiv 2602.02571): a step back of one fixed time, no correction.

    The paper's: c = 0 and a small fixed step. Ours: the step .01, unit scale, a flow model's start.
    """
    fields = _falling(0.01, 0.01) | dict(interval="fixed")
    return dict(loss=dict(product_rule=0.0, residual_scale="unit"), curriculum=fields)


def ect(config: ConfigDict) -> Fields:
    """Easy consistency tuning (arXiv 2406.14548): a map to the data alone, r = 0.

    The released code's: the sigmoid map, q = 2, 8 stages, c = 0, the law of t, the norm as loss,
    divided by the step of sigma. Ours: a flow model's start and stage 0, which tells it of r = 0.
    The constant map is --config.curriculum.interval=dagger.
    """
    return dict(
        loss=dict(product_rule=0.0, residual_scale="raw", weight="norm", p=0.5, eps=1e-8),
        times=_to_data(-1.1, 2.0),
        curriculum=dict(
            stages=9, kinds=("all_pairs", *("discrete",) * 8), q=2.0, interval="sigmoid"
        ),
    )


def adcm(config: ConfigDict) -> Fields:
    """ADCM (arXiv 2510.17266): a map to the data alone, with steps that training itself measures.

    The paper's: the rule, c = 0, the law of t, lambda from .64 to .01 (ImageNet), where ends are
    lambda / (1 + lambda). Ours: a table in the place of its grid, the norm as loss, stage 0.
    Missing: its pseudo-Huber loss and the weight by the error that is left.
    """
    curriculum = _falling(0.64 / 1.64, 0.01 / 1.01) | dict(
        stages=2,
        kinds=("all_pairs", "discrete"),
        interval="adaptive",
        stage_lengths=tuple(x * config.curriculum.length for x in (0.1, 0.9)),
    )
    loss = dict(product_rule=0.0, residual_scale="unit", p=0.5)
    return dict(loss=loss, times=_to_data(-1.1, 2.0), curriculum=curriculum)


def accelerated(config: ConfigDict) -> Fields:
    """Accelerated MeanFlow (arXiv 2511.19065): v early, by DTD, and short intervals before long.

    The paper's: the interval weight with k = 1, p = 1. Ours: DTD's rule (from arXiv 2403.10348),
    20 clusters in a quarter of the run, and the start from a flow model.
    """
    return dict(
        loss=dict(p=1.0, interval_weight="progressive", interval_power=1.0),
        times=dict(difficulty_clusters=20, difficulty_share=0.25),
        **_alone("jvp"),
    )


def accelerated_snr(config: ConfigDict) -> Fields:
    """Accelerated MeanFlow (arXiv 2511.19065) with MinSNR in the place of DTD.

    The paper's: both weights. Ours: MinSNR in velocity form, gamma = 5, its mean of 1.
    """
    loss = dict(p=1.0, interval_weight="progressive", interval_power=1.0)
    return dict(loss=loss | dict(border_weight="min_snr", snr_limit=5.0), **_alone("jvp"))


def split_meanflow(config: ConfigDict) -> Fields:
    """SplitMeanFlow (arXiv 2507.16884): additivity over [r, s] and [s, t], from a flow model.

    The paper's: the identity, its own jump, the uniform share, at least half of rows with r = t.
    Ours: three quarters of such rows, and the plain squared residual's scale.
    """
    return dict(loss=dict(residual_scale="raw"), times=dict(r_neq_t_fraction=0.25)) | _alone(
        "split"
    )


def guided_split_meanflow(config: ConfigDict) -> Fields:
    """SplitMeanFlow in two stages: a guided flow model first, then the split with guided v.

    The paper's: the two stages. Ours: their shares, MeanFlow's form of guidance and its values.
    """
    two = _alone("guided_split")
    two["curriculum"] |= dict(
        stages=2,
        kinds=("guided_flow", "guided_split"),
        stage_lengths=tuple(x * config.curriculum.length for x in (0.25, 0.75)),
    )
    guidance = dict(omega=1.0, kappa=0.5, t_start=0.0, t_end=1.0)
    times = dict(r_neq_t_fraction=0.25)
    return dict(loss=dict(residual_scale="raw"), times=times, guidance=guidance) | two


def beta_tangent(config: ConfigDict) -> Fields:
    """The step back goes along .94 v + .06 u(z, t, t), between the data's direction and one's own.

    The paper's (arXiv 2605.09235): the mixture, and .94, where its gradient erred least. We could
    not verify that its number is the share of v. Its best FID was at v alone.
    """
    return dict(loss=dict(tangent="own", tangent_data=0.94, target_data=1.0))


def own_velocity(config: ConfigDict) -> Fields:
    """The step back goes along u(z, t, t) of the weights that train: improved MeanFlow.

    The paper's (arXiv 2512.02012): the direction, for the exact derivative. Ours: the same for the
    finite difference.
    """
    return dict(loss=dict(tangent="own"))


def ema_velocity(config: ConfigDict) -> Fields:
    """The step back goes along u(z, t, t) of the evaluated average of the weights. Ours."""
    return dict(loss=dict(tangent="ema"))


def guided(config: ConfigDict) -> Fields:
    """One more stage that puts classifier-free guidance into the weights of config.init.

    MeanFlow's (arXiv 2505.13447): the guided velocity. Official code for B/2: omega and kappa.
    Ours: a stage after the others, with the exact derivative. It needs a network with classes.
    """
    return dict(guidance=dict(omega=1.0, kappa=0.5, t_start=0.0, t_end=1.0), **_alone("guided_jvp"))


def splus(config: ConfigDict) -> Fields:
    """SPlus (arXiv 2506.07254) in the place of Adam, for every stage of any other method.

    The paper's: the update, a decomposition every 100 steps, b1 .9 and b2 .999, weight decay .01,
    and learning rates of 2 x width x Adam's. Ours: width 100 for a network without one width, and
    the kernels of a U-Net's convolutions as matrices. Its average of the weights is config.ema.
    """
    width = config.network.get("width")
    return dict(
        optimizer=dict(
            name="splus",
            rate_factor=2.0 * (width or 100),
            weight_decay=0.01,
            b1=0.9,
            b2=0.999,
            convolutions=width is None,
        )
    )


def muon(config: ConfigDict) -> Fields:
    """Muon in the place of Adam, by optax, for every stage of any other method.

    Published (arXiv 2502.16982): the update, its momentum of .95, and a scale that lets it keep
    Adam's learning rates. Ours: the kernels of a U-Net's convolutions as matrices.
    """
    return dict(optimizer=dict(name="muon", convolutions=config.network.get("width") is None))


def decoupled(config: ConfigDict) -> Fields:
    """Decoupled MeanFlow (arXiv 2510.24474), from the flow model in config.init.

    It is called DMF too, and is no part of the curriculum of arXiv 2604.08837.

    The paper's, or its released code's for XL/2 at 256 px:

    - early blocks see t, late ones and the output see r, by the weights of the flow model
    - 20 of 28 blocks (XL) and 18 of 24 (L) see t
    - half of the rows for flow matching, by a law of t of their own; the laws
    - the learned log variance in the paper's form; `loss.logvar=released` has the code's
    - guidance from the own velocity: v + .6 (v_c - v_u) on t <= .7
    - Adam at 1e-4 with decays .9 and .95, and clipping at 1

    Ours: about 5 of 7 blocks for other depths, the U-Net's routing, and no guidance for data
    without classes. A row serves one of the two losses; theirs uses each image for both. The length
    is the data set's. Theirs is 400,000 steps of 256 images.
    """
    network: dict[str, Any] = dict(time_routing="decoupled", logvar=True)
    if config.network.kind == "dit":
        depth = config.network.depth
        network["t_blocks"] = {28: 20, 24: 18}.get(depth, max(1, round(depth * 5 / 7)))
    law = dict(pairing="sorted", t_mean=0.4, t_std=1.0, r_mean=-1.2, r_std=1.0)
    own = dict(border="own", border_mean=0.0, border_std=1.0, r_neq_t_fraction=0.5)
    found: Fields = dict(network=network, times=law | own, loss=dict(logvar="paper"))
    if not config.network.num_classes:
        return found | _alone("jvp")
    guidance = dict(omega=1.0, kappa=0.6, t_start=0.0, t_end=0.7)
    return found | dict(guidance=guidance) | _alone("guided_jvp")


METHODS: dict[str, Callable[[ConfigDict], Fields]] = {
    "dagger": dagger,
    "linear": linear,
    "floor": floor,
    "adaptive": adaptive,
    "flow": flow,
    "meanflow": meanflow,
    "central": central,
    "alpha_flow": alpha_flow,
    "soflow": soflow,
    "euler": euler,
    "ect": ect,
    "adcm": adcm,
    "accelerated": accelerated,
    "accelerated_snr": accelerated_snr,
    "split_meanflow": split_meanflow,
    "guided_split_meanflow": guided_split_meanflow,
    "beta_tangent": beta_tangent,
    "own_velocity": own_velocity,
    "ema_velocity": ema_velocity,
    "guided": guided,
    "decoupled": decoupled,
    "splus": splus,
    "muon": muon,
}


def names_in(argument: str, file: str, others: Collection[str] = ()) -> list[str]:
    """The names behind the colon of --config=FILE:ARGUMENT, each a method or one of `others`.

    Raises DmfError for any other name.
    """
    names = [name for name in argument.split(",") if name]
    for name in names:
        if name not in METHODS and name not in others:
            known = ", ".join((*others, *METHODS))
            raise DmfError(f"configs/{file}:{name}: expected one of {known}")
    return names


def apply(config: ConfigDict, names: Collection[str], file: str) -> ConfigDict:
    """Sets the fields of each named method in the config, which is returned.

    Raises DmfError where two of the methods set one field to different values.
    """
    seen: dict[tuple[str, str], tuple[str, Any]] = {}
    for method in names:
        for section, values in METHODS[method](config).items():
            for field, value in values.items():
                other, before = seen.setdefault((section, field), (method, value))
                if before != value:
                    raise DmfError(
                        f"configs/{file}:{','.join(names)}: expected {other} or {method}, as each "
                        f"sets config.{section}.{field}"
                    )
    for (section, field), (_, value) in seen.items():
        config[section][field] = value
    return config


def _alone(kind: str) -> Fields:
    """A curriculum of one stage, without pretraining."""
    return dict(curriculum=dict(stages=1, kinds=(kind,), pretrain_length=0.0))


def _falling(first: float, last: float) -> dict[str, Any]:
    """One stage of finite differences whose d falls by a factor per step, without pretraining."""
    fields = dict(interval="linear", schedule="smooth", ends=(first, last))
    return _alone("discrete")["curriculum"] | fields


def _to_data(mean: float, std: float) -> dict[str, Any]:
    """r = 0 on every row, and one logit-normal draw of t."""
    return dict(pairing="zero", t_mean=mean, t_std=std, r_neq_t_fraction=1.0)
