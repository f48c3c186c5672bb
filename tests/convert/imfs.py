"""Small random weights of improved MeanFlow in the names of its code."""

import re

import jax
import numpy as np

from dmf import networks
from dmf.convert import leaves
from dmf.convert.imeanflow import IMEANFLOW
from dmf.networks import InContextConfig

CONFIG = InContextConfig(depth=3, width=16, heads=2, num_classes=5, velocity_head=2)
SHAPE = (8, 8, 4)


def value(name, shape, rng):
    """Values of a tensor by its name; no layer and no gate is zero."""
    draw = rng.standard_normal(shape).astype(np.float32)
    if name.endswith(("norm.kernel", "norm1.kernel", "norm2.kernel")):
        return (1 + 0.3 * draw).astype(np.float32)
    if re.search(r"_scale$|_tokens$|embedding$", name):
        return (0.5 * draw).astype(np.float32)
    return (0.2 * draw if len(shape) == 1 else draw / np.prod(shape[:-1]) ** 0.5).astype(np.float32)


def tensors(config=CONFIG, shape=SHAPE):
    """{name of the public code: values}, drawn in the order of the names."""
    network = networks.build(config, shape)
    zeros = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32), jax.eval_shape(network.init, jax.random.key(0))
    )
    flat, sizes = leaves.flat(zeros), {}
    for rule in IMEANFLOW.rules(config, shape, None):
        sizes |= zip(rule.tensors, rule.backward(*(flat[x] for x in rule.leaves)), strict=True)
    rng = np.random.default_rng(7)
    return {name: value(name, sizes[name].shape, rng) for name in sorted(sizes)}


def params(named, config=CONFIG, shape=SHAPE):
    """Our parameters of tensors in the public code's names."""
    found = {}
    for rule in IMEANFLOW.rules(config, shape, named):
        got = rule.forward(*(named[x] for x in rule.tensors))
        found |= zip(rule.leaves, got, strict=True)
    return leaves.nested(found)


def named(tree, config=CONFIG, shape=SHAPE):
    """The public code's names of a tree as our parameters; inverts `params`."""
    flat, found = leaves.flat(tree), {}
    for rule in IMEANFLOW.rules(config, shape, None):
        found |= zip(rule.tensors, rule.backward(*(flat[x] for x in rule.leaves)), strict=True)
    return found


def draws(rows=8):
    """The inputs of a step: x, e, r, t, label and guidance; the first half has r = t."""
    rng = np.random.default_rng(11)
    x, e = rng.standard_normal((2, rows, *SHAPE)).astype(np.float32)
    t, r = np.sort(rng.uniform(0.05, 1, (2, rows)), axis=0)[::-1].astype(np.float32)
    same = np.arange(rows) < rows // 2
    ends = rng.uniform(0, 0.5, rows), rng.uniform(0.5, 1, rows)
    told = np.stack([np.exp(rng.uniform(0, np.log(8), rows)), *ends], axis=1).astype(np.float32)
    told[same, 1:] = (0, 1)
    label = rng.integers(0, 5, rows).astype(np.int32)
    return dict(x=x, e=e, r=np.where(same, t, r), t=t, label=label, told=told)
