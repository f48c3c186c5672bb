"""Softmax attention on q, k, v of shape (B, N, heads, head_dim), by four kernels of equal values.

    o = softmax(q k^T / sqrt(head_dim)) v

    xla       holds the N x N weights
    chunked   never holds them, in any direction of differentiation
    cudnn     fused and fast on NVIDIA; no forward mode
    flash     fused and fast on TPUs; no forward mode

The last two fail under jax.jvp, when the program is compiled. Rotary positions of queries and keys
stand here too: `rotated`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmf.errors import DmfError

Array = jax.Array
Kernel = Callable[[Array, Array, Array], Array]

CHUNK = 128  # keys at a time
TILE = 128  # lanes of a TPU register; flash fills tokens and head_dim up to it


def xla(q: Array, k: Array, v: Array) -> Array:
    """Softmax attention written out, logits and softmax in at least float32.

    `jax.nn.dot_product_attention` is the same computation in float32. For float64 inputs it rounds
    the softmax to float32, which would spoil the float64 oracles.
    """
    logits_dtype = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=logits_dtype)
    weights = jax.nn.softmax(logits / math.sqrt(q.shape[-1]), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


def chunked(q: Array, k: Array, v: Array, chunk: int = CHUNK) -> Array:
    """Softmax attention over at most `chunk` keys at a time, in memory linear in N.

    Nothing of N x N is stored: not forwards, by jax.jvp, by jax.grad or by a gradient through a
    jvp. Logits, softmax and all sums are in at least float32.
    """
    o, _ = _attend(q, k, v, chunk)
    return o.astype(v.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _attend(q: Array, k: Array, v: Array, chunk: int) -> tuple[Array, Array]:
    """(o, lse): output (B, N, heads, head_dim), log of the softmax's denominator (B, heads, N).

    Both are float32 or better. In the online softmax m is the largest logit so far. The sum of
    exp(logit - m) is l, and the sum of exp(logit - m) v is o.
    """

    def add(
        carry: tuple[Array, Array, Array], part: tuple[Array, Array, Array | None]
    ) -> tuple[Any, None]:
        o, m, l = carry
        k, v, real = part
        logits = _logits(q, k, real)
        m_next = jnp.maximum(m, logits.max(-1))
        weights, shrink = jnp.exp(logits - m_next[..., None]), jnp.exp(m - m_next)
        o = o * _per_query(shrink) + _mix(weights, v)
        return (o, m_next, l * shrink + weights.sum(-1)), None

    dtype = jnp.promote_types(q.dtype, jnp.float32)
    m = jnp.full((q.shape[0], q.shape[2], q.shape[1]), -jnp.inf, dtype)
    (o, m, l), _ = jax.lax.scan(
        add, (jnp.zeros(q.shape, dtype), m, jnp.zeros_like(m)), _parts(chunk, k, v)
    )
    return o / _per_query(l), m + jnp.log(l)


@_attend.defjvp
def _attend_jvp(
    chunk: int, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Any, Any]:
    """The tangents of o and of lse.

    P is the softmax, S the logits, s = 1 / sqrt(head_dim):

        dS = s (dq k^T + q dk^T)
        dlse = rowsum(P * dS)
        do = (P * dS) v + P dv - dlse o

    The values come from `_attend` itself. So this rule also serves a reverse pass through a
    program that was already differentiated forwards. Chunks are computed again backwards.
    """
    (q, k, v), (dq, dk, dv) = primals, tangents
    o, lse = _attend(q, k, v, chunk)
    # A change that all logits of a query share leaves o alone. The mean key causes such a change.
    # We take it out of dS and add it to dlse, or it drowns the rest of P * dS in half precision.
    shared = _logits(dq, _mean(k)) + _logits(q, _mean(dk))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def terms(
        q: Array, dq: Array, lse: Array, shared: Array, part: tuple[Any, ...]
    ) -> tuple[Array, Array]:
        k, v, real, dk, dv, _ = part
        weights = jnp.exp(_logits(q, k, real) - lse[..., None])
        moved = weights * (_logits(dq, k) + _logits(q, dk) - shared)
        return _mix(moved, v) + _mix(weights, dv), moved.sum(-1)

    def add(carry: tuple[Array, Array], part: tuple[Any, ...]) -> tuple[tuple[Array, Array], None]:
        return jax.tree.map(jnp.add, carry, terms(q, dq, lse, shared, part)), None

    zeros = jnp.zeros_like(o), jnp.zeros_like(lse)
    (do, dlse), _ = jax.lax.scan(add, zeros, (*_parts(chunk, k, v), *_parts(chunk, dk, dv)))
    return (o, lse), (do - _per_query(dlse) * o, dlse + shared[..., 0])


def _parts(chunk: int, k: Array, v: Array) -> tuple[Array, Array, Array | None]:
    """Keys and values as (parts, B, keys, heads, head_dim), and which keys are real.

    The last is (parts, keys), None if all keys are real.
    """
    tokens = k.shape[1]
    count = -(-tokens // chunk)
    size = -(-tokens // count)  # equal parts: 130 keys are two of 65, not 128 and 2 of 128
    fill = count * size - tokens

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0)))
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    return (
        cut(k),
        cut(v),
        (jnp.arange(count * size) < tokens).reshape(count, size) if fill else None,
    )


def _logits(q: Array, k: Array, real: Array | None = None) -> Array:
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=dtype) / math.sqrt(
        q.shape[-1]
    )
    return logits if real is None else jnp.where(real, logits, -jnp.inf)


def _mean(k: Array) -> Array:
    """The mean key, as one key, of at least float32."""
    return k.mean(1, keepdims=True, dtype=jnp.promote_types(k.dtype, jnp.float32))


def _mix(weights: Array, v: Array) -> Array:
    return jnp.einsum(
        "bhqk,bkhd->bqhd", weights.astype(v.dtype), v, preferred_element_type=weights.dtype
    )


def _per_query(x: Array) -> Array:
    """(B, heads, N) as a factor of (B, N, heads, head_dim)."""
    return jnp.moveaxis(x, 1, 2)[..., None]


def cudnn(q: Array, k: Array, v: Array) -> Array:
    """Softmax attention by NVIDIA's fused kernel, without a forward mode.

    It needs half precision and a head_dim that is a multiple of 8.
    Raises DmfError for float32, and where cuDNN is missing or refuses the shapes.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise DmfError(
            f"attention 'cudnn' was given {q.dtype.name}; it needs config.compute_dtype = bfloat16."
        )
    try:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    except (NotImplementedError, RuntimeError) as error:
        raise DmfError(
            f"attention 'cudnn' cannot run on q, k, v of shape {q.shape} here: {error}"
        ) from error


def flash(q: Array, k: Array, v: Array) -> Array:
    """Softmax attention by JAX's Pallas kernel for TPUs, without a forward mode.

    Takes any N, head_dim and dtype up to float32, in memory linear in N in both directions.
    Tokens are filled up to a multiple of 128 and masked. A head_dim above 128 is filled up with
    zeros to a multiple of it. The kernel runs on one device; over several, each calls it on its
    own rows.
    """
    tokens, head_dim = q.shape[1], q.shape[3]
    size = -(-tokens // TILE) * TILE
    fill = (0, 0), (0, 0), (0, size - tokens), (0, -head_dim % TILE if head_dim > TILE else 0)
    q, k, v = (jnp.pad(jnp.swapaxes(x, 1, 2), fill) for x in (q, k, v))
    # The 256 tokens of a 32x32 latent are one block. Blocks above 512 exceed the fast memory.
    block = next(tiles * TILE for tiles in (4, 3, 2, 1) if size % (tiles * TILE) == 0)
    o = _flash(q, k, v, tokens, block, 1 / math.sqrt(head_dim))
    return jnp.swapaxes(o[:, :, :tokens, :head_dim], 1, 2)


def _kernel(q: Array, k: Array, v: Array, tokens: int, block: int, scale: float) -> Array:
    """The kernel on (B, heads, size, head_dim), of which `tokens` are real.

    In both directions it takes one precision per dtype: "highest" for float32, "default" for half
    precision. So we set it here, or the precision of the stage would reach the kernel.
    """
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu

    blocks = tpu.BlockSizes(
        **{field.name: block for field in dataclasses.fields(tpu.BlockSizes)} | {"block_b": 1}
    )
    segments = None
    if q.shape[2] > tokens:
        # A query sees the keys of its own segment: real ones, or filling.
        real = jnp.arange(q.shape[2]) < tokens
        real = jnp.broadcast_to(real, (q.shape[0], q.shape[2])).astype(jnp.int32)
        segments = tpu.SegmentIds(real, real)
    with jax.default_matmul_precision(_precision(q)):
        return tpu.flash_attention(
            q, k, v, segment_ids=segments, sm_scale=scale, block_sizes=blocks
        )


_flash = jax.custom_vjp(_kernel, nondiff_argnums=(3, 4, 5))


def _flash_forward(q: Array, k: Array, v: Array, *about: Any) -> tuple[Array, Any]:
    return jax.vjp(lambda q, k, v: _kernel(q, k, v, *about), q, k, v)


def _flash_backward(
    tokens: int, block: int, scale: float, back: Any, do: Array
) -> tuple[Array, ...]:
    with jax.default_matmul_precision(_precision(do)):
        return back(do)


_flash.defvjp(_flash_forward, _flash_backward)


def _precision(x: Array) -> str:
    return "default" if x.dtype in (jnp.bfloat16, jnp.float16) else "highest"


def rotated(x: Array, angle: np.ndarray) -> Array:
    """Rotary positions: channels 2 k and 2 k + 1 of token n turn by angle[n, k].

    x: (B, N, heads, dim), queries or keys. angle: (N, dim / 2). It computes in float32 at least.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    cos, sin = (jnp.asarray(f(angle), wide.dtype)[:, None] for f in (np.cos, np.sin))
    even, odd = wide[..., ::2], wide[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def line_angles(tokens: int, dim: int) -> np.ndarray:
    """Angles (tokens, dim / 2) of tokens in a line, for `rotated`: n 1e4^(-2 k / dim)."""
    return np.arange(tokens)[:, None] * 1e4 ** (-np.arange(dim // 2) / (dim // 2))


def grid_angles(rows: int, columns: int, dim: int) -> np.ndarray:
    """Angles (rows * columns, dim / 2) of tokens in a grid: those of its row, then its column."""
    row, column = np.indices((rows, columns)).reshape(2, -1)
    halves = line_angles(rows, dim // 2)[row], line_angles(columns, dim // 2)[column]
    return np.concatenate(halves, axis=1)


KERNELS: dict[str, Kernel] = {"xla": xla, "chunked": chunked, "cudnn": cudnn, "flash": flash}
HAS_JVP = ("xla", "chunked")
PLATFORMS = {"cudnn": "gpu", "flash": "tpu"}  # kernels that run on one sort of device only
