"""A folder of images: which files are read, which are left out, and which classes they have."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dmf.errors import DmfError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Endings of images that are not read.
OTHERS = (
    *(".bmp", ".dib", ".gif", ".tif", ".tiff", ".jfif", ".jpe", ".jp2", ".jxl", ".avif", ".heic"),
    *(".heif", ".ppm", ".pgm", ".pnm", ".tga", ".ico", ".svg", ".dng", ".cr2", ".nef", ".arw"),
)
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}


@dataclass(frozen=True)
class Folder:
    """The images below a folder."""

    sizes: dict[str, int]  # relative path -> bytes, in the order of the paths
    classes: tuple[str, ...]  # names of sub-folders, in the order of the labels
    notes: tuple[str, ...]  # what a user should know, a line each
    splits: str  # "" or a line: the sub-folders are splits, and no classes


def read(root: Path, former: bool = False) -> Folder:
    """Looks for the images below a folder, and reads none.

    former: class folders sort as text, whatever their names, as in earlier versions.
    Raises DmfError where there are no images, or their classes are not clear.
    """
    sizes, left_out = _files(root)
    told = _left_out(left_out)
    if not sizes:
        also = f"; left out are {told}" if told else ""
        raise DmfError(
            f"folder {root} holds no images: expected files ending in {', '.join(SUFFIXES)}{also}"
        )
    used = _used(root, list(sizes))
    numbers = bool(used) and all(name.isascii() and name.isdigit() for name in used)
    by_text = tuple(sorted(used))
    classes = by_text
    if numbers and not former:
        classes = tuple(sorted(used, key=lambda name: (int(name), name)))
    notes = [f"left out of {root} by their endings: {told}"] if told else []
    if numbers and classes != tuple(map(str, range(len(classes)))) or classes != by_text:
        order = "text" if former else "numbers"
        first = ", ".join(f"{i} is {name}" for i, name in list(enumerate(classes))[:12])
        more = ", ..." if len(classes) > 12 else ""
        notes.append(f"class folders sort as {order}: class {first}{more}")
    notes += _one_level_down(root, list(sizes), used)
    return Folder(sizes, classes, tuple(notes), _splits(root, used))


def _files(root: Path) -> tuple[dict[str, int], Counter[str]]:
    """({relative path: bytes} of the images, {ending: count} of other files). Links are followed.

    Hidden files and folders are left out. Raises DmfError for a link that leads nowhere or to a
    folder that was seen before, and for what cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DmfError(
            f"{error.filename} cannot be read ({error.strerror}): expected readable folders and "
            "files"
        ) from error

    sizes: dict[str, int] = {}
    others: Counter[str] = Counter()
    seen: dict[str, str] = {}
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        first = seen.setdefault(os.path.realpath(folder), folder)
        if first != folder:
            raise DmfError(
                f"{folder} is {first} again, by a link: expected every folder of images once"
            )
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            if name.startswith("."):
                continue
            if path.is_symlink() and not os.path.exists(path):  # perhaps of a class
                raise DmfError(
                    f"{path} links to {os.readlink(path)}, which is not there: expected links to "
                    "files or folders"
                )
            if not name.lower().endswith(SUFFIXES):
                others[path.suffix.lower()] += 1
                continue
            try:
                sizes[path.relative_to(root).as_posix()] = path.stat().st_size
            except OSError as error:
                refuse(error)
    return dict(sorted(sizes.items())), others


def _left_out(others: Counter[str]) -> str:
    """Files that are not read, by kind: images of other kinds first, the most frequent first."""

    def told(endings: list[str]) -> str:
        return ", ".join(f"{others[e]:,} {e or 'without an ending'}" for e in endings)

    order = [ending for ending, _ in others.most_common()]
    pictures = [e for e in order if e in OTHERS]
    rest = [e for e in order if e not in OTHERS]
    if len(rest) > 8:
        rest, more = rest[:8], f" and {len(rest) - 8} more endings"
    else:
        more = ""
    read = f"{told(pictures)} (images, but read are {', '.join(SUFFIXES)})" if pictures else ""
    return "; ".join(filter(None, (read, told(rest) + more)))


def _used(root: Path, files: list[str]) -> set[str]:
    """The sub-folders, if the images lie in them, else nothing.

    Raises DmfError where only some images do, or a sub-folder has no image.
    """
    used = {name.partition("/")[0] for name in files if "/" in name}
    stray = [name for name in files if "/" not in name]
    if stray and used:
        raise DmfError(
            f"{root / stray[0]} lies beside {len(used)} folders of images, such as {min(used)}, "
            "and has no class: expected all images in sub-folders, or none"
        )
    there = [
        path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")
    ]
    empty = sorted(set(there) - used) if used else []
    if empty:
        raise DmfError(
            f"{root / empty[0]} holds no images, so that it is not clear how classes are counted: "
            "expected images, or no folder"
        )
    return used


def _splits(root: Path, used: set[str]) -> str:
    if not used or not {name.lower() for name in used} <= SPLITS:
        return ""
    names = sorted(used)
    first = next((name for name in names if name.lower().startswith("train")), names[0])
    return (
        f"{root} holds {', '.join(names)}, which are splits and no classes: expected one of them, "
        f"such as --source={root / first}"
    )


def _one_level_down(root: Path, files: list[str], used: set[str]) -> list[str]:
    """A note where the one class folder holds nothing but folders of images."""
    if len(used) != 1 or _splits(root, used):
        return []
    below = {name.split("/")[1] for name in files if name.count("/") > 1}
    if not below or any(name.count("/") == 1 for name in files):
        return []
    (only,) = used
    return [
        f"all images lie in {root / only}, so there is one class; if its {len(below)} folders are "
        f"the classes, give --source={root / only}"
    ]
