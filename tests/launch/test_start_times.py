"""The command that times starts: sums by hand, the starts and their caches, a run that fails."""

import importlib.util
from pathlib import Path

import pytest

from tests import ROOT

LAUNCH = ROOT / "launch" / "tables"
# Stands in for main.py. It "compiles for 40 s" if the folder of programs is empty, and does not
# end by itself.
PRETENDED = """
import os, pathlib, sys, time

programs = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
known = any(programs.iterdir())
(programs / "step").write_text("")
workdir = next(a for a in sys.argv if a.startswith("--workdir=")).removeprefix("--workdir=")
with open(os.environ["CALLS"], "a") as calls:
    calls.write(f"{workdir}\\n")
if "--bad" in sys.argv:
    sys.exit("error: bad: expected good")
begun = 10.0 if known else 40.0
print(f"first step begun after {begun} s, compilation included; it took 2.5 s", flush=True)
time.sleep(600)
"""


@pytest.fixture
def timing(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("start_times", LAUNCH / "start_times.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "main.py").write_text(PRETENDED)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.txt"))
    return module


def test_later_starts_have_the_programs_of_a_first_one_and_a_directory_of_their_own(
    timing, tmp_path
):
    found = timing.measure(["--config=x"], 2, 3)
    assert found == {"first": [(40.0, 42.5)] * 2, "later": [(10.0, 12.5)] * 3}
    workdirs = (tmp_path / "calls.txt").read_text().split()
    assert len(set(workdirs)) == 5 and not any(Path(w).parent.exists() for w in workdirs)


def test_the_ratios_are_those_of_the_medians(timing):
    found = {
        "first": [(60.0, 66.0), (50.0, 54.0)],
        "later": [(20.0, 25.0), (10.0, 15.0), (11.0, 20.0)],
    }
    medians = {
        "first_begun_s": 55.0,
        "first_done_s": 60.0,
        "later_begun_s": 11.0,
        "later_done_s": 20.0,
    }
    assert timing.summary(found) == medians | {"ratio_begun": 5.0, "ratio_done": 3.0}


def test_a_run_that_fails_is_shown(timing):
    with pytest.raises(SystemExit, match="before its first step:\nerror: bad: expected good"):
        timing.measure(["--bad"], 1, 1)
