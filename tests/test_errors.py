"""Wrong input to the command line: one clear line that names the thing, and a non-zero exit."""

import os
import re
import subprocess
import sys
from unittest import mock

import pytest
from absl import flags
from absl.testing import flagsaver

from dmf import main
from dmf.errors import DmfError
from dmf.evaluation.protocols import PROTOCOLS
from dmf.method.samplers import SAMPLERS
from dmf.run import flags as cli
from dmf.run import sigterm, start
from tests import ROOT, devices
from tests.tiny import TINY

DIGITS = "--config=configs/digits.py"


def run(*words):
    """(exit status, standard error) of main.py as a process."""
    done = subprocess.run(
        [sys.executable, "main.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "XLA_FLAGS": devices(1)},
    )
    return done.returncode, done.stderr


def refused(*words):
    """The line that main.py prints for these words. It is said in this process: no start."""
    argv = ["main.py", *words]
    # ml_collections looks into sys.argv for the fields of the config.
    with mock.patch.object(sys, "argv", argv), flagsaver.flagsaver():
        with pytest.raises(DmfError) as error:
            main.main(cli.parse(argv))
        return str(error.value)


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    """Runs in the folder of main.py, without a listener to SIGTERM; sys.path is restored."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(start, "_stop", sigterm.Stop())
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work directory with a real, tiny checkpoint."""
    from dmf.config import parse
    from tests import runs

    workdir = tmp_path_factory.mktemp("trained")
    runs.train(parse(TINY), workdir)
    return workdir


def truncated(trained, tmp_path):
    subprocess.run(["cp", "-r", trained / "checkpoints" / "4", tmp_path / "4"], check=True)
    for file in (tmp_path / "4").rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(file.read_bytes()[:100])
    return tmp_path / "4"


def misspelt_file(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(
        "from dmf.config import complete\n"
        "def get_config():\n    return complete(dict(curiculum=dict(stages=3)))\n"
    )
    return path


CASES = {
    "misspelt key in a file": (
        lambda d, t: [f"--config={misspelt_file(t)}"],
        "config.curiculum: no such field; did you mean config.curriculum?",
    ),
    "misspelt flag": (
        lambda d, t: [DIGITS, "--config.batchsize=8"],
        "config.batchsize: no such field; did you mean config.batch_size?",
    ),
    "wrong type": (
        lambda d, t: [DIGITS, "--config.seed=one"],
        "flag --config.seed=one: invalid literal for int()",
    ),
    "unknown variant": (
        lambda d, t: [f"{DIGITS}:cosine"],
        "configs/digits.py:cosine: expected one of dagger, linear",
    ),
    "missing config file": (
        lambda d, t: ["--config=configs/nothing.py"],
        "--config=configs/nothing.py: cannot be read; expected a config file",
    ),
    "empty workdir": (lambda d, t: [DIGITS, "--workdir="], "--workdir= is empty: expected a dir"),
    "no config": (lambda d, t: [f"--workdir={t}"], "--config is missing"),
    "field of another network": (
        lambda d, t: [DIGITS, "--config.network.channels=8"],
        "config.network.channels: expected fields of this config's kind of network",
    ),
    "no sampler": (
        lambda d, t: [DIGITS, f"--workdir={t}", "--config.run.sampler=dpm"],
        "config.run.sampler = 'dpm': expected one of",
    ),
    "flag of another mode": (
        lambda d, t: ["--mode=export", f"--workdir={d}", "--source=x.pt"],
        "--source with --mode=export: expected none, this mode does not read it",
    ),
    "layout of a model folder": (
        lambda d, t: ["--mode=export", f"--workdir={d}", "--kind=dmf", f"--out={t}/model"],
        "--kind with a model folder: expected none, it would not be read",
    ),
    "steps of a file of weights": (
        lambda d, t: ["--mode=export", f"--workdir={d}", "--steps=2", f"--out={t}/u.safetensors"],
        "--steps with weights: expected none, it would not be read",
    ),
    "nothing to convert": (
        lambda d, t: ["--mode=convert", "--kind=sit"],
        "--source is missing: expected it with --mode=convert",
    ),
    "unknown kind": (
        lambda d, t: ["--mode=convert", "--kind=dit", "--source=x", "--out=y"],
        "should be one of <sit|meanflow_dit|",
    ),
    "missing source": (
        lambda d, t: ["--mode=convert", "--kind=sit", f"--source={t}/x.pt", f"--out={t}/y"],
        "x.pt: no such file; expected a file of weights",
    ),
    "fields without values": (
        lambda d, t: ["--mode=convert", "--kind=sit", "--source=x", "--out=y", "--set=heads"],
        "--set=heads: expected fields and values, such as heads=4",
    ),
    "config where the checkpoint has its own": (
        lambda d, t: ["--mode=sample", DIGITS, f"--workdir={d}"],
        "--config with --mode=sample: expected none",
    ),
    "no such directory for the result": (
        lambda d, t: ["--mode=score", f"--workdir={d}", f"--out={t}/none/x.json"],
        "expected a file name ending in .json, in a directory that exists",
    ),
    "q below one": (
        lambda d, t: [DIGITS, f"--workdir={t}", "--config.curriculum.q=0.5"],
        "config.curriculum.q = 0.5: expected a number above 1",
    ),
    "stage without steps": (
        lambda d, t: [DIGITS, f"--workdir={t}", "--config.curriculum.length=2"],
        "stage 0 has no step",
    ),
    "missing checkpoint": (
        lambda d, t: [DIGITS, f"--workdir={t}", "--config.init=nowhere"],
        "checkpoint nowhere: no such file or directory",
    ),
    "truncated checkpoint": (
        lambda d, t: [
            f"{DIGITS}:meanflow",
            f"--workdir={t}/run",
            f"--config.init={truncated(d, t)}",
            "--config.network.depth=1",
            "--config.network.width=32",
            "--config.network.heads=2",
            "--config.network.patch=4",
        ],
        "has 100 bytes and another checksum",
    ),
    "another network": (
        lambda d, t: [f"{DIGITS}:meanflow", f"--workdir={t}", f"--config.init={d}"],
        "its network differs: config.network.depth: 1 -> 3",
    ),
    "image not divisible by patch": (
        lambda d, t: [DIGITS, f"--workdir={t}", "--config.network.patch=3"],
        "patch",
    ),
    "no forward mode": (
        lambda d, t: [
            DIGITS,
            f"--workdir={t}",
            "--config.attention.jvp=cudnn",
            "--config.compute_dtype=bfloat16",
        ],
        "config.attention.derivative = 'cudnn': expected one of xla, chunked",
    ),
    "kernel of another device": (
        lambda d, t: [DIGITS, f"--workdir={t}", "--config.attention.discrete=flash"],
        "config.attention.difference = 'flash': expected a tpu, found a cpu",
    ),
    "half precision kernel": (
        lambda d, t: [DIGITS, f"--workdir={t}", "--config.attention.flow=cudnn"],
        "config.attention.plain = 'cudnn', a kernel of half precision: "
        "expected config.compute_dtype = bfloat16, got float32",
    ),
    "mesh of other devices": (
        lambda d, t: [DIGITS, f"--workdir={t}", "--config.mesh.fsdp=5"],
        "config.mesh.replica = 0 x config.mesh.fsdp = 5: expected factors of the",
    ),
    "not a whole number of rows": (
        lambda d, t: [DIGITS, f"--workdir={t}", "--config.times.r_neq_t_fraction=0.3"],
        "0.296875 or 0.3125 would do",
    ),
    "unwritable work directory": (
        lambda d, t: [DIGITS, "--workdir=/proc/run"],
        "--workdir=/proc/run cannot be written",
    ),
    "unprepared data": (
        lambda d, t: [
            "--config=configs/cifar10.py",
            f"--workdir={t}/w",
            f"--config.data.data_dir={t}/none",
        ],
        "download_and_prepare",
    ),
    "sampling from nothing": (
        lambda d, t: ["--mode=sample", f"--workdir={t}"],
        "expected a step folder with an item 'params'",
    ),
    "steps that are no numbers": (
        lambda d, t: ["--mode=sample", f"--workdir={d}", "--steps=1,x"],
        "--steps=1,x: expected positive whole numbers",
    ),
}

# Some from each place that refuses: absl, the config, the checkpoint, the data, and the devices.
PROCESSES = (
    "misspelt key in a file",
    "wrong type",
    "missing config file",
    "no config",
    "truncated checkpoint",
    "kernel of another device",
    "unprepared data",
)


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_gives_one_clear_line(name, trained, tmp_path):
    flags, message = CASES[name]
    text = refused(*flags(trained, tmp_path))
    assert message in text
    assert len(text.splitlines()) == 1, text
    assert not any(tmp_path.rglob("checkpoints/[0-9]*"))


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_prints_that_line_alone_and_exits_with_2(name, trained, tmp_path):
    flags, message = CASES[name]
    status, text = run(*flags(trained, tmp_path))
    assert status == 2 and message in text, text
    assert text.startswith("error: ") and len(text.strip().splitlines()) == 1, text
    assert not any(tmp_path.rglob("checkpoints/[0-9]*"))


def help_of(*command):
    """(what --help prints, the modules it imports)"""
    command = [sys.executable, "-X", "importtime", *command, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_help_names_every_command_and_flag_and_loads_no_jax():
    text, modules = help_of("main.py")
    assert "python main.py --config=configs/digits.py" in text
    for name, command in main.COMMANDS.items():
        assert f"{name:<16} {command.about}" in text
        for flag in command.flags:  # in the table of commands, and in the list of flags
            assert f"    --{flag} " in text, flag
    for kind, about in cli.KINDS.items():
        assert f"{kind:<16} {about}" in text
    words = re.split(r"[\s,]+", text)
    assert set(PROTOCOLS) | set(SAMPLERS) <= set(words)
    assert tuple(SAMPLERS) == cli.SAMPLERS
    assert max(map(len, text.splitlines())) <= 100
    assert not {"jax", "jaxlib", "tensorflow", "flax", "numpy"} & modules


@pytest.mark.parametrize("word", sorted(main.HELP))
def test_every_way_to_ask_for_help_prints_the_same(word, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main.py", "--mode=sample", word])
    main.run()
    assert capsys.readouterr().out == main.overview() + "\n"
    assert "--helpfull" in main.HELP  # absl's own would have no text, as help.txt has it


def test_every_flag_is_read_by_a_command():
    defined = {flag.name for flag in flags.FLAGS.flags_by_module_dict()["dmf.run.flags"]}
    read = {name for command in main.COMMANDS.values() for name in command.flags}
    assert defined - {"config"} == read - {"config"}


def test_a_config_finds_its_neighbours_from_any_folder(tmp_path):
    """The installed command has no checkout on its path; the config file tells where it is."""
    (tmp_path / "code" / "configs").mkdir(parents=True)
    (tmp_path / "code" / "configs" / "near.py").write_text("SEED = 'none'\n")
    config = tmp_path / "code" / "configs" / "mine.py"
    config.write_text(
        "from configs import near\nfrom dmf.config import complete\n"
        "def get_config():\n    return complete(dict(seed=near.SEED))\n"
    )
    code = "import sys, dmf.main; sys.argv[0] = 'dmf'; dmf.main.run()"
    path = tmp_path / "path"
    path.mkdir()
    (path / "dmf").symlink_to(ROOT / "dmf")
    done = subprocess.run(
        [sys.executable, "-c", code, f"--config={config}", f"--workdir={tmp_path / 'run'}"],
        cwd=path,
        capture_output=True,
        text=True,
    )
    assert "config.seed = 'none'" in done.stderr and done.returncode == 2, done.stderr
