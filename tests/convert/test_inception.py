"""The FID's Inception network: equal to pytorch-fid's, key map, refused files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.convert import audit
from dmf.convert.inception import FID_INCEPTION
from dmf.convert.rules import relative_l2
from dmf.errors import DmfError
from dmf.networks.frozen.inception import Features, InceptionConfig, build_inception
from tests.conftest import GOLDEN
from tests.conversion import (
    check_names,
    convert_arrays,
    export_arrays,
    hollow,
    needs_torch,
    recipe_weights,
    tensors_of,
)

# Relative L2 to pytorch-fid 0.3.0 in float64.
# In float32 pytorch-fid itself is 2.3e-7 (pool) to 4.2e-7 away.
OUTPUTS = {"pool": 1e-6, "spatial": 2e-6, "logits": 2e-6, "biased_logits": 2e-6}


@functools.cache
def reference():
    """(weights under torch names, x as NCHW, stored outputs); read only."""
    data = np.load(GOLDEN / "fid_inception_io.npz")
    draw = np.random.RandomState(int(data["recipe/seed"]))
    coarse, fine = draw.uniform(-1, 1, (2, 3, 13, 13)), draw.uniform(-1, 1, (2, 3, 299, 299))
    x = (0.7 * np.kron(coarse, np.ones((23, 23))) + 0.3 * fine).astype(np.float32)
    return recipe_weights(data), x, {name: data[name] for name in OUTPUTS}


@functools.cache
def converted():
    return convert_arrays(FID_INCEPTION, reference()[0])


@functools.cache
def shapes():
    """{name: shape} of the published file: 94 convolutions with their norms, and the classifier."""
    names = {name: value.shape for name, value in reference()[0].items()}
    counters = [
        name.replace("running_var", "num_batches_tracked")
        for name in names
        if name.endswith("running_var")
    ]
    assert len(counters) == 94
    return names | dict.fromkeys(counters, ())


def test_the_network_equals_pytorch_fid():
    """Pool, spatial and logits from the same weights; two images show a batch mixed up."""
    _, x, want = reference()
    _, shape, network, params = converted()
    assert shape == (299, 299, 3)
    got = FID_INCEPTION.outputs(network, params, {"x": x})
    assert set(got) == set(OUTPUTS)
    for name, bound in OUTPUTS.items():
        assert relative_l2(got[name], want[name]) <= bound, name
        assert relative_l2(got[name][::-1], want[name]) > 0.01, name
    assert got["spatial"].shape == (2, 17 * 17 * 7) and got["spatial"].min() == 0
    bias = reference()[0]["fc.bias"]
    np.testing.assert_allclose(
        got["biased_logits"] - got["logits"], np.stack([bias, bias]), atol=1e-5
    )


@needs_torch
def test_the_check_against_pytorch_equals_pytorch_fid():
    import torch

    weights, x, want = reference()
    # The order of a safetensors file.
    shuffled = {name: torch.from_numpy(weights[name]) for name in sorted(weights)}
    got = FID_INCEPTION.torch_outputs(shuffled, {"x": x})
    for name, bound in OUTPUTS.items():
        assert relative_l2(got[name], want[name]) <= bound, name


@needs_torch
def test_the_check_takes_files_of_half_precision():
    import torch

    weights, x, want = reference()
    half = {name: torch.from_numpy(weights[name]).half() for name in weights}
    got = FID_INCEPTION.torch_outputs(half, {"x": x[:1]})
    assert (
        got["pool"].dtype == np.float32 and 1e-5 < relative_l2(got["pool"], want["pool"][:1]) < 2e-3
    )


def test_every_tensor_and_every_leaf_is_used_once():
    """With counters of batches and without, for both files exist; 23,885,392 values."""
    full = shapes()
    config, _ = check_names(FID_INCEPTION, full)
    assert config == InceptionConfig()
    check_names(
        FID_INCEPTION, {name: shape for name, shape in full.items() if "num_batches" not in name}
    )
    leaves = audit.leaf_shapes(build_inception(config))
    assert (
        len(leaves) == 94 * 5 + 2
        and sum(int(np.prod(shape)) for shape in leaves.values()) == 23_885_392
    )


def test_a_round_trip_is_bit_equal():
    weights = reference()[0]
    config, shape, network, params = converted()
    back = export_arrays(FID_INCEPTION, config, shape, network, params)
    assert {name: x.shape for name, x in back.items() if name in weights} == {
        name: x.shape for name, x in weights.items()
    }
    assert all(np.array_equal(back[name], x) for name, x in weights.items())
    rest = set(back) - set(weights)
    assert len(rest) == 94 and all(
        name.endswith("num_batches_tracked") and back[name] == 0 for name in rest
    )


def test_a_file_without_counters_has_a_report_without_them():
    weights = reference()[0]
    tensors = tensors_of(weights)
    rules, network = (
        FID_INCEPTION.rules(InceptionConfig(), (299, 299, 3), tensors),
        build_inception(InceptionConfig()),
    )
    _, rows = audit.convert(rules, tensors, network, "fid_inception", lambda done, total: None)
    assert not any(name.endswith("num_batches_tracked") for row in rows for name in row["tensors"])
    assert sum(len(row["tensors"]) for row in rows) == len(weights) and audit.exceptions(rows) == []
    assert audit.table(rows).splitlines()[-1].split()[:3] == [
        "all",
        str(len(weights)),
        str(len(weights)),
    ]


def test_counters_of_batches_are_ignored():
    rules = [
        rule
        for rule in FID_INCEPTION.rules(InceptionConfig(), (299, 299, 3), None)
        if not rule.leaves
    ]
    assert len(rules) == 94
    for rule in rules:
        assert rule.missing and len(rule.forward(np.int64(12_345))) == 0


def test_features_are_float32_of_the_published_sizes():
    network = build_inception(InceptionConfig())
    params = jax.eval_shape(network.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    features = jax.eval_shape(
        network.apply, params, jax.ShapeDtypeStruct((3, 299, 299, 3), np.float32)
    )
    assert tuple(f.shape for f in features) == Features((3, 2048), (3, 2023), (3, 1008), (3, 1008))
    assert {f.dtype for f in features} == {np.dtype(np.float32)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float64])
def test_every_product_is_in_full_float32(dtype, float64):
    """94 convolutions and the classifier, for any default precision and dtype of the image."""
    network = build_inception(InceptionConfig())
    params = jax.eval_shape(network.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, 299, 299, 3), dtype)
    with jax.default_matmul_precision("bfloat16"):
        program = jax.jit(network.apply).lower(params, x).as_text()
    products = [
        line
        for line in program.splitlines()
        if "stablehlo.convolution" in line or "stablehlo.dot_general" in line
    ]
    assert len(products) == 95
    for line in products:
        assert line.count("HIGHEST") == 2 and "bf16" not in line and "f64" not in line


def without(name):
    return {key: shape for key, shape in shapes().items() if key != name}


NOT_FID = (
    "torchvision's ImageNet classifier.*expected the port of the TensorFlow graph, pt_inception"
)
WRONG = {
    "of another kind": (
        lambda: {"pos_embed": (1, 256, 1152)},
        r"no tensor Conv2d_1a_3x3\.conv\.weight among 1",
    ),
    "with a part cut off": (lambda: without("fc.weight"), r"no tensor fc\.weight"),
    "torchvision's": (
        lambda: shapes() | {"AuxLogits.fc.weight": (1000, 768), "fc.weight": (1000, 2048)},
        NOT_FID,
    ),
    "torchvision's, aux head dropped": (lambda: shapes() | {"fc.weight": (1000, 2048)}, NOT_FID),
    "with an aux head": (lambda: shapes() | {"AuxLogits.conv0.bn.bias": (128,)}, NOT_FID),
    "of 10 classes": (
        lambda: shapes() | {"fc.weight": (10, 2048)},
        r"fc\.weight has shape \[10, 2048\]: expected \[1008, ",
    ),
    "with a hole": (
        lambda: without("Mixed_7a.branch3x3_2.bn.bias"),
        r"Mixed_7a\.branch3x3_2\.bn\.bias is missing",
    ),
    "with kernels transposed": (
        lambda: shapes() | {"Mixed_6b.branch7x7_2.conv.weight": (128, 128, 7, 1)},
        r"Mixed_6b\.branch7x7_2\.conv\.weight has shape \[128, 128, 7, 1\]: "
        r"expected \[128, 128, 1, 7\]",
    ),
}


@pytest.mark.parametrize("which", WRONG)
def test_a_file_is_refused(which):
    found, message = WRONG[which]
    with pytest.raises(DmfError, match=message):
        check_names(FID_INCEPTION, found())


def test_nothing_can_be_given():
    with pytest.raises(DmfError, match="--set=heads=4: expected no field for kind fid_inception"):
        FID_INCEPTION.describe(hollow(shapes()), {"heads": 4})
    with pytest.raises(DmfError, match="--copy=ema is not in this file: expected weights"):
        FID_INCEPTION.select({}, "ema")


def test_images_of_another_size_are_refused():
    network = build_inception(InceptionConfig())
    for shape in ((1, 32, 32, 3), (1, 3, 299, 299), (299, 299, 3)):
        with pytest.raises(DmfError, match="expected \\(B, 299, 299, 3\\)"):
            network.apply({}, np.zeros(shape, np.float32))
