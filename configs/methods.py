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

from collections.abc import Callable, Collection
from typing import Any

from ml_collections import ConfigDict

from configs import relatives
from configs.relatives import Fields, alone
from dmf.errors import DmfError


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
    return alone("jvp")


def central(config: ConfigDict) -> Fields:
    """MeanFlow with du/dt by a central difference, from the flow model in config.init.

    MF-RAE (arXiv 2511.13019) trains so in the latents of an autoencoder. Its paper's: the
    difference and delta. Missing here: the teacher that gives v there. Ours: a smaller delta near
    the ends of the times. It needs no forward mode, so every attention kernel can compute it.
    """
    return alone("central") | dict(loss=dict(delta=5e-3))


def own_velocity(config: ConfigDict) -> Fields:
    """The step back goes along u(z, t, t) of the weights that train: improved MeanFlow.

    The paper's (arXiv 2512.02012): the direction, for the exact derivative. Ours: the same for the
    finite difference.
    """
    return dict(loss=dict(tangent="own"))


def ema_velocity(config: ConfigDict) -> Fields:
    """The step back goes along u(z, t, t) of the evaluated average of the weights. Ours."""
    return dict(loss=dict(tangent="ema"))


def improved(config: ConfigDict) -> Fields:
    """Improved MeanFlow (arXiv 2512.02012), as far as the network of the config goes.

    The paper's:

    - the exact derivative along the network's own velocity, which the target keeps out
    - p = 1, eps = .01 on the sum over pixels, half of the rows with r < t
    - the velocity head as that velocity, where the network has one; u(z, t, t) elsewhere
    - a scale up to 8 by a power law and an interval that the network is told, where it can be

    Its public code's: what samples and scores are told, omega 7.5 in [.4, .65].
    Ours: the times and the optimiser of the data set's config, and the start from config.init.
    """
    network = config.network
    told = network.get("scale_tokens", 0) > 0 and network.num_classes > 0
    head = network.get("velocity_head", 0) > 0
    found = alone("guided_jvp" if told else "jvp") | dict(
        loss=dict(tangent="head" if head else "own", p=1.0, eps=0.01),
        times=dict(r_neq_t_fraction=0.5),
    )
    if told:
        found["guidance"] = dict(most=8.0, power=1.0, omega=7.5, t_start=0.4, t_end=0.65)
    return found


def guided(config: ConfigDict) -> Fields:
    """One more stage that puts classifier-free guidance into the weights of config.init.

    MeanFlow's (arXiv 2505.13447): the guided velocity. Official code for B/2: omega and kappa.
    Ours: a stage after the others, with the exact derivative. It needs a network with classes.
    """
    return dict(guidance=dict(omega=1.0, kappa=0.5, t_start=0.0, t_end=1.0), **alone("guided_jvp"))


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
        return found | alone("jvp")
    guidance = dict(omega=1.0, kappa=0.6, t_start=0.0, t_end=0.7)
    return found | dict(guidance=guidance) | alone("guided_jvp")


def terminal(config: ConfigDict) -> Fields:
    """The identity in the end time, with a target that passes no gradient.

    Terminal velocity matching and Lagrangian self-distillation (arXiv 2505.18825) rest on it. The
    papers': the identity, and v of the network itself at the end point. Ours: no gradient through
    the derivative, which saves two passes, and the start from a flow model. It ran away on digits.
    """
    return alone("terminal")


def lagrangian(config: ConfigDict) -> Fields:
    """Lagrangian self-distillation (Boffi et al., arXiv 2505.18825), from a flow model.

    The paper's: the identity in the end time, a gradient through its derivative, none through v at
    the end point, and a squared error without adaptive weight (p = 0). Ours: the laws of times, the
    share of rows with r = t, and the start; the paper's learned weight is missing.
    """
    return alone("lagrangian") | dict(loss=dict(p=0.0))


def flowconsist(config: ConfigDict) -> Fields:
    """The consistency branch of FlowConsist (arXiv 2602.06346), from a flow model.

    The paper's, by two independent readings: MeanFlow's derivative along u(z, t, t), and flow
    matching on rows with r = t. Its other branch is `rectified`. Ours: all numbers.
    """
    return alone("jvp") | dict(loss=dict(tangent="own"))


def rectified(config: ConfigDict) -> Fields:
    """FlowConsist (arXiv 2602.06346) whole: its consistency branch, then rectification beside it.

    The paper's, by two readings: v_real of the generator itself, v_fake of a second network that
    is trained on the generator's images, their difference as the gradient. Ours: the first half
    without it, its weight of 1 with a rise over a tenth of the run, no guidance. Ours too: times
    in [.02, .98], one step of each network, one learning rate.
    """
    curriculum = dict(
        stages=2,
        kinds=("jvp", "rectify"),
        pretrain_length=0.0,
        stage_lengths=(config.curriculum.length / 2,) * 2,
    )
    return dict(loss=dict(tangent="own", rectify_from=0.5), curriculum=curriculum)


METHODS: dict[str, Callable[[ConfigDict], Fields]] = {
    "dagger": dagger,
    "linear": linear,
    "floor": floor,
    "adaptive": adaptive,
    "flow": flow,
    "meanflow": meanflow,
    "central": central,
    "own_velocity": own_velocity,
    "ema_velocity": ema_velocity,
    "improved": improved,
    "guided": guided,
    "decoupled": decoupled,
    "terminal": terminal,
    "lagrangian": lagrangian,
    "flowconsist": flowconsist,
    "rectified": rectified,
    "splus": splus,
    "muon": muon,
    **relatives.RELATIVES,
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
