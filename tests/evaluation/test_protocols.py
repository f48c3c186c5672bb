"""Protocols are data: rows are sound, rounding is the library's, a wrong file gives one line."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from dmf.errors import DmfError
from dmf.evaluation import features, protocols
from dmf.evaluation.protocols import PROTOCOLS, ROUNDINGS, describe, load, to_bytes
from dmf.metrics.resize import RESIZES, resize
from tests.conversion import needs_torch
from tests.metrics.test_resize import picture, stored_pixels


def grid():
    """Samples all over [-1.1, 1.1], and at every byte and every edge between bytes.

    Each comes with the float just below and the float just above.
    """
    edges = np.concatenate([2 * np.arange(257) / 255 - 1, np.arange(256) / 127.5 - 1])
    x = np.concatenate([np.linspace(-1.1, 1.1, 200001), edges]).astype(np.float32)
    return np.concatenate([np.nextafter(x, np.float32(-9)), x, np.nextafter(x, np.float32(9))])


def rounded(x, rule):
    return to_bytes(x.reshape(-1, 1, 1, 1), rule).reshape(-1)


def with_torch(torch, x):
    """The bytes that the public programs make, by their own operations in their own order."""
    x = torch.from_numpy(x)
    unit = torch.floor(torch.clamp(x * 0.5 + 0.5, min=0.0, max=1.0) * 255).to(torch.float32) / 255.0
    return {
        "py-meanflow, then torchmetrics": ("floor_255", (unit * 255).byte().numpy()),
        "ADM": ("floor_255", ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).numpy()),
        "EDM, MeanFlow": ("round_127.5", (x * 127.5 + 128).clip(0, 255).to(torch.uint8).numpy()),
    }


@needs_torch
def test_rounding_is_that_of_the_public_codes_byte_for_byte():
    import torch

    for name, (rule, wanted) in with_torch(torch, grid()).items():
        assert np.array_equal(rounded(grid(), rule), wanted), name
        assert hashlib.sha256(wanted.tobytes()).hexdigest() == OF_TORCH[rule]


OF_TORCH = {  # SHA-256 of the bytes above by torch 2.13
    "floor_255": "23942e21fc43419d6eb3dd68b23aca5e801d3118e45627f876b58d3f37951692",
    "round_127.5": "86c0ecc3c327879a8ec6f1c9ffb0c1eae469c5b2096d00e826e2cd84b89d67f1",
}


@pytest.mark.parametrize("rule", ROUNDINGS)
def test_rounding_gives_the_bytes_that_torch_gave(rule):
    assert hashlib.sha256(rounded(grid(), rule).tobytes()).hexdigest() == OF_TORCH[rule]


def test_no_byte_is_lost_between_py_meanflow_and_torchmetrics():
    k = np.arange(256, dtype=np.float32)
    for unit in (
        k / np.float32(255),
        k * np.float32(1 / 255),
    ):  # a GPU multiplies by the reciprocal
        assert np.array_equal((unit * np.float32(255)).astype(np.uint8), np.arange(256))


def test_only_rounding_to_the_nearest_gives_bytes_of_data_back():
    byte = np.arange(256)
    x = byte.astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(rounded(x, "round_127.5"), byte)
    lower = byte - rounded(x, "floor_255").astype(int)
    assert set(lower) == {0, 1} and lower.sum() == 63


def test_rounding_cuts_off_what_lies_outside():
    for rule in ROUNDINGS:
        assert list(rounded(np.array([-3, -1, 1, 3e38], np.float32), rule)) == [0, 0, 255, 255]


def test_rounding_refuses_what_is_no_sample():
    x = np.zeros((5, 4, 4, 3), np.float32)
    x[1, 2, 3, 0], x[4, 0, 0, :] = np.nan, np.inf
    with pytest.raises(DmfError, match="^2 of 5 generated images have NaN or infinite values"):
        to_bytes(x, "floor_255")
    with pytest.raises(
        DmfError, match=r"float32 of shape \(4, 4, 3\): expected floats \(N, H, W, C\)"
    ):
        to_bytes(x[0], "floor_255")
    with pytest.raises(DmfError, match="uint8 of shape"):
        to_bytes(np.zeros(x.shape, np.uint8), "floor_255")
    with pytest.raises(
        DmfError, match="rounding = 'round': expected one of floor_255, round_127.5"
    ):
        to_bytes(x, "round")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_row_is_sound_and_pure_data(name):
    protocol = PROTOCOLS[name]
    assert load(name) is protocol and protocol.name == name and protocol.resize in RESIZES
    protocols._check(protocol, name)
    plain = dataclasses.asdict(protocol)
    assert json.loads(json.dumps(plain)) == {**plain, "metrics": list(protocol.metrics)}
    line = describe(protocol)
    assert "\n" not in line
    for fact in (name, "resize", "scaling", "rounding", "labels"):
        assert str(getattr(protocol, fact, name)) in line
    assert "50,000 samples against" in line and protocol.reference in line
    assert (
        f"weights {protocol.weights_sha256}" in line
        if protocol.weights_sha256
        else "any weights" in line
    )


def test_rows_differ_in_what_the_public_codes_do():
    facts = {name: (p.space, p.resize, p.scaling, p.rounding) for name, p in PROTOCOLS.items()}
    assert facts == {
        "cifar10": ("inception", "bilinear_antialias", "bytes", "floor_255"),
        "adm-imagenet256": ("inception", "tf1_bilinear", "bytes", "floor_255"),
        "adm-imagenet256-latents": ("inception", "tf1_bilinear", "bytes", "round_127.5"),
        "meanflow-imagenet256": ("inception", "bilinear", "bytes", "round_127.5"),
        "edm": ("inception", "tf1_bilinear", "bytes", "round_127.5"),
        "edm2-dinov2": ("dinov2", "bicubic_antialias", "imagenet", "floor_255"),
    }
    for protocol in PROTOCOLS.values():
        assert (
            ("6726825d" in protocol.weights)
            == (protocol.space == "inception")
            == (protocol.weights_sha256 == "6726825d")
        )
        assert protocol.space != "dinov2" or protocol.weights_sha256 == "d5383ea8"


@pytest.mark.parametrize("size", [32, 64, 256, 512])
def test_meanflows_protocol_gives_its_network_half_pixel_bilinear(golden, size):
    # MeanFlow's code has no antialias, and no shift to TensorFlow 1's positions. The stored pixels
    # are torch's, mode="bilinear", align_corners=False, antialias=False.
    found = PROTOCOLS["meanflow-imagenet256"]
    assert found.scaling == "bytes"
    image = picture(size, size)
    ours = np.asarray(features.SCALINGS["bytes"](resize(image, 299, found.resize)))[0]
    with golden("resize_reference.npz") as stored:
        wanted = stored[f"bilinear/{size}x{size}_to_299"]
    ours = ours[stored_pixels(299)]
    np.testing.assert_allclose(ours, (wanted - 128) / 128, rtol=0, atol=1e-4 / 128)
    old = np.asarray(resize(image, 299, "tf1_bilinear"))[0][stored_pixels(299)]
    assert np.abs(old - wanted).max() > 25  # the protocol's former resize


def written(tmp_path, values, name="mine.json"):
    path = tmp_path / name
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


def test_a_protocol_of_ones_own_is_its_base_but_for_the_fields_it_names(tmp_path):
    own = load(written(tmp_path, {"base": "cifar10", "count": 5000, "metrics": ["fid", "kid"]}))
    assert own == dataclasses.replace(
        PROTOCOLS["cifar10"], name="mine", count=5000, metrics=("fid", "kid")
    )
    assert describe(own).startswith("mine: inception") and "5,000 samples" in describe(own)
    whole = {**dataclasses.asdict(PROTOCOLS["edm"]), "name": "whole", "space": "pixels"}
    assert load(written(tmp_path, whole)) == dataclasses.replace(
        PROTOCOLS["edm"], name="whole", space="pixels"
    )
    assert "whole: pixels, scaling" in describe(load(written(tmp_path, whole)))


BAD = [
    (
        {"base": "cifar10", "cuont": 5000},
        r"mine\.json\.cuont: no such field; did you mean .*mine\.json\.count\?",
    ),
    ({"base": "cifar10", "count": 5000.5}, r"\.count = 5000\.5: expected int"),
    ({"base": "cifar10", "count": True}, r"\.count = True: expected int"),
    ({"base": "cifar10", "count": "5000"}, r"\.count = '5000': expected int"),
    ({"base": "cifar10", "count": 1}, r"\.count = 1: expected a number of at least 2"),
    ({"base": "cifar10", "neighbours": 0}, r"\.neighbours = 0: expected a number of at least 1"),
    ({"base": "cifar10", "is_shuffle_seed": 2**32}, r"\.is_shuffle_seed = 4294967296: expected"),
    (
        {"base": "cifar10", "resize": "bicubic"},
        r"\.resize = 'bicubic': expected one of tf1_bilinear, bilinear,",
    ),
    (
        {"base": "cifar10", "space": "clip"},
        r"\.space = 'clip': expected one of inception, dinov2, pixels",
    ),
    (
        {"base": "cifar10", "scaling": "x"},
        r"\.scaling = 'x': expected one of bytes, unit, imagenet",
    ),
    (
        {"base": "cifar10", "rounding": "x"},
        r"\.rounding = 'x': expected one of floor_255, round_127",
    ),
    (
        {"base": "cifar10", "labels": "x"},
        r"\.labels = 'x': expected one of data, uniform, balanced",
    ),
    ({"base": "cifar10", "metrics": "fid"}, r"\.metrics = 'fid': expected a tuple"),
    ({"base": "cifar10", "metrics": []}, r"\.metrics = \(\): expected some of fid, sfid"),
    ({"base": "cifar10", "metrics": ["fid", "fid"]}, r"each once"),
    ({"base": "cifar10", "metrics": ["lpips"]}, r"expected some of fid, sfid"),
    ({"base": "edm2-dinov2", "metrics": ["fid", "is"]}, r"\.metrics has 'is' with space 'dinov2'"),
    (
        {"base": "cifar10", "weights_sha256": "6726825D"},
        r"\.weights_sha256 = '6726825D': expected up to 64 hex",
    ),
    ({"base": "cifar10", "name": "edm"}, r"\.name = 'edm': expected a new name"),
    ({"base": "cifar10", "name": "a\nb"}, r"\.name = 'a\\nb': expected letters"),
    ({"base": "cifar"}, r"base = 'cifar': expected one of cifar10, adm-imagenet256"),
    ({"base": ["cifar10"]}, r"base = \['cifar10'\]: expected one of"),
    ({"count": 5000}, r"mine\.json\.space is missing"),
    ([1], r"is \[1\], expected an object"),
    ('{"base": "cifar10", "count": 5, "count": 6}', r"no JSON \('count' is given twice\)"),
    ('{"base": ', r"no JSON \("),
    ("[" * 100000, r"no JSON \("),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_wrong_file_gives_one_line_that_names_file_and_field(tmp_path, values, message):
    path = written(tmp_path, values)
    with pytest.raises(DmfError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(path)


def test_a_protocol_forges_no_line():
    forged = dataclasses.replace(PROTOCOLS["edm"], reference="a\nERROR: all good\x1b[31m")
    assert describe(forged).isprintable()


def test_a_wrong_name_gives_one_line(tmp_path):
    with pytest.raises(
        DmfError,
        match=r"protocol 'cifar': no such protocol; did you mean cifar10\? "
        r"Expected one of cifar10, adm",
    ):
        load("cifar")
    with pytest.raises(DmfError, match=r"absent\.json cannot be read: .*No such file or directory"):
        load(str(tmp_path / "absent.json"))
