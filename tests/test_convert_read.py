"""Reading weight files: the values that were put in come out, nothing in a file is run, and every bad file is one sentence."""

import argparse
import collections
import hashlib
import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
from conversion import needs_torch
from flax import serialization

from dmf.convert import read, span, torchfile, tree
from dmf.errors import DmfError

BF16 = ml_dtypes.bfloat16
F32 = (np.arange(24, dtype=np.float32) / 7).reshape(4, 6)
MODEL = {
    "f32": F32,
    "transposed": F32.T,
    "sliced": F32[1:3, ::2],
    "shared": F32.reshape(-1)[5:11],
    "f16": F32.astype(np.float16),
    "bf16": F32.astype(BF16),
    "f64": np.linspace(0, 1, 5),
    "i64": np.array([2**40, -1]),
    "u8": np.arange(3, dtype=np.uint8),
    "bool": np.array([[True, False, True]]),
    "parameter": F32[0] + 1,
    "scalar": np.float32(3.5),
    "empty": np.zeros((0, 3), np.float32),
    "channels_last": np.arange(48, dtype=np.float32).reshape(2, 2, 3, 4),
}
NETWORK = {
    "layers.a.weight": F32[:2, :3],
    "layers.a.bias": F32[0, :2],
    "blocks.0.weight": F32[:3, 2],
    "freqs": F32[2],
}


def module(name, **members):
    """A module under a name that a pickle speaks of."""
    made = types.ModuleType(name)
    for key, value in members.items():
        value.__module__, value.__qualname__ = name, key
        setattr(made, key, value)
    sys.modules[name] = made


def edm_network(torch):
    """A module that pickles as those of EDM do: a call of _reconstruct_persistent_obj with its source and its fields."""

    def reconstruct(meta):
        raise AssertionError("a reader must not call this")

    class EasyDict(dict):
        pass

    class Net(torch.nn.Module):
        def __reduce__(self):
            source = "raise SystemExit('the source in the file was run')"
            meta = {"type": "class", "version": 6, "module_src": source, "class_name": "Net", "state": dict(self.__dict__)}
            return reconstruct, (meta,)

    module("torch_utils")
    module("torch_utils.persistence", _reconstruct_persistent_obj=reconstruct)
    module("dnnlib")
    module("dnnlib.util", EasyDict=EasyDict)
    inner, outer = Net(), Net()
    inner.weight = torch.nn.Parameter(torch.tensor(NETWORK["blocks.0.weight"]))
    linear = torch.nn.Linear(3, 2)
    linear.weight.data, linear.bias.data = (torch.tensor(NETWORK[f"layers.a.{x}"]) for x in ("weight", "bias"))
    outer.layers, outer.blocks = torch.nn.ModuleDict({"a": linear}), torch.nn.ModuleList([inner])
    outer.register_buffer("freqs", torch.tensor(NETWORK["freqs"]))
    outer.register_buffer("scratch", torch.ones(2), persistent=False)
    outer.sigma_min, outer.shape = np.float64(0.25), np.arange(3)
    return {"ema": outer, "loss_fn": None, "dataset_kwargs": EasyDict(path="x.zip", size=EasyDict(side=32))}


def write_golden(folder):
    """What tests/golden holds: write_golden(Path("tests/golden")) with torch 2.13 made read_{zip,legacy,edm}.pt."""
    import torch

    numbers = {
        name: torch.tensor(x.astype(np.float32)).bfloat16() if x.dtype == BF16 else torch.tensor(x) for name, x in MODEL.items()
    }
    model = collections.OrderedDict(numbers)
    model["transposed"], model["sliced"], model["shared"] = model["f32"].T, model["f32"][1:3, ::2], model["f32"].view(-1)[5:11]
    model["parameter"] = torch.nn.Parameter(model["parameter"])
    model["channels_last"] = model["channels_last"].to(memory_format=torch.channels_last)
    model._metadata = {"": {"version": 1}}
    saved = {
        "model": model,
        "ema": {"shadow_params": [torch.tensor(F32[0]), torch.tensor(F32[1])], "decay": 0.999},
        "args": argparse.Namespace(lr=1e-4, betas=(0.9, 0.95), name="run", device=torch.device("cpu")),
        "numpy": np.asfortranarray(F32),
        "mean": np.float32(2.5),
        "step": 2**40,
        "last": None,
        "dtype": torch.float32,
        "size": torch.Size([2, 3]),
        "skip": {"b", "a"},
    }
    torch.save(saved, folder / "read_zip.pt")
    torch.save(saved, folder / "read_legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "read_edm.pt").write_bytes(pickle.dumps(edm_network(torch)))


@pytest.fixture(params=["stored", pytest.param("written now", marks=needs_torch)])
def folder(request, tmp_path, pytestconfig):
    """Golden files of torch 2.13, and the same from the torch that is installed."""
    if request.param == "stored":
        return pytestconfig.rootpath / "tests" / "golden"
    write_golden(tmp_path)
    return tmp_path


def same(tensor, wanted):
    got = tensor.read()
    wanted = np.asarray(wanted)
    assert got.flags.c_contiguous and got.shape == wanted.shape == tensor.shape and got.dtype == wanted.dtype == tensor.dtype
    assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_torch_files_give_back_what_was_put_in(folder, kind):
    weights = read.open_file(folder / f"read_{kind}.pt")
    assert weights.format == f"torch {kind}" and weights.path == folder / f"read_{kind}.pt"
    found = weights.tree
    assert list(found["model"]) == list(MODEL)
    for name, wanted in MODEL.items():
        same(found["model"][name], wanted)
    assert list(found["ema"]["shadow_params"]) == [0, 1] and found["ema"]["decay"] == 0.999
    same(found["ema"]["shadow_params"][1], F32[1])
    same(found["numpy"], F32)
    args = {"lr": 1e-4, "betas": {0: 0.9, 1: 0.95}, "name": "run", "device": read.Inert("torch.device", {0: "cpu"})}
    assert found["args"] == read.Inert("argparse.Namespace", args)
    assert (found["mean"], found["step"], found["last"], found["size"]) == (2.5, 2**40, None, {0: 2, 1: 3})
    assert found["dtype"] == read.Inert("torch.float32", {}) and found["skip"] == {"a", "b"}


def test_an_edm_pickle_gives_its_tensors_and_not_its_source(folder):
    weights = read.open_file(folder / "read_edm.pt")
    net = weights.tree["ema"]
    assert weights.format == "pickle" and net.class_name == "Net" and "module_src" not in net.state
    tensors = read.module_tensors(net)
    assert tensors.keys() == NETWORK.keys()
    for name, wanted in NETWORK.items():
        same(tensors[name], wanted)
    same(net.state["shape"], np.arange(3))
    assert net.state["sigma_min"] == 0.25 and net.state["_buffers"]["scratch"].shape == (2,)
    size = read.Inert("dnnlib.util.EasyDict", {"side": 32})
    assert weights.tree["dataset_kwargs"] == read.Inert("dnnlib.util.EasyDict", {"path": "x.zip", "size": size})


@needs_torch
def test_an_ect_training_state_is_a_zip_with_a_network(tmp_path):
    import torch

    network = edm_network(torch)["ema"]
    torch.save({"net": network, "optimizer_state": {"state": {0: {"step": torch.tensor(3.0)}}}}, tmp_path / "state.pt")
    weights = read.open_file(tmp_path / "state.pt")
    tensors = read.module_tensors(weights.tree["net"])
    assert weights.format == "torch zip" and list(tensors) == list(network.state_dict())
    for name, wanted in network.state_dict().items():
        same(tensors[name], wanted.numpy())
    assert list(read.flatten(weights.tree)) == ["optimizer_state.state.0.step"]


@needs_torch
def test_tensors_of_other_makes(tmp_path):
    import torch

    numbers = torch.tensor([0.5, 2.0])
    noted = torch.nn.Parameter(numbers), numbers.clone()
    noted[0].note = noted[1].note = "an attribute"
    numbers = {"f8": numbers.to(torch.float8_e4m3fn), "u16": numbers.to(torch.uint16), "noted": noted}
    torch.save(numbers, tmp_path / "x.pt")
    found = read.open_file(tmp_path / "x.pt").tree
    for tensor in found["noted"].values():
        same(tensor, np.array([0.5, 2.0], np.float32))
    same(found["f8"], np.array([0.5, 2.0]).astype(ml_dtypes.float8_e4m3fn))
    same(found["u16"], np.array([0, 2], np.uint16))


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


SAFE = safetensors_bytes(
    {
        "__metadata__": {"format": "pt"},
        "b": entry("BF16", [4, 6], 100, 148),
        "a": entry("F32", [4, 6], 0, 96),
        "e": entry("F32", [0, 3], 148, 148),
        "s": entry("I32", [], 96, 100),
    },
    F32.tobytes() + struct.pack("<i", -5) + F32.astype(BF16).tobytes(),
)


def test_safetensors(tmp_path):
    (tmp_path / "x.bin").write_bytes(SAFE)
    weights = read.open_file(tmp_path / "x.bin")
    assert weights.format == "safetensors" and weights.metadata == {"format": "pt"}
    for name, wanted in {"a": F32, "b": F32.astype(BF16), "s": np.int32(-5), "e": np.zeros((0, 3), np.float32)}.items():
        same(weights.tree[name], wanted)


def test_safetensors_as_the_library_writes_them(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    arrays = {name: np.array(x, order="C") for name, x in MODEL.items()}
    library.save_file(arrays, tmp_path / "x", metadata={"a": "b"})
    weights = read.open_file(tmp_path / "x")
    assert weights.tree.keys() == MODEL.keys() and weights.metadata == {"a": "b"}
    for name, wanted in MODEL.items():
        same(weights.tree[name], wanted)


FLAX = {
    "step": 5,
    "ema_params": {"net": {"kernel": F32, "half": F32.astype(BF16), "one": np.array(3, np.int32)}},
    "rate": np.float64(0.25),
    "flags": [True, None, -7, "text" * 20, 1.5, 2**40],
}


@pytest.mark.parametrize("limit", [2**30, 40])
def test_flax_checkpoints_with_whole_and_with_chunked_arrays(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", limit)
    (tmp_path / "checkpoint_5").write_bytes(serialization.msgpack_serialize(FLAX))
    weights = read.open_file(tmp_path / "checkpoint_5")
    assert weights.format == "flax msgpack" and weights.tree["rate"] == 0.25 and weights.tree["step"] == 5
    assert list(weights.tree["flags"].values()) == FLAX["flags"]
    assert set(read.flatten(weights.tree)) == {f"ema_params.net.{name}" for name in ("kernel", "half", "one")}
    for name, wanted in FLAX["ema_params"]["net"].items():
        same(weights.tree["ema_params"]["net"][name], wanted)


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
    assert list(read.strip_prefix({"module._orig_mod.w": a, "module._orig_mod.module.v": a})) == ["w", "module.v"]
    assert list(read.strip_prefix({"_orig_mod.module.w": a})) == ["w"]
    assert list(read.strip_prefix({"module.w": a, "n_averaged": a})) == ["module.w", "n_averaged"]
    assert list(read.strip_prefix({"module.": a})) == ["module."] and read.strip_prefix({}) == {}


def test_what_is_no_module_is_named():
    empty = {"_parameters": {}, "_buffers": {}, "_modules": {"a": None}}
    assert read.module_tensors(read.Inert("M", empty)) == {}
    with pytest.raises(DmfError, match="module 'b.' is a 'Adam': expected a pickled torch.nn.Module"):
        read.module_tensors(read.Inert("M", {**empty, "_modules": {"b": read.Inert("Adam", {})}}))


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(SAFE)
    assert read.sha256(tmp_path / "x") == hashlib.sha256(SAFE).hexdigest()


# ---- files that must be refused ----------------------------------------------------------------------------------------


def refuses(path):
    """The one sentence with which a file is refused, at the latest when its tensors are read."""
    with pytest.raises(DmfError) as caught:
        for tensor in read.flatten(read.open_file(path).tree).values():
            tensor.read()
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and text.isprintable() and len(text) < 600
    assert "expected" in text
    return text


def zipped(program, compression=zipfile.ZIP_STORED, **members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("x/data.pkl", program)
        for name, data in members.items():
            archive.writestr(f"x/{name.replace('data_', 'data/')}", data)
    return out.getvalue()


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name_of(module_name, name):
    return text(module_name) + text(name) + b"\x93"


def pickled(*pieces):
    return b"\x80\x04" + b"".join(pieces) + b"."


def tensor_program(size=(2, 3), stride=(3, 1), offset=0, count=6, metadata=b"", cls="FloatStorage"):
    """A pickle of one tensor over storage 0, as PyTorch writes it."""
    numbers = [pickle.dumps(x, 2)[2:-1] for x in (offset, size, stride)]
    storage = b"(" + text("storage") + name_of("torch", cls) + text("0") + text("cpu") + pickle.dumps(count, 2)[2:-1] + b"tQ"
    call = name_of("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"".join(numbers) + b"\x89N" + metadata + b"tR"
    return pickled(b"}", text("w"), call, b"s")


def test_the_tensor_program_is_one_that_reads(tmp_path):
    (tmp_path / "x").write_bytes(zipped(tensor_program(), data_0=F32.tobytes()[:24], byteorder=b"little"))
    same(read.open_file(tmp_path / "x").tree["w"], F32.reshape(-1)[:6].reshape(2, 3))


class Touch:
    """Pickles as a call that would leave a file behind, were it made."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def stream(program):
    """PyTorch's older stream around the pickle of an object."""
    system = {"protocol_version": 1001, "little_endian": True}
    return b"".join([pickle.dumps(x, 2) for x in (torchfile.MAGIC, 1001, system)]) + program + pickle.dumps([], 2)


def nested(data):
    return pickled(name_of("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(data)) + data + b"\x85R")


WRAPPINGS = {
    "bare": bytes,
    "zip": zipped,
    "legacy": stream,
    "storage in a pickle": lambda program: nested(stream(program)),
    "storage in a zip": lambda program: zipped(nested(stream(program))),
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_no_call_in_a_pickle_is_made(tmp_path, wrap):
    marker = tmp_path / "marker"
    program = pickle.dumps({"w": Touch(os.system, f"touch {marker}")}, 2)
    pickle.loads(program)
    assert marker.exists()  # the attack is a real one
    marker.unlink()
    (tmp_path / "x.pt").write_bytes(wrap(program))
    assert f"asks for {os.system.__module__}.system; refused, nothing of it was run" in refuses(tmp_path / "x.pt")
    assert not marker.exists()


NAMESPACE = name_of("argparse", "Namespace") + b")\x81"
DTYPE = name_of("numpy", "dtype") + text("f4") + b"\x85R"
ARRAY = name_of("numpy._core.multiarray", "_reconstruct") + name_of("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
PICKLES = {
    "eval": (pickled(name_of("builtins", "eval"), text("1"), b"\x85R"), "asks for builtins.eval"),
    "getattr": (pickled(name_of("builtins", "getattr")), "asks for builtins.getattr"),
    "partial": (pickled(name_of("functools", "partial")), "asks for functools.partial"),
    "python 2 name": (pickled(b"c__builtin__\napply\n"), "asks for builtins.apply"),
    "nested attribute": (pickled(name_of("torch", "nn.modules.linear.Linear")), "asks for torch.nn.modules.linear.Linear"),
    "look-alike": (pickled(name_of("torch._utils", "_rebuild_tensor_v2\n")), "_rebuild_tensor_v2?; refused"),
    "long name": (pickled(b"c" + b"a" * 400 + b"\nb\n"), "aaa...; refused"),
    "reconstructor": (pickled(name_of("copyreg", "_reconstructor")), "asks for copyreg._reconstructor"),
    "foreign class": (pickled(name_of("models", "Net"), b")\x81"), "asks for models.Net"),
    "a name that is no text": (pickled(b"K\x01K\x02\x93"), "a global with (1, 2)"),
    "INST": (pickled(b"(" + text("1") + b"ios\nsystem\n"), "opcode INST"),
    "OBJ": (pickled(b"(" + name_of("argparse", "Namespace") + b"o"), "opcode OBJ"),
    "NEWOBJ_EX": (pickled(name_of("argparse", "Namespace"), b")}\x92"), "opcode NEWOBJ_EX"),
    "extension registry": (pickled(b"\x82\x01"), "opcode EXT1"),
    "out-of-band buffer": (pickled(b"\x97"), "opcode NEXT_BUFFER"),
    "unknown opcode": (pickled(b"\xfe"), "opcode of no known sort"),
    "text protocol": (pickled(b"I5\n"), "opcode INT"),
    "newer protocol": (b"\x80\x09N.", "pickle protocol 9"),
    "call of no function": (pickled(text("os.system"), b")R"), "a call with (str, tuple)"),
    "call of a type": (pickled(name_of("torch", "float32"), b")R"), "a call of torch.float32"),
    "new object of a function": (pickled(name_of("_codecs", "encode"), b")\x81"), "new object of _codecs.encode"),
    "fields for a function": (pickled(name_of("torch", "Size"), b"}b"), "a BUILD with (Global)"),
    "fields for a list": (pickled(b"]}b"), "a BUILD with (list)"),
    "items for text": (pickled(text("a"), text("k"), b"Ns"), "a SETITEM with (str)"),
    "member of a tuple": (pickled(b")Na"), "an APPEND with (tuple)"),
    "a list as key": (pickled(b"}]Ns"), "a key of type list"),
    "a huge key": (pickled(b"}\x8a\x09" + b"\x01" * 9 + b"Ns"), "a key of type int"),
    "a huge integer": (pickled(b"\x8b\xff\xff\xff\x7f"), "an integer of 2147483647 bytes"),
    "negative size": (pickled(b"T\xff\xff\xff\xff"), "-1 bytes announced"),
    "8 EiB of bytes": (pickled(b"\x8e" + b"\xff" * 7 + b"\x7f"), "9223372036854775807 bytes announced"),
    "8 EiB of text": (pickled(b"\x8d" + b"\xff" * 7 + b"\x7f"), "9223372036854775807 bytes announced"),
    "empty stack": (pickled(b"R"), "takes more objects than it has"),
    "no mark": (pickled(b"t"), "lacks a mark"),
    "unknown memo": (pickled(b"h\x07"), "object 7 in its pickle is used before it is made"),
    "two objects": (pickled(b"NN"), "objects left over"),
    "text of another code": (pickled(b"\x8c\x01\xff"), "is not UTF-8"),
    "a list within itself": (pickled(b"]\x94h\x00a"), "nests objects over 100 deep or within themselves"),
    "deep nesting": (pickled(b"]" * 5000 + b"a" * 4999), "nests objects over 100 deep"),
    "persistent id in a bare pickle": (pickled(text("os"), b"Q"), "a persistent id with (str)"),
    "bytes after the end": (pickled(b"N") + b"cos\nsystem\n", "goes on for 11 bytes"),
    "source without state": (
        pickled(name_of("torch_utils.persistence", "_reconstruct_persistent_obj"), b"}" + text("class_name") + b"Ns\x85R"),
        "a persistent object with (dict)",
    ),
    "objects in an array": (pickled(name_of("numpy", "dtype"), text("O8"), b"\x85R"), "a NumPy array of type O8"),
    "giant array": (pickled(ARRAY, b"(K\x01\x8a\x06\0\0\0\0\0\x01\x85" + DTYPE + b"\x89C\x04abcdtb"), "holds 1 values"),
    "array with numbers in it": (pickled(ARRAY, b"(K\x01)" + DTYPE + b"\x89K\x05tb"), "a NumPy array without its bytes"),
    "big-endian array": (pickled(ARRAY, b"(K\x01)", DTYPE, b"(K\x03" + text(">") + b"tb\x89C\x04abcdtb"), "another order"),
    "wide NumPy number": (pickled(name_of("numpy._core.multiarray", "scalar"), DTYPE, b"C\x08abcdefgh\x86R"), "a NumPy number"),
    "storage in a storage": (nested(stream(nested(stream(pickled(b"N"))))), "a storage as bytes with (Span)"),
    "bytes that are no storage": (nested(pickled(b"N")), "not what torch.save makes of a storage"),
    "stream of another version": (pickle.dumps(torchfile.MAGIC, 2) + pickled(b"K\x02") + pickled(b"}"), "another version"),
}


@pytest.mark.parametrize(("data", "words"), PICKLES.values(), ids=PICKLES)
def test_pickles_that_are_refused(tmp_path, data, words):
    (tmp_path / "x.pkl").write_bytes(data)
    assert words in refuses(tmp_path / "x.pkl")


def damaged(data, old, new):
    assert data.count(old) >= 1
    return data.replace(old, new)


VALUES = F32.tobytes()[:24]
GOOD = zipped(tensor_program(), data_0=VALUES)
ZIPS = {
    "compressed": (zipped(tensor_program(), zipfile.ZIP_DEFLATED, data_0=VALUES), "data.pkl is compressed"),
    "size of the unpacked bytes": (damaged(GOOD, *[struct.pack("<II", 24, n) for n in (24, 2**31)]), "data/0 is compressed"),
    "two members of one name": (
        damaged(zipped(tensor_program(), data_0=VALUES, data_1=VALUES), b"data/1", b"data/0"),
        "two members",
    ),
    "name in the table only": (GOOD.replace(b"x/data/0", b"x/data/1", 1), "is not where the table says"),
    "no storage": (zipped(tensor_program()), "names storage 0, which the archive lacks"),
    "short storage": (zipped(tensor_program(), data_0=VALUES[:20]), "x/data/0: holds 20 bytes; expected 6 values of float32"),
    "storage of objects": (zipped(tensor_program(cls="QInt8Storage"), data_0=VALUES), "asks for torch.QInt8Storage"),
    "flipped bit": (damaged(GOOD, VALUES, VALUES[:9] + b"\x7f" + VALUES[10:]), "x/data/0: damaged"),
    "big-endian": (zipped(tensor_program(), data_0=VALUES, byteorder=b"big"), "another byte order"),
    "TorchScript": (zipped(tensor_program(), **{"constants.pkl": b""}), "TorchScript"),
    "npz": (zipped(b"").replace(b"data.pkl", b"data.npy"), ".npz"),
    "some other zip": (zipped(b"").replace(b"data.pkl", b"word.xml"), "a zip archive with x/word.xml"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "empty archive"),
    "table beyond the file": (GOOD[:-10] + struct.pack("<I", 2**31) + GOOD[-6:], "table of contents cannot be read"),
    "beyond the storage": (zipped(tensor_program(offset=1), data_0=VALUES), "holds 6 values; expected those of shape (2, 3)"),
    "strides beyond it": (zipped(tensor_program(stride=(4, 1)), data_0=VALUES), "with strides (4, 1)"),
    "strides that repeat": (zipped(tensor_program(size=(2**20, 2**20), stride=(0, 0)), data_0=VALUES), "holds 6 values"),
    "negative stride": (zipped(tensor_program(stride=(-3, 1), offset=3), data_0=VALUES), "strides (-3, 1)"),
    "negative size": (zipped(tensor_program(size=(-2, 3)), data_0=VALUES), "shape (-2, 3)"),
    "negative offset": (zipped(tensor_program(offset=-1), data_0=VALUES), "from value -1"),
    "endless empty": (zipped(tensor_program(size=(0, 2**60), stride=(1, 1)), data_0=VALUES), "of sane extent"),
    "too few strides": (zipped(tensor_program(stride=(1,)), data_0=VALUES), "strides (1) from"),
    "33 dimensions": (
        zipped(tensor_program(size=(1,) * 33, stride=(1,) * 33), data_0=VALUES),
        "shape (1, 1, 1, 1, 1, 1, 1, 1, ...)",
    ),
    "text for a size": (zipped(tensor_program(size=("2", 3)), data_0=VALUES), "shape (str, 3)"),
    "negated view": (zipped(tensor_program(metadata=b"}" + text("neg") + b"\x88s"), data_0=VALUES), "a tensor with"),
}


@pytest.mark.parametrize(("data", "words"), ZIPS.values(), ids=ZIPS)
def test_zip_archives_that_are_refused(tmp_path, data, words):
    (tmp_path / "x.pt").write_bytes(data)
    assert words in refuses(tmp_path / "x.pt")


def test_a_long_table_of_contents_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "x.pt").write_bytes(GOOD)
    monkeypatch.setattr(torchfile, "MAX_DIRECTORY", 50)
    assert "its table of contents takes" in refuses(tmp_path / "x.pt")


SAFES = {
    "overlap": (safetensors_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)), "starts at byte 2"),
    "gap": (safetensors_bytes({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 4, 6)}, bytes(6)), "starts at byte 4"),
    "beyond the file": (safetensors_bytes({"a": entry("U8", [9], 0, 9)}, bytes(6)), "a lies at bytes 0 to 9 of 6"),
    "backwards": (safetensors_bytes({"a": entry("U8", [2], 4, 2)}, bytes(6)), "a lies at bytes 4 to 2"),
    "negative": (safetensors_bytes({"a": entry("U8", [8], -2, 6)}, bytes(6)), "a lies at bytes -2 to 6"),
    "bytes left over": (safetensors_bytes({"a": entry("U8", [2], 0, 2)}, bytes(6)), "take 2 of 6 bytes"),
    "shape": (safetensors_bytes({"a": entry("F32", [2], 0, 6)}, bytes(6)), "a: holds 1 values; expected those of shape (2)"),
    "smaller shape": (
        safetensors_bytes({"a": entry("F32", [1], 0, 8)}, bytes(8)),
        "a: holds 8 bytes",
    ),
    "giant shape": (safetensors_bytes({"a": entry("U8", [2**40, 2**40], 0, 6)}, bytes(6)), "a: shape (1099511627776, 109951"),
    "type": (safetensors_bytes({"a": entry("OBJ", [6], 0, 6)}, bytes(6)), "tensor a in no known form"),
    "float as offset": (safetensors_bytes({"a": entry("U8", [6], 0, 6.0)}, bytes(6)), "tensor a in no known form"),
    "metadata": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "a name twice": (safetensors_bytes(b'{"a": 1, "a": 2}'), "a name is used twice"),
    "deep header": (safetensors_bytes(b'{"a":' + b"[" * 100_000), "its header is no JSON"),
    "long header": (struct.pack("<Q", 2**30) + b"{}", "its header takes 1073741824 bytes"),
    "header cut off": (struct.pack("<Q", 2**20) + b"{}", "1048576 bytes announced"),
    "many digits": (safetensors_bytes(b'{"a": ' + b"1" * 5000 + b"}"), "its header is no JSON"),
    "a name of two lines": (safetensors_bytes({"a\nb": entry("U8", [9], 0, 9)}), "a?b lies at bytes"),
}


@pytest.mark.parametrize(("data", "words"), SAFES.values(), ids=SAFES)
def test_safetensors_that_are_refused(tmp_path, data, words):
    (tmp_path / "x").write_bytes(data)
    assert words in refuses(tmp_path / "x")


def array(shape, dtype, data, kind=1):
    """An extension of Flax; shape and type are msgpack bytes."""
    inner = b"\x93" + shape + dtype + b"\xc4" + bytes([len(data)]) + data
    return b"\x81\xa1w\xc7" + bytes([len(inner), kind]) + inner


FLAXES = {
    "other extension": (array(b"\x91\x01", b"\xa5uint8", b"a", kind=2), "extension type 2"),
    "objects": (array(b"\x91\x01", b"\xa6object", b"a"), "an array of type object"),
    "shape": (array(b"\x91\x02", b"\xa5uint8", b"a"), "holds 1 values; expected those of shape (2)"),
    "smaller shape": (array(b"\x91\x00", b"\xa5uint8", b"a"), "holds 1 bytes; expected those of shape (0)"),
    "negative shape": (array(b"\x91\xff", b"\xa5uint8", b"a"), "shape (-1)"),
    "longer than announced": (
        array(b"\x91\x01", b"\xa5uint8", b"a").replace(b"\xc7\x0c", b"\xc7\x0b"),
        "longer than announced",
    ),
    "4 GiB announced": (b"\x81\xa1w\xc6\xff\xff\xff\xff", "4294967295 bytes announced"),
    "4 G entries": (b"\xdf\xff\xff\xff\xff\xa1w\xc0", "1 bytes announced at byte 8"),
    "deep nesting": (b"\x81\xa1w" * 5000 + b"\xc0", "nests over 100 deep"),
    "deep list": (b"\x81\xa1w" + b"\x91" * 5000 + b"\xc0", "nests over 100 deep"),
    "deep shape": (b"\x81\xa1w" + b"\xd4\x01\x93" * 5000, "nests over 100 deep"),
    "deep key": (b"\x81" * 5000, "nests over 100 deep"),
    "a name twice": (b"\x82\xa1w\xc0\xa1w\xc0", "key w of a map is used twice"),
    "a map as key": (b"\x81\x80\xc0", "no text"),
    "no such code": (b"\x81\xa1w\xc1", "byte 0xc1"),
    "bytes after the end": (b"\x81\xa1w\xc0\xc0", "goes on for 1 bytes"),
    "endless empty chunks": (
        b"\x83\xb9__msgpack_chunked_array__\xc3\xa5shape\x82\xa10\x00\xa11\xcf" + b"\xff" * 8 + b"\xa6chunks"
        b"\x81\xa10" + array(b"\x91\x00", b"\xa5uint8", b"")[3:],
        "of sane extent",
    ),
    "chunks missing": (b"\x82\xb9" + b"__msgpack_chunked_array__\xc3\xa5shape\x81\xa10\x02", "an array in 0 chunks"),
}


@pytest.mark.parametrize(("data", "words"), FLAXES.values(), ids=FLAXES)
def test_flax_checkpoints_that_are_refused(tmp_path, data, words):
    (tmp_path / "x").write_bytes(data)
    assert words in refuses(tmp_path / "x")


LOOKS = {
    "html": (b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title>", "an HTML page, such as a login"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "a git-lfs pointer"),
    "json": (b'{"weight_map": {}}', "a JSON text, such as the index"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "gzip": (b"\x1f\x8b\x08", "a compressed archive (unpack it first)"),
    "tar": (bytes(257) + b"ustar", "a tar archive"),
    "tensorflow": (b"\0\0" * 30 + read.LEVELDB, "part of a TensorFlow checkpoint"),
    "anything": (b"hello world", "begins with 68 65 6c 6c 6f 20 77 6f; expected safetensors"),
    "one byte": (b"h", "begins with 68;"),
    "half a pickle": (b"\x80", "1 bytes announced"),
    "text pickle": (b"cos\nsystem\n(S'true'\ntR.", "begins with 63 6f 73"),
}


@pytest.mark.parametrize(("data", "words"), LOOKS.values(), ids=LOOKS)
def test_what_is_no_weight_file_is_told_what_it_looks_like(tmp_path, data, words):
    (tmp_path / "x.pt").write_bytes(data)
    assert words in refuses(tmp_path / "x.pt")


def test_paths_that_cannot_be_read(tmp_path, monkeypatch):
    assert "no such file" in refuses(tmp_path / "none.pt")
    assert "is a directory" in refuses(tmp_path)
    (tmp_path / "empty.pt").touch()
    assert "is empty" in refuses(tmp_path / "empty.pt")
    os.mkfifo(tmp_path / "pipe")
    assert "a device or a pipe" in refuses(tmp_path / "pipe")
    assert "cannot be reached" in refuses(tmp_path / ("n" * 300))
    (tmp_path / "x").write_bytes(SAFE)

    def closed(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(span, "open", closed, raising=False)
    assert "cannot be read ([Errno 13] Permission denied); expected a readable file" in refuses(tmp_path / "x")


def test_a_file_that_changes_is_not_read_on(tmp_path):
    (tmp_path / "x").write_bytes(SAFE)
    tensor = read.open_file(tmp_path / "x").tree["a"]
    (tmp_path / "x").write_bytes(SAFE[:-1] + b"x")
    os.utime(tmp_path / "x", (1, 1))
    with pytest.raises(DmfError, match="was changed while in use"):
        tensor.read()


def test_shared_lists_do_not_grow_without_end(tmp_path, monkeypatch):
    """Thirty lists, each twice the one before: a billion names from a few hundred bytes."""
    monkeypatch.setattr(tree, "MAX_VISITS", 10_000)
    (tmp_path / "x").write_bytes(pickled(b"(]\x94", *(b"]\x94(h%ch%ce" % (i, i) for i in range(30)), b"l"))
    weights = read.open_file(tmp_path / "x")
    with pytest.raises(DmfError, match="has over"):
        read.flatten(weights.tree)
    bottom = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    for _ in range(30):
        child = read.Inert("M", bottom)
        bottom = {"_parameters": {}, "_buffers": {}, "_modules": {"a": child, "b": child}}
    with pytest.raises(DmfError, match="has over"):
        read.module_tensors(read.Inert("M", bottom))


STORAGE = stream(pickled(b"(" + text("storage") + name_of("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x01NtQ"))
STORAGE = STORAGE[: -len(pickle.dumps([], 2))] + pickle.dumps(["0"], 2) + struct.pack("<q", 1) + bytes(4)
REPEATED = {
    "many objects": b"(" + b"]" * 2000 + b"l",
    "one long text": b"\x8d" + struct.pack("<Q", 100_000) + b"a" * 100_000,
    "a text encoded often": b"(\x8d\xa0\x0f\0\0\0\0\0\0" + b"a" * 4000 + b"\x94" + text("latin1") + b"\x94"
    b"\x8c\x07_codecs\x8c\x06encode\x93\x94" + b"h\x02h\x00h\x01\x86R" * 100 + b"l",
    "a list made a set often": b"(("
    + b"K\x01" * 200
    + b"l\x94\x8c\x08builtins\x8c\x03set\x93\x94"
    + b"h\x01h\x00\x85R" * 20
    + b"l",
    "a storage read often": b"(B" + struct.pack("<I", len(STORAGE)) + STORAGE + b"\x94"
    b"\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93\x94" + b"h\x01h\x00\x85R" * 30 + b"l",
}


@pytest.mark.parametrize("program", REPEATED.values(), ids=REPEATED)
def test_the_work_that_a_file_can_ask_for_is_bounded(tmp_path, monkeypatch, program):
    (tmp_path / "x").write_bytes(pickled(program))
    read.open_file(tmp_path / "x")
    monkeypatch.setattr(span, "MAX_PIECES", 1500)
    assert "describes over 1500 pieces" in refuses(tmp_path / "x")


def samples(golden):
    """A whole file of every format."""
    found = {path.stem: path.read_bytes() for path in sorted(golden.glob("read_*.pt"))}
    return found | {"safetensors": SAFE, "flax": serialization.msgpack_serialize(FLAX)}


@pytest.mark.parametrize("name", ["read_zip", "read_legacy", "read_edm", "safetensors", "flax"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, pytestconfig, rng, name):
    data = samples(pytestconfig.rootpath / "tests" / "golden")[name]
    for size in {*rng.integers(1, len(data), 150), *range(1, 20), *range(len(data) - 20, len(data))}:
        (tmp_path / "x").write_bytes(data[:size])
        refuses(tmp_path / "x")


@pytest.mark.parametrize("name", ["read_zip", "read_legacy", "read_edm", "safetensors", "flax"])
def test_a_file_with_a_wrong_byte_reads_or_is_refused(tmp_path, pytestconfig, rng, name):
    """No byte leads to an exception of another sort, to a call, or to memory that the file does not have."""
    data = samples(pytestconfig.rootpath / "tests" / "golden")[name]
    for place, value in zip(rng.integers(0, len(data), 300), rng.integers(0, 256, 300), strict=True):
        (tmp_path / "x").write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
        try:
            found = read.open_file(tmp_path / "x").tree
            for tensor in [*read.flatten(found).values(), *read.flatten(getattr(found, "state", found)).values()]:
                assert tensor.read().shape == tensor.shape
        except DmfError as error:
            assert str(error).isprintable()
