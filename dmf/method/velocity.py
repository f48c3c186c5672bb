"""The velocity along which a row steps back or is differentiated.

    data   v = e - x of the row itself, the paper's direction
    own    u(z, t, t) of the weights that are trained
    ema    u(z, t, t) of the evaluated average: the EMA of the weights that is sampled and scored

The target keeps v in all three. `dmf.method.guidance` holds the velocity that replaces v there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from dmf.method.flow import Net, Tangent

DATA = "data"
# Direction -> the frozen weights that it needs, by their name in `frozen`.
FROZEN = {"ema": "average"}
TANGENTS = (DATA, "own", *FROZEN)


def tangent(name: str, net: Net, params: object, frozen: Mapping[str, object]) -> Tangent | None:
    """The direction of this name, None for the velocity v of the rows.

    net: the network in evaluation mode. frozen: trees by name, as the loss gets them.
    """
    if name == DATA:
        return None
    return along_own(net, frozen[FROZEN[name]] if name in FROZEN else params)


def along_own(net: Net, params: object) -> Tangent:
    """The direction u(z, t, t): the mean of v at z, as these weights know it.

    It is the direction of improved MeanFlow (arXiv 2512.02012), here also for finite differences.
    v of a single row is noisy. A step along v takes this noise into u' or du/dt. The mean has none.
    No gradient reaches params. net: without dropout.
    """
    return lambda rows: net(jax.lax.stop_gradient(params), rows._replace(r=rows.t))


def passes(name: str) -> int:
    """Forward passes that this direction costs a row with r < t."""
    return 0 if name == DATA else 1
