"""What a protocol needs to remember of its samples: moments, Inception Score and features, filled in one pass.

Rows come in the order of the samples and in parts of a fixed size, so that sums in float64 round the same way however the
work was shared between devices or interrupted.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np

from dmf.errors import DmfError
from dmf.evaluation.protocols import FILE_ORDER, Protocol
from dmf.evaluation.reference import Reference
from dmf.metrics.frechet import MomentSums, frechet_distance
from dmf.metrics.inception_score import InceptionScore
from dmf.metrics.kid import kernel_distance
from dmf.metrics.precision_recall import precision_recall

PART = 1024  # rows that are added at once
MOMENTS = {"pool": "fid", "spatial": "sfid"}  # features -> the score their moments make
STATE, FEATURES = "totals.npz", "features.npy"


class Totals:
    """Sums over `count` samples of a protocol. folder: where they are kept between interruptions, or None.

    add(features of the next PART rows; the last part may be shorter) until `done` is `count`; then `scores`.
    keep: rows whose features stay in memory or on disk, for KID, precision and recall; None for what the protocol needs.
    """

    def __init__(
        self,
        protocol: Protocol,
        count: int,
        folder: Path | None = None,
        keep: np.ndarray | None = None,
    ):
        self.protocol, self.count, self.done, self._folder = protocol, count, 0, folder
        metrics = protocol.metrics
        self._sums = {
            name: MomentSums()
            for name, score in MOMENTS.items()
            if score in metrics or name == "pool"
        }
        order = None
        if protocol.is_shuffle_seed != FILE_ORDER:
            order = np.argsort(np.random.RandomState(protocol.is_shuffle_seed).permutation(count))
        self._is = InceptionScore(count, protocol.is_splits, order) if "is" in metrics else None
        wanted = bool({"kid", "precision_recall"} & set(metrics))
        self._keep = np.arange(count if wanted else 0) if keep is None else keep
        self.features: np.ndarray | None = None

    def add(self, found: dict[str, np.ndarray]) -> None:
        """Takes in the features of the next rows."""
        rows = len(found["pool"])
        if rows != min(PART, self.count - self.done):
            raise DmfError(
                f"{rows} rows of features after {self.done} of {self.count}: expected the next {PART}, or the rest"
            )
        for name, sums in self._sums.items():
            sums.add(found[name])
        if self._is:
            self._is.add(found["logits"])
        if len(self._keep):
            first, last = np.searchsorted(self._keep, (self.done, self.done + rows))
            if self.features is None:
                self.features = self._open_features(found["pool"].shape[1], "w+")
            self.features[first:last] = found["pool"][self._keep[first:last] - self.done]
        self.done += rows

    def scores(self, reference: Reference) -> dict[str, float]:
        """The protocol's scores, of those that the reference serves. Raises DmfError before all rows are in."""
        if self.done != self.count:
            raise DmfError(f"scores of {self.done} samples: expected all {self.count}")
        found: dict[str, float] = {}
        for name, sums in self._sums.items():
            if name in reference.moments and MOMENTS[name] in self.protocol.metrics:
                found[MOMENTS[name]] = frechet_distance(sums.moments(), reference.moments[name])
        if self._is:
            found["is"], found["is_std"] = self._is.result()
        real, fake, p = reference.features, self.features, self.protocol
        if fake is not None and real is not None and "kid" in p.metrics:
            found["kid"], found["kid_std"] = kernel_distance(
                real, np.asarray(fake), p.kid_subsets, p.kid_subset_size
            )
        if fake is not None and real is not None and "precision_recall" in p.metrics:
            found["precision"], found["recall"] = precision_recall(
                real, np.asarray(fake), p.neighbours
            )
        return found | {"n_samples": float(self.count)}

    def reference(self, about: dict[str, str | int]) -> Reference:
        """The same sums as a reference for others."""
        features = None if self.features is None else np.array(self.features)
        return Reference(
            {name: sums.moments() for name, sums in self._sums.items()}, features, None, about
        )

    def save(self) -> None:
        """Writes the sums to the folder, whole or not at all."""
        if self._folder is None:
            return
        if isinstance(self.features, np.memmap):
            self.features.flush()
        states = {
            f"{name}/{k}": v for name, sums in self._sums.items() for k, v in sums.state().items()
        }
        if self._is:
            states |= {f"is/{k}": v for k, v in self._is.state().items()}
        buffer = io.BytesIO()
        states |= {"done": np.asarray(self.done), "count": np.asarray(self.count)}
        np.savez(buffer, **cast(Any, states))
        partial = self._folder / f"{STATE}.tmp"
        try:
            with partial.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._folder / STATE)
        except OSError as error:
            raise DmfError(
                f"{self._folder}: sums cannot be written ({error.strerror}); expected a disk with room"
            ) from error

    def restore(self) -> None:
        """Goes on where the folder's last `save` was; does nothing where there is none."""
        if self._folder is None or not (self._folder / STATE).is_file():
            return
        try:
            with np.load(self._folder / STATE, allow_pickle=False) as stored:
                states = {name: stored[name] for name in stored.files}
            if int(states.pop("count")) != self.count:
                raise ValueError("another number of samples")
            self.done = int(states.pop("done"))
            rooms: dict[str, dict[str, np.ndarray]] = {}
            for name, value in states.items():
                rooms.setdefault(name.split("/")[0], {})[name.split("/")[1]] = value
            self._sums = {name: MomentSums.from_state(rooms[name]) for name in self._sums}
            if self._is:
                self._is = InceptionScore.from_state(rooms["is"])
            if len(self._keep) and self.done:
                self.features = self._open_features(0, "r+")
                if len(self.features) != len(self._keep):
                    raise ValueError(
                        f"features of {len(self.features)} rows, not {len(self._keep)}"
                    )
        except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
            raise DmfError(
                f"{self._folder / STATE} cannot be gone on from ({type(error).__name__}: {error}); expected what an "
                "interrupted evaluation wrote: delete that folder to start again"
            ) from error

    def _open_features(self, width: int, mode: str) -> np.ndarray:
        if self._folder is None:
            return np.empty((len(self._keep), width), np.float32)
        place = self._folder / FEATURES
        if mode == "r+":
            return np.lib.format.open_memmap(place, mode="r+")
        shape = (len(self._keep), width)
        try:
            found = np.lib.format.open_memmap(place, mode="w+", dtype=np.float32, shape=shape)
            with place.open(
                "r+b"
            ) as file:  # a hole in a file is found to have no room only when it is too late
                os.posix_fallocate(file.fileno(), 0, place.stat().st_size)
        except OSError as error:
            raise DmfError(
                f"{place} cannot be written ({error.strerror}); expected a disk with room"
            ) from error
        return found
