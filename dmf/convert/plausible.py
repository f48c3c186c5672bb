"""Whether a converted flow runs in the direction that was assumed; no data is needed.

The forward check shares its assumptions with the conversion. This probe does not: it asks the
network for three cosines that a trained flow has above zero.

    noise    at t = 1 v is e - mean:        cosine of v(e, 1) with e
    data     at t = 0 v is -x + mean:       cosine of v(x, 0) with -x, x sampled by the network
    middle   noise in z makes v grow:       cosine of the change of v with a change of e around x

Reversed time or sign give the other three candidates. Each turns at least one cosine around:

- a reversed sign turns all three;
- a reversed time turns `data`: at t = 1 v grows with z, at t = 0 it falls;
- both reversed turn `middle`, as sign alone does, since t = 1/2 is its own mirror.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dmf.convert.direction import Direction
from dmf.convert.kind import Shape
from dmf.errors import DmfError

# The least of the three cosines that counts as a trained flow. Six small flows of 8 x 8 digits
# gave 0.61 to 0.84, wrong directions -0.5 to -1, and 36 random networks at most 0.23.
CLEAR = 0.4
STEPS = 4  # of the sampler; the samples need only be nearer to data than to noise
VALUES = 2048  # of noise at least, in 2 to 8 pairs e and -e
# name -> whether time and sign are reversed, seen from the chosen direction
WAYS = {
    "chosen": (False, False),
    "opposite time": (True, False),
    "opposite sign": (False, True),
    "opposite time and sign": (True, True),
}

WORDS = {"chosen": "as chosen", "cannot tell": "cannot tell (are these weights trained?)"}

Velocity = Callable[[np.ndarray, float], np.ndarray]
Cosines = dict[str, float]


def check(
    velocity: Velocity, scale: float, shape: Shape, direction: Direction | None
) -> dict[str, Any]:
    """Probes a converted flow and prints what was found; returns a part of the report.

    - velocity: v(z, t) of rows z at one time, see `velocity_of`.
    - scale: see `scale_of`.
    - shape: of one image.
    - direction: of the source, or None where the user has no choice.

    Raises DmfError where another direction is clearly the right one.
    """
    found = probe(velocity, scale, shape)
    verdict = _verdict(found)
    others = ", ".join(f"{name} {x['noise']:.2f}" for name, x in found.items() if name != "chosen")
    mine = ", ".join(f"{name} {x:.2f}" for name, x in found["chosen"].items())
    print(f"plausible {WORDS.get(verdict, verdict)}: cosines {mine}; noise of {others}", flush=True)
    if verdict in WORDS or direction is None:
        told = "as chosen" if verdict == "chosen" else "cannot tell"
        return {"verdict": told, "cosines": found}
    right = direction.opposite(*WAYS[verdict])
    raise DmfError(
        f"the weights are those of a flow with {verdict}: its cosines (noise, data, middle) are "
        f"{_listed(found['chosen'])} with {direction.setting}, {_listed(found[verdict])} with the "
        f"other; expected {right.setting} (--check=none converts without this probe)"
    )


def _verdict(found: dict[str, Cosines]) -> str:
    """The one of WAYS that is clearly right, or "cannot tell"."""
    clear = [name for name in WAYS if _least(found[name]) >= CLEAR]
    if not clear or (clear[0] != "chosen" and _least(found["chosen"]) > 0):
        return "cannot tell"
    return clear[0]


def _listed(cosines: Cosines) -> str:
    return ", ".join(f"{x:.2f}" for x in cosines.values())


def probe(velocity: Velocity, scale: float, shape: Shape) -> dict[str, Cosines]:
    """The cosines of the chosen direction and of its opposites, by the names of WAYS.

    `noise` is there for all. The other two are there for the chosen direction, and where that is
    not clear for those that `noise` leaves open.
    """
    pairs = max(2, min(8, VALUES // max(1, math.prod(shape))))
    rng = np.random.default_rng(0)
    half, other = rng.standard_normal((2, pairs, *shape), np.float32)
    noise, other = np.concatenate((half, -half)), np.concatenate((other, other))
    # Here the velocity of an isotropic normal law of that deviation does not depend on z. So
    # `middle` is what the network has learnt, and not what the wrapper of a denoiser computes.
    middle = scale**2 / (1 + scale**2)
    found: dict[str, Cosines] = {}
    for way, (time, sign) in WAYS.items():
        v = _seen_as(velocity, time, sign)
        found[way] = {"noise": _cosine(_odd(v(noise, 1.0)), noise)}
    for way, (time, sign) in WAYS.items():
        v = _seen_as(velocity, time, sign)
        if way == "chosen" or found[way]["noise"] >= CLEAR:
            found[way] |= _at_samples(v, noise, other, middle)
        if way == "chosen" and _least(found[way]) >= CLEAR:
            break
    return found


def _at_samples(v: Velocity, noise: np.ndarray, other: np.ndarray, middle: float) -> Cosines:
    x = noise
    for step in range(STEPS):
        x = x - v(x, 1 - step / STEPS) / STEPS
    inner, outer = (1 - middle) * x, middle * other
    change = v(inner + outer, middle) - v(inner - outer, middle)
    data = _cosine(_centred(v(x, 0.0)), -_centred(x))
    return {"data": data, "middle": _cosine(change, other)}


def _least(cosines: Cosines) -> float:
    """The least of the three; -1 where not all are there."""
    return min(cosines.values()) if len(cosines) == 3 else -1.0


def scale_of(config: Any) -> float:
    """The deviation of the data by which a denoiser's wrapper is built; 1 without a wrapper."""
    wrapped = getattr(config, "precond", "none") != "none"
    return float(config.sigma_data) if wrapped else 1.0


def velocity_of(network: Any, params: Any, config: Any) -> Velocity:
    """v(z, t) in float64 of rows in pairs.

    Each pair has one class, as the null class may never have been trained.
    """
    classes = getattr(config, "num_classes", 0)
    run = jax.jit(lambda params, z, t, label: network.apply(params, z, t, t, label=label))

    def velocity(z: np.ndarray, t: float) -> np.ndarray:
        rows = np.arange(len(z)) % (len(z) // 2)
        label = (rows % classes).astype(np.int32) if classes else None
        time = np.full(len(z), t, np.float32)
        with jax.default_matmul_precision("highest"):
            return np.asarray(run(params, z.astype(np.float32), time, label), np.float64)

    return velocity


def _seen_as(velocity: Velocity, time: bool, sign: bool) -> Velocity:
    def seen(z: np.ndarray, t: float) -> np.ndarray:
        out = velocity(z, 1 - t if time else t)
        return -out if sign else out

    return seen


def _odd(v: np.ndarray) -> np.ndarray:
    """The part that changes its sign with the noise, of rows in pairs e and -e."""
    half = len(v) // 2
    return v - np.concatenate((v[half:], v[:half]))


def _centred(x: np.ndarray) -> np.ndarray:
    return x - x.mean(axis=0, keepdims=True)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Over all elements; 0 where one of them is zero, NaN where one is not finite."""
    norm = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(np.sum(a * b)) / norm if norm else 0.0
