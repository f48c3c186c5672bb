"""The card of a model folder: the model, how to load it, its scores, origin and licence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dmf.errors import DmfError
from dmf.method.samplers import SAMPLERS
from dmf.storage import checkpoint, records

if TYPE_CHECKING:
    from dmf.export.model import Model

HIDDEN = ("step", "stage", "kind", "scored_by", "ema_halflife_images")
CARD = """---
license: other
license_name: to-be-filled-in
tags: [jax, image-generation, flow-matching, meanflow]
---

# {name}

{what}. It turns noise e into {things} of shape {shape}, in one or a few steps,
by the average velocity u(z, r, t) of a flow. `config.json` has all of this card for programs.

## Load it

With `pip install "jax>={jax}" flatbuffers numpy safetensors`, in this folder:

```python
{code}
```

| file | steps | evaluations of the network | platforms |
|---|---|---|---|
{samplers}

The batch size is free. A `.jaxexport` file is a program for XLA, without weights.
It was made with jax {jax}, and jax promises to read it for six months.
Load no program that you do not trust.

`model.safetensors` holds the weights, with the names and layouts of PyTorch.
With `config.json` they outlive the programs.
The code that made them also reads them: `--mode=convert --kind=dmf`.

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

Licence: **to be filled in by whoever shares this folder**, here and at the top of this file
(`license`, `license_name`).
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
    latent, labels = about["latent"], about["labels"]
    shape = ", ".join(map(str, about["image_shape"]))
    rows = [
        f"| `{r['file']}` | {r['steps']} | {r['nfe']} | {', '.join(r['platforms'])} |"
        for r in about["samplers"]
    ]
    what = f"A generator with {labels['classes'] or 'no'} classes"
    unscored = "This checkpoint has not been scored with these settings."
    return CARD.format(
        name=name,
        what=what,
        things="latents" if latent else "images",
        shape=f"({shape})",
        code=_code(about, shape),
        samplers="\n".join(rows),
        jax=about["versions"]["jax"],
        latents=_latents(latent),
        labels=labels["rule"],
        compute=about["dtype"]["compute"],
        scores="\n\n".join(_table(found) for found in about["scores"]) or unscored,
        origin=_origin(about["origin"]),
        licence=_licence(about["origin"]["converted_from"]),
        **{key: about[key] for key in ("conventions", "noise", "images", "sampler", "ema")},
    )


def _code(about: Mapping[str, Any], shape: str) -> str:
    classes = about["labels"]["classes"]
    labels = f"np.arange(8, dtype=np.int32) % {classes}"
    return CODE.format(
        weights=about["weights"],
        file=about["samplers"][0]["file"],
        shape=shape,
        labels=labels if classes else "np.zeros(8, np.int32)  # not read",
        bytes="" if about["latent"] else BYTES,
    )


def scores(model: Model) -> list[dict[str, Any]]:
    """The stored scores of these weights with this sampler: [{"protocol", "rows", "best"}]."""
    return [*_of_training(model), *_of_commands(model)]


def _of_training(model: Model) -> Iterator[dict[str, Any]]:
    """The scores that the run has taken at this step."""
    config, home = model.config, model.home()
    settings = (config.ema.evaluate, config.run.sampler)
    if model.converted() or (_halflife(model), model.sampler) != settings:
        return

    def here(row: Mapping[str, Any]) -> bool:
        return str(row.get("step")) == model.folder.name

    found = [row for row in _lines(home / "scores.jsonl") if here(row) and "nfe" in row]
    if found:
        unnamed = f"the score of the data set {config.data.name} (`dmf.metrics`)"
        yield {
            "protocol": f"{config.run.protocol or unnamed}, during training",
            "rows": [_counted(row, model.sampler) for row in found],
            "best": any(here(row) for row in _lines(home / checkpoint.BEST)),
        }


def _of_commands(model: Model) -> Iterator[dict[str, Any]]:
    """The scores that `--mode=score` has stored for this checkpoint."""
    files = sorted(model.home().glob("scores_*.json"))
    for stored in (row for file in files for row in _lines(file)):
        of = stored.get("checkpoint")
        same = isinstance(of, dict) and of.get("manifest_sha256") == model.manifest_sha256
        if not same or stored.get("sampler") != model.sampler:
            continue
        rows = stored.get("rows", [])
        rows = [row for row in rows if row.get("ema_halflife_images") == _halflife(model)]
        if rows:
            yield {"protocol": _protocol(stored), "rows": rows, "best": False}


def _halflife(model: Model) -> float:
    return model.config.ema.evaluate if model.ema is None else model.ema


def _counted(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A row of scores.jsonl, where `nfe` is the number of steps, with steps and evaluations.

    name: of the sampler.
    """
    steps = row["nfe"]
    return {"steps": steps, **row, "nfe": steps * SAMPLERS[name].evaluations}


def _lines(file: Any) -> Iterator[dict[str, Any]]:
    """The JSON objects of a .json or .jsonl file; none if it is not there or is damaged."""
    with suppress(DmfError):
        if file.suffix == ".json":
            yield records.read(file, dict)
        else:
            yield from (line.value for line in records.lines(file, dict) if not line.fault)


def _protocol(stored: Mapping[str, Any]) -> str:
    p = stored["protocol"]
    against = f"{p['count']:,} samples against {p['reference']}"
    return f"{p['name']}: {p['space']}, resize {p['resize']}, {against}, seed {stored['seed']}"


def _table(found: Mapping[str, Any]) -> str:
    rows: Sequence[Mapping[str, Any]] = found["rows"]
    keys = [key for key in rows[0] if key not in HIDDEN]
    lines = [keys, ["---"] * len(keys), *([_cell(row, key) for key in keys] for row in rows)]
    best = " The best checkpoint of its run." if found["best"] else ""
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"By {found['protocol']}.{best}", "", *table])


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key, "-")
    return f"{value:.6g}" if isinstance(value, float) else f"{value}"


def _latents(latent: Mapping[str, Any] | None) -> str:
    if latent is None:
        return "none, the samples are images"
    file = f" ({latent['decoder_file']}, SHA-256 {latent['decoder_sha256']})"
    decoder = file if latent["decoder_sha256"] else ""
    note = f"; {latent['note']}" if latent["note"] else ""
    numbers = f"scale {latent['scale'] or 'unknown'}, shift {latent['shift']:g}"
    return f"{latent['rule']}, {numbers}{note}. Decoder: {latent['decoder']}{decoder}"


def _origin(origin: Mapping[str, Any]) -> str:
    trained, source = origin["trained"], origin["converted_from"]
    lines = []
    if trained:
        step = trained["step"]
        after = "" if step is None else f"; the weights after {step} steps"
        lines.append(f"Trained with dmf on {trained['data']}{after}.")
    if source:
        start = "It started from" if trained else "Converted from"
        lines.append(
            f"{start} `{source['file']}` (kind {source['kind']}, copy {source['copy']}, "
            f"SHA-256 {source['sha256']})."
        )
    return " ".join(lines)


def _licence(source: Mapping[str, Any] | None) -> str:
    return f"The weights it was made from: {source['licence'].rstrip('.')}.\n" if source else ""
