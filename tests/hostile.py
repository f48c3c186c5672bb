"""What tests of weight files build by hand: pickles, archives and streams, good and hostile ones."""

import io
import pickle
import struct
import zipfile

import pytest

from dmf.errors import DmfError
from dmf.storage.readers import read, torchfile


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
