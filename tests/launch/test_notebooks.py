"""The notebooks run from top to bottom, and hold what a notebook in this repository has to."""

import json
import re
import tomllib

import pytest

from launch.tables import notebooks
from tests import ROOT, devices

NAMES = sorted(path.stem for path in notebooks.FOLDER.glob("*.ipynb"))
PICTURES = {"a_step": 2, "curriculum": 5, "sample": 2}


def cells(name, kind):
    found = json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_there_are_three_and_the_page_names_each():
    page = (notebooks.FOLDER / "README.md").read_text()
    assert sorted(PICTURES) == NAMES
    assert all(f"({name}.ipynb)" in page for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_without_outputs_and_opens_in_colab(name):
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"][
        "Repository"
    ]
    for cell in json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    address = repository.replace("https://github.com/", "https://colab.research.google.com/github/")
    assert f"({address}/blob/main/notebooks/{name}.ipynb)" in cells(name, "markdown")[0]
    assert f"!git clone -q {repository}\n" in cells(name, "code")[0]


def test_a_short_run_trains_for_a_hundredth_of_the_steps():
    text = (
        "config.curriculum.pretrain_length, config.curriculum.length = 1500.0, 1200.0\n"
        "f(length=3600.0, pretrain_length=2000.0)"
    )
    numbers = ["15.0", "12.0", "36.0", "20.0"]
    assert re.findall(r"[\d.]*\d", notebooks.shortened(text)) == numbers
    # As ruff formats it.
    text = text.replace("1500.0, 1200.0", "(\n    1500.0,\n    1200.0,\n)")
    assert re.findall(r"[\d.]*\d", notebooks.shortened(text)) == numbers


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_that_trains_is_shortened(name):
    for code in cells(name, "code"):
        if "    train(" in code:
            assert not re.search(r"\d{3,}\.0", notebooks.shortened(code))


def test_a_short_run_is_not_in_the_place_of_one_at_full_length(tmp_path, monkeypatch):
    class Client:
        def __init__(self, notebook, **how):
            pass

        def execute(self, env):
            runs.append(env.get("DMF_NOTEBOOK_RUN"))

    runs = []
    monkeypatch.setattr("nbclient.NotebookClient", Client)
    monkeypatch.delenv("DMF_NOTEBOOK_RUN", raising=False)
    for short in (True, False):
        notebooks.run(notebooks.FOLDER / "sample.ipynb", tmp_path, short)
    assert runs == [
        str(tmp_path / "short_run"),
        None,
    ]  # each is refused where it finds the other's checkpoints


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DMF_NOTEBOOK_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("XLA_FLAGS", devices(1))
    pictures = notebooks.run(notebooks.FOLDER / f"{name}.ipynb", tmp_path, short=True)
    assert len(pictures) == PICTURES[name]
    assert all(path.stat().st_size > 3000 for path in pictures)
