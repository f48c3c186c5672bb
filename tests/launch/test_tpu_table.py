"""The table of steps on TPUs is the stored one, and every case of it is a valid config."""

import importlib.util
import sys

import pytest

from dmf.config import check
from dmf.measure import tpu_plan
from tests import ROOT


@pytest.fixture(scope="module")
def script():
    path = ROOT / "launch" / "tables" / "tpu_table.py"
    spec = importlib.util.spec_from_file_location("tpu_table", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tpu_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tpu_table"]


def test_the_table_of_the_docs_is_the_stored_one(script):
    rows = tpu_plan.read(str(ROOT / "docs" / "tpu_table.json"))
    text = (ROOT / "docs" / "performance.md").read_text()
    assert script.table(rows) in text and len(rows) >= 5
    assert script.table(script.of_all_blocks(rows)) in text


def test_two_depths_continue_in_a_straight_line_to_all_blocks(script):
    def row(depth, n):
        moved = {"all-reduce": {"count": 1, "bytes": 3.0 * n}}
        kept = dict(topology="v5e-8", mesh=[8, 1], effort=-1.0, fits=True, collectives=moved)
        found = kept | dict(config=f"dit_b4_256 depth {depth}", kind="jvp", rows="split")
        return found | dict(
            flops=n, bytes_accessed=2 * n, temporary_bytes=n, compiler_seconds=0.5 * n
        )

    (found,) = script.of_all_blocks([row(1, 10.0), row(3, 14.0), row(1, 9.0) | {"kind": "flow"}])
    whole = 10.0 + 11 * 2.0  # two more per block, and 12 blocks
    assert (found["config"], found["flops"]) == ("dit_b4_256, 12 blocks", whole)
    assert (found["bytes_accessed"], found["compiler_seconds"]) == (2 * whole, 0.5 * whole)
    assert found["collectives"]["all-reduce"]["bytes"] == 3 * whole


def test_every_case_has_the_kinds_that_it_names(script):
    for name, case in script.CASES.items():
        for method in case.methods:
            kinds = script.KINDS[method]
            config = script.config_of(case, method, 2)
            shape, classes, images = tpu_plan.DATA[config.data.name]
            found = {stage.kind for stage in check(config, classes, images)}
            assert set(kinds) <= found, (name, method)
            assert (config.batch_size, config.precision.derivative) == (case.batch_size, "default")
