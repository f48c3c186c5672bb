"""Where arrays live: the device mesh and the placement of state and batch.

Two axes over all devices, "replica" and "fsdp". Rows are split over both. Parameters, optimiser state and EMAs are whole on
every replica; within one, those that are large enough are split over its "fsdp" devices, which gather the weights for a step.
Nothing outside this file names an axis.
"""

from __future__ import annotations

import math
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
SMALLEST = (
    2**14
)  # numbers in an array that is worth splitting: gathering less costs more time than memory is won


@dataclass(frozen=True)
class MeshConfig:
    """The devices as replica x fsdp; 0 stands for all that the other leaves."""

    replica: int = limited(0, 0, INF)  # copies of the state; rows are split over them
    # devices that share one copy of parameters, optimiser state and EMAs; 1 = a copy on each
    fsdp: int = limited(1, 0, INF)


def make_mesh(
    config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh over the given devices, by default all. Axes are Auto: Explicit ones reject ordinary networks' reshapes.

    Raises DmfError where the devices do not come out.
    """
    devices = devices if devices is not None else jax.devices()
    count = len(devices)
    fsdp = config.fsdp or count // max(config.replica, 1)
    replica = config.replica or count // max(fsdp, 1)
    if replica * fsdp != count:
        raise DmfError(
            f"config.mesh.replica = {config.replica} x config.mesh.fsdp = {config.fsdp}: expected factors of the {count} "
            "devices, 0 for all that the other leaves"
        )
    return jax.make_mesh((replica, fsdp), ROWS, axis_types=(AxisType.Auto,) * 2, devices=devices)


def rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows split over all devices, all other axes whole. axis: position of the row axis."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def placed(mesh: Mesh, tree: Any) -> Any:
    """Where each leaf of a state belongs, a tree of shardings: split over "fsdp" along its largest axis that divides, or whole.

    tree: arrays, or their shapes and dtypes. Leaves of fewer than `SMALLEST` numbers stay whole.
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


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises DmfError where the batch cannot be split evenly over the devices."""
    devices = mesh.devices.size
    if batch_size % devices:
        raise DmfError(
            f"config.batch_size = {batch_size}: expected a multiple of the {devices} devices"
        )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Positions in the global batch, ascending, of the rows that live on this process's devices."""
    owned = rows(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[index] for index in owned]))


def put_rows(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows, as `local_rows` orders them -> global arrays split by rows; only local devices are written."""
    return {k: jax.make_array_from_process_local_data(rows(mesh), v) for k, v in batch.items()}


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """What `jax.jit` is given with every program for these devices.

    On a CPU, where jax knows the option: no fusions of its YNN library. They make a small network's step half as long again, a
    larger one's no shorter with a quarter more temporary memory, and loading a kept program twice as long.
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
    """Jits `function(whole, rows) -> rows` so that each device runs it on its own rows, and no other.

    Every device runs one and the same program on the same number of rows, whatever the number of devices: with rows given in
    equal pieces per device, the results are the same bits on one device and on many. whole, rows: any trees of arrays.
    options: as `jax.jit` takes them with its compiler_options, besides those of every program.
    """
    cut = PartitionSpec(ROWS)
    split = jax.shard_map(
        function, mesh=mesh, in_specs=(PartitionSpec(), cut), out_specs=cut, check_vma=False
    )
    return jax.jit(split, compiler_options=compiler_options(mesh) | (options or {}))


def on_rows(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays with a row axis first, as each device's own call: for kernels that XLA cannot split by itself."""
    cut = PartitionSpec(ROWS)
    return jax.shard_map(function, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)


def in_pieces(mesh: Mesh, count: int, rows_per_device: int) -> list[slice]:
    """The slices of `count` rows that are put on the devices together, `rows_per_device` on each; the last may be short."""
    size = rows_per_device * mesh.devices.size
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def put_padded(mesh: Mesh, rows_per_device: int, tree: Any) -> Any:
    """Rows of NumPy arrays, at most `rows_per_device` a device, padded with copies of the last to exactly so many.

    Every process gives all rows, and puts those of its own devices.
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


def constrain_rows(mesh: Mesh, tree: Any, axis: int = 0) -> Any:
    """Inside jit: every leaf is split by rows along `axis`."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows(mesh, axis)), tree)


def whole(mesh: Mesh, tree: Any) -> Any:
    """Inside jit: weights placed by `placed`, gathered for rows to be evaluated with."""
    return (
        tree
        if mesh.shape["fsdp"] == 1
        else jax.lax.with_sharding_constraint(tree, replicated(mesh))
    )


def gradient(mesh: Mesh, loss: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.grad(loss, has_aux=True)` of parameters placed by `placed`; the gradient is placed like them.

    Split weights are gathered for the step, in half precision where the network casts them to it, and each device keeps the
    sum of its own part of the gradient. (Left to itself, XLA would rather gather the rows' activations.)
    """
    if mesh.shape["fsdp"] == 1:
        return jax.grad(loss, has_aux=True)

    @jax.custom_vjp
    def gather(params: Any) -> Any:
        return jax.lax.with_sharding_constraint(params, replicated(mesh))

    def scatter(_: None, grads: Any) -> tuple[Any]:
        return (jax.lax.with_sharding_constraint(grads, placed(mesh, grads)),)

    gather.defvjp(lambda params: (gather(params), None), scatter)
    return jax.grad(lambda params, *rest: loss(gather(params), *rest), has_aux=True)
