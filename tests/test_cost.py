"""Compiled work of a step against the forward passes the mathematics needs; times are for the benchmark command."""

import json

import jax
import jax.numpy as jnp
import pytest

from dmf import benchmark, cost
from dmf.config import parse
from dmf.cost import Compilations
from tests.tiny import TINY, UNET, Setup, merged


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The file of a benchmark of a tiny DiT, whose rows are what it returns."""
    out = tmp_path_factory.mktemp("benchmark") / "out.json"
    values = merged(TINY, network=dict(depth=1, width=128), batch_size=64)
    found = benchmark.benchmark(parse(values), str(out), rounds=2)
    read = json.loads(out.read_text())
    assert read["programs"] == found
    return read


@pytest.fixture(scope="module")
def rows(stored):
    return {(r["kind"], r["r_neq_t"]): r for r in stored["programs"]}


@pytest.mark.parametrize(("kind", "fraction"), [("discrete", 0.25), ("discrete", 0.75), ("jvp", 0.25), ("jvp", 0.75)])
def test_only_rows_that_need_it_pay_for_the_second_evaluation(rows, kind, fraction):
    row = rows[kind, fraction]
    assert row["limit"] == 1 + fraction / 3
    # Attention and normalisation backwards cost a little less than two forwards, a JVP a little more than one.
    assert row["flops_ratio"] == pytest.approx(row["limit"], rel=0.05)
    if kind == "discrete":
        assert row["bytes_ratio"] < 1.05 * row["limit"]


def test_the_jvp_of_a_quarter_of_the_rows_is_cheap_and_that_of_the_whole_batch_is_not(rows):
    quarter, whole = rows["jvp", 0.25]["flops_ratio"], rows["jvp", 1.0]["flops_ratio"]
    assert quarter <= 1.15 and whole >= 1.15 * quarter


def counts_on_one_device(values, cases):
    found = []
    for kind, fraction in cases:
        setup = Setup(merged(values, times=dict(r_neq_t_fraction=fraction)))
        lowered = setup.step(kind).lower(jax.eval_shape(setup.state), setup.batch(0), setup.scalars(0, kind))
        # LLVM's part, which the counts do not see, takes most of the time.
        quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        found.append(cost.counts(lowered.compile(compiler_options=quick)))
    return found


def test_the_finite_difference_takes_no_more_memory_than_flow_matching():
    """In a network as small as this, what flow matching saves by freezing the interval branch is near 2 %."""
    values = merged(TINY, network=dict(depth=2, width=64), batch_size=64)
    cases = (("flow", 0.25), ("trajectory", 0.25), ("discrete", 0.25), ("discrete", 0.75))
    flow, trajectory, *discrete = (found.temporary_bytes for found in counts_on_one_device(values, cases))
    assert max(discrete) <= 1.02 * flow and max(discrete) <= 1.001 * trajectory


def test_nor_does_it_in_a_unet_with_dropout():
    values = merged(UNET, network=dict(channels=32), batch_size=32)
    flow, discrete = counts_on_one_device(values, (("flow", 0.75), ("discrete", 0.75)))
    assert discrete.temporary_bytes <= 1.02 * flow.temporary_bytes
    assert discrete.flops == pytest.approx(1.25 * flow.flops, rel=0.02)


def test_rounds_with_other_numbers_compile_nothing(rows):
    assert [row["programs"] for row in rows.values()] == [1] * len(rows)


def test_compilations_are_counted_one_by_one():
    double = jax.jit(lambda x: 2 * x)
    with Compilations() as seen:
        double.lower(jnp.ones(3)).compile()
        before = seen.count
        double(jnp.ones(3))
        assert seen.count == before  # the program at hand
        double(jnp.ones(4, jnp.int32))
        assert seen.count > before
        before = seen.count
    double(jnp.ones((5, 5)))
    assert seen.count == before


def test_model_flops_are_those_of_the_matrices(stored):
    """Of a DiT by hand: 2 per weight of a block and token, 4 per pair of tokens and channel; the rest is small."""
    config = parse(merged(TINY, network=dict(depth=8, width=256, heads=4, patch=1), batch_size=2))
    tokens, width = 64, 256
    block = tokens * (2 * 12 * width**2 + 4 * tokens * width) + 2 * 6 * width**2
    assert cost.forward_flops(config, (8, 8, 1)) == pytest.approx(2 * 8 * block, rel=0.03)
    # The step's own FLOPs of the tiny network, Adam and EMAs included, per device of the mesh.
    flow, devices = stored["programs"][0], stored["mesh"]["replica"]
    assert flow["model_gflops"] == pytest.approx(3 * stored["forward_gflops"])
    assert flow["model_gflops"] == pytest.approx(flow["gflops"] * devices, rel=0.35)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12)]
    + [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("cpu", None)],
)
def test_peaks_by_device(kind, peak):
    assert cost.peak_flops(kind) == peak


def test_the_table_has_every_case_and_a_time_for_each(stored, rows):
    assert set(rows) == set(benchmark.CASES)
    assert all(r["step_ms"] > 0 and r["compile_s"] > 0 for r in rows.values())
    assert rows["flow", 0.0]["ratio"] == rows["flow", 0.0]["flops_ratio"] == rows["jvp", 1.0]["jvp_over"] == 1
    text = benchmark.format_rows(stored["programs"])
    assert len({len(line) for line in text.splitlines()}) == 1 and len(text.splitlines()[0]) <= 160
    assert "MFU" not in text  # no peak is known of a CPU
    per_ms = {key: row["step_ms"] for key, row in rows.items()}
    # 4 steps of flow, 2 + 4 + 2 of the curriculum at its own 75 %
    expected = 6 * per_ms["flow", 0.0] + 4 * per_ms["discrete", 0.75] + 2 * per_ms["jvp", 0.75]
    assert stored["total"]["steps"] == 12
    assert stored["total"]["hours"] == pytest.approx(expected / 3.6e6)
    assert stored["total"]["flow_hours"] == pytest.approx(12 * per_ms["flow", 0.0] / 3.6e6)
