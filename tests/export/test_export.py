"""Exported samplers: equal to the checkpoint's, loadable without this code, whole or absent."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
import safetensors.numpy

from dmf import pretrained
from dmf.errors import DmfError
from dmf.export import model, place, sampler
from tests import ROOT
from tests.export.exports import LABELS, SHAPE, STEPS, own, to_folder


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
        assert (
            row["sha256"] == hashlib.sha256(content).hexdigest()
            and row["check"]["relative_l2"] <= 1e-5
        )
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


def test_the_weights_of_a_folder_come_back_bit_for_bit(checkpoints, models, tmp_path):
    from dmf.convert.command import convert

    convert("dmf", models / "unet" / "model.safetensors", tmp_path / "back", check="none")
    theirs, ours = pretrained.load(tmp_path / "back")[1], pretrained.load(checkpoints["unet"])[1]
    jax.tree.map(np.testing.assert_array_equal, theirs, ours)


@pytest.mark.parametrize(
    ("name", "why"), [("few_step_on_host", "loops on the host"), ("gamma", "draws noise of its")]
)
def test_a_sampler_that_no_program_can_hold_is_refused_and_leaves_nothing(
    checkpoints, tmp_path, name, why
):
    with pytest.raises(DmfError, match=f"sampler = '{name}' {why}.*: expected one of few_step, eu"):
        to_folder(checkpoints["dit"], tmp_path / "model", sampler=name)
    assert not list(tmp_path.iterdir())


def test_another_sampler_is_refused_and_leaves_nothing(checkpoints, tmp_path, monkeypatch):
    right = sampler.artifact
    monkeypatch.setattr(
        sampler, "artifact", lambda model, steps, weights: right(model, steps + 1, weights)
    )
    with pytest.raises(
        DmfError,
        match="sampler_1.jaxexport differs from the checkpoint's sampler by .*: expected a rel",
    ):
        to_folder(checkpoints["dit"], tmp_path / "model")
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
    owner = {"artifact": sampler, "about": model.Model}[where]
    monkeypatch.setattr(owner, where, interrupted)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DmfError):
        to_folder(checkpoints["dit"], tmp_path / "model")
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
        to_folder(tmp_path, tmp_path / "x")
    with pytest.raises(DmfError, match="expected a place in a directory that exists"):
        to_folder(tmp_path, tmp_path / "none" / "x")


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
    to_folder(checkpoints["dit"], tmp_path / "model", upload="me/digits-1")
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
        to_folder(checkpoints["dit"], tmp_path / "second", upload="me/digits")
    assert (tmp_path / "second" / "config.json").is_file()


def test_an_upload_that_cannot_be_is_refused_before_any_work(checkpoints, tmp_path, monkeypatch):
    with pytest.raises(DmfError, match="--upload=digits: expected NAME/REPO"):
        to_folder(checkpoints["dit"], tmp_path / "model", upload="digits")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        DmfError,
        match="huggingface_hub, which is not installed; expected pip install huggingface_hub",
    ):
        to_folder(checkpoints["dit"], tmp_path / "model", upload="me/digits")
    assert not list(tmp_path.iterdir())
