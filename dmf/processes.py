"""Several processes as one run: how they find each other, and how they agree.

Every process runs the same program on its own devices. What one process alone does (it writes files, it may fail at it) is made
known to all of them here, so that they go on together or stop together: a process that stops alone leaves the others waiting.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dmf.errors import DmfError

USUAL = 4096  # bytes that processes exchange at once; a longer message takes a second time
HEADER = 8  # of these bytes tell the message's own number of them
PATIENCE_S = 5.0  # until a file that another process has written must be seen
HEARTBEAT_S = 30  # of silence after which a process is given up, and with it the run
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start(detect: bool = False) -> None:
    """Joins the other processes of the run, before jax is used for anything else; without any, does nothing.

    By the three environment variables of `VARIABLES` (HOST:PORT of process 0, number of processes, own number from 0), or
    with `detect` by what TPU pods, Slurm and Open MPI tell by themselves. Raises DmfError where that fails.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if not given and not detect:
        return
    if given and len(given) < len(VARIABLES) and not detect:
        missing = ", ".join(name for name in VARIABLES if name not in given)
        raise DmfError(
            f"{', '.join(given)} without {missing}: expected all of them, or --distributed to detect the others"
        )
    count, mine = (_number(name, given.get(name)) for name in VARIABLES[1:])
    if count is not None and mine is not None and mine >= count:
        raise DmfError(
            f"JAX_PROCESS_ID = {mine}: expected a number below JAX_NUM_PROCESSES = {count}"
        )
    # With it, SIGTERM would be caught for somebody to ask about between two steps; `dmf.run.sigterm` hears it at any time.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            given.get(VARIABLES[0]), count, mine, heartbeat_timeout_seconds=HEARTBEAT_S
        )
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DmfError(
            f"the processes of the run cannot find each other: {reason}; expected {', '.join(VARIABLES)}, or with "
            "--distributed a TPU pod, Slurm or Open MPI"
        ) from error


def several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def all_say(text: str) -> list[str]:
    """What each process gives, in their order, known to all."""
    if jax.process_count() == 1:
        return [text]
    encoded = text.encode(errors="replace")
    mine = len(encoded).to_bytes(HEADER, "big") + encoded
    found = _gathered(mine, USUAL)
    ends = [HEADER + int.from_bytes(row[:HEADER], "big") for row in found]
    if max(ends) > USUAL:  # which all of them know by now
        found = _gathered(
            mine, 2 ** (max(ends) - 1).bit_length()
        )  # few sizes, as each is a program
    return [row[HEADER:end].decode() for row, end in zip(found, ends, strict=True)]


def _gathered(mine: bytes, size: int) -> list[bytes]:
    """The first `size` bytes that each process gives, filled up with zeros."""
    row = np.frombuffer(mine[:size].ljust(size, b"\0"), np.uint8)
    return [
        bytes(found)
        for found in np.asarray(multihost_utils.process_allgather(row)).reshape(-1, size)
    ]


def first_says(text: str) -> str:
    """What the first process gives, known to all."""
    return all_say(text)[0]


@contextmanager
def together() -> Iterator[None]:
    """All processes leave the block together: with an error if any of them met one there.

    For what each does by itself: a block in which they wait for each other would not be left by all.
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
                f"process {i} of {len(digests)} has another {what} than process 0: expected the same on all"
            )


def check_shared(folder: Path) -> None:
    """Raises DmfError, on all processes, where one of them does not see in `folder` what process 0 writes there."""
    if jax.process_count() == 1:
        return
    path = (
        folder / f".shared-{first_says(os.urandom(8).hex())}"
    )  # a name that no network file system has looked for before
    with together():
        if is_first():
            path.touch()
    with together():
        waited = 0.0
        while not path.exists():
            if waited > PATIENCE_S:
                raise DmfError(
                    f"process {jax.process_index()} of {jax.process_count()}: --workdir={folder} does not show what process 0 "
                    "wrote there; expected one directory that all processes share"
                )
            time.sleep(0.1)
            waited += 0.1
    if is_first():
        path.unlink()


class Board:
    """Short notes that the processes of a run leave for each other, kept by the first one; any thread may read and write them.

    count, mine: the number of processes, and this one's own. Once the first process is gone nothing is written or found.
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
