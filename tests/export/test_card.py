"""The card of a model folder: its code runs, and it tells the scores of its weights alone."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.export
import numpy as np

from dmf import pretrained
from dmf.export import card, model
from tests.export.exports import SHAPE, saved, scored, to_folder
from tests.tiny import TINY

FRESH = """
import sys
class Only:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        # Names that start with _ are Python's own.
        if name.startswith("_") or name.split(".")[0] in sys.stdlib_module_names | {needed}:
            return self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Only, sys.meta_path)  # as if nothing else were installed
{code}
np.save(sys.argv[1], x)
assert images.shape == x.shape and images.dtype == np.uint8
"""


def test_the_cards_code_runs_in_a_fresh_process_without_this_code(checkpoints, models, tmp_path):
    text = (models / "dit" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    assert len(code.splitlines()) <= 12 and "license: other" in text and "to be filled in" in text
    assert (
        f'`pip install "jax>={jax.__version__}" flatbuffers numpy safetensors`' in text
    )  # an older jax reads no newer program
    needed = {
        "jax",
        "flatbuffers",
        "numpy",
        "safetensors",
        "jaxlib",
        "ml_dtypes",
        "opt_einsum",
        "scipy",
    }  # and jax's own
    subprocess.run(
        [sys.executable, "-I", "-c", FRESH.format(code=code, needed=needed), tmp_path / "x.npy"],
        cwd=models / "dit",
        check=True,
        timeout=120,
    )
    network, params = pretrained.load(checkpoints["dit"])
    e = jax.random.normal(jax.random.key(0), (8, *SHAPE))
    zeros, ones, labels = (
        np.zeros(8, np.float32),
        np.ones(8, np.float32),
        np.arange(8, dtype=np.int32),
    )
    want = e - jax.jit(network.apply)(params, e, zeros, ones, label=labels)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), want, atol=1e-5, rtol=0)


def test_the_card_has_the_scores_of_these_weights_and_no_others(tmp_path):
    home = scored(tmp_path)
    found = card.scores(model.open_model(home))
    assert [row["fd"] for row in found[0]["rows"]] == [7.125, 7.25] and found[0]["best"]
    assert (
        len(found) == 2
        and [row["fid"] for row in found[1]["rows"]] == [40.5]
        and "mine: pixels" in found[1]["protocol"]
    )
    to_folder(home, tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert (
        "| steps | nfe | fd |" in text
        and "| 1 | 1 | 7.125 |" in text
        and "| 1 | 1 | 40.5 |" in text
        and "500 samples against the rest, seed 5" in text
    )
    assert "best checkpoint" in text and "after 7 steps" in text and "90.5" not in text
    assert card.scores(model.open_model(home, sampler="euler")) == []


def test_the_cards_scores_of_training_count_heuns_evaluations(tmp_path):
    (found,) = card.scores(
        model.open_model(scored(tmp_path, sampler="heun"))
    )  # scores.jsonl has the steps alone, as "nfe"
    assert [(row["steps"], row["nfe"]) for row in found["rows"]] == [(1, 2), (2, 4)]


def test_a_file_of_scores_of_somebody_elses_is_passed_over(tmp_path):
    home = scored(tmp_path)
    for name, content in {"c": {"checkpoint": "x"}, "d": [1], "e": {"checkpoint": None}}.items():
        (home / f"scores_{name}.json").write_text(json.dumps(content))
    assert len(card.scores(model.open_model(home))) == 2


def test_what_is_not_known_of_a_checkpoint_is_not_called_none(tmp_path):
    (scored(tmp_path) / "checkpoints" / "7").rename(tmp_path / "final")
    opened = dataclasses.replace(model.open_model(tmp_path / "final"), shape=(8, 8, 4))
    made = {
        "weights": "w",
        "samplers": [{"file": "f", "steps": 1, "nfe": 1, "platforms": []}],
        "scores": [],
    }
    text = card.text("m", {**opened.about(), **made})
    assert (
        "Trained with dmf on digits." in text
        and "scale unknown, shift 0; the scale was not recorded" in text
    )
    assert "None" not in text


def test_latents_come_with_the_rule_that_makes_images_of_them(checkpoints, tmp_path):
    about = {
        "name": "imagenet256_latents",
        "scale": 0.25,
        "vae": {"file": "vae.pt", "copy": "", "sha256": "cd" * 32},
    }
    opened = model.open_model(saved(TINY, tmp_path / "latent", data=about))
    found = opened.about()
    assert (
        found["latent"]["scale"] == 0.25
        and found["latent"]["shift"] == 0
        and found["latent"]["decoder_sha256"] == "cd" * 32
    )
    made = {
        **found,
        "weights": "w",
        "samplers": [{"file": "f", "steps": 1, "nfe": 1, "platforms": []}],
        "scores": [],
    }
    text = card.text("m", made)
    assert (
        "image = decode(x / scale + shift), scale 0.25, shift 0" in text and "images =" not in text
    )
    assert model.open_model(checkpoints["dit"]).about()["latent"] is None
