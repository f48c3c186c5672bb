"""Where arrays live: the device mesh and the placement of state and batch.

One axis, "data", over all devices: rows are sharded, the state is replicated. Nothing outside this file names an axis, so
sharding the state as well means another axis here and another rule where the callers now say `replicated`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dmf.errors import DmfError


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the given devices, by default all. Axes are Auto: Explicit ones reject ordinary networks' reshapes."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows split over the data axis, all other axes whole. axis: position of the row axis."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises DmfError where the batch cannot be split evenly over the devices."""
    devices = mesh.devices.size
    if batch_size % devices:
        raise DmfError(f"config.batch_size = {batch_size}: expected a multiple of the {devices} devices")


def put_rows(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's rows -> global arrays sharded over the data axis; only local devices are written."""
    return {k: jax.make_array_from_process_local_data(rows(mesh), v) for k, v in batch.items()}


def per_device(mesh: Mesh, function: Callable[..., Any], compiler_options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Jits `function(whole, rows) -> rows` so that each device runs it on its own rows, and no other.

    Every device runs one and the same program on the same number of rows, whatever the number of devices: with rows given in
    equal pieces per device, the results are the same bits on one device and on many. whole, rows: any trees of arrays.
    compiler_options: as `jax.jit` takes them.
    """
    cut = PartitionSpec("data")
    split = jax.shard_map(function, mesh=mesh, in_specs=(PartitionSpec(), cut), out_specs=cut, check_vma=False)
    return jax.jit(split, compiler_options=compiler_options)


def in_pieces(mesh: Mesh, count: int, rows_per_device: int) -> list[slice]:
    """The slices of `count` rows that are put on the devices together, `rows_per_device` on each; the last may be short."""
    size = rows_per_device * mesh.devices.size
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def put_padded(mesh: Mesh, rows_per_device: int, tree: Any) -> Any:
    """Rows of NumPy arrays, at most `rows_per_device` a device, padded with copies of the last to exactly so many."""
    size = rows_per_device * mesh.devices.size
    return jax.tree.map(lambda x: jax.device_put(x[np.minimum(np.arange(size), len(x) - 1)], rows(mesh)), tree)


def constrain_rows(mesh: Mesh, tree: Any, axis: int = 0) -> Any:
    """Inside jit: every leaf is split over the data axis along `axis`."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, rows(mesh, axis)), tree)
