"""A program that is compiled ahead, in a thread: the later call finds it."""

import os
import shutil
import subprocess
import sys
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

from dmf.config import parse
from dmf.run import context
from dmf.storage.checkpoint import FOLDER
from tests import runs
from tests.test_train import ENV, ROOT
from tests.tiny import MLP, merged

COMPILED = "/jax/core/compile/backend_compile_duration"


class Heard:
    """The names of the functions that jax compiles while this is open."""

    def __enter__(self):
        self.names = []
        monitoring.register_event_duration_secs_listener(self._hear)
        return self.names

    def _hear(self, event, duration, fun_name="", **_):
        if event == COMPILED:
            self.names.append(fun_name)

    def __exit__(self, *_):
        monitoring.unregister_event_duration_listener(self._hear)


def test_a_call_finds_the_program_that_the_thread_has_made():
    traced = []

    def twice_plus(state, batch, scalar):
        traced.append(1)
        return state * 2 + batch["x"].sum() * scalar

    function = jax.jit(twice_plus, donate_argnums=0)
    arguments = {"x": jnp.ones(3)}, np.float32(2.0)
    state = jnp.ones(4)
    with Heard() as names:
        shapes = jax.ShapeDtypeStruct((4,), jnp.float32), *arguments
        context.Ahead({"it": lambda: function.lower(*shapes).compile()}).wait("it")
        assert len(traced) == 1 and names.count("jit(twice_plus)") == 1
        np.testing.assert_array_equal(function(state, *arguments), np.full(4, 8.0))
    assert len(traced) == 1 and names.count("jit(twice_plus)") == 1


def test_what_cannot_be_compiled_is_told_by_the_call_alone(capfd):
    def broken(x):
        raise ValueError("no such thing")

    context.Ahead({"it": lambda: jax.jit(broken).lower(np.ones(3))}).wait("it")
    assert capfd.readouterr() == ("", "")


def test_a_run_and_a_resumed_run_compile_each_program_once(tmp_path):
    saved = dict(checkpoint_every_steps=1, keep_checkpoints=20)
    config = merged(MLP, run=saved, guard=dict(every_steps=100, rows=8))
    for first in (0, 5):  # the second start is inside a stage
        run = context.open_run(parse(config), tmp_path)  # without a judge and its programs
        with Heard() as names:
            runs.loop(run)
        run.close()
        assert run.metrics.read()[-1]["step"] == run.total
        kinds = {stage.kind for stage in run.stages if stage.last > first}
        assert names.count("jit(train_step)") == len(kinds)
        assert names.count("jit(wrapper)") == len(kinds)  # the probes
        for n in range(6, run.stages[-1].last + 1):
            shutil.rmtree(tmp_path / FOLDER / str(n), ignore_errors=True)


def test_programs_are_made_in_their_order_and_none_is_made_twice():
    begun, go, made = threading.Event(), threading.Event(), []

    def first():
        begun.set()
        assert go.wait(60)
        made.append("first")

    programs = {"first": first, **{name: partial(made.append, name) for name in ("b", "c", "d")}}
    with context.Ahead(programs) as ahead:
        assert begun.wait(60)
        ahead.wait("c")  # it has not begun: its call makes it, and the thread does not
        ahead.wait("none of them")
        go.set()
        ahead.wait("first")
        ahead.wait("d")
    assert made in (["first", "b", "d"], ["first", "b"], ["first"])  # the wait for d may take it


def test_a_run_that_ends_early_begins_no_further_program():
    begun, go, made = threading.Event(), threading.Event(), []

    def first():
        begun.set()
        assert go.wait(60)

    programs = {"first": first, "second": partial(made.append, 2)}
    with pytest.raises(ZeroDivisionError), context.Ahead(programs):
        assert begun.wait(60)
        raise ZeroDivisionError
    go.set()
    for thread in threading.enumerate():
        if thread.name == "compiling":
            thread.join(60)
    assert not made


def test_an_error_meanwhile_ends_the_process_at_once():
    code = (
        "import time; from dmf import main; from dmf.run import context\n"
        "context.Ahead({'it': lambda: time.sleep(600)})\n"
        "main._stop(2, 'error: the weights cannot be read')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "error: the weights cannot be read\n",
    )


def test_a_moved_directory_keeps_its_programs_and_torn_ones_are_made_anew(tmp_path):
    code = (
        "import sys, jax, pathlib; from dmf.run import programs\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "programs.keep(pathlib.Path(sys.argv[1]))\n"
        "jax.jit(lambda x: x * 3 + 1)(2.0)\n"
    )
    env = {name: value for name, value in ENV.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    kept = []
    for folder in ("one", "moved", "torn"):
        if folder != "one":
            shutil.copytree(tmp_path / "one", tmp_path / folder)
        files = list((tmp_path / folder / "programs").glob("*-cache"))
        if folder == "torn":
            for path in files:
                os.truncate(path, 100)
        command = [sys.executable, "-c", code, tmp_path / folder]
        done = subprocess.run(
            command, cwd=ROOT, env=env, check=True, capture_output=True, text=True
        )
        files = list((tmp_path / folder / "programs").glob("*-cache"))
        kept.append({p.name for p in files})
        assert min(p.stat().st_size for p in files) > 100
        assert len(done.stderr.splitlines()) == (folder == "torn"), done.stderr
    assert kept[0] and kept[0] == kept[1] == kept[2]
