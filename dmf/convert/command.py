"""Weights that others trained, as checkpoints of ours: `convert`, one function behind `main.py --mode=convert`.

A conversion proves itself: the audit accounts for every tensor and every leaf, and a forward check holds the network against
stored outputs or against PyTorch before anything is written. Nothing in a file is ever executed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dmf import pretrained
from dmf.convert import adm, align, audit, dinov2, dit, inception, native, score_sde, unet, vae
from dmf.convert.rules import Kind, relative_l2
from dmf.errors import DmfError
from dmf.evaluation import features
from dmf.storage import checkpoint
from dmf.storage.readers import read

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        dit.SIT,
        dit.MEANFLOW_DIT,
        unet.MEANFLOW_UNET,
        unet.EDM,
        score_sde.RECTIFIED_FLOW,
        adm.TORCHCFM,
        vae.SD_VAE,
        inception.FID_INCEPTION,
        dinov2.DINOV2,
        native.NATIVE,
    )
}
BOUND = 2e-5  # relative L2 of a forward check, float32; two sound implementations differ by 1e-7 to 5e-6
REPORT = "conversion.json"
POOR = 0.1  # mean relative error of an aligned embedding that is worth a warning


def convert(
    kind: str,
    source: str | Path,
    out: str | Path,
    *,
    copy: str = "",
    given: Mapping[str, Any] | None = None,
    check: str = "auto",
    align_steps: int = 0,
) -> dict[str, Any]:
    """Converts the weights of `source` into the checkpoint directory `out`; returns the report, also written there.

    kind: a key of KINDS. copy: which of several copies of the weights ("" = the kind's default). given: fields of the
    network that the file does not tell. check: "auto" = against PyTorch if it is installed; "none"; or an .npz of inputs and
    outputs in the source's convention. align_steps: length of the embedding alignment of a U-Net (`dmf.convert.align`).
    Raises DmfError, and then leaves nothing behind.
    """
    started, found = time.monotonic(), _kind(kind)
    checkpoint.check_free(Path(out))
    stored = (
        None if check in ("auto", "none") else (Path(check).name, _arrays(check))
    )  # a slip is best noticed before the work
    weights = read.open_file(source)
    try:
        config, shape, params, report = _converted(
            found, weights, copy, given or {}, stored or check, align_steps
        )
    except DmfError as error:
        text = str(error)
        raise DmfError(text if text.startswith(f"{source}: ") else f"{source}: {text}") from error
    report["source"]["sha256"] = read.sha256(source)
    about = {k: v for k, v in report.items() if k != "tensors"} | {
        "exceptions": audit.exceptions(report["tensors"])
    }
    metadata = pretrained.metadata(config, shape, about)
    known = features.known_features(pretrained.build(config, shape), params, config.kind)
    files = {REPORT: json.dumps(report, indent=1) + "\n"} | (
        {features.KNOWN: known} if known else {}
    )
    checkpoint.save_weights(Path(out), params, metadata, files)
    count = sum(row["values"] for row in report["tensors"])
    print(
        f"converted {out} in {time.monotonic() - started:.0f} s: {count:,} values, copy {report['source']['copy']!r}"
    )
    return report


def _converted(
    kind: Kind,
    weights: read.Weights,
    copy: str,
    given: Mapping[str, Any],
    check: Any,
    align_steps: int,
) -> tuple[Any, tuple[int, ...], Any, dict[str, Any]]:
    """(network config, image shape, parameters, report) of the weights, audited, checked and, if asked for, aligned."""
    tensors, copy = kind.select(weights.tree, copy)
    config, shape = kind.describe(
        tensors, native.described(weights) if kind is native.NATIVE and not given else given
    )
    if align_steps:
        align.check(config, align_steps)
    network = pretrained.build(config, shape)
    params, rows = audit.convert(
        kind.rules(config, shape, tensors), tensors, network, kind.name, _progress(kind.name)
    )
    print(audit.table(rows), flush=True)
    report: dict[str, Any] = {
        "kind": kind.name,
        "source": {"file": weights.path.name, "format": weights.format, "copy": copy},
        "licence": native.licence(weights) if kind is native.NATIVE else kind.licence,
        "conventions": kind.conventions,
        "network": dataclasses.asdict(config),  # as in the source: an alignment comes after it
        "image_shape": list(shape),
        "given": dict(given),
        "checks": _forward_check(kind, config, shape, network, params, tensors, check),
        "tensors": rows,
    }
    if given and isinstance(check, str):
        print(
            f"given     {', '.join(f'{k} = {v}' for k, v in given.items())}: only stored outputs would tell it wrong"
        )
    if align_steps:
        config, params, found = align.align(config, params, align_steps, 0, _progress("align"))
        _say_alignment(found)
        report["alignment"] = {
            **found,
            "note": "it came after the checks, and replaced the leaves of the embedding",
        }
    return config, shape, params, report


def _say_alignment(found: Mapping[str, float]) -> None:
    error, change = found["embedding_error_mean_after"], found["relative_change_of_u"]
    print(f"aligned   embedding within {error:.2g} (relative L2), u within {change:.2g}")
    if error > POOR:
        print(
            f"warning: the curriculum would start from another flow; expected an embedding within {POOR}, by more steps"
        )


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise DmfError(f"kind = {name!r}: expected one of {', '.join(KINDS)}")
    return KINDS[name]


def _forward_check(
    kind: Kind,
    config: Any,
    shape: tuple[int, ...],
    network: Any,
    params: Any,
    tensors: Mapping[str, read.Tensor],
    check: Any,
) -> list[dict[str, Any]]:
    """Our outputs against stored ones (check: name, arrays) or PyTorch's ("auto"), one row each; DmfError if they disagree."""
    if check == "none" or check == "auto" and not importlib.util.find_spec("torch"):
        print(
            "check     none"
            + (
                ""
                if check == "none"
                else ": PyTorch is not installed, and no --check=FILE.npz was given"
            )
        )
        return []
    if check == "auto":
        import torch

        arrays, against = kind.probe(config, shape), f"PyTorch {torch.__version__}"
        theirs: Mapping[str, np.ndarray] = kind.torch_outputs(_FromFile(tensors), arrays)
    else:
        against, arrays = check
        theirs = arrays
    try:
        with jax.default_matmul_precision("highest"):
            ours = kind.outputs(_jitted(network), params, arrays)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise DmfError(
            f"--check: the network cannot take its arrays: {str(error)[:100]!r}; expected inputs of kind {kind.name}"
        ) from error
    rows = [_compared(name, ours[name], theirs[name], against) for name in ours if name in theirs]
    if not rows and check == "auto":
        print(
            f"check     none: there is no program for kind {kind.name} to hold the network against"
        )
    elif not rows:
        raise DmfError(
            f"--check: found the arrays {', '.join(arrays)[:100]}; expected inputs of kind {kind.name}, such as "
            f"{', '.join(kind.probe(config, shape))}, and outputs"
        )
    return rows


def _compared(name: str, ours: np.ndarray, theirs: np.ndarray, against: str) -> dict[str, Any]:
    if ours.shape != theirs.shape:
        raise DmfError(
            f"forward check of {name} against {against}: shape {theirs.shape}, expected {ours.shape}"
        )
    error = relative_l2(ours, theirs)
    print(
        f"check     {name} against {against}: relative L2 {error:.2e} (bound {BOUND:.0e})",
        flush=True,
    )
    if not error <= BOUND:
        raise DmfError(
            f"forward check of {name} against {against}: relative L2 {error:.2e}, expected at most {BOUND:.0e}; nothing was "
            "written"
        )
    return {"against": against, "output": name, "relative_l2": error, "bound": BOUND}


class _FromFile(Mapping[str, Any]):
    """Torch tensors by name, each read when it is asked for: a large network is never in memory twice."""

    def __init__(self, tensors: Mapping[str, read.Tensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> Any:
        import torch

        found = self._tensors[name].read()
        return torch.from_numpy(
            found.astype(np.float32) if found.dtype.name == "bfloat16" else found
        )  # NumPy's is foreign

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _jitted(network: Any) -> Any:
    """The network with its functions compiled: run one operation at a time, a large one takes twice as long."""
    names = [name for name in ("apply", "encode", "decode") if hasattr(network, name)]
    return network._replace(**{name: jax.jit(getattr(network, name)) for name in names})


def _arrays(path: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (
        OSError,
        ValueError,
        AttributeError,
        EOFError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DmfError(
            f"--check={path} cannot be read ({type(error).__name__}): expected an .npz of plain arrays"
        ) from error


def _progress(name: str) -> Callable[[int, int], None]:
    """A progress line: rewritten on a terminal, at the end alone elsewhere."""
    started = time.monotonic()

    def show(done: int, total: int) -> None:
        if sys.stdout.isatty() or done == total:
            share, seconds = done / max(total, 1), time.monotonic() - started
            bar = "#" * int(30 * share)
            print(
                f"\r{name:<10}[{bar:<30}] {share:4.0%}  {seconds:.0f} s",
                end="\n" if done == total else "",
                flush=True,
            )

    return show


def given(items: Sequence[str]) -> dict[str, int | float | str]:
    """The fields of --set: heads=4, part=decoder as {"heads": 4, "part": "decoder"}. Raises DmfError."""
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
