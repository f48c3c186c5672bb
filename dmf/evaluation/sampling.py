"""Samples and scores of weights, at several numbers of steps from the same noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dmf import data, networks, pretrained, sharding
from dmf.config import Config, parse
from dmf.data import Source
from dmf.errors import DmfError
from dmf.evaluation.protocols import Protocol
from dmf.method.flow import Condition
from dmf.method.guidance import Contrast, condition_of, contrast, tells
from dmf.method.keys import SAMPLES, keys_of, noise_of
from dmf.method.samplers import SAMPLERS, Times, Velocity, uniform
from dmf.metrics.labelled import DigitsScorer, PhotosScorer
from dmf.networks.every import AUTOENCODERS
from dmf.networks.frozen.vae import unscaled
from dmf.storage import paths

ROWS_PER_DEVICE = 128  # of samples drawn at once
DECODED_PER_DEVICE = 8  # of latents decoded at once
# (parameters, number of steps, seed) of a call.
Whole = tuple[Any, Any, Any]
Score = Callable[[np.ndarray, np.ndarray], dict[str, float]]
# Data set -> (what scores its samples, its main score). A set without an entry is only pictured.
SCORERS = {"digits": (DigitsScorer, "fd_hidden"), "photos": (PhotosScorer, "fd_hidden")}


class Sampler:
    """Draws samples from weights. The seed alone decides the noise and the labels.

    They are the same for all weights and numbers of steps. Each sample has its own random key, and
    each device takes the same number of rows at a time. So the number of devices changes no bit of
    a sample. How many samples are drawn at once changes them by rounding only.
    """

    def __init__(
        self,
        network: networks.Network,
        config: Config,
        image_shape: tuple[int, ...],
        labels: np.ndarray,
        mesh: Mesh,
        guidance: Contrast | None = None,
        times: Times = uniform,
        purpose: int = SAMPLES,
    ):
        """labels: (N,) int32, of the samples in their order, repeated as often as needed.

        guidance: of a flow model with classes; each evaluation then costs two. A network that is
            told its guidance costs one, and None is the config's guidance.
        times: a value of `samplers.TIMES`. purpose: of the noise, as `keys.keys_of` takes it.
        """
        self._mesh, self._labels, self._seed = mesh, labels, np.uint32(config.seed)
        contrasts = guidance if not tells(config.network) else None
        self._rows = ROWS_PER_DEVICE // 2 if contrasts else ROWS_PER_DEVICE
        given = partial(condition_of, config.network, by=guidance or config.guidance)
        sampler = SAMPLERS[config.run.sampler]

        def noise(seed: jax.Array, row: jax.Array) -> jax.Array:
            return noise_of(keys_of(seed, row, purpose), image_shape)

        velocity = partial(_velocity, network, config.num_classes, contrasts, given)

        def draw(whole: Whole, rows: tuple[jax.Array, jax.Array]) -> jax.Array:
            (params, steps, seed), (row, label) = whole, rows
            u, keys = velocity(params, label), keys_of(seed, row, purpose)
            more = {"keys": keys} if sampler.fresh_noise else {}
            return sampler.draw(u, noise(seed, row), steps, times, **more)

        def draw_on_host(whole: Whole, rows: tuple[jax.Array, jax.Array]) -> jax.Array:
            (params, steps, seed), (row, label) = whole, rows
            u = partial(evaluate, params, label)
            return sampler.draw(u, start(seed, row), int(steps), times)

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            precise = jax.default_matmul_precision("highest")(function)
            return sharding.per_device(mesh, precise)

        program = compiled(lambda params, rows: velocity(params, rows[0])(*rows[1:]))
        start = compiled(noise)

        def evaluate(params: Any, label: jax.Array, *at: jax.Array) -> jax.Array:
            return program(params, (label, *at))

        self._draw, self._start = draw_on_host if sampler.on_host else compiled(draw), start

    @property
    def rows(self) -> int:
        """How many samples the devices draw at once."""
        return self._rows * self._mesh.devices.size

    def labels(self, count: int) -> np.ndarray:
        """(count,) int32: the given labels in their order, each as often as there."""
        return np.resize(self._labels, count)

    def labels_at(self, row: np.ndarray) -> np.ndarray:
        """(n,) int32: the labels of the samples with these numbers (n,)."""
        return self._labels[row % len(self._labels)]

    def __call__(self, params: Any, count: int, steps: int, first: int = 0) -> np.ndarray:
        """Samples first .. first + count - 1, (count, H, W, C) float32.

        steps: of the config's sampler.
        """
        return np.concatenate([*self.pieces(params, count, steps, first)])

    def pieces(self, params: Any, count: int, steps: int, first: int = 0) -> Iterator[np.ndarray]:
        """The samples of a call, as many at a time as the devices draw at once."""
        for _, drawn in self._pieces(params, count, steps, first, False):
            yield drawn

    def pairs(
        self, params: Any, count: int, steps: int, first: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(noise, samples) of a call, as `pieces`. The devices work on while a piece is used."""
        return self._pieces(params, count, steps, first, True)

    def _pieces(
        self, params: Any, count: int, steps: int, first: int, noise: bool
    ) -> Iterator[tuple[Any, np.ndarray]]:
        per_device, waiting = min(self._rows, count), None
        for piece in sharding.in_pieces(self._mesh, count, per_device):
            row = np.arange(first + piece.start, first + piece.stop, dtype=np.int32)
            rows = (row, self.labels_at(row))
            put = sharding.put_padded(self._mesh, per_device, rows)
            start = self._start(self._seed, put[0]) if noise else ()
            drawn = start, self._draw((params, np.int32(steps), self._seed), put)
            if waiting:
                yield self._fetched(*waiting)
            waiting = drawn, len(row)
        if waiting:
            yield self._fetched(*waiting)

    def _fetched(self, drawn: Any, count: int) -> Any:
        return jax.tree.map(lambda x: x[:count], sharding.fetch(self._mesh, drawn))


def _velocity(
    network: networks.Network,
    classes: int,
    guidance: Contrast | None,
    given: Callable[[jax.Array], Condition],
    params: Any,
    label: jax.Array,
) -> Velocity:
    """u(z, r, t), or the guided velocity by one evaluation of twice the rows."""
    if guidance is None:
        condition = given(label)
        return lambda z, r, t: network.apply(params, z, r, t, condition=condition)
    labels = jnp.concatenate([label, jnp.full_like(label, classes)])

    def guided(z: jax.Array, r: jax.Array, t: jax.Array) -> jax.Array:
        twice = (jnp.concatenate([x, x]) for x in (z, r, t))
        v_c, v_u = jnp.split(network.apply(params, *twice, label=labels), 2)
        return contrast(v_c, v_u, t, guidance)

    return guided


def evaluations(sampler: str) -> int:
    """Evaluations of the network per step of a sampler: NFE = steps times this."""
    return SAMPLERS[sampler].evaluations


def make_scorer(config: data.DataConfig, train: Source) -> tuple[Any, str] | None:
    """(scorer, name of its main score) of a data set; None where samples are only pictured.

    Samples of a run on pairs are compared with the data behind them.
    """
    behind = data.behind(config)
    if behind.name not in SCORERS:
        return None
    scorer, main = SCORERS[behind.name]
    if behind is not config:
        config, train = behind, data.load(behind, "train")
    sets = [data.whole(source) for source in (train, data.load(config, "heldout"))]
    return scorer(*(found[name] for found in sets for name in ("x", "label"))), main


def score(
    sampler: Sampler, scorer: Score, params: Any, count: int, steps: Sequence[int]
) -> list[dict[str, float]]:
    """One row of scores per number of sampling steps, from the same noise."""
    return [{"nfe": n, **scorer(sampler(params, count, n), sampler.labels(count))} for n in steps]


def format_scores(rows: Sequence[dict[str, Any]], floor: Mapping[str, float]) -> str:
    """Scores as a printed table, one row per number of steps. floor: what real images score."""
    hidden = ("nfe", "n_samples", "step", "stage", "kind", "scored_by")
    wide = {k: max(len(k), 8) + 2 for k in rows[0] if k not in hidden}
    lines = [f"{'steps':>6}" + "".join(f"{k:>{width}}" for k, width in wide.items())]
    lines += [
        f"{row['nfe']:>6}" + "".join(f"{row[k]:>{width}.3f}" for k, width in wide.items())
        for row in rows
    ]
    real = {k: f"{floor[k]:.3f}" if k in floor else "-" for k in wide}
    lines.append(f"{'real':>6}" + "".join(f"{real[k]:>{width}}" for k, width in wide.items()))
    return "\n".join(lines)


def labels_by(
    protocol: Protocol, config: Config, found: data.DataConfig | np.ndarray | None
) -> np.ndarray:
    """Labels of the samples in their order, (N,) int32, by the protocol's rule.

    found: labels of the training data, or the config of these data; None where there are none.
    """
    classes, rule = config.num_classes, protocol.labels
    if not classes:
        return np.zeros(1, np.int32)
    if rule == "balanced":
        return np.arange(classes, dtype=np.int32)
    if rule == "uniform":
        random = np.random.RandomState(config.seed)
        return random.randint(0, classes, protocol.count).astype(np.int32)
    if found is None:
        raise DmfError(
            f"protocol {protocol.name} takes its labels from the training data, and a converted "
            "checkpoint has none: expected a protocol with labels = 'uniform' or 'balanced'"
        )
    return found if isinstance(found, np.ndarray) else data.load(found, "train").labels


def check_images(shape: tuple[int, ...], vae: str, hint: str = "") -> None:
    """Raises DmfError where samples are latents and no autoencoder can make images of them."""
    if shape[-1] not in (1, 3) and not vae:
        raise DmfError(
            f"samples of shape {shape} are latents, and no autoencoder is given (--vae, "
            f"config.run.vae): expected one, in the directory of its conversion{hint}"
        )


def home(folder: Path, stored: dict[str, Any]) -> Path:
    """Where files about a checkpoint go: its work directory, or beside converted weights."""
    return folder.parent if pretrained.is_converted(stored) else folder.parent.parent


def write_scores(
    path: str | Path,
    steps: Sequence[int],
    count: int,
    sampler: str = "",
    out: str = "",
    ema: float | None = None,
) -> list[dict[str, float]]:
    """Scores a checkpoint at each number of steps and prints the table; returns its rows.

    count: of samples, 0 for the run's own number. sampler, ema: as for `draw.write_samples`.
    out: the JSON file, "" for none. Raises DmfError on bad input.
    """
    checkpoint = pretrained.open_weights(path, ema)
    config = config_of(path, checkpoint.stored, sampler)
    if pretrained.is_converted(checkpoint.stored):
        raise DmfError(
            f"checkpoint {path} holds converted weights, without data to score against: expected "
            "a run's"
        )
    train = data.load(config.data, "train")
    found = make_scorer(config.data, train)
    if found is None:
        raise DmfError(
            f"config.data.name = {config.data.name!r} has no score: expected one of "
            f"{', '.join(SCORERS)}"
        )
    shape, mesh = tuple(checkpoint.stored["image_shape"]), sharding.make_mesh()
    draw = Sampler(checkpoint.network, config, shape, train.labels, mesh)
    rows = score(
        draw, found[0], checkpoint.params, count or config.run.score_samples or 2000, steps
    )
    print(format_scores(rows, found[0].floor))
    if out:
        paths.write(paths.at(out), json.dumps(rows, indent=1) + "\n")
    return rows


def config_of(
    path: str | Path, stored: dict[str, Any], sampler: str = "", seed: int | None = None
) -> Config:
    """The config of a checkpoint with another sampler and seed, where they are given.

    Raises DmfError where the checkpoint holds no flow model or generator.
    """
    if "config" not in stored:
        raise DmfError(
            f"checkpoint {path} holds a {stored['network']['kind']}: expected a flow model or a "
            "generator"
        )
    config = parse(stored["config"])
    run = replace(config.run, sampler=sampler or config.run.sampler)
    return replace(config, run=run, seed=config.seed if seed is None else seed)


def make_decoder(
    path: str, image_shape: tuple[int, ...], mesh: Mesh, trained_on: dict[str, Any] | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """A function that makes images (N, H, W, C) of samples, which may be latents.

    Args:
        path: directory of the converted autoencoder, "" for samples that are images.
        trained_on: `data.identity` of the model's training latents, where it is known.

    Raises DmfError where the autoencoder does not fit them.
    """
    if not path:
        return lambda x: x
    folder, stored = pretrained.open_folder(path)
    config, _ = pretrained.described(stored)
    if config.kind not in AUTOENCODERS or config.latent_channels != image_shape[-1]:
        raise DmfError(
            f"--vae={path}: holds a {config.kind}; expected an autoencoder of "
            f"{image_shape[-1]}-channel latents"
        )
    config.latent_shape(config.factor * image_shape[0])  # some have one size alone
    network, params = pretrained.load_folder(folder, stored)
    _compare_latents(path, stored, network, trained_on or {})

    def decode(params: Any, z: jax.Array) -> jax.Array:
        return network.decode(params, unscaled(z, network.scale, network.shift))

    run = sharding.per_device(mesh, jax.default_matmul_precision("highest")(decode))

    def images(x: np.ndarray) -> np.ndarray:
        pieces = sharding.in_pieces(mesh, len(x), DECODED_PER_DEVICE)
        found = [
            sharding.fetch(mesh, run(params, sharding.put_padded(mesh, DECODED_PER_DEVICE, x[p])))
            for p in pieces
        ]
        return np.concatenate([y[: p.stop - p.start] for p, y in zip(pieces, found, strict=True)])

    return images


def _compare_latents(
    path: str, stored: dict[str, Any], network: Any, trained_on: dict[str, Any]
) -> None:
    """Raises DmfError where an autoencoder scales latents otherwise than in training.

    It warns of one from another file.
    """
    theirs = trained_on.get("vae", {}).get("sha256")
    mine = stored.get("source", {}).get("source", {}).get("sha256")
    known, ours = {"shift": 0.0, **trained_on}, (network.scale, network.shift)
    wanted = (known["scale"], known["shift"]) if "scale" in known else ours
    if wanted != ours:
        raise DmfError(
            f"--vae={path}: its latents have (scale, shift) = {ours}; expected {wanted}, as in "
            "training"
        )
    if theirs and theirs != mine:
        print(
            f"warning: the autoencoder {path} comes from another file than the training latents' "
            "autoencoder"
        )
