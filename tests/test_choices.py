"""What a curriculum may be besides the paper's: the schedule of d, the direction of the step back, the interval's rule.

Each choice is one field of the config; at its default nothing changes.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from dmf import checkpoint, pictures, step, train
from dmf.config import parse
from dmf.curriculum import CurriculumConfig, build_stages, rho_at, stage_at, table
from dmf.errors import DmfError
from tests.tiny import TINY, Setup, merged

SMOOTH = CurriculumConfig(stages=6, q=2.0, length=600.0, schedule="smooth")


def leaves(folder):
    """Every array of a checkpoint, as NumPy."""
    from orbax.checkpoint import v1 as ocp

    items = (*checkpoint.ITEMS, *checkpoint.OPTIONAL) if hasattr(checkpoint, "OPTIONAL") else checkpoint.ITEMS
    found = ocp.load_checkpointables(folder.absolute())
    return [np.asarray(x) for x in jax.tree.leaves({k: found[k] for k in items if k in found})]


def resumed_ends_as_uninterrupted(values, tmp_path, stops):
    """Trains once in one go and once for each step after which an error stops it; all end in the same bits."""
    train.train(parse(values), tmp_path / "whole")
    last = max(int(p.name) for p in (tmp_path / "whole" / "checkpoints").iterdir() if p.name.isdigit())
    expected = leaves(tmp_path / "whole" / "checkpoints" / str(last))

    class Stop(Exception):
        pass

    for n in stops:
        run = train.Run(parse(values), tmp_path / str(n))

        def stop_after(pending, progress, n=n, real=run._report):
            real(pending, progress)
            if pending is not None and pending[0] == n:
                raise Stop

        run._report = stop_after
        with pytest.raises(Stop):
            run.loop()
        run.close()
        train.train(parse(values), tmp_path / str(n))
        for a, b in zip(leaves(tmp_path / str(n) / "checkpoints" / str(last)), expected, strict=True):
            np.testing.assert_array_equal(a, b)
        assert (tmp_path / str(n) / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    return tmp_path / "whole"


# --- the schedule of d -----------------------------------------------------------------------------------------------


def test_a_smooth_schedule_falls_by_one_factor_a_step_between_the_same_ends():
    stages = build_stages(SMOOTH, 8, 1000)
    plain = build_stages(dataclasses.replace(SMOOTH, schedule="steps"), 8, 1000)
    assert [(s.kind, s.first, s.steps) for s in stages] == [(s.kind, s.first, s.steps) for s in plain]
    rho = np.array([rho_at(stage_at(stages, n), n) for n in range(100, 500)])
    assert rho[0] == 1 / 2 and rho[-1] == pytest.approx(1 / 16, rel=1e-12)
    np.testing.assert_allclose(rho[1:] / rho[:-1], 8 ** (-1 / 399), rtol=1e-12)  # over the boundaries of stages as well
    assert {rho_at(plain[i], n) for i in (1, 2) for n in range(plain[i].first, plain[i].last)} == {0.5, 0.25}
    assert [rho_at(stages[i], stages[i].first) for i in (0, 5)] == [1.0, 1.0]


def test_a_smooth_schedule_passes_over_stages_of_other_kinds():
    kinds = ("guided_discrete", "discrete", "jvp", "discrete", "guided_discrete", "trajectory", "discrete", "guided_discrete")
    config = CurriculumConfig(stages=8, kinds=kinds, q=2.0, length=80.0, schedule="smooth")
    stages = build_stages(config, 8, 1000, 1)
    at = [(rho_at(s, s.first), rho_at(s, s.last - 1)) for s in stages]
    factor = (2.0**-6 / 2.0**-1) ** (1 / 29)
    assert at[1] == pytest.approx((2.0**-1, 2.0**-1 * factor**9)) and at[3] == pytest.approx(
        (2.0**-1 * factor**10, 2.0**-1 * factor**19)
    )
    assert at[6][1] == pytest.approx(2.0**-6, rel=1e-12)
    assert at[4][0] == at[4][1] == at[3][1] and at[7][0] == at[7][1] == at[6][1]  # guided: what was reached before
    assert at[0] == (0.5, 0.5) and at[2] == at[5] == (1.0, 1.0)
    lone = CurriculumConfig(stages=3, length=3.0, schedule="smooth")  # one discrete step: nothing to fall between
    assert [s.rho for s in build_stages(lone, 8, 1000)] == [1.0, 0.5, 1.0]


def test_the_table_shows_where_a_smooth_stage_begins_and_ends():
    stages = build_stages(SMOOTH, 8, 1000)
    lines = table(stages, SMOOTH, 0.25).splitlines()
    assert lines[2].split() == ["stage", "1", "discrete", "0.5..0.298466+", "100", "100", "3.25"]
    assert lines[5].split()[3] == "0.104702..0.0625+" and len({len(line) for line in lines[:8]}) == 1
    assert lines[1].split()[3] == "-"


def test_the_step_is_told_the_schedule_and_compiles_once():
    setup = Setup(merged(TINY, curriculum=dict(schedule="smooth", stages=6, length=60.0)))
    stage = setup.stages[2]
    told = [step.step_scalars(n, stage, setup.stages, setup.config).rho for n in range(stage.first, stage.last)]
    assert told == [np.float32(rho_at(stage, n)) for n in range(stage.first, stage.last)] and len(set(told)) == 10
    train_step, now = setup.step("discrete"), setup.state()
    for n, rho in enumerate(told[:3]):
        now, _ = train_step(now, setup.batch(n), setup.scalars(n, "discrete", rho))
    assert train_step._cache_size() == 1


def test_a_smooth_run_logs_its_interval_and_resumes_in_the_same_bits(tmp_path):
    values = merged(TINY, curriculum=dict(schedule="smooth", stages=4, length=12.0, pretrain_length=0.0))
    whole = resumed_ends_as_uninterrupted(values, tmp_path, (4, 7))
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [r["rho"] for r in rows if r["kind"] == "discrete"] == pytest.approx([2.0 ** (-1 - i / 5) for i in range(6)])


def test_the_curves_draw_the_interval(tmp_path):
    stages = build_stages(SMOOTH, 8, 1000)

    def drawn(name, fall):
        rows = [
            dict(step=n, kind=stage_at(stages, n - 1).kind, rho=0.5 * fall**n, squares_border=1.0, squares_pairs=2.0)
            for n in range(1, 601)
        ]
        pictures.curves(tmp_path / name, rows, [], stages, "fd")
        return np.asarray(Image.open(tmp_path / name))

    a, b, c = drawn("a.png", 0.99), drawn("b.png", 0.99), drawn("c.png", 0.97)
    np.testing.assert_array_equal(a, b)
    assert a.shape != c.shape or (a != c).any()


def test_an_unknown_schedule_is_refused():
    with pytest.raises(DmfError, match="config.curriculum.schedule = 'smoth': expected steps or smooth"):
        build_stages(dataclasses.replace(SMOOTH, schedule="smoth"), 8, 1000)
