"""Hinders a short run: full disks, missing rights, few file handles, paths that are no place.

    sudo python launch/tables/places.py --out=docs/places.json

The hindrance is then taken away and the command is given again. It must end with the same
metrics.jsonl and the same pictures as a run that nobody hindered. A row of the table tells the
status, the lines on stderr, and whether the run ended so. Mounts need root; without, their rows
are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
VALUES = {
    "curriculum.length": STEPS,
    "curriculum.stages": 2,
    "curriculum.kinds": "('all_pairs','all_pairs')",
    "curriculum.pretrain_length": 0,
    "guard.action": "off",
    "guard.every_steps": 0,
    "network.depth": 1,
    "network.width": 32,
    "run.checkpoint_every_steps": 3,
    "run.keep_checkpoints": 3,
    "run.score_samples": 0,
    "run.log_every_steps": 1,
    "run.sample_rows": 2,
    "run.tensorboard": False,
}
SAME = ("metrics.jsonl", "samples.png")


def run(root: Path, workdir: str, cwd: Path, limits: dict[int, int]) -> subprocess.Popen[str]:
    """Starts the training command. limits: of the process, by their number in `resource`."""

    def limit() -> None:
        for name, value in limits.items():
            resource.setrlimit(name, (value, value))

    flags = [f"--config.{name}={value}" for name, value in VALUES.items()]
    config = root / "configs" / "digits.py"
    return subprocess.Popen(
        [sys.executable, root / "main.py", f"--config={config}", *flags, f"--workdir={workdir}"],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,  # a pipe: no limit on files cuts it
        text=True,
        preexec_fn=limit,
        env={**os.environ, "PYTHONPATH": os.fspath(root)},
    )


class Case:
    """A folder for one case, how to hinder the run in it, and how to stop that."""

    def __init__(self, folder: Path, root: Path):
        self.folder, self.root = folder, root
        self.place, self.cwd = folder / "run", folder
        self.limits: dict[int, int] = {}
        self.during: Callable[[], None] | None = None
        self.undo: Callable[[], None] = lambda: None

    def once(self) -> tuple[int, list[str]]:
        """Status and lines on stderr of one start."""
        workdir = "" if self.place == Path() else os.fspath(self.place)
        process = run(self.root, workdir, self.cwd, self.limits)
        if self.during:
            threading.Thread(target=self._hinder, args=(process,), daemon=True).start()
        _, said = process.communicate(timeout=600)
        return process.returncode, said.splitlines()

    def _hinder(self, process: subprocess.Popen[str]) -> None:
        while process.poll() is None:
            if (self.place / "checkpoints" / "3" / "manifest.json").exists():
                assert self.during
                self.during()
                return
            time.sleep(0.001)


def mount(*words: str | Path) -> None:
    """Runs mount. Raises PermissionError where it may not."""
    if subprocess.run(["mount", *words], capture_output=True).returncode:
        raise PermissionError("mount")


def disk(kib: int) -> Callable[[Case], None]:
    """The run's disk has room for so much."""

    def prepare(case: Case) -> None:
        mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", case.folder)
        case.undo = lambda: mount("-o", "remount,size=100m", case.folder)

    return prepare


def limited(name: int, value: int) -> Callable[[Case], None]:
    """The process may have no larger file, or no more files open."""

    def prepare(case: Case) -> None:
        case.limits = {name: value}
        case.undo = case.limits.clear

    return prepare


def during(act: Callable[[Path, Path], None], back: Callable[[Path, Path], None]) -> Any:
    """Something happens to the checkpoints' folder, with another name beside it, after step 3."""

    def prepare(case: Case) -> None:
        folder, beside = case.place / "checkpoints", case.place / "moved"
        case.during = lambda: act(folder, beside)

        def undo() -> None:
            case.during = None
            back(folder, beside)

        case.undo = undo

    return prepare


def read_only(folder: Path, beside: Path) -> None:
    """Also root may not write there."""
    mount("--bind", folder, folder)
    mount("-o", "remount,ro,bind", folder)


def in_its_place(folder: Path, beside: Path) -> None:
    """A file of this name is there."""
    folder.rename(beside)
    folder.write_text("")


def back_from_beside(folder: Path, beside: Path) -> None:
    """The folder is there again, with what was in it."""
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.unlink(missing_ok=True)
    beside.rename(folder)


def unmount(folder: Path, beside: Path) -> None:
    """The folder may be written again."""
    subprocess.run(["umount", folder], check=True)


def nothing(folder: Path, beside: Path) -> None:
    """Leaves all as it is."""


def gone(folder: Path, beside: Path) -> None:
    """The folder is removed, also where somebody writes into it."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def named(name: str, make: Callable[[Path], None] | None = None) -> Callable[[Case], None]:
    """The work directory has this name. make: something is in its place before."""

    def prepare(case: Case) -> None:
        case.place = case.folder / name
        if make:
            make(case.place)

        def undo() -> None:
            case.place = case.folder / "run"

        case.undo = undo

    return prepare


def inside(name: str) -> Callable[[Case], None]:
    """The command is given inside a folder of this name, with a relative path."""

    def prepare(case: Case) -> None:
        case.cwd = case.folder / name
        case.cwd.mkdir()
        case.place = Path("run")

        def undo() -> None:
            case.cwd, case.place = case.folder, case.folder / "run"

        case.undo = undo

    return prepare


def empty(case: Case) -> None:
    """The name is empty, as an unset variable of a shell gives it."""
    place, case.place = case.place, Path()
    case.undo = lambda: setattr(case, "place", place)


def file_as_checkpoints(place: Path) -> None:
    """A file has the name of the checkpoints' folder."""
    place.mkdir()
    (place / "checkpoints").write_text("")


CASES: dict[str, Callable[[Case], None]] = {
    **{f"disk of {kib} KiB": disk(kib) for kib in (4, 8, 24, 200, 900, 1600, 3400)},
    **{f"files of at most {kib} KiB": limited(resource.RLIMIT_FSIZE, kib * 1024) for kib in (1, 8)},
    **{f"{n} open files": limited(resource.RLIMIT_NOFILE, n) for n in (40, 64, 96)},
    "checkpoints/ is removed": during(gone, nothing),
    "checkpoints/ is renamed": during(lambda f, b: f.rename(b) and None, back_from_beside),
    "checkpoints/ becomes a file": during(in_its_place, back_from_beside),
    "checkpoints/ becomes read-only": during(read_only, unmount),
    "lr[1e-3]": named("lr[1e-3]"),
    "lr[1e-3]/run": named("lr[1e-3]/run"),
    "a working directory lr[1e-3]": inside("lr[1e-3]"),
    "a*": named("a*"),
    "a link to nowhere": named("link", lambda place: place.symlink_to("nowhere")),
    "a file": named("file", lambda place: place.write_text("") and None),
    "checkpoints is a file": named("used", file_as_checkpoints),
    "an empty name": empty,
}


@contextmanager
def folder_of(base: Path) -> Iterator[Path]:
    """A fresh folder; what is mounted in it is unmounted at the end."""
    folder = Path(tempfile.mkdtemp(dir=base))
    try:
        yield folder
    finally:
        for place in (folder / "run" / "checkpoints", folder):
            while subprocess.run(["umount", "-q", place], capture_output=True).returncode == 0:
                pass


def tried(name: str, base: Path, root: Path, good: Path) -> dict[str, Any] | None:
    """The row of one case; None where it may not be tried."""
    with folder_of(base) as folder:
        case = Case(folder, root)
        with suppress(PermissionError):
            CASES[name](case)
            status, said = case.once()
            case.undo()
            again, more = case.once()
            same = again == 0 and all(
                (case.folder / case.place / n).read_bytes() == (good / n).read_bytes() for n in SAME
            )
            last = said[-1].replace(os.fspath(folder), "...") if said else ""
            return {
                "case": name,
                "status": status,
                "lines": len(said),
                "said": last,
                "again": again,
                "lines_again": len(more),
                "same_end": same,
            }
    return None


def main() -> None:
    """Tries all cases, prints a row for each, and stores them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose names hold this text")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to run")
    parser.add_argument("--out", type=Path, help="the .json to write")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as text:
        base = Path(text)
        programs = os.fspath(base / "programs")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", programs)
        good = Case(base, given.root)
        status, said = good.once()
        assert status == 0, said
        for name in CASES:
            if given.only in name and (row := tried(name, base, given.root, good.place)):
                rows.append(row)
                print(json.dumps(row), flush=True)
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
