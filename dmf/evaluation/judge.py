"""A protocol made ready to score: its network is checked, its reference is read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dmf.errors import DmfError, printable
from dmf.evaluation import protocols, reference
from dmf.evaluation.features import Extractor
from dmf.evaluation.reference import Reference
from dmf.evaluation.totals import MOMENTS, PART, Totals
from dmf.logging import Count

SAVE_SECONDS = 30.0  # between two writes of the sums; a kill costs no more work than this


@dataclass(frozen=True)
class Setting:
    """What a user gives to score by a protocol.

    protocol: its name or file.

    features: the folder of the converted feature network.

    reference: the file of the reference's statistics.

    count: how many samples; 0 for the protocol's number.
    """

    protocol: str
    features: str = ""
    reference: str = ""
    count: int = 0


class Judge:
    """A protocol with its feature network and its reference.

    The reference's own record is compared with the protocol.
    """

    def __init__(self, setting: Setting, mesh: Mesh, only: tuple[str, ...] = ()):
        """only: scores of the protocol that are wanted, () for all. Raises DmfError."""
        found = protocols.load(setting.protocol)
        self.full_count = found.count
        metrics = tuple(metric for metric in found.metrics if not only or metric in only)
        found = replace(found, count=setting.count or found.count, metrics=metrics)
        self.protocol = found
        if not setting.reference:
            raise DmfError(
                "no reference is given (--reference, config.run.reference): "
                f"expected the statistics of {found.reference} ({found.reference_source}), "
                "or a file that --mode=reference has written"
            )
        self.reference = reference.read(setting.reference, found.space, images=False)
        if self._lacks():  # then it may have images
            self.reference = reference.read(setting.reference, found.space)
        self._check_counts()
        self.extract = Extractor(found, setting.features, mesh)
        network = self.extract.about["network_sha256"]
        reference.check(self.reference, found, network, self.extract.dims())

    def _lacks(self) -> list[str]:
        """The protocol's scores that the reference cannot serve, or serves by images only."""
        return reference.unserved(replace(self.reference, images=None), self.protocol.metrics)

    def _check_counts(self) -> None:
        """Checks, before hours of work, that every score has enough samples and images."""
        p, real = self.protocol, self.reference
        if p.count < 2:
            raise DmfError(f"protocol {p.name}: scores of {p.count} samples; expected at least 2")
        Totals(p, p.count)  # checks the splits of the inception score
        name, images = real.about.get("file"), 0 if real.images is None else len(real.images)
        if "fid" in p.metrics and "fid" in self._lacks() and images < 2:
            raise DmfError(
                f"{name}: holds neither moments nor images; expected one of them for the fid"
            )
        kept = min(images if real.features is None else len(real.features), p.reference_images)
        # A reference without any image is no error here: it leaves the score out.
        counts = {"samples": p.count, f"images of {name}": kept}
        for metric, least in (("kid", p.kid_subset_size), ("precision_recall", p.neighbours + 1)):
            for what, count in counts.items():
                few = count < least and (count or what == "samples")
                if metric in p.metrics and few:
                    raise DmfError(
                        f"protocol {p.name}: {metric} of {count} {what}; expected at least {least}"
                    )

    def announce(self) -> None:
        """Prints protocol, reference and self-check. Raises DmfError where the check fails."""
        about, mine = self.reference.about, self.extract.about
        print(f"protocol  {protocols.describe(self.protocol)}")
        if self.protocol.count != self.full_count:
            print(
                f"          the protocol has {self.full_count:,} samples: "
                "compare only scores of equal counts"
            )
        of_weights = str(mine["network_sha256"])[:12]
        print(printable(f"features  {mine['network_file']}, SHA-256 {of_weights}"))
        digest = str(about.get("sha256"))[:12]
        line = f"reference {about.get('file')}, SHA-256 {digest}, {about.get('format')}"
        print(printable(line))
        unknown = reference.unknown(self.reference)
        if unknown:
            print(
                f"          it does not tell {', '.join(unknown)}: "
                "you have to know that they are the protocol's"
            )
        for metric in reference.unserved(self.reference, self.protocol.metrics):
            print(f"          it holds nothing to score {metric} against: that score is left out")
        print(self.extract.self_check(), flush=True)

    def ready(self) -> None:
        """Computes moments and features of the reference's images, where it has images only."""
        found, p = self.reference, self.protocol
        if found.images is not None and self._lacks():
            found = self._computed(found, found.images)
        if found.features is not None:
            found = replace(found, features=found.features[: p.reference_images])
        self.reference = found

    def _computed(self, found: Reference, images: np.ndarray) -> Reference:
        p = self.protocol
        of_moments = tuple(metric for metric in p.metrics if metric in MOMENTS.values())
        keep = np.arange(min(len(images), p.reference_images))
        sums = Totals(replace(p, metrics=of_moments), len(images), None, keep)
        accumulate(sums, lambda i, rows: images[i : i + rows], self.extract, "reference")
        made = sums.reference({})
        features = made.features if found.features is None else found.features
        return Reference({**made.moments, **found.moments}, features, None, found.about)

    def totals(self, count: int, folder: Path | None = None) -> Totals:
        """Empty sums for `count` samples, or the sums that an interrupted run left in a folder."""
        totals = Totals(self.protocol, count, folder)
        totals.restore()
        return totals

    def fill(self, totals: Totals, images: Callable[[int, int], np.ndarray], name: str) -> None:
        """Adds images to the sums until they are complete; see `accumulate`."""
        accumulate(totals, images, self.extract, name)

    def identity(self) -> dict[str, Any]:
        """What a score depends on besides the samples, as plain values."""
        return {
            "protocol": asdict(self.protocol),
            "full_count": self.full_count,
            "features": self.extract.about,
            "reference": dict(self.reference.about),
        }


def accumulate(
    totals: Totals, images: Callable[[int, int], np.ndarray], extract: Extractor, name: str
) -> None:
    """Adds images to the sums until they are complete, and saves the sums now and then.

    images(first, rows): (rows, H, W, C) uint8.
    """
    counter, saved = Count(name, totals.count, "images", totals.done), time.monotonic()
    while totals.done < totals.count:
        rows = min(PART, totals.count - totals.done)
        totals.add(extract(images(totals.done, rows)))
        if time.monotonic() - saved > SAVE_SECONDS and totals.done < totals.count:
            totals.save()
            saved = time.monotonic()
        counter.show(totals.done)
    totals.save()
