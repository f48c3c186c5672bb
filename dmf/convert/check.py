"""The forward check: a converted network against stored outputs, or against PyTorch."""

from __future__ import annotations

import importlib.util
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dmf.convert.kind import Kind, NamedArrays, Shape, Tensors
from dmf.convert.rules import relative_l2
from dmf.errors import DmfError

# The largest relative L2 error that passes, in float32. Two sound implementations differ by 1e-7 to
# 5e-6.
BOUND = 2e-5

# What to compare with: "auto" for PyTorch if it is installed, "none", or (name, stored arrays).
Wanted = str | tuple[str, NamedArrays]


def wanted(check: str) -> Wanted:
    """The value of --check, with the arrays of a file. Raises DmfError for a bad file."""
    if check in ("auto", "none"):
        return check
    try:
        with np.load(check, allow_pickle=False) as found:
            return Path(check).name, {name: found[name] for name in found.files}
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
            f"--check={check} cannot be read ({type(error).__name__}): "
            "expected an .npz of plain arrays"
        ) from error


def run(
    kind: Kind,
    config: Any,
    shape: Shape,
    network: Any,
    params: Any,
    tensors: Tensors,
    check: Wanted,
) -> list[dict[str, Any]]:
    """Compares our outputs with the wanted ones; returns one row for each output.

    Raises DmfError where they disagree, or where stored arrays do not fit the network.
    """
    if check == "none" or check == "auto" and not importlib.util.find_spec("torch"):
        why = ": PyTorch is not installed, and no --check=FILE.npz was given"
        print("check     none" + ("" if check == "none" else why))
        return []
    if isinstance(check, str):
        import torch

        arrays, against = kind.probe(config, shape), f"PyTorch {torch.__version__}"
        theirs: NamedArrays = kind.torch_outputs(_FromFile(tensors), arrays)
    else:
        against, arrays = check[0], dict(check[1])
        theirs = arrays
    try:
        with jax.default_matmul_precision("highest"):
            ours = kind.outputs(_jitted(network), params, arrays)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise DmfError(
            f"--check: the network cannot take its arrays: {str(error)[:100]!r}; "
            f"expected inputs of kind {kind.name}"
        ) from error
    hint = f"; {kind.hint}" if kind.hint else ""
    both = [name for name in ours if name in theirs]
    rows = [_compared(name, ours[name], theirs[name], against, hint) for name in both]
    if not rows and check == "auto":
        print(
            f"check     none: there is no program for kind {kind.name} to hold the network against"
        )
    elif not rows:
        raise DmfError(
            f"--check: found the arrays {', '.join(arrays)[:100]}; expected inputs of kind "
            f"{kind.name}, such as {', '.join(kind.probe(config, shape))}, and outputs"
        )
    return rows


def _compared(
    name: str, ours: np.ndarray, theirs: np.ndarray, against: str, hint: str
) -> dict[str, Any]:
    what = f"forward check of {name} against {against}"
    if ours.shape != theirs.shape:
        raise DmfError(f"{what}: shape {theirs.shape}, expected {ours.shape}")
    error = relative_l2(ours, theirs)
    found = f"relative L2 {error:.2e}"
    print(f"check     {name} against {against}: {found} (bound {BOUND:.0e})", flush=True)
    if not error <= BOUND:
        raise DmfError(f"{what}: {found}, expected at most {BOUND:.0e}; nothing was written{hint}")
    return {"against": against, "output": name, "relative_l2": error, "bound": BOUND}


class _FromFile(Mapping[str, Any]):
    """Torch tensors by name, each read at its use, so a network is never in memory twice."""

    def __init__(self, tensors: Tensors):
        self._tensors = tensors

    def __getitem__(self, name: str) -> Any:
        import torch

        found = self._tensors[name].read()
        # PyTorch does not know the bfloat16 of NumPy.
        wide = found.astype(np.float32) if found.dtype.name == "bfloat16" else found
        return torch.from_numpy(wide)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _jitted(network: Any) -> Any:
    """The network with compiled functions; run by single operations it takes twice as long."""
    names = [name for name in ("apply", "encode", "decode") if hasattr(network, name)]
    return network._replace(**{name: jax.jit(getattr(network, name)) for name in names})
