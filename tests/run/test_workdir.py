"""A work directory: one run at a time, what a fresh start forgets, full disks, refused changes."""

import json
import re
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from dmf.config import parse
from dmf.errors import DmfError
from dmf.evaluation import sampling
from dmf.logging import JsonLines
from dmf.run import guard, scoreboard, workdir
from dmf.run.guard import Guard, GuardConfig
from dmf.storage import checkpoint, paths, records
from tests import runs
from tests.evaluation.test_sampling import Scorer, board
from tests.runs import QUICK
from tests.test_processes import ROOT, Group
from tests.tiny import TINY, merged


def test_a_second_run_in_the_same_directory_is_refused_on_all_of_its_processes(tmp_path):
    # Only the first process of a run asks for the lock; the other one hears of it.
    with workdir.held(tmp_path / "run"):
        for status, _, error in Group(tmp_path, tmp_path / "run", 2).finish():
            assert status == 2
            assert (
                f"--workdir={tmp_path / 'run'} is in use by another process; expected one at a time"
                in error
            )
            assert "Traceback" not in error
    assert [p.name for p in (tmp_path / "run").iterdir()] == [workdir.LOCK]


def test_a_directory_is_free_again_after_a_kill_an_error_and_an_end(tmp_path):
    code = "import sys, time, pathlib\nfrom dmf.run import workdir\n"
    code += "with workdir.held(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n"
    code += "    time.sleep(1e6)"
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(DmfError, match="is in use by another process"):
        runs.train(parse(QUICK), tmp_path)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    with pytest.raises(
        DmfError, match="no such file"
    ) as kept:  # a notebook keeps the frames of an error
        runs.train(parse(merged(QUICK, init="nowhere")), tmp_path)
    first = runs.train(parse(QUICK), tmp_path)
    assert runs.train(parse(QUICK), tmp_path) == first and kept.tb


def test_a_run_that_starts_afresh_forgets_the_scores_of_the_one_before(tmp_path):
    # The checkpoints of the run before were moved away. Its start, step 0, may have been scored.
    row = '{"step": 0, "stage": "init", "kind": "given"}\n'
    (tmp_path / scoreboard.FILE).write_text(row)
    run = runs.open_run(parse(QUICK), tmp_path)
    now = runs.begin(run)
    assert not run.scoreboard.rows()
    run.checkpoints.save(0, now)
    run.close()
    (tmp_path / scoreboard.FILE).write_text(row + row.replace("0", "1"))
    run = runs.open_run(parse(QUICK), tmp_path)  # the same run, killed after its start was scored
    runs.begin(run)
    run.close()
    assert [found["step"] for found in run.scoreboard.rows()] == [0]


def test_what_older_versions_wrote_is_read_by_the_names_of_today(tmp_path):
    config = parse(QUICK)
    workdir.claim(tmp_path, config, None, {}, fresh=True)
    stored = (tmp_path / workdir.CONFIG).read_text()
    assert stored.count('"all_pairs"') == 2
    (tmp_path / workdir.CONFIG).write_text(stored.replace('"all_pairs"', '"trajectory"'))
    workdir.claim(tmp_path, config, None, {}, fresh=False)
    JsonLines(tmp_path / scoreboard.FILE).write({"step": 6, "kind": "trajectory"})
    assert board(tmp_path).rows() == [{"step": 6, "kind": "all_pairs"}]
    row = dict(stage="stage 0", kind="trajectory", step=6, reason="", back_to=0, action="rate")
    assert guard.describe(row).startswith("stage 0 (all_pairs), step 6")


@contextmanager
def full_disk():
    """The system itself refuses to write: files may not grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_while_a_run_writes_is_one_line_that_names_the_file(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(sampling, "SCORERS", {"digits": (Scorer, "fd_hidden")})
    run, empty = tmp_path / "run", tmp_path / "empty"
    (run / checkpoint.FOLDER / "6").mkdir(parents=True)
    (run / checkpoint.FOLDER / "6" / checkpoint.MANIFEST).touch()
    lines, rules = (
        JsonLines(run / "metrics.jsonl"),
        Guard(run / guard.FILE, run / checkpoint.FOLDER, GuardConfig(), True),
    )
    lines.write({"step": 1})
    lines.path.write_text('{"step":1}\n')  # other spaces than ours, so that it is written anew
    JsonLines(run / scoreboard.FILE).write(
        {"step": 6, "nfe": 1, "n_samples": 32.0, "fd_hidden": 1.0}
    )
    scores, unscored = board(run), board(empty)
    unscored._judge._sampler = lambda params, count, steps: np.zeros((count, 8, 8, 1), np.float32)
    (empty / "samples").mkdir(parents=True)
    for name, write in {
        "metrics.jsonl": lambda: lines.write({"step": 2}),
        "jsonl": lambda: lines.resume(1),
        "best.json": scores._note_best,
        "guard.json": rules._write,
        "samples/00000004_pretrain.png": lambda: unscored.add(unscored.boundaries[4], None),
    }.items():
        with full_disk(), pytest.raises(DmfError) as caught:
            write()
        expected = (
            rf"{tmp_path}/\S*{name} cannot be written: File too large; "
            "expected a writable directory with room"
        )
        assert re.fullmatch(expected, str(caught.value))
    scores._note_best()  # with room again
    assert json.loads((run / checkpoint.BEST).read_text())["step"] == 6 and lines.read() == [
        {"step": 1}
    ]


def test_checkpoints_without_their_config_and_a_torn_origin_are_one_line(tmp_path):
    workdir.claim(tmp_path, parse(QUICK), None, {}, fresh=True)
    (tmp_path / workdir.CONFIG).unlink()
    with pytest.raises(
        DmfError, match=r"config.json cannot be read: FileNotFoundError: .*, beside the checkpoints"
    ):
        workdir.claim(tmp_path, parse(QUICK), None, {}, fresh=False)
    (tmp_path / workdir.ORIGIN).write_text("{")
    with pytest.raises(
        DmfError,
        match=r"origin.json line 1: no JSON .*; expected what dmf wrote there",
    ):
        workdir.origin(tmp_path)


def test_a_probe_of_more_images_than_are_held_out_names_its_field_and_their_number(tmp_path):
    values = merged(TINY, data=dict(holdout_fraction=0.02), guard=dict(every_steps=3, rows=64))
    with pytest.raises(
        DmfError,
        match=r"config.guard.rows = 64 takes 64 images on 8 .*: expected at most the 3\d held-out",
    ):
        runs.open_run(parse(values), tmp_path)
    values = merged(values, guard=dict(rows=17))  # 24 images on eight devices
    runs.open_run(parse(values), tmp_path).close()


@pytest.mark.parametrize("old", ["dagger", "floor", "adaptive"])
@pytest.mark.parametrize("new", ["dagger", "linear", "adaptive"])
def test_another_interval_is_taken_but_not_to_or_from_adaptive(tmp_path, old, new):
    """The state on disk has a table for the adaptive interval, and none for the others."""
    first, second = (parse(merged(QUICK, curriculum=dict(interval=name))) for name in (old, new))
    workdir.claim(tmp_path, first, None, {}, fresh=True)
    if old == new or "adaptive" not in (old, new):
        workdir.claim(tmp_path, second, None, {}, fresh=False, allow_change=True)
        return
    shown = (
        rf"--allow_change does not go as far as config.curriculum.interval: {old} -> {new} \(.* a "
    )
    shown += "table of intervals"
    with pytest.raises(DmfError, match=shown):
        workdir.claim(tmp_path, second, None, {}, fresh=False, allow_change=True)


def test_a_folder_and_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    with (
        paths.alone(tmp_path, "first"),
        pytest.raises(DmfError, match="^second$"),
        paths.alone(tmp_path, "second"),
    ):
        raise AssertionError
    assert not list(tmp_path.iterdir())  # a folder is its own lock
    monkeypatch.setattr(paths.fcntl, "flock", unsupported)
    with paths.alone(tmp_path, "first"), paths.alone(tmp_path, "second"):
        pass


TIMES = "2026-11-28T20:00:00+00:00", "2026-11-28T20:00:07+00:00"
KEPT = {"utc": TIMES[1], "step": 12, "kept": [6, 12]}
CHANGES = {  # content of changes.jsonl -> what is said of it, "" where it is read
    "sealed": (json.dumps(records.sealed(KEPT)) + "\n", ""),
    "older": (json.dumps(KEPT) + "\n", ""),
    "torn and written again": (
        f'{{"utc": "{TIMES[0]}", "step": 12, "ke\n{json.dumps(KEPT)}\n',
        "",
    ),
    "torn otherwise": (
        f'{{"utc": "{TIMES[0]}", "step": 13, "ke\n{json.dumps(KEPT)}\n',
        "line 1: no JSON",
    ),
    "torn": (json.dumps(KEPT)[:30], "line 1: no JSON"),
    "empty": ("", "is empty; expected"),
    "altered": (json.dumps(records.sealed(KEPT)).replace("12]", "13]"), "values were altered"),
    "type": ('{"kept": 3}\n' + json.dumps(KEPT) + "\n", "line 1: kept is 3, expected a list"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_damaged_changes_of_the_config_lose_no_checkpoint(tmp_path, name):
    content, message = CHANGES[name]
    (tmp_path / workdir.CHANGES).write_text(content)
    if not message:
        assert workdir.kept_by_changes(tmp_path) == {6, 12}
        return
    with pytest.raises(DmfError, match=f"changes.jsonl.*{message}"):
        workdir.kept_by_changes(tmp_path)


def test_an_altered_intervention_and_a_bad_config_name_their_files(tmp_path):
    row = {"step": 9, "stage": "stage 0", "kind": "jvp", "reason": "", "rules": {}, "back_to": 4}
    row |= {"action": "rate", "settled": True}
    text = json.dumps([records.sealed(row)])
    (tmp_path / guard.FILE).write_text(text)
    assert guard.read(tmp_path / guard.FILE) == [row]
    (tmp_path / guard.FILE).write_text(text.replace('"back_to": 4', '"back_to": 5'))
    with pytest.raises(DmfError, match=r"guard.json: \[0\]: its values were altered"):
        guard.read(tmp_path / guard.FILE)
    (tmp_path / workdir.CONFIG).write_text('{"seed": "x"}')
    with pytest.raises(DmfError, match="config.json: config.seed = 'x': expected int"):
        workdir._stored(tmp_path)
