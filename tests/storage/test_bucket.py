"""A run in a bucket gives the same bits and asks nothing that a bucket cannot do."""

import io
import json
import os
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
from PIL import Image

from dmf import pretrained
from dmf.config import parse
from dmf.errors import DmfError
from dmf.evaluation import draw, sampling
from dmf.export import card, model, weights
from dmf.logging import JsonLines
from dmf.run import guard, workdir
from dmf.storage import checkpoint, paths
from tests import runs
from tests.bucket import Bucket, Refused, serve
from tests.test_train import leaves
from tests.tiny import MLP, Setup, merged

pytestmark = pytest.mark.usefixtures("shared_programs")
# One program, two stages of four steps, scored.
SCORED = merged(
    MLP,
    curriculum=dict(stages=2, kinds=("all_pairs",) * 2, pretrain_length=0.0),
    run=dict(score_samples=32),
)
HERE = "gs://things/runs/tiny"


@pytest.fixture(scope="module", params=["stand-in", "gcsfs"])
def bucket(request):
    """A bucket behind gs://, for epath and for TensorStore."""
    if request.param == "gcsfs" and not find_spec("gcsfs"):
        pytest.skip("gcsfs itself is not installed (requirements-gcs.txt)")
    with pytest.MonkeyPatch.context() as patch:
        found = Bucket()
        serve(found, patch, request.param == "gcsfs")
        yield found
        found.stop()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A finished run in a directory, and its rows of scores."""
    folder = tmp_path_factory.mktemp("local")
    return folder, runs.train(parse(SCORED), folder)


def killed_at(step, monkeypatch):
    """A run dies just before it saves this step, and loses what it had in memory."""

    class Killed(Exception):
        pass

    save = checkpoint.Checkpoints.save

    def stops(self, n, *args):
        if n == step:
            raise Killed
        save(self, n, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", stops)
        with pytest.raises(Killed):
            runs.train(parse(SCORED), HERE)


@pytest.fixture(scope="module")
def remote(bucket, local):
    """The same run in a bucket, killed once; its rows of scores."""
    patch = pytest.MonkeyPatch()
    killed_at(6, patch)
    killed = {name: bucket.get(name) for name in bucket.under("things/runs/tiny/")}
    return killed, runs.train(parse(SCORED), HERE)


def files(bucket, folder):
    """Text of the run's own small files."""
    return {
        n[len(folder) + 1 :]: bucket.get(n).decode()
        for n in bucket.under(folder + "/")
        if n.endswith((".json", ".jsonl"))
    }


def test_a_run_in_a_bucket_that_was_killed_ends_in_the_bits_of_a_local_one(bucket, local, remote):
    folder, scores = local
    killed, found = remote
    assert (
        "things/runs/tiny/checkpoints/4/manifest.json" in killed
        and "things/runs/tiny/scores.jsonl" in killed
    )
    assert found == scores
    steps = {name.split("/")[4] for name in bucket.under("things/runs/tiny/checkpoints/")}
    assert steps == {p.name for p in (folder / "checkpoints").iterdir()} == {"4", "6", "8"}
    ends = [n for n in bucket.under("things/runs/tiny/") if n.endswith(checkpoint.COMMITTED)]
    assert ends and {bucket.get(name) for name in ends} == {b"saved\n"}  # they named the bucket
    there = paths.at(HERE)
    for step in steps:
        mine, theirs = (leaves(place / "checkpoints" / step) for place in (there, folder))
        assert len(mine) == len(theirs) > 30
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    own = files(bucket, "things/runs/tiny")
    for name in ("config.json", "data.json", "metrics.jsonl", "scores.jsonl", "best.json"):
        assert own[name] == (folder / name).read_text()
    assert [json.loads(line)["step"] for line in own["starts.jsonl"].splitlines()] == [0, 4]
    for path in [*folder.glob("samples/*.png"), folder / "samples.png", folder / "curves.png"]:
        assert (
            bucket.get(f"things/runs/tiny/{path.relative_to(folder).as_posix()}")
            == path.read_bytes()
        )
    assert not [name for name in bucket.under("") if "tmp" in name]


def test_arrays_went_to_the_bucket_through_tensorstores_own_driver(bucket, remote):
    kinds = {
        method
        for method, path in bucket.requests
        if path.startswith("/upload/storage/v1/b/things/o")
    }
    assert kinds == {"POST"}


def test_what_a_bucket_holds_is_loaded_sampled_and_scored_like_a_folder(
    bucket, local, remote, tmp_path, monkeypatch
):
    folder, _ = local
    best = json.loads(bucket.get("things/runs/tiny/best.json"))["step"]
    assert os.fspath(checkpoint.find(f"{HERE}/best")) == f"{HERE}/checkpoints/{best}"
    for name in ("", "/best", "/checkpoints/4"):
        (_, mine), (_, theirs) = pretrained.load(HERE + name), pretrained.load(f"{folder}{name}")
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)
    written = draw.write_samples(f"{HERE}/best", [1, 2], 4)
    assert os.fspath(written) == f"{HERE}/samples_few_step_1_2.png"
    draw.write_samples(f"{folder}/best", [1, 2], 4, out=str(tmp_path / "local.png"))
    mine, theirs = Image.open(io.BytesIO(written.read_bytes())), Image.open(tmp_path / "local.png")
    np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    for place, out in ((HERE, "there"), (folder, "here")):
        weights.export(f"{place}/best", tmp_path / f"{out}.safetensors")
    files = []
    for name in (
        "here",
        "there",
    ):  # not their bytes: safetensors writes the metadata's names in any order
        with safetensors.safe_open(tmp_path / f"{name}.safetensors", "numpy") as file:
            names = file.keys()  # the file is no mapping
            files.append((file.metadata(), {key: file.get_tensor(key) for key in names}))
    assert files[0][0] == files[1][0]
    jax.tree.map(np.testing.assert_array_equal, files[0][1], files[1][1])
    mine, theirs = (card.scores(model.open_model(f"{place}/best")) for place in (HERE, folder))
    assert mine == theirs and [row["nfe"] for row in mine[0]["rows"]] == [1, 2] and mine[0]["best"]
    (row,) = sampling.write_scores(f"{HERE}/best", [1], 32)
    told = json.loads(bucket.get("things/runs/tiny/best.json"))
    assert row == {name: told[name] for name in row}


def test_a_damaged_or_unfinished_checkpoint_in_a_bucket_is_passed_over(bucket, remote, caplog):
    kept = dict(bucket.objects)
    try:
        victim = next(name for name in bucket.under("things/runs/tiny/checkpoints/8/params/d/"))
        data = bytearray(bucket.get(victim))
        data[len(data) // 2] ^= 1
        bucket.put(victim, data)
        del bucket.objects["things/runs/tiny/checkpoints/6/manifest.json"]
        with pytest.raises(
            DmfError,
            match=r"checkpoint gs://.*/8: file params/d/\w+ has \d+ bytes and another checksum",
        ):
            pretrained.load(HERE)
        saved = checkpoint.Checkpoints(paths.at(HERE), 2, [], {"config": {}})
        assert saved.complete() == [8, 4]
        saved.close()
    finally:
        bucket.objects = kept


def test_another_config_is_refused_in_a_bucket_as_in_a_folder(remote):
    with pytest.raises(
        DmfError,
        match=r"--workdir=gs://things/runs/tiny holds a run with another config: "
        r"config.seed: 0 -> 1",
    ):
        runs.train(parse(merged(SCORED, seed=1)), HERE)


@pytest.mark.parametrize("root", ["folder", "bucket"])
def test_lines_and_files_are_the_same_in_both(bucket, tmp_path, root):
    folder = paths.at("gs://things/lines" if root == "bucket" else tmp_path)
    rows = JsonLines(folder / "metrics.jsonl")
    for n in range(3):
        rows.write({"step": n})
    assert rows.read() == [{"step": n} for n in range(3)]
    rows.resume(1)
    assert (folder / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'
    paths.write(folder / "a" / "x.json" if root == "bucket" else folder / "x.json", "{}")
    workdir.append(folder / "starts.jsonl", {"a": 1})
    paths.write(folder / "starts.jsonl", '{"a": 1}\n{"b"')
    workdir.append(folder / "starts.jsonl", {"c": 1})
    assert (folder / "starts.jsonl").read_text() == '{"a": 1}\n{"c": 1}\n'
    assert paths.size(folder / "starts.jsonl") == 18 and paths.absolute(folder) == folder
    names = [path.name for path in paths.files(folder)]
    assert names == (
        ["x.json"] * (root == "bucket")
        + ["metrics.jsonl", "starts.jsonl"]
        + ["x.json"] * (root == "folder")
    )
    paths.remove_tree(folder)
    assert not (folder / "metrics.jsonl").exists()


def test_what_no_bucket_does_is_refused_by_the_stand_in(bucket, request):
    if "gcsfs" in request.node.name:
        pytest.skip("gcsfs copies and deletes where it is asked to rename")
    path = paths.at("gs://things/refused/a.txt")
    path.write_text("a")
    for forbidden in (
        lambda: path.open("a").close(),
        lambda: path.rename(path.with_name("b")),
        lambda: path.replace(path.with_name("b")),
    ):
        with pytest.raises(Refused):
            forbidden()


def test_an_unreachable_or_read_only_bucket_and_other_addresses_are_one_sentence(
    bucket, remote, monkeypatch, tmp_path
):
    with monkeypatch.context() as patch:
        patch.setattr(bucket, "closed", True)
        for use in (
            lambda: runs.train(parse(MLP), HERE),
            lambda: pretrained.load(f"{HERE}/nowhere"),
        ):
            with pytest.raises(
                DmfError,
                match=r"gs://things/\S+ cannot be reached: \w+Error: .*no right to read; expected",
            ):
                use()
    with monkeypatch.context() as patch:
        patch.setattr(bucket, "read_only", True)
        with pytest.raises(
            DmfError,
            match=r"--workdir=gs://things/new cannot be written: \w+Error: "
            r".*(no right to delete|Forbidden).*; expected a",
        ):
            runs.train(parse(MLP), "gs://things/new")
        with pytest.raises(
            DmfError,
            match=r"gs://things/runs/tiny/samples\S+png cannot be written: "
            r".*no right to write.*; exp",
        ):
            draw.write_samples(f"{HERE}/best", [1], 4)
    with pytest.raises(DmfError, match=r"no such file or directory; expected a work directory"):
        pretrained.load("gs://things/nowhere")
    for address in (
        "s3://things/run",
        "gs://",
        "https://x/y",
        "GS://things/run",
        Path("gs://things/run"),
    ):
        with pytest.raises(DmfError, match=r"expected a local path or gs://BUCKET/FOLDER"):
            paths.at(address)
    with pytest.raises(DmfError, match=r"gs://things/x: expected a local path, as --out"):
        paths.local("gs://things/x", "as --out")
    assert paths.at(tmp_path) == tmp_path and type(paths.at(str(tmp_path))) is type(tmp_path)


def test_without_its_packages_a_bucket_is_one_sentence(bucket, monkeypatch):
    def missing(protocol):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(
        DmfError,
        match=r"gs://a/b: the packages for gs:// are missing; "
        r"expected pip install -r requirements-gcs",
    ):
        paths.at("gs://a/b")
    assert paths.at("a/b").name == "b"


def test_going_back_deletes_what_is_beyond_and_a_failed_save_is_one_sentence(bucket, monkeypatch):
    folder = paths.at("gs://things/back")
    row = {"step": 9, "stage": "stage 0", "kind": "jvp", "reason": "", "rules": {}}
    row |= {"back_to": 4, "action": "rate", "settled": False}
    paths.write(folder / guard.FILE, json.dumps([row]))
    for step in (4, 6, 8):
        for name in (checkpoint.MANIFEST, "params/d/0"):
            paths.write(folder / "checkpoints" / str(step) / name, "x")
    guard.Guard(folder / guard.FILE, folder / "checkpoints", guard.GuardConfig(), False).settle()
    assert [
        path.parent.name for path in (folder / "checkpoints").glob(f"[0-9]*/{checkpoint.MANIFEST}")
    ] == ["4"]
    assert (
        bucket.under("things/back/checkpoints/6") == []
        and json.loads((folder / guard.FILE).read_text())[0]["settled"]
    )
    saved = checkpoint.Checkpoints(folder, 2, [], {"config": {}})
    monkeypatch.setattr(bucket, "read_only", True)
    with pytest.raises(
        DmfError,
        match=r"checkpoint of step 9 could not be written to gs://things/back/checkpoints: "
        r".*; expected",
    ):
        saved.save(9, Setup().state())
    saved.close()
