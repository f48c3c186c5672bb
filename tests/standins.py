"""Stand-ins for gcloud, srun and other tools, and a copy of the launch scripts that call them.

A stand-in notes its arguments. The stand-in gcloud plays a cloud of one TPU with two workers.
Each worker is a folder, and a shell in it runs what ssh is given. --command passes as in the
Google Cloud SDK 528: it is cut at blanks, and ssh joins the words again.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

from tests import ROOT

# Arguments that a shell would take apart, were they not quoted.
HARD = ["--config.data.data_dir=two  words", "it's", '"$HOME" `id` \\ * ~ ;&|<>(){}', ""]

# Every stand-in writes a line of calls.jsonl. Then it does what the first matching rule says.
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
    what = "gcloud.compute.tpus." + ".".join(verb)
    sys.exit("ERROR: (" + what + ") NOT_FOUND: Resource was not found")
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
        logs = options.get("output-directory")
        out = open(logs + "/" + worker + ".log", "w") if logs else None
        command = ["sh", "-c", " ".join(options["command"].split(" "))]
        done = subprocess.run(command, cwd=cloud + worker, env=place, stdout=out)
        worst = max(worst, done.returncode)
    sys.exit(worst)
"""
# Python on a worker. It makes an environment that holds only itself. As main.py it does what
# program.json says.
PYTHON = """
import signal

if words[:2] == ["-m", "venv"]:
    os.makedirs(words[2] + "/bin")
    os.symlink(os.path.abspath(__file__), words[2] + "/bin/python")
if words[:1] != ["main.py"]:
    sys.exit()
def leave(*_):
    said = b"stopped after step 3 of 9, which is saved; the same command goes on from there"
    os.write(1, said + b"\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, leave)
open(here + "/number", "w").write(str(os.getpid()))
what = json.load(open(here + "/program.json"))
told = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
print("step 1", flush=True)
with open(here + "/programs.jsonl", "a") as file:
    file.write(json.dumps([words[1:], told]) + chr(10))
for _ in range(6000 if what.get("goes_on") else 0):
    time.sleep(0.1)
print(what.get("out", "weights"), flush=True)
sys.exit(what.get("status", 0))
"""


def unnumbered(word):
    """A word or a text without the number of the process, which the name of its bundle has."""
    return re.sub(r"\.\d+\.bundle\b", ".bundle", word) if isinstance(word, str) else word


class Bench:
    """A copy of the scripts in a new repository, and stand-ins for all that they could call."""

    def __init__(self, folder):
        self.root, self.bin = folder / "repo", folder / "bin"
        self.bin.mkdir()
        shutil.copytree(
            ROOT / "launch",
            self.root / "launch",
            ignore=shutil.ignore_patterns("*.py", "__pycache__"),
        )
        for name in (
            "requirements.txt",
            "requirements-gcs.txt",
            "requirements-tensorflow.txt",
            "requirements-parity.txt",
            "requirements.lock",
            ".gitignore",
        ):
            shutil.copy(ROOT / name, self.root / name)
        git = ["git", "-C", self.root, "-c", "user.name=n", "-c", "user.email=e"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
            subprocess.run([*git, *command], check=True)
        self.tool("gcloud", CLOUD)
        self.tool("python3", PYTHON)
        self.rules()
        self.program()
        self.environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("DMF_", "JAX_", "SLURM_"))
        }
        self.environment |= {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "DMF_STATE": "",
            "HOME": str(folder),
        }
        self.environment["PYTHON"] = str(self.bin / "python3")

    def tool(self, name, does=""):
        path = self.bin / name
        path.write_text(
            RECORD.replace("{python}", sys.executable).replace("{here!r}", repr(str(self.bin)))
            + does
        )
        path.chmod(0o755)

    def rules(self, *rules):
        """Sets what the stand-ins do when their line contains `when`, at most `times` times."""
        text = json.dumps([{"times": 1000, **rule} for rule in rules])
        (self.bin / "rules.json").write_text(text)

    def program(self, **what):
        """What the stand-in for the training program does from now on."""
        (self.bin / "program.json").write_text(json.dumps(what))

    def __call__(self, script, *words, **environment):
        """(exit status, standard output, standard error)"""
        (path,) = (self.root / "launch").rglob(script)
        command = [path, *words]
        done = subprocess.run(
            command,
            cwd=self.root,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout, done.stderr

    def tpu(self, *words, **environment):
        return self("tpu.sh", *words, **environment)

    def noted(self, name, tool=None):
        path = self.bin / name
        found = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        found = [[unnumbered(word) for word in words] for words in found]
        return [words for words in found if tool in (None, words[0])]

    def calls(self, tool="gcloud"):
        return self.noted("calls.jsonl", tool)

    def forget(self):
        for name in ("calls.jsonl", "programs.jsonl"):
            (self.bin / name).unlink(missing_ok=True)


def bench_in(folder):
    """A bench for one test; nothing that the test has started goes on after it."""
    made = Bench(folder)
    yield made
    for worker in (made.bin / "cloud").glob("[01]"):
        if (worker / "dmf").exists():
            made("worker.sh", "stop", HOME=str(worker))


def shown(text):
    """The commands of a dry run, which are shell lines among comments."""
    return [
        words for line in text.splitlines() for words in [shlex.split(line, comments=True)] if words
    ]


def until(condition, seconds=200):
    """Returns once it holds. A machine may be busy: the deadline is for what never comes."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
