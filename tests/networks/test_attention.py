"""The attention kernels against the plain one: values, derivatives, memory, rounding, refusals."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dmf import sharding
from dmf.config import MeshConfig
from dmf.errors import DmfError
from dmf.networks import attention
from tests.networks.small import fast_compile

SHAPE = (2, 1024, 4, 64)  # rows, tokens, heads, head_dim


def on_nvidia():
    return jax.default_backend() == "gpu"


def meanflow(attend):
    """Gradient of a loss that holds the tangent as a target, as the MeanFlow loss does."""

    def loss(q, k, v, dq, dk, dv):
        o, do = jax.jvp(attend, (q, k, v), (dq, dk, dv))
        return jnp.sum((o + jax.lax.stop_gradient(do)).astype(jnp.float32) ** 2)

    return jax.grad(loss, (0, 1, 2))


def second(attend):
    """Gradient of a loss whose tangent is differentiated too."""
    return jax.grad(
        lambda *x: jnp.sum(jax.jvp(attend, x[:3], x[3:])[1].astype(jnp.float32) ** 2), (0, 1, 2)
    )


PASSES = {
    "jvp": lambda attend: lambda *x: jax.jvp(attend, x[:3], x[3:]),
    "gradient": lambda attend: lambda *x: jax.vjp(attend, *x[:3])[1](x[3].astype(x[2].dtype)),
    "gradient of the jvp loss": meanflow,
    "second order": second,
}


@functools.cache
def temporary_bytes(name, kind, tokens=SHAPE[1]):
    """Compiled temporary memory of one pass of one kernel."""
    x = jax.ShapeDtypeStruct((SHAPE[0], tokens, *SHAPE[2:]), jnp.float32)
    return (
        jax.jit(PASSES[kind](attention.KERNELS[name]))
        .lower(*[x] * 6)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal((6, *shape))


def error(got, want):
    """Relative L2 of each array."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    differences = [
        (np.asarray(a, np.float64) - np.asarray(b, np.float64), np.asarray(b, np.float64))
        for a, b in pairs
    ]
    return [np.linalg.norm(d) / np.linalg.norm(b) for d, b in differences]


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize(("tokens", "chunk"), [(1, 128), (17, 8), (130, 128), (257, 128)])
def test_chunked_attention_is_attention(float64, kind, tokens, chunk):
    """In float64, whatever N; 17 keys are three parts of 6 with one key that does not exist."""
    x = draw(2, tokens, 3, 8)
    attend = functools.partial(attention.chunked, chunk=chunk)
    got, want = (
        fast_compile(PASSES[kind](attend))(*x),
        fast_compile(PASSES[kind](attention.xla))(*x),
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.float64 and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1, np.abs(b).max()))


def test_queries_need_not_be_as_many_as_keys(float64):
    q, k, v = draw(2, 9, 3, 8)[0, :, :4], *draw(2, 9, 3, 8)[1:3]
    np.testing.assert_allclose(
        attention.chunked(q, k, v, 4), attention.xla(q, k, v), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("kind", ["jvp", "gradient of the jvp loss"])
def test_chunked_attention_in_float32_at_1024_tokens(kind):
    x = draw(1, *SHAPE[1:]).astype(np.float32)[:, :, :, :2]
    got, want = (
        fast_compile(PASSES[kind](attention.KERNELS[name]))(*x) for name in ("chunked", "xla")
    )
    assert max(error(got, want)) < 1e-5


def test_memory_at_1024_tokens():
    """Forward mode takes at most a third of the plain path's temporary memory.

    The gradient of the JVP loss takes at most half.
    """
    for kind, most in (("jvp", 1 / 3), ("gradient of the jvp loss", 1 / 2)):
        assert temporary_bytes("chunked", kind) <= most * temporary_bytes("xla", kind), kind


@pytest.mark.parametrize("kind", ["jvp", "gradient", "gradient of the jvp loss"])
def test_memory_grows_linearly(kind):
    """Four times the tokens need four times the memory. Plain weights need sixteen times."""
    assert temporary_bytes("chunked", kind, 4096) <= 4.05 * temporary_bytes("chunked", kind, 1024)


def test_huge_logits_stay_finite(float64):
    """Logits of some 1e4, where exp overflows: float64 equal to the plain path, float32 finite."""
    x = draw(1, 40, 2, 8)
    x[:2] *= 100
    for kind in PASSES:
        one = fast_compile(PASSES[kind](functools.partial(attention.chunked, chunk=16)))
        if kind == "jvp":
            # A logit of 1e4 is known to 2e-12, and so is each weight. Gradients in q and k vanish.
            assert max(error(one(*x), fast_compile(PASSES[kind](attention.xla))(*x))) < 1e-10
        assert all(
            np.isfinite(leaf).all() for leaf in jax.tree.leaves(one(*x.astype(np.float32)))
        ), kind


@pytest.mark.parametrize("mean_key", [0, 3])
def test_bfloat16_rounds_as_the_plain_path_does(float64, mean_key):
    """Errors against float64 by the plain path's: at most 1.3 for o and tangent, 2.5 for gradients.

    Gradients lose more, as in every flash kernel. The cotangent of a weight is rounded before the
    share of all keys is taken off. A large mean key must not make it worse.
    """
    x = draw(2, 256, 4, 64)
    x[1] += mean_key
    x[4] += mean_key
    low = jnp.asarray(x, jnp.bfloat16)
    for kind, factor in (("jvp", 1.3), ("gradient", 2.5), ("gradient of the jvp loss", 2.5)):
        exact = fast_compile(PASSES[kind](attention.xla))(*low.astype(jnp.float64))
        got, plain = (
            fast_compile(PASSES[kind](attention.KERNELS[name]))(*low) for name in ("chunked", "xla")
        )
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(got))
        for a, b in zip(error(got, exact), error(plain, exact), strict=True):
            assert a <= factor * b < 0.02, (kind, a, b)


def test_rows_stay_on_their_devices():
    """Chunks are cut along the keys: with rows over eight devices no pass of it sends anything."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:8])
    x = jax.ShapeDtypeStruct((8, 100, 2, 8), jnp.float32, sharding=sharding.rows(mesh))
    step = PASSES["gradient of the jvp loss"](functools.partial(attention.chunked, chunk=32))
    text = jax.jit(step, out_shardings=sharding.rows(mesh)).lower(*[x] * 6).compile().as_text()
    assert "while(" in text
    assert not any(
        word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    )


@pytest.mark.parametrize(
    ("tokens", "head_dim", "dtype"),
    [
        (256, 72, "float32"),  # SiT-XL: one block, a head_dim below a register's width
        (1024, 8, "bfloat16"),  # blocks of 512
        (70, 136, "float32"),  # tokens and head_dim filled up
    ],
)
def test_flash_attention_is_attention(tokens, head_dim, dtype):
    """Forward and backward, in the interpreter of TPU kernels.

    bfloat16 agrees up to its rounding, a few times 2^-9.
    """
    q, k, v, weights, *_ = jnp.asarray(draw(1, tokens, 1, head_dim), dtype)

    def both(attend):
        return fast_compile(
            lambda q, k, v: (attend(q, k, v), jax.vjp(attend, q, k, v)[1](weights))
        )(q, k, v)

    with pltpu.force_tpu_interpret_mode():
        got = both(attention.flash)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    assert max(error(got, both(attention.xla))) < (2e-6 if dtype == "float32" else 1e-2)


@pytest.mark.skipif(not on_nvidia(), reason="cuDNN attention runs on NVIDIA GPUs alone")
def test_cudnn_attention_is_attention():
    """Forward and backward in bfloat16, to its rounding."""
    q, k, v, weights, *_ = jnp.asarray(draw(2, 256, 4, 72), jnp.bfloat16)
    pairs = [
        (attend(q, k, v), jax.vjp(attend, q, k, v)[1](weights))
        for attend in (attention.cudnn, attention.xla)
    ]
    assert max(error(*pairs)) < 2e-2


def test_cudnn_attention_names_what_it_needs():
    x = jnp.zeros((1, 8, 1, 8))
    with pytest.raises(DmfError, match=r"given float32; it needs config\.compute_dtype = bfloat16"):
        attention.cudnn(x, x, x)
    if not on_nvidia():
        half = x.astype(jnp.bfloat16)
        with pytest.raises(
            DmfError,
            match=r"cannot run on q, k, v of shape \(1, 8, 1, 8\) here: cuDNN is not detected",
        ):
            attention.cudnn(half, half, half)


@pytest.mark.parametrize("name", attention.KERNELS)
def test_which_kernels_have_a_forward_mode(name):
    """A fused kernel fails only where the program is lowered, so the config refuses it before."""
    if name == "cudnn" and not on_nvidia():
        pytest.skip("cuDNN attention runs on NVIDIA GPUs alone")
    x = jnp.zeros((1, 128, 1, 8), jnp.bfloat16)
    with pltpu.force_tpu_interpret_mode():
        tangent = jax.jit(PASSES["jvp"](attention.KERNELS[name]))
        if name in attention.HAS_JVP:
            tangent.lower(*[x] * 6)
        else:
            with pytest.raises(TypeError, match="forward-mode"):
                tangent.lower(*[x] * 6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_flash_lowers_for_tpus_under_the_precision_of_any_stage(precision, dtype):
    # The kernel itself refuses "high", and in half precision whatever is not "default".
    def loss(q, k, v):
        with jax.default_matmul_precision(precision):
            return jax.grad(
                lambda q, k, v: attention.flash(q, k, v).astype(jnp.float32).sum(), (0, 1, 2)
            )(q, k, v)

    q = jax.ShapeDtypeStruct((2, 256, 4, 72), dtype)
    text = jax.jit(loss).trace(q, q, q).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3  # forwards, and backwards for q and for k and v
