"""The launch scripts of one host, of hosts with GPUs and of Slurm; the README's commands."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dmf import processes
from tests.standins import HARD, ROOT, bench_in, shown, until

FLAGS = ["--config=configs/digits.py", *HARD]
SLURM = """
import shutil
options = [w for w in words if w.startswith("--")][: words.index("launch/cloud/slurm.sh")]
nodes = dict(o[2:].split("=", 1) for o in options).get("nodes", "1")
shutil.copy("launch/cloud/slurm.sh", here + "/spooled")  # a job runs a copy, from another place
there = dict(os.environ, SLURM_JOB_ID="123456", SLURM_SUBMIT_DIR=os.getcwd(), SLURM_NTASKS=nodes)
there["SLURM_JOB_NODELIST"] = "gpu[1-" + nodes + "]"
behind = words[words.index("launch/cloud/slurm.sh") + 1 :]
os.execve(here + "/spooled", ["slurm_script", *behind], there)
"""
SRUN = """
there = dict(os.environ)
while words[0].startswith("--"):
    if words[0].startswith("--export=ALL,"):
        there.update(pair.split("=", 1) for pair in words[0].split(",")[1:])
    words = words[1:]
tasks = [dict(there, SLURM_PROCID=str(i)) for i in range(int(there["SLURM_NTASKS"]))]
ran = [subprocess.Popen(words, env=env) for env in tasks]
sys.exit(max(p.wait() for p in ran))
"""


@pytest.fixture
def ready(tmp_path):
    """A bench with packages that are installed, Slurm and GPUs."""
    (bench,) = bench_in(tmp_path)
    made = bench.root / ".venv" / "bin"
    made.mkdir(parents=True)
    (made / "python").symlink_to(bench.bin / "python3")
    for name in ("", ".cuda12", ".cuda13", ".tpu"):
        (bench.root / ".venv" / f"requirements.txt{name}.done").touch()
    bench.tool("srun", SRUN)
    bench.tool("sbatch", SLURM)
    bench.tool("squeue")
    bench.tool("scontrol")
    bench.tool("nvidia-smi")
    return bench


def slurm_rules(*rules, state="RUNNING"):
    nodes = {"when": "scontrol show hostnames", "out": "gpu1\ngpu2\n", "status": 0}
    driver = {"when": "nvidia-smi", "out": "580.65.06\n580.65.06\n", "status": 0}
    return [*rules, nodes, driver, {"when": "squeue", "out": f"{state}\n", "status": 0}]


def test_a_host_starts_one_program_keeps_what_it_says_and_stops_it(ready):
    ready.program(goes_on=True)
    worker = f"worker {os.uname().nodename}:"
    assert ready("worker.sh", "status")[:2] == (0, f"{worker} none\n")
    status, out, err = ready("worker.sh", "start", *FLAGS)
    assert (status, out) == (0, f"{worker} started python main.py {shown_quoted(FLAGS)}\n"), err
    until(lambda: ready.noted("programs.jsonl"))
    # Once more, as after a connection that broke before it answered; and something else.
    assert ready("worker.sh", "start", *FLAGS)[:2] == (0, f"{worker} running already\n")
    status, _, err = ready("worker.sh", "start", "--config=configs/photos.py")
    assert (
        status == 2
        and err.startswith("error: python main.py --config=configs/digits.py ")
        and err.count("\n") == 1
    )
    assert (
        ready("worker.sh", "status")[1] == f"{worker} running\n"
        and len(ready.noted("programs.jsonl")) == 1
    )
    assert ready("worker.sh", "log")[1] == "step 1\n"
    assert ready("worker.sh", "stop")[1] == f"{worker} halted, status 0\n"
    ready.program(out="weights    there")
    ready("worker.sh", "start", *FLAGS)
    until(lambda: "running" not in ready("worker.sh", "status")[1])
    assert ready("worker.sh", "status")[1] == f"{worker} ended\n"
    assert ready("worker.sh", "log", "1")[1] == f"{os.uname().nodename}: weights    there\n"
    assert (
        (ready.root.parent / "dmf.run" / "log.1")
        .read_text()
        .startswith("step 1\nstopped after step 3")
    )
    assert [words for words, _ in ready.noted("programs.jsonl")] == [FLAGS] * 2


def test_two_starts_at_once_start_one_program(ready):
    ready.program(goes_on=True)
    # The first one is slow: it is still at work when the second one comes.
    mv = ready.bin / "mv"
    mv.write_text('#!/bin/sh\nsleep 0.3\nexec /bin/mv "$@"\n')
    mv.chmod(0o755)
    state = ready.root.parent / "dmf.run"
    state.mkdir()
    (state / "log").write_text("of an earlier start\n")
    (script,) = ready.root.rglob("worker.sh")
    starts = [
        subprocess.Popen(
            [script, "start", *FLAGS],
            cwd=ready.root,
            env=ready.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = sorted(start.communicate(timeout=200)[0].split()[2] for start in starts)
    assert said == ["running", "started"]
    until(lambda: ready.noted("programs.jsonl"))
    assert len(ready.noted("programs.jsonl")) == 1 and not (state / "log.2").exists()


def shown_quoted(words):
    return " ".join(
        w if re.fullmatch(r"[\w./:=,@%+-]+", w) else "'" + w.replace("'", "'\\''") + "'"
        for w in words
    )


def test_a_host_tells_a_crash_a_stop_and_a_restart_of_its_own_from_an_end(ready):
    worker, state = f"worker {os.uname().nodename}:", ready.root.parent / "dmf.run"
    ready.program(status=1, out="RuntimeError: no")
    ready("worker.sh", "start", *FLAGS)
    until(lambda: "running" not in ready("worker.sh", "status")[1])
    assert ready("worker.sh", "status")[1] == f"{worker} failed 1: RuntimeError: no\n"
    ready.program(goes_on=True)
    ready("worker.sh", "start", *FLAGS)
    until(lambda: len(ready.noted("programs.jsonl")) == 2 and (state / "log").read_text())
    (state / "boot").write_text("another\n")
    assert ready("worker.sh", "status")[1] == f"{worker} lost\n"
    shutil.copy("/proc/sys/kernel/random/boot_id", state / "boot")
    os.kill(int((state / "program").read_text()), signal.SIGTERM)
    until(lambda: "running" not in ready("worker.sh", "status")[1])
    assert ready("worker.sh", "status")[1] == f"{worker} stopped\n"


def test_main_py_itself_asked_to_stop_counts_as_stopped(ready):
    # This is main.py and no stand-in, because the scripts look for what it prints when it stops.
    (ready.root / ".venv" / "bin" / "python").unlink()
    (ready.root / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (ready.root / ".venv" / "bin" / "python").chmod(0o755)
    shutil.copy(ROOT / "main.py", ready.root)
    ready(
        "worker.sh",
        "start",
        f"--config={ROOT}/configs/digits.py",
        "--workdir=run",
        PYTHONPATH=str(ROOT),
    )
    program = ready.root.parent / "dmf.run" / "program"
    until(lambda: program.exists() and program.read_text().strip())
    number = int(program.read_text())
    caught = 1 << (signal.SIGTERM - 1)
    until(
        lambda: (
            int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{number}/status").read_text())[1], 16)
            & caught
        )
    )
    os.kill(number, signal.SIGTERM)
    until(lambda: "running" not in ready("worker.sh", "status")[1])
    assert ready("worker.sh", "status")[1] == f"worker {os.uname().nodename}: stopped\n"


@pytest.mark.parametrize(
    ("words", "files"),
    [(["tpu"], ["requirements.txt", "requirements-gcs.txt"]), ([], ["requirements.txt"])],
)
def test_a_worker_of_a_tpu_gets_the_packages_for_buckets_as_well(ready, words, files):
    for path in (ready.root / ".venv").glob("*.done"):
        path.unlink()
    assert ready("worker.sh", "install", *words)[0] == 0
    installs = [call for call in ready.calls("python") if "install" in call]
    assert [call[call.index("-r") + 1] for call in installs] == files
    assert [word for call in installs for word in call if word.startswith("jax")] == [
        "jax[tpu]"
    ] * len(words)


def test_an_environment_that_could_not_be_made_is_made_again(ready):
    shutil.rmtree(ready.root / ".venv")
    # As without Debian's python3-venv: the interpreter is there, pip is not.
    ready.tool(
        "python3",
        """
if words[:2] == ["-m", "venv"]:
    os.makedirs(words[2] + "/bin", exist_ok=True)
    python = words[2] + "/bin/python"
    os.path.lexists(python) or os.symlink(os.path.abspath(__file__), python)
    sys.exit(1)
""",
    )
    for _ in range(2):
        assert ready("worker.sh", "install")[0] != 0
    assert [call[1:3] for call in ready.calls("python3") if "-m" in call] == [["-m", "venv"]] * 2
    assert ready.calls("python") == []


@pytest.mark.parametrize(
    ("driver", "words", "extra"),
    [
        ("580.65.06", [], "cuda13"),
        ("550.54.15", [], "cuda12"),
        ("550.54.15", ["--cuda=13"], "cuda13"),
        ("", ["--cuda=none"], None),
    ],
)
def test_a_host_with_gpus_is_one_process_with_the_packages_of_its_driver(
    ready, driver, words, extra
):
    ready.rules(
        {"when": "nvidia-smi", "out": f"{driver}\n" if driver else "", "status": 0 if driver else 9}
    )
    (ready.root / ".venv" / f"requirements.txt.{extra}.done").unlink(missing_ok=True)
    assert ready("gpu.sh", *words, *FLAGS)[0] == 0
    assert ready.noted("programs.jsonl") == [[FLAGS, {}]]
    installed = [w for call in ready.calls("python") for w in call if w.startswith("jax[")]
    assert installed == ([f"jax[{extra}]"] if extra else [])


def test_hosts_with_gpus_find_each_other_by_the_variables_that_the_program_reads(ready):
    ready.rules(*slurm_rules())
    assert (
        ready("gpu.sh", "--coordinator=gpu1:1234", "--processes=2", "--process=1", *FLAGS)[0] == 0
    )
    there = dict(zip(processes.VARIABLES, ("gpu1:1234", "2", "0"), strict=True))
    assert ready("gpu.sh", *FLAGS, **there)[0] == 0
    one, two = ready.noted("programs.jsonl")
    assert one == [
        FLAGS,
        dict(zip(processes.VARIABLES, ("gpu1:1234", "2", "1"), strict=True)),
    ] and two == [FLAGS, there]
    status, out, _ = ready(
        "gpu.sh", "--dry-run", "--coordinator=gpu1:1234", "--processes=2", "--process=1", *FLAGS
    )
    assert status == 0 and len(ready.noted("programs.jsonl")) == 2
    subprocess.run(
        ["sh", "-c", out], cwd=ready.root, env=ready.environment, check=True
    )  # what is printed can be typed
    assert ready.noted("programs.jsonl")[2] == one


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no flags of main.py: expected some"),
        (
            ["--coordinator=gpu1", "--processes=2", "--process=0", "--a"],
            "--coordinator=gpu1: expected HOST:PORT of process 0",
        ),
        (
            ["--coordinator=gpu1:1", "--process=0", "--a"],
            "--processes=: expected their number, with --coordinator",
        ),
        (
            ["--coordinator=gpu1:1", "--processes=2", "--a"],
            "--process=: expected this host's number, from 0",
        ),
        (
            ["--coordinator=gpu1:1", "--processes=2", "--process=2", "--a"],
            "--process=2: expected a number below --processes=2",
        ),
        (["--cuda=11", "--a"], "--cuda=11: expected 12, 13 or none"),
        (["--a"], "no NVIDIA GPU: nvidia-smi names no driver; expected one, or --cuda=12"),
    ],
)
def test_what_is_wrong_with_hosts_is_one_line(ready, words, message):
    ready.rules({"when": "nvidia-smi", "status": 9})
    status, out, err = ready("gpu.sh", *words)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith(f"error: {message}"), err
    assert ready.noted("programs.jsonl") == []


def sbatch(ready, *words):
    done = subprocess.run(
        ["sbatch", *words],
        cwd=ready.root,
        env=ready.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_slurm_job_is_one_process_per_node_with_the_variables_that_the_program_reads(ready):
    ready.rules(*slurm_rules())
    status, out, err = sbatch(ready, "--nodes=2", "launch/cloud/slurm.sh", "--dry-run", *FLAGS)
    assert status == 0 and ready.calls("srun") == [], err
    status, said, err = sbatch(ready, "--nodes=2", "launch/cloud/slurm.sh", *FLAGS)
    assert status == 0 and sorted(said.splitlines()) == ["step 1"] * 2 + ["weights"] * 2, err
    assert ready.calls("srun") == shown(out)
    told = sorted(ready.noted("programs.jsonl"), key=str)
    expected = [
        [FLAGS, dict(zip(processes.VARIABLES, ("gpu1:23456", "2", str(i)), strict=True))]
        for i in range(2)
    ]
    assert told == sorted(expected, key=str)
    assert (
        ready.calls("scontrol") == [["scontrol", "show", "hostnames", "gpu[1-2]"]] * 2
        and ready.calls("squeue") == []
    )
    older = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "gpu[1-2]",
    }  # no SLURM_NTASKS
    assert ready("slurm.sh", "--dry-run", *FLAGS, **older)[1] == out
    ready.forget()
    assert sbatch(ready, "--nodes=1", "launch/cloud/slurm.sh", *FLAGS)[0] == 0
    assert ready.noted("programs.jsonl") == [[FLAGS, {}]] and ready.calls("scontrol") == []


def test_slurm_reads_the_lines_of_the_script_that_ask_for_signals_and_requeues():
    lines = (ROOT / "launch" / "cloud" / "slurm.sh").read_text().splitlines()
    before = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    wanted = {
        "#SBATCH --requeue",
        "#SBATCH --signal=TERM@300",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --open-mode=append",
    }
    assert wanted <= set(before)


@pytest.mark.parametrize(
    ("state", "restarts", "requeued", "status", "message"),
    [
        ("RUNNING", "", True, 0, "job 123456 goes on later"),
        ("RUNNING", "100", False, 2, "the run has not ended after 100 requeues"),
        ("CANCELLED", "", False, 0, "job 123456 is CANCELLED: not put into the queue again"),
        ("", "", False, 0, "job 123456 is gone: not put into the queue again"),
    ],
)
def test_a_job_stopped_before_its_end_is_requeued_unless_it_was_cancelled(
    ready, state, restarts, requeued, status, message
):
    ready.program(
        out="stopped after step 3 of 9, which is saved; the same command goes on from there"
    )
    ready.rules(*slurm_rules(state=state))
    ready.environment["SLURM_RESTART_COUNT"] = restarts
    code, out, err = sbatch(ready, "--nodes=2", "launch/cloud/slurm.sh", *FLAGS)
    assert code == status and message in out + err, err
    assert (["scontrol", "requeue", "123456"] in ready.calls("scontrol")) == requeued


def test_the_signal_of_slurm_reaches_the_program_and_spares_the_script(ready):
    ready.program(goes_on=True)
    ready.rules(*slurm_rules())
    command = ["sbatch", "--nodes=1", "launch/cloud/slurm.sh", *FLAGS]
    kept = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    job = subprocess.Popen(command, cwd=ready.root, env=ready.environment, **kept)
    assert job.stdout.readline() == "step 1\n"
    job.send_signal(signal.SIGTERM)  # to the batch shell, which some clusters tell as well
    os.kill(int((ready.bin / "number").read_text()), signal.SIGTERM)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 0 and "goes on later" in out, err
    assert ready.calls("scontrol") == [["scontrol", "requeue", "123456"]]


def test_failures_under_slurm_are_reported_and_not_requeued(ready):
    ready.program(status=2, out="error: config.batch_size = 0")
    ready.rules(*slurm_rules())
    status, _, err = sbatch(ready, "--nodes=2", "launch/cloud/slurm.sh", *FLAGS)
    assert status == 2 and err.startswith(
        "error: the program failed (status 2 of: srun --kill-on-bad-exit=1 "
    )
    assert ["scontrol", "requeue", "123456"] not in ready.calls("scontrol")
    ready.program(out="stopped, nothing was unsaved; the same command goes on from what is on disk")
    ready.rules(
        {"when": "requeue", "status": 1, "err": "slurm_requeue error: no\n"}, *slurm_rules()
    )
    status, _, err = sbatch(ready, "--nodes=2", "launch/cloud/slurm.sh", *FLAGS)
    assert status == 2 and "error: job 123456 cannot be requeued: expected it to go on" in err
    ready.forget()
    assert sbatch(ready, "--nodes=2", "launch/cloud/slurm.sh")[2].startswith(
        "error: no flags of main.py"
    )
    status, _, err = ready("slurm.sh", *FLAGS)
    assert status == 2 and err.startswith("error: this is no Slurm job: expected sbatch")
    status, _, err = ready("slurm.sh", *FLAGS, SLURM_SUBMIT_DIR="/", SLURM_JOB_ID="1")
    assert status == 2 and "expected sbatch to be called in the repository's root" in err
    assert ready.calls("srun") == []


def entries():
    """{name: its lines} of launch/reproduce.sh --list."""
    out = subprocess.run(
        [ROOT / "launch" / "reproduce.sh", "--list"], capture_output=True, text=True, check=True
    ).stdout
    return {text.splitlines()[0]: text.splitlines()[1:] for text in out.strip().split("\n\n")}


def test_every_stored_number_and_picture_has_its_command():
    listed = "\n".join(line for lines in entries().values() for line in lines)
    commands = [
        line.removeprefix("    $ ")
        for lines in entries().values()
        for line in lines
        if line.startswith("    $ ")
    ]
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    readme = "\n".join(page.read_text() for page in pages)
    stored = {f"docs/{p.name}" for p in (ROOT / "docs").iterdir() if p.suffix in (".json", ".png")}
    named = set(re.findall(r"docs/\w+\.(?:json|png)", readme))
    assert len(stored) >= 7 and stored | named <= set(re.findall(r"docs/\w+\.(?:json|png)", listed))
    for path in stored:
        if path.endswith(".json") and "command" in (
            values := json.loads((ROOT / path).read_text())
        ):
            assert values["command"] in commands, path
    for (
        command
    ) in commands:  # each file that is called exists, and the README's longer commands are these
        for word in shlex.split(command):
            assert (
                not re.fullmatch(r"(\./)?(launch|configs)/[\w/]+\.(py|sh)", word)
                or (ROOT / word).is_file()
            ), word
    for start in (
        "python launch/tables/digits_table.py",
        "python main.py --mode=benchmark --config=configs/digits.py --out",
    ):
        (command,) = [c for c in commands if c.startswith(start)]
        assert f"`{command}`" in readme, command


def test_a_name_of_the_list_runs_its_commands_in_order_and_ends_at_one_that_fails(ready):
    status, out, _ = ready("reproduce.sh", "--dry-run", "benchmark_dit")
    assert (
        status == 0 and out.strip() in "\n".join(entries()["benchmark_dit"]) and ready.calls() == []
    )
    environment = ready.root / ".venv" / "bin"
    ready.tool("python")
    (environment / "python").unlink()
    (environment / "python").symlink_to(ready.bin / "python")
    assert ready("reproduce.sh", "benchmark_dit")[0] == 0
    assert shlex.join(ready.calls("python")[-1]) == out.strip()
    ready.forget()
    ready.rules(
        {"when": "--config.scan_blocks --config.remat=blocks", "times": 1},
        {"when": "cifar10", "status": 3},
    )
    status, _, err = ready("reproduce.sh", "tpu_plan")
    commands = [
        line.removeprefix("    $ ") for line in entries()["tpu_plan"] if line.startswith("    $ ")
    ]
    assert (
        status == 2
        and len(ready.calls("python")) == 3
        and err.endswith(f"error: tpu_plan ends here (status 3): {commands[2]}\n")
    )
    status, _, err = ready("reproduce.sh", "nothing")
    assert (
        status == 2
        and err.startswith("error: nothing: expected one of demo tests digits_table")
        and err.count("\n") == 1
    )
