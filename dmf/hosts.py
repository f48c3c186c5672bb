"""Several processes as one run: how they find each other, and how they agree.

Every process runs the same program on its own devices. What one process alone does (it writes files, it may fail at it) is made
known to all of them here, so that they go on together or stop together: a process that stops alone leaves the others waiting.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from dmf.errors import DmfError

LONGEST = 4096  # bytes of a message between processes
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
        raise DmfError(f"{', '.join(given)} without {missing}: expected all of them, or --distributed to detect the others")
    address, count, mine = (given.get(name) for name in VARIABLES)
    try:
        jax.distributed.initialize(address, _number("JAX_NUM_PROCESSES", count), _number("JAX_PROCESS_ID", mine))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DmfError(
            f"the processes of the run cannot find each other: {reason}; expected {', '.join(VARIABLES)}, or with "
            "--distributed a TPU pod, Slurm or Open MPI"
        ) from error


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def all_say(text: str) -> list[str]:
    """What each process gives, in their order, known to all; of a text beyond `LONGEST` bytes its start."""
    if jax.process_count() == 1:
        return [text]
    mine = np.zeros(LONGEST, np.uint8)
    encoded = np.frombuffer(text.encode()[:LONGEST], np.uint8)
    mine[: len(encoded)] = encoded
    found = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, LONGEST)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in found]


def first_says(text: str) -> str:
    """What the first process gives, known to all."""
    return all_say(text)[0]


@contextmanager
def together() -> Iterator[None]:
    """All processes leave the block together: with the first DmfError that any of them met there, or with none."""
    mine: DmfError | None = None
    try:
        yield
    except DmfError as error:
        mine = error
    errors = [text for text in all_say(str(mine) if mine else "") if text]
    if mine:
        raise mine
    if errors:
        raise DmfError(errors[0])


def _number(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdigit():
        raise DmfError(f"{name} = {text!r}: expected a number of at least 0")
    return int(text)
