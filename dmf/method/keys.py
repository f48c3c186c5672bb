"""Random keys of samples, by seed, purpose and number, and the noise that a key gives.

No training step has such a key. Pairs have a purpose of their own, so that no score is taken at a
noise that training has seen.
"""

from __future__ import annotations

import jax

Array = jax.Array
SAMPLES, PAIRS = 2**31 - 1, 2**31 - 2  # purposes


def keys_of(seed: Array, row: Array, purpose: int = SAMPLES) -> Array:
    """(B,) typed keys, one per sample, by seed, purpose and number (B,) of the sample."""
    key = jax.random.fold_in(jax.random.key(seed), purpose)
    return jax.vmap(lambda n: jax.random.fold_in(key, n))(row)


def noise_of(keys: Array, shape: tuple[int, ...]) -> Array:
    """(B, *shape) standard normal noise, one draw per key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
