"""The first line of the program: what is printed may fail, and the work goes on."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from dmf.run import start
from dmf.storage import atomic
from tests import ROOT


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ([], "train"),
        (["--mode=score"], "score"),
        (["-mode", "export", "--out=mode"], "export"),
        (["--mode=train", "--mode=sample"], "sample"),
        (["--config=mode=score"], "train"),
    ],
)
def test_the_mode_is_known_before_the_flags_are_parsed(words, mode):
    assert start.last(["main.py", *words], "mode", "train") == mode


def test_output_on_a_full_disk_is_dropped_and_told_once(monkeypatch, capsys):
    stream = start.Lasting(open("/dev/full", "w"))  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    for _ in range(3):
        print("lost", flush=True)
    told = capsys.readouterr().err
    assert told == "warning: output is lost: No space left on device; the work goes on\n"
    monkeypatch.undo()


def test_output_without_a_reader_is_dropped_in_silence(monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    stream = start.Lasting(os.fdopen(writer, "w"))
    monkeypatch.setattr(sys, "stdout", stream)
    for _ in range(3):
        print("lost", flush=True)
    stream.close()  # nothing is held back that would fail now
    assert capfd.readouterr().err == ""
    monkeypatch.undo()


def test_a_terminal_that_does_not_know_a_character_shows_an_escape(tmp_path):
    path = tmp_path / "said"
    with path.open("w", encoding="ascii") as file:
        print("größe \udcff", file=start.Lasting(file))
    assert path.read_text() == "gr\\xf6\\xdfe \\udcff\n"


def shell(command, *words):
    """(standard output, standard error) of a line of the shell, in which $0 is Python."""
    words = ["sh", "-c", command, sys.executable, *words]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


def test_the_program_is_silent_when_its_reader_leaves():
    first = "usage: python main.py --mode=COMMAND --FLAG=VALUE ...\n"
    assert shell("$0 main.py --help | head -n 1") == (first, "")
    assert shell("$0 main.py --help >&-") == ("", "")
    assert shell("$0 main.py --mode=sample 2>&1 >/dev/full")[0].startswith("error: --workdir")


def test_a_closed_output_is_not_taken_for_the_next_file(tmp_path):
    code = (
        "import sys; from dmf.run import start; start.open_streams(); file = open(sys.argv[1], 'w')"
        "; print('said', flush=True); file.write('whole')"
    )
    path = tmp_path / "file"
    assert shell(f'$0 -c "{code}" {path} >&-') == ("", "")
    assert path.read_text() == "whole"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_removes_what_is_half_written(tmp_path, number, status):
    code = (
        "import sys, threading; from pathlib import Path; from dmf.run import start;"
        "from dmf.storage import atomic; start.begin(sys.argv); place = Path(sys.argv[2])\n"
        "with atomic.made(place) as half:\n"
        "    half.mkdir(); (half / 'part').write_text('x'); print('ready', flush=True)\n"
        "    threading.Event().wait(1e6)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--mode=export", str(tmp_path / "out")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    line = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped"}[number]
    assert (process.returncode, out, err) == (status, "", f"{line}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_after_the_work_is_done_leaves_the_status_alone():
    code = """
import os, signal, sys
from dmf.run import start
class Last:  # deleted after Python has given up its handlers
    def __del__(self, kill=os.kill, me=os.getpid(), numbers=(signal.SIGINT, signal.SIGTERM)):
        for number in numbers:
            kill(me, number)
start.begin(sys.argv)
sys.modules["last"] = Last()
print("done")
"""
    assert shell('$0 -c "$1"; echo $?', code) == ("done\n0\n", "")


def test_nothing_is_begun_after_the_end_has_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_beginning", threading.Lock())
    atomic.give_up()
    later = threading.Thread(target=atomic.write, args=(tmp_path / "late", b"x"), daemon=True)
    later.start()
    later.join(0.2)
    assert list(tmp_path.iterdir()) == []
    atomic._beginning.release()
    later.join(60)
    assert (tmp_path / "late").read_bytes() == b"x"
