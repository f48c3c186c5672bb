"""Side files: what they tell is taken, and a contradiction is refused in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy

from dmf.convert import command
from dmf.convert.command import REPORT, convert
from dmf.convert.sit import SIT
from dmf.convert.vae import SD_VAE
from dmf.errors import DmfError
from dmf.storage.readers.read import Inert, Weights, open_file
from tests import GOLDEN
from tests.conversion import recipe_weights, tensors_of

DIFFUSERS = {
    "_class_name": "AutoencoderKL",
    "scaling_factor": 0.13025,
    "shift_factor": None,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "block_out_channels": [16, 32, 32, 32],
    "layers_per_block": 2,
}


@pytest.fixture(scope="module")
def vae_weights():
    with np.load(GOLDEN / "sd_vae_tiny_io.npz") as data:
        return recipe_weights(data)


def written(tmp_path, weights, config, **metadata):
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    safetensors.numpy.save_file(weights, file, metadata=metadata or None)
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
    return file


def sources(rows):
    return {row["name"]: (row["value"], row["source"]) for row in rows}


def described(kind, weights, **given):
    return sources(command._described(kind, weights, "", (), given).values)


def test_the_scale_of_a_config_json_is_taken_and_recorded(tmp_path, vae_weights, capsys):
    file = written(tmp_path, vae_weights, DIFFUSERS)
    convert("sd_vae", file, tmp_path / "vae", check="none")
    report = json.loads((tmp_path / "vae" / REPORT).read_text())
    assert report["network"]["scale"] == 0.13025 and report["network"]["groups"] == 8
    found = sources(report["values"])
    assert found["scale"] == (0.13025, "side file") and found["shift"] == (0, "side file")
    assert found["latent_channels"] == (4, "file")
    where = [row["where"] for row in report["values"] if row["name"] == "scale"]
    assert where == ["config.json beside the file: scaling_factor"]
    assert (
        "scale = 0.13025 (config.json beside the file: scaling_factor)" in capsys.readouterr().out
    )


def test_without_a_side_file_the_scale_is_given_or_assumed(tmp_path, vae_weights, capsys):
    weights = open_file(written(tmp_path, vae_weights, None))
    found = described(SD_VAE, weights, groups=8)
    assert found["groups"] == (8, "given") and found["scale"] == (0.18215, "assumed")
    convert("sd_vae", weights.path, tmp_path / "vae", given={"groups": 8}, check="none")
    said = "assumed   scale = 0.18215, shift = 0.0: only stored outputs or samples can tell"
    assert said in capsys.readouterr().out


def test_metadata_of_a_safetensors_file_tell_too(tmp_path, vae_weights):
    file = written(tmp_path, vae_weights, None, scaling_factor="0.13025", norm_num_groups="8")
    assert described(SD_VAE, open_file(file))["scale"] == (0.13025, "side file")


BESIDE = "config.json beside the file: "


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (DIFFUSERS, {"scale": 0.18215}, "scaling_factor is 0.13025, but scale is 0.18215 (given)"),
        (
            DIFFUSERS | {"latent_channels": 16},
            {},
            "latent_channels is 16, but latent_channels is 4",
        ),
        (
            DIFFUSERS | {"block_out_channels": [16, 32]},
            {},
            "but channels is (16, 32, 32, 32) (file)",
        ),
        (DIFFUSERS | {"scaling_factor": "large"}, {}, "is large: expected a value for scale"),
        (DIFFUSERS | {"scaling_factor": [1]}, {}, "scaling_factor is (1): expected a value"),
        (DIFFUSERS | {"scaling_factor": 1e999}, {}, "scaling_factor is inf: expected a value"),
        (
            DIFFUSERS | {"norm_num_groups": 5},
            {},
            "(config.json beside the file says norm_num_groups = 5)",
        ),
        ("{", {}, "config.json line 1: no JSON (Expecting property name"),
        ("[" * 100_000, {}, "config.json: no JSON (its values are nested too deeply)"),
    ],
)
def test_contradictions_and_bad_config_files_are_one_line(
    tmp_path, vae_weights, config, given, message
):
    file = written(tmp_path, vae_weights, config)
    with pytest.raises(DmfError) as refused:
        convert("sd_vae", file, tmp_path / "out", given=given, check="none")
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def checkpoint(tmp_path, weights, args):
    tree = {"ema": tensors_of(weights), "args": args}
    return Weights(tmp_path / "sit.pt", "torch zip", tree)


@pytest.mark.parametrize("stored", [dict, lambda **args: Inert("argparse.Namespace", args)])
def test_arguments_in_a_checkpoint_tell_what_tensors_do_not(tmp_path, weights, stored):
    args = stored(num_heads=4, prediction="v", path_type="Linear", model="SiT-S/2", num_classes=10)
    found = described(SIT, checkpoint(tmp_path, weights, args))
    assert found["heads"] == (4, "side file") and found["prediction"] == ("velocity", "side file")
    assert found["time"] == ("noise_at_0", "assumed") and found["resolution"] == (16, "file")


@pytest.mark.parametrize("model", [{"width": 32}, None, 3, "mine"])
def test_a_model_without_a_known_name_says_nothing(tmp_path, weights, model):
    args = {"model": model, "num_classes": None}
    found = described(SIT, checkpoint(tmp_path, weights, args), heads=4)
    assert found["prediction"] == ("velocity", "assumed")
    assert found["num_classes"] == (10, "file")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"prediction": "noise"}, "prediction is noise, but prediction is velocity (assumed)"),
        ({"model": "DiT-XL/2"}, "model is DiT-XL/2, but prediction is velocity"),
        ({"path_type": "GVP"}, "path_type is GVP, but path is linear"),
        ({"num_classes": 11}, "num_classes is 11, but num_classes is 10 (file)"),
        ({"num_heads": 8}, "num_heads is 8, but heads is 4 (given)"),
        ({"prediction": 3}, "prediction is 3: expected a value for prediction"),
    ],
)
def test_arguments_that_contradict_are_refused(tmp_path, weights, args, message):
    with pytest.raises(DmfError) as refused:
        described(SIT, checkpoint(tmp_path, weights, args), heads=4)
    assert f"args in the file: {message}" in str(refused.value)
