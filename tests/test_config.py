"""The run as data: what is wrong with a config is said by the key, before anything is computed."""

import dataclasses
import json
import random
import re
import subprocess
import sys

import pytest

from dmf import config, fields
from dmf.errors import DmfError
from dmf.run import workdir
from tests import ROOT
from tests.tiny import TINY, merged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(batchsize=3), "config.batchsize: no such field; did you mean config.batch_size?"),
        (dict(loss=dict(power=1.0)), "config.loss.power: no such field; did you mean"),
        (dict(seed=1.5), "config.seed = 1.5: expected int"),
        (dict(seed=True), "config.seed = True: expected int"),
        (dict(ema=dict(halflife_images=3.0)), "config.ema.halflife_images = 3.0: expected a tuple"),
        (
            dict(ema=dict(halflife_images=("a",))),
            "config.ema.halflife_images = 'a': expected float",
        ),
        (
            dict(data="digits"),
            "config.data = 'digits': expected a section with the fields name, data_dir",
        ),
        (
            dict(network=dict(kind="cnn")),
            "config.network.kind = 'cnn': expected one of unet, dit, mlp",
        ),
    ],
)
def test_wrong_keys_and_types(change, message):
    values = {**TINY, **{k: v for k, v in change.items() if not isinstance(v, dict)}}
    values = merged(values, **{k: v for k, v in change.items() if isinstance(v, dict)})
    with pytest.raises(DmfError, match=message.replace("?", r"\?")):
        config.parse(values)


def test_a_missing_value_without_default_is_named():
    with pytest.raises(DmfError, match="config.network.depth is missing"):
        config.parse({**TINY, "network": dict(kind="dit", width=8, heads=2)})


def test_names_in_one_flag_are_taken_apart_at_the_commas():
    for given in (("discrete,jvp",), ("discrete", "jvp")):
        assert config.parse(merged(TINY, curriculum=dict(kinds=given))).curriculum.kinds == (
            "discrete",
            "jvp",
        )


def test_whole_numbers_are_taken_for_floats_also_inside_tuples():
    parsed = config.parse(merged(TINY, curriculum=dict(q=3), ema=dict(halflife_images=[50, 800])))
    assert parsed.curriculum.q == 3.0 and parsed.ema.halflife_images == (50.0, 800.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(batch_size=0), "config.batch_size = 0: expected a number of at least 1"),
        (
            dict(batch_size=2000),
            "config.batch_size = 2000: expected at most the 1352 images of digits",
        ),
        (dict(microbatches=3), "config.microbatches = 3: expected a divisor of batch_size 32"),
        (dict(seed=2**32), "config.seed = 4294967296: expected a number of at least 0 and at most"),
        (
            dict(compute_dtype="bf16"),
            "config.compute_dtype = 'bf16': expected one of float32, bfloat16",
        ),
        (
            dict(precision=dict(derivative="higest")),
            "config.precision.derivative = 'higest': expected one of default, high, highest",
        ),
        (
            dict(label_dropout=1.0),
            "config.label_dropout = 1.0: expected a number of at least 0 and at most 0.999",
        ),
        (
            dict(loss=dict(p=-0.5)),
            "config.loss.p = -0.5: expected a number of at least 0 and at most 2",
        ),
        (dict(loss=dict(eps=0.0)), "config.loss.eps = 0.0: expected a number above 0"),
        (
            dict(loss=dict(product_rule=2.0)),
            "config.loss.product_rule = 2.0: expected a number of at least 0 and at most 1",
        ),
        (
            dict(loss=dict(residual_scale="mf")),
            "config.loss.residual_scale = 'mf': expected one of raw, unit",
        ),
        (
            dict(optimizer=dict(learning_rate=0.0)),
            "config.optimizer.learning_rate = 0.0: expected a number above 0",
        ),
        (
            dict(optimizer=dict(warmup_steps=-1)),
            "config.optimizer.warmup_steps = -1: expected a number of at least 0",
        ),
        (dict(optimizer=dict(clip_norm=float("nan"))), "config.optimizer.clip_norm = nan"),
        (dict(curriculum=dict(length=float("inf"))), "config.curriculum.length = inf"),
        (
            dict(curriculum=dict(pretrain_length=0.3)),
            "config.curriculum.pretrain_length = 0.3 steps: expected 0, or at least one step",
        ),
        (
            dict(run=dict(keep_checkpoints=1)),
            "config.run.keep_checkpoints = 1: expected a number of at least 2",
        ),
        (
            dict(run=dict(score_steps=())),
            r"config.run.score_steps = \(\): expected at least one number",
        ),
        (
            dict(run=dict(score_steps=(1, 0))),
            r"config.run.score_steps = \(1, 0\): expected a number of at least 1",
        ),
        (
            dict(run=dict(sampler="dpm")),
            "config.run.sampler = 'dpm': expected one of few_step, euler, heun",
        ),
        (
            dict(ema=dict(halflife_images=(), evaluate=0.0)),
            r"config.ema.halflife_images = \(\): expected at least one number",
        ),
        (dict(ema=dict(evaluate=7.0)), "config.ema.evaluate = 7: expected 0"),
        (
            dict(network=dict(num_classes=7)),
            "config.network.num_classes = 7: expected 0 or the 10 classes of digits",
        ),
        (dict(network=dict(num_classes=0)), "config.label_dropout = 0.1: expected 0"),
        (
            dict(data=dict(augment=0.1)),
            "config.data.augment = 0.1: expected 0, or a network with config.network.augment_dim",
        ),
        (
            dict(times=dict(r_neq_t_fraction=0.0)),
            "config.times.r_neq_t_fraction = 0: expected a positive share",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_training(change, message):
    with pytest.raises(DmfError, match=message):
        config.check(config.parse(merged(TINY, **change)), 10, 1352)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("config.curiculum.q", "config.curiculum: no such field; did you mean config.curriculum?"),
        (
            "config.curriculum.kind",
            "config.curriculum.kind: no such field; did you mean config.curriculum.kinds?",
        ),
        (
            "config.seed.x",
            "config.seed.x: config.seed is a value, not a section; expected config.seed",
        ),
        (
            "config.network.dept",
            "config.network.dept: no such field; did you mean config.network.depth?",
        ),
    ],
)
def test_a_flag_for_no_field_is_answered_with_the_nearest(path, message):
    with pytest.raises(DmfError, match=message.replace("?", r"\?")):
        config.check_path(path)


@pytest.mark.parametrize(
    "path",
    ["config.seed", "config.network.depth", "config.network.channels", "config.run.score_steps"],
)
def test_a_flag_for_a_field_is_let_through(path):
    config.check_path(path)


OLD = dict(
    TINY,
    curriculum=dict(stages=3, kinds=("trajectory", "discrete", "jvp"), length=6.0),
    precision=dict(flow="default", trajectory="default", discrete="high", jvp="highest"),
    attention=dict(flow="xla", trajectory="xla", discrete="chunked", jvp="chunked"),
)
NEW = dict(
    OLD,
    curriculum=dict(stages=3, kinds=("all_pairs", "discrete", "jvp"), length=6.0),
    precision=dict(plain="default", difference="high", derivative="highest"),
    attention=dict(plain="xla", difference="chunked", derivative="chunked"),
)


def test_former_names_of_fields_and_kinds_are_read():
    assert config.parse(OLD) == config.parse(NEW)
    assert config.to_dict(config.parse(OLD)) == config.to_dict(config.parse(NEW))
    half = config.parse(dict(OLD, precision=dict(trajectory="highest")))
    assert half.precision == config.PrecisionConfig(plain="highest")
    joined = config.parse(dict(TINY, curriculum=dict(stages=2, kinds=("trajectory,jvp",))))
    assert joined.curriculum.kinds == ("all_pairs", "jvp")


def test_a_directory_with_former_names_goes_on_without_a_change(tmp_path):
    (tmp_path / workdir.CONFIG).write_text(json.dumps(OLD))
    workdir.claim(tmp_path, config.parse(NEW), None, {}, fresh=False)
    other = config.parse(merged(NEW, precision=dict(difference="highest")))
    with pytest.raises(DmfError, match="config.precision.difference: high -> highest"):
        workdir.claim(tmp_path, other, None, {}, fresh=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            dict(flow="high", trajectory="highest"),
            "config.precision.trajectory = 'highest' with config.precision.flow = 'high': expected "
            "one value, as both are config.precision.plain now",
        ),
        (
            dict(jvp="high", derivative="default"),
            "config.precision.derivative = 'default' with config.precision.jvp = 'high': expected "
            "one value, as both are config.precision.derivative now",
        ),
        (dict(guided="high"), "config.precision.guided: no such field; did you mean"),
    ],
)
def test_two_names_of_one_field_that_contradict_each_other_are_refused(given, message):
    with pytest.raises(DmfError, match=re.escape(message)):
        config.parse(dict(TINY, precision=given))


def test_flags_with_former_names_set_todays_fields():
    given = [
        "main.py",
        "--config=configs/digits.py",
        "-config.attention.jvp=chunked",
        "--config.precision.flow",
        "high",
        "--config.precision.plain=high",
        "--config.loss.p=1",
        "--attention.jvp=xla",
    ]
    assert fields.current_flags(given) == [
        *given[:2],
        "-config.attention.derivative=chunked",
        "--config.precision.plain",
        *given[4:],
    ]
    with pytest.raises(DmfError, match="--config.attention.trajectory = 'xla' with --config.att"):
        fields.current_flags(["--config.attention.flow=cudnn", "--config.attention.trajectory=xla"])


def numbers(values, path="config"):
    """Every field of a config that holds numbers, as (path, field)."""
    for f in dataclasses.fields(values):
        value, where = getattr(values, f.name), f"{path}.{f.name}"
        if dataclasses.is_dataclass(value):
            yield from numbers(value, where)
        elif type(value) in (int, float) or isinstance(value, tuple) and f.name != "kinds":
            yield where, f


NETWORKS = (dict(kind="unet"), dict(kind="adm"), dict(kind="mlp"), TINY["network"])


def test_every_number_of_the_config_has_its_range():
    for network in NETWORKS:
        for path, f in numbers(config.parse(dict(network=network))):
            assert fields.RANGE in f.metadata, path


def outside(rng, allowed, whole):
    """A number that a range does not allow, of the field's type."""
    allowed = allowed.of(1 if whole else 1.0)
    if whole:
        beyond = [int(allowed.high) + 1, 10**12, 2**63, 10**30, -1, -(2**40), allowed.low - 1]
    else:
        beyond = [float("nan"), float("inf"), float("-inf"), 1e300, -1e300, allowed.high * 2 + 1]
    return rng.choice([n for n in beyond if not allowed.low <= n <= allowed.high])


def test_two_hundred_numbers_outside_their_range_are_refused():
    rng = random.Random(0)
    known = [(n, *found) for n in NETWORKS for found in numbers(config.parse(dict(network=n)))]
    for _ in range(200):
        network, path, f = rng.choice(known)
        whole = "int" in str(f.type)
        value = outside(rng, f.metadata[fields.RANGE], whole)
        *sections, name = path.split(".")[1:]
        values = {name: (value,) if "tuple" in str(f.type) else value}
        for section in reversed(sections):
            values = {section: values}
        values = merged(dict(network=network), **values)
        with pytest.raises(DmfError) as error:
            config.parse(values)
        text = str(error.value)
        assert text.startswith(f"{path} = ") and "expected a number" in text and "\n" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=1e38), "config.curriculum.q = 1e+38: stage 1 has the interval 1e-38; expected at"),
        (dict(length=1e12), "config.curriculum.length = 1e+12 steps: the run has 1e+12 steps; exp"),
        (dict(stages=10**9), "config.curriculum.stages = 1000000000: expected a number of at leas"),
        (dict(stage_lengths=(1.0,) * 10_001), "config.curriculum.stage_lengths has 10001 numbers"),
    ],
)
def test_what_would_take_all_memory_or_vanish_in_float32_is_refused(change, message):
    with pytest.raises(DmfError, match=re.escape(message)):
        config.check(config.parse(dict(network=NETWORKS[2], curriculum=change)), 10, 10_000)


def test_a_run_is_scored_a_bounded_number_of_times():
    values = dict(network=NETWORKS[2], run=dict(score_every_steps=1))
    with pytest.raises(DmfError, match="score_every_steps = 1: the run would be scored 200000 tim"):
        config.check(config.parse(merged(values, curriculum=dict(length=2e5))), 10, 10_000)


def test_the_config_loads_no_reader_and_nothing_of_a_run():
    code = "import sys, dmf.config; print(*(n for n in sys.modules if n.startswith('dmf.')))"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert (
        loaded & {f"dmf.data.{path.stem}" for path in (ROOT / "dmf" / "data").glob("*.py")} == set()
    )
    assert not {name for name in loaded if name.split(".")[1] in ("run", "storage", "evaluation")}


def test_differences_name_key_and_both_values():
    old = {"a": 1, "b": {"c": [1, 2], "d": 2}}
    assert config.differences(old, {"a": 1, "b": {"c": (1, 2), "d": 3}, "e": 4}) == [
        "config.b.d: 2 -> 3",
        "config.e: (absent) -> 4",
    ]
