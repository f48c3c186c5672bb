"""Scores by protocol: the same on any number of devices and after an interruption, stored with all they depend on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from dmf import sharding
from dmf.config import parse
from dmf.data import DataConfig, load
from dmf.errors import DmfError
from dmf.evaluation import features, judge, results, scoring
from dmf.evaluation.judge import Judge, Setting
from dmf.metrics import protocols, totals
from dmf.metrics.frechet import frechet_distance, moments
from dmf.metrics.reference import Reference, read, write
from dmf.metrics.totals import Totals
from dmf.storage import checkpoint
from dmf.train import train
from tests import ROOT
from tests.tiny import TINY, merged

PIXELS = {
    **{
        "base": "cifar10",
        "space": "pixels",
        "weights_sha256": "",
        "reference_count": 0,
        "count": 150,
        "reference_images": 60,
    },
    **{"metrics": ["fid", "kid", "precision_recall"], "kid_subsets": 5, "kid_subset_size": 20},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of seconds, a protocol of pixels, and a reference of the digits by it."""
    folder = tmp_path_factory.mktemp("scores")
    values = merged(
        TINY, curriculum=dict(stages=1, kinds=("all_pairs",), length=3.0, pretrain_length=0.0)
    )

    train(parse(values), folder / "run")
    (folder / "pixels.json").write_text(json.dumps(PIXELS))
    digits = load(DataConfig(), "train")
    grey = np.repeat((digits.images[:200] * 15.9).astype(np.uint8), 3, axis=-1)
    np.savez(folder / "digits.npz", arr_0=grey)
    setting = Setting(str(folder / "pixels.json"))
    scoring.make_reference(str(folder / "digits.npz"), setting, str(folder / "ref.npz"))
    return folder


@pytest.fixture
def setting(place):
    return Setting(str(place / "pixels.json"), "", str(place / "ref.npz"))


def on(monkeypatch, devices):
    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: make(devices=jax.devices()[:devices]))


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
    whole = results.accumulate
    monkeypatch.setattr(results, "accumulate", lambda *a: calls.append(a) or whole(*a))
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
    with pytest.raises(DmfError, match="100 samples: expected all 120|cannot be gone on from"):
        other = Totals(protocol, 120, folder)
        other.restore()
    (folder / totals.STATE).write_bytes((folder / totals.STATE).read_bytes()[:1000])
    with pytest.raises(DmfError, match="cannot be gone on from"):
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
from dmf.metrics import totals
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


# During training.


def test_a_run_scores_itself_by_a_protocol_and_keeps_its_best_checkpoint(place, tmp_path):

    run = dict(
        protocol=str(place / "pixels.json"),
        reference=str(place / "ref.npz"),
        score_samples=64,
        score_every_steps=2,
        keep_checkpoints=2,
        checkpoint_every_steps=100,
    )
    kinds = ("all_pairs", "discrete", "discrete")
    config = parse(
        merged(
            TINY, curriculum=dict(stages=3, kinds=kinds, length=9.0, pretrain_length=3.0), run=run
        )
    )
    rows = train(config, tmp_path / "run")
    assert [row["step"] for row in rows if row["nfe"] == 1] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert {"fid", "n_samples"} <= set(rows[0]) and "kid" not in rows[0]
    best = min((row for row in rows if row["nfe"] == 1), key=lambda row: row["fid"])
    assert json.loads((tmp_path / "run" / "best.json").read_text())["step"] == best["step"]
    assert checkpoint.find(tmp_path / "run" / "best") == tmp_path / "run" / "checkpoints" / str(
        best["step"]
    )
    kept = {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()}
    assert {3, 6, 9, 12, best["step"]} <= kept and 2 not in kept - {best["step"]}


def test_scores_of_other_settings_are_no_rivals_for_the_best(place, tmp_path):
    """A resumed run with more samples starts its own race, and a run without scores has no best."""
    kinds = dict(stages=2, kinds=("all_pairs", "all_pairs"), length=4.0, pretrain_length=0.0)
    run = dict(
        protocol=written(tmp_path, metrics=["fid"]),
        reference=str(place / "ref.npz"),
        score_samples=64,
    )
    with pytest.raises(DmfError, match="no best checkpoint is known"):
        checkpoint.find(tmp_path / "run" / "best")
    first = train(parse(merged(TINY, curriculum=kinds, run=run)), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    again = train(
        parse(merged(TINY, curriculum=kinds, run=run | {"score_samples": 128})), tmp_path / "run"
    )
    assert [row["step"] for row in again if row["nfe"] == 1] == [2, 4]
    assert (
        {row["step"]: row["scored_by"] for row in again}[2]
        == first[0]["scored_by"]
        != again[-1]["scored_by"]
    )
    assert json.loads((tmp_path / "run" / "best.json").read_text())["step"] == 4


def test_the_label_rule_is_the_protocols_in_training_as_in_scoring(place, tmp_path):
    """Random labels, labels in turn and labels of the data: the score in training is that of the checkpoint."""
    kinds = dict(stages=1, kinds=("all_pairs",), length=2.0, pretrain_length=0.0)
    found = {}
    for rule in protocols.LABELS:
        name = written(tmp_path, f"{rule}.json", labels=rule, metrics=["fid"], count=64)
        run = dict(protocol=name, reference=str(place / "ref.npz"), score_samples=64)
        rows = train(parse(merged(TINY, curriculum=kinds, run=run)), tmp_path / rule)
        setting = Setting(name, "", str(place / "ref.npz"))
        again = scoring.score_checkpoint(
            tmp_path / rule, setting, [1], out=str(tmp_path / f"{rule}_out.json")
        )
        assert rows[0]["fid"] == again[0]["fid"]
        found[rule] = again[0]["fid"]
    assert found["uniform"] != found["data"]  # the first digits of the data come in turn


# Bad input: one line each.


def written(folder, name="own.json", **fields):
    path = folder / name
    path.write_text(json.dumps(PIXELS | fields))
    return str(path)


def test_a_result_is_written_before_its_sums_go_and_never_outside_its_folder(
    place, setting, tmp_path, monkeypatch
):
    """The source's name may be anything; nothing but the folder of the sums is ever removed."""
    home = tmp_path / "home"
    (home / "inner").mkdir(parents=True)
    for i, image in enumerate(np.load(place / "digits.npz")["arr_0"][:30]):
        Image.fromarray(image).save(home / f"{i:02}.png")
    only_fid = Setting(written(tmp_path, metrics=["fid"]), "", setting.reference)
    monkeypatch.chdir(home / "inner")
    rows = scoring.score_images("..", only_fid, "scores.json")
    assert (
        len(list(home.glob("*.png"))) == 30
        and json.loads(Path("scores.json").read_text())["rows"] == rows
    )
    with monkeypatch.context() as patch:
        patch.setattr(results.Results, "_write", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            scoring.score_images("..", only_fid, "late.json")
    assert list(Path().glob(f".late.json.*.progress/*/{totals.STATE}"))  # the work is still there
    calls = []
    monkeypatch.setattr(features.Extractor, "__call__", lambda *a: calls.append(a))
    assert (
        scoring.score_images("..", only_fid, "late.json")[0]["fid"] == rows[0]["fid"] and not calls
    )


def test_a_file_of_something_else_and_a_second_process_are_refused(place, setting, tmp_path):
    out = tmp_path / "out.json"
    for text in ("[]", '{"rows": [1]}', '{"rows": 3}', "{}"):
        out.write_text(text)
        with pytest.raises(DmfError, match="holds no rows of scores"):
            scoring.score_images(str(place / "digits.npz"), setting, str(out))
        assert out.read_text() == text
    held = results.Progress(tmp_path / "held.json", {"a": 1})
    with pytest.raises(DmfError, match="another process is at work"):
        results.Progress(tmp_path / "held.json", {"a": 1})
    held.end()
    with pytest.raises(DmfError, match="it is a directory"):
        results.Progress(tmp_path, {})


def test_a_reference_begun_by_another_protocol_is_not_gone_on_with(place, tmp_path, monkeypatch):
    source, out = str(place / "digits.npz"), str(tmp_path / "ref.npz")
    for module in (judge, totals, scoring):
        monkeypatch.setattr(module, "PART", 50)
    monkeypatch.setattr(judge, "SAVE_SECONDS", 0.0)
    name = written(tmp_path, reference_images=60)
    with monkeypatch.context() as patch:
        extract, calls = features.Extractor.__call__, []
        patch.setattr(
            features.Extractor,
            "__call__",
            lambda *a: calls.append(1) or (extract(*a) if len(calls) < 3 else 1 / 0),
        )
        with pytest.raises(ZeroDivisionError):
            scoring.make_reference(source, Setting(name), out)
    written(tmp_path, reference_images=30)
    found = scoring.make_reference(source, Setting(name), out)
    assert len(found.features) == 30 and np.all(np.abs(found.features).max(axis=1) > 0)
    with pytest.raises(DmfError, match="expected a file name ending in .npz"):
        scoring.make_reference(source, Setting(name), str(tmp_path / "ref.txt"))
    with pytest.raises(DmfError, match="--count=500: expected at most the 200 images"):
        scoring.make_reference(source, Setting(name, count=500), out)


def test_a_reference_of_images_alone_serves_every_score(place, setting, tmp_path, capsys):
    images = np.load(place / "digits.npz")["arr_0"][:120]
    np.savez(tmp_path / "batch.npz", arr_0=images)
    found = Setting(setting.protocol, "", str(tmp_path / "batch.npz"))
    row = scoring.score_images(str(place / "digits.npz"), found, str(tmp_path / "out.json"))[0]
    x = ((np.load(place / "digits.npz")["arr_0"].reshape(200, -1)).astype(np.float32) - 128) / 128
    assert row["fid"] == pytest.approx(frechet_distance(moments(x), moments(x[:120])), rel=1e-8)
    assert {"kid", "precision", "recall"} <= set(row) and "left out" not in capsys.readouterr().out


def test_impossible_counts_are_told_before_the_work(place, setting, tmp_path):
    reference = str(place / "ref.npz")
    for fields, message in (
        (dict(kid_subset_size=100), "kid of 60 images of ref.npz; expected at least 100"),
        (dict(count=10), "kid of 10 samples; expected at least 20"),
        (dict(neighbours=70), "precision_recall of 60 images of ref.npz; expected at least 71"),
    ):
        with pytest.raises(DmfError, match=message):
            Judge(Setting(written(tmp_path, **fields), "", reference), sharding.make_mesh())
    with pytest.raises(DmfError, match="scores of 1 samples; expected at least 2"):
        Judge(Setting(setting.protocol, "", reference, 1), sharding.make_mesh())


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 900
    return True


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A converted Inception network with random weights, and a protocol of one's own that takes any."""
    from dmf import pretrained
    from dmf.networks.frozen.inception import InceptionConfig, build_inception

    folder = tmp_path_factory.mktemp("inception") / "weights"
    network = build_inception(InceptionConfig())
    params = network.init(jax.random.key(0))
    about = {"source": {"file": "random.pth", "sha256": "ab" * 32}}
    known = features.known_features(network, params, "inception")
    checkpoint.save_weights(
        folder,
        params,
        pretrained.metadata(InceptionConfig(), (299, 299, 3), about),
        {features.KNOWN: known},
    )
    own = folder.parent / "own.json"
    metrics = ["fid", "sfid", "is"]
    own.write_text(
        json.dumps(
            {"base": "cifar10", "weights_sha256": "", "metrics": metrics, "reference_count": 0}
        )
    )
    return {"folder": str(folder), "protocol": str(own)}


def test_missing_weights_say_where_to_get_them(place):
    with pytest.raises(
        DmfError,
        match=r"no feature network is given .*pt_inception-2015-12-05-6726825d.pth.*--kind=fid_inception",
    ) as e:
        Judge(Setting("cifar10", "", str(place / "ref.npz")), sharding.make_mesh())
    assert one_line(e)
    with pytest.raises(DmfError, match="no such file or directory"):
        Judge(Setting("cifar10", "nowhere", str(place / "ref.npz")), sharding.make_mesh())
    with pytest.raises(DmfError, match="no reference is given .*CIFAR-10 training images"):
        Judge(Setting("cifar10"), sharding.make_mesh())


def test_weights_of_another_hash_or_kind_are_refused(place, inception):
    with pytest.raises(
        DmfError, match=r"SHA-256 abababab\.\.\.; protocol cifar10 expects 6726825d"
    ) as e:
        Judge(Setting("cifar10", inception["folder"], str(place / "ref.npz")), sharding.make_mesh())
    assert one_line(e)
    with pytest.raises(
        DmfError, match="holds a inception; expected the directory of converted weights"
    ):
        Judge(
            Setting("edm2-dinov2", inception["folder"], str(place / "ref.npz")),
            sharding.make_mesh(),
        )


def test_a_reference_of_another_protocol_is_refused(place, inception, tmp_path):
    with pytest.raises(
        DmfError, match="was made with space = pixels; protocol own has space = inception"
    ) as e:
        Judge(
            Setting(inception["protocol"], inception["folder"], str(place / "ref.npz")),
            sharding.make_mesh(),
        )
    assert one_line(e)
    some = moments(np.random.default_rng(0).standard_normal((10, 2048)))
    about = {"space": "inception", "resize": "bicubic_clean", "count": 10}
    write(tmp_path / "other.npz", Reference({"pool": some}, None, None, about))
    with pytest.raises(
        DmfError, match="resize = bicubic_clean; protocol own has resize = bilinear_antialias"
    ):
        Judge(
            Setting(inception["protocol"], inception["folder"], str(tmp_path / "other.npz")),
            sharding.make_mesh(),
        )


def test_the_self_check_passes_here_and_fails_where_rounding_is_coarse(inception, monkeypatch):
    extract = features.Extractor(
        protocols.load(inception["protocol"]), inception["folder"], sharding.make_mesh()
    )
    assert re.search(
        r"passed: .*resized images \d\.\de-0[78], features [\d.]+e[-+]\d+", extract.self_check()
    )
    rounded = jax.tree.map(
        lambda x: x.astype(jax.numpy.bfloat16).astype(np.float32), extract._params
    )
    extract._params = rounded
    with pytest.raises(
        DmfError,
        match="the features of a fixed batch .*random.pth.* from the known ones, expected at most 1e-05",
    ):
        extract.self_check()
    os.remove(Path(inception["folder"]) / features.KNOWN)
    with pytest.raises(DmfError, match="known_features.json is missing"):
        features.Extractor(
            protocols.load(inception["protocol"]), inception["folder"], sharding.make_mesh()
        )


def test_bad_images_are_one_line_each(place, setting, tmp_path, monkeypatch):
    out = str(tmp_path / "out.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DmfError, match="empty") as e:
        scoring.score_images(str(tmp_path / "empty"), setting, out)
    assert one_line(e)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for i, side in enumerate((8, 8, 9)):
        Image.new("RGB", (side, side)).save(mixed / f"{i}.png")
    only_fid = Setting(written(tmp_path, metrics=["fid"]), "", setting.reference)
    monkeypatch.setattr(scoring, "PART", 2)
    monkeypatch.setattr(judge, "PART", 2)
    monkeypatch.setattr(totals, "PART", 2)  # the odd one is alone in its part
    with pytest.raises(DmfError, match=r"image 2 is \(9, 9, 3\), image 0 is \(8, 8, 3\)"):
        scoring.score_images(str(mixed), only_fid, out)
    with pytest.raises(DmfError, match="--count=500: expected at most the 200 images"):
        scoring.score_images(
            str(place / "digits.npz"), Setting(*list(vars(setting).values())[:3], 500), out
        )
    assert not Path(out).exists()


def test_nan_samples_are_named(place, setting, tmp_path, monkeypatch):
    from dmf.evaluation import sampling

    monkeypatch.setattr(
        sampling.Sampler,
        "__call__",
        lambda self, params, count, *a: np.full((count, 8, 8, 1), np.nan),
    )
    with pytest.raises(DmfError, match="150 of 150 generated images have NaN or infinite values"):
        scoring.score_checkpoint(place / "run", setting, [1], out=str(tmp_path / "out.json"))


def test_the_same_images_score_zero_and_the_table_names_what_is_missing(
    place, setting, tmp_path, capsys
):
    rows = scoring.score_images(str(place / "digits.npz"), setting, str(tmp_path / "same.json"))
    assert rows[0]["fid"] < 1e-9 and rows[0]["recall"] == 1
    bare = tmp_path / "bare.npz"
    write(bare, Reference({"pool": read(place / "ref.npz").moments["pool"]}))
    rows = scoring.score_images(
        str(place / "digits.npz"),
        Setting(setting.protocol, "", str(bare)),
        str(tmp_path / "bare.json"),
    )
    said = capsys.readouterr().out
    assert (
        "it does not tell space, resize" in said
        and "nothing to score precision_recall against" in said
    )
    assert "kid" not in rows[0] and rows[0]["fid"] < 1e-9
    assert judge.SAVE_SECONDS == 30.0
