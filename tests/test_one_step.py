"""One training step enters six of our files.

The step is the function that `step.make_train_step` compiles: (state, batch) to the next state.
`sys.setprofile` records each function of ours that runs while JAX traces it. Two things stand
outside: the loop around the step (train.py) and the numbers it is told (`step.step_scalars`).

The package of networks counts as one file. The step calls `network.apply(params, z, r, t, ...)` and
sees nothing else of it. The files inside, four for a transformer, are asserted apart.
"""

import sys
from pathlib import Path

import jax
import pytest

import dmf
from tests.tiny import TINY, UNET, Setup

ROOT = Path(dmf.__file__).parent
STEP = [
    "method/flow.py",
    "method/intervals.py",
    "method/objectives.py",
    "method/weights.py",
    "networks",
    "step.py",
]
DIT = ["__init__.py", "attention.py", "dit.py", "layers.py"]
UNET_FILES = ["__init__.py", "attention.py", "layers.py", "unet.py"]


def entered(setup, kind):
    """(our files that a step enters, those inside networks/), sorted, while it is traced."""
    program, scalars = setup.step(kind), setup.scalars(0, kind)
    state, batch, names = jax.eval_shape(setup.state), setup.batch(0), set()

    def watch(frame, event, _):
        names.add(frame.f_code.co_filename)

    sys.setprofile(watch)
    try:
        program.trace(state, batch, scalars)
    finally:
        sys.setprofile(None)
    ours = [Path(name) for name in names if name.startswith(str(ROOT))]
    found = {path.relative_to(ROOT).as_posix() for path in ours}
    inside = {name for name in found if name.startswith("networks/")}
    outside = (found - inside) | {"networks"} if inside else found
    return sorted(outside), sorted(name.removeprefix("networks/") for name in inside)


@pytest.mark.parametrize("kind", ["flow", "all_pairs", "discrete", "jvp"])
def test_a_step_on_digits_enters_six_files(kind):
    outside, inside = entered(Setup(TINY), kind)
    assert outside == STEP and len(outside) <= 6
    assert inside == DIT


def test_augmentation_adds_its_own_file_to_the_step_of_a_unet():
    outside, inside = entered(Setup(UNET), "discrete")
    assert outside == ["data/augment.py", *STEP]
    assert inside == UNET_FILES
