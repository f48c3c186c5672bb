"""The run as data: one typed, checked tree of values, and the way to it from a config file and flags.

A config file's `get_config` returns `complete({...})`: a ConfigDict with every field present, so that any of them can be
set by a flag (`--config.curriculum.q=4`). `parse` turns the ConfigDict back into a `Config`, and `check` rejects what
cannot work before anything is allocated. All errors name the key, the value and what was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import sys
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import config_dict

from dmf.data import DataConfig
from dmf.errors import DmfError
from dmf.method import guidance, objectives
from dmf.method.curriculum import GUIDED, PASSES, CurriculumConfig, Stage, build_stages, identity_of
from dmf.method.flow import TimeLaw
from dmf.method.guidance import GuidanceConfig
from dmf.method.objectives import LossConfig
from dmf.method.samplers import SAMPLERS
from dmf.networks import ADMConfig, DiTConfig, MLPConfig, UNetConfig, attention
from dmf.optim import EMAConfig, OptimizerConfig
from dmf.run.guard import ACTIONS, GuardConfig
from dmf.sharding import MeshConfig

NETWORKS = {"unet": UNetConfig, "dit": DiTConfig, "mlp": MLPConfig, "adm": ADMConfig}
LEAST = sys.float_info.min  # the least positive number: a range that excludes zero
BELOW_1 = 1 - 1e-9  # a range that excludes one
INF = sys.float_info.max  # a range without an upper end still excludes inf

# What each field may be by itself; of a tuple, each element. Fields not listed are checked where they are read.
CHOICES: dict[str, Collection[str]] = {
    "compute_dtype": ("float32", "bfloat16"),
    "remat": ("none", "blocks", "dots"),
    "times.pairing": ("sorted", "min"),
    "loss.residual_scale": ("raw", "unit"),
    "loss.tangent": ("data", "own", "ema"),
    "guard.action": ACTIONS,
    "run.sampler": SAMPLERS,
    **{f"precision.{kind}": ("default", "high", "highest") for kind in PASSES},
    **{
        f"attention.{kind}": attention.HAS_JVP if kind == "jvp" else tuple(attention.KERNELS)
        for kind in PASSES
    },
}
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "batch_size": (1, INF),
    "microbatches": (1, INF),
    "mesh.replica": (0, INF),
    "mesh.fsdp": (0, INF),
    "label_dropout": (0, 0.999),
    "times.t_mean": (-INF, INF),
    "times.r_mean": (-INF, INF),
    "times.t_std": (LEAST, INF),
    "times.r_std": (LEAST, INF),
    "times.r_neq_t_fraction": (0, 1),
    "curriculum.length": (LEAST, INF),
    "curriculum.stage_lengths": (LEAST, INF),
    "curriculum.pretrain_length": (0, INF),
    "curriculum.stage_learning_rates": (LEAST, INF),
    "curriculum.switch_warmup_steps": (0, INF),
    "curriculum.interval_floor": (LEAST, 1),
    "curriculum.interval_halflife_images": (LEAST, INF),
    "loss.p": (0, 2),
    "loss.eps": (LEAST, INF),
    "loss.product_rule": (0, 1),
    "guidance.omega": (LEAST, INF),
    "guidance.kappa": (0, BELOW_1),
    "guidance.t_start": (0, 1),
    "guidance.t_end": (0, 1),
    "optimizer.learning_rate": (LEAST, INF),
    "optimizer.pretrain_learning_rate": (LEAST, INF),
    "optimizer.warmup_steps": (0, INF),
    "optimizer.pretrain_warmup_steps": (0, INF),
    "optimizer.decay_fraction": (0, 1),
    "optimizer.pretrain_decay_fraction": (0, 1),
    "optimizer.b1": (0, BELOW_1),
    "optimizer.b2": (0, BELOW_1),
    "optimizer.eps": (LEAST, INF),
    "optimizer.weight_decay": (0, INF),
    "optimizer.clip_norm": (0, INF),
    "ema.halflife_images": (LEAST, INF),
    "ema.rampup_ratio": (0, INF),
    "run.log_every_steps": (1, INF),
    "run.checkpoint_every_steps": (1, INF),
    "run.keep_checkpoints": (
        2,
        INF,
    ),  # the one before is all there is while the newest is being completed
    "run.sample_rows": (1, INF),
    "run.score_samples": (0, INF),
    "run.score_steps": (1, INF),
    "run.score_every_steps": (0, INF),
    "guard.every_steps": (0, INF),
    "guard.rows": (8, INF),
    "guard.factor": (1 + 1e-9, INF),
    "guard.ulps": (0, INF),
    "guard.limit": (0, INF),
}
NOT_EMPTY = ("ema.halflife_images", "run.score_steps")


@dataclass(frozen=True)
class PrecisionConfig:
    """Matmul precision (jax.default_matmul_precision) per kind of stage; only accelerators tell them apart.

    A guided kind takes that of the kind whose identity it enforces.
    Differences of nearby outputs (discrete) and tangents (jvp) need "highest"; plain flow matching does not.
    """

    flow: str = "high"  # * of pretraining
    trajectory: str = "high"  # * of stage 0
    discrete: str = "highest"  # * of the finite-difference stages
    jvp: str = "highest"  # * of the exact derivative's


@dataclass(frozen=True)
class AttentionConfig:
    """Attention kernel per kind of stage (`dmf.networks.attention`); a guided kind takes that of its identity.

    xla: by XLA, stores all N x N weights of N tokens. chunked: the same numbers but for rounding, memory linear in N. cudnn:
    NVIDIA's fused kernel, bfloat16. flash: Pallas' kernel on TPUs. Only the first two have a forward mode, which jvp needs.
    """

    flow: str = "xla"  # of pretraining
    trajectory: str = "xla"  # of stage 0
    discrete: str = "xla"  # of the finite-difference stages
    jvp: str = "xla"  # of the exact derivative's, which needs a forward mode


@dataclass(frozen=True)
class RunConfig:
    """What a run writes, and when. Nothing here changes a step; a guard heeds scores, and goes back to what is kept."""

    log_every_steps: int = 100  # a line of metrics.jsonl, and of the progress shown
    checkpoint_every_steps: int = 1000  # besides every stage boundary, which is always kept
    keep_checkpoints: int = 2  # newest ones kept apart from the stage boundaries
    sample_rows: int = 8  # the sample grid has this many rows and columns
    score_samples: int = 2000  # samples per score; 0 = no scores
    score_steps: tuple[int, ...] = (
        1,
        2,
        4,
        32,
    )  # scored before and after the curriculum; at other stages: the first
    score_every_steps: int = (
        0  # also score, and save, every so many steps; 0 = at stage boundaries only
    )
    protocol: str = (
        ""  # of dmf.metrics.protocols, or a .json; "" = the data set's own score, if it has one
    )
    features: str = ""  # converted feature network of the protocol
    reference: str = ""  # the protocol's reference statistics
    vae: str = ""  # converted autoencoder that makes images of latents, for scores and pictures
    sampler: str = (
        "few_step"  # of scores and pictures; euler and heun follow u(z, t, t), for flow models
    )
    tensorboard: bool = True  # write event files where tensorflow and tensorboard are installed


@dataclass(frozen=True)
class Config:
    """A whole run. Field by field in the dataclasses of the modules that read them.

    A comment that begins with * is that of a field whose value in the paper we do not know, docs/config.md lists them all.
    """

    seed: int = 0  # of weights, noise, times, order of the data and scores; the paper reports no spread over seeds
    init: str = ""  # checkpoint or work directory of a flow model to start from; "" = fresh weights
    batch_size: int = 1024  # global, over all devices and microbatches
    microbatches: int = 1  # gradient accumulation inside one program
    compute_dtype: str = (
        "float32"  # * float32 | bfloat16; parameters, times, EMAs and loss stay float32
    )
    remat: str = "none"  # what the backward pass computes again: none | blocks = all inside a block | dots = all but matmuls
    scan_blocks: bool = (
        False  # a DiT's blocks as one compiled block, run depth times: compiles faster
    )
    label_dropout: float = 0.0  # * share of rows trained with the null class
    network: UNetConfig | DiTConfig | MLPConfig | ADMConfig = field(default_factory=UNetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    times: TimeLaw = field(default_factory=TimeLaw)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def num_classes(self) -> int:
        """Classes the network is conditioned on, 0 if none; as a label, this number is the null class."""
        return getattr(self.network, "num_classes", 0)


def complete(values: Mapping[str, Any]) -> config_dict.ConfigDict:
    """A ConfigDict with every field of `Config`, the given ones set. Raises DmfError for an unknown or misspelt key."""
    return config_dict.ConfigDict(to_dict(parse(values)), convert_dict=True)


def parse(values: Mapping[str, Any] | config_dict.ConfigDict) -> Config:
    """Nested mapping (ConfigDict, dict, JSON) -> Config, every key known and every value of its field's type."""
    plain = values.to_dict() if isinstance(values, config_dict.ConfigDict) else values
    config = section(Config, plain, "config")
    _check_values(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The Config as nested plain values, fit for JSON; `parse` inverts it."""
    return dataclasses.asdict(config)


def check(config: Config, num_classes: int, dataset_size: int) -> tuple[Stage, ...]:
    """The run's stages, after the fields have been held against each other, the data and the network.

    num_classes, dataset_size: of the data. Raises DmfError.
    """
    if config.batch_size > dataset_size:
        raise DmfError(
            f"config.batch_size = {config.batch_size}: expected at most the {dataset_size} images of {config.data.name}"
        )
    if config.batch_size % config.microbatches:
        raise DmfError(
            f"config.microbatches = {config.microbatches}: expected a divisor of batch_size {config.batch_size}"
        )
    if config.ema.index() is None and config.loss.tangent == "ema":
        raise DmfError(
            "config.loss.tangent = 'ema' with config.ema.evaluate = 0: expected the half-life of the EMA to go along"
        )
    if config.guard.action != "off" and not config.guard.every_steps:
        raise DmfError(
            f"config.guard.every_steps = 0 with config.guard.action = {config.guard.action!r}: expected probes"
        )
    _check_scores(config)
    _check_labels(config, num_classes)
    extra = guidance.passes(config.guidance), objectives.passes(config.loss)
    stages = build_stages(config.curriculum, config.batch_size, dataset_size, *extra)
    _check_kinds(config, stages)
    _check_guidance(config, stages)
    return stages


def check_path(path: str) -> None:
    """Raises DmfError where a dotted path such as config.loss.p names no field (of the network: of no kind of network)."""
    names = path.split(".")
    rooms: list[Any] = [Config]
    for depth, name in enumerate(names[1:], 1):
        hints = {
            k: v
            for room in rooms
            if dataclasses.is_dataclass(room)
            for k, v in typing.get_type_hints(room).items()
        }
        parent = ".".join(names[:depth])
        if not hints:
            raise DmfError(f"{path}: {parent} is a value, not a section; expected {parent}")
        if name not in hints:
            raise _unknown(parent, name, hints)
        rooms = (
            list(NETWORKS.values()) if parent == "config" and name == "network" else [hints[name]]
        )


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


def section(cls: type, values: Any, path: str) -> Any:
    """Nested mapping -> an instance of the dataclass `cls`, every key known and every value of its field's type."""
    if not isinstance(values, Mapping):
        raise DmfError(
            f"{path} = {values!r:.100}: expected a section with the fields {', '.join(_names(cls))}"
        )
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise _unknown(path, key, hints)
    for f in dataclasses.fields(cls):
        if f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise DmfError(f"{path}.{f.name} is missing: expected a value, as it has no default")
    return cls(**{key: _value(hints[key], values[key], f"{path}.{key}") for key in values})


def _unknown(path: str, key: Any, fields: Collection[str]) -> DmfError:
    near = difflib.get_close_matches(str(key), fields, 1, 0.0)[0]
    return DmfError(f"{path}.{key}: no such field; did you mean {path}.{near}?")


def _value(hint: Any, value: Any, path: str) -> Any:
    if path == "config.network":
        return section(_network_class(value), value, path)
    if dataclasses.is_dataclass(hint):
        return section(typing.cast(type, hint), value, path)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple | list):
            raise DmfError(f"{path} = {value!r}: expected a tuple")
        item = typing.get_args(hint)[0]
        if item is str:  # --config.curriculum.kinds=discrete,jvp arrives as one name
            value = [name for v in value for name in (v.split(",") if isinstance(v, str) else [v])]
        return tuple(_value(item, v, path) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise DmfError(f"{path} = {value!r}: expected {hint.__name__}")
    return value


def _network_class(values: Any) -> type:
    kind = values.get("kind", "") if isinstance(values, Mapping) else ""
    if kind not in NETWORKS:
        raise DmfError(f"config.network.kind = {kind!r}: expected one of {', '.join(NETWORKS)}")
    return NETWORKS[kind]


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _check_values(config: Config) -> None:
    """Every field by itself, against `CHOICES`, `RANGES` and `NOT_EMPTY`."""
    for key, choices in CHOICES.items():
        value = operator.attrgetter(key)(config)
        if value not in choices:
            raise DmfError(f"config.{key} = {value!r}: expected one of {', '.join(choices)}")
    for key, (low, high) in RANGES.items():
        value = operator.attrgetter(key)(config)
        for number in value if isinstance(value, tuple) else (value,):
            if not low <= number <= high:
                least = (
                    "above 0"
                    if low == LEAST
                    else f"of at least {low:g}"
                    if low > -INF
                    else "that is finite"
                )
                most = (
                    " and below 1"
                    if high == BELOW_1
                    else f" and at most {high:g}"
                    if high < INF
                    else ""
                )
                raise DmfError(f"config.{key} = {value}: expected a number {least}{most}")
    for key in NOT_EMPTY:
        if not operator.attrgetter(key)(config):
            raise DmfError(f"config.{key} = (): expected at least one number")


def _check_scores(config: Config) -> None:
    run = config.run
    for name in ("features", "reference"):
        if getattr(run, name) and not run.protocol:
            raise DmfError(
                f"config.run.{name} = {getattr(run, name)!r}: expected config.run.protocol with it, which says its use"
            )
    if run.protocol and not run.score_samples:
        raise DmfError(
            f"config.run.protocol = {run.protocol!r} with config.run.score_samples = 0: expected samples to score"
        )


def _check_labels(config: Config, num_classes: int) -> None:
    wanted = config.num_classes
    if wanted and wanted != num_classes:
        raise DmfError(
            f"config.network.num_classes = {wanted}: expected 0 or the {num_classes} classes of {config.data.name}"
        )
    if config.label_dropout and not wanted:
        raise DmfError(
            f"config.label_dropout = {config.label_dropout}: expected 0, as config.network takes no classes"
        )
    augment_dim = getattr(config.network, "augment_dim", 0)
    if config.data.augment and augment_dim != 6:
        raise DmfError(
            f"config.data.augment = {config.data.augment}: expected 0, or a network with config.network.augment_dim = 6 "
            f"(it has {augment_dim})"
        )


def _check_kinds(config: Config, stages: tuple[Stage, ...]) -> None:
    kinds = {identity_of(s.kind): s.kind for s in stages}
    for kind in kinds:
        if getattr(config.attention, kind) == "cudnn" and config.compute_dtype != "bfloat16":
            raise DmfError(
                f"config.attention.{kind} = 'cudnn', a kernel of half precision: expected config.compute_dtype = bfloat16, got "
                f"{config.compute_dtype}"
            )
    for kind in ("discrete", "jvp"):
        if kind in kinds and not config.times.r_neq_t_fraction:
            raise DmfError(
                f"config.times.r_neq_t_fraction = 0: expected a positive share, as a {kinds[kind]} stage learns from rows with "
                "r < t"
            )


def _check_guidance(config: Config, stages: tuple[Stage, ...]) -> None:
    given, kinds = config.guidance, [s.kind for s in stages if s.kind in GUIDED]
    if not kinds:
        for f in dataclasses.fields(GuidanceConfig):
            if getattr(given, f.name) != f.default:
                raise DmfError(
                    f"config.guidance.{f.name} = {getattr(given, f.name)}: expected {f.default}, or one of {', '.join(GUIDED)} "
                    "in config.curriculum.kinds, as no other kind of stage is guided"
                )
        return
    if not config.num_classes:
        raise DmfError(
            f"config.curriculum.kinds has {kinds[0]!r}: expected no guided stage, as config.network takes no classes"
        )
    if not config.label_dropout:
        raise DmfError(
            f"config.label_dropout = 0: expected a positive share, as a {kinds[0]} stage guides away from the null class, "
            "which is learnt from dropped labels"
        )
    if given.omega == 1 and not given.kappa:
        raise DmfError(
            f"config.guidance.omega = 1 with kappa = 0: expected other values, as this guides nothing: a {kinds[0]} stage "
            f"would be a {identity_of(kinds[0])} stage that costs more"
        )
    if given.t_start >= given.t_end:
        raise DmfError(
            f"config.guidance.t_start = {given.t_start}: expected a time below t_end = {given.t_end}"
        )
