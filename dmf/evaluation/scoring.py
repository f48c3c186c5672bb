"""The commands that score by a protocol: checkpoints, image files; and the making of references.

    images in parts of PART -> features -> sums in float64 (`evaluation.totals`) -> scores

The scores of a running model are in `evaluation.boundary`. A part is the same images in the same
order on any number of devices. Its sums are kept on disk: an interrupted command goes on from them
and ends in the same scores. Everything that a number depends on is printed and stored with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dmf import pretrained, sharding
from dmf.config import Config
from dmf.data import images as sources
from dmf.errors import DmfError, printable
from dmf.evaluation import protocols, reference, sampling
from dmf.evaluation.features import Extractor
from dmf.evaluation.judge import Judge, Setting, accumulate
from dmf.evaluation.protocols import Protocol
from dmf.evaluation.reference import Reference
from dmf.evaluation.results import Progress, Results, free_name
from dmf.evaluation.totals import Totals
from dmf.method.objectives import kind_of
from dmf.storage import checkpoint, paths
from dmf.storage.paths import sha256

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
    """Scores a checkpoint by a protocol, one row for each EMA and number of sampling steps.

    The rows are printed and written as JSON. Rows that the file holds already are not made again.

    Args:
        path, emas, sampler, vae: as for `draw.write_samples`.
        seed: of noise and drawn labels, None for the run's own.
        out: the JSON file, "" for one beside the checkpoint. If that is in a bucket, the file
            goes into the current directory.

    Raises DmfError on bad input.
    """
    mesh = sharding.make_mesh()
    judge = Judge(setting, mesh)
    # At once, as the run may remove the folder.
    folder, stored, network, params, manifest = pretrained.open_weights(path, emas[0])
    config = sampling.config_of(path, stored, sampler, seed)
    shape = tuple(stored["image_shape"])
    sampling.check_images(shape, vae)
    decode = sampling.make_decoder(vae, shape, mesh, stored.get("data"))
    judge.announce()
    converted = pretrained.is_converted(stored)
    labels = sampling.labels_by(judge.protocol, config, None if converted else config.data)
    results = Results(
        Path(out) if out else _beside(folder, stored, config, judge),
        {**_identity(folder, manifest, config, vae, converted), **judge.identity()},
    )
    draw = sampling.Sampler(network, config, shape, labels, mesh)
    for i, ema in enumerate(emas):
        if i:
            params = pretrained.load_folder(folder, stored, ema)[1]
        half_life = config.ema.evaluate if ema is None else ema
        for n in steps:
            nfe = n * sampling.evaluations(config.run.sampler)
            row = {"ema_halflife_images": half_life, "steps": n, "nfe": nfe}
            images = partial(_samples, draw, params, n, decode, judge.protocol.rounding)
            results.add(row, judge, images)
    return results.finish()


def _beside(folder: Path, stored: dict[str, Any], config: Config, judge: Judge) -> Path:
    """The usual file of scores, beside the checkpoint."""
    named = (judge.protocol.name, folder.name, config.run.sampler, f"seed{config.seed}")
    beside = sampling.home(folder, stored)
    if paths.is_bucket(beside):  # unfinished sums are mapped and locked files, on a disk
        beside = Path()
    return beside / f"scores_{free_name('_'.join(map(str, named)))}.json"


def _identity(
    folder: Path, manifest: str, config: Config, vae: str, converted: bool
) -> dict[str, Any]:
    """What the samples of a checkpoint depend on, as plain values."""
    decoder = pretrained.open_folder(vae)[0] / checkpoint.MANIFEST if vae else None
    return {
        "checkpoint": {
            "folder": folder.name,
            "manifest_sha256": manifest,
        },
        "autoencoder": sha256(decoder) if decoder else "none",
        "sampler": config.run.sampler,
        "seed": config.seed,
        "compute_dtype": config.compute_dtype,
        "guidance": _guidance(config, converted),
    }


def self_check(setting: Setting) -> None:
    """Compares a protocol's features on this device with known answers, and prints the outcome.

    Raises DmfError where they differ.
    """
    found = protocols.load(setting.protocol)
    extract = Extractor(found, setting.features, sharding.make_mesh())
    print(f"protocol  {protocols.describe(found)}\n{extract.self_check()}")
    if setting.reference:
        stored = reference.read(setting.reference, found.space, images=False)
        reference.check(stored, found, extract.about["network_sha256"], extract.dims())
        name = printable(f"{stored.about.get('file')}")
        print(f"reference {name}: readable, and nothing in it contradicts the protocol")


def score_images(
    source: str, setting: Setting, out: str, data_dir: str = "", split: str = "train"
) -> list[dict[str, Any]]:
    """Scores image files by a protocol, all of them or the first `setting.count`.

    source, data_dir, split: as for `data.images.open_images`.
    out: the JSON file, "" for one in the current directory. Raises DmfError on bad input.
    """
    found = sources.open_images(source, data_dir, split)
    count = _count(setting, found, source)
    judge = Judge(replace(setting, count=count), sharding.make_mesh())
    found.announce()
    judge.announce()
    path = Path(out or f"scores_{free_name(judge.protocol.name)}_{free_name(source)}.json")
    results = Results(path, {"images": found.about, **judge.identity()})
    results.add({"images": source}, judge, _reader(found, 0, "one size for all"))
    found.tell_orientations()
    return results.finish()


def make_reference(
    source: str, setting: Setting, out: str, data_dir: str = "", split: str = "train", size: int = 0
) -> Reference:
    """Writes the statistics of images as a protocol's reference to `out`.

    The file records everything that went into them. source, data_dir, split: as for
    `data.images.open_images`. size: of a centre crop by ADM's rule, 0 for images as they are.
    Raises DmfError on bad input.
    """
    protocol = protocols.load(setting.protocol)
    path = Path(out)
    found = sources.open_images(source, data_dir, split)
    count = _count(setting, found, source)
    _check_reference(protocol, source, count, out)
    found.announce()
    extract = Extractor(protocol, setting.features, sharding.make_mesh())
    print(f"protocol  {protocols.describe(protocol)}\n{extract.self_check()}", flush=True)
    metrics = tuple(m for m in ("fid", "sfid") if m == "fid" or m in protocol.metrics)
    keep = np.unique(
        np.linspace(0, count - 1, min(count, protocol.reference_images)).astype(np.int64)
    )
    depends_on = {
        "source": found.about,
        "count": count,
        "size": size,
        "protocol": asdict(protocol),
        **extract.about,
    }
    progress = Progress(path, depends_on)
    totals = Totals(replace(protocol, metrics=metrics), count, progress.folder({}), keep)
    totals.restore()
    accumulate(
        totals,
        _reader(found, size, "one size for all, or --size for a centre crop"),
        extract,
        "reference",
    )
    found.tell_orientations()
    about = _about(found, count, size, extract)
    reference.write(path, totals.reference(about))
    progress.end()
    print(f"reference {path}, {count:,} images")
    return reference.read(path, protocol.space)


def _check_reference(protocol: Protocol, source: str, count: int, out: str) -> None:
    """Raises DmfError where no reference of so many images can be written to `out`."""
    path = Path(out)
    if path.suffix != ".npz" or path.is_dir():
        raise DmfError(f"--out={out}: expected a file name ending in .npz")
    if protocol.reference_count not in (0, count):
        raise DmfError(
            f"{source}: {count:,} images, expected the {protocol.reference_count:,} of protocol "
            f"{protocol.name} ({protocol.reference}); for others, write a protocol with another "
            "reference_count"
        )


def _about(
    found: sources.ImageSource, count: int, size: int, extract: Extractor
) -> dict[str, str | int]:
    """What a reference records of the way it was made."""
    crop = {"crop": f"{size}: {sources.CROP_RULE}"} if size else {}
    kept = ("space", "resize", "scaling", "network_sha256")
    return {
        **{key: extract.about[key] for key in kept},
        "dataset": str(found.about["name"]),
        "split": str(found.about["split"]),
        "count": count,
        "made_from": json.dumps({**found.about, **crop}, sort_keys=True),
        **({"classes": json.dumps(found.classes)} if found.classes else {}),
    }


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


def _reader(
    source: sources.ImageSource, size: int, expected: str
) -> Callable[[int, int], np.ndarray]:
    """Images (first, rows) of a source, cut to a square of `size` unless that is 0."""
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
                    f"{source.about['name']}: image {first + i} is {image.shape}, image 0 is "
                    f"{shape}: expected {expected}"
                )
        return np.stack(found)

    return images


def _guidance(config: Config, converted: bool) -> str:
    """The guidance that training put into the weights, as far as their config tells.

    Sampling adds none.
    """
    if converted:
        return "none added; whether the converted weights hold some is not known"
    stages = [i for i, kind in enumerate(config.curriculum.kinds) if kind_of(kind).guided]
    if not stages:
        return "none" + f"; started from {config.init}" * bool(config.init)
    g = config.guidance
    return (
        f"in the weights from stage {stages[0]} on: omega {g.omega:g}, kappa {g.kappa:g}, "
        f"t in [{g.t_start:g}, {g.t_end:g}]"
    )
