"""A protocol made ready to score: its feature network checked, its reference read, its samples summed up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from dmf.errors import DmfError
from dmf.logging import Count
from dmf.metrics import protocols, reference
from dmf.metrics.features import Extractor
from dmf.metrics.totals import PART, Totals

SAVE_SECONDS = 30.0  # between two writings of the sums: what a kill can cost


@dataclass(frozen=True)
class Setting:
    """What a protocol is served with: its name or file, the folder of the feature network, the reference file, the count.

    count: 0 for the protocol's own.
    """

    protocol: str
    features: str = ""
    reference: str = ""
    count: int = 0


class Judge:
    """A protocol made ready: features checked against known answers, reference read and held against the protocol.

    only: the scores that are wanted, of those that the protocol has; () for all of them.
    """

    def __init__(self, setting: Setting, mesh: Mesh, only: tuple[str, ...] = ()):
        found = protocols.load(setting.protocol)
        metrics = tuple(metric for metric in found.metrics if not only or metric in only)
        found = replace(found, count=setting.count or found.count, metrics=metrics)
        self.protocol = found
        if not setting.reference:
            raise DmfError(
                f"no reference is given (--reference, config.run.reference): expected the statistics of {found.reference} "
                f"({found.reference_source}), or those that --mode=reference has written"
            )
        self._compares = bool({"kid", "precision_recall"} & set(metrics))  # sample by sample, not by moments
        self.reference = reference.read(setting.reference, found.space, images=self._compares)
        self.extract = Extractor(found, setting.features, mesh)
        reference.check(self.reference, found, self.extract.about["network_sha256"], self.extract.dims())

    def announce(self) -> None:
        """Prints protocol, reference and self-check; raises DmfError where the self-check fails."""
        about, unserved = self.reference.about, reference.unserved(self.reference, self.protocol.metrics)
        print(f"protocol  {protocols.describe(self.protocol)}")
        print(f"features  {self.extract.about['network_file']}, SHA-256 {str(self.extract.about['network_sha256'])[:12]}")
        print(f"reference {about.get('file')}, SHA-256 {str(about.get('sha256'))[:12]}, {about.get('format')}")
        unknown = reference.unknown(self.reference)
        if unknown:
            print(f"          it does not tell {', '.join(unknown)}: that they are the protocol's is yours to know")
        for metric in unserved:
            print(f"          it holds nothing to score {metric} against: that score is left out")
        print(self.extract.self_check(), flush=True)

    def ready(self) -> None:
        """Turns the reference's images, if it has some instead of features, into features."""
        found = self.reference
        if found.images is None or not self._compares:
            return
        wanted = found.images[: self.protocol.reference_images]
        counter = Count("reference", len(wanted), "images")
        parts = []
        for first in range(0, len(wanted), PART):
            parts.append(self.extract(wanted[first : first + PART])["pool"])
            counter.show(min(first + PART, len(wanted)))
        self.reference = replace(found, images=None, features=np.concatenate(parts))

    def totals(self, count: int, folder: Path | None = None) -> Totals:
        """Empty sums for `count` samples, or those that an interrupted run left in `folder`."""
        totals = Totals(self.protocol, count, folder)
        totals.restore()
        return totals


def accumulate(totals: Totals, images: Callable[[int, int], np.ndarray], extract: Extractor, name: str) -> None:
    """Fills `totals` to their count: images(first, rows) -> (rows, H, W, C) uint8, features, sums; saved now and then."""
    counter, saved = Count(name, totals.count, "images", totals.done), time.monotonic()
    while totals.done < totals.count:
        rows = min(PART, totals.count - totals.done)
        totals.add(extract(images(totals.done, rows)))
        if time.monotonic() - saved > SAVE_SECONDS and totals.done < totals.count:
            totals.save()
            saved = time.monotonic()
        counter.show(totals.done)
