"""Weight files that are hostile, damaged or none: each is refused in one line."""

import os
import struct

import pytest
from flax import serialization

from dmf.convert import native
from dmf.errors import DmfError
from dmf.storage.readers import read, span, tree
from tests.hostile import pickled, refuses
from tests.storage.test_read import FLAX, SAFE, entry, safetensors_bytes

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
    "metadata": (
        safetensors_bytes({"__metadata__": {"a": 1}}),
        "invalid type: integer `1`, expected a string",
    ),
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
    "objects": (
        array(b"\x91\x01", b"\xa6object", b"a"),
        "an array in another form; expected a shape, one of",
    ),
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
    "a name twice": (
        b"\x82\xa1w\xc0\xa1w\xc0",
        "a map has the key w; expected names, each used once",
    ),
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
    with pytest.raises(DmfError, match="a name of over 1000 letters"):
        read.module_tensors(
            read.Inert("M", {**empty, "_modules": {"n" * 1001: read.Inert("M", empty)}})
        )
    monkeypatch.setattr(tree, "MAX_VISITS", 10)
    with pytest.raises(DmfError, match="over 10 entries"):
        read.flatten(Unread.fromkeys(range(20)))


def test_deep_metadata_of_ours_are_refused():
    weights = read.Weights("x", "safetensors", {}, {"dmf": "[" * 100_000})
    with pytest.raises(DmfError, match="its metadata: no JSON .its values are nested too deeply"):
        native.described(weights)
    assert native.described(read.Weights("x", "safetensors", {})) == {}


def test_shared_lists_do_not_grow_without_end(tmp_path, monkeypatch):
    """Thirty lists, each twice the one before it: a billion names in a few hundred bytes."""
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
    """No byte leads to another exception, to a call, or to more memory than the file has."""
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
