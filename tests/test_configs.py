"""Config files: each is complete and valid, with each of its variants, sizes and methods."""

import importlib.util
import json

import numpy as np
import pytest

from configs import imagenet256, methods
from dmf import config, networks
from dmf.errors import DmfError
from dmf.method.curriculum import rho_at
from tests import ROOT

# Of each file and variant, what the version before configs/methods.py gave.
BEFORE = json.loads((ROOT / "tests" / "golden" / "configs.json").read_text())
TAKING_METHODS = ("digits", "photos", "cifar10", "imagenet256")
LABELLED = ("digits", "photos", "imagenet256")
SETS = {
    "digits": ((8, 8, 1), 10, 1352),
    "photos": ((16, 16, 3), 12, 3864),
    "cifar10": ((32, 32, 3), 10, 50_000),
    "imagenet256_latents": ((32, 32, 4), 1000, 1_281_167),
    "imagenet256_features": ((16, 16, 768), 1000, 1_281_167),
}


def load(name):
    """What FILE:ARGUMENT gives, loaded as the flag --config loads it."""
    file, _, argument = name.partition(":")
    spec = importlib.util.spec_from_file_location(file, ROOT / "configs" / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*([argument] if argument else []))


def checked(name):
    """The config of FILE:ARGUMENT and its stages, checked against network and data."""
    parsed = config.parse(load(name))
    shape, classes, size = SETS[parsed.data.name]
    networks.build(parsed.network, shape)
    return parsed, config.check(parsed, classes, size)


@pytest.mark.parametrize("name", BEFORE)
def test_a_variant_of_before_is_valid_and_the_same_config(name):
    values = load(name)
    parsed, stages = checked(name)
    assert config.parse(config.to_dict(parsed)) == parsed
    assert config.differences(config.to_dict(parsed), values.to_dict()) == []
    assert config.differences(config.to_dict(config.parse(BEFORE[name])), values.to_dict()) == []
    assert stages[-1].last > 1000


def test_every_config_file_is_tried_above():
    files = {path.stem for path in (ROOT / "configs").glob("[a-z]*.py")} - {"methods", "relatives"}
    # The argument of cifar10_from is a directory: tests/convert/test_command.py tries it.
    # That of features is younger: `test_the_curriculum_in_features_of_an_autoencoder`.
    assert files - {"cifar10_from", "imagenet256_rae"} == {
        name.partition(":")[0] for name in BEFORE
    }


@pytest.mark.parametrize("file", TAKING_METHODS)
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_data_set_takes_every_method(file, method):
    if method.startswith("guided") and file not in LABELLED:
        with pytest.raises(
            DmfError, match="has 'guided_.*': expected no guided stage, as config.n"
        ):
            checked(f"{file}:{method}")
        return
    parsed, stages = checked(f"{file}:{method}")
    assert method != "decoupled" or (stages[0].kind == "guided_jvp") == (file in LABELLED)
    assert stages[-1].last > 1000
    for section, values in methods.METHODS[method](load(file)).items():
        for field, value in values.items():
            if (file, section) != ("imagenet256", "guidance"):  # which has values for each size
                assert getattr(getattr(parsed, section), field) == value


def test_sizes_and_methods_come_in_any_order():
    one, other = (load(f"imagenet256:{names}").to_dict() for names in ("L,meanflow", "meanflow,L"))
    assert one == other and one["network"]["width"] == 1024
    assert one["curriculum"]["kinds"] == ("jvp",)
    both = load("digits:own_velocity,floor")
    assert (both.loss.tangent, both.curriculum.interval) == ("own", "floor")
    assert both.to_dict() == load("digits:floor,own_velocity").to_dict()


@pytest.mark.parametrize("size", imagenet256.GUIDANCE)
def test_a_guided_size_is_the_guided_config(size):
    assert (
        load(f"imagenet256:guided,{size}").to_dict() == load(f"imagenet256_guided:{size}").to_dict()
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits:meanflw", "configs/digits.py:meanflw: expected one of dagger, linear, floor, "),
        ("photos:linear,XL", "configs/photos.py:XL: expected one of dagger, linear, floor, "),
        (
            "imagenet256:Q",
            "configs/imagenet256.py:Q: expected one of XL, L, M, B, S, ",
        ),
        ("imagenet256:XL,B", "configs/imagenet256.py:XL,B: expected one size of XL, L, M, B, S"),
        (
            "cifar10:dagger,linear",
            "configs/cifar10.py:dagger,linear: expected dagger or linear, as each sets "
            "config.curriculum.interval",
        ),
        ("digits:alpha_flow,jvp,flow", "configs/digits.py:jvp: expected one of dagger, linear"),
        ("digits:alpha_flow,flow", "expected alpha_flow or flow, as each sets config.curriculum.s"),
        ("cifar10_flow:linear", "configs/cifar10_flow.py:linear: expected no variant"),
        ("cifar10_meanflow:jvp", "configs/cifar10_meanflow.py:jvp: expected one of scratch, finet"),
        ("imagenet256_guided:M", "configs/imagenet256_guided.py:M: expected one of XL, L, B, S"),
    ],
)
def test_an_unknown_or_contradictory_name_is_one_line_that_lists_the_known(name, message):
    with pytest.raises(DmfError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value)


def test_the_papers_curriculum_on_cifar():
    _, stages = checked("cifar10")
    assert [s.kind for s in stages] == ["all_pairs", *["discrete"] * 8, "jvp"]
    assert {s.steps for s in stages} == {9600} and stages[8].rho == 1 / 256
    _, flow = checked("cifar10_flow")
    assert [(s.kind, s.steps) for s in flow] == [("flow", 96_000)]
    _, baseline = checked("cifar10_meanflow:scratch")
    assert [(s.kind, s.steps) for s in baseline] == [("jvp", 192_000)]


def test_the_papers_curriculum_on_imagenet():
    _, stages = checked("imagenet256")
    assert [s.kind for s in stages] == ["all_pairs", *["discrete"] * 4, "jvp"]
    assert stages[-1].last == 48 * 1251 and stages[4].rho == 1 / 16


def test_the_curriculum_in_features_of_an_autoencoder():
    parsed, stages = checked("imagenet256_rae")
    assert [s.kind for s in stages] == ["all_pairs", *["discrete"] * 4, "jvp"]
    assert stages[-1].last == 36 * 5004 and (parsed.times.shift**2) == pytest.approx(48)
    assert parsed.network.width == 1152 and parsed.network.interval_init == "zero"
    parsed, stages = checked("imagenet256_rae:central,S")
    assert [s.kind for s in stages] == ["central"] and parsed.network.width == 384
    assert parsed.loss.delta == 5e-3
    for name, message in (("L", "expected one of S, B, XL, "), ("S,B", "expected one size of S")):
        with pytest.raises(DmfError, match=f"configs/imagenet256_rae.py:{name}: {message}"):
            load(f"imagenet256_rae:{name}")


def test_alpha_flow_follows_its_sigmoid_between_its_edges_and_hands_over_there():
    parsed, stages = checked("cifar10:alpha_flow")
    assert [s.kind for s in stages] == ["all_pairs", "discrete", "jvp"]
    total, ramp = 96_000, stages[1]
    for step in (ramp.first, 48_000, ramp.last - 1):
        alpha = 1 / (1 + np.exp(25 * (step / total - 0.5)))
        assert rho_at(ramp, step) == pytest.approx(alpha, rel=2e-3)
    before, after = (1 / (1 + np.exp(25 * (s / total - 0.5))) for s in (ramp.first, ramp.last))
    assert before == pytest.approx(0.995, abs=1e-5) and after == pytest.approx(0.005, abs=1e-5)
    found = parsed.loss
    assert (found.product_rule, found.residual_scale, found.weight) == (0, "raw", "alpha")
