"""Checkpoints of random weights, and a scored run, for the tests of exports."""

import json
from functools import partial

import jax
import jax.export
import numpy as np

from dmf import pretrained, sharding
from dmf.config import parse, to_dict
from dmf.evaluation.sampling import Sampler
from dmf.export import folder, model, onnx
from dmf.storage import checkpoint, paths
from tests.tiny import TINY, Setup, merged

STEPS = (1, 2, 4)
SHAPE = (8, 8, 1)
SOURCE = {
    "kind": "sit",
    "source": {"file": "sit.pt", "copy": "ema", "sha256": "ab" * 32},
    "licence": "theirs",
    "network": {},
}


def saved(base, path, **metadata):
    """A checkpoint as from a conversion, of random weights; no leaf is zero."""
    setup = Setup(base)
    params = setup.state().params
    assert all(np.asarray(x).any() for x in jax.tree.leaves(params))
    stored = {**pretrained.metadata(setup.config.network, SHAPE, SOURCE), **metadata}
    checkpoint.save_weights(path, params, stored, {})
    return path


def own(path, labels, count, steps):
    """(noise, the samples of the checkpoint's own sampler from it)."""
    config = parse(checkpoint.metadata(path)["config"])
    network, params = pretrained.load(path)
    draw = Sampler(network, config, SHAPE, labels, sharding.make_mesh(devices=jax.devices()[:1]))
    key = jax.random.fold_in(jax.random.key(np.uint32(config.seed)), 2**31 - 1)
    e = np.stack([jax.random.normal(jax.random.fold_in(key, i), SHAPE) for i in range(count)])
    return e, draw(jax.device_put(params, jax.devices()[0]), count, steps)


LABELS = np.array([10, 3, 0, 9, 10, 5, 1], np.int32)  # 10 is the null class


def scored(tmp_path, **run):
    """A work directory, as far as the card reads it: step 7 of two, scored twice."""
    home = tmp_path / "run"
    (home / "checkpoints").mkdir(parents=True)
    config = to_dict(parse(merged(TINY, ema=dict(evaluate=0.0), run=run)))
    saved(TINY, home / "checkpoints" / "7", config=config, source=None, data={"name": "digits"})
    rows = [
        {"step": n, "stage": "s", "kind": "jvp", "nfe": m, "fd": n + m / 8}
        for n in (3, 7)
        for m in (1, 2)
    ]
    (home / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "best.json").write_text(json.dumps(rows[2]))
    manifest = paths.sha256(home / "checkpoints" / "7" / checkpoint.MANIFEST)
    protocol = {
        "name": "mine",
        "space": "pixels",
        "resize": "none",
        "count": 500,
        "reference": "the rest",
    }
    for name, other in (("a", manifest), ("b", "another's")):
        found = {
            "checkpoint": {"manifest_sha256": other},
            "protocol": protocol,
            "sampler": "few_step",
            "seed": 5,
        }
        found["rows"] = [
            {"ema_halflife_images": h, "steps": 1, "nfe": 1, "fid": 40.5 + h} for h in (0.0, 50.0)
        ]
        (home / f"scores_{name}.json").write_text(json.dumps(found))
    return home


def to_folder(path, out, steps=(1,), upload="", sampler=""):
    """The model folder of a checkpoint; returns its config.json."""
    return folder.export(
        partial(model.open_model, path, sampler=sampler), out, steps=steps, upload=upload
    )


def to_onnx(path, out, steps=1):
    """The ONNX file of a checkpoint; returns its metadata."""
    return onnx.export(partial(model.open_model, path), out, steps=steps)
