"""A model folder to share: card, config.json, weights, and the sampler at each number of steps as `jax.export` artifacts.

What is in the folder is loaded with jax, flatbuffers, NumPy and safetensors; this code is not needed, and the card says how.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.numpy

from dmf.convert.native import NATIVE
from dmf.errors import DmfError, short
from dmf.export import card, place, sampler, weights

FORMAT = 1  # of config.json
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB = "--upload needs huggingface_hub, which is not installed; expected pip install huggingface_hub, or no --upload"


def export(
    path: str | Path,
    out: str | Path,
    *,
    steps: Sequence[int] = (1,),
    ema: float | None = None,
    name: str = "",
    upload: str = "",
) -> dict[str, Any]:
    """Makes the model folder `out` of a checkpoint, with an artifact per number of steps; returns its config.json.

    path and ema as for `pretrained.load`. name: of the sampler, "" for the run's own. upload: NAME/REPO of the Hugging Face
    Hub, where the folder goes too; "" = nowhere. Raises DmfError; the folder is then not there, unless only the upload failed.
    """
    target = Path(out)
    hub = _hub(upload) if upload else None
    place.check_free(target)
    model = sampler.open_model(path, ema, name)
    with place.made_whole(target) as half:
        half.mkdir()
        weights.write(
            half / WEIGHTS, model.tensors(), weights.describe(model.stored, NATIVE.name, [], ema)
        )
        made = {"format": FORMAT, "weights": WEIGHTS, "samplers": _artifacts(model, half, steps)}
        stored = {**made, **sampler.about(model), "scores": card.scores(model)}
        (half / CONFIG).write_text(json.dumps(stored, indent=1) + "\n")
        (half / CARD).write_text(card.text(target.name, stored))
    print(
        f"exported  {target}: {', '.join([WEIGHTS, *(row['file'] for row in stored['samplers']), CONFIG, CARD])}"
    )
    if hub:
        _upload(hub, target, upload)
    return stored


def _artifacts(model: sampler.Model, folder: Path, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Writes the samplers into the folder, each held against the checkpoint's own with the weights that are there."""
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    return [_artifact(model, folder, tensors, n) for n in sorted(set(steps))]


def _artifact(
    model: sampler.Model, folder: Path, tensors: sampler.Weights, steps: int
) -> dict[str, Any]:
    file = folder / f"sampler_{steps}.jaxexport"
    file.write_bytes(sampler.artifact(model, steps, tensors))
    content = file.read_bytes()
    run, convention = sampler.call(content)
    found = sampler.check(model, steps, partial(run, tensors), file.name)
    print(
        f"          {file.name}: {len(content):,} bytes, {found['relative_l2']:.1e} (relative L2) off"
    )
    return {
        "file": file.name,
        "steps": steps,
        "nfe": sampler.evaluations(model, steps),
        "signature": "(weights, e, labels) -> images",
        "platforms": list(sampler.PLATFORMS),
        "calling_convention_version": convention,
        "sha256": sampler.sha256(content),
        "check": found,
    }


def _hub(upload: str) -> Any:
    """The Hub's client, before any work is done for it."""
    if not NAME.fullmatch(upload):
        raise DmfError(
            f"--upload={upload}: expected NAME/REPO, the account and the repository on the Hugging Face Hub"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise DmfError(HUB) from error
    return huggingface_hub


def _upload(hub: Any, folder: Path, upload: str) -> None:
    """Copies the folder into a repository of the Hub, made private where it is new: who may see it is the owner's choice."""
    try:
        api = hub.HfApi()
        api.create_repo(upload, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=upload, folder_path=str(folder), commit_message=f"Model folder {folder.name}"
        )
    except (
        Exception
    ) as error:  # those of the Hub, of its HTTP client and of the network have no common base
        raise DmfError(
            f"{folder} is written, but --upload={upload} failed ({short(error)}); expected a login with write "
            f"access (hf auth login), then hf upload {upload} {folder}"
        ) from error
    print(f"uploaded  {folder} to {upload}; a new repository is private")
