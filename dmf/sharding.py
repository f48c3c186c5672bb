"""Where arrays live: the device mesh and the placement of state and batch.

The devices form two axes, "replica" and "fsdp". Rows are split over both.
Every replica holds all parameters, optimiser state and EMAs. Within a replica, large arrays are
split over its "fsdp" devices, which gather the weights for a step. No other file names an axis.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dmf.errors import DmfError
from dmf.fields import INF, limited

ROWS = ("replica", "fsdp")
# Numbers in an array that is worth splitting. Gathering less costs more time than memory is saved.
SMALLEST = 2**14


@dataclass(frozen=True)
class MeshConfig:
    """The devices as replica x fsdp; 0 takes all devices that the other leaves."""

    replica: int = limited(0, 0, INF)  # copies of the state; rows are split over them
    # devices that share one copy of parameters, optimiser state and EMAs; 1 = a copy on each
    fsdp: int = limited(1, 0, INF)


def make_mesh(
    config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh over the given devices, by default all.

    Axes are Auto, because Explicit axes reject the reshapes of ordinary networks.
    Raises DmfError where replica x fsdp is not the number of devices.
    """
    devices = devices if devices is not None else jax.devices()
    count = len(devices)
    fsdp = config.fsdp or count // max(config.replica, 1)
    replica = config.replica or count // max(fsdp, 1)
    if replica * fsdp != count:
        raise DmfError(
            f"config.mesh.replica = {config.replica} x config.mesh.fsdp = {config.fsdp}: "
            f"expected factors of the {count} devices, 0 for all that the other leaves"
        )
    return jax.make_mesh((replica, fsdp), ROWS, axis_types=(AxisType.Auto,) * 2, devices=devices)


def rows(mesh: Mesh) -> NamedSharding:
    """Rows, the first axis, split over all devices; all other axes whole."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def placed(mesh: Mesh, tree: Any) -> Any:
    """Where each leaf of a state belongs, a tree of shardings.

    A leaf is split over "fsdp" along its largest axis that divides, or stays whole. Leaves of
    fewer than `SMALLEST` numbers stay whole. tree: arrays, or their shapes and dtypes.
    """
    fsdp = mesh.shape["fsdp"]

    def place(leaf: Any) -> NamedSharding:
        fit = [(size, axis) for axis, size in enumerate(leaf.shape) if size % fsdp == 0]
        if fsdp == 1 or not fit or math.prod(leaf.shape) < SMALLEST:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*(None,) * max(fit)[1], "fsdp"))

    return jax.tree.map(place, tree)


def describe(mesh: Mesh, tree: Any) -> str:
    """The mesh in words, and how much of a state each of its devices holds."""
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    parts = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return (
        f"{parts}, {jax.process_count()} process(es), {held / 1e6:,.1f} MB of state on each device"
    )


def device_bytes(mesh: Mesh) -> int:
    """The memory of one device of the mesh; of a CPU its share of the machine's memory."""
    device = mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine // len(mesh.local_devices)


def check_memory(mesh: Mesh, like: Any, params: Any) -> None:
    """Raises DmfError where no device can hold the state and a gradient of it.

    like, params: the state and its parameters, as shapes with their places.
    """
    state, gradient = (
        sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
        for leaves in (jax.tree.leaves(like), jax.tree.leaves(params))
    )
    if state + gradient > (limit := device_bytes(mesh)):
        raise DmfError(
            f"config.network: weights, optimiser and averages take {state / 1e9:,.1f} GB on each "
            f"device, a gradient {gradient / 1e9:,.1f} GB; expected less than its "
            f"{limit / 1e9:,.1f} GB, by a smaller network, a larger config.mesh.fsdp or fewer "
            "config.ema.halflife_images"
        )


def memory(mesh: Mesh, program: jax.stages.Compiled) -> str:
    """What a compiled step takes of a device's memory, in words; "" where XLA does not tell it.

    It holds state, batch, gradient and activations at one time.
    """
    found, limit = program.memory_analysis(), device_bytes(mesh)
    if found is None:
        return ""
    needed = found.argument_size_in_bytes + found.temp_size_in_bytes
    line = f"a step takes about {needed / 1e9:,.2f} GB of each device's {limit / 1e9:,.1f} GB"
    return line + "; it will not fit: see docs/memory.md" * (needed > limit)


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises DmfError where the batch cannot be split evenly over the devices."""
    devices = mesh.devices.size
    if batch_size % devices:
        raise DmfError(
            f"config.batch_size = {batch_size}: expected a multiple of the {devices} devices"
        )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Positions in the global batch, ascending, of the rows on this process's devices."""
    owned = rows(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[index] for index in owned]))


def put_rows(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows, in the order of `local_rows`, as global arrays split by rows.

    Each process writes its own devices only.
    """
    return {k: jax.make_array_from_process_local_data(rows(mesh), v) for k, v in batch.items()}


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """The compiler options of every program for these devices.

    On a CPU they switch off fusions of the YNN library, where this jax knows the option.
    These fusions make a small network's step 1.5 times as long. They do not speed up a larger
    network, and take a quarter more temporary memory. Loading a kept program takes twice as long.
    """
    return _plain_fusions(mesh.devices.flat[0]) if mesh.devices.flat[0].platform == "cpu" else {}


@lru_cache(maxsize=1)
def _plain_fusions(cpu: jax.Device) -> dict[str, Any]:
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        with jax.default_device(cpu):
            jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # another release of jax
        return {}
    return options


def per_device(
    mesh: Mesh, function: Callable[..., Any], options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Jits `function(whole, rows) -> rows` so that each device runs it on its own rows only.

    All devices run the same program on the same number of rows. With equal pieces per device, one
    device and many give the same bits.

        whole, rows   any trees of arrays
        options       compiler_options of `jax.jit`, added to the options of every program
    """
    cut = PartitionSpec(ROWS)
    split = jax.shard_map(
        function, mesh=mesh, in_specs=(PartitionSpec(), cut), out_specs=cut, check_vma=False
    )
    return jax.jit(split, compiler_options=compiler_options(mesh) | (options or {}))


def on_rows(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays with a row axis first, as a call per device on its own rows.

    XLA cannot split some kernels by itself. Inside a device's program the rows are its own already.
    """
    cut = PartitionSpec(ROWS)
    apart = jax.shard_map(function, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)

    def call(*arrays: Any) -> Any:
        inside = jax.sharding.get_abstract_mesh().manual_axes
        return (function if inside else apart)(*arrays)

    return call


def in_pieces(mesh: Mesh, count: int, rows_per_device: int) -> list[slice]:
    """The slices of `count` rows that go to the devices together, `rows_per_device` on each.

    The last slice may be short.
    """
    size = rows_per_device * mesh.devices.size
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def put_padded(mesh: Mesh, rows_per_device: int, tree: Any) -> Any:
    """Rows of NumPy arrays on the devices, exactly `rows_per_device` on each.

    Copies of the last row fill up the rest. Every process gives all rows and puts its own.
    """
    size, place = rows_per_device * mesh.devices.size, rows(mesh)

    def put(x: np.ndarray) -> jax.Array:
        full = x[np.minimum(np.arange(size), len(x) - 1)]
        return jax.make_array_from_callback(full.shape, place, lambda index: full[index])

    return jax.tree.map(put, tree)


def fetch(mesh: Mesh, tree: Any) -> Any:
    """The whole of global arrays as NumPy arrays, on every process."""
    if any(not x.is_fully_addressable for x in jax.tree.leaves(tree)):
        tree = _gather_all(mesh)(tree)
    return jax.tree.map(np.asarray, tree)


@lru_cache(maxsize=4)
def _gather_all(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def whole(mesh: Mesh, tree: Any) -> Any:
    """Inside jit: weights placed by `placed`, gathered for rows to be evaluated with."""
    return (
        tree
        if mesh.shape["fsdp"] == 1
        else jax.lax.with_sharding_constraint(tree, replicated(mesh))
    )


def averaged(
    mesh: Mesh, function: Callable[..., Any], dtypes: Callable[[Any], Any]
) -> Callable[..., Any]:
    """`function(params, rows, *rest) -> (gradient, metrics)` of each device's rows, averaged.

        params     placed by `placed`, and so is the gradient
        rows       split over the mesh; rest: whole
        function   of means over the rows that it is given, with whole weights
        dtypes     of the weights as they are used, `Network.dtypes`; they are sent as these

    Each device adds up its own gradient, and the devices exchange it once, at the end. XLA by
    itself would send the parts of a sum apart, and also numbers of rows.
    """
    if mesh.size == 1:
        return function

    def call(params: Any, rows: Any, *rest: Any) -> Any:
        specs = jax.tree.map(lambda place: place.spec, placed(mesh, params))
        sent_as, cut, whole = dtypes(params), PartitionSpec(ROWS), PartitionSpec()

        def on_one(params: Any, rows: Any, *rest: Any) -> Any:
            weights = jax.tree.map(_gathered, params, specs, sent_as)
            grads, metrics = function(weights, rows, *rest)
            grads = jax.tree.map(_summed, grads, specs, sent_as)
            return jax.tree.map(lambda g: g / mesh.size, grads), jax.lax.pmean(metrics, ROWS)

        places = (specs, cut, *(whole,) * len(rest))
        apart = jax.shard_map(
            on_one, mesh=mesh, in_specs=places, out_specs=(specs, whole), check_vma=False
        )
        return apart(params, rows, *rest)

    return call


def _gathered(weight: jax.Array, spec: PartitionSpec, sent_as: Any) -> jax.Array:
    """Inside a device's program: a weight from the parts that the devices of a replica hold."""
    if "fsdp" not in spec:
        return weight
    sent = weight.astype(sent_as)
    return jax.lax.all_gather(sent, "fsdp", axis=spec.index("fsdp"), tiled=True).astype(
        weight.dtype
    )


def _summed(gradient: jax.Array, spec: PartitionSpec, sent_as: Any) -> jax.Array:
    """Inside a device's program: the sum over all devices, and the part of it that stays here."""
    sent = gradient.astype(sent_as)
    if "fsdp" not in spec:
        return jax.lax.psum(sent, ROWS).astype(gradient.dtype)
    axis = spec.index("fsdp")
    part = jax.lax.psum_scatter(sent, "fsdp", scatter_dimension=axis, tiled=True)
    return jax.lax.psum(part, "replica").astype(gradient.dtype)
