"""Exported samplers: equal to the checkpoint's, loadable without this code, whole or absent."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.export
import numpy as np
import pytest
import safetensors.numpy

from dmf import pretrained, sharding
from dmf.config import parse, to_dict
from dmf.errors import DmfError
from dmf.evaluation.sampling import Sampler
from dmf.export import card, command, folder, model, onnx, place, sampler
from dmf.storage import checkpoint
from tests import ROOT
from tests.tiny import TINY, UNET, Setup, merged

STEPS = (1, 2, 4)
SHAPE = (8, 8, 1)
SOURCE = {
    "kind": "sit",
    "source": {"file": "sit.pt", "copy": "ema", "sha256": "ab" * 32},
    "licence": "theirs",
    "network": {},
}


def saved(base, path, **metadata):
    """A checkpoint as from a conversion, of random weights; no leaf is zero."""
    setup = Setup(base)
    params = setup.state().params
    assert all(np.asarray(x).any() for x in jax.tree.leaves(params))
    stored = {**pretrained.metadata(setup.config.network, SHAPE, SOURCE), **metadata}
    checkpoint.save_weights(path, params, stored, {})
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoints")
    return {name: saved(base, place / name) for name, base in (("dit", TINY), ("unet", UNET))}


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory):
    """Model folders with samplers of 1, 2 and 4 steps."""
    place = tmp_path_factory.mktemp("models")
    for name, path in checkpoints.items():
        folder.export(path, place / name, steps=STEPS)
    return place


def own(path, labels, count, steps):
    """(noise, the samples of the checkpoint's own sampler from it)."""
    config = parse(checkpoint.metadata(path)["config"])
    network, params = pretrained.load(path)
    draw = Sampler(network, config, SHAPE, labels, sharding.make_mesh(devices=jax.devices()[:1]))
    key = jax.random.fold_in(jax.random.key(np.uint32(config.seed)), 2**31 - 1)
    e = np.stack([jax.random.normal(jax.random.fold_in(key, i), SHAPE) for i in range(count)])
    return e, draw(jax.device_put(params, jax.devices()[0]), count, steps)


LABELS = np.array([10, 3, 0, 9, 10, 5, 1], np.int32)  # 10 is the null class


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["dit", "unet"])
def test_an_artifact_is_the_checkpoints_sampler(checkpoints, models, name, steps, rows):
    e, want = own(checkpoints[name], LABELS, rows, steps)
    weights = safetensors.numpy.load_file(models / name / "model.safetensors")
    run, _ = sampler.call((models / name / f"sampler_{steps}.jaxexport").read_bytes())
    np.testing.assert_allclose(run(weights, e, LABELS[:rows]), want, atol=1e-5, rtol=0)
    if name == "dit":  # the labels are heard
        assert np.abs(run(weights, e, (LABELS[:rows] + 1) % 11) - want).max() > 1e-3


def test_one_step_is_noise_less_velocity_and_the_null_label_is_none(checkpoints, models):
    network, params = pretrained.load(checkpoints["dit"])
    e = np.random.default_rng(0).standard_normal((7, *SHAPE)).astype(np.float32)
    u = jax.jit(network.apply)(
        params, e, np.zeros(7, np.float32), np.ones(7, np.float32), label=None
    )
    weights = safetensors.numpy.load_file(models / "dit" / "model.safetensors")
    run, _ = sampler.call((models / "dit" / "sampler_1.jaxexport").read_bytes())
    np.testing.assert_allclose(run(weights, e, np.full(7, 10, np.int32)), e - u, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_an_artifact_is_for_all_platforms_and_batch_sizes_and_holds_no_weights_and_no_paths(
    models, name
):
    content = (models / name / "sampler_1.jaxexport").read_bytes()
    exported = jax.export.deserialize(bytearray(content))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    batch = exported.out_avals[0].shape[0]
    assert not isinstance(batch, int) and exported.out_avals[0].shape[1:] == SHAPE
    weights = safetensors.numpy.load_file(models / name / "model.safetensors")
    assert not any(x.tobytes()[:64] in content for x in weights.values() if x.nbytes >= 64)
    assert (
        os.fsencode(ROOT) not in content and os.fsencode(Path(jax.__file__).parent) not in content
    )


def test_the_metadata_say_what_a_user_has_to_know(models):
    found = json.loads((models / "dit" / "config.json").read_text())
    assert (
        [row["steps"] for row in found["samplers"]]
        == [row["nfe"] for row in found["samplers"]]
        == list(STEPS)
    )
    for row in found["samplers"]:
        content = (models / "dit" / row["file"]).read_bytes()
        assert row["sha256"] == model.sha256(content) and row["check"]["relative_l2"] <= 1e-5
        assert (
            row["calling_convention_version"]
            == jax.export.deserialize(bytearray(content)).calling_convention_version
        )
    assert "t = 1 noise" in found["conventions"] and "x = e - u(e, 0, 1)" in found["conventions"]
    assert (found["labels"]["classes"], found["labels"]["null"], found["latent"]) == (10, 10, None)
    assert (
        found["sampler"] == "few_step"
        and found["dtype"]["compute"] == "float32"
        and found["image_shape"] == list(SHAPE)
    )
    assert (
        found["origin"]["converted_from"]["licence"] == "theirs"
        and found["versions"]["jax"] == jax.__version__
    )
    assert found["ema"] == "converted from copy 'ema'" and found["scores"] == []
    assert json.loads((models / "unet" / "config.json").read_text())["labels"]["classes"] == 0
    assert (
        str(ROOT)
        not in (models / "dit" / "config.json").read_text()
        + (models / "dit" / "README.md").read_text()
    )


FRESH = """
import sys
class Only:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        # Names that start with _ are Python's own.
        if name.startswith("_") or name.split(".")[0] in sys.stdlib_module_names | {needed}:
            return self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Only, sys.meta_path)  # as if nothing else were installed
{code}
np.save(sys.argv[1], x)
assert images.shape == x.shape and images.dtype == np.uint8
"""


def test_the_cards_code_runs_in_a_fresh_process_without_this_code(checkpoints, models, tmp_path):
    text = (models / "dit" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    assert len(code.splitlines()) <= 12 and "license: other" in text and "to be filled in" in text
    assert (
        f'`pip install "jax>={jax.__version__}" flatbuffers numpy safetensors`' in text
    )  # an older jax reads no newer program
    needed = {
        "jax",
        "flatbuffers",
        "numpy",
        "safetensors",
        "jaxlib",
        "ml_dtypes",
        "opt_einsum",
        "scipy",
    }  # and jax's own
    subprocess.run(
        [sys.executable, "-I", "-c", FRESH.format(code=code, needed=needed), tmp_path / "x.npy"],
        cwd=models / "dit",
        check=True,
        timeout=120,
    )
    network, params = pretrained.load(checkpoints["dit"])
    e = jax.random.normal(jax.random.key(0), (8, *SHAPE))
    zeros, ones, labels = (
        np.zeros(8, np.float32),
        np.ones(8, np.float32),
        np.arange(8, dtype=np.int32),
    )
    want = e - jax.jit(network.apply)(params, e, zeros, ones, label=labels)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), want, atol=1e-5, rtol=0)


def test_the_weights_of_a_folder_come_back_bit_for_bit(checkpoints, models, tmp_path):
    from dmf.convert.command import convert

    convert("dmf", models / "unet" / "model.safetensors", tmp_path / "back", check="none")
    theirs, ours = pretrained.load(tmp_path / "back")[1], pretrained.load(checkpoints["unet"])[1]
    jax.tree.map(np.testing.assert_array_equal, theirs, ours)


def scored(tmp_path, **run):
    """A work directory, as far as the card reads it: step 7 of two, scored twice."""
    home = tmp_path / "run"
    (home / "checkpoints").mkdir(parents=True)
    config = to_dict(parse(merged(TINY, ema=dict(evaluate=0.0), run=run)))
    saved(TINY, home / "checkpoints" / "7", config=config, source=None, data={"name": "digits"})
    rows = [
        {"step": n, "stage": "s", "kind": "jvp", "nfe": m, "fd": n + m / 8}
        for n in (3, 7)
        for m in (1, 2)
    ]
    (home / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "best.json").write_text(json.dumps(rows[2]))
    manifest = model.sha256((home / "checkpoints" / "7" / checkpoint.MANIFEST).read_bytes())
    protocol = {
        "name": "mine",
        "space": "pixels",
        "resize": "none",
        "count": 500,
        "reference": "the rest",
    }
    for name, other in (("a", manifest), ("b", "another's")):
        found = {
            "checkpoint": {"manifest_sha256": other},
            "protocol": protocol,
            "sampler": "few_step",
            "seed": 5,
        }
        found["rows"] = [
            {"ema_halflife_images": h, "steps": 1, "nfe": 1, "fid": 40.5 + h} for h in (0.0, 50.0)
        ]
        (home / f"scores_{name}.json").write_text(json.dumps(found))
    return home


def test_the_card_has_the_scores_of_these_weights_and_no_others(tmp_path):
    home = scored(tmp_path)
    found = card.scores(model.open_model(home))
    assert [row["fd"] for row in found[0]["rows"]] == [7.125, 7.25] and found[0]["best"]
    assert (
        len(found) == 2
        and [row["fid"] for row in found[1]["rows"]] == [40.5]
        and "mine: pixels" in found[1]["protocol"]
    )
    folder.export(home, tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert (
        "| steps | nfe | fd |" in text
        and "| 1 | 1 | 7.125 |" in text
        and "| 1 | 1 | 40.5 |" in text
        and "500 samples against the rest, seed 5" in text
    )
    assert "best checkpoint" in text and "after 7 steps" in text and "90.5" not in text
    assert card.scores(model.open_model(home, sampler="euler")) == []


def test_the_cards_scores_of_training_count_heuns_evaluations(tmp_path):
    (found,) = card.scores(
        model.open_model(scored(tmp_path, sampler="heun"))
    )  # scores.jsonl has the steps alone, as "nfe"
    assert [(row["steps"], row["nfe"]) for row in found["rows"]] == [(1, 2), (2, 4)]


def test_a_file_of_scores_of_somebody_elses_is_passed_over(tmp_path):
    home = scored(tmp_path)
    for name, content in {"c": {"checkpoint": "x"}, "d": [1], "e": {"checkpoint": None}}.items():
        (home / f"scores_{name}.json").write_text(json.dumps(content))
    assert len(card.scores(model.open_model(home))) == 2


def test_what_is_not_known_of_a_checkpoint_is_not_called_none(tmp_path):
    (scored(tmp_path) / "checkpoints" / "7").rename(tmp_path / "final")
    opened = dataclasses.replace(model.open_model(tmp_path / "final"), shape=(8, 8, 4))
    made = {
        "weights": "w",
        "samplers": [{"file": "f", "steps": 1, "nfe": 1, "platforms": []}],
        "scores": [],
    }
    text = card.text("m", {**model.about(opened), **made})
    assert (
        "Trained with dmf on digits." in text
        and "scale unknown, shift 0; the scale was not recorded" in text
    )
    assert "None" not in text


def test_latents_come_with_the_rule_that_makes_images_of_them(checkpoints, tmp_path):
    about = {
        "name": "imagenet256_latents",
        "scale": 0.25,
        "vae": {"file": "vae.pt", "copy": "", "sha256": "cd" * 32},
    }
    opened = model.open_model(saved(TINY, tmp_path / "latent", data=about))
    found = model.about(opened)
    assert (
        found["latent"]["scale"] == 0.25
        and found["latent"]["shift"] == 0
        and found["latent"]["decoder_sha256"] == "cd" * 32
    )
    made = {
        **found,
        "weights": "w",
        "samplers": [{"file": "f", "steps": 1, "nfe": 1, "platforms": []}],
        "scores": [],
    }
    text = card.text("m", made)
    assert (
        "image = decode(x / scale + shift), scale 0.25, shift 0" in text and "images =" not in text
    )
    assert model.about(model.open_model(checkpoints["dit"]))["latent"] is None


def test_another_sampler_is_refused_and_leaves_nothing(checkpoints, tmp_path, monkeypatch):
    right = sampler.artifact
    monkeypatch.setattr(
        sampler, "artifact", lambda model, steps, weights: right(model, steps + 1, weights)
    )
    with pytest.raises(
        DmfError,
        match="sampler_1.jaxexport differs from the checkpoint's sampler by .*: expected a rel",
    ):
        folder.export(checkpoints["dit"], tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("where", ["artifact", "about"])
def test_an_interrupted_export_leaves_nothing(checkpoints, tmp_path, monkeypatch, error, where):
    def interrupted(*_):
        assert (next(tmp_path.iterdir()) / "model.safetensors").exists()
        raise error

    monkeypatch.setattr(sampler, "artifact", lambda *_: b"program")
    monkeypatch.setattr(sampler, "call", lambda _: (print, 0))
    monkeypatch.setattr(sampler, "check", lambda *_: {"relative_l2": 0})
    monkeypatch.setattr({"artifact": sampler, "about": model}[where], where, interrupted)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DmfError):
        folder.export(checkpoints["dit"], tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_goes_with_the_next_and_what_is_at_work_stays(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    with place.made_whole(tmp_path / "x") as half:
        start = half.name.rpartition("-")[0]
        half.write_text("first")
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f"{start}-{pid}").mkdir()
        (tmp_path / f"{start}-{pid}" / "half").write_text("data")
    (tmp_path / "x").unlink()
    with place.made_whole(tmp_path / "x") as half:
        half.write_text("second")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{start}-{os.getppid()}", "x"]
    with pytest.raises(
        DmfError, match="x is there already: expected a new place; nothing is overwritten"
    ):
        folder.export(tmp_path, tmp_path / "x")
    with pytest.raises(DmfError, match="expected a place in a directory that exists"):
        folder.export(tmp_path, tmp_path / "none" / "x")


class Hub:
    """A stand-in for huggingface_hub that notes the calls."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def HfApi(self):
        return self

    def create_repo(self, repo, **how):
        self.calls.append(("create", repo, how))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.error:
            raise self.error
        self.calls.append(("upload", repo_id, sorted(p.name for p in Path(folder_path).iterdir())))


def test_a_folder_is_uploaded_whole_into_a_private_repository(checkpoints, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    folder.export(checkpoints["dit"], tmp_path / "model", upload="me/digits-1")
    files = ["README.md", "config.json", "model.safetensors", "sampler_1.jaxexport"]
    assert hub.calls == [
        ("create", "me/digits-1", {"private": True, "exist_ok": True}),
        ("upload", "me/digits-1", files),
    ]
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(RuntimeError("no\nroute")))
    with pytest.raises(
        DmfError,
        match="second is written, but --upload=me/digits failed .RuntimeError: no route.; expected",
    ):
        folder.export(checkpoints["dit"], tmp_path / "second", upload="me/digits")
    assert (tmp_path / "second" / "config.json").is_file()


def test_an_upload_that_cannot_be_is_refused_before_any_work(checkpoints, tmp_path, monkeypatch):
    with pytest.raises(DmfError, match="--upload=digits: expected NAME/REPO"):
        folder.export(checkpoints["dit"], tmp_path / "model", upload="digits")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        DmfError,
        match="huggingface_hub, which is not installed; expected pip install huggingface_hub",
    ):
        folder.export(checkpoints["dit"], tmp_path / "model", upload="me/digits")
    assert not list(tmp_path.iterdir())


def test_what_is_no_sampler_is_refused(checkpoints, tmp_path, monkeypatch):
    with pytest.raises(
        DmfError,
        match="--out=x.npz: expected a file name ending in .safetensors, .pt or .onnx, or a model",
    ):
        command.form("x.npz")
    with pytest.raises(
        DmfError, match="--steps=1,2 with .*: expected one number of steps for an ONNX file"
    ):
        command.export(checkpoints["dit"], str(tmp_path / "x.onnx"), steps=(1, 2))
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(
        DmfError, match="needs jax2onnx, which is not installed; expected pip install --no-deps -r"
    ):
        command.export(checkpoints["dit"], str(tmp_path / "x.onnx"))
    monkeypatch.setitem(sys.modules, "jax2onnx", SimpleNamespace())
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    with pytest.raises(DmfError, match="sampler = 'heun': expected few_step for an .onnx file"):
        command.export(checkpoints["dit"], str(tmp_path / "x.onnx"), sampler="heun")
    assert not list(tmp_path.iterdir())


def test_what_the_packages_of_onnx_refuse_is_one_sentence(checkpoints, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise NotImplementedError("no rule\nfor this")

    monkeypatch.setattr(
        onnx,
        "_extra",
        lambda: (SimpleNamespace(to_onnx=refused), SimpleNamespace(), SimpleNamespace()),
    )
    with pytest.raises(
        DmfError,
        match="x.onnx: .* cannot do this network .NotImplementedError: no rule for this.; expected",
    ):
        onnx.export(checkpoints["dit"], tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_an_onnx_file_of_a_run_in_half_precision_computes_in_float32(tmp_path):
    pytest.importorskip("onnxruntime", reason="requirements-onnx.txt is not installed")
    pytest.importorskip("jax2onnx", reason="requirements-onnx.txt is not installed")
    config = to_dict(parse(merged(TINY, compute_dtype="bfloat16", ema=dict(evaluate=0.0))))
    saved(TINY, tmp_path / "half", config=config, source=None, data={"name": "digits"})
    about = onnx.export(tmp_path / "half", tmp_path / "x.onnx")
    assert (
        about["dtype"]["compute"] == "float32"
        and about["check"]["relative_l2"] <= about["check"]["limit"] == 1e-5
    )


@pytest.mark.parametrize(("name", "steps"), [("dit", 2), ("unet", 1)])
def test_an_onnx_file_is_the_checkpoints_sampler(checkpoints, tmp_path, name, steps):
    runtime = pytest.importorskip("onnxruntime", reason="requirements-onnx.txt is not installed")
    pytest.importorskip("jax2onnx", reason="requirements-onnx.txt is not installed")
    command.export(checkpoints[name], str(tmp_path / "x.onnx"), steps=(steps,))
    session = runtime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    for rows in (1, 7):
        e, want = own(checkpoints[name], LABELS, rows, steps)
        (found,) = session.run(["images"], {"e": e, "labels": LABELS[:rows]})
        np.testing.assert_allclose(found, want, atol=1e-5, rtol=0)
    about = json.loads(session.get_modelmeta().custom_metadata_map["dmf"])
    assert (
        about["steps"] == steps
        and "t = 1 noise" in about["conventions"]
        and about["check"]["relative_l2"] <= 1e-5
    )
    weights = sum(x.nbytes for x in jax.tree.leaves(pretrained.load(checkpoints[name])[1]))
    assert (
        weights < (tmp_path / "x.onnx").stat().st_size < 2 * weights + 100_000
    )  # every step uses the same ones
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"]
