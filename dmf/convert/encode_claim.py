"""Who may write into a folder of shards, with which settings, and which shards stand already."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dmf.config import differences
from dmf.data import shards
from dmf.errors import DmfError, printable
from dmf.logging import Count
from dmf.storage import paths, records

PLANNED = "what the command wrote there"
VERIFIERS = 4  # threads: hashing frees the interpreter's lock


@contextlib.contextmanager
def claimed(folder: Path, plan: dict[str, Any], parts: dict[Path, str]) -> Iterator[None]:
    """Makes the folder, keeps other processes out of it, and ties it to the plan.

    parts: shard -> identity of its images. Raises DmfError.
    """
    taken = f"{folder}: another process writes into it; expected one at a time"
    with contextlib.ExitStack() as held:
        with shards.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(paths.alone(folder, taken))
        shards.clear(folder)
        with shards.writing(folder):
            _settle(folder / shards.PLAN, plan, parts)
        yield


def is_former(folder: Path) -> bool:
    """Whether finished work of an earlier version is there, which did not note how it read."""
    if not (folder / shards.PLAN).exists():
        return False
    if not shards.begun(folder) and not (folder / shards.METADATA).exists():
        return False
    return "reading" not in records.read(folder / shards.PLAN, dict, PLANNED)


def _settle(path: Path, plan: dict[str, Any], parts: dict[Path, str]) -> None:
    """Writes the plan of a folder, or compares it with the one that is there.

    A new plan may replace another where no finished work is lost. Raises DmfError.
    """
    folder = path.parent
    if not path.exists():
        if any(p for p in folder.iterdir() if not p.name.startswith(".")):
            raise DmfError(
                f"{folder} is not empty, and holds no {shards.PLAN}: "
                "expected a new directory, or one that was begun"
            )
        shards.write_json(path, plan)
        return
    changed = _changes(path, plan)
    if not changed:
        return
    text = "; ".join(f"{d.removeprefix('plan.'):.200}" for d in changed)
    begun = shards.begun(folder)
    if not begun and not (folder / shards.METADATA).exists():
        for file in folder.glob("*-of-*.array_record"):  # in place, but without a sidecar
            shards.remove(file)
        what = "was begun otherwise, with no shard finished: it begins anew"
        print(printable(f"note      {folder} {what} ({text})"), flush=True)
    else:
        kept = [p for p in begun if p in parts and _is_of(p, parts[p])]
        if not kept or any(
            not d.startswith(("plan.source.sha256:", "plan.classes:")) for d in changed
        ):
            raise DmfError(
                f"{folder} was begun otherwise: {text}; "
                f"expected the same command, or another directory{_advice(changed)}"
            )
        counts = f"{len(kept)} of {len(begun)} finished shards"
        print(f"note      images were changed: {counts} are of unchanged ones", flush=True)
    shards.write_json(path, plan)


def _changes(path: Path, plan: dict[str, Any]) -> list[str]:
    """What differs between the plan of a file and this one. Raises DmfError."""
    return differences(records.read(path, dict, PLANNED), plan, "plan")


def _is_of(path: Path, identity: str) -> bool:
    """Whether a finished shard is of the images with this identity."""
    try:
        return shards.read_sidecar(path).get("images") == identity
    except DmfError:
        return False


def _advice(changed: list[str]) -> str:
    if not any(d.startswith("plan.source.count:") for d in changed):
        return ""
    return (
        "; an image that cannot be read is replaced under its name, not removed, "
        "so that the others keep their numbers"
    )


def intact(files: Sequence[Path], images: Sequence[str]) -> list[bool]:
    """Which shards are complete, of the images with these identities, and unaltered.

    Reads all of them. Prints its progress, and a line for each that is there but not intact.
    """

    def trouble(k: int) -> str:
        try:
            entry = shards.read_sidecar(files[k])
            if entry.get("images") != images[k]:
                return f"{files[k]} is of other images"
            shards.check_sum(files[k], entry["bytes"], entry["sha256"])
            return ""
        except DmfError as error:
            return str(error)

    there = [k for k, file in enumerate(files) if shards.sidecar(file).exists()]
    progress, found = Count("verify", len(there), "shards"), {}
    with ThreadPoolExecutor(VERIFIERS, "verify") as pool:
        for done, (k, why) in enumerate(zip(there, pool.map(trouble, there), strict=True), 1):
            found[k] = why
            progress.show(done)
    for why in filter(None, found.values()):
        print(printable(f"again     {why}"), flush=True)
    return [found.get(k) == "" for k in range(len(files))]
