"""Files of EDM's and MeanFlow's U-Nets: full-size key lists, copies, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest

from dmf.convert.edm import EDM
from dmf.convert.meanflow_unet import MEANFLOW_UNET
from dmf.errors import DmfError
from dmf.networks import UNetConfig
from dmf.storage.readers.read import Inert
from tests import GOLDEN
from tests.conversion import (
    check_names,
    convert_arrays,
    key_list,
    tensors_of,
)
from tests.convert.unets import LAYER0, VP, stored

FULL = {
    "pymf_unet": (MEANFLOW_UNET, UNetConfig(), 0),
    "edm_vp_ddpmpp": (
        EDM,
        UNetConfig(
            dropout=0.13,
            augment_dim=9,
            resample="box",
            embedding_mult=1,
            time_input="log_sigma",
            precond="edm",
        ),
        55_733_891,
    ),
    "edm_ve_ncsnpp": (
        EDM,
        UNetConfig(
            dropout=0.13,
            augment_dim=9,
            residual_encoder=True,
            embedding="fourier",
            time_input="log_sigma",
            precond="edm",
        ),
        56_397_827,
    ),
}


def test_every_tensor_of_the_published_conditional_network_has_its_place():
    shapes = key_list(GOLDEN / "keys_edm_vp_ddpmpp.txt")
    shapes |= {"model.map_label.weight": (128, 10), "model.map_label.bias": (128,)}
    wanted = dataclasses.replace(FULL["edm_vp_ddpmpp"][1], num_classes=10)
    assert check_names(EDM, shapes) == (wanted, (32, 32, 3))


@pytest.mark.parametrize("name", FULL)
def test_every_tensor_of_the_published_networks_has_its_place(name):
    """Full size, by names and shapes, with the published counts of parameters.

    These leave out filters and frequencies.
    """
    kind, config, count = FULL[name]
    shapes = key_list(GOLDEN / f"keys_{name}.txt")
    assert check_names(kind, shapes) == (config, (32, 32, 3))
    trained = [
        shape for key, shape in shapes.items() if not key.endswith(("resample_filter", "freqs"))
    ]
    assert sum(map(math.prod, trained)) == (count or 55_932_419)


def test_the_best_copy_is_taken_by_default():
    tree = {
        "epoch": 3,
        "model": tensors_of(
            {f"{c}.w": np.float32([i]) for i, c in enumerate(("net", "net_ema", "net_ema1"))}
        ),
    }
    tree["model"]["num_updates"] = tensors_of({"": np.int64(5)})[""]
    for which, copy, value in (("", "net_ema1", 2), ("net", "net", 0), ("net_ema", "net_ema", 1)):
        tensors, taken = MEANFLOW_UNET.select(tree, which)
        assert taken == copy and list(tensors) == ["w"] and tensors["w"].read() == value
    with pytest.raises(DmfError, match="--copy=net_ema2 .*expected net_ema1 or net_ema or net"):
        MEANFLOW_UNET.select(tree, "net_ema2")
    bare = tensors_of({"net_ema2.w": np.float32([1])})
    assert MEANFLOW_UNET.select(bare, "")[1] == "net_ema2"
    assert list(MEANFLOW_UNET.select(tensors_of({"w": np.float32([1])}), "")[0]) == ["w"]


def module(tensors, class_name="SongUNet", **fields):
    return Inert(class_name, {"_parameters": tensors, "_buffers": {}, "_modules": {}, **fields})


def pickled(class_name, **fields):
    inner = module(tensors_of({"w": np.float32([1])}))
    return Inert(
        class_name, {"_parameters": {}, "_buffers": {}, "_modules": {"model": inner}, **fields}
    )


def test_pickles_and_state_dicts_of_edm():
    tensors, copy = EDM.select({"ema": pickled("EDMPrecond", sigma_data=0.6), "loss_fn": None}, "")
    assert (
        copy == "ema"
        and set(tensors) == {"model.w", "sigma_data"}
        and tensors["sigma_data"].read() == 0.6
    )
    tensors, copy = EDM.select({"net": pickled("ECMPrecond"), "optimizer_state": {}}, "")
    assert copy == "net" and tensors["sigma_data"].read() == 0.5
    for name in ("w", "model.w", "module.model.w"):
        assert list(EDM.select(tensors_of({name: np.float32([1])}), "")[0]) == ["model.w"]
    for name in ("VPPrecond", "VEPrecond", "iDDPMPrecond"):
        with pytest.raises(
            DmfError, match=f"the network is a {name}: expected EDMPrecond or ECMPrecond"
        ):
            EDM.select({"ema": pickled(name)}, "")
    with pytest.raises(DmfError, match="--copy=net is not in this file: expected ema"):
        EDM.select({"ema": pickled("EDMPrecond")}, "net")
    with pytest.raises(DmfError, match="sigma_data of the network is 'half': expected a number"):
        EDM.select({"ema": pickled("EDMPrecond", sigma_data="half")}, "")


def test_a_pickle_tells_how_often_its_classes_were_dropped():
    weights = stored("edm_classes")[2]
    inner = tensors_of({name.removeprefix("model."): x for name, x in weights.items()})
    for share, words in ((0.1, "0.1 of the rows$"), (0, "0 of the rows: no guidance can rely on")):
        held = pickled("EDMPrecond")
        held.state["_modules"]["model"] = module(inner, label_dropout=share)
        tensors, _ = EDM.select({"ema": held}, "")
        config, shape = EDM.describe(tensors, {})
        (rule,) = (r for r in EDM.rules(config, shape, tensors) if r.tensors == ("label_dropout",))
        assert config.num_classes == 5 and re.search(words, rule.note)
    held.state["_modules"]["model"] = module(inner, "DhariwalUNet")
    with pytest.raises(DmfError, match="the network is a DhariwalUNet, ADM's: expected a SongUNet"):
        EDM.select({"ema": held}, "")


def test_sigma_data_is_the_pickles_own():
    """The wrapper's attribute sets the field unless it is given; no tensor is left over."""
    _, _, weights = stored("edm")
    inner = tensors_of({name.removeprefix("model."): x for name, x in weights.items()})
    held = Inert(
        "EDMPrecond",
        {
            "_parameters": {},
            "_buffers": {},
            "_modules": {"model": module(inner)},
            "sigma_data": 0.6,
        },
    )
    for given, want in (({}, 0.6), ({"sigma_data": 0.4}, 0.4)):
        tensors, _ = EDM.select({"ema": held}, "")
        config, shape = EDM.describe(tensors, given)
        assert config.sigma_data == want
        named = {
            name
            for rule in EDM.rules(config, shape, tensors)
            if not rule.missing
            for name in rule.tensors
        }
        assert named == set(tensors)


FLAT = np.full((1, 1, 4, 4), 1 / 16, np.float32)
KEY = "model.enc.8x8_down.conv0.resample_filter"


@pytest.mark.parametrize(
    ("case", "changes", "given", "message"),
    [
        (
            "meanflow",
            {LAYER0: None},
            {},
            r"no tensor map_layer0\.weight among 196.*kind meanflow_unet",
        ),
        (
            "meanflow",
            {LAYER0: np.zeros((128, 96))},
            {},
            "map_layer0.weight has 96 columns: expected 128.*or 64",
        ),
        (
            "meanflow",
            {LAYER0: np.zeros(128)},
            {},
            r"map_layer0\.weight has shape \[128\]: expected 2 axes",
        ),
        (
            "meanflow",
            {"enc.8x8_block1.conv0.weight": None},
            {},
            "blocks of the encoder: 2 at 16x16, 1 at 8x8; expected",
        ),
        (
            "meanflow",
            {"enc.8x8_block0.conv0.weight": np.zeros((48, 32, 3, 3))},
            {},
            "32, 48 channels: expected multiples of 32",
        ),
        (
            "meanflow",
            {"enc.16x16_block1.conv1.weight": np.zeros((32, 3, 3, 32))},
            {},
            r"32, 3, 3, 32\]: expected \[32, 32, 3, 3\]",
        ),
        (
            "meanflow",
            {"enc.16x16_block0.norm9.weight": np.zeros(3)},
            {},
            r"norm9\.weight \[3\] has no place",
        ),
        (
            "meanflow",
            {"enc.16x16_block0.conv1.bias": None},
            {},
            r"tensor enc\.16x16_block0\.conv1\.bias is missing",
        ),
        (
            "meanflow",
            {},
            {"heads": 4},
            "--set=heads=4: expected dropout for kind meanflow_unet",
        ),
        ("meanflow", {}, {"dropout": "low"}, "dropout is 'low': expected a number"),
        (
            "edm",
            {},
            {"sigma": 0.5},
            "--set=sigma=0.5: expected dropout or sigma_data or ect_eval for kind edm",
        ),
        (
            "edm",
            {"model.map_layer0.weight": None},
            {},
            r"no tensor model\.map_layer0\.weight among 200.*kind edm",
        ),
        (
            "edm",
            {"model.map_layer0.weight": np.zeros((128, 65))},
            {},
            "has 65 columns: expected a multiple of 32",
        ),
        (
            "edm",
            {"model.map_label.weight": np.zeros((64, 10))},
            {},
            r"tensor model\.map_label\.bias is missing",
        ),
        (
            "edm_classes",
            {"model.map_label.weight": np.zeros((5, 8))},
            {},
            r"tensor model\.map_label\.weight has shape|conv|expected \[8, 5\]",
        ),
        ("edm", {KEY: FLAT}, {}, f"tensor {KEY}: other values than this network computes"),
    ],
)
def test_what_is_refused(case, changes, given, message):
    kind = stored(case)[0]
    weights = {name: x for name, x in (stored(case)[2] | changes).items() if x is not None}
    with pytest.raises(DmfError, match=message):
        convert_arrays(
            kind, {name: np.asarray(x, np.float32) for name, x in weights.items()}, given
        )


def test_files_without_their_filters_are_refused():
    kind, _, weights = stored("edm")
    filters = [name for name in weights if name.endswith("resample_filter")]
    with pytest.raises(
        DmfError, match="no tensor resample_filter among 196: expected the buffers of kind edm"
    ):
        convert_arrays(kind, {name: x for name, x in weights.items() if name not in filters})
    with pytest.raises(
        DmfError,
        match=r"resample_filter has shape \[1, 1, 3, 3\]: expected a filter of 2 x 2 or 4 x 4",
    ):
        convert_arrays(kind, weights | {name: FLAT[..., :3, :3] for name in filters})
    with pytest.raises(DmfError, match=rf"tensor {KEY} is missing"):
        convert_arrays(kind, {name: x for name, x in weights.items() if name != KEY})


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (
            MEANFLOW_UNET,
            VP,
            r"network\.embedding_mult is 1: expected 2, as in weights of kind meanflow_unet",
        ),
        (
            MEANFLOW_UNET,
            UNetConfig(num_classes=3),
            r"network\.num_classes is 3: expected 0, as in weights of kind meanflow_unet",
        ),
        (
            EDM,
            UNetConfig(),
            r"network\.time_input is 't': expected 'log_sigma', as in weights of kind edm",
        ),
    ],
)
def test_a_network_of_another_kind_is_not_exported(kind, config, message):
    with pytest.raises(DmfError, match=message):
        kind.rules(config, (32, 32, 3), None)
