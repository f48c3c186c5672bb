"""Images from a folder, an .npz of samples or a TFDS data set, decoded one by one on demand.

Every source names what it holds: `ImageSource.about`, with a SHA-256 identity. Files that are made
of a source repeat it.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dmf.data import shards, tfds_images
from dmf.errors import DmfError
from dmf.storage import paths

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
TFDS = "tfds:"
CROP_RULE = (
    "ADM: halved by box while the shorter side >= 2 size, bicubic to shorter side = size, centre"
)


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Images of any size, by number. Reading is safe from several threads."""

    count: int
    num_classes: int  # 0: no classes, and every label is 0
    about: dict[str, Any]  # kind, name, split, count, sha256: plain values that JSON can hold
    example: Callable[[int], tuple[np.ndarray, int]]  # i -> (image as `read` gives it, label)
    # identity of the images [first, last); where parts have none, the identity of all images
    part_sha256: Callable[[int, int], str]

    def __len__(self) -> int:
        return self.count

    def read(self, i: int) -> np.ndarray:
        """Image i as (H, W, 3) uint8; grey becomes RGB, and transparency is dropped.

        Raises DmfError naming the image.
        """
        return self.example(i)[0]


def open_images(spec: str, data_dir: str = "", split: str = "train") -> ImageSource:
    """Opens a source of images; reads no pixels yet.

    Args:
      spec: one of these:
        a folder of PNG, JPEG and WebP files, with all its sub-folders. Files are sorted by relative
          path. All of them lie in sub-folders, whose order gives the labels, or none does.
        an .npz with `arr_0` (N, H, W, 3) uint8 and, if it has labels, `arr_1` (N,).
        tfds:NAME, a TFDS data set that is prepared as array_record.
      data_dir: where TFDS has prepared it; "" is $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      split: a split in TFDS's words, such as validation or train[:1%]. Other sources only repeat it
        in `about`.

    Raises:
      DmfError: there is no such source, it is empty, or it is not what is expected.
    """
    if spec.startswith(TFDS):
        return _open_tfds(spec.removeprefix(TFDS), data_dir, split)
    path = Path(paths.expanded(spec))
    if path.is_dir():
        return _open_folder(path, split)
    if path.suffix == ".npz" and path.is_file():
        return _open_npz(path, split)
    what = "is neither" if path.exists() else "does not exist"
    raise DmfError(
        f"image source {spec!r} {what}: expected a folder of images, an .npz with arr_0, or "
        "tfds:NAME"
    )


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The central square of an image, (H, W, 3) to (size, size, 3) uint8, by ADM's rule.

    Dhariwal and Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis" (`CROP_RULE`). Box
    halvings come first, as one bicubic step by a large factor skips pixels in other libraries.
    Raises DmfError for another shape or dtype.
    """
    if (
        image.ndim != 3
        or image.shape[2] != 3
        or image.dtype != np.uint8
        or 0 in image.shape
        or size < 1
    ):
        raise DmfError(
            f"center_crop of {image.dtype}{list(image.shape)} to {size}: expected uint8 (H, W, 3) "
            "and a side above 0"
        )
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    _check_pixels(
        width,
        height,
        f"an image of {image.shape[1]} x {image.shape[0]} enlarged to a shorter side of {size}",
    )
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(picture.crop((left, top, left + size, top + size)))


def _check_pixels(width: int, height: int, name: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise DmfError(
            f"{name} has {width} x {height} pixels: expected at most {limit:,}, the limit of PIL"
        )


def _decode(file: Path | io.BytesIO, name: str) -> np.ndarray:
    """(H, W, 3) uint8 of an image file."""
    try:
        with Image.open(file, formats=FORMATS) as picture:
            _check_pixels(*picture.size, f"image {name}")
            if picture.mode.startswith(("I", "F")):
                raise DmfError(
                    f"image {name} has pixels of kind {picture.mode}: expected 8 bits per channel"
                )
            return np.array(picture.convert("RGB"))
    except DmfError:
        raise
    except Exception as error:  # the parsers behind PIL raise errors of many types
        why = " ".join(str(error).replace(str(file), "").split())[:200]
        if shards.refused(error):
            raise DmfError(
                f"image {name} cannot be read ({why}): expected a readable file, and a disk in "
                "order"
            ) from error
        raise DmfError(
            f"image {name} cannot be read ({type(error).__name__}: {why}): expected an undamaged "
            "PNG, JPEG or WebP"
        ) from error


def _open_folder(root: Path, split: str) -> ImageSource:
    """Files in the order of their relative paths.

    The identity is made of names and sizes alone, so that opening reads no pixel.
    """
    sizes = _image_files(root)
    files = sorted(sizes)
    if not files:
        raise DmfError(
            f"folder {root} holds no images: expected files ending in {', '.join(SUFFIXES)}"
        )
    classes = _classes(root, files)
    index = {name: i for i, name in enumerate(classes)}
    labels = np.array([index.get(name.partition("/")[0], 0) for name in files], np.int32)

    def identity(first: int, last: int, labelled: bool = True) -> str:
        digest = hashlib.sha256()
        for name, label in zip(files[first:last], labels[first:last].tolist(), strict=True):
            digest.update(os.fsencode(f"{name}\0{sizes[name]}{f' {label}' if labelled else ''}\n"))
        return digest.hexdigest()

    return ImageSource(
        count=len(files),
        num_classes=len(classes),
        about=_about(
            "folder",
            root.resolve().name,
            split,
            len(files),
            identity(0, len(files), labelled=False),
        ),
        example=lambda i: (_decode(root / files[i], str(root / files[i])), int(labels[i])),
        part_sha256=identity,
    )


def _image_files(root: Path) -> dict[str, int]:
    """{relative path: bytes} of the images below a folder. Links are followed.

    Hidden files and folders are left out. Raises DmfError for a link that leads nowhere or to a
    folder that was seen before, and for what cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DmfError(
            f"{error.filename} cannot be read ({error.strerror}): expected readable folders and "
            "files"
        ) from error

    sizes: dict[str, int] = {}
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
            if name.lower().endswith(SUFFIXES):
                try:
                    sizes[path.relative_to(root).as_posix()] = path.stat().st_size
                except OSError as error:
                    refuse(error)
    return sizes


def _classes(root: Path, files: list[str]) -> list[str]:
    """The sub-folders in their order, if the images lie in them, else nothing.

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
    return sorted(used)


def _about(kind: str, name: str, split: str, count: int, digest: str) -> dict[str, Any]:
    return {"kind": kind, "name": name, "split": split, "count": count, "sha256": digest}


def _open_npz(path: Path, split: str) -> ImageSource:
    """Samples in ADM's format. An array that is stored uncompressed stays on disk."""
    damaged = (OSError, ValueError, KeyError, EOFError, RuntimeError)
    try:
        images, labels = _arrays(path)
        digest = paths.sha256(path)
    except (*damaged, zipfile.BadZipFile, zlib.error, struct.error) as error:
        why = " ".join(str(error).split())[:200]
        raise DmfError(
            f"{path} cannot be read ({type(error).__name__}: {why}): expected an undamaged .npz"
        ) from error
    if labels is not None:
        labels = _checked_labels(path, labels, images)
    return ImageSource(
        count=len(images),
        num_classes=0 if labels is None else int(labels.max()) + 1,
        about=_about("npz", path.name, split, len(images), digest),
        example=lambda i: (np.array(images[i]), 0 if labels is None else int(labels[i])),
        part_sha256=lambda first, last: digest,
    )


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The images arr_0, (N, H, W, 3) uint8, and arr_1 or None. Raises DmfError."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    wanted = "expected arr_0, images (N, H, W, 3) uint8"
    if "arr_0.npy" not in names:
        raise DmfError(f"{path} holds {', '.join(names)[:100] or 'nothing'}: {wanted}")
    images = _npz_array(path, "arr_0")
    shaped = images.ndim == 4 and images.shape[3] == 3 and 0 not in images.shape
    if images.dtype != np.uint8 or not shaped:
        found = f"arr_0 is {images.dtype}{list(images.shape)}"
        what = "expected images (N, H, W, 3) uint8, with values 0 to 255"
        raise DmfError(f"{path}: {found}: {what}")
    return images, _npz_array(path, "arr_1") if "arr_1.npy" in names else None


def _checked_labels(path: Path, labels: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The labels as (N,) int32. Raises DmfError for another shape, type or a negative one."""
    whole = labels.shape == images.shape[:1] and np.issubdtype(labels.dtype, np.integer)
    if not whole or labels.min() < 0:
        found = f"arr_1 is {labels.dtype}{list(labels.shape)}"
        raise DmfError(f"{path}: {found}: expected {len(images)} labels from 0 up")
    return labels.astype(np.int32)


def _npz_array(path: Path, name: str) -> np.ndarray:
    """An array of an .npz, mapped from the file where it is stored uncompressed.

    NumPy itself maps no array of an archive.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(member)
            header = member.tell()
    if info.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    with path.open("rb") as file:
        # A member's own header is 30 bytes long and ends in two lengths.
        file.seek(info.header_offset + 26)
        start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return np.memmap(path, dtype, "r", start + header, shape)


def _open_tfds(name: str, data_dir: str, split: str) -> ImageSource:
    """A prepared TFDS data set, whose image files are decoded here and not by TFDS."""
    found = tfds_images.open_records(name, data_dir, split)

    def example(i: int) -> tuple[np.ndarray, int]:
        record = found.get(i)
        image = _decode(io.BytesIO(record["image"]), f"{i} of {found.name} {split}")
        return image, int(record["label"]) if found.classes else 0

    return ImageSource(
        count=found.size,
        num_classes=found.classes,
        about=_about("tfds", found.name, split, found.size, found.sha256),
        example=example,
        part_sha256=lambda first, last: found.sha256,
    )
