"""Attention kernel, remat and scanned blocks leave the values of a network alone."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.errors import DmfError
from dmf.networks import ADMConfig, DiTConfig, Execution, MLPConfig, UNetConfig, build
from dmf.networks import attention as kernels
from tests.networks.small import fast_compile, leaf_paths, nested, shapes

DIT = DiTConfig(depth=3, width=16, heads=2, patch=2)
UNET = UNetConfig(
    channels=8, channel_mult=(1,), blocks=1, attention_resolutions=(4,), dropout=0.3, augment_dim=0
)
ADM = ADMConfig(
    channels=32,
    channel_mult=(1,),
    blocks=1,
    attention_resolutions=(),
    head_channels=32,
    dropout=0.3,
)
SMALL = {
    "dit": (DIT, (4, 6, 2)),
    "unet": (UNET, (4, 4, 2)),
    "adm": (ADM, (4, 4, 2)),
    "mlp": (MLPConfig(), (5,)),
}
IN_EVERY_BLOCK = 7  # matrix products: modulation, q k v, logits, mixture, proj, and the MLP's two
WITHOUT_A_SHARED_MATRIX = 2  # of them logits and mixture: cheap beside what they would take to keep
ROWS = 2


def meanflow(network, keys):
    """Gradient of the MeanFlow loss under dropout: (params, z, r, t, v) -> gradient, (u, du/dt)."""

    def loss(params, z, r, t, v):
        def u(z, r, t):
            return network.apply(params, z, r, t, train=True, rngs=keys)

        u, dudt = jax.jvp(u, (z, r, t), (v, jnp.zeros_like(r), jnp.ones_like(t)))
        span = (t - r).reshape(-1, *[1] * (z.ndim - 1))
        return jnp.sum((u - jax.lax.stop_gradient(v - span * dudt)) ** 2), (u, dudt)

    return jax.grad(loss, has_aux=True)


@functools.cache
def everything(kind, how):
    """The gradient, u and du/dt of a small network whose every weight is random, in float64."""
    config, shape = SMALL[kind]
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        network = build(config, shape, how=how)
        params = {
            path: rng.standard_normal(x) / np.sqrt(max(1, np.prod(x[:-1])))
            for path, x in shapes(network).items()
        }
        r, t = np.array([0.1, 0.4]), np.array([0.5, 0.9])
        step = meanflow(network, jax.random.split(jax.random.key(1), ROWS))
        z, v = rng.standard_normal((2, ROWS, *shape))
        return jax.tree.map(np.asarray, fast_compile(step)(nested(params), z, r, t, v))


def lowered(config, shape, how, rows=ROWS):
    """The program of the loss's gradient, not yet optimised: what remat repeats is still in it."""
    network = build(config, shape, how=how)
    params = jax.eval_shape(network.init, jax.random.key(0))
    z, t = (
        jax.ShapeDtypeStruct((rows, *shape), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )
    return jax.jit(meanflow(network, jax.random.split(jax.random.key(0), rows))).lower(
        params, z, t, t, z
    )


def count(program, word):
    return program.as_text().count(f"stablehlo.{word}")


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("dit", Execution(scan=True)),
        ("dit", Execution(remat="blocks")),
        ("dit", Execution(kernels.chunked, "dots", scan=True)),
        ("unet", Execution(remat="blocks")),
        ("adm", Execution(remat="dots")),
    ],
    ids=["dit scan", "dit blocks", "dit chunked dots scan", "unet blocks", "adm dots"],
)
def test_values_and_derivatives_are_those_of_the_plain_network(kind, how):
    """u, du/dt and the gradient of every parameter in float64, under the same dropout masks."""
    got, want = everything(kind, how), everything(kind, Execution())
    gradients, wanted = leaf_paths(got[0]), leaf_paths(want[0])
    assert gradients.keys() == wanted.keys() and all(np.any(wanted[path]) for path in wanted)
    for a, b in zip(
        [*got[1], *gradients.values()],
        [*want[1], *(wanted[path] for path in gradients)],
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("kind", ["dit", "unet", "adm"])
def test_parameters_do_not_depend_on_how_the_network_is_computed(kind):
    """The same tree of the same leaves, so checkpoints, converters and exports do not change."""
    config, shape = SMALL[kind]

    def given_one(*x):
        raise AssertionError("init has no use for an attention kernel that may be bound to a mesh")

    hows = Execution(), Execution(given_one, "blocks", scan=kind == "dit")
    plain, other = (
        jax.eval_shape(build(config, shape, how=how).init, jax.random.key(3)) for how in hows
    )
    assert leaf_paths(plain) == leaf_paths(other)


@pytest.mark.parametrize("kind", ["dit", "unet", "adm"])
def test_every_attention_of_a_network_uses_the_kernel_given(kind):
    config, shape = SMALL[kind]
    seen = []

    def attend(q, k, v):
        seen.append(q.shape)
        return kernels.xla(q, k, v)

    network = build(config, shape, how=Execution(attend))
    params = jax.eval_shape(network.init, jax.random.key(0))
    z, t = np.zeros((ROWS, *shape), np.float32), np.zeros(ROWS, np.float32)
    jax.eval_shape(network.apply, params, z, t, t)
    assert len(seen) == sum("qkv" in path and "kernel" in path for path in leaf_paths(params)) > 0
    assert {len(shape) for shape in seen} == {4} and {shape[0] for shape in seen} == {ROWS}


def test_a_scanned_program_does_not_grow_with_depth():
    """Twelve scanned blocks have as many products as three. Unrolled they have four times as many.

    The text of the program holds the stacking.
    """
    sizes = {}
    for depth in (3, 12):
        config = dataclasses.replace(DIT, depth=depth)
        for scan in (False, True):
            program = lowered(config, (4, 4, 1), Execution(scan=scan))
            sizes[depth, scan] = count(program, "dot_general"), len(program.as_text())
    assert sizes[12, True][0] == sizes[3, True][0]
    per_block = (sizes[12, False][0] - sizes[3, False][0]) / 9
    assert per_block > 3 * IN_EVERY_BLOCK  # forwards, and twice as many backwards
    assert sizes[12, True][0] < sizes[12, False][0] / 5
    assert sizes[12, True][1] < sizes[12, False][1] / 2


def test_remat_of_a_transformer_repeats_what_its_name_says():
    """Products in the program of the gradient.

    "blocks" repeats all products of a block, "dots" those without a shared matrix.
    """
    found = {
        remat: count(lowered(DIT, (4, 4, 1), Execution(remat=remat)), "dot_general")
        for remat in ("none", "dots", "blocks")
    }
    assert found["blocks"] == found["none"] + DIT.depth * IN_EVERY_BLOCK
    assert found["dots"] == found["none"] + DIT.depth * WITHOUT_A_SHARED_MATRIX


@pytest.mark.parametrize("kind", ["unet", "adm"])
def test_remat_of_a_unet_repeats_what_its_name_says(kind):
    """Convolutions in the program of the gradient.

    "dots" repeats none, "blocks" at least the first of every block.
    """
    config, shape = SMALL[kind]
    found = {
        remat: count(lowered(config, shape, Execution(remat=remat)), "convolution")
        for remat in ("none", "dots", "blocks")
    }
    assert found["dots"] == found["none"]
    params = jax.eval_shape(build(config, shape).init, jax.random.key(0))
    first = sum(
        path[-2:] in (("conv0", "kernel"), ("in_layers_2", "kernel")) for path in leaf_paths(params)
    )
    assert found["blocks"] >= found["none"] + first > found["none"] + 3


def test_remat_and_scan_together_save_memory():
    """Temporary memory of the compiled gradient, with nothing kept of a block and with all kept."""
    config = DiTConfig(depth=8, width=16, heads=2, patch=2)
    used = {}
    for remat in ("none", "blocks"):
        program = lowered(config, (16, 16, 1), Execution(remat=remat, scan=True))
        quick = program.compile({"xla_backend_optimization_level": 0})
        used[remat] = quick.memory_analysis().temp_size_in_bytes
    assert used["blocks"] < 0.3 * used["none"]


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        (
            "unet",
            Execution(scan=True),
            r"config\.scan_blocks is True with network\.kind 'unet'; expected False",
        ),
        ("adm", Execution(scan=True), r"config\.scan_blocks is True with network\.kind 'adm'"),
        ("mlp", Execution(scan=True), r"config\.scan_blocks is True with network\.kind 'mlp'"),
        (
            "mlp",
            Execution(remat="blocks"),
            r"config\.remat is 'blocks' with network\.kind 'mlp'; expected 'none'",
        ),
        (
            "dit",
            Execution(remat="all"),
            r"config\.remat is 'all'; expected one of 'none', 'blocks', 'dots'",
        ),
    ],
)
def test_what_a_network_cannot_do_is_named(kind, how, message):
    config, shape = SMALL[kind]
    with pytest.raises(DmfError, match=message):
        build(config, shape, how=how)
