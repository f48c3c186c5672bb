"""Published relatives of MeanFlow that change times, weights, intervals or the identity.

`configs.methods` has the table of all methods, their common words and what "Ours" means. Here stand
those of the finite-difference family, of weighted times and of the split, with a table of their own
that `configs.methods` takes over.
"""

import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

Fields = dict[str, dict[str, Any]]  # section -> field -> value


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
        **alone("jvp"),
    )


def accelerated_snr(config: ConfigDict) -> Fields:
    """Accelerated MeanFlow (arXiv 2511.19065) with MinSNR in the place of DTD.

    The paper's: both weights. Ours: MinSNR in velocity form, gamma = 5, its mean of 1.
    """
    loss = dict(p=1.0, interval_weight="progressive", interval_power=1.0)
    return dict(loss=loss | dict(border_weight="min_snr", snr_limit=5.0), **alone("jvp"))


def split_meanflow(config: ConfigDict) -> Fields:
    """SplitMeanFlow (arXiv 2507.16884): additivity over [r, s] and [s, t], from a flow model.

    The paper's: the identity, its own jump, the uniform share, at least half of rows with r = t.
    Ours: three quarters of such rows, and the plain squared residual's scale.
    """
    return dict(loss=dict(residual_scale="raw"), times=dict(r_neq_t_fraction=0.25)) | alone("split")


def guided_split_meanflow(config: ConfigDict) -> Fields:
    """SplitMeanFlow in two stages: a guided flow model first, then the split with guided v.

    The paper's: the two stages. Ours: their shares, MeanFlow's form of guidance and its values.
    """
    two = alone("guided_split")
    two["curriculum"] |= dict(
        stages=2,
        kinds=("guided_flow", "guided_split"),
        stage_lengths=tuple(x * config.curriculum.length for x in (0.25, 0.75)),
    )
    guidance = dict(omega=1.0, kappa=0.5, t_start=0.0, t_end=1.0)
    times = dict(r_neq_t_fraction=0.25)
    return dict(loss=dict(residual_scale="raw"), times=times, guidance=guidance) | two


def shortcut(config: ConfigDict) -> Fields:
    """Shortcut models (arXiv 2410.12557): one step is two steps of half its length.

    The paper's: the midpoint, steps of 1 to 1/64 in their places, a quarter of the rows with r < t,
    uniform times elsewhere, the squared error. Ours: the start from a flow model, targets by the
    weights that train (the paper's average is missing), and t off the grid on rows with r = t.
    """
    times = dict(base="uniform", pairing="dyadic", border="own", r_neq_t_fraction=0.25)
    return dict(times=times, loss=dict(residual_scale="raw", p=0.0)) | alone("midpoint")


def semigroup(config: ConfigDict) -> Fields:
    """Progressive self-distillation (Boffi et al., arXiv 2505.18825), in its midpoint form.

    The paper's: the mean of two halves without gradient, uniform r <= t, the squared error. Ours: a
    quarter of the rows with r < t and the start; the paper's learned weight is missing. Its uniform
    form is split_meanflow with --config.loss.p=0 and these times.
    """
    times = dict(base="uniform", pairing="sorted", border="own", r_neq_t_fraction=0.25)
    return dict(times=times, loss=dict(residual_scale="raw", p=0.0)) | alone("midpoint")


def beta_tangent(config: ConfigDict) -> Fields:
    """The step back goes along .94 v + .06 u(z, t, t), between the data's direction and one's own.

    The paper's (arXiv 2605.09235): the mixture, and .94, where its gradient erred least. We could
    not verify that its number is the share of v. Its best FID was at v alone.
    """
    return dict(loss=dict(tangent="own", tangent_data=0.94, target_data=1.0))


def distilled(config: ConfigDict) -> Fields:
    """MeanFlow distillation (arXiv 2511.13019): a frozen flow model plays v, with a central step.

    The paper's: the teacher in target and tangent, on every row; delta, uniform times that are
    sorted, a quarter of rows with r < t. The teacher is config.teacher.place, or else config.init.

    Ours: p = 1 on |e|^2. The released code has it on |e|^4, about twice the gradient where e is
    large. Missing: its shift of times.
    """
    loss = dict(velocity="teacher", tangent="teacher", delta=5e-3, p=1.0)
    times = dict(base="uniform", pairing="sorted", r_neq_t_fraction=0.25)
    return alone("central") | dict(loss=loss, times=times)


def mid_training(config: ConfigDict) -> Fields:
    """Consistency mid-training (CMT, arXiv 2509.24526), as arXiv 2511.13019 has it.

    The paper's: 16 states of Euler's path of the teacher, 8 pairs per path (its 512 px code), and
    27 of 207 thousand steps on them; then `distilled`. The label of a state is its true time.

    Ours: a batch counts paths, 8 rows each. The weight of rows is that of `distilled`. A run of
    another length also needs config.curriculum.stage_lengths that add up to it.
    """
    fields = distilled(config)
    share = 27 / 207
    two = dict(stages=2, kinds=("teacher_path", "central"), pretrain_length=0.0)
    two |= dict(stage_lengths=tuple(x * config.curriculum.length for x in (share, 1 - share)))
    path = dict(states=16, solver="euler", pairs=8, labels="true")
    return fields | dict(curriculum=two, teacher=path)


def _falling(first: float, last: float) -> dict[str, Any]:
    """One stage of finite differences whose d falls by a factor per step, without pretraining."""
    fields = dict(interval="linear", schedule="smooth", ends=(first, last))
    return alone("discrete")["curriculum"] | fields


def _to_data(mean: float, std: float) -> dict[str, Any]:
    """r = 0 on every row, and one logit-normal draw of t."""
    return dict(pairing="zero", t_mean=mean, t_std=std, r_neq_t_fraction=1.0)


def alone(kind: str) -> Fields:
    """A curriculum of one stage, without pretraining."""
    return dict(curriculum=dict(stages=1, kinds=(kind,), pretrain_length=0.0))


RELATIVES: dict[str, Callable[[ConfigDict], Fields]] = {
    "alpha_flow": alpha_flow,
    "soflow": soflow,
    "euler": euler,
    "ect": ect,
    "adcm": adcm,
    "accelerated": accelerated,
    "accelerated_snr": accelerated_snr,
    "split_meanflow": split_meanflow,
    "guided_split_meanflow": guided_split_meanflow,
    "shortcut": shortcut,
    "semigroup": semigroup,
    "beta_tangent": beta_tangent,
    "distilled": distilled,
    "mid_training": mid_training,
}
