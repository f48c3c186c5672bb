"""Whole runs: stages, exact resume after a kill, hand-over, loading, the stop at a bad number."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from dmf import pretrained, state
from dmf import train as trainer
from dmf.config import parse
from dmf.errors import DmfError
from dmf.method import curriculum
from dmf.run.report import Report
from dmf.storage import checkpoint, paths
from tests import ROOT, devices, runs
from tests.tiny import MLP, merged

ENV = {**os.environ, "XLA_FLAGS": devices(1), "PYTHONUNBUFFERED": "1"}  # one device, as on a laptop


def leaves(folder):
    """Every array of a checkpoint (weights, EMAs, optimiser, table of intervals), as NumPy."""
    from orbax.checkpoint import v1 as ocp

    found = ocp.load_checkpointables(paths.absolute(folder))
    items = (*checkpoint.ITEMS, *checkpoint.OPTIONAL)
    return [np.asarray(x) for x in jax.tree.leaves({k: found[k] for k in items if k in found})]


pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run and its scores."""
    workdir = tmp_path_factory.mktemp("finished")
    scores = runs.train(parse(MLP), workdir)
    return workdir, scores


def test_a_run_leaves_every_stage_boundary_its_picture_and_its_log(finished):
    workdir, scores = finished
    kept = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [
        4,
        6,
        8,
        10,
        12,
    ]  # the boundaries; steps 3 and 9 were saved too, and are no longer among the newest two
    assert [(s["step"], s["stage"], s["kind"]) for s in scores] == [
        (4, "pretrain", "flow"),
        (6, "stage 0", "all_pairs"),
        (8, "stage 1", "discrete"),
        (10, "stage 2", "discrete"),
        (12, "stage 3", "jvp"),
    ]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert [r["rho"] for r in rows if r["kind"] == "discrete"] == [0.5, 0.5, 0.25, 0.25]
    assert all(np.isfinite(r["grad_norm"]) and r["squares_border"] > 0 for r in rows)
    assert all(("squares_pairs" in r) == (r["kind"] != "flow") for r in rows)
    for name in (
        "samples.png",
        "curves.png",
        "samples/00000004_pretrain.png",
        "samples/00000012_stage_3.png",
    ):
        assert (workdir / name).stat().st_size > 500


def test_the_same_command_on_a_finished_run_changes_no_file_but_the_closing_pictures(
    finished, capsys
):
    workdir, scores = finished

    def state_of():
        return {
            p: (p.stat().st_mtime_ns, p.stat().st_size)
            for p in workdir.rglob("*")
            if p.suffix != ".png"
        }

    before = {p: s for p, s in state_of().items() if p.is_file() and p.suffix != ".jsonl"}
    logs = {p: p.read_text() for p in workdir.glob("*s.jsonl") if p.name != "starts.jsonl"}
    assert runs.train(parse(MLP), workdir) == scores
    assert {p: s for p, s in state_of().items() if p in before} == before
    assert len(logs) == 2 and {p: p.read_text() for p in logs} == logs
    assert "start     step 12 of 12, resuming" in capsys.readouterr().out


def test_the_whole_run_compiles_one_program_per_kind(tmp_path):
    # Three kinds of stages, one of them twice, and pretraining: four programs with any switch.
    for name, switch in (
        ("keep", {}),
        ("reset", dict(switch_optimizer="reset", switch_ema="reset")),
    ):
        run = runs.open_run(parse(merged(MLP, curriculum=switch)), tmp_path / name)
        runs.loop(run)
        run.close()
        assert {kind: program._cache_size() for kind, program in run.steps.items()} == {
            "flow": 1,
            "all_pairs": 1,
            "discrete": 1,
            "jvp": 1,
        }


def test_a_run_without_a_judge_trains_alike_without_pictures_and_scores(finished, tmp_path):
    workdir, _ = finished
    assert trainer.train(parse(MLP), tmp_path) == []
    for a, b in zip(
        leaves(tmp_path / "checkpoints" / "12"), leaves(workdir / "checkpoints" / "12"), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert (tmp_path / "metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()
    assert not list(tmp_path.glob("*.png")) and not (tmp_path / "samples").exists()
    best = '{"step": 6, "main": 1.0}'
    (tmp_path / "best.json").write_text(best)  # as a start with a judge has left it
    trainer.train(parse(MLP), tmp_path)
    assert (tmp_path / "best.json").read_text() == best


def stopped_after(n, values, workdir):
    """Begins a run and ends it by an error once n steps have been reported."""

    class Stop(Exception):
        pass

    class Ending(Report):
        def settle(self):
            held = self._pending
            super().settle()
            if held is not None and held[0] == n:
                raise Stop

    run = runs.open_run(parse(values), workdir)
    with pytest.raises(Stop):
        runs.loop(run, Ending(run))
    run.close()


def test_resume_in_every_phase_ends_in_the_same_bits(finished, tmp_path):
    # An error stops the run, and it resumes: at the hand-over, inside a stage and at its end.
    # The command that kills processes (tests/run/test_survive.py) does the rest.
    workdir, _ = finished
    expected = leaves(workdir / "checkpoints" / "12")
    for n in (4, 5, 10):
        stopped_after(n, MLP, tmp_path / str(n))
        runs.train(parse(MLP), tmp_path / str(n))
        for a, b in zip(leaves(tmp_path / str(n) / "checkpoints" / "12"), expected, strict=True):
            np.testing.assert_array_equal(a, b)
        for log in ("metrics.jsonl", "scores.jsonl"):
            assert (tmp_path / str(n) / log).read_text() == (workdir / log).read_text()


@pytest.mark.parametrize("name", ["splus", "muon"])
def test_a_matrix_optimiser_resumes_between_two_decompositions_in_the_same_bits(name, tmp_path):
    optimizer = dict(name=name, decompose_every_steps=5)
    values = merged(runs.QUICK, optimizer=optimizer, curriculum=dict(length=8.0))
    runs.train(parse(values), tmp_path / "whole")
    stopped_after(4, values, tmp_path / "cut")  # step 3 is saved; decomposed after 1 and 5
    runs.train(parse(values), tmp_path / "cut")
    whole, cut = (leaves(tmp_path / place / "checkpoints" / "8") for place in ("whole", "cut"))
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(a, b)
    without = merged(values, optimizer=dict(decompose_every_steps=100))
    runs.train(parse(without), tmp_path / "once")
    once = leaves(tmp_path / "once" / "checkpoints" / "8")
    same = all(np.array_equal(a, b) for a, b in zip(whole, once, strict=True))
    assert same == (name == "muon")  # which has nothing to decompose


def test_a_run_with_a_second_network_resumes_in_the_same_bits(tmp_path):
    rules = dict(stages=2, kinds=("all_pairs", "rectify"), length=8.0)
    values = merged(runs.QUICK, loss=dict(tangent="own"), curriculum=rules)
    runs.train(parse(values), tmp_path / "whole")
    stopped_after(7, values, tmp_path / "cut")  # step 6 is saved, two steps into the second stage
    runs.train(parse(values), tmp_path / "cut")
    whole, cut = (leaves(tmp_path / place / "checkpoints" / "8") for place in ("whole", "cut"))
    assert (tmp_path / "cut" / "checkpoints" / "8" / "second").is_dir()
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(a, b)


def test_after_pretraining_the_run_goes_on_from_the_averaged_flow_model(finished):
    workdir, _ = finished
    _, ema = pretrained.load(workdir / "checkpoints" / "4")
    config = parse(MLP)
    run = runs.open_run(config, workdir)
    found = run.checkpoints.restore_latest(runs.begin(run))
    run.close()
    before = curriculum.stage_at(run.stages, 3)
    now = state.switch(found, before, config.curriculum, config.ema, run.optimizer)
    for a, b in zip(
        jax.tree.leaves(now.params),
        jax.tree.leaves(state.evaluated(found, config.ema)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert int(now.opt_state[1].count) == 0 and len(now.ema) == 2
    # Step 4 is not step 12.
    assert not np.array_equal(jax.tree.leaves(ema)[0], jax.tree.leaves(now.params)[0])


def test_a_run_from_a_flow_checkpoint_starts_as_the_run_that_pretrained_it(finished, tmp_path):
    # The hand-over inside a run and another run from its flow checkpoint start alike. Only the
    # random numbers differ, because they depend on the step number.
    workdir, _ = finished
    config = parse(
        merged(MLP, init=str(workdir / "checkpoints" / "4"), curriculum=dict(pretrain_length=0.0))
    )
    run = runs.open_run(config, tmp_path)
    start = runs.begin(run)
    run.close()
    _, flow_model = pretrained.load(workdir / "checkpoints" / "4")
    for a, b in zip(jax.tree.leaves(start.params), jax.tree.leaves(flow_model), strict=True):
        np.testing.assert_array_equal(a, b)
    z, t = (
        jax.random.normal(jax.random.key(0), (4, 8, 8, 1)),
        np.linspace(0.1, 1, 4, dtype=np.float32),
    )
    u = [run.network.apply(start.params, z, r, t) for r in (t, 0 * t)]
    np.testing.assert_array_equal(*u)


def test_a_started_run_needs_its_flow_model_no_more(finished, tmp_path):
    workdir, _ = finished
    subprocess.run(["cp", "-r", workdir / "checkpoints" / "4", tmp_path / "flow"], check=True)
    values = merged(MLP, init=str(tmp_path / "flow"), curriculum=dict(pretrain_length=0.0))
    run = runs.open_run(parse(values), tmp_path / "run")
    first = runs.begin(run)
    run.close()
    subprocess.run(["rm", "-r", tmp_path / "flow"], check=True)
    again = runs.open_run(parse(values), tmp_path / "run")
    for a, b in zip(jax.tree.leaves(runs.begin(again)), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(a, b)
    again.close()


def test_one_call_loads_a_model_and_any_of_its_averages(finished):
    workdir, _ = finished
    network, params = pretrained.load(workdir)
    raw = pretrained.load(workdir, ema=0.0)[1]
    other = pretrained.load(workdir, ema=800.0)[1]
    first = [jax.tree.leaves(p)[0] for p in (params, raw, other)]
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[0], first[2])
    u = network.apply(
        params, np.zeros((2, 8, 8, 1), np.float32), np.zeros(2, np.float32), np.ones(2, np.float32)
    )
    assert u.shape == (2, 8, 8, 1)
    with pytest.raises(
        DmfError, match=r"config.ema.evaluate = 5: expected 0 \(raw weights\) or one of"
    ):
        pretrained.load(workdir, ema=5.0)


def test_a_bad_number_stops_the_run_is_named_and_never_saved(tmp_path):
    change = dict(
        optimizer=dict(pretrain_learning_rate=1e30, clip_norm=0.0),
        run=dict(checkpoint_every_steps=1),
    )
    with pytest.raises(
        DmfError, match=r"step \d+ \(pretrain, flow\): \w+ = (nan|inf).*expected finite values"
    ) as caught:
        runs.train(parse(merged(MLP, **change)), tmp_path)
    bad = int(re.match(r"step (\d+)", str(caught.value))[1])
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")) == list(
        range(1, bad)
    )


def test_a_work_directory_belongs_to_one_config(finished):
    workdir, _ = finished
    with pytest.raises(DmfError, match=r"another config: config.loss.p: 0.5 -> 0.75; expected"):
        runs.train(parse(merged(MLP, loss=dict(p=0.75))), workdir)
    runs.open_run(
        parse(merged(MLP, run=dict(log_every_steps=5))), workdir
    ).close()  # logging may change


def test_a_failed_first_command_does_not_tie_the_directory(tmp_path):
    with pytest.raises(DmfError, match="checkpoint nowhere: no such file"):
        runs.train(parse(merged(MLP, init="nowhere")), tmp_path)
    with pytest.raises(DmfError, match="finite"):
        runs.train(
            parse(merged(MLP, optimizer=dict(pretrain_learning_rate=1e30, clip_norm=0.0))),
            tmp_path,
        )
    runs.open_run(parse(MLP), tmp_path).close()


def test_scores_asked_for_only_after_the_end_do_not_break_it(finished, tmp_path):
    workdir, _ = finished
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", workdir, copy], check=True)
    runs.train(parse(merged(MLP, run=dict(score_samples=64))), copy)


def test_a_kill_inside_the_very_first_save_is_a_fresh_start(finished, tmp_path):
    workdir, _ = finished
    runs.open_run(parse(MLP), tmp_path).close()
    subprocess.run(
        ["cp", "-r", workdir / "checkpoints" / "4", tmp_path / "checkpoints" / "3"], check=True
    )
    (
        tmp_path / "checkpoints" / "3" / checkpoint.MANIFEST
    ).unlink()  # what a kill just before the manifest leaves
    runs.train(parse(MLP), tmp_path)
    for a, b in zip(
        leaves(tmp_path / "checkpoints" / "12"), leaves(workdir / "checkpoints" / "12"), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_an_unfinished_newest_save_is_passed_over_by_loading(finished, tmp_path):
    workdir, _ = finished
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", workdir, copy], check=True)
    (copy / "checkpoints" / "12" / checkpoint.MANIFEST).unlink()
    assert checkpoint.find(copy) == copy / "checkpoints" / "10"
    pretrained.load(copy)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(
    finished, tmp_path, caplog
):
    workdir, _ = finished
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", workdir, copy], check=True)
    for file in (copy / "checkpoints" / "12" / "params").rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(file.read_bytes()[:50])
    (copy / "checkpoints" / "13").mkdir()  # what a crashed file system may leave
    runs.train(parse(MLP), copy)
    assert "checkpoints/12: file params/" in caplog.text and "it is skipped" in caplog.text
    assert "checkpoints/13: no manifest.json, so its save was not completed" in caplog.text
    for a, b in zip(
        leaves(copy / "checkpoints" / "12"), leaves(workdir / "checkpoints" / "12"), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(network=dict(depth=2)), "its network differs: config.network.depth: 1 -> 2"),
        (dict(init="/nowhere/at/all"), "checkpoint /nowhere/at/all: no such file or directory"),
    ],
)
def test_an_unfit_start_is_refused(finished, tmp_path, change, message):
    workdir, _ = finished
    values = merged(merged(MLP, init=str(workdir)), **change)
    with pytest.raises(DmfError, match=message):
        runs.train(parse(values), tmp_path / "run")


def test_a_whole_run_needs_no_tensorflow(tmp_path):
    code = f"""
import json, sys
from tests.data.test_data import WITHOUT_TENSORFLOW
exec(WITHOUT_TENSORFLOW)
from dmf.evaluation import draw
from dmf.config import parse
from tests import runs
from tests.tiny import MLP, merged
runs.train(parse(merged(MLP, run=dict(tensorboard=True))), {str(tmp_path)!r})
draw.write_samples({str(tmp_path)!r}, [1, 2], 5, "")
assert not any(name.split(".")[0] in ("tensorflow", "tensorboard", "clu") for name in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENV, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples_few_step_1_2.png").stat().st_size > 500 and not (
        tmp_path / "tensorboard"
    ).exists()


def test_importing_what_a_run_needs_imports_no_tensorflow():
    code = (
        "import sys, dmf.train\n"
        "assert not {'tensorflow', 'tensorboard', 'clu', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENV, check=True, timeout=120)
