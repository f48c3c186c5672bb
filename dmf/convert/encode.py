"""Images to latents, once: every image and its mirror image, to files in shards.

A killed command goes on when it is called again, and its files have the same bytes:

- a plan comes first and ties the directory to its settings (`dmf.convert.encode_claim`);
- every finished shard has a sidecar with its checksum (`dmf.data.shards`);
- the metadata come last.

All batches of a device have one shape; the last one of a shard is padded.
So neither an interruption nor the number of devices changes a value.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import itertools
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dmf import pretrained, sharding
from dmf.config import differences
from dmf.convert.encode_claim import claimed, intact, is_former
from dmf.convert.encode_read import Chunk, Decoded, chunks, decoded
from dmf.data import images, shards
from dmf.errors import DmfError
from dmf.logging import Count
from dmf.networks.every import AUTOENCODERS
from dmf.storage import paths, records

LAYOUT = (
    "record 2 i + flip of a shard: image i, or its mirror image, "
    "as mean then std, each (h, w, c), unscaled, little-endian"
)

FORMER = "its images are read as then, names of classes sorted as text and no EXIF applied"

# A chunk, its values (n, 2, 2, h, w, c), and its labels (n,).
Encoded = tuple[Chunk, np.ndarray, np.ndarray]
Program = Callable[[Any, jax.Array], jax.Array]


def encode(
    vae_dir: str | Path,
    source: str,
    out: str | Path,
    *,
    size: int = 256,
    shard_size: int = 4096,
    batch: int = 16,
    dtype: str = "float32",
    data_dir: str = "",
    split: str = "train",
) -> Path:
    """Encodes a source of images, or goes on with it; returns the folder of the split.

    - vae_dir: a converted autoencoder with its encoder (`--mode=convert`, a kind such as sd_vae).
    - source: a folder, an .npz or tfds:NAME; see `images.open_images` for data_dir and split.
    - out: directory to make. The split train, or a slice of it, goes to OUT/train.
      Any other goes to OUT/heldout.
    - size: side of the square that `images.center_crop` cuts.
    - shard_size: images per file; each takes two records.
    - batch: images that a device encodes at once, each with its mirror image.
      It is part of the settings.
    - dtype: float32 or float16, of the stored values.

    Raises DmfError for bad input, a directory begun with other settings, or a full disk.
    It does so too for an image that cannot be read or encoded, and for a batch too large.
    """
    _check_settings({"size": size, "shard_size": shard_size, "batch": batch}, dtype)
    folder = Path(paths.expanded(str(out))) / _part(split)
    former = is_former(folder)
    opened = images.open_images(source, data_dir, split, training=True, former=former)
    vae_folder, stored = pretrained.open_folder(vae_dir)
    how = {} if former else {"reading": images.READING, "classes": list(opened.classes)}
    plan = _plan(vae_dir, stored, opened, size, shard_size, batch, dtype) | how
    firsts = range(0, len(opened), shard_size)
    total = len(firsts)
    parts = [opened.part_sha256(i, min(i + shard_size, len(opened))) for i in firsts]
    files = [folder / shards.name(k, total) for k in range(total)]
    with claimed(folder, plan, dict(zip(files, parts, strict=True))):
        whole = intact(files, parts)
        missing = [k for k in range(total) if not whole[k]]
        _announce(source, opened, folder, former, whole)
        if missing:
            note_other_versions([file for file, good in zip(files, whole, strict=True) if good])
            shards.remove(folder / shards.METADATA)
            network, params = pretrained.load_folder(vae_folder, stored)
            _encode_shards(files, missing, plan, opened, network, params, parts)
            opened.tell_orientations()
        finish(folder, plan, files, f"{plan['count']:,} images and their mirror images")
    return folder


def _announce(
    source: str, opened: images.ImageSource, folder: Path, former: bool, whole: list[bool]
) -> None:
    """Prints what is encoded, and how much of it is there. whole: which shards are."""
    opened.announce()
    if former and opened.about["kind"] == "folder":
        print(f"note      {folder} was begun by an earlier version: {FORMER}", flush=True)
    what = f"{len(opened):,} images in {opened.num_classes or 'no'} classes"
    there = f"{sum(whole)} of {len(whole)} shards are there"
    print(f"encode    {source} to {folder}: {what}, {there}", flush=True)


def verify(out: str | Path) -> list[dict[str, Any]]:
    """Compares every file of the encoded splits below `out` with its SHA-256.

    out: the directory of the splits, or of one split. Returns the metadata of the splits.
    Raises DmfError that names the first file that is missing or damaged, or a split that is
    not encoded to its end.
    """
    root = Path(paths.expanded(str(out)))
    splits = [root / name for name in ("train", "heldout") if (root / name).is_dir()] or [root]
    found = []
    for folder in splits:
        about = shards.metadata(folder)
        entries = list(shards.files(about))
        progress = Count("verify", len(entries), "files")
        for done, (name, size, digest) in enumerate(entries, 1):
            shards.check_sum(folder / name, size, digest)
            progress.show(done)
        found.append(about)
    return found


def _check_settings(numbers: dict[str, int], dtype: str) -> None:
    if jax.process_count() > 1:
        raise DmfError(
            f"{jax.process_count()} processes: expected one; "
            "encoding over several hosts is not supported"
        )
    for name, value in numbers.items():
        if value < 1:
            raise DmfError(f"{name} is {value}: expected 1 or more")
    if dtype not in shards.DTYPES:
        raise DmfError(f"dtype is {dtype!r}: expected one of {', '.join(shards.DTYPES)}")


def _part(split: str) -> str:
    """The folder of a split: train or heldout. Raises DmfError if it may hold images of both."""
    if "+" in split or re.fullmatch(r"all(\[.*\])?", split):
        raise DmfError(
            f"split is {split!r}, which may mix what is trained on and what is held out: "
            "expected one split"
        )
    return "train" if re.fullmatch(r"train(\[.*\])?", split) else "heldout"


def _plan(
    vae_dir: str | Path,
    stored: dict[str, Any],
    source: images.ImageSource,
    size: int,
    shard_size: int,
    batch: int,
    dtype: str,
) -> dict[str, Any]:
    """All that the values depend on, as plain JSON. Raises DmfError."""
    config, _ = pretrained.described(stored)
    known = config.kind in AUTOENCODERS
    if not known or config.part != "both" or config.image_channels != 3:
        what = f"a {config.kind}"
        if known:
            what = f"the part {config.part!r} for {config.image_channels} channels"
        raise DmfError(
            f"{vae_dir} holds {what}: expected an autoencoder of RGB images with its encoder"
        )
    latent_shape = config.latent_shape(size)
    report = stored.get("source") or {}
    weights = {name: report.get("source", {}).get(name, "") for name in ("file", "copy", "sha256")}
    return {
        "format": shards.FORMAT,
        "count": len(source),
        "num_classes": source.num_classes,
        "latent_shape": list(latent_shape),
        "dtype": dtype,
        "layout": LAYOUT,
        "flips": True,
        "scale": config.scale,
        **({"shift": config.shift} if config.shift else {}),
        "image_size": size,
        "crop": images.CROP_RULE,
        "shard_size": shard_size,
        "batch_per_device": batch,
        "precision": "highest",
        "source": source.about,
        "vae": {**weights, "network": _network(stored)},
    }


def _network(stored: dict[str, Any]) -> dict[str, Any]:
    """The fields of the autoencoder. Folders of older code lack those that came later."""
    later = {"shift": 0.0, "quant": True}
    plain = json.loads(json.dumps(stored["network"]))
    return {key: x for key, x in plain.items() if key not in later or x != later[key]}


def note_other_versions(kept: list[Path]) -> None:
    """Prints a line where other libraries or devices have made the shards that are kept."""
    now = made_with()
    found = {
        d
        for file in kept
        for d in differences(shards.read_sidecar(file)["made_with"], now, "made_with")
    }
    if found:
        text = "; ".join(sorted(d.removeprefix("made_with.") for d in found))
        print(
            f"note      finished shards were made otherwise ({text}): "
            "the others may differ from them by round-off",
            flush=True,
        )


def _encode_shards(
    files: list[Path],
    missing: list[int],
    plan: dict[str, Any],
    source: images.ImageSource,
    network: Any,
    params: Any,
    identities: list[str],
) -> None:
    """Writes the missing shards, one after the other. identities: of the images of each shard."""
    mesh = sharding.make_mesh()
    size = plan["batch_per_device"] * mesh.devices.size
    work = list(chunks(missing, plan["shard_size"], len(source), size))
    progress, done = Count("encode", sum(c.last - c.first for c in work), "images"), 0
    inputs = decoded(source, work, plan["image_size"])
    dtype, batch = np.dtype(shards.DTYPES[plan["dtype"]]), plan["batch_per_device"]
    encoded = _encoded(inputs, _program(network, mesh), params, mesh, batch, dtype, source)

    def counted(parts: Iterable[Encoded]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        nonlocal done
        for _, values, labels in parts:
            yield values, {"labels": labels}
            done += len(labels)
            progress.show(done)

    with contextlib.closing(inputs), contextlib.closing(encoded):
        for shard, parts in itertools.groupby(encoded, lambda part: part[0].shard):
            shards.write_shard(files[shard], counted(parts), made_with(), identities[shard])


def _program(network: Any, mesh: Mesh) -> Program:
    """The encoder: (params, pixels (B, H, W, 3) uint8) -> (B, 2, 2, h, w, c), unscaled.

    The second axis is the image and its mirror image, the third mean and std.
    """

    def moments(params: Any, pixels: jax.Array) -> jax.Array:
        x = pixels.astype(jnp.float32) / 127.5 - 1
        both = jnp.stack([x, x[:, :, ::-1]], axis=1)
        mean, logvar = network.encode(params, both.reshape(-1, *x.shape[1:]))
        found = jnp.stack([mean, jnp.exp(logvar / 2)], axis=1)
        return found.reshape(-1, 2, *found.shape[1:])

    # A GPU may choose its algorithms by timing them. Fixed ones run after an interruption too.
    options = {"xla_gpu_deterministic_ops": True} if jax.default_backend() == "gpu" else None
    return sharding.per_device(mesh, jax.default_matmul_precision("highest")(moments), options)


@contextlib.contextmanager
def _fitting(batch: int) -> Iterator[None]:
    """Turns the error of a device without room for the program into one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = " ".join(str(error).split())[:200]
        raise DmfError(
            f"batch is {batch}: expected one that fits into the device's memory ({why}); "
            "a smaller one needs another directory if shards are finished in this one"
        ) from error


def _encoded(
    inputs: Iterable[Decoded],
    program: Program,
    params: Any,
    mesh: Mesh,
    batch: int,
    dtype: np.dtype,
    source: images.ImageSource,
) -> Generator[Encoded]:
    """The encoded chunks. While one is written, the devices work on the next. Raises DmfError."""

    def fetch(chunk: Chunk, result: jax.Array, labels: np.ndarray) -> Encoded:
        with np.errstate(over="ignore"), _fitting(batch):  # an overflow is refused below
            values = np.asarray(result)[: len(labels)].astype(dtype, copy=False)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
        if len(bad):
            i = chunk.first + int(bad[0])
            raise DmfError(
                f"image {i} of {source.about['name']} "
                f"has a latent that is not finite in {dtype.name}"
            )
        return chunk, values, labels

    pending: tuple[Chunk, jax.Array, np.ndarray] | None = None
    for chunk, pixels, labels in inputs:
        with _fitting(batch):
            result = program(params, sharding.put_padded(mesh, batch, pixels))
        if pending:
            yield fetch(*pending)
        pending = (chunk, result, labels)
    if pending:
        yield fetch(*pending)


def made_with() -> dict[str, str]:
    """Libraries and device, on which the bits depend too; others agree within round-off."""
    names = ("jax", "jaxlib", "numpy", "pillow", "array_record")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {**versions, "device": jax.devices()[0].device_kind}


def finish(
    folder: Path,
    plan: dict[str, Any],
    files: list[Path],
    what: str,
    more: dict[str, Any] | None = None,
) -> None:
    """Writes the labels of all shards as one file, then the metadata, and says so.

    what: is complete, in words. more: of the metadata, besides the plan.
    """
    sidecars = [shards.read_sidecar(file) for file in files]
    labels = np.concatenate([np.array(s["labels"], np.int32) for s in sidecars])
    entry = write_array(folder / shards.LABELS, labels)
    by: list[dict[str, str]] = []
    for sidecar in sidecars:
        if sidecar["made_with"] not in by:
            by.append(sidecar["made_with"])
    told = ("count", "bytes", "sha256")
    entries = [
        {"name": f.name, **{k: s[k] for k in told}} for f, s in zip(files, sidecars, strict=True)
    ]
    about = {**plan, **(more or {}), "made_with": by, "labels": entry, "shards": entries}
    shards.write_json(folder / shards.METADATA, records.sealed(about))
    size = f"{sum(e['bytes'] for e in entries) / 1e9:.2f} GB in {len(files)} shards"
    print(f"complete  {folder}: {what}, {size}")


def write_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Writes an array as .npy; returns its name, bytes and SHA-256."""
    content = io.BytesIO()
    np.save(content, array)
    shards.write(path, content.getvalue())
    return {"name": path.name, "bytes": len(content.getvalue()), "sha256": shards.sha256(path)}
