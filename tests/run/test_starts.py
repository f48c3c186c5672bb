"""What a work directory notes of each start, and which changes of a config it lets through."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from datetime import datetime

import jax
import numpy as np
import pytest

from dmf.config import parse, to_dict
from dmf.errors import DmfError
from dmf.run import workdir
from tests import runs
from tests.runs import QUICK, rows, steps_on_disk
from tests.tiny import merged


def test_every_start_notes_what_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hunter2-in-the-environment")
    runs.train(parse(QUICK), tmp_path)
    (tmp_path / workdir.STARTS).write_text((tmp_path / workdir.STARTS).read_text() + '{"torn')
    runs.train(parse(merged(QUICK, run=dict(sample_rows=3))), tmp_path)
    first, second = (tmp_path / workdir.STARTS).read_text().splitlines()
    first, second = json.loads(first), json.loads(second)
    assert (first["step"], second["step"]) == (0, 12)
    assert (first["differs"], second["differs"]) == ([], ["config.run.sample_rows: 2 -> 3"])
    assert first["jax"] == jax.__version__ and first["numpy"] == np.__version__
    assert (
        first["processes"] == 1 and first["platform"] == "cpu" and first["devices"] == ["8 x cpu"]
    )
    assert first["command"] == shlex.join(sys.orig_argv)
    assert abs(datetime.fromisoformat(first["utc"]).timestamp() - time.time()) < 300
    assert set(first["git"]) == {"revision", "dirty"} or first["git"] == {"revision": "unknown"}
    assert not any("hunter2" in p.read_text(errors="ignore") for p in tmp_path.glob("*.json*"))


def test_the_revision_is_that_of_the_code_and_of_no_repository_around_it(tmp_path):
    git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x"]
    for args in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *args], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert workdir.revision(tmp_path) == {"revision": head, "dirty": False}
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "new.py").touch()
    assert workdir.revision(tmp_path) == {"revision": head, "dirty": True}
    assert workdir.revision(tmp_path / "site-packages") == {"revision": "unknown"}
    assert workdir.revision(tmp_path / "nowhere") == {"revision": "unknown"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of `QUICK`."""
    folder = tmp_path_factory.mktemp("finished")
    runs.train(parse(QUICK), folder)
    return folder


def test_a_change_is_shown_refused_and_with_the_flag_taken_and_noted(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    longer = parse(
        merged(QUICK, curriculum=dict(length=20.0), loss=dict(p=0.75), run=dict(sample_rows=3))
    )
    shown = r"config.curriculum.length: 12.0 -> 20.0; config.loss.p: 0.5 -> 0.75"
    with pytest.raises(DmfError, match=f"another config: {shown}; expected .*--allow_change"):
        runs.train(longer, run)
    assert (
        json.loads((run / "config.json").read_text())["loss"]["p"] == 0.5
        and not (run / workdir.CHANGES).exists()
    )
    runs.train(longer, run, allow_change=True)
    assert re.search(f"changed +after step 12: {shown}\n", capsys.readouterr().out)
    (row,) = rows(run, workdir.CHANGES)
    assert (
        row["step"] == 12
        and row["changed"] == shown.split("; ")
        and row["before"] == json.loads(json.dumps(to_dict(parse(QUICK))))
    )
    assert parse(json.loads((run / "config.json").read_text())) == longer
    assert row["kept"] == steps_on_disk(finished) == [6, 9, 12]
    assert steps_on_disk(run) == [
        6,
        9,
        12,
        18,
        20,
    ]  # the checkpoints from before the change, and the newest two
    assert (
        rows(run, "metrics.jsonl")[:12] == rows(finished, "metrics.jsonl")
        and len(rows(run, "metrics.jsonl")) == 20
    )
    runs.train(longer, run)  # from now on this is the run's config
    assert len(rows(run, workdir.CHANGES)) == 1
    with pytest.raises(DmfError, match="config.loss.p: 0.75 -> 0.5"):
        runs.train(parse(QUICK), run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(network=dict(width=64)),
            r"config.network.width: 32 -> 64 \(the weights on disk are those of this network\)",
        ),
        (
            dict(data=dict(holdout_fraction=0.5)),
            r"config.data.holdout_fraction: 0.25 -> 0.5 \(the weights have seen these data",
        ),
        (
            dict(ema=dict(halflife_images=(50.0,))),
            r"halflife_images: .* \(the averages on disk have these half-lives\)",
        ),
        (
            dict(optimizer=dict(clip_norm=0.0)),
            r"clip_norm: 1.0 -> 0.0 \(the optimiser's state on disk has other parts\)",
        ),
        (
            dict(curriculum=dict(length=8.0)),
            "step 12 is on disk: expected a config that ends no earlier, not at 8",
        ),
    ],
)
def test_no_flag_lets_a_change_through_that_the_state_on_disk_does_not_fit(
    finished, change, message
):
    before = {p: p.read_text() for p in finished.glob("*.json*")}
    with pytest.raises(DmfError, match=message):
        runs.train(parse(merged(QUICK, **change)), finished, allow_change=True)
    assert {p: p.read_text() for p in finished.glob("*.json*")} == before


def test_another_clipping_threshold_is_a_change_that_the_flag_lets_through(finished):
    values = merged(QUICK, optimizer=dict(clip_norm=2.0))
    about = json.loads((finished / "data.json").read_text())
    with pytest.raises(DmfError, match="clip_norm: 1.0 -> 2.0; expected .*--allow_change"):
        workdir.claim(finished, parse(values), None, about, False)
    workdir.claim(finished, parse(values), None, about, False, allow_change=True)
    with pytest.raises(
        DmfError, match=r"data.count: \d+ -> 7 \(the weights have seen these data\)"
    ):
        workdir.claim(
            finished, parse(values), None, {**about, "count": 7}, False, allow_change=True
        )
