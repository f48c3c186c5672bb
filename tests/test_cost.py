"""Compiled work of a step against the forward passes the mathematics needs; times are for the benchmark command."""

import json

import pytest

from dmf import benchmark
from dmf.config import parse
from tests.tiny import TINY, merged


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "out.json"
    values = merged(TINY, network=dict(depth=2, width=64), batch_size=64)
    found = benchmark.benchmark(parse(values), str(out), rounds=1)
    assert json.loads(out.read_text())["programs"] == found
    return {(r["kind"], r["r_neq_t"]): r for r in found}


@pytest.mark.parametrize(("kind", "fraction"), [("discrete", 0.25), ("discrete", 0.75), ("jvp", 0.25), ("jvp", 0.75)])
def test_only_rows_that_need_it_pay_for_the_second_evaluation(rows, kind, fraction):
    row = rows[kind, fraction]
    assert row["limit"] == 1 + fraction / 3
    # Attention and normalisation backwards cost a little less than two forwards, a JVP a little more than one.
    assert row["flops_ratio"] == pytest.approx(row["limit"], rel=0.05)
    if kind == "discrete":
        assert row["bytes_ratio"] < 1.05 * row["limit"]


def test_the_table_has_every_case_and_a_time_for_each(rows, capsys):
    assert set(rows) == set(benchmark.CASES)
    assert all(r["step_ms"] > 0 and r["compile_s"] > 0 for r in rows.values())
    assert rows["flow", 0.0]["ratio"] == rows["flow", 0.0]["flops_ratio"] == 1
