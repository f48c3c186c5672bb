"""launch/cloud/tpu.sh, and launch/cloud/worker.sh under it, against a cloud that is none."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.standins import HARD, ROOT, bench_in, shown, unnumbered, until

NODE = ["--name=dmf", "--project=proj", "--zone=us-west4-a"]
WHERE = ["--project=proj", "--zone=us-west4-a", "--quiet"]
MACHINE = ["--accelerator=v5litepod-16"]
RUN = ["--workdir=gs://bucket/run", "--", "--config=configs/cifar10.py"]
PROGRAM = ["--workdir=gs://bucket/run", "--distributed", "--config=configs/cifar10.py"]
INSTALL = "git checkout -q --detach FETCH_HEAD && ./launch/cloud/worker.sh install tpu"
SETUP = f"git init -q dmf && cd dmf && git fetch -q ../dmf.bundle HEAD && {INSTALL}"
START = "cd dmf && ./launch/cloud/worker.sh start " + shlex.join(PROGRAM)
STATUS = (
    "if cd dmf 2>/dev/null; then ./launch/cloud/worker.sh status; "
    'else echo "worker $(uname -n): none"; fi'
)
STOP = "cd dmf && ./launch/cloud/worker.sh stop"


@pytest.fixture
def bench(tmp_path):
    yield from bench_in(tmp_path)


def tpus(*words):
    """A call of the stand-in gcloud, with what all have."""
    return ["gcloud", "compute", "tpus", *words, *WHERE]


def ssh(command, *more):
    return tpus("tpu-vm", "ssh", "dmf", "--worker=all", f"--command={command}", *more)


def plain_create(*more):
    return tpus(
        "tpu-vm",
        "create",
        "dmf",
        "--accelerator-type=v5litepod-16",
        "--version=v2-alpha-tpuv5-lite",
        *more,
    )


def queued_create(*more):
    kind = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
    return tpus("queued-resources", "create", "dmf", "--node-id=dmf", *kind, *more)


QUEUE_STATE = tpus("queued-resources", "describe", "dmf", "--format=value(state.state)")
NODE_STATE = tpus("tpu-vm", "describe", "dmf", "--format=value(state)")
PLAIN_DELETE = tpus("tpu-vm", "delete", "dmf")
QUEUED_DELETE = tpus("queued-resources", "delete", "dmf", "--force")


def scp(bench, *more):
    return tpus(
        "tpu-vm", "scp", f"{bench.root}/runs/dmf.bundle", "dmf:dmf.bundle", "--worker=all", *more
    )


def test_shellcheck_finds_nothing():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not found:
        pytest.skip("shellcheck is not installed (requirements-dev.txt)")
    scripts = [*sorted((ROOT / "launch").rglob("*.sh")), ROOT / ".ci" / "run"]
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
        lambda bench: [
            ssh(
                f"git init -q dmf && cd dmf && git fetch -q https://example.org/dmf v1 && {INSTALL}"
            )
        ],
    ),
    "run": (["run", *NODE, *RUN], lambda bench: [ssh(START)]),
    "score": (
        ["run", *NODE, *RUN[:2], "--mode=score"],
        lambda bench: [
            ssh("cd dmf && ./launch/cloud/worker.sh start --workdir=gs://bucket/run --mode=score")
        ],
    ),
    "train": (
        ["run", *NODE, *RUN[:2], "--mode=train"],
        lambda bench: [
            ssh(
                "cd dmf && ./launch/cloud/worker.sh start "
                "--workdir=gs://bucket/run --distributed --mode=train"
            )
        ],
    ),
    "score in two words": (
        ["run", *NODE, *RUN[:2], "--mode", "score"],
        lambda bench: [
            ssh("cd dmf && ./launch/cloud/worker.sh start --workdir=gs://bucket/run --mode score")
        ],
    ),
    "up": (
        ["up", *NODE, *MACHINE, *RUN],
        lambda bench: [plain_create(), scp(bench), ssh(SETUP), ssh(START)],
    ),
    "status": (["status", *NODE], lambda bench: [NODE_STATE, ssh(STATUS)]),
    "logs": (["logs", *NODE], lambda bench: [ssh("cd dmf && ./launch/cloud/worker.sh log 50")]),
    "stop": (["stop", *NODE], lambda bench: [ssh(STOP)]),
    "delete": (["delete", *NODE], lambda bench: [PLAIN_DELETE]),
    "delete queued": (["delete", *NODE, "--queued"], lambda bench: [QUEUED_DELETE]),
    "watch": (
        ["watch", *NODE, *MACHINE, "--queued", "--every=0", "--delete-when-done", *RUN],
        lambda bench: [
            *[
                QUEUE_STATE,
                QUEUED_DELETE,
                queued_create(),
                QUEUE_STATE,
                NODE_STATE,
                scp(bench),
                ssh(SETUP),
                ssh(START),
            ],
            *[QUEUE_STATE, NODE_STATE, ssh(STATUS), QUEUED_DELETE],
        ],
    ),
    "watch plain": (
        ["watch", *NODE, *MACHINE, "--spot", "--every=0", *RUN],
        lambda bench: [
            *[
                NODE_STATE,
                PLAIN_DELETE,
                plain_create("--spot"),
                scp(bench),
                ssh(SETUP),
                ssh(START),
                NODE_STATE,
                ssh(STATUS),
            ],
        ],
    ),
}


@pytest.mark.parametrize("what", VERBS)
def test_the_calls_are_the_documented_ones_and_a_dry_run_prints_them_and_makes_none(bench, what):
    words, expected = VERBS[what]
    status, out, err = bench.tpu(
        "--dry-run" if words[0] == "--" else words[0], "--dry-run", *words[1:]
    )
    assert (status, err, bench.calls()) == (0, "", [])
    printed = [line for line in shown(out) if line[0] == "gcloud"]
    preempted = {
        "when": "describe",
        "times": 1,
        "out": "SUSPENDED\n" if "--queued" in words else "PREEMPTED\n",
        "status": 0,
    }
    ended = {"when": "ssh", "out": "worker a: ended\nworker b: ended\n", "status": 0}
    (bench.bin / "cloud").mkdir()
    rules = [
        {"when": "create", "status": 0},
        {"when": "delete", "status": 0},
        {"when": "scp", "status": 0},
        ended,
    ]
    bench.rules(*([preempted] if words[0] == "watch" else []), *rules)
    status, out, err = bench.tpu(*words)
    assert status == 0, err
    assert bench.calls() == printed == expected(bench)
    assert not any((bench.root / "runs").glob("*.bundle"))


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
    _, out, _ = bench.tpu(
        "create", "--dry-run", *NODE, f"--accelerator={accelerator}", "--runtime=mine"
    )
    assert "--version=mine" in shown(out)[0]


def test_the_environment_names_what_no_argument_does(bench):
    there = {
        "DMF_NAME": "dmf",
        "DMF_PROJECT": "proj",
        "DMF_ZONE": "us-west4-a",
        "DMF_ACCELERATOR": "v5litepod-16",
    }
    there["DMF_WORKDIR"] = "gs://bucket/run"
    _, out, _ = bench.tpu("up", "--dry-run", "--", "--config=configs/cifar10.py", **there)
    assert [words for words in shown(out) if words[0] == "gcloud"] == VERBS["up"][1](bench)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["create"],
            "--name is missing: expected it, such as --name=dmf, or DMF_NAME, with create",
        ),
        (
            ["status", "--name=dmf"],
            "--project is missing: expected it, such as --project=my-project, or DMF_PROJECT",
        ),
        (
            ["delete", *NODE[:2]],
            "--zone is missing: expected it, such as --zone=us-west4-a, or DMF_ZONE, with delete",
        ),
        (
            ["create", *NODE],
            "--accelerator is missing: expected it, such as --accelerator=v5litepod-16, "
            "or DMF_ACCELERATOR",
        ),
        (
            ["create", *NODE, "--accelerator=v9-8"],
            "--accelerator=v9-8: expected v2-, v3-, v4-, v5litepod-, v5p- or v6e-",
        ),
        (
            ["run", *NODE],
            "--workdir is missing: expected it, such as --workdir=gs://my-bucket/run, "
            "or DMF_WORKDIR, with run",
        ),
        (
            ["run", *NODE, "--workdir=runs/x", "--", "a"],
            "--workdir=runs/x: expected gs://BUCKET/NAME or the absolute path",
        ),
        (["run", *NODE, RUN[0]], "no flags of main.py: expected them after --"),
        (
            ["run", *NODE, *RUN[:1], "--config=x"],
            "--config=x: expected an option of launch/cloud/tpu.sh, or flags of main.py after --",
        ),
        (
            ["watch", *NODE, *MACHINE, "--every=x", *RUN],
            "x: expected a whole number for --every and --retries",
        ),
        (["setup", *NODE, "--ref=v1"], "--ref=v1 without --repo: expected both"),
        (
            ["start", *NODE],
            "start: expected create, setup, run, up, watch, status, logs, stop or delete",
        ),
    ],
)
def test_what_is_missing_is_one_line_and_no_call(bench, words, message):
    status, out, err = bench.tpu(*words)
    assert (status, out, err.count("\n"), bench.calls()) == (2, "", 1, []) and err.startswith(
        f"error: {message}"
    ), err


@pytest.mark.parametrize("delete", [False, True])
@pytest.mark.parametrize("step", ["create", "scp", "install", "start"])
def test_a_call_that_fails_is_reported_and_nothing_goes_on(bench, step, delete):
    bench.rules(
        {
            "when": step,
            "status": 3,
            "err": "Trying...\nERROR: (gcloud) no\n quota  'x'\nERROR: bye\n",
        }
    )
    status, _, err = bench.tpu(
        "up", *NODE, *MACHINE, *(["--delete-on-failure"] if delete else []), *RUN
    )
    calls, plan = bench.calls(), VERBS["up"][1](bench)
    failed = {"create": 1, "scp": 2, "install": 3, "start": 4}[step]
    after = (
        [ssh(f"{STOP} {shlex.join(PROGRAM)}")] if step == "start" else []
    )  # some workers may have begun
    after += (
        [NODE_STATE] if step == "create" else [PLAIN_DELETE] if delete else []
    )  # what failed may have made it
    assert status == 1 and calls == plan[:failed] + after
    errors = [unnumbered(x) for x in err.splitlines() if x.startswith("error: ")]
    assert (
        errors[0]
        == f"error: ERROR: (gcloud) no ERROR: bye (status 3 of: {shown_as(plan[failed - 1])})"
    )
    assert (bench.bin / "cloud").exists() == (step != "create" and not delete)
    if (bench.bin / "cloud").exists():  # then it is said, with the command that deletes it
        assert (
            "the TPU dmf exists in us-west4-a and costs money; "
            "delete it: launch/cloud/tpu.sh delete" in errors[1]
        )
        words = shlex.split(errors[1].partition("delete it: ")[2])
        assert bench.tpu(*words[1:])[0] == 0 and not (bench.bin / "cloud").exists()
    else:
        assert len(errors) == 1


def test_a_node_that_is_there_although_its_creation_failed_is_named(bench):
    (bench.bin / "cloud").mkdir()
    bench.rules({"when": "create", "status": 1, "err": "ERROR: timed out\n"})
    status, _, err = bench.tpu("create", *NODE, *MACHINE, "--delete-on-failure")
    assert status == 1 and "the TPU dmf may exist in us-west4-a and costs money; delete it:" in err
    assert (bench.bin / "cloud").exists()  # it may be somebody else's of that name


def shown_as(words):
    """As the scripts quote a command; that a shell reads it back is tested by the dry runs."""
    safe = re.compile(r"[A-Za-z0-9_./:=,@%+-]+")
    return " ".join(w if safe.fullmatch(w) else "'" + w.replace("'", "'\\''") + "'" for w in words)


def test_a_queued_node_is_waited_for(bench):
    waits = [
        {"when": "queued-resources describe", "times": 1, "out": f"{s}\n", "status": 0}
        for s in ("WAITING", "PROVISIONING")
    ]
    bench.rules(*waits, {"when": "tpu-vm describe", "times": 1, "out": "CREATING\n", "status": 0})
    assert bench.tpu("create", *NODE, *MACHINE, "--queued", "--every=0")[0] == 0
    assert bench.calls() == [
        queued_create(),
        QUEUE_STATE,
        QUEUE_STATE,
        QUEUE_STATE,
        NODE_STATE,
        QUEUE_STATE,
        NODE_STATE,
    ]


def test_a_queued_request_that_fails_is_named_or_deleted(bench):
    bench.rules({"when": "queued-resources describe", "out": "FAILED\n", "status": 0})
    status, _, err = bench.tpu("create", *NODE, *MACHINE, "--queued")
    assert (
        status == 1
        and "the node dmf is FAILED: expected it to become READY" in err
        and "delete --name=dmf" in err
    )
    assert "--queued" in err
    shutil.rmtree(bench.bin / "cloud")
    bench.forget()
    assert bench.tpu("create", *NODE, *MACHINE, "--queued", "--delete-on-failure")[0] == 1
    assert bench.calls()[-1] == QUEUED_DELETE


def watching(bench, *words):
    command = [bench.root / "launch" / "cloud" / "tpu.sh", "watch", *NODE, *MACHINE, *words]
    kept = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(
        command, cwd=bench.root, env=bench.environment, start_new_session=True, **kept
    )


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
    bench.rules(
        {"when": looks, "times": 1, "out": "SUSPENDED\n" if queued else "PREEMPTED\n", "status": 0}
    )
    _, err = watch.communicate(timeout=200)
    assert watch.returncode == 0 and "error" not in err, err
    # Both workers ran the same program with the same words, before and after.
    # The words came through five shells unharmed.
    assert (
        bench.noted("programs.jsonl")
        == [[["--workdir=gs://bucket/run", "--distributed", RUN[2], *HARD], {}]] * 4
    )
    create = queued_create("--spot") if queued else plain_create("--spot")
    delete = QUEUED_DELETE if queued else PLAIN_DELETE
    made = [
        words
        for words in bench.calls()[before:]
        if "describe" not in words and "worker.sh status" not in str(words)
    ]
    start = "cd dmf && ./launch/cloud/worker.sh start "
    at = made.index(delete)
    assert made[at : at + 4] == [delete, create, scp(bench), ssh(SETUP)] and made[at + 4][
        7
    ].startswith(f"--command={start}")
    assert made[-1] == delete and not (bench.bin / "cloud").exists()
    for folder in "12":  # what the workers of the first node said is not lost with it
        for worker in "01":
            assert (
                (bench.root / "collected" / folder / f"{worker}.log")
                .read_text()
                .startswith("step 1\n")
            )


def test_a_program_that_was_stopped_is_started_again_and_one_that_was_halted_is_not(bench):
    bench.program(goes_on=True)
    watch = watching(bench, "--every=1", *RUN)
    until(lambda: len(bench.noted("programs.jsonl")) == 2)
    bench.program(goes_on=True, second=True)
    for worker in (bench.bin / "cloud").iterdir():  # as a maintenance event would
        os.kill(int((worker / "dmf.run" / "program").read_text()), signal.SIGTERM)
    until(lambda: len(bench.noted("programs.jsonl")) == 4)
    assert "delete" not in str(bench.calls())
    assert bench.tpu("stop", *NODE)[0] == 0
    _, err = watch.communicate(timeout=200)
    assert (
        watch.returncode == 1
        and "halted" in err.splitlines()[-2]
        and len(bench.noted("programs.jsonl")) == 4
    )
    assert "the TPU dmf exists in us-west4-a and costs money; delete it:" in err.splitlines()[-1]


@pytest.mark.parametrize(("status", "starts"), [(2, 1), (1, 3)])
def test_a_program_that_fails_is_not_started_for_ever(bench, status, starts):
    bench.program(status=status, out="error: config.batch_size = 0: running out of it")
    code, _, err = bench.tpu(
        "watch", *NODE, *MACHINE, "--every=0", "--retries=2", "--delete-on-failure", *RUN
    )
    assert code == 1 and len(bench.noted("programs.jsonl")) == 2 * starts
    assert f"failed {status}: error: config.batch_size = 0: running out of it" in err
    assert bench.calls()[-1] == PLAIN_DELETE and not (bench.bin / "cloud").exists()


def test_a_zone_without_free_nodes_is_waited_for_and_other_failures_are_not(bench):
    full = {
        "when": "create",
        "times": 5,
        "status": 1,
        "err": 'ERROR: There is no more capacity in the zone "us-west4-a"\n',
    }
    bench.rules(full)
    code, _, err = bench.tpu("watch", *NODE, *MACHINE, "--every=0", "--retries=2", *RUN)
    assert code == 0 and sum(words[4] == "create" for words in bench.calls()) == 6, err
    shutil.rmtree(bench.bin / "cloud")
    bench.forget()
    bench.rules({"when": "create", "status": 1, "err": "ERROR: Quota exceeded\n"})
    code, _, err = bench.tpu("watch", *NODE, *MACHINE, "--every=0", "--retries=2", *RUN)
    assert code == 1 and sum(words[4] == "create" for words in bench.calls()) == 3
    assert (
        err.count("error: ERROR: Quota exceeded (status 1 of: gcloud compute tpus tpu-vm create")
        == 3
    )
    assert "gave up on dmf, which is NOT_FOUND" in err and "costs money" not in err


def test_a_node_that_is_gone_before_it_was_in_use_is_waited_for_as_any_other(bench):
    # Made, not set up, gone; and then the zone is full for longer than failures are borne.
    full = {
        "when": "create",
        "times": 2,
        "status": 1,
        "err": "ERROR: There is no more capacity in the zone\n",
    }
    bench.rules(
        {"when": "scp", "times": 1, "status": 1}, {"when": "create", "times": 1, "status": 0}, full
    )
    code, _, err = bench.tpu("watch", *NODE, *MACHINE, "--every=0", "--retries=1", *RUN)
    calls = [words[4] for words in bench.calls()]
    assert (code, calls.count("create"), calls.count("scp")) == (0, 4, 2), err


def test_failed_calls_between_which_the_program_runs_do_not_add_up(bench):
    bench.program(goes_on=True)
    assert bench.tpu("up", *NODE, *MACHINE, *RUN)[0] == 0
    broken = {"when": "tpu-vm describe", "times": 1, "status": 1, "err": "ERROR: broken pipe\n"}
    there = {"when": "tpu-vm describe", "times": 1, "out": "READY\n", "status": 0}
    ended = {"when": "worker.sh status", "out": "worker a: ended\nworker b: ended\n", "status": 0}
    running = {
        "when": "worker.sh status",
        "times": 3,
        "out": "worker a: running\nworker b: running\n",
        "status": 0,
    }
    bench.rules(*[broken, there] * 3, running, ended)
    code, _, err = bench.tpu("watch", *NODE, *MACHINE, "--every=0", "--retries=1", *RUN)
    assert code == 0 and err.count("broken pipe") == 3, err


def test_a_start_that_fails_on_one_worker_is_tried_again(bench):
    bench.program(goes_on=True)
    assert bench.tpu("up", *NODE, *MACHINE, *RUN)[0] == 0
    until(lambda: len(bench.noted("programs.jsonl")) == 2)
    worker = bench.bin / "cloud" / "1"
    os.kill(int((worker / "dmf.run" / "program").read_text()), signal.SIGKILL)
    until((worker / "dmf.run" / "status").exists)
    python = worker / "dmf" / ".venv" / "bin" / "python"
    python.rename(python.with_name("away"))
    status, _, err = bench.tpu("run", *NODE, *RUN)
    assert status == 1 and ".venv is missing" in err
    said = bench.tpu("status", *NODE)[1]
    assert (
        said.count(": stopped\n") == said.count(": failed 137: ") == 1
    )  # halted would end a watch
    python.with_name("away").rename(python)
    watch = watching(bench, "--every=600", "--delete-on-failure", *RUN)
    until(lambda: len(bench.noted("programs.jsonl")) == 4)
    until(lambda: subprocess.run(["pgrep", "-P", str(watch.pid), "sleep"]).returncode == 0)
    watch.send_signal(signal.SIGTERM)
    assert watch.wait(timeout=200) == 143 and "delete" not in str(bench.calls())


def test_a_node_that_runs_after_a_failed_start_is_left_alone_when_the_watch_is_interrupted(bench):
    bench.program(goes_on=True)
    stopped = {
        "when": "worker.sh status",
        "times": 1,
        "out": "worker a: stopped\nworker b: stopped\n",
        "status": 0,
    }
    bench.rules({"when": "worker.sh start", "times": 1, "status": 255}, stopped)
    watch = watching(bench, "--every=1", "--delete-on-failure", *RUN)
    until(lambda: len(bench.noted("programs.jsonl")) == 2)
    until(lambda: bench.calls()[-1] == ssh(STATUS))
    watch.send_signal(signal.SIGTERM)
    _, err = watch.communicate(timeout=200)
    assert (
        watch.returncode == 143
        and "nobody watches over dmf now" in err
        and "delete" not in str(bench.calls())
    )


def alive(group):
    """Whether a process of a group runs. One that has just ended may stay for a moment."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_watch_that_is_interrupted_leaves_nothing_of_its_own(bench, number):
    bench.program(goes_on=True)
    watch = watching(bench, "--every=600", *RUN)
    until(
        lambda: (
            len(bench.noted("programs.jsonl")) == 2
            and subprocess.run(["pgrep", "-P", str(watch.pid), "sleep"]).returncode == 0
        )
    )
    os.killpg(watch.pid, number) if number == signal.SIGINT else watch.send_signal(number)
    _, err = watch.communicate(timeout=200)
    assert (
        watch.returncode == 128 + number and "nobody watches over dmf now" in err.splitlines()[-1]
    )
    until(lambda: not alive(watch.pid))
    assert "worker" in bench.tpu("status", *NODE)[1] and "delete" not in str(bench.calls())


@pytest.mark.parametrize(
    ("one", "two", "starts"),
    [
        ("running", "ended", 0),  # the first worker may still save
        ("running", "failed 1: out of memory", 0),
        ("ended", "stopped", 1),  # of several processes one speaks
        ("lost", "failed 2: the processes of the run cannot find each other", 1),
        ("ended", "lost", 1),
        (
            "failed 2: error: process 1 has met an error",
            "failed 1: RuntimeError: no",
            1,
        ),  # the one reports the other's
        ("failed 1: it was running", "ended", 1),
    ],
)
def test_workers_that_differ(bench, one, two, starts):
    (bench.bin / "cloud").mkdir()
    first = {
        "when": "worker.sh status",
        "times": 1,
        "out": f"worker a: {one}\nworker b: {two}\n",
        "status": 0,
    }
    then = {"when": "worker.sh status", "out": "worker a: ended\nworker b: ended\n", "status": 0}
    bench.rules(first, then, {"when": "ssh", "status": 0})
    assert bench.tpu("watch", *NODE, *MACHINE, "--every=0", *RUN)[0] == 0
    assert bench.calls() == [
        NODE_STATE,
        ssh(STATUS),
        *[ssh(START)] * starts,
        NODE_STATE,
        ssh(STATUS),
    ]


@pytest.mark.parametrize("state", ["FAILED", "STOPPED"])
def test_a_node_that_will_not_come_back_ends_the_watch(bench, state):
    bench.rules({"when": "describe", "out": f"{state}\n", "status": 0})
    code, _, err = bench.tpu("watch", *NODE, *MACHINE, *RUN)
    assert (
        code == 1
        and f"error: dmf is {state}: expected a run that goes on" in err
        and bench.calls() == [NODE_STATE]
    )


def test_a_look_that_fails_is_no_missing_node(bench):
    bench.rules({"when": "describe", "status": 1, "err": "ERROR: (gcloud) PERMISSION_DENIED: no\n"})
    code, _, err = bench.tpu("watch", *NODE, *MACHINE, "--every=0", "--retries=1", *RUN)
    assert code == 1 and bench.calls() == [NODE_STATE] * 2 and err.count("PERMISSION_DENIED") == 2
    bench.forget()
    bench.rules(
        {"when": "describe", "times": 1, "out": "READY\n", "status": 0},
        {"when": "ssh", "status": 255, "err": "no route\n"},
    )
    code, _, err = bench.tpu("status", *NODE)
    assert (
        code == 1
        and err.startswith("error: no route (status 255 of: gcloud compute tpus tpu-vm ssh dmf")
        and err.count("\n") == 1
    )


def test_another_program_that_runs_on_the_node_is_left_alone(bench):
    bench.program(goes_on=True)
    assert bench.tpu("up", *NODE, *MACHINE, *RUN)[0] == 0
    status, _, err = bench.tpu("run", *NODE, *RUN[:2], "--config=configs/digits.py")
    assert status == 1 and "is running; expected it stopped before another is started" in err
    assert bench.tpu("run", *NODE, *RUN)[1].count("running already") == 2  # the same one again
    assert (
        bench.tpu("status", *NODE)[1].count("running") == 2
        and len(bench.noted("programs.jsonl")) == 2
    )


def test_the_commands_of_the_page_are_understood(bench):
    block = (ROOT / "docs" / "launch.md").read_text().split("```")[1]
    lines = block.replace("\\\n", " ").splitlines()
    there = {
        word.split("=")[0]: word.split("=")[1] for word in shlex.split(lines[1], comments=True)[1:]
    }
    scripts = [
        words
        for line in lines
        for words in [shlex.split(line, comments=True)]
        if words and "launch/" in words[0]
    ]
    assert len(scripts) == 7
    for script, *words in scripts:
        at = script.endswith("tpu.sh")
        status, out, err = bench(Path(script).name, *words[:at], "--dry-run", *words[at:], **there)
        assert status == 0 and shown(out), err


def test_a_look_leaves_the_bundle_of_another_process_alone(bench):
    bundle = bench.root / "runs" / "dmf.1.bundle"
    bundle.parent.mkdir(exist_ok=True)
    for path in (bundle, bundle.with_name("dmf.bundle")):
        path.write_text("a watch copies it")
        bench.rules({"when": "tpu-vm describe", "out": "CREATING\n", "status": 0})
        assert bench.tpu("status", *NODE)[0] == 0
        assert path.read_text() == "a watch copies it"


@pytest.mark.parametrize("name", ["../../x", "a/b", "a b", "-x", "$(x)"])
def test_a_name_that_is_none_of_a_node_is_refused(bench, name):
    status, _, err = bench.tpu("status", f"--name={name}", *NODE[1:])
    assert status == 2 and err.count("\n") == 1
    assert err.startswith(f"error: --name={name}: expected letters, digits and hyphens")
    assert bench.calls() == []
