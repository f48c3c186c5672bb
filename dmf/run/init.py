"""The weights that a run starts from: those of config.init, with the classes of the run's data.

`find` opens and checks the start before anything is written. `weights` reads it. In between,
config.init_labels says what becomes of its label table:

    ""        nothing: the start has the classes of the data
    keep      class i stays class i; the data have the first classes of the start
    fresh     every class is drawn anew
    none      only the null class stays, and the network takes no class
    x.json    {"cat": 281, ...}: the start's class that each class of the data takes

A start whose interval branch is silent may go into a network of decoupled times, which has no such
branch. A head for the loss (network.logvar or velocity_head) that the start lacks starts afresh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dmf import data, networks, sharding
from dmf.config import INIT_HINT, Config, differences, parse
from dmf.errors import DmfError
from dmf.method import teacher
from dmf.storage import checkpoint, manifest, paths, records

TABLES = ("y_embedder", "map_label")  # the module of the label table, in a DiT and in a U-Net
Params = Any


class Init(NamedTuple):
    """The flow model that config.init names, and what becomes of its classes."""

    folder: Path  # of a step
    ema: int | None  # index of its average, for `checkpoint.read_params`
    origin: dict[str, Any] | None  # where its weights were converted from
    classes: int  # of its network
    rows: tuple[int, ...] | None  # its class for each of ours; None: drawn, or only the null class
    network: Any  # its network's config


def taught(config: Config, dataset: data.Source, mesh: Mesh, like: Params) -> tuple[Any, ...]:
    """(weights of config.teacher, what identifies them) on the mesh, () without a teacher.

    like: the run's weights, as shapes, types and places; a teacher has the same network.
    """
    if not config.taught:
        return ()
    if not (place := config.teacher.place or config.init):
        used = teacher.uses(config.loss, config.curriculum.kinds)[0]
        raise DmfError(
            f"config.teacher.place = '' with {used}: expected the checkpoint of a flow model, here "
            "or in config.init"
        )
    as_start = dataclasses.replace(config, init=place, init_labels="")

    def read(folder: Path) -> tuple[Any, dict[str, Any]]:
        found = opened(as_start, dataset, folder, "config.teacher.place")
        params = weights(as_start, found, dataset.image_shape, mesh, like, "config.teacher.place")
        return params, {"teacher": {"manifest_sha256": manifest.digest(folder)}}

    return manifest.read_newest(place, read)


def find(config: Config, dataset: data.Source) -> Init:
    """The flow model that config.init names.

    Raises DmfError where its network or its images are not the config's. Many such differences
    would not show in the shapes of the weights.
    """
    return manifest.read_newest(config.init, partial(opened, config, dataset))


def opened(config: Config, dataset: data.Source, folder: Path, key: str = "config.init") -> Init:
    """`find` of this step folder. key: of the field that names it, for messages."""
    stored = checkpoint.metadata(folder)
    if "config" not in stored:
        kind = stored["network"]["kind"]
        raise DmfError(f"{key} = {config.init}: holds a {kind}; expected a flow model")
    theirs = parse(stored["config"])
    old, new = dataclasses.asdict(theirs.network), dataclasses.asdict(config.network)
    routed = (old.get("time_routing"), new.get("time_routing")) == ("interval", "decoupled")
    for free in (*networks.FREE, *(("time_routing", "t_blocks") if routed else ())):
        if free in old:
            old[free] = new.get(free)
    if config.init_labels:
        old.pop("num_classes", None)
        new.pop("num_classes", None)
    if changed := differences(old, new, "config.network"):
        labels = any(d.startswith("config.network.num_classes:") for d in changed)
        labels &= key == "config.init"
        raise DmfError(
            f"{key} = {config.init}: its network differs: {'; '.join(changed)}; "
            f"expected the same network{f'; {INIT_HINT}' if labels else ''}"
        )
    if tuple(stored["image_shape"]) != dataset.image_shape:
        raise DmfError(
            f"{key} = {config.init}: its images are {tuple(stored['image_shape'])}; "
            f"expected {dataset.image_shape}, as in {config.data.name}"
        )
    rows = _rows(config, theirs.num_classes, dataset)
    origin, index = stored.get("source"), theirs.ema.index()
    return Init(folder, index, origin, theirs.num_classes, rows, theirs.network)


def weights(
    config: Config,
    init: Init,
    shape: tuple[int, ...],
    mesh: Mesh,
    like: Params,
    key: str = "config.init",
) -> Params:
    """The start's weights on the mesh, with the classes of the run.

    shape: of an image. like: the run's weights, as shapes, types and places. key: as for `opened`.
    """
    shapes = jax.eval_shape(networks.build(init.network, shape).init, jax.random.key(0))
    if not config.init_labels and set(shapes) == set(like):
        return checkpoint.read_params(init.folder, init.ema, like)
    old = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p),
        shapes,
        sharding.placed(mesh, shapes),
    )
    found = checkpoint.read_params(init.folder, init.ema, old)
    if "interval" in found and "interval" not in like:
        _check_silent(f"{key} = {config.init}", found["interval"])
    draw = networks.build(config.network, shape).init

    def change(found: Params) -> Params:
        new = draw(jax.random.key(config.seed))
        kept = {name: x for name, x in found.items() if name in (*new, *TABLES)}
        kept = {name: x for name, x in new.items() if networks.is_head(name)} | kept
        return relabelled(kept, new, init.rows) if config.init_labels else kept

    # One program, so that of the fresh weights only the table is drawn.
    return jax.jit(change, out_shardings=jax.tree.map(lambda x: x.sharding, like))(found)


def _check_silent(named: str, branch: Params) -> None:
    """Raises DmfError where the start's interval branch gives anything but zero."""

    def loud(last: Params) -> jax.Array:
        return jnp.any(jnp.stack([jnp.any(x != 0) for x in jax.tree.leaves(last)]))

    if jax.jit(loud)(branch.get("mlp_2", branch)):
        raise DmfError(
            f"{named}: its interval branch is not zero; expected a flow model, "
            "as a network with time_routing 'decoupled' has no such branch"
        )


def described(config: Config, init: Init) -> str:
    """What becomes of the start's classes, in words; "" where they stay as they are."""
    if not config.init_labels:
        return ""
    ways = {"keep": "kept", "fresh": "drawn anew", "none": "dropped"}
    how = ways.get(config.init_labels, f"taken as {config.init_labels} says")
    kept = "its null class is kept" if init.classes else "it has no null class: that row is zero"
    return f"init      {config.init}: {init.classes} classes to {config.num_classes}, {how}; {kept}"


def relabelled(params: Params, new: Params, rows: Sequence[int] | None) -> Params:
    """The weights of a start, with the label table of a run's own classes.

    params: of the start. new: freshly drawn weights of the run's network.
    rows: the start's class for each class of the run; None takes the fresh rows of `new`.

    The null class keeps its row, and gets zeros where the start has no classes. In a run without
    classes the null row moves into a bias, so that the network gives what it gave without a label.
    """
    (name,) = (name for name in TABLES if name in params or name in new)
    rest = {key: x for key, x in params.items() if key != name}
    if name not in new:
        return _with_null(rest, name, _table(params, name)[-1])
    drawn = _table(new, name)
    if name not in params:
        classes, null = drawn[:-1], jnp.zeros_like(drawn[-1:])
    else:
        old = _table(params, name)
        classes, null = drawn[:-1] if rows is None else old[jnp.asarray(rows)], old[-1:]
    return {**rest, name: {"embedding_table": {"embedding": jnp.concatenate([classes, null])}}}


def _table(params: Params, name: str) -> jax.Array:
    """The label table (classes + 1, width); its last row is the null class."""
    return params[name]["embedding_table"]["embedding"]


def _with_null(params: Params, name: str, null: jax.Array) -> Params:
    """Weights without a label table, in which a bias holds the null row."""
    if name == "y_embedder":  # a DiT adds the row to its embedding of t
        outer, layer = params["t_embedder"], params["t_embedder"]["mlp_2"]
        moved = {**layer, "bias": layer["bias"] + null}
        return {**params, "t_embedder": {**outer, "mlp_2": moved}}
    layer = params["map_layer0"]  # a U-Net adds it to the features of t, which this layer reads
    return {**params, "map_layer0": {**layer, "bias": layer["bias"] + null @ layer["kernel"]}}


def _rows(config: Config, classes: int, dataset: data.Source) -> tuple[int, ...] | None:
    """`Init.rows`. classes: of the start. Raises DmfError where it has no such class."""
    rule, ours = config.init_labels, config.num_classes
    if rule in ("", "fresh"):
        return None
    if not classes:
        wanted = "''" if rule == "none" else "fresh"
        raise DmfError(
            f"config.init_labels = {rule!r}: expected {wanted}, as {config.init} has no classes"
        )
    if rule == "none":
        return None
    if rule != "keep":
        return _mapped(rule, dataset, classes)
    if ours > classes:
        raise DmfError(
            f"config.network.num_classes = {ours} with config.init_labels = 'keep': expected at "
            f"most the {classes} classes of {config.init}"
        )
    return tuple(range(ours))


def _mapped(file: str, dataset: data.Source, classes: int) -> tuple[int, ...]:
    """The start's class for each class of the data, as a JSON file says.

    The file's keys are the names of all classes of the data, or their numbers.
    Raises DmfError for another content.
    """
    numbers = tuple(map(str, range(dataset.num_classes)))
    wanted = 'a JSON object such as {"cat": 281}'
    form = records.Is(wanted, lambda x: isinstance(x, dict))
    found = records.read(paths.reach(paths.at(file)), form, wanted)
    names = numbers if found.keys() <= set(numbers) else dataset.classes or numbers
    for key in [*names, *found]:
        if key not in found or key not in names:
            what = f"has no class {key!r:.80}" if key in names else f"has {key!r:.80}"
            known = ", ".join(names)
            raise DmfError(
                f"config.init_labels = {file}: {what}; expected all classes of "
                f"{dataset.name}: {known:.200}"
            )
    for key in names:
        if type(found[key]) is not int or not 0 <= found[key] < classes:
            raise DmfError(
                f"config.init_labels = {file}: {key!r:.80} is {found[key]!r:.80}; expected a class "
                f"of the start, 0 to {classes - 1}"
            )
    return tuple(found[name] for name in names)
