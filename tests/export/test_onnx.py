"""ONNX files: the checkpoint's sampler in onnxruntime, and what is refused."""

import json
import sys
from types import SimpleNamespace

import jax
import jax.export
import numpy as np
import pytest

from dmf import pretrained
from dmf.config import parse, to_dict
from dmf.errors import DmfError
from dmf.export import command, onnx
from tests.export.exports import LABELS, own, saved, to_onnx
from tests.tiny import TINY, merged


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
        to_onnx(checkpoints["dit"], tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_an_onnx_file_of_a_run_in_half_precision_computes_in_float32(tmp_path):
    pytest.importorskip("onnxruntime", reason="requirements-onnx.txt is not installed")
    pytest.importorskip("jax2onnx", reason="requirements-onnx.txt is not installed")
    config = to_dict(parse(merged(TINY, compute_dtype="bfloat16", ema=dict(evaluate=0.0))))
    saved(TINY, tmp_path / "half", config=config, source=None, data={"name": "digits"})
    about = to_onnx(tmp_path / "half", tmp_path / "x.onnx")
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
