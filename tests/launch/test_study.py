"""The study's table against sums by hand, and what it runs, skips and counts."""

import importlib.util
import json
import math
import re
import statistics
import sys

import pytest

from dmf.config import parse
from tests import ROOT


@pytest.fixture
def study():
    spec = importlib.util.spec_from_file_location("study", ROOT / "launch" / "tables" / "study.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["study"] = module  # dataclasses and annotations look there
    spec.loader.exec_module(module)
    return module


def scores(heldout, train=9.0):
    return {key: 0.5 for key in ("fd_pixels", "accuracy")} | {
        "fd_hidden": train,
        "fd_hidden_heldout": heldout,
    }


def record(*stages, two=0.1, train=9.0, failed="", seconds=10.0):
    """A run with these held-out scores: the flow model's, then one after each stage."""
    named = [
        {
            "stage": "init" if i == 0 else f"stage {i - 1}",
            "kind": "jvp",
            "step": i,
            **scores(s, 2 * s),
        }
        for i, s in enumerate(stages)
    ]
    last = {} if failed else {"1": scores(stages[-1], train), "2": scores(two)}
    return {"stages": named, "last": last, "failed": failed, "seconds": seconds, "interventions": 0}


RESULTS = {
    "digits": {
        "0": {
            "flow": {
                "stages": [],
                "last": {"1": scores(4.0), "32": scores(0.5)},
                "failed": "",
                "seconds": 1.0,
                "interventions": 0,
            },
            "dagger": record(4.0, 1.0, 0.5, train=0.2),
            "linear": record(4.0, 1.0, 0.7),
            "fine": record(4.0, 0.4, 9.0, seconds=20.0),  # diverged, finite
            "p1": record(4.0, 0.5, failed="error: step 3: loss = nan; expected finite values."),
        },
        "1": {
            "flow": {
                "stages": [],
                "last": {"1": scores(5.0), "32": scores(0.7)},
                "failed": "",
                "seconds": 1.0,
                "interventions": 0,
            },
            "dagger": record(5.0, 1.2, 0.6, train=0.4),
            "linear": record(5.0, 0.8, 0.6),
            "fine": record(5.0, 0.5, 0.55, seconds=30.0) | {"interventions": 3},
            "p1": record(5.0, 0.5, 0.61),  # worse than 1.2 x its best
        },
        "2": {"dagger": record(5.0, 0.9, 0.4, train=0.3)},
    }
}


def cells(text, name):
    row = re.search(rf"^\| `{name}` \|.*$", text, re.MULTILINE)[0]
    return [cell.strip() for cell in row.split("|")[1:-1]]


def test_means_deviations_and_paired_differences_are_those_by_hand(study):
    text = study.table(RESULTS)
    spreads = ["0.500 ± 0.100", "0.100 ± 0.000", "0.300 ± 0.100", "", "0.500 ± 0.100"]
    assert cells(text, "dagger")[2:] == [*spreads, "0 of 3", "0 of 3", "", "10"]
    linear = cells(
        text, "linear"
    )  # .7, .6 against .5, .6 of the same seeds; the third seed has no linear run
    assert (
        linear[2] == f"0.650 ± {math.sqrt(0.005):.3f}"
        and linear[5] == f"+0.100 ± {math.sqrt(0.02):.3f}"
    )
    assert (
        "| 1 | 4.500 ± 0.707 |" in text
        and "| 32 | 0.600 ± 0.141 |" in text
        and "| 2 | - | - |" in text
    )
    assert [m for m in re.findall(r"^\| `(\w+)`", text, re.MULTILINE)] == [
        "linear",
        "dagger",
        "p1",
        "fine",
    ]


def test_what_diverged_or_got_worse_is_counted(study):
    text = study.table(RESULTS)
    fine, p1 = cells(text, "fine"), cells(text, "p1")
    assert fine[7:] == ["1 of 2", "1 of 2", "3", "25"]
    assert p1[7:9] == ["1 of 2", "2 of 2"]  # a run that is not finite is both
    assert p1[2] == "0.610" and p1[5] == "+0.010"  # of the one that got to its end
    assert fine[6] == f"0.450 ± {statistics.stdev([0.4, 0.5]):.3f}"


def test_stored_runs_stay_unless_they_were_made_again(study):
    stored = {
        "digits": {"10": {"dagger": 1}, "2": {"dagger": 2, "linear": 3}},
        "photos": {"0": {"dagger": 4}},
    }
    found = {"digits": {"2": {"dagger": 5}, "1": {"dagger": 6}}}
    expected = {
        "digits": {"1": {"dagger": 6}, "2": {"dagger": 5, "linear": 3}, "10": {"dagger": 1}},
        "photos": {"0": {"dagger": 4}},
    }
    whole = study.merged(stored, found)
    assert whole == expected and [*whole["digits"]] == ["1", "2", "10"]


def test_photos_are_compared_by_the_training_crops(study):
    text = study.table(
        {"photos": {"0": RESULTS["digits"]["0"] | {"dagger": record(4.0, 1.0, 0.5, train=7.0)}}}
    )
    assert (
        cells(text, "linear")[5] == "+2.000"
        and cells(text, "linear")[6] == "1.400"
        and "minus dagger, train" in text
    )


def test_every_variant_is_a_config_and_no_two_are_the_same_run(study):
    spec = importlib.util.spec_from_file_location("digits", ROOT / "configs" / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    seen = set()
    for name, (fields, about) in study.VARIANTS.items():
        values = module.get_config()
        for field in fields.split():
            path, text = field.split("=", 1)
            with values.unlocked():
                *rooms, leaf = path.split(".")
                room = values
                for part in rooms:
                    room = room[part]
                assert leaf in room
                old = room[leaf]
                room[leaf] = text if isinstance(old, str) else type(old)(eval(text))
        parse(values)
        assert about and (name in study.FRESH, values.to_json()) not in seen
        seen.add((name in study.FRESH, values.to_json()))
    assert set(study.SETS["photos"]) <= set(study.VARIANTS)


def pretend(study, folder, monkeypatch, ends):
    """Runs the study with a stand-in for main.py.

    ends: variant -> what the stand-in prints to stderr, with status 2.
    """
    script = folder / "pretend.py"
    script.write_text(
        "import json, pathlib, sys\n"
        f"ends = {ends!r}\n"
        "flags = dict(a.removeprefix('--').split('=', 1) for a in sys.argv[1:])\n"
        "workdir = pathlib.Path(flags['workdir'])\n"
        "open(workdir.parents[2] / 'calls.txt', 'a').write(workdir.name + '\\n')\n"
        "step = int(float(flags['config.curriculum.length']))\n"
        "keys = ['fd_pixels', 'fd_pixels_heldout', 'accuracy', 'precision', 'recall', 'nn_ratio']\n"
        "keys += ['fd_hidden', 'fd_hidden_heldout']\n"
        "if workdir.name in ends:\n"
        "    print(ends[workdir.name], file=sys.stderr)\n"
        "    sys.exit(2)\n"
        "(workdir / 'checkpoints').mkdir()\n"
        "with (workdir / 'scores.jsonl').open('w') as file:\n"
        "    for n in eval(flags['config.run.score_steps']):\n"
        "        row = dict(step=step, stage='stage 0', kind='jvp', nfe=n)\n"
        "        row.update(dict.fromkeys(keys, 1.0))\n"
        "        file.write(json.dumps(row) + '\\n')\n"
    )
    monkeypatch.setattr(study, "MAIN", str(script))
    study.run(folder, ["digits"], [0, 1], ["linear", "dagger", "scratch"], 2, False)
    return sorted((folder / "calls.txt").read_text().split())


def test_finished_runs_are_skipped_and_those_that_end_on_values_are_results(
    study, tmp_path, monkeypatch
):
    ends = {
        "linear": "error: step 7 (stage 1, discrete): loss = nan; expected finite values. "
        "That state is not saved"
    }
    calls = pretend(study, tmp_path, monkeypatch, ends)
    assert calls == sorted(["flow", "linear", "dagger", "scratch"] * 2)
    results = study.collect(tmp_path)
    assert (
        results["digits"]["1"]["linear"]["failed"] == ends["linear"]
        and results["digits"]["0"]["dagger"]["last"]["2"]
    )
    assert json.loads(json.dumps(results)) == results
    assert pretend(study, tmp_path, monkeypatch, {}) == calls  # nothing again, failed runs neither
    path = tmp_path / "digits" / "seed1" / "dagger" / "scores.jsonl"
    path.write_text(
        path.read_text().splitlines(keepends=True)[0]
    )  # the second score is missing: stopped before its end
    assert pretend(study, tmp_path, monkeypatch, {}) == sorted([*calls, "dagger"])
    kept = {p.parent.name for p in tmp_path.glob("digits/*/*/checkpoints")}
    assert kept == {"flow"}  # the others' weights are gone


def test_another_failure_ends_the_study_and_is_no_result(study, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="ended with 2:\nerror: config.loss.q: no such field"):
        pretend(study, tmp_path, monkeypatch, {"dagger": "error: config.loss.q: no such field"})
    assert "dagger" not in study.collect(tmp_path)["digits"]["0"]


def test_a_run_of_other_flags_is_not_taken_for_this_one(study, tmp_path, monkeypatch):
    pretend(study, tmp_path, monkeypatch, {})
    monkeypatch.setitem(study.VARIANTS, "linear", ("curriculum.interval=floor", ""))
    with pytest.raises(
        SystemExit, match="holds a run of other flags, --config.curriculum.interval=floor"
    ):
        study.collect(tmp_path)


def test_the_table_goes_between_the_marks_of_the_page(study):
    page = (ROOT / "docs" / "study.md").read_text()
    once = study.paste(page, "| a |")
    assert once.count("| a |") == 1 and study.paste(once, "| a |") == once
    before, after = page.split("<!-- table -->\n")[0], page.split("<!-- end of table -->")[1]
    assert once.startswith(before) and once.endswith(after)
    with pytest.raises(SystemExit, match="expected the lines"):
        study.paste("no marks", "")


def test_the_plot_is_drawn_with_runs_that_did_not_reach_their_end(study, tmp_path):
    study.plot(RESULTS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
