"""Seconds from a run's start to its first step, with and without compiled programs on disk.

    python launch/tables/start_times.py --out=docs/start_times.json
    python launch/tables/start_times.py --firsts=1 --later=3 -- --config=configs/digits.py

Without flags behind --, the run is configs/cifar10.py with 4 mock images a batch.
A first start has an empty folder of compiled programs. A later start has the folder of the first
start before it. Every start is a new process in a new work directory. It is killed once it has
said when its first step began and how long that took. No cache makes the step itself shorter, so
the ratio compares the times to its beginning.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("--config=configs/cifar10.py", "--config.data.mock", "--config.batch_size=4")
ENDS = ("begun", "done")  # of the first step
SAID = re.compile(r"^first step begun after ([\d.]+) s, .* it took ([\d.]+) s$", re.MULTILINE)


def start(flags: list[str], programs: Path) -> tuple[float, float]:
    """Seconds to the start and end of a first step. Ends the program if the run fails before."""
    with tempfile.TemporaryDirectory(prefix="dmf-start-") as folder:
        said = Path(folder) / "said.txt"
        with said.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "main.py", *flags, f"--workdir={folder}/run"],
                cwd=ROOT,
                env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(programs)},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        while not (found := SAID.search(said.read_text())):
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            if not (found := SAID.search(said.read_text())):
                raise SystemExit(
                    f"error: the run ended before its first step:\n{said.read_text()[-2000:]}"
                )
            break
        process.kill()
        process.wait()
    begun, took = map(float, found.groups())
    return begun, round(begun + took, 1)


def measure(flags: list[str], firsts: int, later: int) -> dict[str, list[tuple[float, float]]]:
    """The starts: `later` ones in all, as evenly behind the first ones as can be."""
    found: dict[str, list[tuple[float, float]]] = {"first": [], "later": []}
    for i in range(firsts):
        with tempfile.TemporaryDirectory(prefix="dmf-programs-") as folder:
            count = (i + 1) * later // firsts - i * later // firsts
            for kind in ("first", *["later"] * count):
                found[kind].append(start(flags, Path(folder)))
                begun, done = found[kind][-1]
                said = f"first step begun after {begun:>6.1f} s, done after {done:>6.1f} s"
                print(f"  {kind:<6} {said}", flush=True)
    return found


def summary(found: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Medians of both kinds and their ratios, to the beginning and to the end of the first step."""
    medians = {
        f"{kind}_{what}_s": statistics.median(t[i] for t in found[kind])
        for kind in found
        for i, what in enumerate(ENDS)
    }
    ratios = {
        f"ratio_{what}": medians[f"first_{what}_s"] / medians[f"later_{what}_s"] for what in ENDS
    }
    return {name: round(value, 2) for name, value in (medians | ratios).items()}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--firsts", type=int, default=3)
    parser.add_argument("--later", type=int, default=6, help="no fewer than the first ones")
    parser.add_argument("--out", type=Path, help="JSON of all times")
    parser.add_argument("flags", nargs="*", default=[*FLAGS], help="of main.py, behind --")
    given = parser.parse_args()
    if not 1 <= given.firsts <= given.later:
        parser.error(
            f"--firsts={given.firsts} --later={given.later}: "
            "expected 1 or more, and no fewer later ones"
        )
    found = measure(given.flags, given.firsts, given.later)
    numbers = summary(found)
    for kind, times in found.items():
        begun, done = (numbers[f"{kind}_{end}_s"] for end in ENDS)
        print(
            f"{kind:<6} median of {len(times)}: begun after {begun:.1f} s, done after {done:.1f} s"
        )
    print(
        f"ratio  {numbers['ratio_begun']:.2f} x to the beginning of the first step, "
        f"{numbers['ratio_done']:.2f} x to its end"
    )
    if given.out:
        command = shlex.join(["python", "launch/tables/start_times.py", *sys.argv[1:]])
        stored = {
            "command": command,
            "cores": os.cpu_count(),
            "flags": given.flags,
            "starts": found,
            **numbers,
        }
        given.out.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
