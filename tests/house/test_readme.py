"""Every stored number on a page equals its JSON file, written as its command writes it."""

import importlib.util
import json
import re

import jax
import numpy as np

from dmf import networks, pretrained
from dmf.config import parse
from dmf.measure import benchmark
from dmf.storage import checkpoint
from tests import ROOT
from tests.tiny import TINY


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text()


def stored(name):
    return json.loads((ROOT / "docs" / f"{name}.json").read_text())


def digits_table():
    spec = importlib.util.spec_from_file_location(
        "digits_table", ROOT / "launch" / "tables" / "digits_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_digits_table_is_the_stored_one():
    found, text = stored("digits_table"), page("results")
    assert len(found["seeds"]) >= 3 and found["command"] in text
    assert f"{found['samples_per_score']} samples" in text
    table = digits_table().table(found["seeds"])
    assert len(table.splitlines()) == 2 + 4 * 4 and table in text


def test_the_result_of_the_readme_is_a_part_of_that_table():
    found, text = stored("digits_table"), (ROOT / "README.md").read_text()
    assert f"{found['samples_per_score']} samples each" in text and "three seeds" in text
    rows = re.findall(r"^\| (.*?) \| (\d+) \| (.*?) \|", digits_table().table(found["seeds"]), re.M)
    hidden = {(model, steps): value for model, steps, value in rows}
    here = {"flow model": "flow model", "after the curriculum": "discrete MeanFlow, dagger"}
    for name, model in here.items():
        values = [hidden[model, steps] for steps in ("1", "2", "4", "32")]
        assert f"| {name} | {' | '.join(values)} |" in text


def test_the_python_of_the_readme_samples_a_work_directory(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    config, shape = parse(TINY).network, (8, 8, 1)
    network = networks.build(config, shape)
    leaves, tree = jax.tree.flatten(network.init(jax.random.key(1)))
    moved = [x + 0.02 for x in leaves]  # away from the zeros that a network starts with
    params = jax.tree.unflatten(tree, moved)
    stored = pretrained.metadata(config, shape, {"kind": "dmf"})
    (tmp_path / "runs").mkdir()
    checkpoint.save_weights(tmp_path / "runs" / "digits", params, stored, {})
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    zeros = np.zeros(10, np.float32)
    u = network.apply(params, names["e"], zeros, zeros + 1, label=np.arange(10))
    assert np.abs(u).max() > 1e-3
    np.testing.assert_allclose(names["x"], names["e"] - u, atol=1e-5)


def test_the_demo_meets_its_promise_for_every_seed():
    # After the curriculum one step is at least 5 times nearer than the flow model's one step.
    # It is at most 3 times as far as the flow model's 32 steps.
    for seed in stored("digits_table")["seeds"].values():
        one = seed["dagger"]["1"]["fd_hidden"]
        assert one < seed["flow"]["1"]["fd_hidden"] / 5
        assert one < 3 * seed["flow"]["32"]["fd_hidden"]


def test_the_comparison_with_torch_fidelity_is_the_stored_one_and_within_its_bounds():
    found, words = stored("against_torch_fidelity"), " ".join(page("scores").split())
    for name in ("fid", "is"):
        difference = found[name]["relative_difference"]
        assert f"{difference:.1e}" in words and difference <= 1e-3
    ratio = found["images_per_second"]["median_ratio"]
    assert f"{ratio:.2f} times as many images" in words and ratio >= 1
    assert f"({found['count']:,} PNG files against {found['reference_count']:,}" in words
    assert found["count"] == 5000


def test_the_benchmark_table_is_the_stored_one_and_within_its_bounds():
    found, text = stored("benchmark_digits_cpu"), page("performance")
    rows = found["programs"]
    assert benchmark.format_rows(rows) in text
    assert f"median of {found['rounds']} rounds" in " ".join(text.split())
    ratio = {(r["kind"], r["r_neq_t"]): r["ratio"] for r in rows}
    assert ratio["discrete", 0.25] <= 1.15 and ratio["discrete", 0.75] <= 1.35


def test_the_table_of_a_larger_network_is_the_stored_one_and_within_its_bounds():
    found = stored("benchmark_dit_cpu")["programs"]
    rows = {(r["kind"], r["r_neq_t"]): r for r in found}
    assert benchmark.format_rows(found) in page("performance")
    assert max(rows["discrete", share]["over_limit"] for share in (0.25, 0.75)) <= 1.10
    assert rows["jvp", 0.25]["flops_ratio"] <= 1.15
    assert min(rows[kind, 0.25]["jvp_over"] for kind in ("discrete", "jvp")) >= 1.15
    temporary = max(rows["discrete", share]["temporary_mb"] for share in (0.25, 0.75))
    assert temporary <= 1.02 * rows["flow", 0.0]["temporary_mb"]


def test_the_planning_table_is_the_stored_one():
    rows, text = stored("tpu_plan")["rows"], page("scaling")
    for row in rows:
        mesh = "FSDP" if row["mesh"][1] > 1 else "data parallel"
        kind = row["kind"].replace("trajectory", "all_pairs")  # its name when the file was made
        total, usable = (f"{row[key] / 2**30:.1f}" for key in ("total_bytes", "hbm_bytes"))
        fits, tflop = "yes" if row["fits"] else "no", f"{row['model_flops'] / 1e12:.1f}"
        line = rf"\| {row['topology']} \| {mesh} \| {kind} \| {re.escape(tflop)} \|"
        rest = rf".* \| {re.escape(total)} of {re.escape(usable)} \| {fits} \|"
        assert re.search(line + rest, text), row
    assert text.count("| data parallel |") + text.count("| FSDP |") == len(rows)


def test_the_comparison_with_pytorch_is_the_stored_one():
    found, text = stored("against_pytorch"), page("performance")
    for dit, unet in zip(found["dit"]["steps"], found["unet"]["steps"], strict=True):
        kind, share = dit["kind"], dit["r_neq_t"]
        assert (kind, share) == (unet["kind"], unet["r_neq_t"])
        assert f"| {kind} | {share:.2f} | {dit['ratio']:.2f} | {unet['ratio']:.2f} |" in text
    assert max(max(found[name]["differences"].values()) for name in ("dit", "unet")) < 1e-5


def test_the_start_times_are_the_stored_ones():
    found, text = stored("start_times"), page("performance")
    assert f"`{found['command']}`" in text
    for end, key in (("begun", "begun"), ("ended", "done")):
        first, later = (found[f"{which}_{key}_s"] for which in ("first", "later"))
        ratio = found[f"ratio_{key}"]
        assert f"| {end} | {first:.1f} s | {later:.1f} s | {ratio:.1f} x |" in text


def test_the_edits_are_the_stored_ones():
    found, words = stored("edits"), " ".join(page("runs").split())
    same = sum(n for name, n in found["outcomes"].items() if name.startswith("same bits"))
    line = found["outcomes"]["one line"]
    assert found["bad"] == [] and same + line == found["count"]
    assert f"Of {found['count']} edits {same} ended in the same bits and {line} in one" in words


def test_the_kills_are_the_stored_ones():
    found, words = stored("kills"), " ".join(page("runs").split())
    assert f"`{found['command']}`" in words and found["different"] == []
    inside = found["phases"]["save"]
    assert f"There were {found['kills']} kills, {inside} of them inside saves." in words
