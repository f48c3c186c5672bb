"""What a program costs: FLOPs, bytes and memory of a compiled step.

XLA counts the body of a loop once. It counts a kernel that it does not know (cuDNN, Pallas) as 0.
The model FLOPs of a step therefore do not come from its program.
They are forward passes per row times the FLOPs of one forward pass of the plain network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dmf import networks
from dmf.config import Config


@dataclass(frozen=True)
class Counts:
    """XLA's counts of one compiled program, on one device; None where the backend gives none.

    arguments_bytes: of the state, the batch and the numbers it is given.

    temporary_bytes: the most that it holds besides these at one time.

    compiler_seconds: XLA's own estimate of its time.
    """

    flops: float | None
    bytes: float | None
    arguments_bytes: int | None
    temporary_bytes: int | None
    compiler_seconds: float | None = None

    @property
    def memory_bytes(self) -> int | None:
        """The peak of a step whose results replace its arguments: arguments and temporaries."""
        if self.arguments_bytes is None or self.temporary_bytes is None:
            return None
        return self.arguments_bytes + self.temporary_bytes


def counts(compiled: jax.stages.Compiled) -> Counts:
    """XLA's counts of a compiled program."""
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return Counts(
        cost.get("flops"),
        cost.get("bytes accessed"),
        getattr(memory, "argument_size_in_bytes", None),
        getattr(memory, "temp_size_in_bytes", None),
        _positive(cost.get("optimal_seconds")),
    )


def _positive(seconds: float | None) -> float | None:
    """Backends without an estimate give none, or a negative number."""
    return seconds if seconds is not None and seconds > 0 else None


def forward_flops(config: Config, image_shape: tuple[int, ...]) -> float | None:
    """FLOPs of one forward pass of the plain network over a batch.

    It has no loop, no remat and XLA attention. The pass is counted, not run.
    """
    network = networks.build(config.network, image_shape, jnp.dtype(config.compute_dtype))
    params = jax.eval_shape(network.init, jax.random.key(0))
    z = jax.ShapeDtypeStruct((config.batch_size, *image_shape), jnp.float32)
    time = jax.ShapeDtypeStruct((config.batch_size,), jnp.float32)
    # Lowered, not compiled: backends would change convolutions and softmax.
    found = jax.jit(network.apply).lower(params, z, time, time).cost_analysis()
    return (found or {}).get("flops")


def batch_shapes(config: Config, image_shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a step's batch: x (B, H, W, C) and label (B,).

    Encoded images have std too, with the shape of x.
    """
    x = jax.ShapeDtypeStruct((config.batch_size, *image_shape), jnp.float32)
    shapes = {"x": x, "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)}
    return shapes | ({"std": x} if config.data.name.endswith("_latents") else {})


def device_memory(name: str) -> int | None:
    """A figure of the first device's memory statistics, in bytes; None where it has none (CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get(name)


class Compilations:
    """Counts the programs that XLA compiles or reads from its cache inside a `with` block."""

    def __init__(self) -> None:
        self.count = 0

    def _seen(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def __enter__(self) -> Compilations:
        jax.monitoring.register_event_duration_secs_listener(self._seen)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._seen)
