"""The velocity along which a row steps back or is differentiated.

    data   v = e - x of the row itself, the paper's direction
    own    u(z, t, t) of the weights that are trained
    ema    u(z, t, t) of the evaluated average: the EMA of the weights that is sampled and scored
    head   v(z, t) of the network's velocity head, a side output that is trained beside u

The direction `teacher` is the velocity of a frozen flow model (`dmf.method.teacher`).

The target keeps v in all of them. Two shares of v may mix a direction with v, one in the tangent
and one in the target. `dmf.method.guidance` holds the velocity that replaces v itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax

Array = jax.Array

if TYPE_CHECKING:
    from dmf.method.flow import Net, Rows, Tangent


def along_own(net: Net, params: object) -> Tangent:
    """The direction u(z, t, t): the mean of v at z, as these weights know it.

    It is the direction of improved MeanFlow (arXiv 2512.02012), here also for finite differences.
    v of a single row is noisy. A step along v takes this noise into u' or du/dt. The mean has none.
    No gradient reaches params. net: without dropout. It may be the velocity head, of r = t too.
    Where guidance has evaluated it already, it is not evaluated again.
    """

    def direction(rows: Rows) -> jax.Array:
        if rows.own is not None:
            return rows.own
        return net(jax.lax.stop_gradient(params), rows._replace(r=rows.t))

    return direction


# Direction -> what makes it of (net, weights that are trained, frozen trees); None for v itself.
# net is the network in evaluation mode; for "head" it is the network's velocity head.
DATA, OWN, HEAD, TEACHER = "data", "own", "head", "teacher"
TANGENTS: dict[str, Callable[[Net, object, Mapping[str, object]], Tangent] | None] = {
    DATA: None,
    OWN: lambda net, params, frozen: along_own(net, params),
    "ema": lambda net, params, frozen: along_own(net, frozen["average"]),
    HEAD: lambda net, params, frozen: along_own(net, params),
    TEACHER: None,  # `dmf.method.teacher.placed` gives it
}
ONLINE = (OWN, HEAD)  # directions by the weights that train
AVERAGED = ("ema",)  # directions that need the evaluated average among the frozen trees


def mixed(v: Array, u: Array, share: float) -> Array:
    """share v + (1 - share) u: v alone for 1, u alone for 0. v, u: (B, ...)."""
    if share in (0, 1):  # as they are, to the bit
        return v if share else u
    return share * v + (1 - share) * u


def passes(name: str) -> int:
    """Forward passes that this direction costs a row with r < t."""
    return 0 if name == DATA else 1
