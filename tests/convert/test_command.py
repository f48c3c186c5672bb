"""Conversion end to end: file -> checkpoint -> training, samples, and back to a file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dmf import pretrained
from dmf.config import parse
from dmf.convert import audit
from dmf.convert.command import KINDS, REPORT, convert
from dmf.convert.meanflow_unet import MEANFLOW_UNET
from dmf.convert.sit import SIT
from dmf.errors import DmfError
from dmf.evaluation import draw, sampling
from dmf.export.weights import export
from dmf.networks import Condition, DiTConfig, UNetConfig
from dmf.run import flags
from dmf.storage import checkpoint
from dmf.storage.readers import read
from tests import GOLDEN, runs
from tests.conversion import needs_torch, recipe_weights, small_noise
from tests.convert.flows import SIT_GIVEN, random_flow
from tests.tiny import TINY, UNET, merged


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
    ("kind", "config", "given", "base", "stages"),
    [
        (SIT, TINY_DIT, {"heads": 2}, TINY, dict(stages=3, length=6.0)),
        # One program: a U-Net of every kind is slow to compile, and test_step trains them.
        (
            MEANFLOW_UNET,
            TINY_UNET,
            {"dropout": 0.3},
            merged(UNET, network=dict(attention_resolutions=(8,))),
            dict(stages=1, kinds=("discrete",), length=2.0),
        ),
    ],
    ids=["sit", "meanflow_unet"],
)
def test_the_curriculum_starts_from_a_converted_flow_model(
    kind, config, given, base, stages, tmp_path
):
    """Step 0 is the flow model bit for bit, for any r; stages train.

    The result goes back to PyTorch.
    """
    random_flow(kind, config, (8, 8, 1), tmp_path / "flow.safetensors")
    convert(kind.name, tmp_path / "flow.safetensors", tmp_path / "flow", given=given, check="none")
    network, flow = pretrained.load(tmp_path / "flow")
    values = merged(
        base,
        init=str(tmp_path / "flow"),
        curriculum=dict(pretrain_length=0.0, **stages),
    )
    run = runs.open_run(parse(values), tmp_path / "run")
    start = runs.begin(run)
    run.close()
    z, t = (
        jax.random.normal(jax.random.key(0), (4, 8, 8, 1)),
        np.linspace(0.1, 1, 4, dtype=np.float32),
    )
    condition = Condition(augment=np.ones((4, 6), np.float32))
    if config.kind == "dit":
        condition = Condition(label=np.arange(4, dtype=np.int32))
    v = jax.jit(network.apply)(flow, z, t, t, condition=condition)
    assert np.std(v) > 0.01
    for r in (t, 0.3 * t, 0 * t):
        np.testing.assert_array_equal(
            jax.jit(run.network.apply)(start.params, z, r, t, condition=condition), v
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
    out = draw.write_samples(
        sit[1], [1, 3], 4, str(tmp_path / "grid.png"), choice=draw.Choice("euler", raw=True)
    )
    assert out.stat().st_size > 500
    with pytest.raises(DmfError, match="holds converted weights, without data to score against"):
        sampling.write_scores(sit[1], [1], 4)


def test_the_command_line_knows_the_kinds():
    assert list(flags.KINDS) == list(KINDS)
    assert all(flags.KINDS[name] for name in KINDS) and all(
        k.licence and k.conventions for k in KINDS.values()
    )


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
