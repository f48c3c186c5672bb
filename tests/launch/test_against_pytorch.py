"""The comparison with PyTorch times equal networks and losses, and refuses different ones."""

import argparse
import importlib.util
import json

import numpy as np
import pytest

from tests import ROOT

torch = pytest.importorskip(
    "torch", reason="torch is not installed: nothing to compare with (pip install torch)"
)

ARGUMENTS = dict(
    depth=1, width=32, heads=2, dit_batch=4, channels=8, blocks=1, size=8, unet_batch=4
)


@pytest.fixture
def script():
    path = ROOT / "launch" / "tables" / "against_pytorch.py"
    spec = importlib.util.spec_from_file_location("against_pytorch", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_both_networks_are_ours_and_another_one_is_refused(script, monkeypatch, name):
    monkeypatch.setattr(script, "CASES", ())
    ours, model = script.build(name, argparse.Namespace(**ARGUMENTS))
    found = script.check_same(ours, model)
    assert set(found) == {"u"} and found["u"] <= 5e-6
    with torch.no_grad():
        model.interval.get_parameter("weight" if name == "unet" else "mlp_2.weight")[0, 0] += 0.02
    with pytest.raises(SystemExit, match="u differs by .* expected 1e-05 or less"):
        script.check_same(ours, model)


def test_it_writes_a_row_per_case_after_the_losses_agreed(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "CASES", (("discrete", 0.75), ("jvp", 0.25)))
    flags = [f"--{key}={value}" for key, value in ARGUMENTS.items()]
    out = tmp_path / "out.json"
    script.main(["--networks=dit", "--rounds=1", f"--out={out}", *flags])
    found = json.loads(out.read_text())["dit"]
    cases = ("discrete 0.75", "jvp 0.25")
    assert set(found["differences"]) == {
        "u",
        *(f"{what} of {case}" for what in ("loss", "gradient") for case in cases),
    }
    assert json.loads(out.read_text())["device"] == "cpu"
    assert [(r["kind"], r["r_neq_t"]) for r in found["steps"]] == [
        ("discrete", 0.75),
        ("jvp", 0.25),
    ]
    for row in found["steps"]:
        assert row["ratio"] == pytest.approx(row["torch_ms"] / row["ours_ms"])


def test_a_target_that_is_not_held_fixed_is_refused(script, monkeypatch):
    monkeypatch.setattr(script, "CASES", (("flow", 0.0), ("jvp", 0.25)))
    ours, model = script.build("dit", argparse.Namespace(**ARGUMENTS))
    assert script.check_same(ours, model)["gradient of flow 0"] <= 1e-5
    held = script.residual

    def lost(model, rows, kind, pairs):
        if kind == "flow":
            return held(model, rows, kind, pairs)
        z, r, t, v = rows  # as `residual` has it, without its detach
        with script.sdpa_kernel(script.SDPBackend.MATH):
            u, dudt = script.jvp(model, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
        return u - (v - (t - r)[:, None, None, None] * dudt)

    monkeypatch.setattr(script, "residual", lost)
    with pytest.raises(
        SystemExit, match="^gradient of jvp 0.25 differs by .* expected 0.0001 or less"
    ):
        script.check_same(ours, model)


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--dit_batch=6", "dit: .*of batch_size 6 is"), ("--unet_batch=0", "unet: .*= 0: ")],
)
def test_a_batch_that_does_not_come_out_is_one_line(script, flag, said):
    flags = [f"--{key}={value}" for key, value in ARGUMENTS.items()]
    with pytest.raises(SystemExit, match=f"^error: {said}.*expected"):
        script.main([*flags, flag])


def test_a_step_of_pytorch_moves_weights_and_average(script):
    ours, model = script.build("dit", argparse.Namespace(**ARGUMENTS))
    start = {key: x.clone() for key, x in model.state_dict().items()}
    run = script.TorchStep(model, ours.config)
    loss = run(torch.zeros(4, 4, 32, 32), "discrete", 0.25)
    assert np.isfinite(loss) and loss > 0
    moved = {key: (x - start[key]).abs().max().item() for key, x in model.state_dict().items()}
    # Adam's first step has the size of the rate in every direction.
    # The average follows by a thousandth, or starts at the weights.
    assert moved["blocks_0.mlp.fc2.weight"] == pytest.approx(script.RATE, rel=0.01)
    assert set(run.ema.module.state_dict()) == set(start)
