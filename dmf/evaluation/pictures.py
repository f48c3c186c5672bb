"""Pictures of a run: grids of samples and curves of loss and score, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dmf.method.curriculum import Stage
from dmf.method.objectives import kind_of
from dmf.storage import paths

GAP = 2  # pixels between samples
CAPTION = 14  # pixels above a grid
BACKGROUND = 40


def pixels_of(samples: np.ndarray) -> np.ndarray:
    """Samples (N, H, W, C) in [-1, 1] as (N, H, W, 3) uint8.

    Latents show their first three channels: enough to see that a run diverges.
    """
    pixels = np.clip(np.round((samples + 1) * 127.5), 0, 255).astype(np.uint8)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels[..., :3]


def grid(pixels: np.ndarray, columns: int, enlarge: int) -> Image.Image:
    """One image of images (N, H, W, 3) uint8.

    columns: images in a row of the grid.

    enlarge: how often each pixel is drawn, in both directions.
    """
    n, height, width, _ = pixels.shape
    pixels = pixels.repeat(enlarge, 1).repeat(enlarge, 2)
    height, width = height * enlarge + GAP, width * enlarge + GAP
    sheet = Image.new("RGB", (columns * width, -(-n // columns) * height), (BACKGROUND,) * 3)
    for i, p in enumerate(pixels):
        sheet.paste(Image.fromarray(p), (i % columns * width, i // columns * height))
    return sheet


def panels(path: Path, named: Mapping[str, np.ndarray], columns: int) -> None:
    """Writes grids side by side, each under its caption. The file is whole or absent.

    named: samples by caption, or what `pixels_of` made of them.
    """
    named = {k: x if x.dtype == np.uint8 else pixels_of(x) for k, x in named.items()}
    size = next(iter(named.values())).shape[1]
    sheets = {name: grid(x, columns, max(1, 32 // size)) for name, x in named.items()}
    width = sum(s.width for s in sheets.values()) + 4 * GAP * (len(sheets) - 1)
    page = Image.new(
        "RGB", (width, max(s.height for s in sheets.values()) + CAPTION), (BACKGROUND,) * 3
    )
    left = 0
    for name, sheet in sheets.items():
        ImageDraw.Draw(page).text((left + 1, 1), name, fill=(255, 255, 255))
        page.paste(sheet, (left, CAPTION))
        left += sheet.width + 4 * GAP
    _write(page, path)


def stack(path: Path, parts: Sequence[Path]) -> None:
    """Writes pictures below each other; without pictures it writes nothing."""
    if not parts:
        return
    images = [Image.open(io.BytesIO(p.read_bytes())) for p in parts]
    page = Image.new(
        "RGB", (max(i.width for i in images), sum(i.height for i in images)), (BACKGROUND,) * 3
    )
    top = 0
    for image in images:
        page.paste(image, (0, top))
        top += image.height
    _write(page, path)


def single(path: Path, image: np.ndarray) -> None:
    """Writes one image, (H, W, 1 or 3) uint8, as it is."""
    _write(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), path)


def curves(
    path: Path,
    metrics: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    stages: Sequence[Stage],
    score: str,
) -> None:
    """Draws residuals, the interval and the score over the steps, with stages marked.

    The residuals are mean squares, of rows with r = t and of rows with r < t.
    """
    # Not pyplot: it would change how a notebook shows its own pictures.
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 6 if scores else 3.5))
    axes = fig.subplots(2 if scores else 1, 1, sharex=True, squeeze=False)
    top = axes[0, 0]
    for key, label in (("squares_border", "rows with r = t"), ("squares_pairs", "rows with r < t")):
        rows = [(m["step"], m[key]) for m in metrics if key in m]
        if rows:
            top.semilogy(*zip(*rows, strict=True), lw=0.8, label=label)
    top.set_ylabel("mean squared residual")
    top.legend(loc="lower left", fontsize=8)
    _interval(top.twinx(), metrics)
    if scores:
        for nfe in sorted({s["nfe"] for s in scores}):
            rows = [(s["step"], s[score]) for s in scores if s["nfe"] == nfe]
            label = f"{nfe} step{'s' * (nfe > 1)}"
            axes[1, 0].semilogy(*zip(*rows, strict=True), marker="o", ms=4, lw=1, label=label)
        axes[1, 0].set_ylabel(score)
        axes[1, 0].legend(loc="upper right", fontsize=8)
    for ax in axes[:, 0]:
        for s in stages:
            ax.axvline(s.first, color="0.8", lw=0.8, zorder=0)
    at = {"transform": top.get_xaxis_transform(), "fontsize": 6, "rotation": 20}
    for s in stages:
        top.text(s.first, 1.02, f"{s.name} {s.kind}", **at)
    axes[-1, 0].set_xlabel("step")
    written = io.BytesIO()
    fig.savefig(written, dpi=110, bbox_inches="tight")
    paths.write(path, written.getvalue())


def _interval(axis: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Draws the interval d of the discrete steps on its own axis; the mean, if it is adaptive."""
    d = [
        m.get("interval", m["rho"]) if kind_of(m["kind"]).steps_back else float("nan")
        for m in metrics
    ]
    if not any(x == x for x in d):
        axis.set_axis_off()
        return
    axis.semilogy([m["step"] for m in metrics], d, color="0.5", lw=0.8, ls="--")
    axis.set_ylabel("d (dashed)")


def _write(image: Image.Image, path: Path) -> None:
    paths.make(path.parent)
    written = io.BytesIO()
    image.save(written, "PNG")
    paths.write(path, written.getvalue())
