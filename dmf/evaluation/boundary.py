"""What pictures and scores a run at its boundaries: the judge of `dmf.run.scoreboard`.

from dmf.evaluation.boundary import RunJudge
from dmf.train import train

train(config, workdir, judge=RunJudge)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dmf import data, networks, processes
from dmf.config import Config
from dmf.errors import DmfError
from dmf.evaluation import pictures, protocols, sampling
from dmf.evaluation.judge import Judge, Setting
from dmf.evaluation.totals import PART
from dmf.method.curriculum import Stage
from dmf.storage import paths

# Scores during training. The others need the features of all samples at once.
CHEAP = ("fid", "sfid", "is")


class RunJudge:
    """Pictures and scores the weights of one run; see `dmf.run.scoreboard.Judge`."""

    def __init__(
        self,
        config: Config,
        dataset: data.Source,
        network: networks.Network,
        mesh: Mesh,
    ):
        """dataset: the training data. Raises DmfError on a bad protocol, reference or decoder."""
        self._run = config.run
        shape, about = dataset.image_shape, data.identity(dataset)
        labels = labels_of_run(config, dataset)
        self._sampler = sampling.Sampler(network, config, shape, labels, mesh)
        found = scorer_of_run(config, dataset, mesh)
        self._scorer: Any = found[0] if found else None
        self.main = found[1] if found else ""
        self.scored_by = self._scorer.scored_by if self._scorer else ""
        self.floor: Mapping[str, float] = self._scorer.floor if self._scorer else {}
        self._decode = sampling.make_decoder(config.run.vae, shape, mesh, about)

    def picture(self, path: Path, params: Any, steps: Mapping[str, int]) -> None:
        """Draws a grid of samples per caption, at so many sampling steps, into the file."""
        side = self._run.sample_rows
        drawn = {name: self._sampler(params, side * side, n) for name, n in steps.items()}
        grids = {name: self._decode(x) for name, x in drawn.items()}
        if processes.is_first():
            with paths.writing(path):
                pictures.panels(path, grids, side)

    def score(self, params: Any, steps: Sequence[int]) -> list[dict[str, Any]]:
        """One row of scores per number of sampling steps."""
        assert self._scorer is not None  # main names no score otherwise
        count = self._run.score_samples
        return sampling.score(self._sampler, self._scorer, params, count, steps)

    def table(self, rows: Sequence[dict[str, Any]]) -> str:
        """Rows of scores as a printed table."""
        return sampling.format_scores(rows, self.floor)

    def curves(
        self,
        path: Path,
        metrics: list[dict[str, Any]],
        scores: list[dict[str, Any]],
        stages: tuple[Stage, ...],
    ) -> None:
        """Draws residuals, interval and main score over the steps into the file."""
        with paths.writing(path):
            pictures.curves(path, metrics, scores, stages, self.main)

    def stack(self, path: Path, parts: Sequence[Path]) -> None:
        """Puts pictures below each other into the file."""
        with paths.writing(path):
            pictures.stack(path, parts)


class ProtocolScorer:
    """A cheap score during training: a protocol's FID, sFID and IS of few samples."""

    floor: dict[str, float] = {}
    scored_by: str  # scores with equal ones may be compared

    def __init__(
        self, config: Config, image_shape: tuple[int, ...], mesh: Mesh, trained_on: dict[str, Any]
    ):
        """trained_on: `data.identity` of the training data. Raises DmfError on a bad setting."""
        run = config.run
        sampling.check_images(image_shape, run.vae)
        setting = Setting(run.protocol, run.features, run.reference, run.score_samples)
        self._judge = Judge(setting, mesh, CHEAP)
        if "fid" not in self._judge.protocol.metrics:
            raise DmfError(
                f"config.run.protocol = {run.protocol!r}: expected one with fid, by which the "
                "best checkpoint is told"
            )
        self._decode = sampling.make_decoder(run.vae, image_shape, mesh, trained_on)
        self._judge.announce()
        self._judge.ready()
        self.scored_by = _scored_by(self._judge.identity(), config)

    def __call__(self, samples: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Scores of samples (N, H, W, C) in about [-1, 1], or of latents."""
        totals = self._judge.totals(len(samples))
        for first in range(0, len(samples), PART):
            part = self._decode(samples[first : first + PART])
            totals.add(self._judge.extract(protocols.to_bytes(part, self._judge.protocol.rounding)))
        return totals.scores(self._judge.reference)


def scorer_of_run(config: Config, train: data.Source, mesh: Mesh) -> tuple[Any, str] | None:
    """(scorer, name of its main score): by config.run.protocol, else by the data set.

    None where the run is only pictured.
    """
    if not config.run.score_samples:
        return None
    if config.run.protocol:
        return ProtocolScorer(config, train.image_shape, mesh, data.identity(train)), "fid"
    found = sampling.make_scorer(config.data, train)
    if found:
        behind = data.behind(config.data)
        about = {
            "data": [behind.name, behind.holdout_fraction],
            "count": config.run.score_samples,
        }
        found[0].scored_by = _scored_by(about, config)
    return found


def _scored_by(about: dict[str, Any], config: Config) -> str:
    """A digest that is equal for scores with equal settings.

    about: what is scored and how, besides the drawing of samples.
    """
    values = (
        about,
        config.run.sampler,
        config.seed,
        config.ema.evaluate,
        config.compute_dtype,
        config.run.vae,
    )
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def labels_of_run(config: Config, train: data.Source) -> np.ndarray:
    """Labels of the samples that a run draws, (N,) int32: by its protocol, else those of the data.

    Of latents each class comes in turn: they may be stored by class, and the first ones would
    then be of few classes.
    """
    if config.run.protocol:
        protocol = replace(protocols.load(config.run.protocol), count=config.run.score_samples)
        return sampling.labels_by(protocol, config, train.labels)
    if not train.mixed and config.num_classes:
        return np.arange(config.num_classes, dtype=np.int32)
    return train.labels
