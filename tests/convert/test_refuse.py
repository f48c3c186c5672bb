"""Weight files that are hostile, damaged or none: nothing in them is run, and each is refused in one sentence."""

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from flax import serialization

from dmf.convert import native
from dmf.errors import DmfError
from dmf.storage.readers import read, span, torchfile, tree
from tests.storage.test_read import F32, FLAX, SAFE, entry, safetensors_bytes, same


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


def tensor_program(
    size=(2, 3), stride=(3, 1), offset=0, count=6, metadata=b"", cls="FloatStorage", view=b""
):
    """A pickle of one tensor over storage 0, as PyTorch writes it."""
    numbers = [pickle.dumps(x, 2)[2:-1] for x in (offset, size, stride)]
    storage = (
        b"("
        + text("storage")
        + name_of("torch", cls)
        + text("0")
        + text("cpu")
        + pickle.dumps(count, 2)[2:-1]
        + view
        + b"tQ"
    )
    call = (
        name_of("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + storage
        + b"".join(numbers)
        + b"\x89N"
        + metadata
        + b"tR"
    )
    return pickled(b"}", text("w"), call, b"s")


def test_the_tensor_program_is_one_that_reads(tmp_path):
    (tmp_path / "x").write_bytes(
        zipped(tensor_program(), data_0=F32.tobytes()[:24], byteorder=b"little")
    )
    same(read.open_file(tmp_path / "x").tree["w"], F32.reshape(-1)[:6].reshape(2, 3))


class Touch:
    """Pickles as a call that would leave a file behind, were it made."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def stream(program, keys=(), data=b"", version=1001, little_endian=True):
    """PyTorch's older stream around the pickle of an object."""
    head = (torchfile.MAGIC, version, {"protocol_version": 1001, "little_endian": little_endian})
    return b"".join(pickle.dumps(x, 2) for x in head) + program + pickle.dumps(list(keys), 2) + data


def nested(data):
    return pickled(
        name_of("torch.storage", "_load_from_bytes")
        + b"B"
        + struct.pack("<I", len(data))
        + data
        + b"\x85R"
    )


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
    assert f"asks for {os.system.__module__}.system; refused, nothing of it was run" in refuses(
        tmp_path / "x.pt"
    )
    assert not marker.exists()


NAMESPACE = name_of("argparse", "Namespace") + b")\x81"
DTYPE = name_of("numpy", "dtype") + text("f4") + b"\x85R"
ARRAY = (
    name_of("numpy._core.multiarray", "_reconstruct")
    + name_of("numpy", "ndarray")
    + b"K\x00\x85C\x01b\x87R"
)
PERSISTENT = (
    name_of("torch_utils.persistence", "_reconstruct_persistent_obj")
    + b"}("
    + text("class_name")
    + text("Loss")
    + text("state")
    + b"}u\x85R"
)
PICKLES = {
    "eval": (pickled(name_of("builtins", "eval"), text("1"), b"\x85R"), "asks for builtins.eval"),
    "getattr": (
        pickled(name_of("builtins", "getattr"), NAMESPACE, text("x"), b"\x86R"),
        "a method of getattr with (Made, str)",
    ),
    "getattr of a name": (
        pickled(name_of("builtins", "getattr"), PERSISTENT, b"K\x01\x86R"),
        "a method of getattr with (Made, 1)",
    ),
    "partial": (pickled(name_of("functools", "partial")), "asks for functools.partial"),
    "python 2 name": (pickled(b"c__builtin__\napply\n"), "asks for builtins.apply"),
    "nested attribute": (
        pickled(name_of("torch", "nn.modules.linear.Linear")),
        "asks for torch.nn.modules.linear.Linear",
    ),
    "look-alike": (
        pickled(name_of("torch._utils", "_rebuild_tensor_v2\n")),
        "_rebuild_tensor_v2?; refused",
    ),
    "long name": (pickled(b"c" + b"a" * 400 + b"\nb\n"), "aaa...; refused"),
    "reconstructor": (
        pickled(name_of("copyreg", "_reconstructor")),
        "asks for copyreg._reconstructor",
    ),
    "foreign class": (pickled(name_of("models", "Net"), b")\x81"), "asks for models.Net"),
    "a name that is no text": (pickled(b"K\x01K\x02\x93"), "STACK_GLOBAL requires str"),
    "INST": (pickled(b"(" + text("1") + b"ios\nsystem\n"), "opcode 0x69"),
    "OBJ": (pickled(b"(" + name_of("argparse", "Namespace") + b"o"), "opcode 0x6f"),
    "NEWOBJ_EX": (pickled(name_of("argparse", "Namespace"), b")}\x92"), "opcode 0x92"),
    "extension registry": (pickled(b"\x82\x01"), "opcode 0x82"),
    "out-of-band buffer": (pickled(b"\x97"), "opcode 0x97"),
    "unknown opcode": (pickled(b"\xfe"), "opcode 0xfe"),
    "text protocol": (pickled(b"I5\n"), "opcode 0x49"),
    "newer protocol": (b"\x80\x09N.", "unsupported pickle protocol: 9"),
    "call of no function": (pickled(text("os.system"), b")R"), "a call with (str, tuple)"),
    "call of a type": (pickled(name_of("torch", "float32"), b")R"), "a call of a type with ()"),
    "new object of a function": (
        pickled(name_of("_codecs", "encode"), b")\x81"),
        "a text as bytes with ()",
    ),
    "fields for a function": (pickled(name_of("torch", "Size"), b"}b"), "a BUILD with (Global)"),
    "fields for a list": (pickled(b"]}b"), "a BUILD with (list)"),
    "items for text": (pickled(text("a"), text("k"), b"Ns"), "'str' object does not support item assignment"),
    "member of a tuple": (pickled(b")Na"), "'tuple' object has no attribute 'append'"),
    "a huge name": (
        pickled(
            b"\x8d" + struct.pack("<Q", 600) + b"torch.nn.modules.a" + b"a" * 582,
            text("A"),
            b"\x93",
        ),
        "asks for torch.nn.modules.aaaa",
    ),
    "a tensor of nine parts": (
        pickled(name_of("torch._utils", "_rebuild_tensor_v2"), b"(", b"K\x01" * 9, b"tR"),
        "a tensor with (1, 1, 1, 1, 1, 1, 1, 1, ...)",
    ),
    "bytes of a number": (
        pickled(name_of("builtins", "bytes"), b"K\x05\x85R"),
        "a byte string with (5)",
    ),
    "a dictionary of three": (
        pickled(name_of("collections", "OrderedDict"), b"](](K\x01K\x01K\x01ee\x85R"),
        "too many values to unpack",
    ),
    "a tuple as key": (pickled(b"})Ns"), "a key of type tuple"),
    "a list of the text protocol": (pickled(b"(l"), "opcode 0x6c"),
    "a list as key": (pickled(b"}]Ns"), "a key of type list"),
    "a huge key": (pickled(b"}\x8a\x09" + b"\x01" * 9 + b"Ns"), "a key of type int"),
    "a huge integer": (pickled(b"\x8b\xff\xff\xff\x7f"), "opcode 0x8b"),
    "negative size": (pickled(b"T\xff\xff\xff\xff"), "BINSTRING pickle has negative byte count"),
    "8 EiB of bytes": (
        pickled(b"\x8e" + b"\xff" * 7 + b"\x7f"),
        "announces 9223372036854775807 bytes",
    ),
    "8 EiB of text": (
        pickled(b"\x8d" + b"\xff" * 7 + b"\x7f"),
        "announces 9223372036854775807 bytes",
    ),
    "empty stack": (pickled(b"R"), "pop from empty list"),
    "no mark": (pickled(b"t"), "pop from empty list"),
    "unknown memo": (pickled(b"h\x07"), "Memo value not found at index 7"),
    "two objects": (pickled(b"NN"), "objects left over"),
    "text of another code": (pickled(b"\x8c\x01\xff"), "can't decode byte 0xff"),
    "a list within itself": (
        pickled(b"]\x94h\x00a"),
        "nests objects over 100 deep or within themselves",
    ),
    "deep nesting": (pickled(b"]" * 5000 + b"a" * 4999), "nests objects over 100 deep"),
    "persistent id in a bare pickle": (pickled(text("os"), b"Q"), "a persistent id with (str)"),
    "bytes after the end": (pickled(b"N") + b"cos\nsystem\n", "goes on for 11 bytes"),
    "source without state": (
        pickled(
            name_of("torch_utils.persistence", "_reconstruct_persistent_obj"),
            b"}" + text("class_name") + b"Ns\x85R",
        ),
        "a persistent object with (dict)",
    ),
    "giant array": (
        pickled(ARRAY, b"(K\x01\x8a\x06\0\0\0\0\0\x01\x85" + DTYPE + b"\x89C\x04abcdtb"),
        "holds 4 bytes, 1 values",
    ),
    "wide NumPy number": (
        pickled(name_of("numpy._core.multiarray", "scalar"), DTYPE, b"C\x08abcdefgh\x86R"),
        "a NumPy number",
    ),
    "storage in a storage": (
        nested(stream(nested(stream(pickled(b"N"))))),
        "a storage as bytes with (Span)",
    ),
    "bytes that are no storage": (nested(pickled(b"N")), "not what torch.save makes of a storage"),
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
STRIDES = pickle.dumps((3, 1), 2)[2:-1]
OFFSET = GOOD.index(b"PK\1\2") + 42  # of the first member in the table of contents
FAR = (
    GOOD[: OFFSET - 12]
    + struct.pack("<H", 12)
    + GOOD[OFFSET - 10 : OFFSET]
    + b"\xff" * 4
    + GOOD[OFFSET + 4 : OFFSET + 14]
)
FAR += (
    struct.pack("<HHQ", 1, 8, 2**63)
    + GOOD[OFFSET + 14 : -10]
    + struct.pack("<I", len(GOOD) - OFFSET + 32)
    + GOOD[-6:]
)
TABLE = b"PK\1\2\x14\x03\x14\0\0\0\0\0"  # begins an entry of the table of contents: versions, flags, method
ZIPS = {
    "compressed": (
        zipped(tensor_program(), zipfile.ZIP_DEFLATED, data_0=VALUES),
        "data.pkl is compressed",
    ),
    "compressed to its own length": (damaged(GOOD, TABLE, TABLE[:-2] + b"\x08\0"), "is compressed"),
    "size of the unpacked bytes": (
        damaged(GOOD, *[struct.pack("<II", 24, n) for n in (24, 2**31)]),
        "data/0 is compressed",
    ),
    "two members of one name": (
        damaged(zipped(tensor_program(), data_0=VALUES, data_1=VALUES), b"data/1", b"data/0"),
        "two members",
    ),
    "name in the table only": (
        GOOD.replace(b"x/data/0", b"x/data/1", 1),
        "and header b'x/data/1' differ",
    ),
    "no storage": (zipped(tensor_program()), "names storage 0, which the archive lacks"),
    "short storage": (
        zipped(tensor_program(), data_0=VALUES[:20]),
        "x/data/0: holds 20 bytes; expected 6 values of float32",
    ),
    "storage of objects": (
        zipped(tensor_program(cls="QInt8Storage"), data_0=VALUES),
        "asks for torch.QInt8Storage",
    ),
    "flipped bit": (damaged(GOOD, VALUES, VALUES[:9] + b"\x7f" + VALUES[10:]), "x/data/0: damaged"),
    "big-endian": (zipped(tensor_program(), data_0=VALUES, byteorder=b"big"), "another byte order"),
    "TorchScript": (zipped(tensor_program(), **{"constants.pkl": b""}), "TorchScript"),
    "npz": (
        zipped(b"").replace(b"data.pkl", b"data.npy"),
        "is a zip archive with x/data.npy; expected a state_dict of torch.save",
    ),
    "some other zip": (
        zipped(b"").replace(b"data.pkl", b"word.xml"),
        "a zip archive with x/word.xml",
    ),
    "checkpoint in a zip": (
        zipped(bytes(9), zipfile.ZIP_DEFLATED).replace(b"data.pkl", b"net.ckpt"),
        "(unpack an archive first)",
    ),
    "flipped bit of the pickle": (
        damaged(GOOD, STRIDES, b"K\1" + STRIDES[2:]),
        "Bad CRC-32 for file 'x/data.pkl'",
    ),
    "member beyond 2^63": (FAR, "is no whole zip archive (cannot fit"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "a zip archive with nothing"),
    "table beyond the file": (
        GOOD[:-10] + struct.pack("<I", 2**31) + GOOD[-6:],
        "is no whole zip archive (Bad offset",
    ),
    "beyond the storage": (
        zipped(tensor_program(offset=1), data_0=VALUES),
        "6 values; expected float32 of shape (2, 3)",
    ),
    "strides beyond it": (
        zipped(tensor_program(stride=(4, 1)), data_0=VALUES),
        "with strides (4, 1)",
    ),
    "strides that repeat": (
        zipped(tensor_program(size=(2**20, 2**20), stride=(0, 0)), data_0=VALUES),
        "6 values; expected float32 of shape (1048576, 1048576) with strides (0, 0)",
    ),
    "negative stride": (
        zipped(tensor_program(stride=(-3, 1), offset=3), data_0=VALUES),
        "strides (-3, 1)",
    ),
    "negative size": (zipped(tensor_program(size=(-2, 3)), data_0=VALUES), "shape (-2, 3)"),
    "negative offset": (zipped(tensor_program(offset=-1), data_0=VALUES), "from value -1"),
    "endless empty": (
        zipped(tensor_program(size=(0, 2**60), stride=(1, 1)), data_0=VALUES),
        "of sane extent",
    ),
    "too few strides": (zipped(tensor_program(stride=(1,)), data_0=VALUES), "strides (1) from"),
    "33 dimensions": (
        zipped(tensor_program(size=(1,) * 33, stride=(1,) * 33), data_0=VALUES),
        "shape (1, 1, 1, 1, 1, 1, 1, 1, ...)",
    ),
    "text for a size": (zipped(tensor_program(size=("2", 3)), data_0=VALUES), "shape (str, 3)"),
    "negated view": (
        zipped(tensor_program(metadata=b"}" + text("neg") + b"\x88s"), data_0=VALUES),
        "a tensor with",
    ),
}


@pytest.mark.parametrize(("data", "words"), ZIPS.values(), ids=ZIPS)
def test_zip_archives_that_are_refused(tmp_path, data, words):
    (tmp_path / "x.pt").write_bytes(data)
    assert words in refuses(tmp_path / "x.pt")


def test_a_long_table_of_contents_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "x.pt").write_bytes(GOOD)
    monkeypatch.setattr(torchfile, "MAX_DIRECTORY", 50)
    assert "its table of contents takes" in refuses(tmp_path / "x.pt")


def test_truth_values_are_true_or_false_whatever_the_byte(tmp_path):
    program = tensor_program(size=(3,), stride=(1,), count=3, cls="BoolStorage")
    (tmp_path / "x").write_bytes(zipped(program, data_0=b"\0\1\2"))
    same(read.open_file(tmp_path / "x").tree["w"], np.array([False, True, True]))


OLD, COUNTED = tensor_program(view=b"N"), struct.pack("<q", 6) + VALUES
TWICE = pickled(
    b"](",
    *(
        tensor_program(view=b"N", size=(1,), stride=(1,), cls=c)[2:-1]
        for c in ("FloatStorage", "IntStorage")
    ),
    b"e",
)
STREAMS = {
    "other count": (
        stream(OLD, "0", struct.pack("<q", 5) + VALUES),
        "storage 0: holds 5 values; expected 24 bytes of float32",
    ),
    "bytes missing": (stream(OLD, "0", COUNTED[:-1]), "announces 24 bytes of storage 0"),
    "key missing": (stream(OLD, "", COUNTED), "lists other storages than its 1 tensors need"),
    "key of none": (stream(OLD, "01", COUNTED), "lists other storages than its 1 tensors need"),
    "key twice": (stream(OLD, "00", COUNTED * 2), "lists other storages than its 1 tensors need"),
    "keys that are no texts": (
        stream(OLD, [0], COUNTED),
        "lists other storages than its 1 tensors need",
    ),
    "bytes left over": (stream(OLD, "0", COUNTED + b"a"), "goes on for 1 bytes"),
    "big-endian": (stream(OLD, "0", COUNTED, little_endian=False), "another version or byte order"),
    "other version": (stream(OLD, "0", COUNTED, version=1000), "another version or byte order"),
    "view of a storage": (
        stream(tensor_program(view=b")"), "0", COUNTED),
        "a persistent id with (tuple)",
    ),
    "one storage of two types": (stream(TWICE, "0", COUNTED), "storage 0: has two sizes or types"),
}


@pytest.mark.parametrize(("data", "words"), STREAMS.values(), ids=STREAMS)
def test_older_streams_that_are_refused(tmp_path, data, words):
    (tmp_path / "x").write_bytes(stream(OLD, "0", COUNTED))
    same(read.open_file(tmp_path / "x").tree["w"], F32.reshape(-1)[:6].reshape(2, 3))
    (tmp_path / "x").write_bytes(data)
    assert words in refuses(tmp_path / "x")


SAFES = {
    "overlap": (
        safetensors_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6)),
        "invalid offset for tensor `b`",
    ),
    "gap": (
        safetensors_bytes({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 4, 6)}, bytes(6)),
        "invalid offset for tensor `b`",
    ),
    "beyond the file": (
        safetensors_bytes({"a": entry("U8", [9], 0, 9)}, bytes(6)),
        "file not fully covered",
    ),
    "backwards": (
        safetensors_bytes({"a": entry("U8", [2], 4, 2)}, bytes(6)),
        "invalid offset for tensor `a`",
    ),
    "negative": (
        safetensors_bytes({"a": entry("U8", [8], -2, 6)}, bytes(6)),
        "invalid value: integer `-2`",
    ),
    "bytes left over": (
        safetensors_bytes({"a": entry("U8", [2], 0, 2)}, bytes(6)),
        "file not fully covered",
    ),
    "shape": (
        safetensors_bytes({"a": entry("F32", [2], 0, 6)}, bytes(6)),
        "invalid shape, data type, or offset",
    ),
    "smaller shape": (
        safetensors_bytes({"a": entry("F32", [1], 0, 8)}, bytes(8)),
        "invalid shape, data type, or offset",
    ),
    "giant shape": (
        safetensors_bytes({"a": entry("U8", [2**40, 2**40], 0, 6)}, bytes(6)),
        "overflow computing buffer size",
    ),
    "type": (
        safetensors_bytes({"a": entry("OBJ", [6], 0, 6)}, bytes(6)),
        "unknown variant `OBJ`",
    ),
    "float as offset": (
        safetensors_bytes({"a": entry("U8", [6], 0, 6.0)}, bytes(6)),
        "invalid type: floating point `6.0`",
    ),
    "metadata": (safetensors_bytes({"__metadata__": {"a": 1}}), "invalid type: integer `1`, expected a string"),
    "a name twice": (safetensors_bytes(b'{"a": 1, "a": 2}'), "invalid type: integer `1`"),
    "deep header": (safetensors_bytes(b'{"a":' + b"[" * 100_000), "recursion limit exceeded"),
    "long header": (struct.pack("<Q", 2**30) + b"{}", "header too large"),
    "header cut off": (struct.pack("<Q", 2**20) + b"{}", "invalid header length"),
    "many digits": (safetensors_bytes(b'{"a": ' + b"1" * 5000 + b"}"), "number out of range"),
    "a name of two lines": (
        safetensors_bytes({"a\nb": entry("U8", [9], 0, 9)}),
        "file not fully covered",
    ),
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
    "objects": (array(b"\x91\x01", b"\xa6object", b"a"), "an array in another form; expected a shape, one of"),
    "shape": (
        array(b"\x91\x02", b"\xa5uint8", b"a"),
        "1 values; expected uint8 of shape (2)",
    ),
    "smaller shape": (
        array(b"\x91\x00", b"\xa5uint8", b"a"),
        "holds 1 bytes, 1 values; expected uint8 of shape (0)",
    ),
    "negative shape": (array(b"\x91\xff", b"\xa5uint8", b"a"), "shape (-1)"),
    "incomplete input": (
        array(b"\x91\x01", b"\xa5uint8", b"a").replace(b"\xc7\x0c", b"\xc7\x0b"),
        "incomplete input",
    ),
    "4 GiB announced": (b"\x81\xa1w\xc6\xff\xff\xff\xff", "incomplete input"),
    "4 G entries": (b"\xdf\xff\xff\xff\xff\xa1w\xc0", "4294967295 exceeds max_map_len"),
    "deep nesting": (b"\x81\xa1w" * 5000 + b"\xc0", "StackError"),
    "deep list": (b"\x81\xa1w" + b"\x91" * 5000 + b"\xc0", "StackError"),
    "deep shape": (b"\x81\xa1w" + b"\xd4\x01\x93" * 5000, "incomplete input"),
    "deep key": (b"\x81" * 5000, "StackError"),
    "a name twice": (b"\x82\xa1w\xc0\xa1w\xc0", "a map has the key w; expected names, each used once"),
    "a map as key": (b"\x81\x80\xc0", "a map has the key dict"),
    "no such code": (b"\x81\xa1w\xc1", "FormatError"),
    "bytes after the end": (b"\x81\xa1w\xc0\xc0", "received extra data"),
    "endless empty chunks": (
        b"\x83\xb9__msgpack_chunked_array__\xc3\xa5shape\x82\xa10\x00\xa11\xcf"
        + b"\xff" * 8
        + b"\xa6chunks"
        b"\x81\xa10" + array(b"\x91\x00", b"\xa5uint8", b"")[3:],
        "of sane extent",
    ),
    "chunks missing": (
        b"\x82\xb9" + b"__msgpack_chunked_array__\xc3\xa5shape\x81\xa10\x02",
        "an array in 0 chunks",
    ),
}


@pytest.mark.parametrize(("data", "words"), FLAXES.values(), ids=FLAXES)
def test_flax_checkpoints_that_are_refused(tmp_path, data, words):
    (tmp_path / "x").write_bytes(data)
    assert words in refuses(tmp_path / "x")


LOOKS = {
    "html": (
        b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title>",
        "an HTML or XML page, such as a login",
    ),
    "xml": (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "an HTML or XML page",
    ),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "a git-lfs pointer",
    ),
    "json": (b'{"weight_map": {}}', "a JSON text, such as the index"),
    "gzip": (b"\x1f\x8b\x08", "a compressed archive (unpack it first)"),
    "tar": (bytes(257) + b"ustar", "a tar archive"),
    "tensorflow": (b"model_checkpoint_path: ", "the text beside a TensorFlow checkpoint"),
    "anything": (b"hello world", "begins with 68 65 6c 6c 6f 20 77 6f; expected safetensors"),
    "one byte": (b"h", "begins with 68;"),
    "half a pickle": (b"\x80", "announces 1 bytes of a pickle"),
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
    assert "cannot be read ([Errno 13] Permission denied); expected a readable file" in refuses(
        tmp_path / "x"
    )


def test_a_file_that_changes_is_not_read_on(tmp_path):
    (tmp_path / "x").write_bytes(SAFE)
    tensor = read.open_file(tmp_path / "x").tree["a"]
    (tmp_path / "x").write_bytes(SAFE[:-1] + b"x")
    os.utime(tmp_path / "x", (1, 1))
    with pytest.raises(DmfError, match="was changed while in use"):
        tensor.read()


class Unread(dict):
    """Entries that must not be looked at."""

    def items(self):
        raise AssertionError("names were made before they were counted")


def test_names_are_counted_before_they_are_made(monkeypatch):
    with pytest.raises(DmfError, match="a name of over 1000 letters"):
        read.flatten({"n" * 1001: Unread(a=1)})
    empty = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    with pytest.raises(DmfError, match="expected a pickled torch.nn.Module"):
        read.module_tensors(
            read.Inert("M", {**empty, "_modules": {"n" * 1001: read.Inert("M", empty)}})
        )
    monkeypatch.setattr(tree, "MAX_VISITS", 10)
    with pytest.raises(DmfError, match="over 10 entries"):
        read.flatten(Unread.fromkeys(range(20)))


def test_fields_that_objects_share_are_made_a_tree_once(tmp_path):
    state = b"}" + text("a") + b"Ns\x94"
    (tmp_path / "x").write_bytes(pickled(b"](", NAMESPACE, state, b"b", NAMESPACE, b"h\x00be"))
    found = read.open_file(tmp_path / "x").tree
    assert (
        found[0] == read.Inert("argparse.Namespace", {"a": None})
        and found[0].state is found[1].state
    )


def test_deep_metadata_of_ours_is_none():
    weights = read.Weights("x", "safetensors", {}, {"dmf": "[" * 100_000})
    assert native.described(weights) == {}


def test_shared_lists_do_not_grow_without_end(tmp_path, monkeypatch):
    """Thirty lists, each twice the one before: a billion names from a few hundred bytes."""
    monkeypatch.setattr(tree, "MAX_VISITS", 10_000)
    (tmp_path / "x").write_bytes(
        pickled(b"](]\x94", *(b"]\x94(h%ch%ce" % (i, i) for i in range(30)), b"e")
    )
    weights = read.open_file(tmp_path / "x")
    with pytest.raises(DmfError, match="has over"):
        read.flatten(weights.tree)
    bottom = {"_parameters": {}, "_buffers": {}, "_modules": {}}
    for _ in range(30):
        child = read.Inert("M", bottom)
        bottom = {"_parameters": {}, "_buffers": {}, "_modules": {"a": child, "b": child}}
    with pytest.raises(DmfError, match="has over"):
        read.module_tensors(read.Inert("M", bottom))


STORAGE_ID = (
    b"("
    + text("storage")
    + name_of("torch", "FloatStorage")
    + text("0")
    + text("cpu")
    + b"K\x01NtQ"
)
STORAGE = stream(pickled(STORAGE_ID), "0", struct.pack("<q", 1) + bytes(4))
REPEATED = {
    "many objects": b"](" + b"]" * 2000 + b"e",
    "one long text": b"\x8d" + struct.pack("<Q", 100_000) + b"a" * 100_000,
    "a text encoded often": b"](\x8d\xa0\x0f\0\0\0\0\0\0"
    + b"a" * 4000
    + b"\x94"
    + text("latin1")
    + b"\x94"
    b"\x8c\x07_codecs\x8c\x06encode\x93\x94" + b"h\x02h\x00h\x01\x86R" * 100 + b"e",
    "a list made a set often": b"](]("
    + b"K\x01" * 200
    + b"e\x94\x8c\x08builtins\x8c\x03set\x93\x94"
    + b"h\x01h\x00\x85R" * 20
    + b"e",
    "a storage read often": b"](B" + struct.pack("<I", len(STORAGE)) + STORAGE + b"\x94"
    b"\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93\x94" + b"h\x01h\x00\x85R" * 30 + b"e",
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
    for size in {
        *rng.integers(1, len(data), 150),
        *range(1, 20),
        *range(len(data) - 20, len(data)),
    }:
        (tmp_path / "x").write_bytes(data[:size])
        refuses(tmp_path / "x")


@pytest.mark.parametrize("name", ["read_zip", "read_legacy", "read_edm", "safetensors", "flax"])
def test_a_file_with_a_wrong_byte_reads_or_is_refused(tmp_path, pytestconfig, rng, name):
    """No byte leads to an exception of another sort, to a call, or to memory that the file does not have."""
    data = samples(pytestconfig.rootpath / "tests" / "golden")[name]
    for place, value in zip(
        rng.integers(0, len(data), 300), rng.integers(0, 256, 300), strict=True
    ):
        (tmp_path / "x").write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
        try:
            found = read.open_file(tmp_path / "x").tree
            for tensor in [
                *read.flatten(found).values(),
                *read.flatten(getattr(found, "state", found)).values(),
            ]:
                assert tensor.read().shape == tensor.shape
        except DmfError as error:
            assert str(error).isprintable()
