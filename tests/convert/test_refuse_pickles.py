"""Pickles that are hostile or damaged: no call in them is made, and each is refused in one line."""

import os
import pickle
import struct
import tracemalloc

import pytest

from dmf.storage.readers import read, span
from tests.hostile import name_of, nested, pickled, refuses, stream, text, zipped


class Touch:
    """Its pickle is a call that leaves a file behind, if somebody makes the call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


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
BOMB = b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60))  # 2**60 empty tuples
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
    "reduce": (
        pickled(name_of("functools", "reduce"), b"K\x01\x85R"),
        "asks for functools.reduce",
    ),
    "python 2 name": (pickled(b"c__builtin__\napply\n", b")R"), "asks for builtins.apply"),
    "nested attribute": (
        pickled(name_of("torch", "_utils._rebuild_qtensor"), b")R"),
        "asks for torch._utils._rebuild_qtensor",
    ),
    "new object of a class of Python's": (
        pickled(name_of("subprocess", "Popen"), b")\x81"),
        "asks for subprocess.Popen",
    ),
    "getattr of a module": (
        pickled(name_of("builtins", "getattr"), name_of("os", "path"), text("join"), b"\x86R)R"),
        "asks for os.path.join",
    ),
    "look-alike": (
        pickled(name_of("torch._utils", "_rebuild_tensor_v2\n")),
        "_rebuild_tensor_v2?; refused",
    ),
    "long name": (pickled(b"c" + b"a" * 400 + b"\nb\n"), "aaa...; refused"),
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
    "items for text": (
        pickled(text("a"), text("k"), b"Ns"),
        "'str' object does not support item assignment",
    ),
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
    "a tuple of endless hash as key": (pickled(BOMB, b"0}h\x3cNs"), "a key of type tuple"),
    "such tuples as keys": (pickled(BOMB, b"0}(h\x3cNu"), "a key of type tuple"),
    "such a tuple in a set": (pickled(BOMB, b"0\x8f(h\x3c\x90"), "a key of type tuple"),
    "such a tuple in a frozen set": (pickled(BOMB, b"0(h\x3c\x91"), "a key of type tuple"),
    "twice the top of the stack": (pickled(b"N2\x86"), "opcode 0x32"),
    "a named persistent id": (pickled(b"Pos\n"), "opcode 0x50"),
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


def test_fields_that_objects_share_are_made_a_tree_once(tmp_path):
    state = b"}" + text("a") + b"Ns\x94"
    (tmp_path / "x").write_bytes(pickled(b"](", NAMESPACE, state, b"b", NAMESPACE, b"h\x00be"))
    found = read.open_file(tmp_path / "x").tree
    assert (
        found[0] == read.Inert("argparse.Namespace", {"a": None})
        and found[0].state is found[1].state
    )


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


def test_announced_sizes_take_no_memory(tmp_path):
    """A memo index of 2**32 - 1, and a frame, a text, bytes and an array of bytes of 2**40."""
    announced = struct.pack("<Q", 2**40)
    (tmp_path / "memo").write_bytes(pickled(b"\x95" + announced + b"Nr" + b"\xff" * 4))
    tracemalloc.start()
    assert read.open_file(tmp_path / "memo").tree is None
    for code in (b"\x8d", b"\x8e", b"\x96"):
        (tmp_path / "size").write_bytes(pickled(code + announced))
        assert "announces 1099511627776 bytes" in refuses(tmp_path / "size")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
