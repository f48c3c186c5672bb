"""The state at a stage switch."""

import dataclasses

import jax
import numpy as np
import pytest

from dmf import state
from tests.tiny import TINY, Setup, merged


@pytest.mark.parametrize("optimizer", ["keep", "reset"])
@pytest.mark.parametrize("ema", ["keep", "reset"])
def test_a_switch_resets_what_the_config_says_and_nothing_else(optimizer, ema):
    setup = Setup(
        merged(
            TINY, curriculum=dict(switch_optimizer=optimizer, switch_ema=ema, interval="adaptive")
        )
    )
    now = setup.state()
    moved = jax.tree.map(
        lambda x: x + 1, dataclasses.replace(now, ema=jax.tree.map(lambda x: 2 * x, now.ema))
    )
    before = setup.stages[1]
    assert before.index == 0 and state.switches(before, setup.config.curriculum) == (
        "reset" in (optimizer, ema)
    )
    after = state.switch(moved, before, setup.config.curriculum, setup.config.ema, setup.optimizer)
    fresh = state.create(moved.params, setup.optimizer, setup.config.ema)
    for name, expected in (
        ("params", moved),
        ("step", moved),
        ("intervals", moved),
        ("opt_state", fresh if optimizer == "reset" else moved),
        ("ema", fresh if ema == "reset" else moved),
    ):
        for a, b in zip(
            jax.tree.leaves(getattr(after, name)),
            jax.tree.leaves(getattr(expected, name)),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
