"""Scores by protocol: the same on any number of devices and after an interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dmf import sharding
from dmf.config import parse
from dmf.data import DataConfig, load
from dmf.errors import DmfError
from dmf.evaluation import features, judge, protocols, scoring, totals
from dmf.evaluation.reference import Reference, read
from dmf.evaluation.totals import Totals
from dmf.metrics.frechet import frechet_distance, moments
from tests import ROOT
from tests.evaluation.conftest import on


def test_a_reference_is_that_of_all_images_and_says_how_it_was_made(place):
    images = np.load(place / "digits.npz")["arr_0"]
    exact = moments((images.reshape(len(images), -1).astype(np.float32) - 128) / 128)
    stored = read(place / "ref.npz")
    assert stored.moments["pool"].n == stored.about["count"] == 200
    np.testing.assert_allclose(stored.moments["pool"].mean, exact.mean, rtol=1e-12)
    np.testing.assert_allclose(stored.moments["pool"].cov, exact.cov, rtol=1e-9, atol=1e-15)
    assert stored.about["space"] == "pixels" and "digits.npz" in stored.about["made_from"]
    assert stored.features.shape == (60, 192)
    assert not list(place.glob(".ref*"))  # nothing of the work is left behind


def test_one_device_and_eight_give_identical_scores(place, setting, tmp_path, monkeypatch):
    rows = []
    for devices in (1, 8):
        with monkeypatch.context() as patch:
            on(patch, devices)
            out = tmp_path / f"{devices}.json"
            rows.append(scoring.score_checkpoint(place / "run", setting, [1, 2], out=str(out)))
    assert rows[0] == rows[1] and len(rows[0]) == 2
    assert {"fid", "kid", "precision", "recall"} <= set(rows[0][0]) and rows[0][0][
        "n_samples"
    ] == 150
    assert rows[0][0]["fid"] != rows[0][1]["fid"]


def test_inception_features_are_the_same_bits_on_one_device_and_on_eight(inception, monkeypatch):
    monkeypatch.setattr(features, "ROWS_PER_DEVICE", {"cpu": 1})
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    found = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        found.append(
            features.Extractor(protocols.load(inception["protocol"]), inception["folder"], mesh)(
                images
            )
        )
    assert set(found[0]) == {"pool", "spatial", "logits"} and found[0]["pool"].shape == (9, 2048)
    for name, x in found[0].items():
        np.testing.assert_array_equal(x, found[1][name])
    assert len(np.unique(found[0]["pool"], axis=0)) == 9


def test_several_emas_and_steps_in_one_run_and_no_row_twice(place, setting, tmp_path, monkeypatch):
    out, calls = str(tmp_path / "out.json"), []
    whole = judge.accumulate
    monkeypatch.setattr(judge, "accumulate", lambda *a: calls.append(a) or whole(*a))
    first = scoring.score_checkpoint(place / "run", setting, [1], [0.0, 50.0], out=out)
    again = scoring.score_checkpoint(place / "run", setting, [1, 2], [0.0, 800.0], out=out)
    assert len(calls) == 2 + 3 and again[:2] == first
    keys = [(row["ema_halflife_images"], row["steps"], row["nfe"]) for row in again]
    assert keys == [(0, 1, 1), (50, 1, 1), (0, 2, 2), (800, 1, 1), (800, 2, 2)]
    assert (
        len({row["fid"] for row in again[:3]}) == 3
    )  # (the two averages are still one after so few steps)
    stored = json.loads(Path(out).read_text())
    assert (
        stored["rows"] == again
        and stored["protocol"]["name"] == "pixels"
        and stored["guidance"] == "none"
    )
    assert (
        stored["seed"] == 0
        and stored["reference"]["count"] == 200
        and len(stored["checkpoint"]["manifest_sha256"]) == 64
    )
    heun = scoring.score_checkpoint(
        place / "run", setting, [2], sampler="heun", seed=3, out=str(tmp_path / "heun.json")
    )
    assert heun[0]["nfe"] == 4
    with pytest.raises(DmfError, match="holds other scores: .*seed: 0 -> 5"):
        scoring.score_checkpoint(place / "run", setting, [1], seed=5, out=out)


def test_the_scores_are_those_of_the_images_as_bytes(place, setting, tmp_path):
    """The whole path against its parts: samples drawn, rounded and compared by hand."""
    from dmf import pretrained
    from dmf.evaluation import sampling

    found = scoring.score_checkpoint(place / "run", setting, [2], out=str(tmp_path / "out.json"))[0]
    folder, stored = pretrained.open_folder(place / "run")
    network, params = pretrained.load_folder(folder, stored)
    labels = load(DataConfig(), "train").labels
    draw = sampling.Sampler(
        network, parse(stored["config"]), (8, 8, 1), labels, sharding.make_mesh()
    )
    rounded = np.floor(np.clip(draw(params, 150, 2) / 2 + 0.5, 0, 1) * 255)
    x = np.repeat((rounded.astype(np.float32) - 128) / 128, 3, axis=-1).reshape(150, -1)
    assert found["fid"] == pytest.approx(
        frechet_distance(moments(x), read(place / "ref.npz").moments["pool"]), rel=1e-9
    )


def feature_parts(count, seed=0):
    rng = np.random.default_rng(seed)
    spread = {"pool": 12, "spatial": 7, "logits": 9}
    whole = {
        name: rng.standard_normal((count, width)).astype(np.float32)
        for name, width in spread.items()
    }
    return [
        {k: v[i : i + totals.PART] for k, v in whole.items()} for i in range(0, count, totals.PART)
    ], whole


@pytest.mark.parametrize("shuffle", [-1, 2020])
def test_interrupted_sums_go_on_to_identical_scores(tmp_path, monkeypatch, shuffle):
    monkeypatch.setattr(totals, "PART", 16)
    every = {
        "metrics": list(protocols.METRICS),
        "kid_subsets": 3,
        "kid_subset_size": 20,
        "is_splits": 4,
    }
    (tmp_path / "p.json").write_text(
        json.dumps({"base": "cifar10", "is_shuffle_seed": shuffle, **every})
    )
    protocol = protocols.load(str(tmp_path / "p.json"))
    parts, whole = feature_parts(100)
    real = feature_parts(80, 1)[1]
    reference = Reference({k: moments(real[k]) for k in ("pool", "spatial")}, real["pool"])
    one = Totals(protocol, 100)
    for part in parts:
        one.add(part)
    scores = one.scores(reference)
    assert {"fid", "sfid", "is", "is_std", "kid", "kid_std", "precision", "recall"} <= set(scores)
    assert scores["fid"] == pytest.approx(
        frechet_distance(moments(whole["pool"]), moments(real["pool"])), rel=1e-9
    )
    folder = tmp_path / "sums"
    folder.mkdir()
    for i, part in enumerate(parts):  # a new process, as it were, for every part
        now = Totals(protocol, 100, folder)
        now.restore()
        assert now.done == 16 * i
        now.add(part)
        now.save()
    now = Totals(protocol, 100, folder)
    now.restore()
    assert now.scores(reference) == scores
    with pytest.raises(DmfError, match="100 samples: expected all 120|cannot be continued"):
        other = Totals(protocol, 120, folder)
        other.restore()
    (folder / totals.STATE).write_bytes((folder / totals.STATE).read_bytes()[:1000])
    with pytest.raises(DmfError, match="cannot be continued"):
        Totals(protocol, 100, folder).restore()


def test_parts_must_come_whole_and_all(tmp_path):
    one = Totals(protocols.PROTOCOLS["edm"], 2000)
    with pytest.raises(DmfError, match="3 rows of features after 0 of 2000"):
        one.add({"pool": np.zeros((3, 4), np.float32)})
    with pytest.raises(DmfError, match="scores of 0 samples: expected all 2000"):
        one.scores(Reference({}))


KILLED = """
import sys
from dmf.evaluation import sampling
from dmf.evaluation import scoring
from dmf.evaluation import totals
from dmf.evaluation import judge
totals.PART = judge.PART = 8
judge.SAVE_SECONDS = 0.0
import time
draw = sampling.Sampler.__call__
sampling.Sampler.__call__ = lambda *a, **k: time.sleep(0.05) or draw(*a, **k)
scoring.score_checkpoint(sys.argv[1], judge.Setting(sys.argv[2], "", sys.argv[3]), [1, 2], out=sys.argv[4])
"""


def test_sigkill_at_random_times_ends_in_identical_scores(place, tmp_path):
    def run(out, kill_after=None):
        files = [str(place / name) for name in ("run", "pixels.json", "ref.npz")]
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, *files, str(out)], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        if kill_after is None:
            assert process.wait(timeout=300) == 0
            return json.loads(out.read_text())["rows"]
        deadline = time.monotonic() + 120  # the clock starts with the first sums on disk
        while process.poll() is None and not list(tmp_path.glob(f".{out.name}*/*/{totals.STATE}")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
        return process.wait()

    whole = run(tmp_path / "whole.json")
    rng, codes = np.random.default_rng(0), []
    for _ in range(3):
        codes.append(run(tmp_path / "killed.json", rng.uniform(0, 0.4)))
    assert run(tmp_path / "killed.json") == whole and len(whole) == 2
    assert -signal.SIGKILL in codes
    assert not [p for p in os.listdir(tmp_path) if p.startswith(".")]
