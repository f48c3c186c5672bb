"""A protocol made ready to score: its feature network checked, its reference read, its samples summed up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from dmf.errors import DmfError
from dmf.evaluation import protocols, reference
from dmf.evaluation.features import Extractor
from dmf.evaluation.reference import Reference
from dmf.evaluation.totals import MOMENTS, PART, Totals
from dmf.logging import Count

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
        self.full_count = found.count
        metrics = tuple(metric for metric in found.metrics if not only or metric in only)
        found = replace(found, count=setting.count or found.count, metrics=metrics)
        self.protocol = found
        if not setting.reference:
            raise DmfError(
                f"no reference is given (--reference, config.run.reference): expected the statistics of {found.reference} "
                f"({found.reference_source}), or those that --mode=reference has written"
            )
        self.reference = reference.read(setting.reference, found.space, images=False)
        if self._lacks():
            self.reference = reference.read(
                setting.reference, found.space
            )  # perhaps it has images to make up for it
        self._check_counts()
        self.extract = Extractor(found, setting.features, mesh)
        reference.check(
            self.reference, found, self.extract.about["network_sha256"], self.extract.dims()
        )

    def _lacks(self) -> list[str]:
        """The protocol's scores that the reference holds nothing for, or only images to make something of."""
        return reference.unserved(replace(self.reference, images=None), self.protocol.metrics)

    def _check_counts(self) -> None:
        """Before hours are spent: a FID at all, and enough samples and images of the reference for every score."""
        p, real = self.protocol, self.reference
        if p.count < 2:
            raise DmfError(f"protocol {p.name}: scores of {p.count} samples; expected at least 2")
        Totals(p, p.count)  # its own checks
        name, images = real.about.get("file"), 0 if real.images is None else len(real.images)
        if "fid" in p.metrics and "fid" in self._lacks() and images < 2:
            raise DmfError(
                f"{name}: holds neither moments nor images; expected what fid can be scored against"
            )
        kept = min(images if real.features is None else len(real.features), p.reference_images)
        for metric, least in (("kid", p.kid_subset_size), ("precision_recall", p.neighbours + 1)):
            for what, count in (
                ("samples", p.count),
                (f"images of {name}", kept or least),
            ):  # without any it is left out
                if metric in p.metrics and count < least:
                    raise DmfError(
                        f"protocol {p.name}: {metric} of {count} {what}; expected at least {least}"
                    )

    def announce(self) -> None:
        """Prints protocol, reference and self-check; raises DmfError where the self-check fails."""
        about, unserved = (
            self.reference.about,
            reference.unserved(self.reference, self.protocol.metrics),
        )
        print(f"protocol  {protocols.describe(self.protocol)}")
        if self.protocol.count != self.full_count:
            print(
                f"          the protocol has {self.full_count:,} samples: compare only scores of equal counts"
            )
        print(
            f"features  {self.extract.about['network_file']}, SHA-256 {str(self.extract.about['network_sha256'])[:12]}"
        )
        print(
            f"reference {about.get('file')}, SHA-256 {str(about.get('sha256'))[:12]}, {about.get('format')}"
        )
        unknown = reference.unknown(self.reference)
        if unknown:
            print(
                f"          it does not tell {', '.join(unknown)}: that they are the protocol's is yours to know"
            )
        for metric in unserved:
            print(f"          it holds nothing to score {metric} against: that score is left out")
        print(self.extract.self_check(), flush=True)

    def ready(self) -> None:
        """Makes moments and features of the reference's images, where it holds images in their place."""
        found, p = self.reference, self.protocol
        images = found.images
        if images is not None and self._lacks():
            of_moments = replace(
                p, metrics=tuple(metric for metric in p.metrics if metric in MOMENTS.values())
            )
            sums = Totals(
                of_moments, len(images), None, np.arange(min(len(images), p.reference_images))
            )
            accumulate(
                sums, lambda first, rows: images[first : first + rows], self.extract, "reference"
            )
            made = sums.reference({})
            found = Reference({**made.moments, **found.moments}, found.features, None, found.about)
            found = replace(
                found, features=made.features if found.features is None else found.features
            )
        if found.features is not None:
            found = replace(found, features=found.features[: p.reference_images])
        self.reference = found

    def totals(self, count: int, folder: Path | None = None) -> Totals:
        """Empty sums for `count` samples, or those that an interrupted run left in `folder`."""
        totals = Totals(self.protocol, count, folder)
        totals.restore()
        return totals


def accumulate(
    totals: Totals, images: Callable[[int, int], np.ndarray], extract: Extractor, name: str
) -> None:
    """Fills `totals` to their count: images(first, rows) -> (rows, H, W, C) uint8, features, sums; saved now and then."""
    counter, saved = Count(name, totals.count, "images", totals.done), time.monotonic()
    while totals.done < totals.count:
        rows = min(PART, totals.count - totals.done)
        totals.add(extract(images(totals.done, rows)))
        if time.monotonic() - saved > SAVE_SECONDS and totals.done < totals.count:
            totals.save()
            saved = time.monotonic()
        counter.show(totals.done)
    totals.save()
