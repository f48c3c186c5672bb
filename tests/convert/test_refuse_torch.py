"""Zip archives and older streams of PyTorch that are hostile or damaged: refused in one line."""

import pickle
import struct
import zipfile

import numpy as np
import pytest

from dmf.storage.readers import read, torchfile
from tests.hostile import pickled, refuses, stream, tensor_program, text, zipped
from tests.storage.test_read import F32, same


def test_the_tensor_program_is_one_that_reads(tmp_path):
    (tmp_path / "x").write_bytes(
        zipped(tensor_program(), data_0=F32.tobytes()[:24], byteorder=b"little")
    )
    same(read.open_file(tmp_path / "x").tree["w"], F32.reshape(-1)[:6].reshape(2, 3))


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
