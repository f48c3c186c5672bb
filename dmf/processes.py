"""Several processes as one run: how they find each other, and how they agree.

Every process runs the same program on its own devices. One of them alone writes files, and may
fail at it. The others hear of it here, so that all go on or all stop. A process that stops alone
would leave the others waiting.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dmf.errors import DmfError, short

USUAL = 4096  # bytes that processes exchange at once; a longer message takes a second exchange
HEADER = 8  # bytes of a message that tell its length
PATIENCE_S = 5.0  # how long a file of another process may take to be seen
HEARTBEAT_S = 30  # a process that is silent for so long ends the run
PLATFORMS = "JAX_PLATFORMS"  # the variable that names the devices to use
GPU = "an NVIDIA GPU, and the packages that fit its driver by ./launch/cloud/gpu.sh --install"
# Its value -> what makes such devices usable; "" where jax finds a plugin by itself.
INSTALL = {
    "tpu": "a TPU, and its packages by ./launch/cloud/worker.sh install tpu",
    **dict.fromkeys(("cuda", "gpu", ""), GPU),
}
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start(detect: bool = False) -> None:
    """Joins the other processes of the run; without any it does nothing.

    It must come before jax is used for anything else. The environment variables of `VARIABLES`
    tell the HOST:PORT of process 0, the number of processes, and the own number from 0.

    detect: TPU pods, Slurm and Open MPI tell these by themselves. Raises DmfError where that fails.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if not given and not detect:
        return
    if given and len(given) < len(VARIABLES) and not detect:
        missing = ", ".join(name for name in VARIABLES if name not in given)
        raise DmfError(
            f"{', '.join(given)} without {missing}: expected all of them, or --distributed to "
            "detect the others"
        )
    count, mine = (_number(name, given.get(name)) for name in VARIABLES[1:])
    if count is not None and mine is not None and mine >= count:
        raise DmfError(
            f"JAX_PROCESS_ID = {mine}: expected a number below JAX_NUM_PROCESSES = {count}"
        )
    # jax's own service would hear SIGTERM between two steps only; `dmf.run.sigterm` always does.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            given.get(VARIABLES[0]), count, mine, heartbeat_timeout_seconds=HEARTBEAT_S
        )
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DmfError(
            f"the processes of the run cannot find each other: {reason}; expected "
            f"{', '.join(VARIABLES)}, or with --distributed a TPU pod, Slurm or Open MPI"
        ) from error


def find_devices() -> None:
    """Starts the devices of jax. Raises DmfError where those that were asked for do not work.

    jax only logs that a plugin does not fit the driver, and would go on on the CPU.
    """
    log, told, platform = logging.getLogger("jax._src.xla_bridge"), list[str](), "cpu"

    def keep(record: logging.LogRecord) -> bool:
        if not record.getMessage().startswith("Jax plugin configuration error"):
            return True
        error = record.exc_info[1] if record.exc_info else None
        told.append(short(error) if error else record.getMessage()[:200])
        return False

    log.addFilter(keep)
    try:
        platform = jax.devices()[0].platform
    except AssertionError:  # so says jax where no device is left
        told.append("no such device is visible")
    except RuntimeError as error:
        told.append(short(error).partition(" (set JAX_")[0])
    finally:
        log.removeFilter(keep)
    asked = os.environ.get(PLATFORMS, "")
    if told and platform == "cpu" and asked != "cpu":
        wanted = INSTALL.get(asked, "cpu, cuda or tpu")
        what = f"{PLATFORMS}={asked}" if asked else "the plugin of the GPU"
        raise DmfError(f"{what} does not work: {told[0]}; expected {wanted}, or {PLATFORMS}=cpu")


def several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def all_say(text: str) -> list[str]:
    """The texts of all processes, in their order, on each of them."""
    if jax.process_count() == 1:
        return [text]
    encoded = text.encode(errors="replace")
    mine = len(encoded).to_bytes(HEADER, "big") + encoded
    found = _gathered(mine, USUAL)
    ends = [HEADER + int.from_bytes(row[:HEADER], "big") for row in found]
    if max(ends) > USUAL:  # all processes know it by now
        # Powers of two: each size is another program.
        found = _gathered(mine, 2 ** (max(ends) - 1).bit_length())
    return [row[HEADER:end].decode() for row, end in zip(found, ends, strict=True)]


def _gathered(mine: bytes, size: int) -> list[bytes]:
    """The first `size` bytes of each process, filled up with zeros."""
    row = np.frombuffer(mine[:size].ljust(size, b"\0"), np.uint8)
    return [
        bytes(found)
        for found in np.asarray(multihost_utils.process_allgather(row)).reshape(-1, size)
    ]


def first_says(text: str) -> str:
    """The text of the first process, on all of them."""
    return all_say(text)[0]


@contextmanager
def together() -> Iterator[None]:
    """All processes leave the block together, all with an error if one of them met one.

    Inside the block no process may wait for another: a process that failed would not come.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    errors = [
        text
        for text in all_say(" ".join(str(mine).split()) or type(mine).__name__ if mine else "")
        if text
    ]
    if mine:
        raise mine
    if errors:
        raise DmfError(errors[0])


def same(what: str, text: str) -> None:
    """Raises DmfError, on all processes, where they do not give the same text."""
    digests = all_say(hashlib.sha256(text.encode()).hexdigest())
    for i, digest in enumerate(digests):
        if digest != digests[0]:
            raise DmfError(
                f"process {i} of {len(digests)} has another {what} than process 0: expected the "
                "same on all"
            )


def check_shared(folder: Path) -> None:
    """Raises DmfError, on all processes, where `folder` is not the same folder for all."""
    if jax.process_count() == 1:
        return
    # A new name: a network file system remembers names that it has not found.
    path = folder / f".shared-{first_says(os.urandom(8).hex())}"
    with together():
        if is_first():
            path.touch()
    with together():
        waited = 0.0
        while not path.exists():
            if waited > PATIENCE_S:
                raise DmfError(
                    f"process {jax.process_index()} of {jax.process_count()}: "
                    f"--workdir={folder} does not show what process 0 wrote there; expected one "
                    "directory that all processes share"
                )
            time.sleep(0.1)
            waited += 0.1
    if is_first():
        path.unlink()


class Board:
    """Short notes that the processes of a run leave for each other; any thread may use them.

    count: the number of processes. mine: this process's own number. The first process keeps the
    notes: once it is gone, nothing is written or found.
    """

    def __init__(self) -> None:
        self.count, self.mine = jax.process_count(), jax.process_index()
        self._client: Any = multihost_utils.distributed.global_state.client

    def post(self, name: str, text: str) -> None:
        """Leaves a note; one of the same name must not be there."""
        with suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"dmf/{name}", text)

    def posted(self, folder: str) -> list[str]:
        """The notes whose names begin with `folder/`."""
        with suppress(jax.errors.JaxRuntimeError):
            return [text for _, text in self._client.key_value_dir_get(f"dmf/{folder}/")]
        return []


def _number(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal():
        raise DmfError(f"{name} = {text!r}: expected a number of at least 0")
    return int(text)
