"""The run as data: one typed tree of values, made from a config file and flags, and checked.

- `complete`: what a config file returns, a ConfigDict with every field; each field is a flag.
- `parse`: from a ConfigDict or stored JSON to a `Config`. It checks every field by itself.
- `check`: the fields against each other, the data and the network, before memory is allocated.

Each error names the key, the value and what was expected.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ml_collections import config_dict

from dmf import fields
from dmf.data import DataConfig
from dmf.errors import DmfError
from dmf.fields import ABOVE_1, INF, choice, limited
from dmf.method import guidance, teacher, velocity
from dmf.method.curriculum import CurriculumConfig, Stage, build_stages
from dmf.method.flow import PATHS, TimeLaw
from dmf.method.guidance import GuidanceConfig
from dmf.method.objectives import AUTO, FORMER, GUIDED, KINDS, LAST, LAYOUTS
from dmf.method.samplers import SAMPLERS
from dmf.method.teacher import TeacherConfig
from dmf.method.weights import LossConfig
from dmf.networks import NetworkConfig, UNetConfig, attention
from dmf.optim import EMAConfig, OptimizerConfig
from dmf.sharding import MeshConfig

DTYPES = ("float32", "bfloat16")
REMATS = ("none", "blocks", "dots")
PRECISIONS = ("default", "high", "highest")
KERNELS = tuple(attention.KERNELS)
SCORES = 100_000  # of a run, and their checkpoints, at most
INIT_LABELS = ("keep", "fresh", "none")  # or the name of a .json file
INIT_HINT = (
    "for other classes than the start's set config.init_labels to keep, fresh, none or a .json file"
)
GUARD_ACTIONS = ("off", "stop", LAST, "halve", "floor", "rate")


@dataclass(frozen=True)
class PrecisionConfig:
    """Matmul precision (jax.default_matmul_precision) by the arithmetic of a kind of stage.

    `dmf.method.objectives.KINDS` says which kind needs which. Only accelerators tell the values
    apart. Differences of nearby outputs and tangents need "highest"; flow matching does not.
    """

    plain: str = choice("high", PRECISIONS)  # * of flow matching
    difference: str = choice("highest", PRECISIONS)  # * of finite differences
    derivative: str = choice("highest", PRECISIONS)  # * of the exact derivative


@dataclass(frozen=True)
class AttentionConfig:
    """Attention kernel by the arithmetic of a kind of stage (`dmf.networks.attention`).

    - xla: stores all N x N weights of N tokens.
    - chunked: the same numbers up to rounding; memory grows linearly with N.
    - cudnn: NVIDIA's fused kernel, in bfloat16.
    - flash: Pallas' kernel on TPUs.

    Only the first two have a forward mode, which the derivative needs.
    """

    plain: str = choice("xla", KERNELS)  # of flow matching
    difference: str = choice("xla", KERNELS)  # of finite differences
    derivative: str = choice("xla", attention.HAS_JVP)  # of the exact derivative


@dataclass(frozen=True)
class GuardConfig:
    """Probes of the weights, and what follows a bad probe. All of these values are ours.

    On digits and photos the residuals of healthy runs stay below 2.1 times the stage's first.
    Residuals of diverging runs pass 3.4 times the first.
    """

    # probe (`dmf.run.probe`) every so many steps, after a stage's first step and at its end;
    # 0 = never
    every_steps: int = limited(0, 0, INF)
    rows: int = limited(64, 8, INF)  # held-out images of a probe
    # off | stop | rate = halve the learning rate | for the discrete stages left: jvp,
    # halve (their refinement), floor (of d)
    action: str = choice("off", GUARD_ACTIONS)
    factor: float = limited(3.0, ABOVE_1, INF)  # how much worse a residual or a score may become
    # the least change |u - u'| / |u| of a discrete stage, in epsilons of the compute dtype
    ulps: float = limited(1.0, 0, INF)
    limit: int = limited(3, 0, INF)  # after so many interventions the next one is stop


@dataclass(frozen=True)
class RunConfig:
    """What a run writes, and when.

    No field here changes a step by itself. The guard reads scores and goes back to checkpoints.
    """

    log_every_steps: int = limited(100, 1, INF)  # a line of metrics.jsonl and of the progress
    # besides every stage boundary, which is always kept
    checkpoint_every_steps: int = limited(1000, 1, INF)
    # newest ones kept apart from the stage boundaries; while the newest is being written, the one
    # before it is the only whole one
    keep_checkpoints: int = limited(2, 2, INF)
    sample_rows: int = limited(8, 1, 1000)  # the sample grid has this many rows and columns
    score_samples: int = limited(2000, 0, INF)  # samples per score; 0 = no scores
    # numbers of steps scored before and after the curriculum; at other stages: the first of them
    score_steps: tuple[int, ...] = limited((1, 2, 4, 32), 1, INF, empty=False)
    # also score, and save, every so many steps; 0 = at stage boundaries only
    score_every_steps: int = limited(0, 0, INF)
    # of dmf.evaluation.protocols, or a .json; "" = the data set's own score, if it has one
    protocol: str = ""
    features: str = ""  # converted feature network of the protocol
    reference: str = ""  # the protocol's reference statistics
    vae: str = ""  # converted autoencoder that makes images of latents, for scores and pictures
    # of scores and pictures; euler and heun follow u(z, t, t), for flow models; restart and gamma
    # add fresh noise at every step
    sampler: str = choice("few_step", SAMPLERS)
    tensorboard: bool = True  # write event files where tensorflow and tensorboard are installed


@dataclass(frozen=True)
class Config:
    """A whole run. Each section's fields stand in the module that reads them.

    A comment that begins with * marks a field whose value in the paper we do not know.
    docs/config.md lists all fields.
    """

    # of weights, noise, times, order of the data and scores; the paper reports no spread over seeds
    seed: int = limited(0, 0, 2**32 - 1)
    # checkpoint or work directory of a flow model to start from; "" = fresh weights
    init: str = ""
    # on data with other classes than the start's: keep | fresh | none | a .json file
    # (`dmf.run.init`); "" = the classes are the same
    init_labels: str = ""
    batch_size: int = limited(1024, 1, INF)  # global, over all devices and microbatches
    microbatches: int = limited(1, 1, INF)  # gradient accumulation inside one program
    # * float32 | bfloat16; parameters, times, EMAs and loss stay float32
    compute_dtype: str = choice("float32", DTYPES)
    # what the backward pass computes again: none | blocks = all inside a block |
    # dots = all but matmuls
    remat: str = choice("none", REMATS)
    # a DiT's blocks as one compiled block, run depth times: compiles faster
    scan_blocks: bool = False
    # layout of the rows: split | shared = guided passes in one | joint = also one gradient pass |
    # whole = all alike | auto = the fastest
    rows: str = choice("split", (*LAYOUTS, AUTO))
    label_dropout: float = limited(0.0, 0, 0.999)  # * share of rows trained with the null class
    path: str = choice("linear", PATHS)  # from data to noise: linear is z = (1 - t) x + t e
    network: NetworkConfig = field(default_factory=UNetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    times: TimeLaw = field(default_factory=TimeLaw)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def num_classes(self) -> int:
        """Classes that the network is conditioned on, 0 if none. This number is the null class."""
        return self.network.num_classes

    @property
    def taught(self) -> bool:
        """Whether a frozen teacher takes part in the run."""
        return bool(teacher.uses(self.loss, self.curriculum.kinds))


def complete(values: Mapping[str, Any]) -> config_dict.ConfigDict:
    """A ConfigDict with every field of `Config`, the given ones set.

    Raises DmfError for an unknown or misspelt key.
    """
    return config_dict.ConfigDict(to_dict(parse(values)), convert_dict=True)


def parse(values: Mapping[str, Any] | config_dict.ConfigDict) -> Config:
    """A `Config` from a nested mapping: a ConfigDict, a dict or stored JSON.

    Former names of fields and kinds, which old files have, become today's.
    Raises DmfError for an unknown key, a value of another type, and a value out of range.
    """
    plain = values.to_dict() if isinstance(values, config_dict.ConfigDict) else values
    config = fields.section(Config, fields.current(plain), "config")
    fields.check(config, "config")
    kinds = tuple(FORMER.get(kind, kind) for kind in config.curriculum.kinds)
    return replace(config, curriculum=replace(config.curriculum, kinds=kinds))


def to_dict(config: Config) -> dict[str, Any]:
    """The Config as nested plain values, fit for JSON; `parse` inverts it."""
    return dataclasses.asdict(config)


def check(config: Config, num_classes: int, dataset_size: int) -> tuple[Stage, ...]:
    """The run's stages, once the fields agree with each other, the data and the network.

    num_classes, dataset_size: of the data. Raises DmfError where they do not agree.
    """
    _check_run(config, dataset_size)
    _check_labels(config, num_classes)
    loss, taught = config.loss, config.teacher
    extra = guidance.passes(config.guidance), taught.tangent_passes(loss)
    by_teacher = partial(taught.passes, loss)
    sizes = config.batch_size, dataset_size
    stages = build_stages(config.curriculum, *sizes, *extra, by_teacher)
    _check_kinds(config, stages)
    _check_guidance(config, stages)
    config.teacher.check(config.loss, config.curriculum.kinds, config.num_classes)
    every = config.run.score_every_steps
    if every and stages[-1].last // every > SCORES:
        raise DmfError(
            f"config.run.score_every_steps = {every}: the run would be scored "
            f"{stages[-1].last // every} times; expected at most {SCORES} times"
        )
    return stages


def check_path(path: str) -> None:
    """Raises DmfError where a dotted path such as config.loss.p names no field.

    A field of the network is known if any kind of network has it.
    """
    names = path.split(".")
    rooms: list[Any] = [Config]
    for depth, name in enumerate(names[1:], 1):
        hints = {k: v for room in rooms for k, v in typing.get_type_hints(room).items()}
        parent = ".".join(names[:depth])
        if not hints:
            raise DmfError(f"{path}: {parent} is a value, not a section; expected {parent}")
        if name not in hints:
            raise fields.unknown(parent, name, hints)
        rooms = fields.sections_of(hints[name])


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "config"
) -> list[str]:
    """Keys whose values differ between two nested mappings, as 'config.a.b: old -> new'."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}.{key}")
        elif (list(a) if isinstance(a, tuple) else a) != (list(b) if isinstance(b, tuple) else b):
            found.append(f"{prefix}.{key}: {a} -> {b}")
    return found


def _check_run(config: Config, dataset_size: int) -> None:
    """Batches, averages, guard and scores."""
    run, guard = config.run, config.guard
    if config.batch_size > dataset_size:
        raise DmfError(
            f"config.batch_size = {config.batch_size}: expected at most the {dataset_size} images "
            f"of {config.data.name}"
        )
    if config.batch_size % config.microbatches:
        raise DmfError(
            f"config.microbatches = {config.microbatches}: expected a divisor of batch_size "
            f"{config.batch_size}"
        )
    if config.ema.index() is None and config.loss.tangent in velocity.AVERAGED:
        raise DmfError(
            f"config.loss.tangent = {config.loss.tangent!r} with config.ema.evaluate = 0: expected "
            "the half-life of the EMA to go along"
        )
    config.loss.check(config.times, config.network.logvar)
    if guard.action != "off" and not guard.every_steps:
        raise DmfError(
            f"config.guard.every_steps = 0 with config.guard.action = {guard.action!r}: expected "
            "probes"
        )
    if config.loss.tangent == velocity.HEAD and not getattr(config.network, "velocity_head", 0):
        raise DmfError(
            f"config.loss.tangent = {velocity.HEAD!r}: expected another direction, as "
            "config.network has no velocity head (network.velocity_head)"
        )
    for name in ("features", "reference"):
        if getattr(run, name) and not run.protocol:
            raise DmfError(
                f"config.run.{name} = {getattr(run, name)!r}: expected config.run.protocol with "
                "it, which says its use"
            )
    if run.protocol and not run.score_samples:
        raise DmfError(
            f"config.run.protocol = {run.protocol!r} with config.run.score_samples = 0: expected "
            "samples to score"
        )


def _check_labels(config: Config, num_classes: int) -> None:
    """Classes and augmentation labels, between data, start and network."""
    _check_init_labels(config, num_classes)
    wanted = config.num_classes
    if config.label_dropout and not wanted:
        raise DmfError(
            f"config.label_dropout = {config.label_dropout}: expected 0, as config.network takes "
            "no classes"
        )
    augment_dim = getattr(config.network, "augment_dim", 0)
    if config.data.augment and augment_dim != 6:
        raise DmfError(
            f"config.data.augment = {config.data.augment}: expected 0, or a network with "
            f"config.network.augment_dim = 6 (it has {augment_dim})"
        )


def _check_init_labels(config: Config, num_classes: int) -> None:
    """Classes of data and network, as config.init_labels lets them differ from the start's."""
    wanted, rule, data = config.num_classes, config.init_labels, config.data.name
    if rule and not config.init:
        raise DmfError(f"config.init_labels = {rule!r}: expected '', as config.init names no start")
    if rule not in ("", *INIT_LABELS) and not rule.endswith(".json"):
        names = ", ".join(INIT_LABELS)
        raise DmfError(f"config.init_labels = {rule!r}: expected {names}, or a .json file")
    theirs = f"the {num_classes} classes of {data}"
    rules = {
        "": (wanted in (0, num_classes), f"0 or {theirs}"),
        "keep": (wanted >= num_classes > 0, f"at least {theirs}"),
        "none": (not wanted, "0"),
    }
    fits, expected = rules.get(rule, (wanted == num_classes > 0, theirs))
    if not fits:
        also = f" with config.init_labels = {rule!r}" if rule else ""
        hint = f"; {INIT_HINT}" if config.init and not rule else ""
        raise DmfError(f"config.network.num_classes = {wanted}{also}: expected {expected}{hint}")


def _check_kinds(config: Config, stages: tuple[Stage, ...]) -> None:
    """Attention kernels and the share of rows with r < t, as the kinds of stages need them."""
    for sort in {KINDS[s.kind].arithmetic for s in stages}:
        if getattr(config.attention, sort) == "cudnn" and config.compute_dtype != "bfloat16":
            raise DmfError(
                f"config.attention.{sort} = 'cudnn', a kernel of half precision: expected "
                f"config.compute_dtype = bfloat16, got {config.compute_dtype}"
            )
    for stage in stages:
        if KINDS[stage.kind].extra and not config.times.r_neq_t_fraction:
            raise DmfError(
                "config.times.r_neq_t_fraction = 0: expected a positive share, as a "
                f"{stage.kind} stage learns from rows with r < t"
            )


def _check_guidance(config: Config, stages: tuple[Stage, ...]) -> None:
    """Guidance and guided stages belong together; both need classes and dropped labels."""
    given, kinds = config.guidance, [s.kind for s in stages if KINDS[s.kind].guided]
    if not kinds:
        for f in dataclasses.fields(GuidanceConfig):
            if getattr(given, f.name) != f.default:
                raise DmfError(
                    f"config.guidance.{f.name} = {getattr(given, f.name)}: expected {f.default}, "
                    f"or one of {', '.join(GUIDED)} in config.curriculum.kinds, as no other kind "
                    "of stage is guided"
                )
        return
    if not config.num_classes:
        raise DmfError(
            f"config.curriculum.kinds has {kinds[0]!r}: expected no guided stage, as "
            "config.network takes no classes"
        )
    if not config.label_dropout:
        raise DmfError(
            f"config.label_dropout = 0: expected a positive share, as a {kinds[0]} stage guides "
            "away from the null class, which is learnt from dropped labels"
        )
    if given.told and (given.kappa or not getattr(config.network, "takes_guidance", False)):
        raise DmfError(
            f"config.guidance.most = {given.most:g}: expected 1, or kappa = 0 and a network that "
            "is told guidance, as network.kind = in_context_dit with network.scale_tokens"
        )
    if given.omega == 1 and not given.kappa and not given.told:
        raise DmfError(
            "config.guidance.omega = 1 with kappa = 0: expected other values, as this guides "
            f"nothing: a {kinds[0]} stage would be a {KINDS[kinds[0]].unguided} stage that costs "
            "more"
        )
    if given.t_start >= given.t_end:
        raise DmfError(
            f"config.guidance.t_start = {given.t_start}: expected a time below t_end = "
            f"{given.t_end}"
        )
