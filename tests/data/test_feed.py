"""The feed: each batch once and in order, never too far ahead; its errors; the thread's end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from dmf import data, sharding
from dmf.data import feed
from dmf.data.feed import Feed
from dmf.errors import DmfError
from tests import ROOT
from tests.data.test_data import numbered

LONG_S = 20.0  # a wait that takes longer has failed


class Made:
    """Batch n, whose end can be observed."""

    def __init__(self, n: int):
        self.n = n


class Maker:
    """`make(n)` that notes which batches were begun, and which are still alive."""

    def __init__(self, seconds: float = 0.0, fails: dict[int, BaseException] | None = None):
        self.begun: list[int] = []
        self.alive: weakref.WeakSet[Made] = weakref.WeakSet()
        self.most_alive = 0
        self._seconds, self._fails = seconds, fails or {}

    def __call__(self, n: int) -> Made:
        self.begun.append(n)
        time.sleep(self._seconds)
        if n in self._fails:
            raise self._fails[n]
        made = Made(n)
        self.alive.add(made)
        self.most_alive = max(self.most_alive, len(self.alive))
        return made


def until(reached: Callable[[], bool]) -> bool:
    """Whether a condition becomes true within `LONG_S`."""
    end = time.monotonic() + LONG_S
    while not reached() and time.monotonic() < end:
        time.sleep(0.001)
    return reached()


def threads() -> int:
    return sum(thread.name == "feed" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    assert threads() == 0
    yield
    assert threads() == 0


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize(("first", "last"), [(0, 40), (17, 40), (39, 40)])
@pytest.mark.parametrize(
    "seconds", [(0.0, 0.0), (0.002, 0.0), (0.0, 0.002)], ids=["even", "slow maker", "slow consumer"]
)
def test_every_batch_is_made_once_and_given_in_order(
    first: int, last: int, ahead: int, seconds: tuple[float, float]
) -> None:
    make, got = Maker(seconds[0]), []
    with Feed(make, first, last, ahead) as batches:
        for n in range(first, last):
            got.append(batches.get(n).n)
            time.sleep(seconds[1])
    assert got == make.begun == list(range(first, last))


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_it_runs_ahead_by_so_many_and_no_further(ahead: int) -> None:
    make = Maker()
    with Feed(make, 3, 20, ahead) as batches:
        for taken in range(12):
            wanted = min(taken + ahead, 17)
            assert until(lambda: len(make.begun) == wanted)  # noqa: B023
            time.sleep(0.01)
            assert len(make.begun) == wanted
            batches.get(3 + taken)


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_no_more_batches_are_in_memory_than_those_ahead_and_the_one_in_use(ahead: int) -> None:
    make = Maker()
    with Feed(make, 0, 30, ahead) as batches:
        for n in range(30):
            batch = None
            batch = batches.get(n)
            assert until(lambda: len(make.alive) == min(1 + ahead, 30 - n))  # noqa: B023
            assert batch.n == n
        batch = None
        assert until(
            lambda: not make.alive
        )  # neither the queue nor the thread keeps what was given away
    assert make.most_alive == ahead + 1


def test_closing_lets_go_of_what_was_made() -> None:
    make = Maker()
    batches = Feed(make, 0, 10, 4)
    assert until(lambda: len(make.alive) == 4)
    batches.close()
    assert until(lambda: not make.alive) and make.begun == [0, 1, 2, 3]


@pytest.mark.parametrize("k", [0, 1, 5])
@pytest.mark.parametrize(
    "error", [DmfError("one line"), KeyError("x"), SystemExit(3), StopIteration()], ids=repr
)
def test_what_make_raises_is_raised_by_the_get_of_that_batch_and_not_before(
    k: int, error: BaseException
) -> None:
    make = Maker(fails={k: error})
    with Feed(make, 0, 10) as batches:
        for n in range(k):
            # the failure may be known by now
            assert until(lambda: len(make.begun) == min(n + 2, k + 1))  # noqa: B023
            assert batches.get(n).n == n
        for _ in range(2):  # asked again, it says it again
            with pytest.raises(type(error)) as caught:
                batches.get(k)
            assert caught.value is error
    assert make.begun == list(range(k + 1))


def test_an_error_that_nobody_asked_for_is_no_error() -> None:
    make = Maker(fails={1: DmfError("one line")})
    with Feed(make, 0, 10) as batches:
        assert until(lambda: len(make.begun) == 2)
        assert batches.get(0).n == 0


def test_a_batch_out_of_turn_is_refused_and_disturbs_nothing() -> None:
    with Feed(Maker(), 5, 8) as batches:
        for n in (4, 6, 0, -1):
            with pytest.raises(
                ValueError, match=f"batch {n} asked of a feed out of turn: expected batch 5"
            ):
                batches.get(n)
        assert [batches.get(n).n for n in (5, 6)] == [5, 6]
        with pytest.raises(
            ValueError, match="batch 6 asked of a feed out of turn: expected batch 7"
        ):
            batches.get(6)
        assert batches.get(7).n == 7
        for n in (7, 8):
            with pytest.raises(
                ValueError, match=f"batch {n} asked of a feed out of turn: expected none"
            ):
                batches.get(n)


def test_impossible_feeds_are_refused_and_empty_ones_make_nothing() -> None:
    for ahead in (0, -1):
        with pytest.raises(ValueError, match=f"ahead is {ahead}: expected 1 or more"):
            Feed(Maker(), 0, 3, ahead)
    make = Maker()
    with Feed(make, 3, 3) as batches, pytest.raises(ValueError, match="expected none"):
        batches.get(3)
    assert make.begun == []


def test_a_full_feed_closes_at_once_and_gives_nothing_afterwards() -> None:
    make = Maker()
    batches = Feed(make, 0, 100)
    assert until(lambda: len(make.begun) == 2)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < feed.PATIENCE_S and threads() == 0
    with pytest.raises(ValueError, match="batch 0 asked of a closed feed"):
        batches.get(0)
    batches.close()
    assert make.begun == [0, 1]


def test_a_feed_that_is_making_a_batch_ends_that_one_and_closes() -> None:
    make = Maker(seconds=0.3)
    batches = Feed(make, 0, 100)
    assert until(lambda: make.begun == [0])
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < feed.PATIENCE_S and threads() == 0 and make.begun == [0]
    assert until(lambda: not make.alive)  # what was finished too late is not kept


def test_a_make_that_never_returns_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "PATIENCE_S", 0.2)
    stuck, begun = threading.Event(), []

    def make(n: int) -> int:
        begun.append(n)
        stuck.wait(LONG_S)
        return n

    batches = Feed(make, 0, 100)
    assert until(lambda: begun == [0])
    began = time.monotonic()
    batches.close()
    assert 0.2 <= time.monotonic() - began < LONG_S / 2 and threads() == 1
    stuck.set()
    assert until(lambda: threads() == 0) and begun == [0]  # and once it returns, that was the last


def test_closing_wakes_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "PATIENCE_S", 0.2)
    release, found = threading.Event(), []

    def ask() -> None:
        with pytest.raises(ValueError, match="batch 0 asked of a closed feed"):
            batches.get(0)
        found.append("refused")

    batches = Feed(lambda n: release.wait(LONG_S), 0, 5)
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    time.sleep(0.1)  # by now it waits in get
    batches.close()
    assert until(lambda: found == ["refused"])  # though nothing was made
    release.set()
    assert until(lambda: threads() == 0)


def test_feeds_one_after_the_other_and_side_by_side_are_strangers() -> None:
    for first in (0, 10):
        with Feed(Maker(), first, first + 10) as batches:
            assert [batches.get(n).n for n in range(first, first + 5)] == list(
                range(first, first + 5)
            )
    with Feed(Maker(), 0, 10) as one, Feed(Maker(), 5, 10) as other:
        assert [(one.get(n).n, other.get(n + 5).n) for n in range(5)] == [
            (n, n + 5) for n in range(5)
        ]


def test_leaving_the_block_by_an_error_closes_it_too() -> None:
    with pytest.raises(DmfError, match="a step"), Feed(Maker(), 0, 100) as batches:
        batches.get(0)
        raise DmfError("a step")


def test_only_the_time_in_which_a_batch_is_not_ready_counts_as_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, asked, waits = 0, 0, threading.Event()

    def clock() -> int:  # the feed looks at it as `get` begins, and when it has a batch
        nonlocal asked
        asked += 1
        if asked % 2:
            waits.set()
        return now

    def make(n: int) -> int:  # takes a second, while somebody waits for it
        nonlocal now
        waits.wait(LONG_S)
        waits.clear()
        now += 1
        return n

    monkeypatch.setattr(feed.time, "perf_counter", clock)
    with Feed(make, 0, 15) as batches:
        assert [batches.get(n) for n in range(15)] == list(range(15))
    assert batches.waited_s == 15
    ready = Maker()
    with Feed(ready, 0, 15) as batches:
        for n in range(15):
            assert until(lambda: len(ready.begun) == min(n + 2, 15))  # noqa: B023
            now += 1  # the step that uses the batch before
            batches.get(n)
    assert batches.waited_s == 0


# Background jobs of a shell ignore interrupts, and so would this process, which descends from one.
INTERRUPTED = """
import signal
import time
from dmf.data import feed
signal.signal(signal.SIGINT, signal.default_int_handler)
feed.PATIENCE_S = 0.5
def make(n):
    print("making", flush=True)
    time.sleep(60)
with feed.Feed(make, 0, 10) as batches:
    batches.get(0)
"""


def test_an_interrupt_ends_the_process_though_a_batch_is_being_made_and_waited_for() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    program = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], env=environment, stdout=pipe, stderr=pipe, text=True
    )
    assert program.stdout.readline() == "making\n"
    time.sleep(0.3)  # by now it waits in get
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=LONG_S)
    assert program.returncode == -signal.SIGINT and errors.rstrip().endswith("KeyboardInterrupt")


def test_batches_on_the_devices_are_those_of_the_data_set() -> None:
    dataset, mesh = numbered(100), sharding.make_mesh()

    def make(n: int) -> dict[str, jax.Array]:
        return sharding.put_rows(mesh, data.batch(dataset, 3, n, 16))

    with Feed(make, 4, 9) as batches:
        found = [batches.get(n) for n in range(4, 9)]
    gc.collect()  # the copies in host memory are not needed any more
    for n, some in zip(range(4, 9), found, strict=True):
        for name, values in data.batch(dataset, 3, n, 16).items():
            np.testing.assert_array_equal(np.asarray(some[name]), values)
            assert some[name].sharding == sharding.rows(mesh)
