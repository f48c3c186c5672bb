"""Conversion end to end: file -> checkpoint -> training, samples, and back to a file."""

import dataclasses
import json
import os
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import cifar10_from
from dmf import main, pretrained
from dmf.config import parse
from dmf.convert import audit
from dmf.convert.command import KINDS, REPORT, convert
from dmf.convert.edm import EDM
from dmf.convert.meanflow_unet import MEANFLOW_UNET
from dmf.convert.rules import constant, linear, plain
from dmf.convert.sit import SIT
from dmf.errors import DmfError
from dmf.evaluation import sampling
from dmf.export.weights import export
from dmf.networks import Condition, DiTConfig, UNetConfig
from dmf.storage import atomic, checkpoint
from dmf.storage.readers import read
from tests import GOLDEN, ROOT, devices, runs
from tests.conversion import export_arrays, needs_torch, recipe_weights, small_noise
from tests.tiny import TINY, UNET, merged

SIT_GIVEN = {"heads": 4}


@pytest.fixture(scope="module")
def weights():
    return recipe_weights(np.load(GOLDEN / "sit_tiny_io.npz"))


@pytest.fixture(scope="module")
def sit(weights, tmp_path_factory):
    """(file, converted directory) of the stored tiny SiT, checked against its stored outputs."""
    folder = tmp_path_factory.mktemp("sit")
    file = folder / "sit.safetensors"
    safetensors.numpy.save_file(weights, file)
    convert(
        "sit", file, folder / "converted", given=SIT_GIVEN, check=str(GOLDEN / "sit_tiny_io.npz")
    )
    return file, folder / "converted"


def random_flow(kind, config, shape, file):
    """Writes random weights of a flow model, in the layout of `kind`, to `file`."""
    network = pretrained.build(config, shape)
    params = small_noise(network.init(jax.random.key(0)))
    flat = {
        k: np.zeros_like(v) if k.split("/")[0] == "interval" else v
        for k, v in audit.flat(params).items()
    }
    safetensors.numpy.save_file(
        export_arrays(kind, config, shape, network, audit.nested(flat)), file
    )


def test_a_conversion_is_a_checkpoint_that_explains_itself(sit, weights, capsys):
    file, folder = sit
    report = json.loads((folder / REPORT).read_text())
    assert report["source"] == {
        "file": "sit.safetensors",
        "format": "safetensors",
        "copy": report["source"]["copy"],
        "sha256": read.sha256(file),
    }
    assert report["network"]["depth"] == 3 and report["image_shape"] == [16, 16, 4]
    assert [c["output"] for c in report["checks"]] == ["out"] and report["checks"][0][
        "relative_l2"
    ] <= 5e-6
    named = [name for row in report["tensors"] for name in row["tensors"]]
    assert sorted(named) == sorted(weights) and len(set(named)) == len(named)
    network, params = pretrained.load(folder)
    leaves = [leaf for row in report["tensors"] for leaf in row["leaves"]]
    assert sorted(leaves) == sorted(audit.flat(params))
    stored = checkpoint.metadata(folder)
    assert (
        stored["source"]["kind"] == "sit"
        and "licence" in stored["source"]
        and "conventions" in stored["source"]
    )
    assert stored["source"]["checks"] == report["checks"]
    data = np.load(GOLDEN / "sit_tiny_io.npz")
    z, t = data["x"].transpose(0, 2, 3, 1), 1 - data["t"]
    want = -data["out"].transpose(0, 2, 3, 1)
    u = jax.jit(network.apply)
    got = u(params, z, t, t, label=data["y"].astype(np.int32))
    assert np.linalg.norm(got - want) <= 5e-6 * np.linalg.norm(want)
    for r in (0 * t, t / 2):
        np.testing.assert_array_equal(u(params, z, r, t, label=data["y"].astype(np.int32)), got)


def test_a_conversion_comes_back_as_it_was(sit, weights, tmp_path):
    _, folder = sit
    found = export(folder, tmp_path / "back.safetensors")
    assert set(found) == set(weights)
    again = safetensors.numpy.load_file(tmp_path / "back.safetensors")
    folded = {"t_embedder.mlp.0.weight", "pos_embed"}
    for name, x in again.items():
        if name.startswith("final_layer.linear"):  # the sigma half is not kept
            x, want = (a.reshape(4, 8, -1)[:, :4] for a in (x, weights[name]))
            np.testing.assert_array_equal(x, want)
        elif name in folded:
            np.testing.assert_allclose(x, weights[name], atol=1e-6, rtol=0)
        else:
            np.testing.assert_array_equal(x, weights[name])


@pytest.mark.parametrize("copied", ["sit", "dmf"])
def test_a_trained_interval_branch_survives_the_round_trip(sit, tmp_path, copied):
    _, folder = sit
    network, params = pretrained.load(folder)
    params = small_noise(params)
    config, shape = pretrained.described(checkpoint.metadata(folder))
    checkpoint.save_weights(tmp_path / "tuned", params, checkpoint.metadata(folder), {})
    tensors = export(tmp_path / "tuned", tmp_path / "tuned.safetensors", kind=copied)
    given = SIT_GIVEN if copied == "sit" else {}
    convert(copied, tmp_path / "tuned.safetensors", tmp_path / "again", given=given, check="none")
    again = pretrained.load(tmp_path / "again")[1]
    for (name, a), b in zip(audit.flat(again).items(), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(
            a, b, atol=0 if copied == "dmf" or "t_embedder/mlp_0" not in name else 2e-7, rtol=0
        )
    licence = json.loads((tmp_path / "again" / REPORT).read_text())["licence"]
    assert licence == SIT.licence  # the authors are the same in any layout
    assert len(tensors) == (42 + 4 if copied == "sit" else len(audit.flat(params)))


@needs_torch
def test_a_pt_file_is_what_torch_reads(sit, tmp_path, weights):
    import torch

    found = export(sit[1], tmp_path / "back.pt")
    state = torch.load(tmp_path / "back.pt", weights_only=True)
    assert set(state) == set(found) == set(weights)
    for name, x in state.items():
        np.testing.assert_array_equal(x.numpy(), found[name])


@needs_torch
def test_without_stored_outputs_pytorch_is_asked(sit, tmp_path, capsys):
    report = convert("sit", sit[0], tmp_path / "out", given=SIT_GIVEN)
    assert (
        report["checks"][0]["against"].startswith("PyTorch")
        and report["checks"][0]["relative_l2"] <= 5e-6
    )
    assert "check     out against PyTorch" in capsys.readouterr().out


TINY_DIT = DiTConfig(depth=1, width=32, heads=2, patch=4, num_classes=10)
TINY_UNET = UNetConfig(
    channels=16,
    channel_mult=(1,),
    blocks=1,
    attention_resolutions=(8,),
    dropout=0.3,
    augment_dim=6,
    interval_init="zero",
)


@pytest.mark.parametrize(
    ("kind", "config", "given", "base"),
    [(SIT, TINY_DIT, {"heads": 2}, TINY), (MEANFLOW_UNET, TINY_UNET, {"dropout": 0.3}, UNET)],
    ids=["sit", "meanflow_unet"],
)
def test_the_curriculum_starts_from_a_converted_flow_model(kind, config, given, base, tmp_path):
    """Step 0 is the flow model bit for bit, for any r; all kinds of stages train.

    The result goes back to PyTorch.
    """
    random_flow(kind, config, (8, 8, 1), tmp_path / "flow.safetensors")
    convert(kind.name, tmp_path / "flow.safetensors", tmp_path / "flow", given=given, check="none")
    network, flow = pretrained.load(tmp_path / "flow")
    values = merged(
        base,
        init=str(tmp_path / "flow"),
        curriculum=dict(stages=3, length=6.0, pretrain_length=0.0),
    )
    run = runs.open_run(parse(values), tmp_path / "run")
    start = runs.begin(run)
    run.close()
    z, t = (
        jax.random.normal(jax.random.key(0), (4, 8, 8, 1)),
        np.linspace(0.1, 1, 4, dtype=np.float32),
    )
    given = Condition(augment=np.ones((4, 6), np.float32))
    if config.kind == "dit":
        given = Condition(label=np.arange(4, dtype=np.int32))
    v = jax.jit(network.apply)(flow, z, t, t, condition=given)
    assert np.std(v) > 0.01
    for r in (t, 0.3 * t, 0 * t):
        np.testing.assert_array_equal(
            jax.jit(run.network.apply)(start.params, z, r, t, condition=given), v
        )
    runs.train(parse(values), tmp_path / "run")
    tensors = export(tmp_path / "run", tmp_path / "u.safetensors")  # in the layout it came in
    assert any(name.startswith(("h_embedder", "map_layer0")) for name in tensors)
    convert(kind.name, tmp_path / "u.safetensors", tmp_path / "u", given=given, check="none")
    tuned = pretrained.load(tmp_path / "run")[1]
    assert not np.array_equal(jax.tree.leaves(tuned)[0], jax.tree.leaves(flow)[0])
    for a, b in zip(
        jax.tree.leaves(pretrained.load(tmp_path / "u")[1]), jax.tree.leaves(tuned), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-7, rtol=0)


def test_starting_from_another_network_or_other_images_is_refused_and_leaves_no_trace(
    sit, tmp_path
):
    values = merged(TINY, init=str(sit[1]), curriculum=dict(pretrain_length=0.0))
    with pytest.raises(
        DmfError,
        match=r"its network differs: config.network.depth: 3 -> 1; .*expected the same network",
    ):
        runs.train(parse(values), tmp_path / "run")
    # No leaf shows the size of the images.
    random_flow(SIT, TINY_DIT, (16, 16, 1), tmp_path / "large.safetensors")
    convert(
        "sit", tmp_path / "large.safetensors", tmp_path / "large", given={"heads": 2}, check="none"
    )
    values = merged(TINY, init=str(tmp_path / "large"), curriculum=dict(pretrain_length=0.0))
    with pytest.raises(
        DmfError, match=r"its images are \(16, 16, 1\); expected \(8, 8, 1\), as in digits"
    ):
        runs.train(parse(values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_init_claims_no_origin(tmp_path):
    # From a start that ended before its first checkpoint.
    (tmp_path / "origin.json").write_text('{"kind": "sit"}')
    run = runs.open_run(parse(TINY), tmp_path)
    run.close()
    assert not (tmp_path / "origin.json").exists()


def test_a_converted_directory_has_no_average(sit, tmp_path):
    with pytest.raises(DmfError, match="has no EMA: expected ema = 0 or none, got 709000"):
        pretrained.load(sit[1], ema=709e3)


def test_what_a_converted_directory_may_be_called(sit, tmp_path, monkeypatch):
    """It may be a relative name, end in a slash, or be a link.

    It may not be a file, have too long a name, or lie in a folder that is not there.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".a.partial_notes").mkdir()  # somebody else's
    (tmp_path / "link").symlink_to(tmp_path / "place")
    for out in ("a", "b/", "link"):
        convert("sit", sit[0], out, given=SIT_GIVEN, check="none")
        pretrained.load(out)
    assert (tmp_path / "place" / "params").is_dir() and (tmp_path / ".a.partial_notes").is_dir()
    (tmp_path / "file").write_text("")
    for out, said in {
        "file": "is there already and a file",
        "n" * 300: "cannot be made",
        "none/x": "cannot be made",
    }.items():
        with pytest.raises(DmfError, match=said):
            convert("sit", sit[0], out, given=SIT_GIVEN, check="none")


def test_a_converted_flow_model_is_sampled(sit, tmp_path, capsys):
    out = sampling.write_samples(sit[1], [1, 3], 4, "euler", str(tmp_path / "grid.png"))
    assert out.stat().st_size > 500
    with pytest.raises(DmfError, match="holds converted weights, without data to score against"):
        sampling.write_scores(sit[1], [1], 4)


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


def test_the_command_line_knows_the_kinds():
    assert list(main.KINDS) == list(KINDS)
    assert all(main.KINDS[name] for name in KINDS) and all(
        k.licence and k.conventions and k.copies for k in KINDS.values()
    )


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


def test_half_precision_is_lifted_and_said(sit, weights, tmp_path):
    half = {
        name: np.asarray(x, jnp.bfloat16) if name != "pos_embed" else x
        for name, x in weights.items()
    }
    safetensors.numpy.save_file(half, tmp_path / "half.safetensors")
    report = convert(
        "sit", tmp_path / "half.safetensors", tmp_path / "out", given=SIT_GIVEN, check="none"
    )
    notes = {row["tensors"][0]: row["note"] for row in report["tensors"] if row["tensors"]}
    assert notes["x_embedder.proj.bias"] == "cast from bfloat16 to float32"
    found = audit.flat(pretrained.load(tmp_path / "out")[1])["x_embedder/proj/bias"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.asarray(half["x_embedder.proj.bias"], np.float32))


def test_an_orbax_directory_of_a_flax_trainer_is_read_leaf_by_leaf(tmp_path):
    """flax.training.checkpoints writes a MeanFlow train state; it takes the average alone."""
    import optax
    from flax.training import checkpoints, train_state

    class State(train_state.TrainState):
        ema_params: dict

    with np.load(GOLDEN / "meanflow_dit_tiny_io.npz") as data:
        ema = audit.nested({name.replace(".", "/"): x for name, x in recipe_weights(data).items()})
        given = {"heads": int(data["heads"]), "resolution": 8}
    params = jax.tree.map(lambda x: x + 1, ema)
    state = State.create(apply_fn=None, params=params, tx=optax.adam(1e-3), ema_params=ema)
    checkpoints.save_checkpoint_multiprocess(tmp_path / "ck", state, 5)
    source = tmp_path / "ck" / "checkpoint_5"
    check = str(GOLDEN / "meanflow_dit_tiny_io.npz")
    report = convert("meanflow_dit", source, tmp_path / "out", given=given, check=check)
    assert report["source"]["format"] == "orbax" and report["source"]["copy"] == "ema"
    assert report["checks"][0]["relative_l2"] <= 5e-6 and len(report["source"]["sha256"]) == 64
    for file in (source / "d").iterdir():
        file.write_bytes(file.read_bytes()[:10])
    for file in (source / "ocdbt.process_0" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(DmfError, match="checkpoint_5.* cannot be read: .*; expected an"):
        convert("meanflow_dit", source, tmp_path / "bad", given=given, check="none")
    assert not (tmp_path / "bad").exists()


TINY_EDM = UNetConfig(
    channels=8,
    channel_mult=(1, 2),
    blocks=1,
    attention_resolutions=(),
    augment_dim=0,
    embedding_mult=1,
    resample="box",
    time_input="log_sigma",
    precond="edm",
    sigma_data=0.75,
)


def test_an_aligned_network_leaves_in_our_own_layout_and_its_source_is_told_as_it_was(tmp_path):
    """In the source's layout it would be read with the embedding that it no longer has."""
    random_flow(EDM, TINY_EDM, (8, 8, 3), tmp_path / "edm.safetensors")
    plain = convert("edm", tmp_path / "edm.safetensors", tmp_path / "plain", check="none")
    assert plain["network"]["sigma_data"] == 0.75  # no weight shows it, so an export carries it
    report = convert(
        "edm", tmp_path / "edm.safetensors", tmp_path / "aligned", check="none", align_steps=200
    )
    assert report["network"]["time_input"] == "log_sigma" and report["alignment"]["steps"] == 200
    config, _ = pretrained.described(checkpoint.metadata(tmp_path / "aligned"))
    assert config.time_input == "t" and config.embedding_mult == 2
    exported = export(tmp_path / "aligned", tmp_path / "aligned.safetensors")
    assert "map_layer0.weight" in exported and "model.map_layer0.weight" not in exported
    convert("dmf", tmp_path / "aligned.safetensors", tmp_path / "again", check="none")
    pairs = zip(
        *(jax.tree.leaves(pretrained.load(tmp_path / name)[1]) for name in ("aligned", "again")),
        strict=True,
    )
    assert all(np.array_equal(a, b) for a, b in pairs)
    with pytest.raises(
        DmfError, match="network.time_input is 't': expected 'log_sigma', as in weights of kind edm"
    ):
        export(tmp_path / "aligned", tmp_path / "wrong.safetensors", kind="edm")


def test_a_config_takes_the_network_of_a_converted_directory(tmp_path):
    """configs/cifar10_from.py:DIRECTORY starts a run from an aligned EDM network, bit for bit."""
    random_flow(
        EDM,
        dataclasses.replace(TINY_EDM, channel_mult=(1, 1)),
        (32, 32, 3),
        tmp_path / "edm.safetensors",
    )
    convert("edm", tmp_path / "edm.safetensors", tmp_path / "edm", check="none", align_steps=10)
    values = cifar10_from.get_config(str(tmp_path / "edm")).to_dict()
    assert values["data"]["augment"] == 0 and values["curriculum"]["stages"] == 10
    run = runs.open_run(
        parse(merged(values, data=dict(mock=True), batch_size=32)), tmp_path / "run"
    )
    start = runs.begin(run)
    run.close()
    stored = checkpoint.metadata(tmp_path / "run" / "checkpoints" / "0")
    assert stored["config"]["network"]["precond"] == "edm" and stored["source"]["kind"] == "edm"
    for a, b in zip(
        jax.tree.leaves(start.params),
        jax.tree.leaves(pretrained.load(tmp_path / "edm")[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_an_alignment_that_cannot_be_is_refused_before_the_work(sit, tmp_path, capsys):
    with pytest.raises(DmfError, match="network.kind is 'dit': expected 'unet'"):
        convert("sit", sit[0], tmp_path / "out", given=SIT_GIVEN, check="none", align_steps=10)
    assert not capsys.readouterr().out and not list(tmp_path.iterdir())
