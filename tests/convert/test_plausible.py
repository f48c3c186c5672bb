"""The probe of a flow's direction: a trained flow, its three opposites, and what cannot tell."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
import safetensors.numpy
import scipy.fft

from dmf import pretrained
from dmf.convert import audit, direction, plausible
from dmf.convert.command import REPORT, convert
from dmf.convert.direction import SIGNS, TIMES, Direction
from dmf.convert.native import NATIVE
from dmf.convert.rules import relative_l2
from dmf.convert.sit import SIT
from dmf.errors import DmfError
from dmf.export.weights import export
from dmf.networks import ADMConfig, Condition, UNetConfig
from dmf.storage import checkpoint
from tests import GOLDEN
from tests.conversion import small_noise
from tests.convert.unets import fast

DIGITS = (8, 8, 1)
HEADS = {"heads": 2, "resolution": 8}
OTHER = {"time": "noise_at_1", "sign": "noise_minus_data"}


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """A SiT of 50,000 weights, trained on digits by `configs/digits.py:flow` with width 32."""
    file = tmp_path_factory.mktemp("flow") / "flow.safetensors"
    with np.load(GOLDEN / "sit_tiny_flow.npz") as data:
        weights = {name: data[name].astype(np.float32) for name in data.files}
    safetensors.numpy.save_file(weights, file)
    return file


@pytest.fixture(scope="module")
def trained(flow, tmp_path_factory):
    """(converted directory, its velocity, compiled once)."""
    out = tmp_path_factory.mktemp("trained") / "out"
    convert("sit", flow, out, given=HEADS)
    network, params = pretrained.load(out)
    config, _ = pretrained.described(checkpoint.metadata(out))
    return out, plausible.velocity_of(network, params, config)


def seen(velocity, time, sign):
    return lambda z, t: (-1 if sign else 1) * velocity(z, 1 - t if time else t)


def test_the_right_direction_is_accepted_and_recorded(trained):
    report = json.loads((trained[0] / REPORT).read_text())
    found = report["plausibility"]
    assert found["verdict"] == "as chosen" and min(found["cosines"]["chosen"].values()) > 0.5
    assert found["cosines"]["opposite sign"]["noise"] < -0.9
    values = {row["name"]: row for row in report["values"]}
    assert values["time"]["value"] == "noise_at_0" and values["time"]["source"] == "assumed"
    assert values["sign"]["note"] == "only stored outputs or samples can tell"


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("sign", SIGNS)
def test_each_wrong_direction_is_refused_with_the_right_one(trained, time, sign):
    chosen = Direction(time, sign)
    wrong = time != "noise_at_0", sign != "data_minus_noise"
    velocity = seen(trained[1], *wrong)
    if not any(wrong):
        assert plausible.check(velocity, 1, DIGITS, chosen)["verdict"] == "as chosen"
        return
    right = "expected --set=time=noise_at_0,sign=data_minus_noise"
    with pytest.raises(DmfError, match=f"with {chosen.setting}, .*{right}"):
        plausible.check(velocity, 1, DIGITS, chosen)
    assert plausible.check(velocity, 1, DIGITS, None)["verdict"] == "cannot tell"  # no choice


def test_a_file_of_another_trainer_needs_the_other_direction_and_comes_back(trained, tmp_path):
    """Noise at t = 1 and noise - data, in SiT's layout."""
    network, params = pretrained.load(trained[0])
    config, shape = pretrained.described(checkpoint.metadata(trained[0]))
    way = Direction(*OTHER.values(), True, True)
    rules = direction.turned(SIT.rules(config, shape, None), config, way)
    weights = audit.write(rules, {name: np.asarray(x) for name, x in audit.flat(params).items()})
    file = tmp_path / "other.safetensors"
    safetensors.numpy.save_file(weights, file)
    hint = "expected --set=time=noise_at_1,sign=noise_minus_data"
    with pytest.raises(DmfError, match=f"with opposite time and sign: .*{hint}"):
        convert("sit", file, tmp_path / "out", given=HEADS)
    assert not (tmp_path / "out").exists()
    report = convert("sit", file, tmp_path / "out", given=HEADS | OTHER)
    assert hint[9:] in report["conventions"]
    assert [x["source"] for x in report["values"] if x["name"] in OTHER] == ["given", "given"]
    again = audit.flat(pretrained.load(tmp_path / "out")[1])
    for name, x in audit.flat(params).items():
        np.testing.assert_allclose(again[name], x, rtol=0, atol=2e-7)
    export(tmp_path / "out", tmp_path / "back.safetensors")
    back = safetensors.numpy.load_file(tmp_path / "back.safetensors")
    for name, x in weights.items():
        np.testing.assert_allclose(back[name], x, rtol=0, atol=1e-6)


def _of_z(function, z, t):
    return function(z)


def test_random_weights_cannot_tell(sit, trained):
    report = json.loads((sit[1] / REPORT).read_text())
    assert report["plausibility"]["verdict"] == "cannot tell"
    for nothing in (np.zeros_like, lambda z: np.full_like(z, np.nan)):
        found = plausible.check(partial(_of_z, nothing), 1, DIGITS, Direction(*OTHER.values()))
        assert found["verdict"] == "cannot tell"


def field(variance):
    """The exact velocity of data whose cosine coefficients are independent normal draws."""

    def velocity(z, t):
        c = scipy.fft.dctn(z, axes=(1, 2), norm="ortho")
        slope = (t - variance * (1 - t)) / (t**2 + variance * (1 - t) ** 2)
        return scipy.fft.idctn(c * slope, axes=(1, 2), norm="ortho")

    return velocity


@pytest.mark.parametrize("deviation", [0.5, 1.0])
@pytest.mark.parametrize("white", [0.0, 0.3, 0.6])
def test_exact_flows_of_smooth_data_are_told(deviation, white):
    """Images (deviation 0.5) and latents (deviation 1), with a part of white noise."""
    k = np.hypot(*np.meshgrid(np.arange(16), np.arange(16)))
    power = 1 / (1 + (k / 2) ** 2) ** 1.5
    power = (1 - white) * power / power.mean() + white
    velocity = field(deviation**2 * power[None, :, :, None])
    for time, sign in plausible.WAYS.values():
        chosen = Direction(*OTHER.values()).opposite(time, sign)
        if not time and not sign:
            assert plausible.check(velocity, 1, (16, 16, 3), chosen)["verdict"] == "as chosen"
            continue
        with pytest.raises(DmfError, match="expected --set=time=noise_at_1,sign=noise_minus_data"):
            plausible.check(seen(velocity, time, sign), 1, (16, 16, 3), chosen)


def test_the_wrapper_of_a_denoiser_is_no_evidence():
    """Where F gives zero, EDM's wrapper is the exact flow of isotropic data."""
    found = plausible.check(field(0.25), 0.5, (16, 16, 3), None)
    assert found["verdict"] == "cannot tell"
    assert found["cosines"]["chosen"]["noise"] > 0.99 and found["cosines"]["chosen"]["data"] > 0.99


UNET = UNetConfig(
    channels=8, channel_mult=(1,), blocks=1, attention_resolutions=(), augment_dim=3, time_scale=9.0
)


def test_the_fold_is_the_reversal_of_time_and_sign():
    """For a U-Net whose augmentation label is added to the features of time."""
    config = UNET
    network = fast(config, DIGITS)
    params = small_noise(network.init(jax.random.key(0)))
    way = Direction(*OTHER.values(), True, True)
    plain = NATIVE.rules(config, DIGITS, None)
    leaves = {name: np.asarray(x) for name, x in audit.flat(params).items()}
    tensors = audit.write(direction.turned(plain, config, way), leaves)
    folded = {}
    for rule in plain:
        values = rule.forward(*(tensors[name] for name in rule.tensors))
        folded |= dict(zip(rule.leaves, values, strict=True))
    rng = np.random.default_rng(0)
    z, t = rng.standard_normal((2, *DIGITS), np.float32), np.float32([0.125, 0.75])
    label = rng.standard_normal((2, 3)).astype(np.float32)
    more = {"condition": Condition(augment=label)}
    want = direction.seen_as(network, way).apply(params, z, t - 0.0625, t, **more)
    got = network.apply(audit.nested(folded), z, t - 0.0625, t, **more)
    assert relative_l2(got, want) <= 5e-6
    assert relative_l2(network.apply(params, z, t - 0.0625, t, **more), want) > 0.1


def test_the_leaves_that_a_fold_changes():
    config = ADMConfig(
        channels=32, channel_mult=(1,), blocks=1, attention_resolutions=(), head_channels=32
    )
    plain = NATIVE.rules(config, DIGITS, None)
    turned = direction.turned(plain, config, Direction(*OTHER.values(), True, True))
    changed = {a.leaves[0]: a.note for a, b in zip(turned, plain, strict=True) if a != b}
    assert changed == {
        "time_embed_0/kernel": "time reversed: time is noise_at_1",
        "out_2/kernel": "negated: sign is noise_minus_data",
        "out_2/bias": "negated: sign is noise_minus_data",
    }


@pytest.mark.parametrize("changes", [{"time_input": "log_sigma"}, {"embedding": "fourier"}])
def test_another_embedding_of_time_is_not_reversed(changes):
    config = dataclasses.replace(UNET, **{"time_scale": 1.0} | changes)
    with pytest.raises(DmfError, match="--set=time=noise_at_1: expected a network of t by sines"):
        direction.turned([], config, Direction(*OTHER.values(), True, False))


@pytest.mark.parametrize(("name", "value"), [("time", "backwards"), ("sign", -1)])
def test_words_that_are_no_direction_are_refused(name, value):
    with pytest.raises(DmfError, match=f"--set={name}"):
        direction.split(SIT, {name: value})
