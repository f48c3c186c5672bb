"""A frozen flow model, the teacher: its velocity v_T in a loss, and the path of its solver.

    v_T = u_T(z, t, t), guided or not                the teacher's velocity, without gradient
    loss.velocity = teacher                          v_T in the place of v in the target
    loss.tangent = teacher                           the step back and the derivative follow v_T

A row pays for v_T once, however often it is used. MeanFlow distillation in an autoencoder's
features (arXiv 2511.13019) has it in both places.

The kind `teacher_path` is consistency mid-training (CMT, arXiv 2509.24526). A solver follows v_T
from noise along the grid t_0 = 1 .. t_n = 0 and keeps its states z_i. Two of them make a row:

    e = u(z_i, t_j, t_i) - (z_i - z_j) / (t_i - t_j),  t_j < t_i

The second term is the average velocity of the teacher's path between the two times.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from dmf.errors import DmfError
from dmf.fields import INF, LEAST, choice, limited
from dmf.method import flow, samplers, velocity
from dmf.method.flow import Condition, Net, Rows, RowSplit, Tangent
from dmf.method.guidance import Contrast, contrast
from dmf.method.objectives import KINDS
from dmf.method.velocity import DATA, TEACHER

if TYPE_CHECKING:
    from dmf.method.weights import LossConfig

Array = jax.Array
sg = jax.lax.stop_gradient
PATH = 0x7EAC  # the purpose of a row's key from which its pairs of states are drawn
LABELS = TRUE, RELEASED = ("true", "released")


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen flow model with the network of the run, and its path for `teacher_path` stages.

    `loss.velocity` and `loss.tangent` say where its velocity stands.
    """

    # checkpoint or work directory of the frozen flow model; "" = the one of config.init
    place: str = ""
    guidance: float = limited(1.0, 0, INF)  # scale of its guidance; 1 = none, else it costs two
    # of a teacher_path stage: states of a path, noise and data among them
    states: int = limited(16, 2, 1000)
    solver: str = choice("euler", samplers.MOVES)  # of the path, from one state to the next
    # more states near noise: t becomes s t / (1 + (s - 1) t); 1 = even steps
    shift: float = limited(1.0, LEAST, INF)
    # pairs of states per path, each a row of the loss; 0 = all of them
    pairs: int = limited(0, 0, 10_000)
    # times that the network is told: true | released = even ones, whatever the shift
    labels: str = choice("true", LABELS)

    def check(self, loss: LossConfig, kinds: Collection[str], classes: int) -> None:
        """Raises DmfError where the fields contradict each other, the loss or the stages.

        kinds: of all stages. classes: of the network.
        """
        found, guided = uses(loss, kinds), [kind for kind in kinds if KINDS[kind].guided]
        if not found and self != TeacherConfig():
            name = next(f.name for f in fields(self) if getattr(self, f.name) != f.default)
            raise DmfError(
                f"config.teacher.{name} = {getattr(self, name)!r}: expected the default, or a use "
                f"of the teacher: config.loss.velocity or tangent = {TEACHER!r}, or a stage of a "
                "kind that follows its path"
            )
        if self.guidance != 1 and not classes:
            raise DmfError(
                f"config.teacher.guidance = {self.guidance:g}: expected 1, as config.network takes "
                "no classes"
            )
        if guided and TEACHER in (loss.velocity, loss.tangent):
            raise DmfError(
                f"config.curriculum.kinds has {guided[0]!r} with {found[-1]}: expected no guided "
                "stage, as config.teacher.guidance guides a teacher"
            )
        if loss.velocity == loss.tangent == TEACHER and (loss.tangent_data or loss.target_data < 1):
            raise DmfError(
                f"config.loss.tangent_data = {loss.tangent_data:g} and target_data = "
                f"{loss.target_data:g}: expected 0 and 1, as the teacher is in both places"
            )

    @property
    def per_path(self) -> int:
        """Rows that a path gives."""
        return self.pairs or self.states * (self.states - 1) // 2

    @property
    def cost(self) -> int:
        """Forward passes of one v_T."""
        return 1 if self.guidance == 1 else 2

    def passes(self, loss: LossConfig, on_path: bool, each: int) -> float:
        """Forward passes by the teacher for every row of a batch, or for every path.

        on_path: of a kind that follows the teacher's path. each: the passes of a row of this kind,
        of which a path has `per_path` rows.
        """
        if on_path:
            solved = (self.states - 1) * samplers.SAMPLERS[self.solver].evaluations
            return solved * self.cost + each * (self.per_path - 1)
        return self.cost if loss.velocity == TEACHER else 0

    def tangent_passes(self, loss: LossConfig) -> int:
        """Forward passes of a row with r < t for the direction of its step back."""
        if loss.tangent != TEACHER:
            return velocity.passes(loss.tangent)
        return 0 if loss.velocity == TEACHER else self.cost


def uses(loss: LossConfig, kinds: Collection[str]) -> list[str]:
    """The fields of a config that use the teacher, with their values; none without a teacher."""
    found = [f"config.curriculum.kinds = {kind!r}" for kind in kinds if KINDS[kind].taught]
    both = [name for name in ("velocity", "tangent") if getattr(loss, name) == TEACHER]
    return [*found, *(f"config.loss.{name} = {TEACHER!r}" for name in both)]


def known(
    net: Net, frozen: Mapping[str, object], config: TeacherConfig, null_class: int
) -> Callable[[Rows], Array]:
    """v_T of rows, (B, ...), without gradient. net: the network in evaluation mode."""
    params = sg(frozen[TEACHER])

    def at(rows: Rows) -> Array:
        now = rows._replace(r=rows.t)
        v_c = net(params, now)
        if config.guidance == 1:
            return sg(v_c)
        nobody = jnp.full_like(jnp.asarray(rows.condition.label), null_class)
        v_u = net(params, now._replace(condition=now.condition._replace(label=nobody)))
        return sg(contrast(v_c, v_u, rows.t, Contrast(config.guidance)))

    return at


def placed(
    v_t: Callable[[Rows], Array], rows: Rows, tangent: Tangent | None, loss: LossConfig
) -> tuple[Rows, Tangent | None]:
    """(rows, direction of the step back) with v_T where the loss wants it.

    tangent: the direction of a loss that does not step along v_T, None for v itself.
    """
    if loss.velocity != TEACHER:
        return rows, v_t if loss.tangent == TEACHER else tangent
    rows = rows._replace(v=v_t(rows), data=rows.v)
    if loss.tangent == DATA:
        return rows, lambda pairs: jnp.asarray(pairs.data)
    return rows, None if loss.tangent == TEACHER else tangent


def grid(config: TeacherConfig) -> tuple[np.ndarray, np.ndarray]:
    """(times of the states, times that the network is told), from 1 to 0, float32."""
    even = 1 - np.arange(config.states) / (config.states - 1)
    true = flow.shifted(even, config.shift)
    told = even if config.labels == RELEASED else true
    return true.astype(np.float32), told.astype(np.float32)


def path(v_t: Callable[[Rows], Array], rows: Rows, config: TeacherConfig) -> Array:
    """The states of the solver, (states, B, ...), the first of them rows.z at t = 1."""
    times, _ = grid(config)

    def u(z: Array, r: Array, t: Array) -> Array:
        return v_t(rows._replace(z=z, r=r, t=t))

    def step(z: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        t, r = (jnp.broadcast_to(end, rows.t.shape) for end in ends)
        z = samplers.MOVES[config.solver](u)(z, r, t, ends[0] - ends[1])
        return z, z

    _, later = jax.lax.scan(step, rows.z, (jnp.asarray(times[:-1]), jnp.asarray(times[1:])))
    return jnp.concatenate([rows.z[None], later])


def path_rows(
    v_t: Callable[[Rows], Array], rows: Rows, config: TeacherConfig
) -> tuple[Rows, RowSplit]:
    """(rows of pairs of states, their split). Each given row is noise at t = 1.

    A path gives `per_path` rows. v is the average velocity between the two states. A number of
    pairs is drawn with repetition, by the row's key. Condition and keys follow their row.
    """
    later, earlier = np.triu_indices(config.states, 1)  # states i before j, so t_i > t_j
    states = jnp.moveaxis(path(v_t, rows, config), 0, 1)
    told = jnp.asarray(grid(config)[1])
    i, j = (jnp.broadcast_to(jnp.asarray(x), (len(rows.t), len(x))) for x in (later, earlier))
    if config.pairs:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, PATH))(rows.keys)
        chosen = jax.vmap(lambda k: jax.random.randint(k, (config.pairs,), 0, len(later)))(keys)
        i, j = jnp.asarray(later)[chosen], jnp.asarray(earlier)[chosen]
    first, last = (jax.vmap(lambda s, k: s[k])(states, k) for k in (i, j))
    t, r = told[i], told[j]
    span = (t - r).reshape(*t.shape, *(1,) * (states.ndim - 2))
    v = sg((first - last) / span)

    def flat(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    count = config.per_path
    condition: Condition = jax.tree.map(lambda x: jnp.repeat(x, count, 0), rows.condition)
    found = Rows(flat(sg(first)), flat(r), flat(t), flat(v), condition)
    if rows.keys is not None:
        each = jax.vmap(lambda key: jax.random.split(key, count))(rows.keys)
        found = found._replace(keys=flat(each))
    return found, RowSplit(len(found.t), 1, 1)
