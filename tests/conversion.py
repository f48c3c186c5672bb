"""What the tests of converters share: weights from a recipe, converted as by the command."""

import functools
import importlib.util
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import pretrained
from dmf.convert import audit
from dmf.storage.readers.read import Several
from dmf.storage.readers.tree import Tensor

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="torch is not installed: nothing to compare with (pip install torch)",
)


def recipe_weights(data):
    """Weights of a reference network, under torch names and in torch layouts.

    They are drawn again from the arrays recipe/*, or taken from fixed/*.
    """
    weights = {}
    for name, shape, scale, offset, sums in zip(
        *(data[f"recipe/{field}"] for field in ("keys", "shapes", "scale", "offset", "sums")),
        strict=True,
    ):
        if np.isnan(scale):
            weights[str(name)] = data[f"fixed/{name}"]
            continue
        dims = [int(d) for d in str(shape).split(",")]
        draw = np.random.RandomState(
            (zlib.crc32(str(name).encode()) ^ int(data["recipe/seed"])) & 0xFFFFFFFF
        )
        value = (offset + scale * draw.standard_normal(dims)).astype(np.float32)
        assert np.allclose(value.sum(dtype=np.float64), sums[0], atol=1e-3)
        weights[str(name)] = value
    return weights


def tensors_of(arrays):
    """Arrays as the lazy tensors of a file."""
    return {
        name: Tensor(x.shape, x.dtype, functools.partial(np.ascontiguousarray, x))
        for name, x in arrays.items()
    }


def key_list(path):
    """The lines 'name (shape)' of a key list as {name: shape}."""
    lines = [line for line in path.read_text().splitlines() if "(" in line]
    return {
        line.split(" (")[0]: tuple(
            int(n) for n in line.split(" (")[1].rstrip(")").split(",") if n.strip()
        )
        for line in lines
    }


def hollow(shapes):
    """Tensors of full size that hold one zero each, for checks of names and shapes."""
    return {
        name: Tensor(
            shape, np.dtype(np.float32), functools.partial(np.broadcast_to, np.float32(0), shape)
        )
        for name, shape in shapes.items()
    }


def convert_arrays(kind, arrays, given=None, which=""):
    """(config, image shape, network, params) of a kind from a tree of arrays, audited."""
    lazy = functools.partial(jax.tree.map, lambda x: tensors_of({"": x})[""])
    several = isinstance(arrays, Several)
    tree = Several({name: lazy(x) for name, x in arrays.items()}) if several else lazy(arrays)
    tensors, _ = kind.select(tree, which)
    config, shape = kind.describe(tensors, given or {})
    network = pretrained.build(config, shape)
    params, _ = audit.convert(
        kind.rules(config, shape, tensors), tensors, network, kind.name, lambda done, total: None
    )
    return config, shape, network, params


def export_arrays(kind, config, shape, network, params):
    """Tensors by name of a network's parameters, through the key map run backwards."""
    leaves = {name: np.asarray(x) for name, x in audit.flat(params).items()}
    return audit.write(kind.rules(config, shape, None), leaves)


def check_names(kind, shapes, given=None):
    """Compares a full-size key map with names and shapes; returns (config, image shape)."""
    tensors, _ = kind.select(hollow(shapes), "")
    config, shape = kind.describe(tensors, given or {})
    network = pretrained.build(config, shape)
    audit.check(kind.rules(config, shape, tensors), tensors, audit.leaf_shapes(network), kind.name)
    return config, shape


def small_noise(params, scale=0.1, seed=0):
    """Parameters with noise on every leaf, which makes every branch count."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree,
        [jnp.asarray(x + scale * rng.standard_normal(x.shape).astype(np.float32)) for x in leaves],
    )
