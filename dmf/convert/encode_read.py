"""Images in chunks for an encoder, decoded by threads ahead of their use."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from dmf.data import images
from dmf.errors import DmfError

THREADS = max(2, min(16, os.cpu_count() or 2))
AHEAD = 3  # chunks that are decoded before the devices ask for them


class Chunk(NamedTuple):
    """Images [first, last) of one shard, which the devices take at once."""

    shard: int
    first: int
    last: int


# A chunk, its images (n, side, side, 3) uint8, and their labels (n,).
Decoded = tuple[Chunk, np.ndarray, np.ndarray]


def chunks(missing: Iterable[int], shard_size: int, count: int, size: int) -> Iterator[Chunk]:
    """The work in its order: `size` images at a time, and the rest at the end of a shard."""
    for shard in missing:
        end = min((shard + 1) * shard_size, count)
        for first in range(shard * shard_size, end, size):
            yield Chunk(shard, first, min(first + size, end))


def decoded(source: images.ImageSource, work: list[Chunk], side: int) -> Generator[Decoded]:
    """The chunks in their order, with square images of `side` pixels. Raises DmfError."""

    def example(i: int) -> tuple[np.ndarray, int]:
        image, label = source.example(i)
        if not 0 <= label < max(source.num_classes, 1):
            raise DmfError(
                f"image {i} of {source.about['name']} has label {label}: "
                f"expected 0 to {source.num_classes - 1}"
            )
        return images.center_crop(image, side), label

    pool = ThreadPoolExecutor(THREADS, "decode")
    waiting: deque[tuple[Chunk, list[Future[tuple[np.ndarray, int]]]]] = deque()
    todo = iter(work)
    try:
        while True:
            for chunk in itertools.islice(todo, AHEAD + 1 - len(waiting)):
                numbers = range(chunk.first, chunk.last)
                waiting.append((chunk, [pool.submit(example, i) for i in numbers]))
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
