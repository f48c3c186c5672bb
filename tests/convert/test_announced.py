"""What a weight file's own metadata announce, and conversions of a file of our own layout."""

import json
import random

import jax
import numpy as np
import pytest
import safetensors.numpy

from dmf import pretrained
from dmf.convert.command import REPORT, convert
from dmf.convert.native import METADATA
from dmf.errors import DmfError
from dmf.networks.every import build, least, network_config
from launch.tables import announced

DIT = dict(kind="dit", depth=1, width=8, heads=2, patch=4)
UNET = dict(kind="unet", channels=8, channel_mult=[1], blocks=1)
VAE = dict(kind="vae", channels=[4], blocks=1, groups=2)
SHAPE = [8, 8, 1]
REFUSED = {  # name -> (network, image shape, licence, the line)
    "no end of blocks": (DIT | {"depth": 10**9}, SHAPE, "", "network.depth = 1000000000: expected"),
    "more blocks than the file": (DIT | {"depth": 1024}, SHAPE, "", "at least 1,024 tensors and"),
    "wider than the file": (UNET | {"channels": 4096}, SHAPE, "", "and 150,994,944 values: expec"),
    "larger autoencoder": (VAE | {"blocks": 99}, [], "", "at least 99 tensors and 14,256 values"),
    "image beyond memory": (DIT, [2**62, 8, 1], "", "image_shape = .4611686018427387904, 8, 1.: e"),
    "image of fractions": (DIT, [8.0, 8, 1], "", "expected at most 3 whole numbers above 0, with"),
    "a list for a kind": (DIT | {"kind": ["dit"]}, SHAPE, "", "network.kind = .'dit'.: expected o"),
    "a list for a name": (UNET | {"embedding": []}, SHAPE, "", "network.embedding = ..: expected"),
    "a list for a licence": (DIT, SHAPE, ["mine"], "its metadata: licence is .'mine'., expected a"),
    "NaN": (DIT | {"mlp_ratio": float("nan")}, SHAPE, "", "mlp_ratio = nan: expected a number of"),
    "negative": (VAE | {"scale": -1.0}, [], "", "network.scale = -1.0: expected a number above 0"),
    "beyond float32": (UNET | {"sigma_data": 1e300}, SHAPE, "", "1e.300: expected a number above"),
    "beyond float64": (VAE | {"shift": 10**400}, [], "", "a number finite in float32"),
}


@pytest.mark.parametrize(("network", "shape", "licence", "line"), REFUSED.values(), ids=REFUSED)
def test_metadata_that_no_network_has_are_one_line(tmp_path, network, shape, licence, line):
    about = {"network": network, "image_shape": shape, "licence": licence}
    file = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a": np.ones(9)}, file, {METADATA: json.dumps(about)})
    with pytest.raises(DmfError, match=line) as error:
        convert("dmf", file, tmp_path / "out", check="none")
    assert str(error.value).startswith(f"{file}: ") and str(error.value).isprintable()
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_not_opened_with_such_metadata():
    for shape in ([2**62], None):
        with pytest.raises(DmfError, match="image_shape = "):
            pretrained.described({"network": VAE, "image_shape": shape})
    with pytest.raises(DmfError, match="network.blocks = 1000000000: expected a number"):
        pretrained.described({"network": VAE | {"blocks": 10**9}, "image_shape": []})


def test_a_number_in_a_name_takes_no_memory(tmp_path):
    names = ("conv_in", "conv_out", f"up_blocks.{10**12}.resnets.0.conv1")
    tensors = {f"decoder.{name}.weight": np.ones((4, 4, 3, 3), np.float32) for name in names}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(DmfError, match="no tensor decoder.up_blocks.0.resnets.0.conv1.weight"):
        convert("sd_vae", tmp_path / "a.safetensors", tmp_path / "out", check="none")


def test_random_edits_of_metadata_are_refused(tmp_path):
    rng, about = random.Random(0), announced.write("mlp", tmp_path / "a")
    for _ in range(20):
        field, _, new = announced.edited(rng, about)
        announced.announce(tmp_path / "a", new, tmp_path / "b")
        line, _, fault = announced.attempt(tmp_path / "b", tmp_path / "out")
        assert not fault, (field, line)


def test_no_network_has_less_than_its_config_announces():

    for kind, (values, shape) in announced.NETWORKS.items():
        config = network_config({"kind": kind, **values})
        leaves = jax.tree.leaves(
            jax.eval_shape(build(config, tuple(shape)).init, jax.random.key(0))
        )
        layers, values = least(config)
        assert layers <= len(leaves) and values <= sum(x.size for x in leaves), kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one file of a tiny MLP, which holds two tensors of a loss too."""
    place = tmp_path_factory.mktemp("folder")
    about = announced.write("mlp", place / "a.safetensors")
    tensors = safetensors.numpy.load_file(place / "a.safetensors")
    more = {"loss.a": np.ones(1, np.float32), "loss.b": np.ones(2, np.float32)}
    safetensors.numpy.save_file(
        {**tensors, **more}, place / "a.safetensors", {METADATA: json.dumps(about)}
    )
    return place


def test_a_folder_is_a_source_and_what_is_left_out_is_recorded(folder, tmp_path):
    with pytest.raises(DmfError, match=r"loss.a \[1\] has no place .* or --drop with its name"):
        convert("dmf", folder, tmp_path / "out", check="none")
    convert("dmf", folder, tmp_path / "out", drop=["loss.*"], check="none")
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["dropped"] == {"patterns": ["loss.*"], "tensors": ["loss.a", "loss.b"]}
    assert report["source"]["file"] == "a.safetensors"
    assert "loss.a" not in {name for row in report["tensors"] for name in row["tensors"]}


def test_a_value_beyond_float32_is_not_converted(folder, tmp_path):
    tensors = safetensors.numpy.load_file(folder / "a.safetensors")
    name = next(name for name in tensors if name.endswith(".bias"))
    tensors[name] = np.full(tensors[name].shape, 1e300)
    about = safetensors.safe_open(folder / "a.safetensors", "numpy").metadata()
    safetensors.numpy.save_file(tensors, tmp_path / "b.safetensors", about)
    with pytest.raises(DmfError, match=f"tensor {name}: .* not finite in float32"):
        convert("dmf", tmp_path / "b.safetensors", tmp_path / "out", drop=["loss.*"], check="none")
    assert not (tmp_path / "out").exists()
