"""Runs with a frozen teacher: resumed, on many devices, and with a teacher that does not fit."""

import shutil

import jax
import numpy as np
import pytest

from dmf import networks, pretrained
from dmf.config import parse
from dmf.errors import DmfError
from dmf.networks import DiTConfig, MLPConfig
from dmf.storage import checkpoint
from tests import runs
from tests.conversion import small_noise
from tests.test_step import largest_difference
from tests.tiny import MLP, TINY, Setup, linear_network, merged

BOTH = dict(velocity="teacher", tangent="teacher")
STAGES = dict(
    stages=2,
    kinds=("teacher_path", "central"),
    length=6.0,
    pretrain_length=0.0,
    length_unit="steps",
)
VALUES = merged(
    MLP,
    loss=BOTH,
    curriculum=STAGES,
    teacher=dict(states=4, pairs=3),
    run=dict(checkpoint_every_steps=2, keep_checkpoints=9),
)


def stored(folder, config, seed=3):
    params = small_noise(networks.build(config, (8, 8, 1)).init(jax.random.key(seed)))
    checkpoint.save_weights(folder, params, pretrained.metadata(config, (8, 8, 1), {}), {})
    return str(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(values of a run, the work directory that it left)."""
    folder = tmp_path_factory.mktemp("taught")
    place = stored(folder / "teacher", MLPConfig(width=32, depth=1))
    values = merged(VALUES, teacher=dict(VALUES["teacher"], place=place))
    runs.train(parse(values), folder / "run")
    return values, folder / "run"


def weights(folder):
    return jax.tree.leaves(pretrained.load(folder, 0.0)[1])


@pytest.mark.parametrize("left", [2, 4])  # inside either stage
def test_a_run_with_a_teacher_resumes_in_the_same_bits(finished, tmp_path, left):
    values, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    for n in runs.steps_on_disk(tmp_path / "run"):
        if n > left:
            shutil.rmtree(tmp_path / "run" / "checkpoints" / str(n))
    runs.train(parse(values), tmp_path / "run")
    assert runs.rows(tmp_path / "run", "starts.jsonl")[-1]["step"] == left
    for ours, theirs in zip(weights(tmp_path / "run"), weights(folder), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert runs.rows(folder, "metrics.jsonl")[1]["kind"] == "teacher_path"


def test_another_teacher_is_refused(finished, tmp_path):
    values, folder = finished
    place = stored(tmp_path / "other", MLPConfig(width=32, depth=1), seed=4)
    shutil.copytree(folder, tmp_path / "run")
    shutil.copytree(place, tmp_path / "same")
    taught = dict(VALUES["teacher"], place=place)
    with pytest.raises(DmfError, match="data.teacher.manifest_sha256: .* -> "):
        runs.train(parse(merged(values, teacher=taught)), tmp_path / "run", allow_change=True)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            dict(width=48),
            "config.teacher.place = .*: its network differs: config.network.width: 48",
        ),
        (
            dict(num_classes=7),
            "config.teacher.place = .*num_classes: 7 -> 10; expected the same netw",
        ),
        (None, "config.teacher.place = '' with config.curriculum.kinds = 'teacher_path': expected"),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_line(tmp_path, network, message):
    place, base = "", VALUES
    if network and "num_classes" in network:
        base = merged(VALUES, network=TINY["network"])
        theirs = DiTConfig(depth=1, width=32, heads=2, patch=4, **network)
    else:
        theirs = MLPConfig(**dict(width=32, depth=1) | (network or {}))
    if network:
        place = stored(tmp_path / "teacher", theirs)
    values = merged(base, teacher=dict(VALUES["teacher"], place=place))
    with pytest.raises(DmfError, match=message) as error:
        runs.train(parse(values), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", STAGES["kinds"])
def test_five_steps_by_a_teacher_are_equal_on_one_device_and_eight_that_share_it(kind):
    values = merged(TINY, loss=BOTH, curriculum=STAGES, optimizer=dict(eps=1e-4))
    values |= dict(teacher=dict(states=4, pairs=3, guidance=2.0))
    found = []
    for devices, mesh in ((1, {}), (8, dict(replica=2, fsdp=4))):
        setup = Setup(merged(values, mesh=mesh), devices)
        setup.network = linear_network()
        found.append(setup.run(kind, 5))
    (one, metrics), (eight, told) = found
    assert told["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert largest_difference(one.params, eight.params) < 1e-5
