"""Conversions with an aligned embedding, and what starts from them."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import cifar10_from
from dmf import pretrained
from dmf.config import parse
from dmf.convert.command import convert
from dmf.convert.edm import EDM
from dmf.errors import DmfError
from dmf.export.weights import export
from dmf.networks import UNetConfig
from dmf.storage import checkpoint
from tests import runs
from tests.convert.flows import SIT_GIVEN, random_flow
from tests.tiny import merged

TINY_EDM = UNetConfig(
    channels=8,
    channel_mult=(1, 2),
    blocks=1,
    attention_resolutions=(),
    augment_dim=0,
    embedding_mult=1,
    resample="box",
    time_input="log_sigma",
    precond="edm",
    sigma_data=0.75,
)


def test_an_aligned_network_leaves_in_our_own_layout_and_its_source_is_told_as_it_was(tmp_path):
    """In the source's layout it would be read with the embedding that it no longer has."""
    random_flow(EDM, TINY_EDM, (8, 8, 3), tmp_path / "edm.safetensors")
    plain = convert("edm", tmp_path / "edm.safetensors", tmp_path / "plain", check="none")
    assert plain["network"]["sigma_data"] == 0.75  # no weight shows it, so an export carries it
    report = convert(
        "edm", tmp_path / "edm.safetensors", tmp_path / "aligned", check="none", align_steps=200
    )
    assert report["network"]["time_input"] == "log_sigma" and report["alignment"]["steps"] == 200
    config, _ = pretrained.described(checkpoint.metadata(tmp_path / "aligned"))
    assert config.time_input == "t" and config.embedding_mult == 2
    exported = export(tmp_path / "aligned", tmp_path / "aligned.safetensors")
    assert "map_layer0.weight" in exported and "model.map_layer0.weight" not in exported
    convert("dmf", tmp_path / "aligned.safetensors", tmp_path / "again", check="none")
    pairs = zip(
        *(jax.tree.leaves(pretrained.load(tmp_path / name)[1]) for name in ("aligned", "again")),
        strict=True,
    )
    assert all(np.array_equal(a, b) for a, b in pairs)
    with pytest.raises(
        DmfError, match="network.time_input is 't': expected 'log_sigma', as in weights of kind edm"
    ):
        export(tmp_path / "aligned", tmp_path / "wrong.safetensors", kind="edm")


def test_a_config_takes_the_network_of_a_converted_directory(tmp_path):
    """configs/cifar10_from.py:DIRECTORY starts a run from an aligned EDM network, bit for bit."""
    random_flow(
        EDM,
        dataclasses.replace(TINY_EDM, channel_mult=(1, 1)),
        (32, 32, 3),
        tmp_path / "edm.safetensors",
    )
    convert("edm", tmp_path / "edm.safetensors", tmp_path / "edm", check="none", align_steps=10)
    values = cifar10_from.get_config(str(tmp_path / "edm")).to_dict()
    assert values["data"]["augment"] == 0 and values["curriculum"]["stages"] == 10
    run = runs.open_run(
        parse(merged(values, data=dict(mock=True), batch_size=32)), tmp_path / "run"
    )
    start = runs.begin(run)
    run.close()
    stored = checkpoint.metadata(tmp_path / "run" / "checkpoints" / "0")
    assert stored["config"]["network"]["precond"] == "edm" and stored["source"]["kind"] == "edm"
    for a, b in zip(
        jax.tree.leaves(start.params),
        jax.tree.leaves(pretrained.load(tmp_path / "edm")[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_an_alignment_that_cannot_be_is_refused_before_the_work(sit, tmp_path, capsys):
    with pytest.raises(DmfError, match="network.kind is 'dit': expected 'unet'"):
        convert("sit", sit[0], tmp_path / "out", given=SIT_GIVEN, check="none", align_steps=10)
    assert not capsys.readouterr().out and not list(tmp_path.iterdir())
