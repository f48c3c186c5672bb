"""What the tests of scores share: a run of seconds, protocols of pixels, a random Inception."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from dmf import sharding
from dmf.config import parse
from dmf.data import DataConfig, load
from dmf.evaluation import features, scoring
from dmf.evaluation.judge import Setting
from dmf.storage import checkpoint
from tests.runs import train
from tests.tiny import MLP, merged

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


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A run of seconds, a protocol of pixels, and a reference of the digits by it."""
    folder = tmp_path_factory.mktemp("scores")
    values = merged(
        MLP, curriculum=dict(stages=1, kinds=("all_pairs",), length=3.0, pretrain_length=0.0)
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


def written(folder, name="own.json", **fields):
    path = folder / name
    path.write_text(json.dumps(PIXELS | fields))
    return str(path)


def drawn(rng, path, leaf):
    """A random leaf of a convolutional network: drawn by NumPy, so that nothing is compiled."""
    name = jax.tree_util.keystr(path)
    if len(leaf.shape) > 1:
        scale = np.sqrt(2 / np.prod(leaf.shape[:-1]))
        return (scale * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)
    return np.full(leaf.shape, "scale" in name or "var" in name, leaf.dtype)


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A converted Inception network with random weights, and a protocol that takes any weights."""
    from dmf import pretrained
    from dmf.networks.frozen.inception import InceptionConfig, build_inception

    folder = tmp_path_factory.mktemp("inception") / "weights"
    network = build_inception(InceptionConfig())
    shapes, rng = jax.eval_shape(network.init, jax.random.key(0)), np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(partial(drawn, rng), shapes)
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
