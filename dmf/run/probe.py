"""The probe: what a run measures of its weights, on the same held-out images, noise and times.

It changes no weight. Two sets of rows are drawn once per run. The `even` rows have intervals t - r
that are spread evenly over `EDGES`. The `law` rows have the times and the share of r < t of
training. Dropout and dropped labels are off. A probe gives:

    residual_border   mean e^2 per pixel of rows with r = t: flow matching on unseen images
    residual_0 ..     the same of rows with r < t, by interval; e is in its "unit" scale, so that
                      stages can be compared
    residual_pairs    the mean over all rows with r < t; residual_median: of the median row
    change            mean |u - u'| / |u|; of a jvp stage |(t - r) du/dt| / |u|
    change_ulps       change by the compute dtype's epsilon, of discrete stages
    ratio_0 ..        E<e, u - v> / E|e|^2 of discrete stages by interval: the factor by which
                      `dmf.method.intervals` would multiply rho
    consistency       how far apart one jump over (r, t) and two over its halves end, by the
                      length of the one jump; it needs no v
    gradient_ratio    norm of the gradient of the r < t rows by the norm of the r = t rows'
    gradient_cosine   cosine between the two gradients

The velocity of a single row is noisy, and so are residuals. They are compared only with
themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dmf import data, networks, sharding, step
from dmf.config import Config
from dmf.errors import DmfError
from dmf.method import flow, objectives, weights
from dmf.method.flow import Condition, Rows, RowSplit, expand
from dmf.method.objectives import KINDS

Array = jax.Array
EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the intervals t - r that a probe tells apart
KEY = 2**31 - 2  # neither a training step nor samples have this number


def jump_error(net: Callable[[Rows], Array], rows: Rows) -> Array:
    """How far apart one jump and two half jumps end; 0 for every true average velocity.

        |(t - r) u - (t - s) u_1 - (s - r) u_2| / |(t - r) u|
        s = (r + t) / 2,  u_1 = u(z, s, t),  u_2 = u(z - (t - s) u_1, r, s)

    This is the additivity of SplitMeanFlow,
    arXiv 2507.16884, along the network's own path, so the velocity of a row is not needed.
    rows: with r < t. Returns (B,).
    """
    s = (rows.r + rows.t) / 2
    half = expand(rows.t - s, rows.z)
    first = half * net(rows._replace(r=s))
    second = half * net(rows._replace(z=rows.z - first, t=s))
    whole = 2 * half * net(rows)
    return _norms(whole - first - second) / jnp.maximum(_norms(whole), objectives.TINY)


class Probe:
    """The probe of a run. Rows are drawn at first use; each kind of stage has one program."""

    def __init__(self, config: Config, train: data.Source, mesh: Mesh, place: Any):
        """train: the training data, whose held-out images are probed.

        A data set without held-out images is probed on training images; `source` tells which.
        place: where the parameters live, from `sharding.placed`.
        Raises DmfError where there are too few images.
        """
        dataset, self.source = data.held_out_or(train, config.data)
        self._config, self._mesh, self._place = config, mesh, place
        self._shape = dataset.image_shape
        per_device = max(-(-config.guard.rows // mesh.devices.size), 2)  # a row of either kind
        count = per_device * mesh.devices.size
        if len(dataset) < count:
            raise DmfError(
                f"config.guard.rows = {config.guard.rows} takes {count} images on "
                f"{mesh.devices.size} device(s): expected at most the {len(dataset)} "
                f"{self.source} ones"
            )
        self._images = data.batch(
            dataset, config.seed, 0, count, rows=sharding.local_rows(mesh, count)
        )
        share = config.times.r_neq_t_fraction if 0 < config.times.r_neq_t_fraction < 1 else 0.5
        pairs = min(max(round(share * per_device), 1), per_device - 1)
        self._split, self.rows = RowSplit(count, per_device, pairs), count
        self._programs: dict[str, Any] = {}

    @property
    def about(self) -> dict[str, Any]:
        """What a probe's numbers depend on besides the weights."""
        return {"rows": self.rows, "source": self.source}

    @cached_property
    def drawn(self) -> tuple[Rows, Rows]:
        """(even rows, law rows), which all probes of the run share."""
        return self._draw(sharding.put_rows(self._mesh, self._images))

    @cached_property
    def _draw(self) -> Any:
        draw = partial(_draw, config=self._config, split=self._split)
        return jax.jit(draw, out_shardings=sharding.rows(self._mesh))

    def __call__(self, kind: str, params: Any, rho: float) -> dict[str, float]:
        """The numbers of a stage of this kind at this rho. params: the weights that are trained."""
        found = self._program(kind)(params, *self.drawn, np.float32(rho))
        return {name: float(value) for name, value in jax.device_get(found).items()}

    def compile(self, kind: str, params: Any) -> None:
        """Compiles the program of a kind of stage. Nothing runs, so a thread may do it meanwhile.

        params: arrays, or their shapes and places.
        """
        place = sharding.rows(self._mesh)
        drawn = jax.eval_shape(self._draw, sharding.put_rows(self._mesh, self._images))
        rows = jax.tree.map(lambda x: x.update(sharding=place), drawn)
        self._program(kind).lower(params, *rows, np.float32(0)).compile()

    def _program(self, kind: str) -> Any:
        if kind not in self._programs:
            self._programs.setdefault(kind, self._jit(kind))  # two threads use the same one
        return self._programs[kind]

    def _jit(self, kind: str) -> Any:
        config, mesh = self._config, self._mesh
        network = step.network_for(kind, config, self._shape, mesh)
        probe = jax.default_matmul_precision(getattr(config.precision, KINDS[kind].arithmetic))(
            partial(_probe, kind=kind, network=network, config=config, split=self._split, mesh=mesh)
        )
        rows, whole = sharding.rows(mesh), sharding.replicated(mesh)
        given, options = (self._place, rows, rows, whole), sharding.compiler_options(mesh)
        return jax.jit(probe, in_shardings=given, out_shardings=whole, compiler_options=options)


def _draw(batch: dict[str, Array], *, config: Config, split: RowSplit) -> tuple[Rows, Rows]:
    """(even rows, law rows): the same images and noise at two sets of times."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), KEY), 4)
    x, label = batch["x"], batch["label"] if config.num_classes else None
    e = jax.random.normal(keys[0], x.shape)
    shares = (jnp.arange(split.batch) + jax.random.uniform(keys[1], (split.batch,))) / split.batch
    t_even = shares + (1 - shares) * jax.random.uniform(keys[2], (split.batch,))
    times = (
        (jnp.maximum(t_even - shares, 0), t_even),
        flow.draw_times(keys[3], config.times, split),
    )
    drawn = [(r, t, *flow.interpolate(x, e, t, config.path)) for r, t in times]
    even, law = (Rows(z, r, t, v, Condition(label=label)) for r, t, z, v in drawn)
    return even, law


def _probe(
    params: Any,
    even: Rows,
    law: Rows,
    rho: Array,
    *,
    kind: str,
    network: networks.Network,
    config: Config,
    split: RowSplit,
    mesh: Mesh,
) -> dict[str, Array]:
    whole = RowSplit(split.batch, split.group, split.group)
    config = _plain(config)
    unit = replace(config, loss=replace(config.loss, residual_scale="unit"))

    def net(rows: Rows) -> Array:
        return network.apply(params, rows.z, rows.r, rows.t, condition=rows.condition)

    _, found = step.stage_residuals(
        params, even, rho, kind=kind, network=network, config=unit, split=whole, train=False
    )
    border = even._replace(r=even.t)
    out = {
        "residual_border": jnp.mean(jnp.square(net(border) - border.v)),
        "consistency": jnp.mean(jump_error(net, even)),
    }
    if found.change is not None:
        out["change"] = found.change
        if KINDS[kind].steps_back:
            out["change_ulps"] = found.change / float(jnp.finfo(config.compute_dtype).eps)
    e = jnp.asarray(found.pairs)
    squares = jnp.mean(jnp.square(e), axis=tuple(range(1, e.ndim)))
    out |= {"residual_pairs": jnp.mean(squares), "residual_median": jnp.median(squares)}
    for i, part in enumerate(_by_interval(split.batch)):
        out[f"residual_{i}"] = jnp.mean(jnp.square(e[part]))
        if found.products is not None:
            dot, square = jnp.sum(found.products[part], axis=0)
            out[f"ratio_{i}"] = dot / jnp.maximum(square, objectives.TINY)
    return out | _gradients(
        params, law, rho, kind=kind, network=network, config=config, split=split, mesh=mesh
    )


def _gradients(params: Any, law: Rows, rho: Array, *, mesh: Mesh, **how: Any) -> dict[str, Array]:
    """Norm ratio and cosine of two gradients: the mean loss of r < t rows, and of r = t rows."""

    how["split"] = how["split"].micro(mesh.size)  # of one device

    def loss(params: Any, law: Rows, rho: Array, part: str) -> tuple[Array, None]:
        _, found = step.stage_residuals(params, law, rho, train=False, **how)
        config, split = how["config"], how["split"]
        r, t = (split.border_of if part == "border" else split.pairs_of)((law.r, law.t))
        e, weight = getattr(found, part), config.loss.of_row(config.times)
        share = found.share if part == "pairs" else None
        return jnp.mean(weights.weighted_loss(e, r, t, 0.0, weight, share)[0]), None

    def gradient(part: str) -> Any:
        grad = jax.grad(partial(loss, part=part), has_aux=True)
        return sharding.averaged(mesh, grad, how["network"].dtypes)(params, law, rho)[0]

    border, pairs = gradient("border"), gradient("pairs")
    norms = [step.global_norm(g)[0] for g in (border, pairs)]
    inner = jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, border, pairs))
    floor = objectives.TINY
    return {
        "gradient_ratio": norms[1] / jnp.maximum(norms[0], floor),
        "gradient_cosine": inner / jnp.maximum(norms[0] * norms[1], floor),
    }


def _plain(config: Config) -> Config:
    """The config without what a probe lacks: the table of an adaptive interval, and the EMAs."""
    rules = config.curriculum
    interval = "dagger" if rules.interval == "adaptive" else rules.interval
    return replace(
        config,
        curriculum=replace(rules, interval=interval),
        loss=replace(config.loss, tangent="data"),
    )


def _by_interval(count: int) -> list[slice]:
    """The even rows of each interval between two EDGES, which they are drawn in the order of."""
    return [
        slice(round(a * count), round(b * count)) for a, b in zip(EDGES, EDGES[1:], strict=False)
    ]


def _norms(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), tuple(range(1, x.ndim))))
