"""A model folder to share: card, config.json, weights, and samplers as `jax.export` artifacts.

It is loaded with jax, flatbuffers, NumPy and safetensors, without this code; the card says how.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.numpy

from dmf.errors import DmfError, short
from dmf.export import card, place, sampler, tensorfile
from dmf.storage import paths

if TYPE_CHECKING:
    from dmf.export.model import Model

FORMAT = 1  # of config.json
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB = (
    "--upload needs huggingface_hub, which is not installed; "
    "expected pip install huggingface_hub, or no --upload"
)


def export(
    opener: Callable[[], Model],
    out: str | Path,
    *,
    steps: Sequence[int] = (1,),
    upload: str = "",
) -> dict[str, Any]:
    """Makes the model folder `out` of a checkpoint; returns its config.json.

    - opener: opens the checkpoint, after the checks that need no work.
    - out: the folder to make.
    - steps: the numbers of steps; each gets an artifact.
    - upload: NAME/REPO of the Hugging Face Hub, where the folder goes too; "" for nowhere.

    Raises DmfError for any bad input. The folder is then not there, unless only the upload failed.
    """
    target = Path(out)
    hub = _hub(upload) if upload else None
    place.check_free(target)
    model = opener()
    with place.made_whole(target) as half:
        half.mkdir()
        tensorfile.write(half / WEIGHTS, model.tensors(), model.metadata())
        made = {"format": FORMAT, "weights": WEIGHTS, "samplers": _artifacts(model, half, steps)}
        stored = {**made, **model.about(), "scores": card.scores(model)}
        (half / CONFIG).write_text(json.dumps(stored, indent=1) + "\n")
        (half / CARD).write_text(card.text(target.name, stored))
    files = [WEIGHTS, *(row["file"] for row in stored["samplers"]), CONFIG, CARD]
    print(f"exported  {target}: {', '.join(files)}")
    if hub:
        _upload(hub, target, upload)
    return stored


def _artifacts(model: Model, half: Path, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Writes the samplers into the folder, each compared with the checkpoint's own.

    The comparison reads the weights of the folder.
    """
    tensors = safetensors.numpy.load_file(half / WEIGHTS)
    return [_artifact(model, half, tensors, n) for n in sorted(set(steps))]


def _artifact(model: Model, half: Path, tensors: sampler.Weights, steps: int) -> dict[str, Any]:
    file = half / f"sampler_{steps}.jaxexport"
    file.write_bytes(sampler.artifact(model, steps, tensors))
    content = file.read_bytes()
    run, convention = sampler.call(content)
    found = sampler.check(model, steps, partial(run, tensors), file.name)
    off = f"{found['relative_l2']:.1e} (relative L2) off"
    print(f"          {file.name}: {len(content):,} bytes, {off}")
    return {
        "file": file.name,
        "steps": steps,
        "nfe": sampler.evaluations(model, steps),
        "signature": "(weights, e, labels) -> images",
        "platforms": list(sampler.PLATFORMS),
        "calling_convention_version": convention,
        "sha256": paths.sha256(file),
        "check": found,
    }


def _hub(upload: str) -> Any:
    """The Hub's client, before any work is done for it. Raises DmfError."""
    if not NAME.fullmatch(upload):
        raise DmfError(
            f"--upload={upload}: expected NAME/REPO, "
            "the account and the repository on the Hugging Face Hub"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise DmfError(HUB) from error
    return huggingface_hub


def _upload(hub: Any, folder: Path, upload: str) -> None:
    """Copies the folder into a repository of the Hub. A new one is private: its owner opens it."""
    try:
        api = hub.HfApi()
        api.create_repo(upload, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=upload, folder_path=str(folder), commit_message=f"Model folder {folder.name}"
        )
    except Exception as error:  # errors of the Hub, its HTTP client and the network share no base
        raise DmfError(
            f"{folder} is written, but --upload={upload} failed ({short(error)}); expected a login "
            f"with write access (hf auth login), then hf upload {upload} {folder}"
        ) from error
    print(f"uploaded  {folder} to {upload}; a new repository is private")
