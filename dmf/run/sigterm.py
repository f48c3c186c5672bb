"""SIGTERM and Ctrl-C ask the run to stop: at most one step is lost, and the same command goes on.

A separate thread hears the signal, because the main thread may compile for minutes. There are two
cases:

- Everything worth keeping is on disk: before the first step, while a program is compiled, while a
  boundary is pictured and scored. Then the thread ends the process at once.
- A step is not saved. Then the main thread sees the request at its next gate, a place between two
  steps. It saves and leaves.

The status is then 0, and 130 by Ctrl-C. Other commands than training hold nothing unsaved. They end
with 143 by SIGTERM. Whatever ends here removes its unfinished files (`dmf.storage.atomic`).
A second signal ends the process at once, whatever it does.

Several processes leave together. The process that was asked tells the others, which look every
`POLL_S` seconds. Each says once whether it holds anything unsaved, and which gate comes next, and
waits there. If nobody holds anything, all end at once. Otherwise all go on to the last of these
gates. For a step this costs one free lock.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time
from typing import Protocol, TextIO

from dmf.storage import atomic

POLL_S = 0.5  # between two looks whether another process was asked to stop
ANSWER_S = 0.02  # between two looks for the others' answers, once one was asked
LAST_S = 10.0  # how long the first process waits for the others, who need it until they have left
GONE_S = 0.3  # from their last note to their end
ONE_S = 1.0  # signals within this time are one request: some go to a process and to its group
SAY_S = 1.0  # the last line may take so long: the reader of a pipe may have fallen asleep
LATE = 128  # added to a signal's number when Python's own handler tells of it
HEARD = (signal.SIGTERM, signal.SIGINT)
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

    def __init__(self, end: str = "", training: bool = True) -> None:
        """end: of the last line of a command that is no training."""
        self._end, self._training = end, training
        self._number = 0  # of the signal that asked
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

    @property
    def status(self) -> int:
        """The exit status of a run that was asked to stop; 0 without a request."""
        by_user = self._number == signal.SIGINT
        return 128 + self._number if by_user or self._number and not self._training else 0

    def ask(self, number: int = 0) -> None:
        """Asks the run to stop. number: of the signal; 0 where another process was asked.

        It ends the process at once where nothing would be lost. Otherwise `here` tells the run.
        """
        with self._changed:
            if self._asked:
                return
            self._asked = True  # from now on the main thread waits at each gate until told
            self._number = number
            board, gate, unsaved = self._board, self._gate + 1, self._unsaved
            if board is None:
                if not unsaved:
                    self._leave()
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
            _wait_for_others(board)
            self._leave()
        with self._changed:
            self._last = max(int(gate) for gate, _ in answers)
            self._changed.notify_all()

    def hurried(self) -> bool:
        """Whether processes wait for each other's answers."""
        return self._asked and self._last is None

    def _leave(self) -> None:
        """Ends the process, which holds nothing unsaved."""
        line = "interrupted" if self._number == signal.SIGINT else "stopped"
        end = f", nothing was unsaved; {AGAIN}" if self._training else self._end
        _end(line + end, self.status)


def listen(end: str = "", training: bool = True) -> Stop:
    """Hears SIGTERM and SIGINT from now on, in a separate thread. Called by the main thread.

    end, training: as for `Stop`. A signal that the process was told to ignore stays ignored.
    """
    stop = Stop(end, training)
    heard, wake = os.pipe()
    os.set_blocking(wake, False)
    # The system writes the number of a signal here at once. Python's own handlers wait for the
    # main thread; one is needed in case somebody else sets another wakeup file.
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in HEARD:
        if signal.getsignal(number) != signal.SIG_IGN:  # as of a job in the background
            signal.signal(number, lambda number, _: os.write(wake, bytes([LATE + number])))
    atexit.register(_ignore)  # the first one registered is the last one called
    threading.Thread(target=_watch, args=(stop, heard), name="stopping", daemon=True).start()
    return stop


def _ignore() -> None:
    """Lets a program that has done its work end with its own status.

    Python gives up its handlers before it ends, and a signal would then count as a failure.
    """
    for number in HEARD:
        signal.signal(number, signal.SIG_IGN)


def _watch(stop: Stop, heard: int) -> None:
    first: float | None = None
    while True:
        ready, _, _ = select.select([heard], [], [], ANSWER_S if stop.hurried() else POLL_S)
        for number in os.read(heard, 64) if ready else b"":
            if first is not None and number < LATE and time.monotonic() - first > ONE_S:
                _end(f"ended by a second signal; {AGAIN}", 128 + number)
            if first is None and number % LATE in HEARD:
                first = time.monotonic()
                stop.ask(number % LATE)
        stop.look()


def _wait_for_others(board: Board) -> None:
    """Waits for the others' end. The first one ends last: they cannot end well without it."""
    board.post(f"left/{board.mine}", "1")
    end = time.monotonic() + LAST_S
    while board.mine == 0 and len(board.posted("left")) < board.count and time.monotonic() < end:
        time.sleep(ANSWER_S)
    time.sleep(0.0 if board.mine else GONE_S)


def _end(line: str, status: int = 0) -> None:
    """Ends the process from any thread. An ordinary exit would wait for the main thread."""
    thread = threading.Thread(target=_say, args=(line, sys.stderr if status else sys.stdout))
    thread.daemon = True
    thread.start()
    thread.join(SAY_S)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what other threads say of files that are removed now
        os.dup2(nowhere, stream)
    atomic.give_up()
    os._exit(status)


def _say(line: str, stream: TextIO) -> None:
    """Prints the last line, below a line of progress that a terminal may show."""
    sys.stdout.flush()
    print(f"\n{line}" if stream.isatty() else line, file=stream, flush=True)
