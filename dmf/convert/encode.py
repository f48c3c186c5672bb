"""Images to latents, once: every image and its mirror image through a converted autoencoder, to sharded files.

Killed at any moment, the same command goes on, and ends in the same bytes as one that was never interrupted: a plan comes first
and ties the directory to its settings, every finished shard is vouched for (`dmf.data.shards`), and metadata come last. Every
shard is computed in batches of one shape per device, the last one padded, so that neither an interruption nor the number of
devices changes a value.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dmf import pretrained, sharding
from dmf.config import differences
from dmf.data import images, shards
from dmf.errors import DmfError
from dmf.logging import Count
from dmf.storage import paths

LAYOUT = "record 2 i + flip of a shard: image i, or its mirror image, as mean then std, each (h, w, c), unscaled, little-endian"
THREADS = max(2, min(16, os.cpu_count() or 2))  # that decode images
AHEAD = 3  # batches that are decoded before the devices ask for them


class Chunk(NamedTuple):
    """Images [first, last) of one shard, which the devices take at once."""

    shard: int
    first: int
    last: int


Decoded = tuple[Chunk, np.ndarray, np.ndarray]
Encoded = tuple[Chunk, np.ndarray, np.ndarray]


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
    """Encodes a source of images, or goes on with it; returns the folder, OUT/train or OUT/heldout.

    Args:
      vae_dir: a converted autoencoder with its encoder (`--mode=convert --kind=sd_vae`).
      source: a folder, an .npz or tfds:NAME, with `data_dir` and `split` as in `images.open_images`.
      out: directory to make; the split train, or a slice of it, goes to OUT/train, any other to OUT/heldout.
      size: side of the square that `images.center_crop` cuts.
      shard_size: images per file; each takes two records.
      batch: images that a device encodes at once, each with its mirror image; part of the settings.
      dtype: float32 or float16, of the stored values.

    Raises:
      DmfError: bad input, a directory begun with other settings, an image that cannot be read or encoded, a full disk, or a
        batch too large for the device.
    """
    _check_settings({"size": size, "shard_size": shard_size, "batch": batch}, dtype)
    folder = Path(out).expanduser() / _part(split)
    opened = images.open_images(source, data_dir, split)
    vae_folder, stored = pretrained.open_folder(vae_dir)
    plan = _plan(vae_dir, stored, opened, size, shard_size, batch, dtype)
    total = -(-len(opened) // shard_size)
    parts = [
        opened.part_sha256(k * shard_size, min((k + 1) * shard_size, len(opened)))
        for k in range(total)
    ]
    paths = [folder / shards.name(k, total) for k in range(total)]
    with _claimed(folder, plan, dict(zip(paths, parts, strict=True))):
        intact = shards.intact(paths, parts)
        missing = [k for k in range(total) if not intact[k]]
        what = f"{len(opened):,} images in {opened.num_classes or 'no'} classes"
        print(
            f"encode    {source} to {folder}: {what}, {total - len(missing)} of {total} shards are there",
            flush=True,
        )
        if missing:
            _note_other_versions([path for path, good in zip(paths, intact, strict=True) if good])
            shards.remove(folder / shards.METADATA)
            network, params = pretrained.load_folder(vae_folder, stored)
            _encode_shards(paths, missing, plan, opened, network, params, parts)
        _finish(folder, plan, paths)
    return folder


def _check_settings(numbers: dict[str, int], dtype: str) -> None:
    if jax.process_count() > 1:
        raise DmfError(
            f"{jax.process_count()} processes: expected one; encoding over several hosts is not supported"
        )
    for name, value in numbers.items():
        if value < 1:
            raise DmfError(f"{name} is {value}: expected 1 or more")
    if dtype not in shards.DTYPES:
        raise DmfError(f"dtype is {dtype!r}: expected one of {', '.join(shards.DTYPES)}")


def _part(split: str) -> str:
    """Where a split goes: train or heldout. Raises DmfError for one that may hold images of both."""
    if "+" in split or re.fullmatch(r"all(\[.*\])?", split):
        raise DmfError(
            f"split is {split!r}, which may mix what is trained on and what is held out: expected one split"
        )
    return "train" if re.fullmatch(r"train(\[.*\])?", split) else "heldout"


def _note_other_versions(kept: list[Path]) -> None:
    """Prints one line where shards are kept that other libraries or devices have made."""
    now = _made_with()
    found = {
        d
        for path in kept
        for d in differences(shards.read_sidecar(path)["made_with"], now, "made_with")
    }
    if found:
        text = "; ".join(sorted(d.removeprefix("made_with.") for d in found))
        print(
            f"note      finished shards were made otherwise ({text}): the others may differ from them by round-off",
            flush=True,
        )


def verify(out: str | Path) -> list[dict[str, Any]]:
    """Reads every byte of the encoded splits below `out`, or of `out` itself, against its SHA-256; returns their metadata.

    Raises DmfError naming the first file that is missing or damaged, or a split that is not encoded to its end.
    """
    root = Path(out).expanduser()
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


def _plan(
    vae_dir: str | Path,
    stored: dict[str, Any],
    source: images.ImageSource,
    size: int,
    shard_size: int,
    batch: int,
    dtype: str,
) -> dict[str, Any]:
    """All that the values depend on, as plain JSON."""
    config, _ = pretrained.described(stored)
    if config.kind != "vae" or config.part != "both" or config.image_channels != 3:
        what = (
            f"a {config.kind}"
            if config.kind != "vae"
            else f"the part {config.part!r} for {config.image_channels} channels"
        )
        raise DmfError(
            f"{vae_dir} holds {what}: expected an autoencoder of RGB images with its encoder"
        )
    if size % config.factor:
        raise DmfError(
            f"size is {size}: expected a multiple of {config.factor}, by which {vae_dir} shrinks an image"
        )
    report = stored.get("source") or {}
    weights = {name: report.get("source", {}).get(name, "") for name in ("file", "copy", "sha256")}
    return {
        "format": shards.FORMAT,
        "count": len(source),
        "num_classes": source.num_classes,
        "latent_shape": [size // config.factor, size // config.factor, config.latent_channels],
        "dtype": dtype,
        "layout": LAYOUT,
        "flips": True,
        "scale": config.scale,
        "image_size": size,
        "crop": images.CROP_RULE,
        "shard_size": shard_size,
        "batch_per_device": batch,
        "precision": "highest",
        "source": source.about,
        "vae": {**weights, "network": json.loads(json.dumps(stored["network"]))},
    }


@contextlib.contextmanager
def _claimed(folder: Path, plan: dict[str, Any], parts: dict[Path, str]) -> Iterator[None]:
    """Makes the folder, keeps other processes out of it, and ties it to the plan. parts: identity of the images by shard."""
    with contextlib.ExitStack() as held:
        with shards.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(
                paths.alone(
                    folder, f"{folder}: another process encodes into it; expected one at a time"
                )
            )
        shards.clear(folder)
        with shards.writing(folder):
            _settle(folder / shards.PLAN, plan, parts)
        yield


def _settle(path: Path, plan: dict[str, Any], parts: dict[Path, str]) -> None:
    """Ties a folder to the plan, which may take the place of another if finished work is not lost by it."""
    folder = path.parent
    if not path.exists():
        if any(p for p in folder.iterdir() if not p.name.startswith(".")):
            raise DmfError(
                f"{folder} is not empty, and holds no {shards.PLAN}: expected a new directory, or one that was begun"
            )
        shards.write_json(path, plan)
        return
    try:
        changed = differences(json.loads(path.read_text()), plan, "plan")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DmfError(
            f"{path} cannot be read ({type(error).__name__}): expected what an encoding wrote there"
        ) from error
    if not changed:
        return
    text = "; ".join(d.removeprefix("plan.") for d in changed)
    begun = shards.begun(folder)
    if not begun and not (folder / shards.METADATA).exists():
        for file in folder.glob("latents-*.array_record"):  # renamed, but not vouched for
            shards.remove(file)
        print(
            f"note      {folder} was begun otherwise, with no shard finished: it begins anew ({text})",
            flush=True,
        )
    else:
        kept = [p for p in begun if p in parts and _is_of(p, parts[p])]
        if not kept or any(not d.startswith("plan.source.sha256:") for d in changed):
            raise DmfError(
                f"{folder} was begun otherwise: {text}; expected the same command, or another directory{_advice(changed)}"
            )
        print(
            f"note      images were changed: {len(kept)} of {len(begun)} finished shards are of unchanged ones",
            flush=True,
        )
    shards.write_json(path, plan)


def _is_of(path: Path, identity: str) -> bool:
    """Whether a finished shard is of the images with this identity."""
    try:
        return shards.read_sidecar(path).get("images") == identity
    except DmfError:
        return False


def _advice(changed: list[str]) -> str:
    if not any(d.startswith("plan.source.count:") for d in changed):
        return ""
    return "; an image that cannot be read is replaced under its name, not removed, so that the others keep their numbers"


def _chunks(missing: Iterable[int], shard_size: int, count: int, size: int) -> Iterator[Chunk]:
    """The work in its order: `size` images at a time, and at the end of a shard what is left of it."""
    for shard in missing:
        end = min((shard + 1) * shard_size, count)
        for first in range(shard * shard_size, end, size):
            yield Chunk(shard, first, min(first + size, end))


def _encode_shards(
    paths: list[Path],
    missing: list[int],
    plan: dict[str, Any],
    source: images.ImageSource,
    network: Any,
    params: Any,
    identities: list[str],
) -> None:
    """Writes the shards `missing`, one after the other. identities: of the images of every shard."""
    mesh = sharding.make_mesh()
    size = plan["batch_per_device"] * mesh.devices.size
    work = list(_chunks(missing, plan["shard_size"], len(source), size))
    progress, done = Count("encode", sum(c.last - c.first for c in work), "images"), 0
    decoded = _decoded(source, work, plan["image_size"])
    dtype, batch = np.dtype(shards.DTYPES[plan["dtype"]]), plan["batch_per_device"]
    encoded = _encoded(decoded, _program(network, mesh), params, mesh, batch, dtype, source)

    def counted(parts: Iterable[Encoded]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal done
        for _, values, labels in parts:
            yield values, labels
            done += len(labels)
            progress.show(done)

    with contextlib.closing(decoded), contextlib.closing(encoded):
        for shard, parts in itertools.groupby(encoded, lambda part: part[0].shard):
            shards.write_shard(paths[shard], counted(parts), _made_with(), identities[shard])


def _decoded(source: images.ImageSource, work: list[Chunk], side: int) -> Generator[Decoded]:
    """(chunk, images (n, side, side, 3) uint8, labels (n,)) in order, decoded by threads some chunks ahead."""

    def example(i: int) -> tuple[np.ndarray, int]:
        image, label = source.example(i)
        if not 0 <= label < max(source.num_classes, 1):
            raise DmfError(
                f"image {i} of {source.about['name']} has label {label}: expected 0 to {source.num_classes - 1}"
            )
        return images.center_crop(image, side), label

    pool = ThreadPoolExecutor(THREADS, "decode")
    waiting: deque[tuple[Chunk, list[Future[tuple[np.ndarray, int]]]]] = deque()
    todo = iter(work)
    try:
        while True:
            for chunk in itertools.islice(todo, AHEAD + 1 - len(waiting)):
                waiting.append(
                    (chunk, [pool.submit(example, i) for i in range(chunk.first, chunk.last)])
                )
            if not waiting:
                return
            chunk, futures = waiting.popleft()
            pixels = np.zeros((len(futures), side, side, 3), np.uint8)
            labels = np.zeros(len(futures), np.int32)
            for row, future in enumerate(futures):
                pixels[row], labels[row] = future.result()
            yield chunk, pixels, labels
    finally:
        pool.shutdown(cancel_futures=True)


def _program(network: Any, mesh: Mesh) -> Callable[[Any, jax.Array], jax.Array]:
    """(params, pixels (B, H, W, 3) uint8) -> (B, 2, 2, h, w, c): of each image and its mirror image mean and std, unscaled."""

    def moments(params: Any, pixels: jax.Array) -> jax.Array:
        x = pixels.astype(jnp.float32) / 127.5 - 1
        both = jnp.stack([x, x[:, :, ::-1]], axis=1)
        mean, logvar = network.encode(params, both.reshape(-1, *x.shape[1:]))
        found = jnp.stack([mean, jnp.exp(logvar / 2)], axis=1)
        return found.reshape(-1, 2, *found.shape[1:])

    # On a GPU with algorithms that a timing run has not chosen, so that the same program also runs after an interruption.
    options = {"xla_gpu_deterministic_ops": True} if jax.default_backend() == "gpu" else None
    return sharding.per_device(mesh, jax.default_matmul_precision("highest")(moments), options)


@contextlib.contextmanager
def _fitting(batch: int) -> Iterator[None]:
    """A device without room for the program, as one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = " ".join(str(error).split())[:200]
        raise DmfError(
            f"batch is {batch}: expected one that fits into the device's memory ({why}); a smaller one needs another directory "
            "if shards are finished in this one"
        ) from error


def _encoded(
    decoded: Iterable[Decoded],
    program: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    mesh: Mesh,
    batch: int,
    dtype: np.dtype,
    source: images.ImageSource,
) -> Generator[Encoded]:
    """(chunk, values (n, 2, 2, h, w, c), labels (n,)); the devices work on one chunk while the one before it is written."""

    def fetch(chunk: Chunk, result: jax.Array, labels: np.ndarray) -> Encoded:
        with np.errstate(over="ignore"), _fitting(batch):  # an overflow is seen below
            values = np.asarray(result)[: len(labels)].astype(dtype, copy=False)
        bad = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
        if len(bad):
            i = chunk.first + int(bad[0])
            raise DmfError(
                f"image {i} of {source.about['name']} has a latent that is not finite in {dtype.name}"
            )
        return chunk, values, labels

    pending: tuple[Chunk, jax.Array, np.ndarray] | None = None
    for chunk, pixels, labels in decoded:
        with _fitting(batch):
            result = program(params, sharding.put_padded(mesh, batch, pixels))
        if pending:
            yield fetch(*pending)
        pending = (chunk, result, labels)
    if pending:
        yield fetch(*pending)


def _made_with() -> dict[str, str]:
    """What else the bits depend on; encodings on other devices agree within round-off only."""
    names = ("jax", "jaxlib", "numpy", "pillow", "array_record")
    return {name: importlib.metadata.version(name) for name in names} | {
        "device": jax.devices()[0].device_kind
    }


def _finish(folder: Path, plan: dict[str, Any], paths: list[Path]) -> None:
    """The labels of all shards as one file, then the metadata."""
    sidecars = [shards.read_sidecar(path) for path in paths]
    file = io.BytesIO()
    np.save(file, np.concatenate([np.array(s["labels"], np.int32) for s in sidecars]))
    path = folder / shards.LABELS
    shards.write(path, file.getvalue())
    labels = {"name": path.name, "bytes": len(file.getvalue()), "sha256": shards.sha256(path)}
    made_with: list[dict[str, str]] = []
    for sidecar in sidecars:
        if sidecar["made_with"] not in made_with:
            made_with.append(sidecar["made_with"])
    told = ("count", "bytes", "sha256")
    entries = [
        {"name": p.name, **{k: s[k] for k in told}} for p, s in zip(paths, sidecars, strict=True)
    ]
    about = {**plan, "made_with": made_with, "labels": labels, "shards": entries}
    shards.write_json(folder / shards.METADATA, shards.sealed(about))
    size = sum(e["bytes"] for e in entries)
    print(
        f"complete  {folder}: {plan['count']:,} images and their mirror images, {size / 1e9:.2f} GB in {len(paths)} shards"
    )
