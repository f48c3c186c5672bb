"""A run that scores itself by a protocol: its best checkpoint, its rivals, its labels."""

import json
import shutil

import jax
import pytest

from dmf import data, pretrained, sharding
from dmf.config import parse
from dmf.errors import DmfError
from dmf.evaluation import protocols, scoring
from dmf.evaluation.boundary import RunJudge
from dmf.evaluation.judge import Setting
from dmf.storage import checkpoint
from tests.evaluation.conftest import written
from tests.runs import train
from tests.tiny import MLP, TINY, merged

pytestmark = pytest.mark.usefixtures("shared_programs")


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
            MLP, curriculum=dict(stages=3, kinds=kinds, length=9.0, pretrain_length=3.0), run=run
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
    """A run without scores has no best; one resumed with more samples compares its own only."""
    kinds = dict(stages=2, kinds=("all_pairs", "all_pairs"), length=4.0, pretrain_length=0.0)
    run = dict(
        protocol=written(tmp_path, metrics=["fid"]),
        reference=str(place / "ref.npz"),
        score_samples=64,
    )
    with pytest.raises(
        DmfError, match="best.json cannot be read: .*; expected a run that has been scored"
    ):
        checkpoint.find(tmp_path / "run" / "best")
    first = train(parse(merged(MLP, curriculum=kinds, run=run)), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    again = train(
        parse(merged(MLP, curriculum=kinds, run=run | {"score_samples": 128})), tmp_path / "run"
    )
    assert [row["step"] for row in again if row["nfe"] == 1] == [2, 4]
    assert (
        {row["step"]: row["scored_by"] for row in again}[2]
        == first[0]["scored_by"]
        != again[-1]["scored_by"]
    )
    assert json.loads((tmp_path / "run" / "best.json").read_text())["step"] == 4


def test_the_label_rule_is_the_protocols_in_training_as_in_scoring(place, tmp_path):
    """With every rule for labels, the score in training is the checkpoint's score."""
    kinds = dict(stages=1, kinds=("all_pairs",), length=2.0, pretrain_length=0.0)
    values, found = merged(TINY, curriculum=kinds, run=dict(score_steps=(1,))), {}
    train(parse(values), tmp_path / "run")
    network, params = pretrained.load(tmp_path / "run")
    dataset, mesh = data.load(parse(values).data, "train"), sharding.make_mesh()
    params = jax.device_put(params, sharding.replicated(mesh))
    for rule in protocols.LABELS:
        name = written(tmp_path, f"{rule}.json", labels=rule, metrics=["fid"], count=64)
        run = dict(protocol=name, reference=str(place / "ref.npz"), score_samples=64)
        judge = RunJudge(parse(merged(values, run=run)), dataset, network, mesh)
        rows = judge.score(params, [1])  # as the run scores itself at its boundaries
        setting = Setting(name, "", str(place / "ref.npz"))
        again = scoring.score_checkpoint(
            tmp_path / "run", setting, [1], out=str(tmp_path / f"{rule}_out.json")
        )
        assert rows[0]["fid"] == again[0]["fid"]
        found[rule] = again[0]["fid"]
    assert found["uniform"] != found["data"]  # the first digits of the data come in turn
