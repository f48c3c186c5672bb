"""Two steps of half the length: shortcut models and the midpoint form of self-distillation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.errors import DmfError
from dmf.method import flow
from dmf.method.flow import TimeLaw, row_split
from dmf.method.intervals import linear
from dmf.method.objectives import LossConfig
from tests.method.test_family import exact_rows, keyed
from tests.method.test_objectives import ALL_PAIRS, random_net, random_rows
from tests.tiny import residuals

DYADIC = TimeLaw("dyadic", r_neq_t_fraction=0.5, base="uniform", border="own")


def test_a_step_is_the_mean_of_its_two_halves(float64):
    net, params = random_net(jax.random.key(0))
    rows = keyed(random_rows())  # with keys, by which a split would draw its share
    middle = (rows.r + rows.t) / 2
    late = net(params, rows._replace(r=middle))
    jumped = rows.z - ((rows.t - rows.r) / 2)[:, None] * late
    early = net(params, rows._replace(z=jumped, t=middle))
    found = residuals("midpoint", net, params, rows, ALL_PAIRS(32), None, linear, LossConfig())
    np.testing.assert_allclose(found.pairs, net(params, rows) - (late + early) / 2, atol=1e-13)
    net, rows = exact_rows(0.5)
    found = residuals("midpoint", net, None, rows, ALL_PAIRS(64), None, linear, LossConfig())
    assert float(jnp.abs(found.pairs).max()) < 1e-13


@pytest.mark.parametrize("base", flow.BASES)
def test_dyadic_times_are_parts_of_the_unit_interval(base):
    law = TimeLaw("dyadic", r_neq_t_fraction=0.5, base=base, border="own")
    split = row_split(70_000, 0.5)
    times = flow.draw_times(jax.random.key(0), law, split)
    r, t = map(np.asarray, split.pairs_of(times))
    k = -np.log2(t - r)
    assert set(k) == set(range(7))
    np.testing.assert_array_equal(r * 2**k, np.round(r * 2**k))
    assert r.min() == 0 and t.max() == 1
    if base == "uniform":
        shares = np.bincount(k.astype(int)) / len(k)
        np.testing.assert_allclose(shares, 1 / 7, atol=0.006)
        np.testing.assert_allclose(np.bincount((4 * r[k == 2]).astype(int)), 1250, atol=120)
        border = np.asarray(split.border_of(times)[1])
        np.testing.assert_allclose(np.quantile(border, [0.25, 0.75]), [0.25, 0.75], atol=0.01)


def test_the_mean_interval_is_that_of_the_pairing():
    assert DYADIC.mean_interval() == pytest.approx((2 - 2**-6) / 7, rel=2e-3)
    above = TimeLaw("above", base="uniform")
    assert above.mean_interval() == pytest.approx(1 / 4, rel=1e-4)


@pytest.mark.parametrize("pairing", ["above", "dyadic"])
def test_a_pace_of_times_that_are_no_draw_is_refused(pairing):
    with pytest.raises(DmfError, match=f"pairing = '{pairing}' with .*: expected 'own' for"):
        LossConfig(border_weight="min_snr").check(TimeLaw(pairing), False)
    with pytest.raises(DmfError, match="expected 'own' for"):
        LossConfig().check(TimeLaw(pairing, difficulty_clusters=4), False)
    LossConfig(border_weight="min_snr").check(TimeLaw(pairing, border="own"), False)
