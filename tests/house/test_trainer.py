"""The trainer stays small: a short train.py that reaches few of our modules, and no evaluation."""

import ast

from tests import ROOT
from tests.house.test_house import house

ELSEWHERE = ("evaluation", "metrics", "networks.frozen", "storage.readers")


def reached(start):
    """The modules that a module needs, itself included, whatever the place of an import."""
    return house.reach(house.graph(ROOT, types=True), start)


def test_the_trainer_reaches_few_modules():
    found = reached("train")
    assert {"step", "run.context", "networks.attention"} <= found
    # The 46th is networks.in_context, the transformer of improved MeanFlow.
    # The 47th is method.endpoint, the identity in the end time.
    # The 48th is networks.dit_dh, the transformer of flows in an autoencoder's features.
    # The 49th is method.teacher, a frozen flow model in the loss. It samples: method.samplers was
    # reached already.
    # The 50th is method.keys, by which the noise of stored pairs is drawn again.
    # The 51st is method.rectify, the loss of the stage that trains a second network.
    assert len(found) <= 51, sorted(found)


def test_the_trainer_reaches_no_evaluation_and_no_readers_of_other_files():
    found = reached("train")
    assert not [name for name in found if name.startswith(ELSEWHERE)]
    # The judge, which main.py hands in, does reach them.
    assert [name for name in reached("evaluation.boundary") if name.startswith(ELSEWHERE)]


def test_the_loop_is_short():
    tree = ast.parse((ROOT / "dmf" / "train.py").read_text())
    assert max(node.end_lineno for node in ast.walk(tree) if hasattr(node, "end_lineno")) <= 180
