"""`--mode=sample`: samples of a checkpoint as a picture grid, as single PNGs, or as an .npz."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dmf import data, pretrained, sharding
from dmf.config import Config
from dmf.data import latents
from dmf.errors import DmfError, short
from dmf.evaluation import pictures, protocols, sampling
from dmf.logging import Count
from dmf.method.curriculum import build_stages
from dmf.method.guidance import Contrast, tells
from dmf.method.objectives import kind_of
from dmf.method.samplers import SAMPLERS, TIMES
from dmf.pretrained import Opened
from dmf.storage import atomic, paths
from dmf.storage.manifest import step_of

ROUNDING = "round_127.5"  # of single images: the rule that returns the bytes of x = b / 127.5 - 1
SAME = 1e-5  # by which rounding may change a velocity that does not read r
Images = Callable[[int], Iterator[np.ndarray]]  # number of steps -> samples, some at a time


@dataclass(frozen=True)
class Choice:
    """What a user may choose of the samples; the defaults are the run's own.

    sampler: a key of SAMPLERS, "" for the run's own.
    seed: of the noise, None for the run's own.
    labels: classes, in turn; () for those of the training data.
    guidance: None for none.
    times: a key of TIMES.
    vae: directory of the converted autoencoder that makes images of latents.
    raw: leaves latents as they are, and an .npz unrounded.
    """

    sampler: str = ""
    seed: int | None = None
    labels: tuple[int, ...] = ()
    guidance: Contrast | None = None
    times: str = "uniform"
    vae: str = ""
    raw: bool = False


def write_samples(
    path: str | Path,
    steps: Sequence[int],
    count: int,
    out: str = "",
    ema: float | None = None,
    choice: Choice = Choice(),
) -> Path:
    """Draws `count` samples of a checkpoint at each number of steps, from one noise.

    Args:
        path, ema: as for `pretrained.load`.
        out: a .png for a grid, an .npz, or a new folder for single PNGs. The last two take one
            number of steps. "" is a grid in the work directory or beside a converted checkpoint.

    Raises DmfError on bad input, or where the place cannot be written.
    """
    _check_out(out, steps, choice)
    found = pretrained.open_weights(path, ema)
    config = sampling.config_of(path, found.stored, choice.sampler, choice.seed)
    shape, mesh = tuple(found.stored["image_shape"]), sharding.make_mesh()
    if not choice.raw:
        sampling.check_images(shape, choice.vae, ", or --raw for latents as they are")
    decode = sampling.make_decoder(choice.vae, shape, mesh, found.stored.get("data"))
    labels = labels_of(found, config, choice.labels)
    if choice.guidance:
        check_guidance(found, config, choice.guidance)
    drawn = sampling.Sampler(
        found.network, config, shape, labels, mesh, choice.guidance, TIMES[choice.times]
    )
    counter, done = Count("samples", count * len(steps), "images"), 0

    def images(n: int) -> Iterator[np.ndarray]:
        nonlocal done
        for x in map(decode, drawn.pieces(found.params, count, n)):
            protocols.check_finite(x)
            done += len(x)
            counter.show(done)
            yield x

    name = f"samples_{config.run.sampler}_{'_'.join(map(str, steps))}.png"
    target = paths.at(out or sampling.home(found.folder, found.stored) / name)
    _write(target, images, steps, count, choice.raw)
    twice = choice.guidance and not tells(config.network)
    each = SAMPLERS[config.run.sampler].evaluations * (2 if twice else 1)
    print(f"samples   {target}: {count:,} images, NFE {', '.join(str(n * each) for n in steps)}")
    return target


def _check_out(out: str, steps: Sequence[int], choice: Choice) -> None:
    """Raises DmfError where the form of `out` cannot hold what is asked for."""
    if choice.raw and choice.vae:
        raise DmfError(f"--raw with --vae={choice.vae}: expected one of them")
    suffix = Path(out).suffix if out else ".png"
    if suffix == ".png":
        return
    if len(steps) > 1:
        given = ",".join(map(str, steps))
        raise DmfError(f"--steps={given} with --out={out}: expected one number, or a .png")
    if not suffix:
        if choice.raw:
            raise DmfError(f"--raw with --out={out}: expected an .npz or a .png for raw samples")
        paths.check_free(Path(out))


def labels_of(found: Opened, config: Config, chosen: tuple[int, ...]) -> np.ndarray:
    """The labels of the samples in their order, repeated as often as needed."""
    classes = config.num_classes
    if chosen and not classes:
        raise DmfError(f"--labels={','.join(map(str, chosen))}: the model has no classes")
    if wrong := [label for label in chosen if label > classes]:
        raise DmfError(
            f"--labels: {wrong[0]} is no class; expected 0 to {classes - 1}, or {classes} for none"
        )
    if chosen:
        return np.array(chosen, np.int32)
    # Converted weights have no data at hand, and latents are too large to read for their labels.
    in_turn = pretrained.is_converted(found.stored) or config.data.name in latents.MOCKS
    if not classes or in_turn:
        return np.arange(max(classes, 1), dtype=np.int32)
    return data.load(config.data, "train").labels


def check_guidance(found: Opened, config: Config, by: Contrast) -> None:
    """Raises DmfError where a contrast of classes makes no sense of these weights."""
    given = f"--guidance={by.scale:g}"
    if not config.num_classes:
        raise DmfError(f"{given}: the model has no classes; expected a class-conditional one")
    if by.channels > found.stored["image_shape"][-1]:
        channels = found.stored["image_shape"][-1]
        raise DmfError(f"--guidance_channels={by.channels}: expected at most {channels}")
    kinds = _begun(found, config)
    if tells(config.network):
        if by.channels or by.scale < 1:
            raise DmfError(
                f"{given}: these weights are told their guidance: expected a scale of at least 1 "
                "and no --guidance_channels"
            )
        if kinds and not config.guidance.told:
            raise DmfError(
                f"{given}: config.guidance.most = 1, so these weights were told no guidance in "
                "training; expected no --guidance"
            )
        return
    if any(kind_of(kind).guided for kind in kinds):
        g = config.guidance
        raise DmfError(
            f"{given}: guidance (omega {g.omega:g}, kappa {g.kappa:g}) was trained into these "
            "weights; expected no --guidance"
        )
    if kinds and not config.label_dropout and not config.init:
        raise DmfError(
            f"{given}: config.label_dropout = 0, so nothing was trained without class; expected "
            "a model that was"
        )
    if not kinds and _reads_r(found):
        raise DmfError(
            f"{given}: these weights give an average velocity, with any guidance trained into it; "
            "expected no --guidance, or a flow model"
        )
    averages = any(kind_of(kind).arithmetic != "plain" for kind in kinds)
    if averages and SAMPLERS[config.run.sampler].averages:
        raise DmfError(
            f"{given}: a contrast of average velocities is no average of the guided velocity; "
            "expected --sampler=euler or heun"
        )


def _begun(found: Opened, config: Config) -> tuple[str, ...]:
    """Kinds of the stages that a run's checkpoint has begun; () of converted weights."""
    step = step_of(found.folder.name)
    if pretrained.is_converted(found.stored) or step is None:
        return ()
    size = (found.stored.get("data") or {}).get("count")
    stages = build_stages(config.curriculum, config.batch_size, size or config.batch_size)
    return tuple(stage.kind for stage in stages if stage.first < step)


def _reads_r(found: Opened) -> bool:
    """Whether u(z, r, t) differs between r = t and r = 0, as it does for an average velocity."""
    z = jnp.asarray(np.random.default_rng(0).standard_normal((1, *found.stored["image_shape"])))
    z, t, label = z.astype(jnp.float32), jnp.ones(1), jnp.zeros(1, jnp.int32)
    u = partial(found.network.apply, found.params, z, label=label)
    v, average = u(t, t), u(jnp.zeros(1), t)
    return float(jnp.linalg.norm(v - average)) > SAME * float(jnp.linalg.norm(v))


def _write(target: Path, images: Images, steps: Sequence[int], count: int, raw: bool) -> None:
    """Writes the samples in the form that the ending of `target` names, whole or not at all."""
    try:
        if target.suffix == ".png":
            grids = {
                f"{n} step{'s' * (n > 1)}": np.concatenate(
                    [pictures.pixels_of(x) for x in images(n)]
                )
                for n in steps
            }
            pictures.panels(target, grids, math.isqrt(count - 1) + 1)
            return
        with atomic.made(target) as partial:
            if target.suffix == ".npz":
                _write_npz(partial, images(steps[0]), count, raw)
            else:
                partial.mkdir()
                _write_folder(partial, images(steps[0]))
    except OSError as error:
        why = error.strerror or short(error)
        raise DmfError(
            f"{target} cannot be written: {why}; expected a writable place with room, such as one "
            "by --out"
        ) from error


def _write_npz(path: Path, images: Iterator[np.ndarray], count: int, raw: bool) -> None:
    """arr_0 (N, H, W, C): uint8, or the samples as float32. One part at a time is in memory."""
    with (
        zipfile.ZipFile(path, "w") as archive,
        # Its size is not known before. Without zip64, 2 GiB of samples would be lost at the end.
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        for i, x in enumerate(images):
            part = x.astype(np.float32) if raw else protocols.to_bytes(x, ROUNDING)
            if i == 0:
                header: dict[str, Any] = {
                    "descr": np.lib.format.dtype_to_descr(part.dtype),
                    "fortran_order": False,
                    "shape": (count, *part.shape[1:]),
                }
                np.lib.format.write_array_header_1_0(file, header)
            file.write(part.tobytes())


def _write_folder(folder: Path, images: Iterator[np.ndarray]) -> None:
    """000000.png, 000001.png, ..., in the order of the samples."""
    done = 0
    for x in images:
        for image in protocols.to_bytes(x, ROUNDING):
            pictures.single(folder / f"{done:06}.png", image)
            done += 1
