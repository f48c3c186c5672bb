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
from dmf.storage import checkpoint, paths
from tests import ROOT, devices
from tests.tiny import MLP

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
    runs.train(parse(MLP), workdir)
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
    "steps in a digit that is none": (
        lambda d, t: ["--mode=sample", f"--workdir={d}", "--steps=²"],
        "--steps=²: expected positive whole numbers",
    ),
    "steps beyond 32 bits": (
        lambda d, t: ["--mode=sample", f"--workdir={d}", "--steps=2147483648"],
        "--steps=2147483648: expected positive whole numbers",
    ),
    "a count beyond 32 bits": (
        lambda d, t: ["--mode=score", f"--workdir={d}", "--count=99999999999"],
        "flag --count=99999999999: 99999999999 is not an integer in the range [0, 2147483647]",
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


GOOD = "from dmf.config import complete\ndef get_config():\n    return complete({})\n"
FILES = {
    "raises": ("def get_config():\n    return 1 / 0\n", ", line 2: ZeroDivisionError: division"),
    "raises a value error": ("\nint('x')\n", ", line 2: ValueError: invalid literal for int()"),
    "reads what is not there": ("open('/none')\n", ": a file that it opens is missing ("),
    "does not parse": ("\ndef get_config(:\n", ", line 2: SyntaxError: invalid syntax"),
    "imports what is missing": (
        "import os\nimport nothing_here\n",
        ", line 2: ModuleNotFoundError: No module named 'nothing_here'; expected",
    ),
    "imports what does not parse": ("from own_configs import torn\n", ", line 1 of "),
    "ends the program": ("import sys\nsys.exit(0)\n", ", line 2: it ends the program"),
    "has no function": ("", "has no attribute 'get_config'; expected a file with get_config()"),
    "returns nothing": ("def get_config():\n    pass\n", ": get_config() returned None; expected"),
    "returns a dict": ("def get_config():\n    return {'seed': 1}\n", "returned {'seed': 1}; "),
    "is no text": (b"\xff\xfe\x00", ": "),
    "takes no argument": (GOOD, ": TypeError: get_config() takes 0 positional arguments"),
}


@pytest.mark.parametrize("field", [[], ["--config.seed=2"]], ids=["plain", "with a field"])
@pytest.mark.parametrize("name", FILES)
def test_a_fault_of_a_config_file_is_told_with_its_line(name, field, tmp_path, monkeypatch):
    content, message = FILES[name]
    file = tmp_path / "own_configs" / "mine.py"
    file.parent.mkdir()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (file.parent / "torn.py").write_text("1 +\n")
    given = f"{file}:argument" if name == "takes no argument" else str(file)
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # another file of this name
    text = refused(f"--config={given}", *field)
    assert text.startswith(f"--config={given}") and message in text, text
    assert len(text.splitlines()) == 1 and "Traceback" not in text and len(text) < 400


@pytest.mark.parametrize("flag", cli.PATHS)
def test_home_and_variables_mean_the_same_in_every_path(flag, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "a b")
    argv = ["main.py", f"--{flag}=~/$PLACE/${{PLACE}}.png"]
    with mock.patch.object(sys, "argv", argv), flagsaver.flagsaver():
        cli.parse(argv)
        assert flags.FLAGS[flag].value == f"{tmp_path}/a b/a b.png"
    assert "$NOT_SET is not set" in refused(f"--{flag}=$NOT_SET/x")
    assert "the path has 299 bytes" in refused(f"--{flag}={'x' * 299}")


def test_a_path_that_is_there_keeps_its_dollar(monkeypatch, tmp_path):
    monkeypatch.setenv("PLACE", "other")
    (tmp_path / "a$PLACE$NOT_SET").mkdir()
    assert paths.expanded(f"{tmp_path}/a$PLACE$NOT_SET") == f"{tmp_path}/a$PLACE$NOT_SET"
    assert paths.expanded(f"{tmp_path}/b$PLACE") == f"{tmp_path}/bother"


def test_a_config_is_found_at_home(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(GOOD)
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["main.py", "--config=~/mine.py", "--config.init=~/none"]
    with mock.patch.object(sys, "argv", argv), flagsaver.flagsaver():
        cli.parse(argv)
        config = cli.config()
    assert config.init == "~/none"  # as it was given: it is stored, and compared at the next start
    with pytest.raises(DmfError, match=f"checkpoint {tmp_path}/none: no such file"):
        checkpoint.find(config.init)


@pytest.mark.parametrize("mode", ["sample", "score", "convert", "export"])
def test_an_unfit_name_of_the_result_is_refused(mode, trained, tmp_path):
    words = [f"--mode={mode}", *(["--kind=sit", "--source=x"] if mode == "convert" else [])]
    words += [] if mode == "convert" else [f"--workdir={trained}"]
    ending = {"sample": ".png", "score": ".json"}.get(mode, "")
    assert "expected a name of at most" in refused(*words, f"--out={tmp_path}/{'x' * 240}{ending}")
    (tmp_path / f"out{ending}").mkdir()
    (tmp_path / f"out{ending}" / "kept").touch()
    assert f"{tmp_path}/out{ending}" in refused(*words, f"--out={tmp_path}/out{ending}")
    assert [path.name for path in tmp_path.rglob("*")] == [f"out{ending}", "kept"]


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
