"""Pairs of noise and sample: their files after a kill, which are kept, and what training reads."""

from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
import pytest

from dmf import data, pretrained
from dmf.config import to_dict
from dmf.convert import pairs
from dmf.data import DataConfig, latents, shards
from dmf.errors import DmfError
from dmf.evaluation.draw import Choice
from tests.tiny import MLP, Setup

COUNT = 23
HOW = dict(choice=Choice("euler"), steps=2, shard_size=10)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pairs of a network with random weights, and the function that made them."""
    setup = Setup(dict(MLP))
    params = jax.device_get(setup.state().params)
    stored = {"config": to_dict(setup.config), "image_shape": [8, 8, 1]}
    opened = pretrained.Opened(Path("7"), stored, setup.network, params, "digest")
    patch = pytest.MonkeyPatch()
    patch.setattr(pretrained, "open_weights", lambda path, ema: opened)

    def write(out, count=COUNT, **how):
        return pairs.write_pairs("run", str(out), count, **(HOW | how))

    yield write(tmp_path_factory.mktemp("pairs") / "p"), write
    patch.undo()


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def rows(folder):
    return data.whole(data.load(DataConfig("pairs", str(folder)), "train"))


def test_after_a_kill_the_same_command_makes_the_same_files(made, tmp_path, monkeypatch):
    folder, write = made
    real = shards.write_shard

    def killed(path, parts, *rest):
        if "00001" in path.name:
            next(iter(parts))
            raise KeyboardInterrupt
        real(path, parts, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "p")
    with pytest.raises(DmfError, match="p is not written to its end .*: expected what `--mode=pai"):
        rows(tmp_path / "p")
    write(tmp_path / "p")
    assert content(tmp_path / "p") == content(folder)
    assert pairs.verify(folder)["count"] == COUNT


def test_training_reads_the_noise_that_belongs_to_a_sample(made, tmp_path):
    folder, write = made
    stored, redrawn = rows(folder), rows(write(tmp_path / "redrawn", noise="redrawn"))
    for name in ("x", "label"):
        np.testing.assert_array_equal(stored[name], redrawn[name])
    np.testing.assert_allclose(stored["noise"], redrawn["noise"], atol=1e-6)
    assert stored["x"].shape == stored["noise"].shape == (COUNT, 8, 8, 1)
    assert not np.allclose(stored["noise"][0], stored["noise"][1])
    for place, parts in ((folder, 2), (tmp_path / "redrawn", 1)):
        assert latents.read_pairs(str(place), "train").fetch(np.array([22])).shape[1] == parts


def test_a_share_keeps_the_floor_of_its_count_and_is_chosen_anew_without_drawing(
    made, tmp_path, monkeypatch
):
    distances = np.random.default_rng(0).normal(size=100) ** 2
    for text, count in (("0.9", 90), ("0.29", 29), ("0.299", 29), ("1", 100)):
        found = pairs.kept(distances, pairs.rule_of(text))
        assert len(found) == count
        assert (np.diff(found) > 0).all()
        assert distances[found].max() <= np.sort(distances)[count - 1]
    assert len(pairs.kept(np.zeros(7), ("share", Fraction(1, 2)))) == 3
    write = made[1]
    folder = write(tmp_path / "p")
    before = rows(folder)
    monkeypatch.setattr(pairs, "_draw_shards", None)
    write(tmp_path / "p", keep="0.7")
    after, apart = rows(folder), np.square(before["noise"] - before["x"]).mean((1, 2, 3))
    least = np.sort(np.argsort(apart)[:16])
    np.testing.assert_array_equal(after["x"], before["x"][least])
    np.testing.assert_array_equal(after["noise"], before["noise"][least])
    write(tmp_path / "p", keep=f"<{np.sort(apart)[5]:.6f}")
    assert len(rows(folder)["x"]) in (5, 6)
    with pytest.raises(DmfError, match=r"--keep=<0.01 keeps none of 23 pairs: expected one above"):
        write(tmp_path / "p", keep="<0.01")


def test_wrong_input_is_one_line(made, tmp_path):
    folder, write = made
    for text in ("0", "1.1", "x", "1e-9", "<", "nan", "-1"):
        with pytest.raises(DmfError, match=f"--keep={text}: expected a share above 0"):
            pairs.rule_of(text)
    with pytest.raises(DmfError, match="p was begun otherwise: steps: 2 -> 3; expected the same"):
        write(folder, steps=3)
    with pytest.raises(DmfError, match="config.data.flip = True for 'pairs': expected False"):
        data.load(DataConfig("pairs", str(folder), flip=True), "train")
    with pytest.raises(DmfError, match="holds pairs, which have no split 'heldout'"):
        data.load(DataConfig("pairs", str(folder)), "heldout")
    with pytest.raises(DmfError, match=r"holds no pairs \(no metadata.json\)"):
        data.load(DataConfig("pairs", str(tmp_path)), "train")
    assert data.behind(DataConfig("pairs", str(folder))).name == "digits"
    torn = write(tmp_path / "torn")
    shard = torn / shards.name(0, 3, "pairs")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DmfError, match="pairs-00000-of-00003.array_record has .* bytes: expected"):
        data.load(DataConfig("pairs", str(torn)), "train")
