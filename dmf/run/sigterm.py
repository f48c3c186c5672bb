"""SIGTERM asks the run to stop: at most one step is lost, and the same command goes on.

A separate thread hears the signal, because the main thread may compile for minutes. There are two
cases:

- Everything worth keeping is on disk: before the first step, while a program is compiled, while a
  boundary is pictured and scored. Then the thread ends the process at once.
- A step is not saved. Then the main thread sees the request at its next gate, a place between two
  steps. It saves and leaves.

A second signal ends the process at once, whatever it does.

Several processes leave together. The process that was asked tells the others, which look every
`POLL_S` seconds. Each says once whether it holds anything unsaved, and which gate comes next, and
waits there. If nobody holds anything, all end at once. Otherwise all go on to the last of these
gates. For a step this costs one free lock.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from typing import Protocol

POLL_S = 0.5  # between two looks whether another process was asked to stop
ANSWER_S = 0.02  # between two looks for the others' answers, once one was asked
LAST_S = 10.0  # how long the first process waits for the others, who need it until they have left
GONE_S = 0.3  # from their last note to their end
ONE_S = 1.0  # signals within this time are one request: some go to a process and to its group
LATE = 0  # stands for SIGTERM when Python's own handler tells of it
AGAIN = "the same command goes on from what is on disk"


class Board(Protocol):
    """Where the processes of a run leave notes for each other (`dmf.processes.Board`)."""

    count: int
    mine: int

    def post(self, name: str, text: str) -> None:
        """Leaves a note; one of the same name must not be there."""

    def posted(self, folder: str) -> list[str]:
        """The notes whose names begin with `folder/`."""


class Stop:
    """A request to stop, and whether the main thread holds anything unsaved when it comes.

    Without `listen` nobody asks.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked = self._unsaved = False
        self._gate = 0  # gates passed; all processes pass the same ones
        self._last: int | None = None  # the gate at which to leave, once it is known
        self._board: Board | None = None  # of several processes

    def share(self, board: Board) -> None:
        """From now on this process is one of several."""
        with self._changed:
            self._board = board

    def here(self) -> bool:
        """A gate: whether the run ends here.

        Called by the main thread, at the same places in every process.
        """
        with self._changed:
            self._gate += 1
            if not self._asked:
                return False
            self._changed.wait_for(lambda: self._last is not None)
            return self._gate >= (self._last or 0)

    def unsaved(self) -> None:
        """From now on there is a step that is not on disk."""
        with self._changed:
            self._unsaved = True

    def saved(self) -> None:
        """All that was done is on disk."""
        with self._changed:
            self._unsaved = False

    def ask(self) -> None:
        """Asks the run to stop.

        It ends the process at once where nothing would be lost. Otherwise `here` tells the run.
        """
        with self._changed:
            if self._asked:
                return
            self._asked = True  # from now on the main thread waits at each gate until told
            board, gate, unsaved = self._board, self._gate + 1, self._unsaved
            if board is None:
                if not unsaved:
                    _end(f"stopped, nothing was unsaved; {AGAIN}")
                self._last = gate
        if board is not None:
            board.post(f"gate/{board.mine}", f"{gate} {unsaved:d}")

    def look(self) -> None:
        """Looks for requests of other processes, and decides once all have answered.

        Called again and again.
        """
        board = self._board
        if board is None or self._last is not None:
            return
        answers = [text.split() for text in board.posted("gate")]
        if answers:
            self.ask()
        if len(answers) < board.count:
            return
        if not any(int(unsaved) for _, unsaved in answers):
            _end_together(board)
        with self._changed:
            self._last = max(int(gate) for gate, _ in answers)
            self._changed.notify_all()

    def hurried(self) -> bool:
        """Whether processes wait for each other's answers."""
        return self._asked and self._last is None


def listen() -> Stop:
    """Hears SIGTERM from now on, in a separate thread. Called once, by the main thread."""
    stop = Stop()
    heard, wake = os.pipe()
    os.set_blocking(wake, False)
    # The system writes the number of a signal here at once. Python's own handlers wait for the
    # main thread; one is needed in case somebody else sets another wakeup file.
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: os.write(wake, bytes([LATE])))
    threading.Thread(target=_watch, args=(stop, heard), name="stopping", daemon=True).start()
    return stop


def forget() -> None:
    """SIGTERM ends the process as it would without `listen`."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch(stop: Stop, heard: int) -> None:
    first: float | None = None
    while True:
        ready, _, _ = select.select([heard], [], [], ANSWER_S if stop.hurried() else POLL_S)
        for number in os.read(heard, 64) if ready else b"":
            if first is not None and number != LATE and time.monotonic() - first > ONE_S:
                _end(f"ended by a second signal; {AGAIN}", 128 + number)
            if first is None and number in (signal.SIGTERM, LATE):
                first = time.monotonic()
                stop.ask()
        stop.look()


def _end_together(board: Board) -> None:
    """Ends this process. The first one ends last: the others cannot end well without it."""
    board.post(f"left/{board.mine}", "1")
    end = time.monotonic() + LAST_S
    while board.mine == 0 and len(board.posted("left")) < board.count and time.monotonic() < end:
        time.sleep(ANSWER_S)
    time.sleep(0.0 if board.mine else GONE_S)
    _end(f"stopped, nothing was unsaved; {AGAIN}")


def _end(line: str, status: int = 0) -> None:
    """Ends the process from any thread. An ordinary exit would wait for the main thread."""
    print(line, flush=True)
    sys.stderr.flush()
    os._exit(status)
