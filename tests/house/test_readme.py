"""Every number in the README's tables is the one of a stored file, written the way its command writes it."""

import importlib.util
import json

from dmf.measure import benchmark
from tests import ROOT

README = (ROOT / "README.md").read_text()


def digits_table():
    spec = importlib.util.spec_from_file_location(
        "digits_table", ROOT / "launch" / "tables" / "digits_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_digits_table_is_the_stored_one():
    stored = json.loads((ROOT / "docs" / "digits_table.json").read_text())
    assert (
        len(stored["seeds"]) >= 3
        and stored["command"] in README
        and f"{stored['samples_per_score']} samples" in README
    )
    text = digits_table().table(stored["seeds"])
    assert len(text.splitlines()) == 2 + 4 * 4 and text in README


def test_the_demo_meets_its_promise_for_every_seed():
    # One step after the curriculum: at least 5 times nearer than the flow model's one step, at most 3 times its 32 steps.
    for seed in json.loads((ROOT / "docs" / "digits_table.json").read_text())["seeds"].values():
        one = seed["dagger"]["1"]["fd_hidden"]
        assert (
            one < seed["flow"]["1"]["fd_hidden"] / 5 and one < 3 * seed["flow"]["32"]["fd_hidden"]
        )


def test_the_comparison_with_torch_fidelity_is_the_stored_one_and_within_its_bounds():
    stored = json.loads((ROOT / "docs" / "against_torch_fidelity.json").read_text())
    words = " ".join(README.split())
    for name in ("fid", "is"):
        assert (
            f"{stored[name]['relative_difference']:.1e}" in words
            and stored[name]["relative_difference"] <= 1e-3
        )
    assert f"{stored['images_per_second']['median_ratio']:.2f} times as many images" in words
    assert f"({stored['count']:,} PNG files against {stored['reference_count']:,}" in words
    assert stored["images_per_second"]["median_ratio"] >= 1 and stored["count"] == 5000


def test_the_benchmark_table_is_the_stored_one_and_within_its_bounds():
    stored = json.loads((ROOT / "docs" / "benchmark_digits_cpu.json").read_text())
    rows = stored["programs"]
    assert (
        benchmark.format_rows(rows) in README and f"median of {stored['rounds']} rounds" in README
    )
    ratio = {(r["kind"], r["r_neq_t"]): r["ratio"] for r in rows}
    assert ratio["discrete", 0.25] <= 1.15 and ratio["discrete", 0.75] <= 1.35


def test_the_table_of_a_larger_network_is_the_stored_one_and_within_its_bounds():
    stored = json.loads((ROOT / "docs" / "benchmark_dit_cpu.json").read_text())
    rows = {(r["kind"], r["r_neq_t"]): r for r in stored["programs"]}
    assert benchmark.format_rows(stored["programs"]) in README
    assert max(rows["discrete", share]["over_limit"] for share in (0.25, 0.75)) <= 1.10
    assert rows["jvp", 0.25]["flops_ratio"] <= 1.15
    assert min(rows[kind, 0.25]["jvp_over"] for kind in ("discrete", "jvp")) >= 1.15
    assert (
        max(rows["discrete", share]["temporary_mb"] for share in (0.25, 0.75))
        <= 1.02 * rows["flow", 0.0]["temporary_mb"]
    )


def test_the_planning_table_is_the_stored_one():
    rows = json.loads((ROOT / "docs" / "tpu_plan.json").read_text())["rows"]
    for row in rows:
        mesh = "FSDP" if row["mesh"][1] > 1 else "data parallel"
        total, usable = (f"{row[key] / 2**30:.1f}" for key in ("total_bytes", "hbm_bytes"))
        fits, tflop = "yes" if row["fits"] else "no", f"{row['model_flops'] / 1e12:.1f}"
        assert f"| {row['topology']} | {mesh} | {row['kind']} | {tflop} |" in README
        assert f"| {total} of {usable} | {fits} |" in README
    assert README.count("| data parallel |") + README.count("| FSDP |") == len(rows)


def test_the_comparison_with_pytorch_is_the_stored_one():
    stored = json.loads((ROOT / "docs" / "against_pytorch.json").read_text())
    for dit, unet in zip(stored["dit"]["steps"], stored["unet"]["steps"], strict=True):
        assert (dit["kind"], dit["r_neq_t"]) == (unet["kind"], unet["r_neq_t"])
        assert (
            f"| {dit['kind']} | {dit['r_neq_t']:.2f} | {dit['ratio']:.2f} | {unet['ratio']:.2f} |"
            in README
        )
    assert max(max(stored[name]["differences"].values()) for name in ("dit", "unet")) < 1e-5
