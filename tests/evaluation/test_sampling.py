"""Samples and scores: one noise for all models and steps, whatever computed them."""

import json

import jax
import numpy as np
import pytest

from dmf import sharding
from dmf.data import DataConfig, load
from dmf.evaluation import sampling
from dmf.evaluation.boundary import RunJudge
from dmf.evaluation.sampling import Sampler
from dmf.logging import TensorBoard
from dmf.run.scoreboard import Scoreboard
from tests.tiny import TINY, Setup, merged

LABELS = np.arange(10, dtype=np.int32).repeat(3)


def sampler(devices=1, **run):
    setup = Setup(merged(TINY, run=run), devices)
    return Sampler(setup.network, setup.config, (8, 8, 1), LABELS, setup.mesh), setup.state().params


def test_a_sample_does_not_depend_on_count_chunk_or_devices(monkeypatch):
    draw, params = sampler()
    whole = draw(params, 21, 2)
    assert whole.shape == (21, 8, 8, 1) and len({x.tobytes() for x in whole}) == 21
    np.testing.assert_allclose(draw(params, 5, 2), whole[:5], atol=1e-5)
    draw_on_8, same_params = sampler(devices=8)
    np.testing.assert_array_equal(
        draw_on_8(same_params, 21, 2), whole
    )  # the same program on every device
    monkeypatch.setattr(sampling, "ROWS_PER_DEVICE", 4)
    np.testing.assert_allclose(draw(params, 21, 2), whole, atol=1e-5)
    np.testing.assert_array_equal(draw(params, 8, 2, first=4), draw(params, 12, 2)[4:])


def test_labels_are_those_of_the_data_in_their_order_and_reach_the_network():
    draw, params = sampler()
    np.testing.assert_array_equal(draw.labels(35), np.r_[LABELS, LABELS[:5]])
    other = Sampler(
        *(lambda s: (s.network, s.config))(Setup()),
        (8, 8, 1),
        LABELS[::-1].copy(),
        sharding.make_mesh(devices=jax.devices()[:1]),
    )
    assert np.abs(other(params, 3, 1) - draw(params, 3, 1)).max() > 1e-3


def test_a_loop_on_the_host_draws_the_same_samples_with_one_program():
    (inside, params), (outside, _) = sampler(), sampler(sampler="few_step_on_host")
    for steps in (1, 3):
        np.testing.assert_allclose(outside(params, 5, steps), inside(params, 5, steps), atol=1e-5)
    eight, same = sampler(devices=8, sampler="few_step_on_host")
    np.testing.assert_array_equal(eight(same, 5, 3), outside(params, 5, 3))


@pytest.mark.parametrize("name", ["few_step", "euler", "heun", "gamma"])
def test_one_program_serves_every_number_of_steps(name):
    draw, params = sampler(sampler=name)
    samples = [draw(params, 4, n) for n in (1, 2, 7)]
    assert draw._draw._cache_size() == 1
    assert (
        all(np.isfinite(x).all() for x in samples) and np.abs(samples[0] - samples[2]).max() > 1e-3
    )


def test_the_digits_score_sees_real_images_as_real_and_is_printed_beside_them():
    train = load(DataConfig(), "train")
    scorer, main = sampling.make_scorer(DataConfig(), train)
    real = train.to_float(train.images)

    class RealImages:
        labels = staticmethod(lambda count: train.labels[:count])

        def __call__(self, params, count, steps):
            return real[:count]

    rows = sampling.score(RealImages(), scorer, None, 600, [1, 4])
    assert [r["nfe"] for r in rows] == [1, 4] and main in rows[0]
    assert rows[0]["nn_train"] == 0 and rows[0]["accuracy"] > 0.98 and rows[0]["n_samples"] == 600
    text = sampling.format_scores(rows[:1], scorer.floor).splitlines()
    assert text[0].split()[:2] == ["steps", "fd_hidden"] and text[2].split()[0] == "real"
    assert float(text[2].split()[1]) == pytest.approx(scorer.floor["fd_hidden"], abs=5e-4)


def test_a_data_set_without_a_score_has_none():
    assert sampling.make_scorer(DataConfig(name="cifar10"), load(DataConfig(), "train")) is None


class Scorer:
    """Scores nothing, and is made at once."""

    floor = {}

    def __init__(self, *real):
        pass


def board(folder, **changes):
    """The scoreboard of a run on digits that is scored by `Scorer`."""
    setup = Setup(merged(merged(TINY, run=dict(score_samples=32)), **changes))
    judge = RunJudge(setup.config, load(DataConfig(), "train"), setup.network, setup.mesh)
    return Scoreboard(setup.config, folder, setup.stages, judge, TensorBoard(folder, False))


def test_scores_of_digits_are_compared_with_their_like_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "SCORERS", {"digits": (Scorer, "fd_hidden")})
    mine = board(tmp_path)
    others = [
        board(tmp_path, **change)
        for change in (
            dict(seed=1),
            dict(ema=dict(evaluate=800.0)),
            dict(run=dict(sampler="euler")),
            dict(run=dict(score_samples=16)),
            dict(data=dict(holdout_fraction=0.5)),
        )
    ]
    same = board(tmp_path, run=dict(log_every_steps=7))
    scored_by = [b._scored_by for b in (mine, *others)]
    assert len(set(scored_by)) == 6 and same._scored_by == scored_by[0]
    rows = [
        {"scored_by": by, "fd_hidden": 9.0 - n, "n_samples": 32.0} for n, by in enumerate(scored_by)
    ]
    rows += [{"fd_hidden": 3.0, "n_samples": n} for n in (32.0, 16.0)]  # rows of older versions
    text = "".join(json.dumps({"step": n, "nfe": 1, **row}) + "\n" for n, row in enumerate(rows))
    (tmp_path / "scores.jsonl").write_text(text)
    assert mine.history() == same.history() == [(0, 9.0), (6, 3.0)]
    assert [b.history()[0] for b in others] == [(n, 9.0 - n) for n in range(1, 6)]
