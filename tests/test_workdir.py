"""What keeps a work directory one run's: the lock, what a fresh start forgets, and a disk that is full while a run writes."""

import signal
import subprocess
import sys

import pytest

from dmf import places, scoreboard, train, workdir
from dmf.config import parse
from dmf.errors import DmfError
from tests.test_processes import ROOT, Group
from tests.tiny import TINY, merged

# One program, two stages; scored by nothing.
QUICK = merged(TINY, curriculum=dict(stages=2, kinds=("trajectory",) * 2, length=12.0, pretrain_length=0.0))


def test_a_second_run_in_the_same_directory_is_refused_on_all_of_its_processes(tmp_path):
    # Only the first process of a run asks for the lock; the other one hears of it.
    with workdir.held(tmp_path / "run"):
        for status, _, error in Group(tmp_path, tmp_path / "run", 2).finish():
            assert status == 2
            assert f"--workdir={tmp_path / 'run'} is in use by another process; expected one at a time" in error
            assert "Traceback" not in error
    assert [p.name for p in (tmp_path / "run").iterdir()] == [workdir.LOCK]


def test_a_directory_is_free_again_after_a_kill_an_error_and_an_end(tmp_path):
    code = "import sys, time, pathlib\nfrom dmf import workdir\n"
    code += "with workdir.held(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(1e6)"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(DmfError, match="is in use by another process"):
        train.train(parse(QUICK), tmp_path)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    with pytest.raises(DmfError, match="no such file") as kept:  # a notebook keeps what the error has passed through
        train.train(parse(merged(QUICK, init="nowhere")), tmp_path)
    first = train.train(parse(QUICK), tmp_path)
    assert train.train(parse(QUICK), tmp_path) == first and kept.tb


def test_a_run_that_starts_afresh_forgets_the_scores_of_the_one_before(tmp_path):
    # Its checkpoints were moved away, and its start may have been scored: step 0, like that of a run from other weights.
    row = '{"step": 0, "stage": "init", "kind": "given"}\n'
    (tmp_path / scoreboard.FILE).write_text(row)
    run = train.Run(parse(QUICK), tmp_path)
    now = run._start()
    assert not run.scores.rows()
    run.checkpoints.save(0, now)
    run.close()
    (tmp_path / scoreboard.FILE).write_text(row + row.replace("0", "1"))
    run = train.Run(parse(QUICK), tmp_path)  # the same run, killed after its start was scored
    run._start()
    run.close()
    assert [found["step"] for found in run.scores.rows()] == [0]


def test_a_folder_and_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    with places.alone(tmp_path, "first"), pytest.raises(DmfError, match="^second$"), places.alone(tmp_path, "second"):
        raise AssertionError
    assert not list(tmp_path.iterdir())  # a folder is its own lock
    monkeypatch.setattr(places.fcntl, "flock", unsupported)
    with places.alone(tmp_path, "first"), places.alone(tmp_path, "second"):
        pass
