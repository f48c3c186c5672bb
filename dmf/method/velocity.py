"""The velocity along which a row steps back or is differentiated.

    data   v = e - x of the row itself, the paper's direction
    own    u(z, t, t) of the weights that are trained
    ema    u(z, t, t) of the evaluated average

The target keeps v in all three. `dmf.method.guidance` holds the velocity that replaces v there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from dmf.method.flow import Net, Tangent

DATA = "data"
FROZEN = {"ema": "average"}  # a network's velocity -> the frozen tree that it comes from
TANGENTS = (DATA, "own", *FROZEN)


def tangent(name: str, net: Net, params: object, frozen: Mapping[str, object]) -> Tangent | None:
    """The direction of this name, None for the velocity v of the rows.

    net: the network in evaluation mode. frozen: trees by name, as the loss gets them.
    """
    if name == DATA:
        return None
    return along_own(net, frozen[FROZEN[name]] if name in FROZEN else params)


def along_own(net: Net, params: object) -> Tangent:
    """The direction u(z, t, t): what these weights hold to be the mean of v at z.

    It is the direction of improved MeanFlow (arXiv 2512.02012), here also for finite differences.
    The residual loses the noise of v that the network's Jacobian passes on.
    No gradient reaches params. net: without dropout.
    """
    return lambda rows: net(jax.lax.stop_gradient(params), rows._replace(r=rows.t))


def passes(name: str) -> int:
    """Forward passes that this direction costs a row with r < t."""
    return 0 if name == DATA else 1
