"""Images from a folder, an .npz of samples or a TFDS data set, decoded one by one on demand.

Every source names what it holds: `ImageSource.about`, with a SHA-256 identity. Files that are made
of a source repeat it.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dmf.data import folders, shards, tfds_images
from dmf.errors import DmfError, printable
from dmf.storage import paths

FORMATS = ("PNG", "JPEG", "WEBP")
TFDS = "tfds:"
ORIENTATION = 0x0112  # EXIF's tag
LARGEST = 2**31 - 2  # a label, so that the number of classes fits into 32 bits too
READING = "of a folder: names of classes that are numbers sort as numbers; EXIF orientation applied"
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
    classes: tuple[str, ...] = ()  # names in the order of the labels, () where they are not known
    notes: tuple[str, ...] = ()  # what was left out, or may be another way than expected
    oriented: Set[int] = frozenset()  # images read so far whose EXIF tells an orientation
    upright: bool = False  # they were turned by it

    def __len__(self) -> int:
        return self.count

    def read(self, i: int) -> np.ndarray:
        """Image i as (H, W, 3) uint8; grey becomes RGB, and transparency is dropped.

        Raises DmfError naming the image.
        """
        return self.example(i)[0]

    def announce(self) -> None:
        """Prints the notes, and the classes by their names."""
        for note in self.notes:
            print(printable(f"note      {note}"), flush=True)
        if self.classes:
            named = ", ".join(f"{i} {name}" for i, name in enumerate(self.classes[:10]))
            more = f", and {len(self.classes) - 10} more" if len(self.classes) > 10 else ""
            print(printable(f"classes   {named}{more}"), flush=True)

    def tell_orientations(self) -> None:
        """Prints how many of the images that were read have an EXIF orientation, if any."""
        if self.oriented:
            how = (
                "were turned upright by it"
                if self.upright
                else ("were read as they are stored, as libraries of scores read them")
            )
            print(f"note      {len(self.oriented)} images have an EXIF orientation and {how}")


def open_images(
    spec: str,
    data_dir: str = "",
    split: str = "train",
    training: bool = False,
    former: bool = False,
) -> ImageSource:
    """Opens a source of images; reads no pixels yet.

    Args:
      spec: one of these:
        a folder of PNG, JPEG and WebP files, with all its sub-folders. Files are sorted by relative
          path. All of them lie in sub-folders, whose order gives the labels, or none does. Names
          that are all numbers sort as numbers.
        an .npz with `arr_0` (N, H, W, 3) uint8 and, if it has labels, `arr_1` (N,).
        tfds:NAME, a TFDS data set that is prepared as array_record.
      data_dir: where TFDS has prepared it; "" is $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      split: a split in TFDS's words, such as validation or train[:1%]. Other sources only repeat it
        in `about`.
      training: images of a folder are turned upright by their EXIF orientation, and sub-folders
        that are splits, such as train and val, are refused. Scores read pixels as they are stored.
      former: as earlier versions read a folder for training: names sort as text, pixels as stored.

    Raises:
      DmfError: there is no such source, it is empty, or it is not what is expected.
    """
    if spec.startswith(TFDS):
        return _open_tfds(spec.removeprefix(TFDS), data_dir, split)
    path = Path(paths.expanded(spec))
    if path.is_dir():
        return _open_folder(path, split, training and not former, former)
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


def _decode(file: Path | io.BytesIO, name: str, upright: bool) -> tuple[np.ndarray, bool]:
    """((H, W, 3) uint8 of an image file, whether its EXIF tells an orientation).

    upright: it is turned by that.
    """
    try:
        with Image.open(file, formats=FORMATS) as picture:
            _check_pixels(*picture.size, f"image {name}")
            if picture.mode.startswith(("I", "F")):
                raise DmfError(
                    f"image {name} has pixels of kind {picture.mode}: expected 8 bits per channel"
                )
            turned = _orientation(picture) in range(2, 9)
            found = ImageOps.exif_transpose(picture) if turned and upright else picture
            return np.array(found.convert("RGB")), turned
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


def _open_folder(root: Path, split: str, training: bool, former: bool) -> ImageSource:
    """Files in the order of their relative paths.

    The identity is made of names and sizes alone, so that opening reads no pixel.
    """
    found = folders.read(root, former)
    if found.splits and training:
        raise DmfError(found.splits)
    sizes, files = found.sizes, list(found.sizes)
    index = {name: i for i, name in enumerate(found.classes)}
    labels = np.array([index.get(name.partition("/")[0], 0) for name in files], np.int32)
    oriented: set[int] = set()

    def identity(first: int, last: int, labelled: bool = True) -> str:
        digest = hashlib.sha256()
        for name, label in zip(files[first:last], labels[first:last].tolist(), strict=True):
            digest.update(os.fsencode(f"{name}\0{sizes[name]}{f' {label}' if labelled else ''}\n"))
        return digest.hexdigest()

    def example(i: int) -> tuple[np.ndarray, int]:
        file = root / files[i]
        image, turned = _decode(file, str(file), training)
        if turned:
            oriented.add(i)
        return image, int(labels[i])

    about = _about("folder", root.resolve().name, split, len(files), identity(0, len(files), False))
    return ImageSource(
        count=len(files),
        num_classes=len(found.classes),
        about=about,
        example=example,
        part_sha256=identity,
        classes=found.classes,
        notes=(*found.notes, *filter(None, [found.splits])),
        oriented=oriented,
        upright=training,
    )


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(ORIENTATION, 1)
    except Exception:  # the parsers behind PIL raise errors of many types
        return 1  # pixels without readable EXIF are as good as before


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
    notes: tuple[str, ...] = ()
    if labels is not None:
        labels = _checked_labels(path, labels, images)
        held = np.unique(labels)
        absent, largest = int(held[-1]) + 1 - len(held), int(held[-1])
        if absent:
            first = next(i for i, label in enumerate((*held.tolist(), -1)) if i != label)
            what = f"{absent} of its classes 0 to {largest} have no image, such as {first}"
            notes = (f"{path}: {what}; labels count from 0",)
    return ImageSource(
        count=len(images),
        num_classes=0 if labels is None else int(labels.max()) + 1,
        about=_about("npz", path.name, split, len(images), digest),
        example=lambda i: (np.array(images[i]), 0 if labels is None else int(labels[i])),
        part_sha256=lambda first, last: digest,
        notes=notes,
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
    if labels.max() > LARGEST:
        raise DmfError(f"{path}: arr_1 holds {labels.max()}: expected labels of at most {LARGEST}")
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
    held = info.file_size - header
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != held:
        what = f"{name} declares shape {shape} of {dtype} but holds {held} bytes"
        raise DmfError(f"{path}: {what}: expected a whole array")
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
        # Published code reads the pixels of such data sets as they are stored.
        image, _ = _decode(io.BytesIO(record["image"]), f"{i} of {found.name} {split}", False)
        return image, int(record["label"]) if found.classes else 0

    return ImageSource(
        count=found.size,
        num_classes=found.classes,
        about=_about("tfds", found.name, split, found.size, found.sha256),
        example=example,
        part_sha256=lambda first, last: found.sha256,
    )
