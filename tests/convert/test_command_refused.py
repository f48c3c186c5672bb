"""Conversions that go wrong: each is one line and leaves nothing."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from dmf import pretrained
from dmf.convert import audit
from dmf.convert.command import convert
from dmf.convert.rules import constant, linear, plain
from dmf.errors import DmfError
from dmf.export.weights import export
from dmf.storage import atomic
from dmf.storage.readers import read
from tests import GOLDEN, ROOT, devices
from tests.convert.flows import SIT_GIVEN


def broken(tmp_path, weights, name):
    """(kind, file, options) of a bad conversion."""
    tensors, file, options = dict(weights), tmp_path / "bad.safetensors", {"given": SIT_GIVEN}
    if name == "missing file":
        return "sit", tmp_path / "none.pt", options
    if name == "a directory":
        return "sit", tmp_path, options
    if name == "lost tensor":
        del tensors["blocks.1.mlp.fc1.bias"]
    if name == "foreign tensor":
        tensors["blocks.1.attn.q_scale"] = np.ones(3, np.float32)
    if name == "wrong shape":
        tensors["blocks.1.mlp.fc1.bias"] = np.ones(7, np.float32)
    if name == "wrong type":
        tensors["blocks.1.mlp.fc1.bias"] = np.ones(384, np.int32)
    if name == "not a number":
        tensors["blocks.1.mlp.fc1.bias"] = np.full(384, np.nan, np.float32)
    if name == "other constants":
        tensors["pos_embed"] = tensors["pos_embed"] + 0.01
    if name == "wrong weights":
        tensors["final_layer.linear.bias"] = tensors["final_layer.linear.bias"] + 1
        options["check"] = str(GOLDEN / "sit_tiny_io.npz")
    if name == "cut check":
        (tmp_path / "cut.npz").write_bytes((GOLDEN / "sit_tiny_io.npz").read_bytes()[:3000])
        options["check"] = str(tmp_path / "cut.npz")
    if name == "check of another kind":
        np.savez(tmp_path / "other.npz", pixels=np.zeros(3))
        options["check"] = str(tmp_path / "other.npz")
    if name == "check of another shape":
        data = np.load(GOLDEN / "sit_tiny_io.npz")
        np.savez(tmp_path / "shape.npz", x=data["x"], t=data["t"], y=data["y"], out=data["out"][:1])
        options["check"] = str(tmp_path / "shape.npz")
    if name == "no such copy":
        options["copy"] = "ema9"
    if name == "unknown field":
        options["given"] = {"heads": 4, "colour": 1}
    if name == "wrong kind":
        options["given"] = {}
    if name == "unread check":
        options["check"] = str(tmp_path / "none.npz")
    safetensors.numpy.save_file(tensors, file)
    if name == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    return ("sd_vae" if name == "wrong kind" else "sit"), file, options


BROKEN = {
    "missing file": "none.pt",
    "a directory": "directory",
    "lost tensor": "tensor blocks.1.mlp.fc1.bias is missing: expected it",
    "foreign tensor": "tensor blocks.1.attn.q_scale [3] has no place",
    "wrong shape": "tensor blocks.1.mlp.fc1.bias has shape [7]: expected [384]",
    "wrong type": "tensor blocks.1.mlp.fc1.bias is int32: expected one of",
    "not a number": "tensor blocks.1.mlp.fc1.bias: 384 of its 384 values are not finite",
    "other constants": "tensor pos_embed: other values than this network computes",
    "cut check": "cut.npz cannot be read (BadZipFile): expected an .npz of plain arrays",
    "check of another kind": (
        "--check: found the arrays pixels; expected inputs of kind sit, such as x, t, h, y"
    ),
    "check of another shape": (
        "forward check of out against shape.npz: shape (1, 4, 16, 16), expected (4, 4, 16, 16)"
    ),
    "wrong weights": "forward check of out against sit_tiny_io.npz: relative L2",
    "no such copy": "copy",
    "unknown field": "colour",
    "unread check": "none.npz cannot be read",
    "cut": "bad.safetensors",
    "wrong kind": "expected the weights of kind sd_vae",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_file_is_one_line_and_leaves_nothing(weights, tmp_path, name):
    kind, file, options = broken(tmp_path, weights, name)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(DmfError) as caught:
        convert(kind, file, tmp_path / "out", **{"check": "none", **options})
    assert BROKEN[name] in str(caught.value) and "\n" not in str(caught.value)
    assert "expected" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_nothing_is_overwritten(sit, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    with pytest.raises(DmfError, match="out is there already and not empty"):
        convert("sit", sit[0], tmp_path / "out", given=SIT_GIVEN, check="none")
    (tmp_path / "u.safetensors").write_text("data")
    with pytest.raises(DmfError, match="u.safetensors is there already"):
        export(sit[1], tmp_path / "u.safetensors")
    with pytest.raises(DmfError, match="expected a file name ending in .safetensors or .pt"):
        export(sit[1], tmp_path / "u.onnx")
    with pytest.raises(
        DmfError, match="kind = edm: the layout of a unet, this is a dit; expected kind = dmf"
    ):
        export(sit[1], tmp_path / "v.safetensors", kind="edm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "u.safetensors"]


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.argv = ["main.py", *sys.argv[1:]]
import runpy
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.parametrize("mode", ["convert", "export"])
def test_a_full_disk_is_one_line_and_leaves_nothing(sit, tmp_path, mode):
    flags = [
        "--mode=convert",
        "--kind=sit",
        f"--source={sit[0]}",
        "--set=heads=4",
        "--check=none",
        f"--out={tmp_path / 'out'}",
    ]
    if mode == "export":
        flags = ["--mode=export", f"--workdir={sit[1]}", f"--out={tmp_path / 'out.safetensors'}"]
    env = {**os.environ, "XLA_FLAGS": devices(1), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0, done.stderr
    assert "could not be written" in done.stderr and not list(tmp_path.iterdir())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 200_000


def test_what_a_killed_conversion_left_is_cleared(sit, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    theirs = atomic.partial(tmp_path / "out").name.rpartition("-")[0]
    for name in (
        f"{theirs}-{dead.pid}",
        f"{theirs}-{dead.pid}.orbax-checkpoint-tmp",
        f"{theirs}-{os.getppid()}",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("data")
    convert("sit", sit[0], tmp_path / "out", given=SIT_GIVEN, check="none")
    # The parent process is still at work.
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{theirs}-{os.getppid()}", "out"]
    pretrained.load(tmp_path / "out")


def test_a_flipped_bit_of_a_converted_directory_is_named(sit, tmp_path):
    subprocess.run(["cp", "-r", sit[1], tmp_path / "copy"], check=True)
    file = max(
        (p for p in (tmp_path / "copy").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DmfError, match=f"file .*{file.name} has .* another checksum"):
        pretrained.load(tmp_path / "copy")


def test_a_leaf_or_a_tensor_twice_is_an_error(weights):
    """A key map that names a thing twice, or not at all, never converts."""
    tensor = read.Tensor((2, 3), np.dtype(np.float32), lambda: np.ones((2, 3), np.float32))
    leaves = {"a/kernel": (3, 2), "b/kernel": (3, 2)}
    good = [linear("a.weight", "a/kernel"), linear("b.weight", "b/kernel")]
    tensors = {"a.weight": tensor, "b.weight": tensor}
    audit.check(good, tensors, leaves, "test")
    cases = {
        "leaf a/kernel is named twice": [*good, linear("c.weight", "a/kernel")],
        "tensor a.weight is named twice": [
            *good,
            constant("a.weight", lambda: np.ones((2, 3)), "ones"),
        ],
        "leaf b/kernel is named by the network or the key map alone": good[:1],
        "leaf c/kernel is named by the network or the key map alone": [
            *good,
            linear("c.weight", "c/kernel"),
        ],
        r"tensor b.weight has shape \[2, 3\]: expected \[3, 2\]": [
            good[0],
            plain("b.weight", "b/kernel"),
        ],
    }
    for message, rules in cases.items():
        with pytest.raises(DmfError, match=message):
            audit.check(rules, tensors, leaves, "test")
    with pytest.raises(DmfError, match="tensor b.weight is missing"):
        audit.check(good, {"a.weight": tensor}, leaves, "test")
