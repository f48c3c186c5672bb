"""Tests, and how they and the processes they start compile programs."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"

# Programs here are small and run a few times, so most of the time would go into optimising them.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)


def devices(count: int) -> str:
    """XLA_FLAGS of a process with so many fake devices."""
    return f"{QUICK} --xla_force_host_platform_device_count={count}"
