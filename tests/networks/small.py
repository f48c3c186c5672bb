"""Small networks, their parameters and inputs, and the references that they are held against."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dmf.networks import (
    ADMConfig,
    Condition,
    DiTConfig,
    MLPConfig,
    UNetConfig,
    build,
    is_interval_path,
)
from tests import GOLDEN
from tests.conversion import recipe_weights

PARITY = 5e-6  # relative L2: float32 round-off between two implementations of the same network

UNET_REFERENCE = UNetConfig(
    channels=32,
    channel_mult=(1, 2),
    blocks=2,
    attention_resolutions=(8,),
    dropout=0.0,
    interval_init="random",
)
DIT_REFERENCE = DiTConfig(depth=3, width=96, heads=4, patch=2, num_classes=10)

# The same kinds at a size that compiles fast; (config, image shape, label of a row).
UNET = UNetConfig(
    channels=8,
    channel_mult=(1, 2),
    blocks=1,
    attention_resolutions=(4,),
    dropout=0.3,
    augment_dim=2,
)
DIT = DiTConfig(depth=2, width=16, heads=2, patch=2, num_classes=3)
MLP = MLPConfig(width=16, depth=2)
ADM = ADMConfig(
    channels=64,
    channel_mult=(1, 1),
    blocks=1,
    attention_resolutions=(),
    head_channels=32,
    dropout=0.3,
)
SMALL = {
    "unet": (UNET, (8, 8, 2), np.array([0.3, -1.0], np.float32)),
    "dit": (DIT, (4, 6, 2), np.int32(1)),
    "mlp": (MLP, (5,), None),
    "adm": (ADM, (8, 8, 2), None),
}
BATCH = 3


def fast_compile(function):
    """Jit without LLVM's optimisations: these networks compile for longer than they run."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def relative_l2(got, want):
    got, want = np.asarray(got), np.asarray(want)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def leaf_paths(tree):
    """Flat {path: leaf} of a nested dict."""
    return {
        tuple(getattr(k, "key", 0) for k in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def shapes(network):
    return {
        path: leaf.shape
        for path, leaf in leaf_paths(jax.eval_shape(network.init, jax.random.key(0))).items()
    }


def count(network):
    return sum(math.prod(shape) for shape in shapes(network).values())


def random_params(kind, seed=0):
    """Dense random values for every leaf of a small network, so that no branch is dead."""
    rng = np.random.default_rng(seed)
    draw = {path: rng.standard_normal(shape) for path, shape in shapes(small_network(kind)).items()}
    return nested(
        {
            p: (x / math.sqrt(max(1, math.prod(x.shape[:-1])))).astype(np.float32)
            for p, x in draw.items()
        }
    )


def small_network(kind):
    config, shape, _ = SMALL[kind]
    return build(config, shape)


@functools.cache
def u_and_gradient(kind):
    """Compiled (params, z, r, t, label) -> u and the gradient of sum(u^2) in params."""
    network = small_network(kind)

    def loss(params, z, r, t, label):
        ignored = jax.random.split(jax.random.key(0), BATCH)
        u = network.apply(params, z, r, t, condition=condition(label), rngs=ignored)
        return jnp.sum(u**2), u

    @fast_compile
    def evaluate(params, z, r, t, label):
        (_, u), gradient = jax.value_and_grad(loss, has_aux=True)(params, z, r, t, label)
        return u, gradient

    return evaluate


def condition(label):
    """The network's condition of `small`: classes, an augmentation label, or nothing."""
    floats = label is not None and jnp.issubdtype(label.dtype, jnp.floating)
    return Condition(augment=label) if floats else Condition(label=label)


def initial_leaves(network, wanted):
    """{path: value} of the freshly initialised leaves that are `wanted`. No other is computed."""

    @fast_compile
    def leaves(key):
        return {
            "/".join(path): leaf
            for path, leaf in leaf_paths(network.init(key)).items()
            if wanted(path)
        }

    return {tuple(path.split("/")): np.asarray(x) for path, x in leaves(jax.random.key(0)).items()}


def small(kind, seed=0, batch=BATCH):
    """z, r < t, label, and a tangent of z for SMALL[kind]."""
    _, shape, row = SMALL[kind]
    rng = np.random.default_rng(seed)
    z, v = rng.standard_normal((2, batch, *shape)).astype(np.float32)
    r, t = np.sort(rng.uniform(size=(2, batch)).astype(np.float32), axis=0)
    label = None if row is None else np.stack([row] * batch)
    return z, r, t, label, v


def jax_layout(name, value):
    """A torch parameter as (Flax path, array), by the rule of all layers of both networks."""
    *modules, leaf = name.split(".")
    if leaf == "weight":
        leaf = {1: "scale", 2: "kernel", 4: "kernel"}[value.ndim]
        value = {1: lambda w: w, 2: lambda w: w.T, 4: lambda w: w.transpose(2, 3, 1, 0)}[
            value.ndim
        ](value)
    return (*modules, leaf), value


def unet_reference():
    """The reference U-Net with its own weights: (network, params, data)."""
    data = np.load(GOLDEN / "pymf_tiny_io.npz")
    flat = {}
    for name, value in recipe_weights(data).items():
        if name == "map_layer0.weight":  # acts on [features(t) | features(h)]
            of_t, of_h = np.split(value.T, 2)
            flat[("map_layer0", "kernel")], flat[("interval", "kernel")] = of_t, of_h
        elif not name.endswith("resample_filter"):
            path, flat_value = jax_layout(name, value)
            flat[path] = flat_value
    network = build(UNET_REFERENCE, (16, 16, 3))
    assert {path: value.shape for path, value in flat.items()} == shapes(network)
    return (
        network,
        nested(flat),
        {k: data[k] for k in ("z", "t", "r", "v", "aug_cond", "u_noaug", "u_aug", "dudt_aug")},
    )


def dit_reference(dtype):
    """SiT with reversed time and sign folded into its weights: (network, params, data)."""
    data = np.load(GOLDEN / "sit_tiny_io.npz")
    weights = {k: v.astype(np.float64) for k, v in recipe_weights(data).items() if k != "pos_embed"}
    # cos(f (1 - t)) and sin(f (1 - t)) are a rotation of cos(f t) and sin(f t). The first layer
    # absorbs it.
    f = np.exp(-math.log(1e4) * np.arange(128) / 128)
    cosine, sine = np.split(weights["t_embedder.mlp.0.weight"], 2, axis=1)
    folded = cosine * np.cos(f) + sine * np.sin(f), cosine * np.sin(f) - sine * np.cos(f)
    weights["t_embedder.mlp.0.weight"] = np.concatenate(folded, axis=1)
    # 2 x 2 patches of 8 channels, of which the first 4 are the velocity, data - noise.
    weights["final_layer.linear.weight"] = (
        -weights["final_layer.linear.weight"].reshape(4, 8, 96)[:, :4].reshape(16, 96)
    )
    weights["final_layer.linear.bias"] = (
        -weights["final_layer.linear.bias"].reshape(4, 8)[:, :4].reshape(16)
    )
    flat = {}
    for name, value in weights.items():
        name = name.replace("mlp.0.", "mlp_0.").replace("mlp.2.", "mlp_2.")
        name = name.replace("adaLN_modulation.1", "adaLN_modulation_1").replace(
            "blocks.", "blocks_"
        )
        path, flat_value = jax_layout(name, value)
        if "embedding_table" in path:  # the one matrix that is no linear layer: row = class in both
            path, flat_value = (*path[:-1], "embedding"), value
        flat[path] = flat_value
    network = build(DIT_REFERENCE, (16, 16, 4))
    flat |= initial_leaves(network, is_interval_path)
    assert {path: value.shape for path, value in flat.items()} == shapes(network)
    return network, nested({path: value.astype(dtype) for path, value in flat.items()}), data


def nhwc(x):
    return x.transpose(0, 2, 3, 1)
