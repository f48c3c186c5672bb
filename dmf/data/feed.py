"""Batches made ahead of time: a thread gathers the next ones while a step runs."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Batch = TypeVar("Batch")

PATIENCE_S = 10.0  # how long `Feed.close` waits for a batch that is being made


class Feed(Generic[Batch]):
    """The batches first, ..., last - 1 in this order, each made once by `make(n)` in one thread.

    At most `ahead` batches are finished or in the making, apart from those that the caller holds.
    The thread starts at once, so close a feed, best by `with`. The context managers of jax hold for
    the calling thread alone, and so not in `make`.
    """

    def __init__(self, make: Callable[[int], Batch], first: int, last: int, ahead: int = 2):
        """Raises ValueError if ahead < 1."""
        if ahead < 1:
            raise ValueError(f"ahead is {ahead}: expected 1 or more batches")
        self.waited_s = 0.0  # seconds that `get` has waited in total
        self._make, self._next, self._last, self._ahead = make, first, last, ahead
        self._ready: deque[Batch] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        # A daemon: a `make` that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._fill, args=(first,), name="feed", daemon=True)
        self._thread.start()

    def get(self, n: int) -> Batch:
        """Waits for batch n, which must be the next one, and returns it.

        Raises the exception that `make(n)` raised, and ValueError where n is not the next batch or
        the feed is closed.
        """
        if n != self._next or n >= self._last:
            wanted = (
                f"batch {self._next}" if self._next < self._last else "none, all have been given"
            )
            raise ValueError(f"batch {n} asked of a feed out of turn: expected {wanted}")
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error is not None or self._closed)
            self.waited_s += time.perf_counter() - began
            if self._closed:
                raise ValueError(f"batch {n} asked of a closed feed: expected an open one")
            if self._error is not None and not self._ready:
                raise self._error
            self._next += 1
            self._changed.notify_all()
            return self._ready.popleft()

    def close(self) -> None:
        """Stops the thread once it has ended its batch, and drops all batches.

        May be called twice.
        """
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join(PATIENCE_S)

    def __enter__(self) -> Feed[Batch]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self, first: int) -> None:
        for n in range(first, self._last):
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self._ahead)
                if self._closed:
                    return
            try:
                batch = self._make(n)
            except BaseException as error:  # even SystemExit: else the caller would wait for ever
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                if not self._closed:
                    self._ready.append(batch)
                    self._changed.notify_all()
