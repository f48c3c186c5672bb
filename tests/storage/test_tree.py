"""Flat dictionaries of the tensors of a tree, and their names."""

import numpy as np
import pytest

from dmf.errors import DmfError
from dmf.storage.readers import read


def leaf(value=0.0):
    return read.Tensor((), np.dtype(np.float32), lambda: np.float32(value))


def test_flatten_names_positions_by_numbers_and_drops_the_rest():
    a, b = leaf(), leaf()
    nested = {"x": {0: a, "y": {"z": b}}, "n": 3, "m": read.Inert("M", {"w": a}), "l": [None, b]}
    assert list(read.flatten(nested)) == ["x.0", "x.y.z", "l.1"]
    assert read.flatten(nested["x"], "net")["net.y.z"] is b
    with pytest.raises(DmfError, match="'x.y' is used twice"):
        read.flatten({"x.y": a, "x": {"y": b}})


def test_prefixes_go_only_where_every_name_has_them():
    a = leaf()
    assert list(read.strip_prefix({"module._orig_mod.w": a, "module._orig_mod.module.v": a})) == [
        "w",
        "module.v",
    ]
    assert list(read.strip_prefix({"_orig_mod.module.w": a})) == ["w"]
    assert list(read.strip_prefix({"module.w": a, "n_averaged": a})) == ["module.w", "n_averaged"]
    assert list(read.strip_prefix({"module.": a})) == ["module."] and read.strip_prefix({}) == {}


def test_a_module_gives_the_names_of_its_state_dict():
    empty = {"_parameters": {}, "_buffers": {}, "_modules": {"a": None}}
    assert read.module_tensors(read.Inert("M", empty)) == {}
    number = {**empty, "_buffers": {"a": leaf()}, "_non_persistent_buffers_set": 5}
    assert list(read.module_tensors(read.Inert("M", number))) == ["a"]
    inner = read.Inert("M", {**empty, "_modules": {"b": read.Inert("N", number)}})
    assert list(read.flatten({"ema": inner, "optimizer": read.Inert("Adam", {})})) == ["ema.b.a"]
    with pytest.raises(DmfError, match="the network is a 'Adam': expected a torch.nn.Module"):
        read.module_tensors(read.Inert("Adam", {}))
