"""A program made in a thread of its own, while the weights that it is for are still read or drawn."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import jax

from dmf.errors import DmfError


def compiling(function: jax.stages.Wrapped, *arguments: Any) -> threading.Thread:
    """Starts to compile a jitted function for such arguments, arrays or their shapes and places; join the thread to wait.

    jax keeps what comes of it: a later call with such arguments finds the program. Where it fails, that call fails as well, and
    tells why; so nothing is told here.
    """

    def compile_quietly() -> None:
        with suppress(DmfError, RuntimeError, TypeError, ValueError):
            function.lower(*arguments).compile()

    # No daemon: a process that ends while one is inside a compilation aborts.
    thread = threading.Thread(target=compile_quietly, name="compiling")
    thread.start()
    return thread
