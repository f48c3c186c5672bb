"""Two real processes as one run: they train, are killed, and go on together or not at all."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest

from dmf import processes
from dmf.config import parse
from dmf.errors import DmfError
from dmf.storage import checkpoint
from tests import ROOT
from tests import devices as flags_of
from tests.runs import rows, train
from tests.tiny import TINY, Setup, merged

STEPS = 12
# Two programs, so that there is one switch. The network is just wide enough to be split.
VALUES = merged(
    TINY,
    network=dict(width=64),
    optimizer=dict(eps=1e-4),
    mesh=dict(replica=1, fsdp=0),
    curriculum=dict(stages=2, kinds=("all_pairs", "discrete"), length=12.0, pretrain_length=0.0),
    run=dict(score_steps=(1,)),
)
CONFIG = "from dmf.config import complete\ndef get_config():\n    return complete({values!r})\n"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Group:
    """The processes of one run, `devices` fake devices in all."""

    def __init__(self, folder, workdir, count, devices=4, flags=(), environment=None, own=None):
        config = folder / "config.py"
        config.write_text(CONFIG.format(values=VALUES))
        command = [sys.executable, "main.py", f"--config={config}", *flags]
        workdirs = workdir if isinstance(workdir, list) else [workdir] * count
        own = own or [()] * count
        address = f"127.0.0.1:{free_port()}"
        self.processes = []
        for i in range(count):
            there = (
                {}
                if count == 1
                else {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
            )
            there |= {} if count == 1 else {"JAX_PROCESS_ID": str(i)}
            there["XLA_FLAGS"] = flags_of(devices // count)
            self.processes.append(
                subprocess.Popen(
                    [*command, f"--workdir={workdirs[i]}", *own[i]],
                    cwd=ROOT,
                    env={**os.environ, **there, **(environment or {})},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def finish(self, timeout=240):
        """[(exit status, standard output, standard error)] of each process."""
        try:
            said = [p.communicate(timeout=timeout) for p in self.processes]
        finally:
            self.kill()
        return [(p.returncode, *text) for p, text in zip(self.processes, said, strict=True)]

    def kill(self):
        for p in self.processes:
            if p.poll() is None:
                p.send_signal(signal.SIGKILL)
                p.communicate()

    def wait_for_step(self, workdir, step):
        """Returns once that step is logged; fails if the run ends or says nothing for long."""
        end = time.monotonic() + 240
        path = workdir / "metrics.jsonl"
        while len(path.read_text().splitlines() if path.exists() else []) < step:
            assert time.monotonic() < end and all(p.poll() is None for p in self.processes), [
                p.communicate(timeout=20)[1][-2000:] for p in self.processes if p.poll() is not None
            ]
            time.sleep(0.01)

    def kill_after_step(self, workdir, step):
        """Kills all once that step is logged."""
        self.wait_for_step(workdir, step)
        self.kill()


def final(workdir):
    like = Setup(VALUES, devices=2).state(randomise=False)
    saved = checkpoint.Checkpoints(workdir, 2, range(STEPS + 1), {"config": {}})
    found = saved.restore_latest(like)
    saved.close()
    assert int(found.step) == STEPS
    return jax.tree.map(np.asarray, (found.params, found.ema))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    train(parse(VALUES), workdir)
    return workdir


def test_two_processes_killed_go_on_as_one_and_then_as_two(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    Group(tmp_path, workdir, 2).kill_after_step(
        workdir, 7
    )  # the boundary at 6 has waited for the save of step 3
    written = {p.name for p in (workdir / "checkpoints" / "3" / "params").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= written  # each its part
    Group(tmp_path, workdir, 1).kill_after_step(workdir, 8)
    first, second = Group(tmp_path, workdir, 2).finish()
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "fsdp 4, 2 process(es)" in first[1] and "resuming" in first[1]
    assert second[1].replace("[Gloo]", "").count("step") == 0  # one of them speaks
    for a, b in zip(*(jax.tree.leaves(final(w)) for w in (uninterrupted, workdir)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    mine, theirs = rows(workdir, "metrics.jsonl"), rows(uninterrupted, "metrics.jsonl")
    # Each loss fits the batch and the noise of its step: no step was taken twice or left out.
    assert [row["step"] for row in mine] == [*range(1, STEPS + 1)]
    assert [row["loss"] for row in mine] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)
    assert rows(workdir, "scores.jsonl") == rows(uninterrupted, "scores.jsonl")
    assert {path.name for path in (workdir / "samples").glob("*.png")} == {
        path.name for path in (uninterrupted / "samples").glob("*.png")
    }


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ("cuda", AssertionError(), "JAX_PLATFORMS=cuda does not work: no such device is visible; "),
        (
            "tpu",
            RuntimeError("no\nlibtpu"),
            "JAX_PLATFORMS=tpu does not work: RuntimeError: no lib",
        ),
    ],
)
def test_devices_that_are_not_there_are_one_line(asked, error, message, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    monkeypatch.setattr(jax, "devices", mock.Mock(side_effect=error))
    with pytest.raises(DmfError, match=message) as found:
        processes.find_devices()
    text, tpu = str(found.value), "worker.sh install tpu"
    assert text.endswith(", or JAX_PLATFORMS=cpu") and "\n" not in text
    assert (tpu in text) == (asked == "tpu") and ("gpu.sh --install" in text) == (asked == "cuda")


def test_a_plugin_that_does_not_fit_the_driver_is_refused_in_one_line(monkeypatch, caplog):
    def devices():  # jax tells it in its log, with a traceback, and takes the CPU
        try:
            raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")
        except RuntimeError:
            logging.getLogger("jax._src.xla_bridge").exception(
                "Jax plugin configuration error: Exception when calling jax_plugins.initialize()"
            )
        return [SimpleNamespace(platform="cpu")]

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    line = "the plugin of the GPU does not work: RuntimeError: CUDA driver version is insufficient"
    with pytest.raises(DmfError, match=line):
        processes.find_devices()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    processes.find_devices()
    assert caplog.text == ""


def test_an_error_of_one_process_ends_both_with_its_line(tmp_path):
    # Only process 0 opens the work directory's own files; the other one hears of it.
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text("{")
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    began = time.monotonic()
    for status, _, error in Group(tmp_path, workdir, 2).finish():
        assert status == 2
        assert "config.json line 1: no JSON" in error and "Traceback" not in error
    assert time.monotonic() - began < 200


SAYS = """
from dmf import processes
processes.start()
mine = processes.jax.process_index()
# Short texts; just below and just above one exchange; two bytes a letter; of one process only.
texts = [("short", ""), ("x" * 4088, "y" * 4089), ("", "\\u00e9" * 9000 + "!")]
texts.append(("[" + "1234567, " * 5000 + "0]", ""))
for text in texts:
    assert processes.all_say(text[mine]) == list(text), [len(t) for t in text]
    assert processes.first_says(text[mine]) == text[0]
print("known to all")
"""


def test_processes_tell_each_other_texts_of_any_length():
    there = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
        "XLA_FLAGS": flags_of(1),
    }
    how = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command, env = [sys.executable, "-c", SAYS], {**os.environ, **there}
    both = [
        subprocess.Popen(command, env={**env, "JAX_PROCESS_ID": str(i)}, **how) for i in range(2)
    ]
    for process in both:
        said, error = process.communicate(timeout=240)
        assert process.returncode == 0 and "known to all" in said, error[-2000:]


def test_a_directory_that_is_not_shared_is_noticed(tmp_path):
    for status, _, error in Group(tmp_path, [tmp_path / "one", tmp_path / "two"], 2).finish():
        assert status == 2
        assert (
            f"process 1 of 2: --workdir={tmp_path / 'two'} does not show what process 0 wrote there"
            in error
        )


def test_processes_that_were_told_different_things_do_not_start(tmp_path):
    for status, _, error in Group(
        tmp_path, tmp_path / "run", 2, own=[(), ("--config.seed=7",)]
    ).finish():
        assert (
            status == 2 and "process 1 of 2 has another config, data or jax than process 0" in error
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_one_process_that_dies_takes_the_other_with_it(tmp_path):
    workdir = tmp_path / "run"
    group = Group(tmp_path, workdir, 2, flags=("--config.curriculum.length=1e6",))
    group.wait_for_step(workdir, 2)
    group.processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    first, second = group.finish(timeout=240)
    assert first[0] != 0 and second[0] != 0
    assert time.monotonic() - began < 200


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        (
            {"JAX_NUM_PROCESSES": "2"},
            (),
            "JAX_NUM_PROCESSES without JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID: expected all",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
                "JAX_NUM_PROCESSES": "two",
                "JAX_PROCESS_ID": "0",
            },
            (),
            "JAX_NUM_PROCESSES = 'two': expected a number of at least 0",
        ),
        ({}, ("--distributed",), "the processes of the run cannot find each other"),
    ],
)
def test_processes_that_cannot_find_each_other_say_so(tmp_path, environment, flags, message):
    ((status, _, error),) = Group(
        tmp_path, tmp_path / "run", 1, flags=flags, environment=environment
    ).finish()
    assert status == 2 and message in error and "Traceback" not in error
