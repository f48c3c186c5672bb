"""Least times of steps: the arithmetic by hand, chips by name, products counted in XLA's text."""

import jax
import jax.numpy as jnp
import pytest

from dmf import sharding
from dmf.config import parse
from dmf.measure import benchmark, hlo, products, roofline
from dmf.measure.cost import Counts
from tests.tiny import TINY, merged

CHIP = roofline.Chip(
    {"bfloat16": 200e12, "default": 200e12, "highest": 25e12}, 800e9, 100e9, "by hand"
)


@pytest.mark.parametrize(
    ("flops", "memory", "sent", "arithmetic", "seconds", "binds"),
    [
        (1e12, 2e9, 0.1e9, "bfloat16", 1e12 / 200e12, "FLOP"),  # 5.0, 2.5 and 1.0 ms
        (1e12, 8e9, 0.1e9, "bfloat16", 8e9 / 800e9, "HBM"),  # 5, 10 and 1 ms
        (1e12, 8e9, 2e9, "bfloat16", 2e9 / 100e9, "links"),  # 5, 10 and 20 ms
        (1e12, 8e9, 2e9, "highest", 1e12 / 25e12, "FLOP"),  # 40, 10 and 20 ms
    ],
)
def test_the_largest_of_three_bounds_is_the_time(flops, memory, sent, arithmetic, seconds, binds):
    found = roofline.bounds(flops, memory, sent, CHIP, arithmetic)
    assert found.seconds == pytest.approx(seconds, rel=1e-12) and found.binds == binds
    row = roofline.columns(found, 1000, 3e-3)
    assert row["images_per_s"] == pytest.approx(1000 / seconds)
    assert row["compiler_ms"] == 3.0 and row["binds"] == binds
    assert f"{1e3 * seconds:.3f}" in roofline.format_row(row)


def test_a_chip_without_known_links_has_no_bound_by_them():
    chip = roofline.Chip(CHIP.flops, CHIP.memory, 0, "")
    assert roofline.bounds(1e12, 2e9, 1e15, chip, "default").binds == "FLOP"


@pytest.mark.parametrize(
    ("kind", "peak", "memory"),
    [
        ("TPU v4", 275e12, 1200e9),
        ("TPU v5 lite", 197e12, 819e9),
        ("TPU v5e", 197e12, 819e9),
        ("TPU v5p", 459e12, 2765e9),
        ("TPU v6 lite", 918e12, 1638e9),
        ("NVIDIA H200", 989e12, 4800e9),
        ("NVIDIA H200 NVL", 835e12, 4800e9),
        ("NVIDIA H100 PCIe", 756e12, 2000e9),
        ("NVIDIA H100 NVL", 835e12, 3900e9),
        ("NVIDIA H100 80GB HBM3", 989e12, 3350e9),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2039e9),
        ("NVIDIA A100-SXM4-40GB", 312e12, 1555e9),
        ("NVIDIA A100 80GB PCIe", 312e12, 1935e9),
    ],
)
def test_chips_by_device(kind, peak, memory):
    found = roofline.chip(kind)
    assert (found.flops["bfloat16"], found.memory) == (peak, memory) and found.source
    assert found.flops["highest"] <= found.flops["high"] <= found.flops["default"]


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v3"])
def test_other_devices_have_no_bounds(kind):
    assert roofline.chip(kind) is None


def test_the_arithmetic_of_a_kind_is_its_dtype_or_its_precision():
    config = parse(merged(TINY, precision=dict(plain="default", difference="high")))
    found = [roofline.arithmetic(config, kind) for kind in ("flow", "discrete", "jvp")]
    assert found == ["default", "high", "highest"]
    assert roofline.arithmetic(parse(merged(TINY, compute_dtype="bfloat16")), "jvp") == "bfloat16"


def counted(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    module = hlo.parse(jax.jit(function).lower(*arrays).compile().as_text())
    return products.flops(module)


def test_products_are_counted_as_often_as_their_loop_runs():
    def five(x, w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=5)[0]

    assert counted(five, (8, 16), (16, 16)) == 5 * 2 * 8 * 16 * 16


# libtpu writes products as convolutions: a patch embedding, and 24 x 12 pairs of matrices.
# With these strides and gaps, one position of the window 24 x 12 meets an input.
PATCHES = "window={size=4x4 stride=4x4}, dim_labels=b01f_01io->b01f"
PAIRS = "window={size=24x12 stride=23x11 lhs_dilate=24x12}, dim_labels=0b1f_0o1i->01bf"
TPU = f"""\
ENTRY %main (a: f32[24,64,12,32], b: f32[24,64,12,32]) -> f32[24,12,64,64] {{
  %a = f32[24,64,12,32]{{3,2,1,0}} parameter(0)
  %b = f32[24,64,12,32]{{3,2,1,0}} parameter(1)
  %x = f32[24,32,32,4]{{3,2,1,0}} parameter(2)
  %k = f32[4,4,4,768]{{3,2,1,0}} parameter(3)
  %e = f32[24,8,8,768]{{3,2,1,0}} convolution(%x, %k), {PATCHES}
  ROOT %c = f32[24,12,64,64]{{3,2,1,0}} convolution(%a, %b), {PAIRS}
}}
"""


def test_products_that_a_tpu_writes_as_convolutions():
    embedding, pairs = 2 * 24 * 64 * 768 * 64, 2 * 24 * 12 * 64 * 64 * 32
    assert products.flops(hlo.parse(TPU)) == embedding + pairs


def test_positions_in_the_padding_of_a_convolution_do_not_count():
    def convolve(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    # 3 x 3 around 4 x 4 positions: 4 + 4 + 4 - 2 pairs along each axis.
    assert counted(convolve, (2, 4, 4, 3), (3, 3, 3, 5)) == 2 * 2 * 3 * 5 * 10**2


def test_the_benchmark_prints_least_times_where_the_chip_is_known(monkeypatch):
    monkeypatch.setattr(roofline, "CHIPS", {"cpu": CHIP})
    mesh, config = sharding.make_mesh(), parse(TINY)
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((64, 64))).compile()
    least = roofline.of_program(compiled, mesh, config, "jvp")
    assert least.flops == 2 * 64**3 / 25e12 and least.links == 0
    assert least.memory == pytest.approx(2 * 64 * 64 * 4 / 800e9)
    nothing = Counts(None, None, None, None)
    flow = benchmark.Program("flow", 0.0, 3.0, None, 1.0, nothing, 1, seconds=[1.0], least=least)
    twice = roofline.Bounds(0, 2 * least.memory, 0)
    whole = benchmark.Program("jvp", 1.0, 4.0, None, 1.0, nothing, 1, seconds=[2.0], least=twice)
    rows = benchmark._rows([flow, whole], 64, 2e12, mesh)
    assert [row["roofline"]["over_official"] for row in rows] == pytest.approx([2, 1])
    lines = benchmark.format_least(rows)
    assert "official/" in lines[0] and lines[1].split()[:3] == ["flow", "0.00", "1000.000"]
    assert lines[1].split()[-2:] == ["2.00", "HBM"]
    for row in rows:
        row["roofline"] = roofline.columns(None, 64, None)
    assert benchmark.format_least(rows) == []
