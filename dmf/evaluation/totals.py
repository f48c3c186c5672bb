"""Sums over the samples of a protocol: moments, inception score and features, in one pass.

Rows come in the order of the samples, in parts of a fixed size.
Sums in float64 then round alike, whatever the devices and after every interruption.
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
from dmf.storage import atomic

PART = 1024  # rows that are added at once
MOMENTS = {"pool": "fid", "spatial": "sfid"}  # features -> the score their moments make
STATE, FEATURES = "totals.npz", "features.npy"


class Totals:
    """Sums over `count` samples of a protocol.

    Call `add` with the features of the next PART rows until `done` is `count`, then `scores`.
    The last part may be shorter.

    folder: where the sums survive an interruption, or None.

    keep: rows whose features are stored for KID, precision and recall.
    None stores those that the protocol needs.
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
        """Takes the features of the next rows. Raises DmfError for a wrong number of rows."""
        rows = len(found["pool"])
        if rows != min(PART, self.count - self.done):
            raise DmfError(
                f"{rows} rows of features after {self.done} of {self.count}: "
                f"expected the next {PART}, or the rest"
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
        """The scores of the protocol that the reference serves.

        Raises DmfError until all rows were given.
        """
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
        """The same sums as a reference for other samples."""
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
        try:
            with atomic.made(self._folder / STATE) as partial, partial.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DmfError(
                f"{self._folder}: sums cannot be written ({error.strerror}); "
                "expected a disk with room"
            ) from error

    def restore(self) -> None:
        """Continues from the last `save` in the folder, if there is one.

        Raises DmfError for files that do not fit.
        """
        if self._folder is None or not (self._folder / STATE).is_file():
            return
        try:
            self._read(self._folder / STATE)
        except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
            raise DmfError(
                f"{self._folder / STATE} cannot be continued ({type(error).__name__}: {error}); "
                "expected the file of an interrupted evaluation: delete that folder to start again"
            ) from error

    def _read(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as stored:
            states = {name: stored[name] for name in stored.files}
        if int(states.pop("count")) != self.count:
            raise ValueError("another number of samples")
        self.done = int(states.pop("done"))
        parts: dict[str, dict[str, np.ndarray]] = {}
        for name, value in states.items():
            parts.setdefault(name.split("/")[0], {})[name.split("/")[1]] = value
        self._sums = {name: MomentSums.from_state(parts[name]) for name in self._sums}
        if self._is:
            self._is = InceptionScore.from_state(parts["is"])
        if len(self._keep) and self.done:
            self.features = self._open_features(0, "r+")
            if len(self.features) != len(self._keep):
                raise ValueError(f"features of {len(self.features)} rows, not {len(self._keep)}")

    def _open_features(self, width: int, mode: str) -> np.ndarray:
        if self._folder is None:
            return np.empty((len(self._keep), width), np.float32)
        place = self._folder / FEATURES
        if mode == "r+":
            return np.lib.format.open_memmap(place, mode="r+")
        shape = (len(self._keep), width)
        try:
            found = np.lib.format.open_memmap(place, mode="w+", dtype=np.float32, shape=shape)
            # Takes the room now: a file with holes would find a full disk much later.
            with place.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, place.stat().st_size)
        except OSError as error:
            raise DmfError(
                f"{place} cannot be written ({error.strerror}); expected a disk with room"
            ) from error
        return found
