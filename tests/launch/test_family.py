"""The tables of the family and of the public benchmarks: what they run, skip, resume and print."""

import json

import jax
import numpy as np
import pytest

from configs import digits
from dmf.config import parse
from dmf.errors import DmfError
from dmf.method.curriculum import build_stages
from launch.tables import family, toy
from tests import ROOT


def stored(name):
    return json.loads((ROOT / "docs" / f"{name}.json").read_text())["rows"]


@pytest.mark.parametrize("method", family.names())
def test_every_method_takes_the_same_steps_from_the_flow_model(method, tmp_path):
    flags = dict(f.split("=", 1) for f in family.flags_of(method, 0, tmp_path))
    lengths = flags.get("--config.curriculum.stage_lengths")
    values = digits.get_config(method)
    values.curriculum.pretrain_length = 0.0
    values.curriculum.length = float(flags["--config.curriculum.length"])
    if lengths:
        values.curriculum.stage_lengths = tuple(map(float, lengths.strip("(),").split(",")))
    stages = build_stages(parse(values).curriculum, 64, 1352)
    assert stages[-1].last == family.STEPS
    assert flags["--config.init"] == str(tmp_path / "flow" / "checkpoints" / "2000")


def test_only_rows_that_failed_or_have_other_flags_are_run_again(tmp_path):
    def row(method, **other):
        flags = [f.replace(f"{tmp_path}/", "") for f in family.flags_of(method, 0, tmp_path)]
        return {"method": method, "flags": flags, **other}

    rows = [row("dagger"), row("linear", failed="error: no"), row("meanflow") | {"flags": []}]
    wanted = ["dagger", "linear", "meanflow", "central"]
    assert family.missing(wanted, rows, 0, tmp_path) == ["linear", "meanflow", "central"]


def test_the_family_on_the_page_is_the_stored_one_and_the_page_tells_which_method_broke():
    rows, text = stored("family"), (ROOT / "docs" / "family.md").read_text()
    assert family.table(rows) in text
    broken = [line for line in family.table(rows).splitlines() if "broken)" in line]
    assert [line.split()[1] for line in broken] == ["terminal"] and "- `terminal` broke." in text
    assert len([row for row in rows if "failed" not in row]) >= 4
    for row in rows:
        derived = {"jvp", "guided_jvp"} & set(row["flops_by_passes"])
        assert max(row["flops_by_passes"].values()) <= (1.06 if derived else 1.03)


@pytest.mark.parametrize("bench", toy.BENCHES)
def test_the_public_benchmarks_on_the_page_are_the_stored_ones(bench):
    text = (ROOT / "docs" / "family.md").read_text()
    assert toy.table(stored("toy"), bench) in text


def test_points_of_the_checkerboard_lie_in_every_other_cell_and_two_samples_are_at_the_floor():
    one, two = (np.asarray(toy.checkerboard(jax.random.key(n), toy.POINTS)) for n in (0, 1))
    cells = np.floor(one).astype(int) + 2
    assert (cells.sum(1) % 2 == 0).all() and len(np.unique(cells, axis=0)) == 8
    assert toy.divergence(one, two) == pytest.approx(0.0114, abs=0.0015)


def test_a_squeeze_keeps_the_centres_and_the_pairs_of_a_seed():
    wide, thin = toy.thin_pairs(0.1, 50, 0)
    centre = (thin - 0.1 * wide) / 0.9
    np.testing.assert_allclose(np.linalg.norm(centre, axis=1), 3, rtol=1e-5)
    np.testing.assert_array_equal(toy.thin_pairs(0.01, 50, 0)[0], wide)


def test_a_row_that_was_killed_goes_on_and_ends_in_the_same_bits(tmp_path, monkeypatch):
    short = dict(curriculum=dict(length=6.0), batch_size=8, network=dict(kind="mlp", width=4))
    about = toy.BENCHES["checkerboard"]
    small = about._replace(
        fields=about.fields | short, draw=lambda _, key: toy.batch_of(toy.checkerboard(key, 8))
    )
    monkeypatch.setitem(toy.BENCHES, "checkerboard", small)
    monkeypatch.setattr(toy, "CHUNK", 2)
    monkeypatch.setattr(toy, "SAVED", 2)
    trainer = toy.Trainer("checkerboard", "meanflow")
    kept, whole = tmp_path / "kept.npz", trainer.train(0.0, 3, tmp_path / "other.npz")[0]
    real, calls = toy.Trainer.scalars, []

    def killed(*given):
        calls.append(given[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(toy.Trainer, "scalars", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(0.0, 3, kept)
    again = trainer.train(0.0, 3, kept)[0]
    assert calls == [0, 2, 4, 4]  # the two chunks before the kill are not run again
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_a_method_that_is_not_there_is_one_line():
    with pytest.raises(DmfError, match=r"configs/methods.py:nothing: expected one of p1, .*dagger"):
        toy.config_of("thin", "meanflow+nothing", 0)
