"""`main.py --mode=convert`: weights that others trained, as a checkpoint of ours.

Each kind of file is a `Kind` (kind.py), and kinds.py lists them. `convert` calls, in this order:

    read.open_files          the file as a tree of tensors    storage/readers/
    kind.select              one copy of the weights          copies.py
    sides.said               what a config.json tells         sides.py
    kind.describe            their shapes -> network config
    kind.rules               the key map, a list of `Rule`    rules.py has the type
    direction.turned         another time or sign             direction.py
    audit.convert            tensors -> parameters            audit.py
    forward.run              our outputs against theirs       check.py
    plausible.check          a flow's direction               plausible.py
    align.align              only with --align_steps          align.py
    checkpoint.save_weights  the directory                    storage/checkpoint.py

Three checks come before anything is written:

- the audit accounts for every tensor and every leaf;
- the forward check compares the network with stored outputs, or with PyTorch;
- a flow's own outputs show its direction of time and its sign.

No part of a file is ever executed.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dmf import networks, pretrained
from dmf.convert import align, audit, copies, direction, native, plausible, sides
from dmf.convert import check as forward
from dmf.convert.kind import Kind, Shape, Tensors
from dmf.convert.kinds import KINDS, kind_of
from dmf.errors import DmfError, printable
from dmf.evaluation import features
from dmf.logging import Count
from dmf.networks import every
from dmf.storage import checkpoint, paths
from dmf.storage.readers import read

__all__ = ["KINDS", "REPORT", "convert", "given"]

REPORT = "conversion.json"
POOR = 0.1  # an aligned embedding with a larger mean relative error brings a warning


def convert(
    kind: str,
    source: str | Path,
    out: str | Path,
    *,
    copy: str = "",
    drop: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
    check: str = "auto",
    align_steps: int = 0,
) -> dict[str, Any]:
    """Converts the weights of `source` into a checkpoint directory; returns the report.

    - kind: a key of KINDS.
    - source: the file, a folder with one such file, or the directory of Orbax. A kind in several
      files takes them with commas.
    - out: the directory to make; it holds the report too, as conversion.json.
    - copy: which of the file's copies of the weights, or its dotted path; "" takes the best.
    - drop: patterns of names of tensors that are left out.
    - given: fields of the network that the file does not show; of a flow also time and sign.
    - check: "auto" compares with PyTorch if it is installed, "none" with nothing.
      Else it names an .npz with inputs and outputs in the source's convention.
    - align_steps: steps of the alignment of a U-Net's embedding (`dmf.convert.align`).

    Raises DmfError for any bad input; it then leaves nothing behind.
    """
    started, found = time.monotonic(), kind_of(kind)
    paths.check_free(Path(out))
    wanted = forward.wanted(check)  # first, as a bad --check is best noticed before the work
    weights = read.open_files(source) if found.several else read.open_file(source)
    try:
        config, shape, params, report = _converted(
            found, weights, copy, drop, given or {}, wanted, align_steps
        )
    except DmfError as error:
        text = str(error)
        raise DmfError(text if text.startswith(f"{source}: ") else f"{source}: {text}") from error
    report["source"]["sha256"] = weights.sha256()
    _save(Path(out), config, shape, params, report)
    count = sum(row["values"] for row in report["tensors"])
    seconds = time.monotonic() - started
    copied = printable(report["source"]["copy"])
    print(f"converted {out} in {seconds:.0f} s: {count:,} values, copy {copied!r}")
    return report


class _Described(NamedTuple):
    """A file's weights, and all that is known of them before a value is read."""

    tensors: Tensors
    copy: str
    dropped: list[str]  # names of tensors that are left out
    config: Any
    shape: Shape
    way: direction.Direction | None  # time and sign of the source
    values: list[dict[str, Any]]  # what the tensors may not tell, with its source


def _described(
    kind: Kind, weights: read.Weights, copy: str, drop: Sequence[str], given: Mapping[str, Any]
) -> _Described:
    tensors, copy = kind.select(weights.tree, copy)
    tensors, dropped = copies.dropped(tensors, drop)
    way, fields = direction.split(kind, given)
    told = sides.said(kind, weights)
    taken = sides.adopted(told, tensors, fields)
    if kind is native.NATIVE and not given:  # the metadata of such a file hold the fields
        fields = native.described(weights)
    try:
        config, shape = kind.describe(
            tensors, fields | {name: row.value for name, row in taken.items()}
        )
    except DmfError as error:
        said = ", ".join(
            f"{row.where} says {row.key} = {row.raw}"
            for row in taken.values()
            if row.fact.name in str(error)
        )
        raise DmfError(f"{error} ({said})" if said else str(error)) from error
    every.network_config(dataclasses.asdict(config))  # bounds, before anything is built
    every.image_shape(shape)
    values = sides.rows(kind, config, shape, tensors, given, told, way)
    return _Described(tensors, copy, dropped, config, shape, way, values)


def _converted(
    kind: Kind,
    weights: read.Weights,
    copy: str,
    drop: Sequence[str],
    given: Mapping[str, Any],
    check: forward.Wanted,
    align_steps: int,
) -> tuple[Any, Shape, Any, dict[str, Any]]:
    """(network config, image shape, parameters, report), audited, checked and aligned."""
    tensors, copy, dropped, config, shape, way, values = _described(
        kind, weights, copy, drop, given
    )
    if align_steps:
        align.check(config, align_steps)
    network = pretrained.build(config, shape)
    rules = direction.turned(kind.rules(config, shape, tensors), config, way)
    params, rows = audit.convert(rules, tensors, network, kind.name, _progress(kind.name, "bytes"))
    print(audit.table(rows), flush=True)
    sides.show(values)
    ours = kind is native.NATIVE
    report: dict[str, Any] = {
        "kind": kind.name,
        "source": {"file": weights.file, "format": weights.format, "copy": copy},
        "licence": native.licence(weights) if ours else kind.licence,
        "conventions": kind.conventions + direction.note(way),
        "network": dataclasses.asdict(config),  # as in the source: an alignment comes later
        "image_shape": list(shape),
        "given": dict(given),
        **({"dropped": {"patterns": [*drop], "tensors": dropped}} if dropped else {}),
        "values": values,
        "checks": forward.run(
            kind, config, shape, direction.seen_as(network, way), params, tensors, check
        ),
        "tensors": rows,
    }
    if config.kind in networks.KINDS and check != "none":
        velocity = plausible.velocity_of(network, params, config)
        scale = plausible.scale_of(config)
        report["plausibility"] = plausible.check(velocity, scale, shape, way)
    if align_steps:
        config, params, found = align.align(
            config, params, align_steps, 0, _progress("align", "steps")
        )
        _say_alignment(found)
        note = "it came after the checks, and replaced the leaves of the embedding"
        report["alignment"] = {**found, "note": note}
    return config, shape, params, report


def _save(out: Path, config: Any, shape: Shape, params: Any, report: dict[str, Any]) -> None:
    """Writes the checkpoint and, beside it, the report.

    A feature network also gets its features of a fixed batch, which scoring compares later.
    """
    about = {name: value for name, value in report.items() if name != "tensors"}
    about["exceptions"] = audit.exceptions(report["tensors"])
    files = {REPORT: json.dumps(report, indent=1) + "\n"}
    known = features.known_features(pretrained.build(config, shape), params, config.kind)
    if known:
        files[features.KNOWN] = known
    checkpoint.save_weights(out, params, pretrained.metadata(config, shape, about), files)


def _say_alignment(found: Mapping[str, float]) -> None:
    error, change = found["embedding_error_mean_after"], found["relative_change_of_u"]
    print(f"aligned   embedding within {error:.2g} (relative L2), u within {change:.2g}")
    if error > POOR:
        print(
            "warning: the curriculum would start from another flow; "
            f"expected an embedding within {POOR}, by more steps"
        )


def _progress(name: str, unit: str) -> Callable[[int, int], None]:
    """progress(done, total) as a line of `logging.Count`, made once the total is known."""
    lines: dict[int, Count] = {}
    last = 0

    def show(done: int, total: int) -> None:
        nonlocal last
        if done > last:  # a tensor that the file lacks has no bytes
            lines.setdefault(total, Count(name, total, unit)).show(done)
        last = done

    return show


def given(items: Sequence[str]) -> dict[str, int | float | str]:
    """The fields of --set: heads=4, part=decoder -> {"heads": 4, "part": "decoder"}.

    Raises DmfError.
    """
    found: dict[str, int | float | str] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not (name and equals and text):
            raise DmfError(f"--set={','.join(items)}: expected fields and values, such as heads=4")
        if name in found:
            raise DmfError(f"--set={','.join(items)}: {name} is given twice, expected it once")
        for kind in (int, float, str):
            try:
                found[name] = kind(text)
                break
            except ValueError:
                continue
    return found
