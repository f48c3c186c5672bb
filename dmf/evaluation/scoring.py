"""Scores by a declared protocol: of a checkpoint at several numbers of steps and EMAs, of image files, or during training.

    images in parts of PART -> features (`metrics.features`) -> sums in float64 (`metrics.totals`) -> scores against a reference

A part is the same images in the same order on any number of devices, and its sums are kept on disk: an interrupted run goes
on where it was and ends in the same scores. Everything a number depends on is printed and stored with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dmf import data, pretrained, sharding
from dmf.config import Config, parse
from dmf.data import images as sources
from dmf.errors import DmfError
from dmf.evaluation import sampling
from dmf.evaluation.features import Extractor
from dmf.evaluation.judge import Judge, Setting, accumulate
from dmf.evaluation.results import Progress, Results, free_name, sha256
from dmf.method.objectives import kind_of
from dmf.metrics import protocols, reference
from dmf.metrics.protocols import Protocol
from dmf.metrics.reference import Reference
from dmf.metrics.totals import PART, Totals
from dmf.storage import checkpoint, paths

CHEAP = (
    "fid",
    "sfid",
    "is",
)  # what is scored during training; the others need the features of all samples at once
READERS = 8  # threads that decode image files


def score_checkpoint(
    path: str | Path,
    setting: Setting,
    steps: Sequence[int],
    emas: Sequence[float | None] = (None,),
    sampler: str = "",
    seed: int | None = None,
    vae: str = "",
    out: str = "",
) -> list[dict[str, Any]]:
    """Scores a checkpoint by a protocol, one row for each EMA and number of sampling steps; prints them, writes JSON.

    path, emas, sampler, vae: as for `sampling.write_samples`. seed: of noise and drawn labels, None for the run's own. out: the
    JSON file, by default beside the checkpoint, or of one in a bucket in the current directory; rows it already holds are not
    made again. Raises DmfError on bad input.
    """
    mesh = sharding.make_mesh()
    judge = Judge(setting, mesh)
    folder, stored = pretrained.open_folder(path)
    config = _config(path, stored, sampler, seed)
    _check_images(tuple(stored["image_shape"]), vae)
    decode = sampling.make_decoder(vae, tuple(stored["image_shape"]), mesh, stored.get("data"))
    judge.announce()
    labels = _labels(
        judge.protocol, config, None if pretrained.is_converted(stored) else config.data
    )
    named = (judge.protocol.name, folder.name, config.run.sampler, f"seed{config.seed}")
    beside = sampling.home(folder, stored)
    beside = (
        Path() if paths.is_bucket(beside) else beside
    )  # sums wait in files that are mapped and locked
    results = Results(
        Path(out) if out else beside / f"scores_{free_name('_'.join(map(str, named)))}.json",
        {
            "checkpoint": {
                "folder": folder.name,
                "manifest_sha256": sha256(folder / checkpoint.MANIFEST),
            },
            "autoencoder": sha256(pretrained.open_folder(vae)[0] / checkpoint.MANIFEST)
            if vae
            else "none",
            "sampler": config.run.sampler,
            "seed": config.seed,
            "compute_dtype": config.compute_dtype,
            "guidance": _guidance(config, pretrained.is_converted(stored)),
            **_identity(judge),
        },
    )
    draw: sampling.Sampler | None = None
    for ema in emas:
        network, params = pretrained.load_folder(folder, stored, ema)
        draw = draw or sampling.Sampler(network, config, tuple(stored["image_shape"]), labels, mesh)
        half_life = config.ema.evaluate if ema is None else ema
        for n in steps:
            row = {
                "ema_halflife_images": half_life,
                "steps": n,
                "nfe": n * sampling.evaluations(config.run.sampler),
            }
            results.add(
                row, judge, partial(_samples, draw, params, n, decode, judge.protocol.rounding)
            )
    return results.finish()


def self_check(setting: Setting) -> None:
    """Holds a protocol's features on this device against known answers; prints the outcome, raises DmfError if it is bad."""
    found = protocols.load(setting.protocol)
    extract = Extractor(found, setting.features, sharding.make_mesh())
    print(f"protocol  {protocols.describe(found)}\n{extract.self_check()}")
    if setting.reference:
        stored = reference.read(setting.reference, found.space, images=False)
        reference.check(stored, found, extract.about["network_sha256"], extract.dims())
        print(
            f"reference {stored.about.get('file')}: readable, and nothing in it contradicts the protocol"
        )


def score_images(
    source: str, setting: Setting, out: str, data_dir: str = "", split: str = "train"
) -> list[dict[str, Any]]:
    """Scores image files (as `data.images.open_images` takes them), all of them or the first `setting.count`.

    out: the JSON file, "" for one in the current directory. Raises DmfError on bad input.
    """
    found = sources.open_images(source, data_dir, split)
    count = _count(setting, found, source)
    judge = Judge(replace(setting, count=count), sharding.make_mesh())
    judge.announce()
    path = Path(out or f"scores_{free_name(judge.protocol.name)}_{free_name(source)}.json")
    results = Results(path, {"images": found.about, **_identity(judge)})
    results.add({"images": source}, judge, _reader(found, 0))
    return results.finish()


def make_reference(
    source: str, setting: Setting, out: str, data_dir: str = "", split: str = "train", size: int = 0
) -> Reference:
    """Statistics of images as a protocol's reference, with everything that went into them recorded; written to `out`.

    size: of a centre crop by ADM's rule, 0 for images as they are. Raises DmfError on bad input.
    """
    protocol = protocols.load(setting.protocol)
    path = Path(out)
    found = sources.open_images(source, data_dir, split)
    count = _count(setting, found, source)
    if path.suffix != ".npz" or path.is_dir():
        raise DmfError(f"--out={out}: expected a file name ending in .npz")
    if protocol.reference_count not in (0, count):
        raise DmfError(
            f"{source}: {count:,} images, expected the {protocol.reference_count:,} of protocol {protocol.name} "
            f"({protocol.reference}); for others, write a protocol of your own with another reference_count"
        )
    extract = Extractor(protocol, setting.features, sharding.make_mesh())
    print(f"protocol  {protocols.describe(protocol)}\n{extract.self_check()}", flush=True)
    metrics = tuple(m for m in ("fid", "sfid") if m == "fid" or m in protocol.metrics)
    keep = np.unique(
        np.linspace(0, count - 1, min(count, protocol.reference_images)).astype(np.int64)
    )
    identity = {
        "source": found.about,
        "count": count,
        "size": size,
        "protocol": asdict(protocol),
        **extract.about,
    }
    progress = Progress(path, identity)
    totals = Totals(replace(protocol, metrics=metrics), count, progress.folder({}), keep)
    totals.restore()
    accumulate(totals, _reader(found, size), extract, "reference")
    crop = {"crop": f"{size}: {sources.CROP_RULE}"} if size else {}
    made_from = json.dumps({**found.about, **crop}, sort_keys=True)
    about: dict[str, str | int] = {
        **{key: extract.about[key] for key in ("space", "resize", "scaling", "network_sha256")},
        **{
            "dataset": str(found.about["name"]),
            "split": str(found.about["split"]),
            "count": count,
            "made_from": made_from,
        },
    }
    reference.write(path, totals.reference(about))
    progress.end()
    print(f"reference {path}, {count:,} images")
    return reference.read(path, protocol.space)


class ProtocolScorer:
    """A cheap score during training: the protocol's FID, sFID and IS of few samples; see `sampling.make_scorer`."""

    floor: dict[str, float] = {}
    scored_by: str  # scores with equal ones may be compared

    def __init__(
        self, config: Config, image_shape: tuple[int, ...], mesh: Mesh, trained_on: dict[str, Any]
    ):
        run = config.run
        _check_images(image_shape, run.vae)
        self._judge = Judge(
            Setting(run.protocol, run.features, run.reference, run.score_samples), mesh, CHEAP
        )
        if "fid" not in self._judge.protocol.metrics:
            raise DmfError(
                f"config.run.protocol = {run.protocol!r}: expected one with fid, by which the best checkpoint is told"
            )
        self._decode = sampling.make_decoder(run.vae, image_shape, mesh, trained_on)
        self._judge.announce()
        self._judge.ready()
        self.scored_by = _scored_by(_identity(self._judge), config)

    def __call__(self, samples: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Scores of samples (N, H, W, C) in about [-1, 1], or latents."""
        totals = self._judge.totals(len(samples))
        for first in range(0, len(samples), PART):
            part = self._decode(samples[first : first + PART])
            totals.add(self._judge.extract(protocols.to_bytes(part, self._judge.protocol.rounding)))
        return totals.scores(self._judge.reference)


def make_scorer(config: Config, train: data.Source, mesh: Mesh) -> tuple[Any, str] | None:
    """(scorer, name of its main score) for a run: by config.run.protocol, else by its data set; None for pictures alone."""
    if not config.run.score_samples:
        return None
    if config.run.protocol:
        return ProtocolScorer(config, train.image_shape, mesh, data.identity(train)), "fid"
    found = sampling.make_scorer(config.data, train)
    if found:
        about = {
            "data": [config.data.name, config.data.holdout_fraction],
            "count": config.run.score_samples,
        }
        found[0].scored_by = _scored_by(about, config)
    return found


def _scored_by(about: dict[str, Any], config: Config) -> str:
    """What tells scores of a run from those with other settings. about: what is scored how, besides the drawing of samples."""
    values = (
        about,
        config.run.sampler,
        config.seed,
        config.ema.evaluate,
        config.compute_dtype,
        config.run.vae,
    )
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _config(path: str | Path, stored: dict[str, Any], sampler: str, seed: int | None) -> Config:
    """The config of a checkpoint with another sampler and seed, where they are given."""
    if "config" not in stored:
        raise DmfError(
            f"checkpoint {path} holds a {stored['network']['kind']}: expected a flow model or a generator"
        )
    config = parse(stored["config"])
    run = replace(config.run, sampler=sampler or config.run.sampler)
    return replace(config, run=run, seed=config.seed if seed is None else seed)


def _check_images(shape: tuple[int, ...], vae: str) -> None:
    if shape[-1] not in (1, 3) and not vae:
        raise DmfError(
            f"samples of shape {shape} are latents, and no autoencoder is given (--vae, config.run.vae): expected one, in the "
            "directory of its conversion"
        )


def _samples(
    draw: sampling.Sampler,
    params: Any,
    steps: int,
    decode: Callable[[np.ndarray], np.ndarray],
    rounding: str,
    first: int,
    rows: int,
) -> np.ndarray:
    return protocols.to_bytes(decode(draw(params, rows, steps, first)), rounding)


def _count(setting: Setting, found: sources.ImageSource, source: str) -> int:
    count = setting.count or len(found)
    if count > len(found):
        raise DmfError(f"--count={count}: expected at most the {len(found)} images of {source}")
    return count


def _reader(source: sources.ImageSource, size: int) -> Callable[[int, int], np.ndarray]:
    pool = ThreadPoolExecutor(READERS)

    def one(i: int) -> np.ndarray:
        image = source.read(i)
        return sources.center_crop(image, size) if size else image

    shape = one(0).shape

    def images(first: int, rows: int) -> np.ndarray:
        found = list(pool.map(one, range(first, first + rows)))
        for i, image in enumerate(found):
            if image.shape != shape:
                raise DmfError(
                    f"{source.about['name']}: image {first + i} is {image.shape}, image 0 is {shape}: expected "
                    "one size for all, or --size for a centre crop"
                )
        return np.stack(found)

    return images


def labels_of_run(config: Config, train: data.Source) -> np.ndarray:
    """Labels of the samples that a run draws, (N,) int32: by its protocol, else the data's, or of latents each class in turn.

    Stored latents may be sorted by class: the labels of a few of them are no sample of all.
    """
    if config.run.protocol:
        protocol = replace(protocols.load(config.run.protocol), count=config.run.score_samples)
        return _labels(protocol, config, train.labels)
    if not train.mixed and config.num_classes:
        return np.arange(config.num_classes, dtype=np.int32)
    return train.labels


def _labels(
    protocol: Protocol, config: Config, found: data.DataConfig | np.ndarray | None
) -> np.ndarray:
    """Labels of the samples in their order, (N,) int32, by the protocol's rule; found: those of the data, or their config."""
    classes, rule = config.num_classes, protocol.labels
    if not classes:
        return np.zeros(1, np.int32)
    if rule == "balanced":
        return np.arange(classes, dtype=np.int32)
    if rule == "uniform":
        return (
            np.random.RandomState(config.seed).randint(0, classes, protocol.count).astype(np.int32)
        )
    if found is None:
        raise DmfError(
            f"protocol {protocol.name} takes its labels from the training data, and a converted checkpoint has none: expected "
            "a protocol with labels = 'uniform' or 'balanced'"
        )
    return found if isinstance(found, np.ndarray) else data.load(found, "train").labels


def _guidance(config: Config, converted: bool) -> str:
    """Guidance that training put into the weights, as far as their config tells; none is added when sampling."""
    if converted:
        return "none added; whether the converted weights hold some is not known"
    stages = [i for i, kind in enumerate(config.curriculum.kinds) if kind_of(kind).guided]
    if not stages:
        return "none" + f"; started from {config.init}" * bool(config.init)
    g = config.guidance
    return f"in the weights from stage {stages[0]} on: omega {g.omega:g}, kappa {g.kappa:g}, t in [{g.t_start:g}, {g.t_end:g}]"


def _identity(judge: Judge) -> dict[str, Any]:
    return {
        "protocol": asdict(judge.protocol),
        "full_count": judge.full_count,
        "features": judge.extract.about,
        "reference": dict(judge.reference.about),
    }
