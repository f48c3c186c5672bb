"""The compiled work of a step, and the forward passes it needs. The benchmark measures times."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import sharding, step
from dmf.config import parse
from dmf.errors import DmfError
from dmf.measure import benchmark, cost, programs, roofline, tpu_plan
from dmf.measure.cost import Compilations, Counts
from tests.tiny import TINY, UNET, Setup, merged


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The file that a benchmark of a tiny DiT writes; its rows are those that it returns."""
    out = tmp_path_factory.mktemp("benchmark") / "out.json"
    values = merged(TINY, network=dict(depth=1, width=128), batch_size=64)
    found = benchmark.benchmark(parse(values), str(out), rounds=2)
    read = json.loads(out.read_text())
    assert read["programs"] == found
    return read


@pytest.fixture(scope="module")
def rows(stored):
    return {(r["kind"], r["r_neq_t"]): r for r in stored["programs"]}


@pytest.mark.parametrize(
    ("kind", "fraction"), [("discrete", 0.25), ("discrete", 0.75), ("jvp", 0.25), ("jvp", 0.75)]
)
def test_only_rows_that_need_it_pay_for_the_second_evaluation(rows, kind, fraction):
    row = rows[kind, fraction]
    assert row["limit"] == 1 + fraction / 3
    # Backwards, attention and normalisation cost a little less than two forward passes.
    # A JVP costs a little more than one.
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
        lowered = setup.step(kind).lower(
            jax.eval_shape(setup.state), setup.batch(0), setup.scalars(0, kind), *setup.taught()
        )
        # The counts do not need LLVM's part, which takes most of the time.
        quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        found.append(cost.counts(lowered.compile(compiler_options=quick)))
    return found


def test_the_finite_difference_takes_no_more_memory_than_flow_matching():
    """Flow matching freezes the interval branch. In so small a network this saves about 2 %."""
    values = merged(TINY, network=dict(depth=4, width=64), batch_size=64)
    cases = (("flow", 0.75), ("all_pairs", 0.75), ("discrete", 0.75))
    flow, all_pairs, discrete = (
        found.temporary_bytes for found in counts_on_one_device(values, cases)
    )
    assert discrete <= 1.02 * flow and discrete <= 1.001 * all_pairs


def test_nor_does_it_in_a_unet_with_dropout():
    values = merged(UNET, network=dict(channels=32), batch_size=32)
    flow, discrete = counts_on_one_device(values, (("flow", 0.75), ("discrete", 0.75)))
    assert discrete.temporary_bytes <= 1.02 * flow.temporary_bytes
    assert discrete.flops == pytest.approx(1.25 * flow.flops, rel=0.02)


def test_a_split_costs_the_passes_that_are_counted():
    values = merged(TINY, network=dict(depth=2, width=128), batch_size=64)
    values = merged(values, curriculum=dict(stages=2, kinds=("all_pairs", "split")))
    flow, split = counts_on_one_device(values, (("all_pairs", 0.25), ("split", 0.25)))
    assert split.flops / flow.flops == pytest.approx((3 + 2 * 0.25) / 3, rel=0.03)


def test_a_second_network_costs_the_passes_that_are_counted():
    """By XLA's counts before it compiles: of matrices they are the same."""
    values = merged(TINY, network=dict(depth=2, width=128), batch_size=64, loss=dict(tangent="own"))
    rules = dict(stages=2, kinds=("all_pairs", "rectify"))
    setup = Setup(merged(values, curriculum=rules, times=dict(r_neq_t_fraction=0.25)))
    like, batch, scalars = jax.eval_shape(setup.state), setup.batch(0), setup.scalars(0, "rectify")
    flow, both = (
        setup.step(kind).lower(like, batch, scalars).cost_analysis()["flops"]
        for kind in ("all_pairs", "rectify")
    )
    assert both / flow == pytest.approx((3 + 11 * 0.25) / 3, rel=0.03)


def test_a_teacher_costs_one_pass_of_the_rows_that_use_it():
    values = merged(TINY, network=dict(depth=2, width=128), batch_size=64)
    (flow,) = counts_on_one_device(values, (("all_pairs", 0.25),))
    for loss, passes in (
        (dict(velocity="teacher", tangent="teacher"), 3 + 0.25 + 1),
        (dict(tangent="teacher"), 3 + 0.25 + 0.25),
    ):
        taught = merged(values, loss=loss)
        (found,) = counts_on_one_device(taught, (("discrete", 0.25),))
        assert found.flops / flow.flops == pytest.approx(passes / 3, rel=0.03), loss


def test_rounds_with_other_numbers_compile_nothing(rows):
    assert [row["programs"] for row in rows.values()] == [1] * len(rows)


def test_compilations_are_counted_one_by_one():
    double = jax.jit(lambda x: 2 * x)
    with Compilations() as seen:
        double.lower(jnp.ones(3)).compile()
        before = seen.count
        double(jnp.ones(3))
        assert seen.count == before  # the same program
        double(jnp.ones(4, jnp.int32))
        assert seen.count > before
        before = seen.count
    double(jnp.ones((5, 5)))
    assert seen.count == before


def test_model_flops_are_those_of_the_matrices(stored):
    """FLOPs of a DiT, by hand.

    There are 2 per weight of a block and token, and 4 per pair of tokens and channel.
    """
    config = parse(merged(TINY, network=dict(depth=8, width=256, heads=4, patch=1), batch_size=2))
    tokens, width = 64, 256
    block = tokens * (2 * 12 * width**2 + 4 * tokens * width) + 2 * 6 * width**2
    assert cost.forward_flops(config, (8, 8, 1)) == pytest.approx(2 * 8 * block, rel=0.03)
    # The step's own FLOPs of the tiny network, Adam and EMAs included, per device of the mesh.
    flow, devices = stored["programs"][0], stored["mesh"]["replica"]
    assert flow["model_gflops"] == pytest.approx(3 * stored["forward_gflops"])
    assert flow["model_gflops"] == pytest.approx(flow["gflops"] * devices, rel=0.35)


def test_the_table_has_every_case_and_a_time_for_each(stored, rows):
    assert set(rows) == set(benchmark.CASES)
    assert all(r["step_ms"] > 0 and r["compile_s"] > 0 for r in rows.values())
    assert (
        rows["flow", 0.0]["ratio"]
        == rows["flow", 0.0]["flops_ratio"]
        == rows["jvp", 1.0]["jvp_over"]
        == 1
    )
    text = benchmark.format_rows(stored["programs"])
    assert len({len(line) for line in text.splitlines()}) == 1 and len(text.splitlines()[0]) <= 160
    assert "MFU" not in text  # a CPU has no known peak
    per_ms = {key: row["step_ms"] for key, row in rows.items()}
    # 4 steps of flow, then 2 + 4 + 2 of the curriculum with its 75 %
    expected = 6 * per_ms["flow", 0.0] + 4 * per_ms["discrete", 0.75] + 2 * per_ms["jvp", 0.75]
    assert stored["total"]["steps"] == 12
    assert stored["total"]["hours"] == pytest.approx(expected / 3.6e6)
    assert stored["total"]["flow_hours"] == pytest.approx(12 * per_ms["flow", 0.0] / 3.6e6)


def test_utilisation_is_the_models_flops_by_time_devices_and_peak(monkeypatch):
    monkeypatch.setattr(roofline, "CHIPS", {"cpu": roofline.Chip({"bfloat16": 1e12}, 1, 1, "")})
    nothing = Counts(None, None, None, None)
    programs = [benchmark.Program("flow", 0.0, 3.0, None, 1.0, nothing, 1, seconds=[4.0, 2.0, 3.0])]
    programs.append(
        benchmark.Program("jvp", 1.0, 4.0, None, 1.0, nothing, 1, seconds=[8.0, 8.0, 8.0])
    )
    programs.append(benchmark.Program("discrete", 0.75, 3.75, None, 1.0, nothing, 1))
    rows = benchmark._rows(programs, 64, 2e12, sharding.make_mesh())
    # 3 passes of 2 TFLOP in 3 s on 8 devices of 1 TFLOP/s, and 4 of them in 8 s.
    assert [row["utilisation"] for row in rows] == [pytest.approx(0.25), pytest.approx(0.125), None]
    assert "25.0%" in benchmark.format_rows(rows) and [row["model_gflops"] for row in rows] == [
        6000,
        8000,
        7500,
    ]


class StandIn:
    """Replaces a jitted step: compiles at once, and returns its state.

    Given an error, it raises it when it is compiled or run.
    """

    def __init__(self, error="", when="compile"):
        self.error, self.when = error, when

    def _raise(self, when):
        if self.error and when == self.when:
            raise jax.errors.JaxRuntimeError(self.error)

    def lower(self, *_):
        return self

    def compile(self):
        self._raise("compile")
        return jax.jit(lambda x: 2 * x).lower(jnp.ones(3)).compile()

    def __call__(self, now, batch, scalars):
        if self.when == "run after donation" and self.error:
            jax.tree.map(lambda x: x.delete(), now)
            raise jax.errors.JaxRuntimeError(self.error)
        self._raise("run")
        return jax.tree.map(jnp.copy, now), {}


def benchmark_with(monkeypatch, failing, error, when):
    def make(kind, network, optimizer, config, mesh, place):
        return StandIn(error if (kind, config.times.r_neq_t_fraction) == failing else "", when)

    monkeypatch.setattr(step, "make_train_step", make)
    found = benchmark.benchmark(parse(TINY), rounds=2)
    return {(row["kind"], row["r_neq_t"]): row for row in found}


@pytest.mark.parametrize("when", ["compile", "run", "run after donation"])
def test_a_case_without_room_is_a_row_of_dashes_and_the_others_survive(monkeypatch, capsys, when):
    rows = benchmark_with(
        monkeypatch, ("jvp", 0.75), "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes", when
    )
    assert set(rows) == set(benchmark.CASES)
    assert {key for key, row in rows.items() if row["step_ms"] is None} == {("jvp", 0.75)}
    (line,) = [
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.split()[:2] == ["jvp", "0.75"]
    ]
    # The limit needs no program. XLA's counts are known where the program was compiled.
    assert line[2:5] == ["-"] * 3 and line[5] == "1.250" and line[6:8] == ["-"] * 2
    assert (set(line[6:]) == {"-"}) == (when == "compile")


def test_flow_matching_without_room_and_any_other_error_are_not_passed_over(monkeypatch):
    with pytest.raises(
        DmfError,
        match="config.batch_size: flow matching needs more memory .*9 bytes.*expected fewer rows",
    ):
        benchmark_with(
            monkeypatch,
            ("flow", 0.0),
            "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes",
            "run",
        )
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        benchmark_with(monkeypatch, ("jvp", 0.75), "INTERNAL: something else", "compile")


@pytest.mark.parametrize(
    ("batch_size", "microbatches", "would_do"), [(36, 1, 32), (48, 1, 32), (4, 1, 32), (96, 2, 64)]
)
def test_a_batch_of_which_a_quarter_is_no_whole_number_of_rows_is_refused_with_one_that_would_do(
    monkeypatch, batch_size, microbatches, would_do
):
    monkeypatch.setattr(benchmark, "compile_cases", None)  # not reached
    sizes = dict(batch_size=batch_size, microbatches=microbatches, times=dict(r_neq_t_fraction=0.5))
    said = (
        rf"config.batch_size = {batch_size}: the case \w+ with .*8 devices.*"
        rf"expected a multiple of \d+, such as {would_do}$"
    )
    with pytest.raises(DmfError, match=said):
        benchmark.benchmark(parse(merged(TINY, **sizes)))


def test_batches_of_latents_have_std_in_benchmark_and_plan(monkeypatch):
    config = parse(merged(TINY, data=dict(name="imagenet256_latents", mock=True)))
    shapes = cost.batch_shapes(config, (32, 32, 4))
    assert shapes["std"] == shapes["x"] and shapes["x"].shape == (32, 32, 32, 4)
    made = programs.random_batch(config, (32, 32, 4), 10)
    assert {key: (x.shape, x.dtype) for key, x in made.items()} == {
        key: (s.shape, s.dtype) for key, s in shapes.items()
    }
    assert np.all(made["std"] >= 0) and set(cost.batch_shapes(parse(TINY), (8, 8, 1))) == {
        "x",
        "label",
    }
    monkeypatch.setattr(step, "make_train_step", lambda *_: StandIn())
    seen = []
    monkeypatch.setattr(StandIn, "lower", lambda self, now, batch, scalars: seen.append(batch))
    tpu_plan.lower(config, sharding.make_mesh(), "flow", (32, 32, 4))
    assert seen == [shapes]


def test_the_note_names_the_kinds_whose_attention_the_counts_leave_out():
    kernels = dict(plain="cudnn", difference="chunked", derivative="chunked")
    about = {"attention": kernels, "microbatches": 1, "scan_blocks": False}
    kinds = ["flow", "discrete", "discrete", "guided_jvp"]
    loops, fused = benchmark._uncounted(about, kinds)
    assert loops.endswith("once: they are of one chunk of attention's keys (discrete, guided_jvp)")
    assert fused.endswith("as 0 (flow: cudnn)")
    assert benchmark._uncounted(about | {"attention": dict.fromkeys(kernels, "xla")}, kinds) == []
    both = about | {
        "attention": dict.fromkeys(kernels, "flash"),
        "microbatches": 4,
        "scan_blocks": True,
    }
    loops, fused = benchmark._uncounted(both, kinds)
    assert (
        loops.endswith("they are of one of 4 microbatches, one block")
        and "discrete: flash" in fused
    )
