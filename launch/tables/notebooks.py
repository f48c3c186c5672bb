"""Runs each notebook from top to bottom in a new kernel, and keeps its pictures.

    python launch/tables/notebooks.py --out=runs/notebooks               all, at full length
    python launch/tables/notebooks.py --out=runs/notebooks sample        one of them
    python launch/tables/notebooks.py --out=runs/notebooks --short       few steps, as a check

Needs requirements-dev.txt. Prints the seconds of each. If a cell fails, it prints the cell's
error and the status is 1.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
# The lengths that a notebook sets.
SHORT = re.compile(r"(length(?:, config\.curriculum\.length)? ?= ?(?:\(\s*)?)([\d.]+)(,\s*[\d.]+)?")

SHALLOW = "config.network.depth = 1"


def shortened(source: str) -> str:
    """A cell's code with every length of training a hundredth, and the demo's network shallow."""

    def hundredth(found: re.Match[str]) -> str:
        numbers = [float(n) / 100 for n in re.findall(r"[\d.]+", found[0][len(found[1]) :])]
        return found[1] + ", ".join(map(str, numbers))

    shallow = source.replace("config = get_config()", "config = get_config(); " + SHALLOW)
    return SHORT.sub(hundredth, shallow)


def run(path: Path, out: Path, short: bool, limit_s: int = 900) -> list[Path]:
    """Runs a notebook and returns its pictures, written to `out`.

    short: train for a hundredth of the steps, in another work directory than at full length.
    Raises nbclient's CellExecutionError.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if short and cell.cell_type == "code":
            cell.source = shortened(cell.source)
    out.mkdir(parents=True, exist_ok=True)
    there = {"DMF_NOTEBOOK_RUN": str(out.resolve() / "short_run")} if short else {}
    client = NotebookClient(
        notebook, timeout=limit_s, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute(env={**there, **os.environ})
    nbformat.write(notebook, out / path.name)
    pictures = []
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            pictures.append(out / f"{path.stem}_{len(pictures)}.png")
            pictures[-1].write_bytes(base64.b64decode(output["data"]["image/png"]))
    return pictures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all, if none is given"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "notebooks", help="for outputs and pictures"
    )
    parser.add_argument("--short", action="store_true", help="train for a hundredth of the steps")
    flags = parser.parse_args()
    unknown = sorted(set(flags.names) - set(known))
    if unknown:
        parser.error(f"{unknown[0]}: expected one of {', '.join(known)}")
    from nbclient.exceptions import CellExecutionError

    failed = False
    for name in flags.names or known:
        began = time.monotonic()
        try:
            pictures = run(FOLDER / f"{name}.ipynb", flags.out, flags.short)
            seconds = time.monotonic() - began
            said = f"{name:<12} {seconds:5.0f} s, {len(pictures)} pictures in {flags.out}"
            print(said, flush=True)
        except CellExecutionError as error:
            failed = True
            print(f"{name:<12} failed:\n{error}", file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
