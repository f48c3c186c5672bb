"""The card of a model folder: what the model is, how it is loaded without this code, how it was scored, and whose it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dmf import pretrained
from dmf.evaluation import sampling
from dmf.export.sampler import Model, sha256
from dmf.storage import checkpoint

HIDDEN = ("step", "stage", "kind", "scored_by", "ema_halflife_images")
CARD = """---
license: other
license_name: to-be-filled-in
tags: [jax, image-generation, flow-matching, meanflow]
---

# {name}

{what}: noise e to {things} of shape {shape}, by the average velocity u(z, r, t) of a flow, in one or a few steps.
Everything below is also in `config.json`, for programs.

## Load it

With `pip install "jax>={jax}" flatbuffers numpy safetensors`, in this folder:

```python
{code}
```

| file | steps | evaluations of the network | platforms |
|---|---|---|---|
{samplers}

The batch size is free. A `.jaxexport` file is a program for XLA, without weights, made with jax {jax}; jax promises to read it
for six months. Load none that you do not trust. `model.safetensors` has the weights by the names and in the layouts of PyTorch;
with `config.json` they outlive the programs, and the code that made them reads them: `--mode=convert --kind=dmf`.

## Conventions

- Time and sign: {conventions}.
- Noise: {noise}.
- Images: {images}.
- Labels: {labels}.
- Latents: {latents}.
- Sampler: {sampler}. Weights: {ema}. Computed in {compute}, products at the highest precision.

## Scores

{scores}

## Origin and licence

{origin}

Licence: **to be filled in by whoever shares this folder**, here and at the top of this file (`license`, `license_name`).
{licence}"""
CODE = """import jax, jax.export
import numpy as np
from safetensors.numpy import load_file

weights = load_file("{weights}")
with open("{file}", "rb") as file:
    sampler = jax.jit(jax.export.deserialize(bytearray(file.read())).call)
e = jax.random.normal(jax.random.key(0), (8, {shape}))
labels = {labels}
x = np.asarray(sampler(weights, e, labels)){bytes}"""
BYTES = "\nimages = np.clip(np.round(127.5 * (x + 1)), 0, 255).astype(np.uint8)"


def text(name: str, about: Mapping[str, Any]) -> str:
    """The card in Markdown. name: the model's. about: the folder's config.json."""
    latent, labels, shape = (
        about["latent"],
        about["labels"],
        ", ".join(map(str, about["image_shape"])),
    )
    rows = [
        f"| `{r['file']}` | {r['steps']} | {r['nfe']} | {', '.join(r['platforms'])} |"
        for r in about["samplers"]
    ]
    classes = (
        f"np.arange(8, dtype=np.int32) % {labels['classes']}"
        if labels["classes"]
        else "np.zeros(8, np.int32)  # not read"
    )
    return CARD.format(
        name=name,
        what=f"A generator with {labels['classes']} classes"
        if labels["classes"]
        else "A generator without classes",
        things="latents" if latent else "images",
        shape=f"({shape})",
        code=CODE.format(
            weights=about["weights"],
            file=about["samplers"][0]["file"],
            shape=shape,
            labels=classes,
            bytes="" if latent else BYTES,
        ),
        samplers="\n".join(rows),
        jax=about["versions"]["jax"],
        latents=_latents(latent),
        labels=labels["rule"],
        compute=about["dtype"]["compute"],
        scores="\n\n".join(_table(found) for found in about["scores"])
        or "This checkpoint has not been scored with these settings.",
        origin=_origin(about["origin"]),
        licence=_licence(about["origin"]["converted_from"]),
        **{key: about[key] for key in ("conventions", "noise", "images", "sampler", "ema")},
    )


def scores(model: Model) -> list[dict[str, Any]]:
    """[{"protocol", "rows", "best"}] of what was scored with these weights and this sampler, as the work directory has it."""
    config, home = model.config, sampling.home(model.folder, model.stored)
    halflife = config.ema.evaluate if model.ema is None else model.ema
    found = []
    if not pretrained.is_converted(model.stored) and (halflife, model.sampler) == (
        config.ema.evaluate,
        config.run.sampler,
    ):
        rows = [
            row
            for row in _lines(home / "scores.jsonl")
            if str(row.get("step")) == model.folder.name and "nfe" in row
        ]
        rows = [_counted(row, model.sampler) for row in rows]
        best = any(
            str(row.get("step")) == model.folder.name for row in _lines(home / checkpoint.BEST)
        )
        protocol = (
            config.run.protocol or f"the score of the data set {config.data.name} (`dmf.metrics`)"
        )
        found += (
            [{"protocol": f"{protocol}, during training", "rows": rows, "best": best}]
            if rows
            else []
        )
    manifest = sha256((model.folder / checkpoint.MANIFEST).read_bytes())
    for file in sorted(home.glob("scores_*.json")):
        for stored in _lines(file):
            of = stored.get("checkpoint")
            same = (
                isinstance(of, dict)
                and of.get("manifest_sha256") == manifest
                and stored.get("sampler") == model.sampler
            )
            rows = [
                row
                for row in stored.get("rows", [])
                if same and row.get("ema_halflife_images") == halflife
            ]
            found += [{"protocol": _protocol(stored), "rows": rows, "best": False}] if rows else []
    return found


def _counted(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A row of scores.jsonl, whose `nfe` is the number of steps, with steps and evaluations of the sampler of this name."""
    steps = row["nfe"]
    return {"steps": steps, **row, "nfe": steps * sampling.evaluations(name)}


def _lines(file: Any) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file that holds one, or one per line; nothing where it is not there or no such file."""
    try:
        content = file.read_text()
        values = (
            [json.loads(content)]
            if file.suffix == ".json"
            else [json.loads(line) for line in content.splitlines()]
        )
    except (OSError, ValueError):
        return
    yield from (value for value in values if isinstance(value, dict))


def _protocol(stored: Mapping[str, Any]) -> str:
    p = stored["protocol"]
    against = f"{p['count']:,} samples against {p['reference']}"
    return f"{p['name']}: {p['space']}, resize {p['resize']}, {against}, seed {stored['seed']}"


def _table(found: Mapping[str, Any]) -> str:
    rows: Sequence[Mapping[str, Any]] = found["rows"]
    keys = [key for key in rows[0] if key not in HIDDEN]
    lines = [
        keys,
        ["---"] * len(keys),
        *(
            [
                f"{row[k]:.6g}" if isinstance(row.get(k), float) else f"{row.get(k, '-')}"
                for k in keys
            ]
            for row in rows
        ),
    ]
    best = " The best checkpoint of its run." if found["best"] else ""
    return "\n".join(
        [f"By {found['protocol']}.{best}", "", *(f"| {' | '.join(line)} |" for line in lines)]
    )


def _latents(latent: Mapping[str, Any] | None) -> str:
    if latent is None:
        return "none, the samples are images"
    decoder = (
        f" ({latent['decoder_file']}, SHA-256 {latent['decoder_sha256']})"
        if latent["decoder_sha256"]
        else ""
    )
    note = f"; {latent['note']}" if latent["note"] else ""
    numbers = f"scale {latent['scale'] or 'unknown'}, shift {latent['shift']:g}"
    return f"{latent['rule']}, {numbers}{note}. Decoder: {latent['decoder']}{decoder}"


def _origin(origin: Mapping[str, Any]) -> str:
    trained, source = origin["trained"], origin["converted_from"]
    lines = []
    if trained:
        after = (
            f"; the weights after {trained['step']} steps" if trained["step"] is not None else ""
        )
        lines.append(f"Trained with dmf on {trained['data']}{after}.")
    if source:
        start = "It started from" if trained else "Converted from"
        lines.append(
            f"{start} `{source['file']}` (kind {source['kind']}, copy {source['copy']}, SHA-256 {source['sha256']})."
        )
    return " ".join(lines)


def _licence(source: Mapping[str, Any] | None) -> str:
    return f"The weights it was made from: {source['licence'].rstrip('.')}.\n" if source else ""
