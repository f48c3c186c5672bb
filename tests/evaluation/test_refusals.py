"""Bad input and other people's files: one line each, and no work is lost or done twice."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from dmf import sharding
from dmf.errors import DmfError
from dmf.evaluation import features, judge, protocols, results, scoring, totals
from dmf.evaluation.judge import Judge, Setting
from dmf.evaluation.reference import Reference, read, write
from dmf.metrics.frechet import frechet_distance, moments
from tests.evaluation.conftest import written

ALONE = sharding.make_mesh(devices=jax.devices()[:1])  # eight would hold eight copies


def test_a_result_is_written_before_its_sums_go_and_never_outside_its_folder(
    place, setting, tmp_path, monkeypatch
):
    """The source may have any name; only the folder of the sums is ever removed."""
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
        with pytest.raises(DmfError, match="out.json: .*expected"):
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
    for module in (judge, totals):
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


def test_missing_weights_say_where_to_get_them(place):
    with pytest.raises(
        DmfError,
        match=r"no feature network is given .*pt_inception-2015-12-05-6726825d.pth.*"
        "--kind=fid_inception",
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
        Judge(Setting("cifar10", inception["folder"], str(place / "ref.npz")), ALONE)
    assert one_line(e)
    with pytest.raises(
        DmfError, match="holds a inception; expected the directory of converted weights"
    ):
        Judge(
            Setting("edm2-dinov2", inception["folder"], str(place / "ref.npz")),
            ALONE,
        )


def test_a_reference_of_another_protocol_is_refused(place, inception, tmp_path):
    with pytest.raises(
        DmfError, match="was made with space = pixels; protocol own has space = inception"
    ) as e:
        Judge(
            Setting(inception["protocol"], inception["folder"], str(place / "ref.npz")),
            ALONE,
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
            ALONE,
        )


def test_the_self_check_passes_here_and_fails_where_rounding_is_coarse(inception, tmp_path):
    extract = features.Extractor(protocols.load(inception["protocol"]), inception["folder"], ALONE)
    assert re.search(
        r"passed: .*resized images \d\.\de-0[78], features [\d.]+e[-+]\d+", extract.self_check()
    )
    rounded = jax.tree.map(
        lambda x: x.astype(jax.numpy.bfloat16).astype(np.float32), extract._params
    )
    extract._params = rounded
    with pytest.raises(
        DmfError,
        match="the features of a fixed batch .*random.pth.* from the known ones, "
        "expected at most 1e-05",
    ):
        extract.self_check()
    known = Path(inception["folder"]) / features.KNOWN
    aside = known.rename(tmp_path / known.name)  # other tests use this folder too
    try:
        with pytest.raises(DmfError, match="known_features.json is missing"):
            features.Extractor(protocols.load(inception["protocol"]), inception["folder"], ALONE)
    finally:
        shutil.move(aside, known)


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
    monkeypatch.setattr(judge, "PART", 2)
    monkeypatch.setattr(totals, "PART", 2)  # the last image is alone in its part
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
