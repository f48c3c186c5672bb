"""Interrupts short commands at random times, by Ctrl-C and by SIGTERM, and looks at what is left.

    python launch/tables/interrupts.py --each=12 --out=docs/interrupts.json

The commands are train, sample, convert, export and score, each with the same number of signals.
Half of the signals are SIGINT, half are SIGTERM. They come at random times in the first ten
seconds, or in the command's whole duration if that is shorter. The clock starts at the first line
of the program. An end is right if all of this holds:

    one line tells the signal, and no traceback is printed
    the status is 130 by SIGINT and 143 by SIGTERM; training saves and ends by SIGTERM with 0
    --out is whole or absent, and no unfinished file or folder is left
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LONGEST_S = 10.0
PATIENCE_S = 300.0  # for the end of a command
LINE = re.compile(r"(stopped|interrupted)\b.*")
TINY = (
    "--config=configs/digits.py",
    "--config.network.depth=1",
    "--config.network.width=32",
    "--config.curriculum.stages=3",
    "--config.run.checkpoint_every_steps=20",
    "--config.run.score_samples=64",
    "--config.run.score_steps=(1,2)",
    "--config.run.sample_rows=2",
)


def commands(folder: Path, run: Path, file: Path) -> dict[str, tuple[list[str], Path]]:
    """Name of a command -> (its flags, what it writes)."""
    long = ["--config.curriculum.length=99999", "--config.curriculum.pretrain_length=100000"]
    steps = ["--steps=1,2,4"]
    return {
        "train": ([*TINY, *long], folder / "run"),
        "sample": (["--mode=sample", f"--workdir={run}", "--steps=64"], folder / "grid.png"),
        "convert": (["--mode=convert", "--kind=dmf", f"--source={file}"], folder / "converted"),
        "export": (["--mode=export", f"--workdir={run}", *steps], folder / "exported"),
        "score": (["--mode=score", f"--workdir={run}", *steps], folder / "scores.json"),
    }


def started(flags: list[str], out: Path, said: Path) -> subprocess.Popen[bytes]:
    """The command as a process that writes standard output and error into one file."""
    place = "--out" if any(flag.startswith("--mode=") for flag in flags) else "--workdir"
    with said.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "main.py", *flags, f"{place}={out}"],
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            # Else a shell's job in the background would pass on that it ignores SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def listens(process: subprocess.Popen[bytes]) -> bool:
    """Whether the program has begun to hear SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = re.search(r"SigCgt:\s*(\w+)", status)
    return bool(caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def interrupted(flags: list[str], out: Path, number: int, after_s: float) -> tuple[str, str]:
    """(what came of it: right, ended or wrong; the last line) of one signal after so long."""
    said = out.parent / "said.txt"
    process = started(flags, out, said)
    while process.poll() is None and not listens(process):
        time.sleep(0.001)
    time.sleep(after_s)
    process.send_signal(number)
    status = process.wait(PATIENCE_S)
    text = said.read_text(errors="replace")
    lines = [line for line in text.splitlines() if LINE.match(line)]
    left = [path for path in out.parent.rglob("*") if "partial" in path.name]
    clean = (
        "Traceback" not in text
        and "rror:" not in text
        and not left
        and (not out.exists() or is_whole(out))
    )
    if status == 0 and not lines and clean:
        return "ended", ""
    training = not any(flag.startswith("--mode=") for flag in flags)
    expected = {signal.SIGINT: 130, signal.SIGTERM: 0 if training else 143}[signal.Signals(number)]
    right = clean and status == expected and len(lines) == 1
    return ("right", lines[0]) if right else ("wrong", f"status {status}, {left}: {text[-2000:]}")


def is_whole(out: Path) -> bool:
    """Whether what a command has written can be read. A run's folder is checked at its end."""
    if out.suffix == ".png":
        from PIL import Image

        Image.open(out).load()
    elif out.suffix == ".json":
        json.loads(out.read_text())
    elif out.name == "converted":
        return (out / "manifest.json").exists()
    elif out.name == "exported":
        return (out / "README.md").exists()
    return True


def trial(folder: Path, each: int, seed: int) -> dict[str, Any]:
    """Interrupts every command so often; returns the counts by command and what was wrong."""
    rng = random.Random(seed)
    run, file = folder / "trained", folder / "weights.safetensors"
    short = ["--config.curriculum.length=30", "--config.curriculum.pretrain_length=20"]
    finished([*TINY, *short, f"--workdir={run}"])
    finished(["--mode=export", f"--workdir={run}", f"--out={file}"])
    counts: dict[str, Counter[str]] = {}
    wrong, lines = [], Counter[str]()
    for name, (flags, out) in commands(folder / "work", run, file).items():
        longest_s = LONGEST_S if name == "train" else duration(flags, out)
        counts[name] = Counter(duration_s=round(longest_s, 1))  # type: ignore[call-overload]
        for i in range(each):
            number = (signal.SIGINT, signal.SIGTERM)[i % 2]
            if name != "train":  # the same run is interrupted, and goes on
                shutil.rmtree(out.parent, ignore_errors=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            after_s = rng.uniform(0, min(longest_s, LONGEST_S))
            outcome, line = interrupted(flags, out, number, after_s)
            counts[name][outcome] += 1
            lines[re.sub(r"\d+", "N", line) if outcome != "wrong" else outcome] += 1
            if outcome == "wrong":
                wrong.append(f"{name}, {number.name} after {after_s:.2f} s: {line}")
        print(f"  {name:<10}{dict(counts[name])}", flush=True)
    return {"counts": counts, "lines": lines, "wrong": wrong}


def duration(flags: list[str], out: Path) -> float:
    """Seconds that the command takes undisturbed."""
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir(parents=True)
    began = time.monotonic()
    finished([*flags, f"--out={out}"])
    return time.monotonic() - began


def finished(flags: list[str]) -> None:
    """Runs a command to its end. Raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, "main.py", *flags], cwd=ROOT, check=True, capture_output=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--each", type=int, default=12, help="signals per command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="", help="JSON of the outcome")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dmf-interrupts-") as folder:
        outcome = trial(Path(folder), given.each, given.seed)
    for line in outcome["wrong"]:
        print(f"wrong: {line}")
    if given.out:
        command = f"python launch/tables/interrupts.py --each={given.each} --out={given.out}"
        Path(given.out).write_text(json.dumps({"command": command, **outcome}, indent=1) + "\n")
    raise SystemExit(bool(outcome["wrong"]))


if __name__ == "__main__":
    main()
