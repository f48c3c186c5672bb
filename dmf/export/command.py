"""`main.py --mode=export`: --out names a file of weights, an ONNX file, or a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dmf.errors import DmfError
from dmf.export import folder, onnx, weights

# What --out is -> the flags that are read.
READS = {
    "weights": ("workdir", "out", "ema", "kind"),
    "an ONNX file": ("workdir", "out", "ema", "steps", "sampler"),
    "a model folder": ("workdir", "out", "ema", "steps", "sampler", "upload"),
}


def form(out: str) -> str:
    """A key of READS, by the ending of `out`. Raises DmfError for an unknown ending."""
    suffix = Path(out).suffix
    forms = {
        **dict.fromkeys(weights.FORMATS, "weights"),
        ".onnx": "an ONNX file",
        "": "a model folder",
    }
    if suffix not in forms:
        endings = ", ".join(weights.FORMATS)
        raise DmfError(
            f"--out={out}: expected a file name ending in {endings} or .onnx, "
            "or a model folder's name, without a dot"
        )
    return forms[suffix]


def export(
    path: str,
    out: str,
    *,
    kind: str = "",
    ema: float | None = None,
    steps: Sequence[int] = (1,),
    sampler: str = "",
    upload: str = "",
) -> None:
    """Writes `out` from the checkpoint `path`; see the function of its form. Raises DmfError."""
    if form(out) == "weights":
        weights.export(path, out, kind=kind, ema=ema)
    elif form(out) == "a model folder":
        folder.export(path, out, steps=steps, ema=ema, name=sampler, upload=upload)
    elif len(steps) > 1:
        raise DmfError(
            f"--steps={','.join(map(str, steps))} with {out}: "
            "expected one number of steps for an ONNX file"
        )
    else:
        onnx.export(path, out, steps=steps[0], ema=ema, name=sampler)
