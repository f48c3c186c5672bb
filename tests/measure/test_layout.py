"""`rows` = auto decides once; a run that resumes in another layout ends in the same weights."""

import json
import re
import shutil

import numpy as np
import pytest

from dmf import train as trainer
from dmf.config import parse
from dmf.errors import DmfError
from dmf.measure import layout, roofline
from dmf.method.curriculum import Stage
from tests.test_train import leaves, stopped_after
from tests.tiny import MLP, merged

VALUES = merged(
    MLP,
    curriculum=dict(stages=1, kinds=("jvp",), length=6.0, pretrain_length=0.0),
    optimizer=dict(eps=1e-4),  # else Adam makes a large step of a tiny gradient's rounding
)
AUTO = parse(merged(VALUES, rows="auto"))
STAGES = (Stage(0, "all_pairs", 1.0, 0, 5, 0, 0), Stage(1, "jvp", 1.0, 5, 15, 0, 0))


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (dict(split=3.0, joint=2.0, whole=4.0), "joint"),
        (dict(split=3.0, joint=None, whole=4.0), "split"),  # joint does not fit
        (dict(split=None, joint=None, whole=4.0), "whole"),
        (dict(split=2.0, joint=2.0, whole=2.0), "split"),
        (dict(split=None, joint=None, whole=None), "split"),
    ],
)
def test_the_layout_with_the_least_time_of_all_steps_is_taken(times, expected):
    asked = []

    def ms(kind, name):
        asked.append((kind, name))
        return 1.0 if kind == "all_pairs" else times[name]

    found, why = roofline.decided(STAGES, 0.25, ms)
    assert found == expected
    assert ("unknown" in why) == (None in times.values())
    assert set(asked) == {("all_pairs", "split"), *(("jvp", name) for name in times)}
    if expected == "joint":
        hours = (5 * 1.0 + 15 * 2.0) / 3.6e6
        assert f"joint {hours:.3g} h" in why


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A run whose layout the roofline has chosen, killed after step 4. Step 3 is saved."""
    folder, figures = tmp_path_factory.mktemp("cut") / "run", dict(split=3.0, joint=2.0, whole=4.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "chip", lambda device: "a chip")
        patch.setattr(layout, "least_ms", lambda config, *_: figures[config.rows])
        decided = layout.settled(AUTO, folder)
    assert decided == parse(merged(VALUES, rows="joint"))
    stopped_after(4, merged(VALUES, rows="joint"), folder)
    return folder


def test_auto_keeps_the_layout_that_the_run_began_with(cut, tmp_path, capsys):
    assert json.loads((cut / "config.json").read_text())["rows"] == "joint"
    assert layout.settled(AUTO, cut).rows == "joint"  # an unknown chip: anew it would be split
    assert "rows      joint: as this run began" in capsys.readouterr().out
    assert layout.settled(AUTO, tmp_path).rows == "split"
    assert "rows      split: the default, as the peaks of 'cpu'" in capsys.readouterr().out
    assert layout.settled(parse(VALUES), cut).rows == "split"  # named, so asked for
    with pytest.raises(DmfError, match="config.rows = 'auto': expected split, joint or whole"):
        trainer.train(AUTO, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_on_a_known_chip_the_compiled_steps_decide(monkeypatch):
    # A chip whose FLOPs bind, so that the layout with the fewest passes is the fastest.
    monkeypatch.setitem(roofline.CHIPS, "cpu", roofline._tpu(1e9, 1e15, 0, "made"))
    wide = merged(VALUES, rows="auto", network=dict(width=256), times=dict(r_neq_t_fraction=0.25))
    found, why = layout.chosen(parse(wide))
    hours = {name: float(value) for name, value in re.findall(r"(\w+) (\S+) h", why)}
    assert found == "split" and hours["split"] == hours["shared"] < hours["joint"] < hours["whole"]
    monkeypatch.setattr(layout.sharding, "device_bytes", lambda mesh: 1000)
    assert layout.chosen(parse(wide)) == ("split", "no layout fits, or its time is unknown (cpu)")


def test_a_killed_run_that_resumes_in_another_layout_ends_in_the_same_weights(cut, tmp_path):
    trainer.train(parse(VALUES), tmp_path / "straight")
    expected = leaves(tmp_path / "straight" / "checkpoints" / "6")
    for name in ("split", "whole"):
        shutil.copytree(cut, tmp_path / name)
        trainer.train(parse(merged(VALUES, rows=name)), tmp_path / name)
        found = leaves(tmp_path / name / "checkpoints" / "6")
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
