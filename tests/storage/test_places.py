"""Where checkpoints may be kept, whether what is there can be read, and what it tells of others."""

import os
import shutil
import socket

import jax
import numpy as np
import pytest

from dmf.errors import DmfError
from dmf.run.workdir import held
from dmf.storage import checkpoint, paths
from dmf.storage.manifest import step_of, steps_in, write_manifest
from tests.runs import store
from tests.tiny import Setup


@pytest.fixture(scope="module")
def state():
    return Setup().state(randomise=False)


def refusal(workdir):
    """The line that refuses a work directory; nothing is left there."""
    before = sorted(workdir.parent.rglob("*")) if workdir.parent.exists() else None
    with pytest.raises(DmfError) as error, held(workdir):
        pass
    assert before == (sorted(workdir.parent.rglob("*")) if workdir.parent.exists() else None)
    return str(error.value)


@pytest.mark.parametrize("name", ["lr[1e-3]", "lr[1e-3]/run", "a*/run", "what?"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path, monkeypatch, name):
    expected = f"{tmp_path / name}: no checkpoint can be kept there; expected a path without"
    assert refusal(tmp_path / name).startswith(expected)
    with pytest.raises(DmfError, match="no checkpoint can be kept there"):
        checkpoint.save_weights(tmp_path / name, {}, {}, {})
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / name)  # also where the name does not stand in the path as given
    assert "no checkpoint can be kept there" in refusal(paths.at("run"))


def test_a_link_past_such_a_path_is_taken(tmp_path, state):
    (tmp_path / "lr[1e-3]").mkdir()
    (tmp_path / "run").symlink_to("lr[1e-3]")
    with held(tmp_path / "run"):
        saved = store(tmp_path / "run")
        saved.save(1, state)
        saved.close()
    assert store(tmp_path / "run").restore_latest(state) is not None


def test_a_file_or_a_link_to_nowhere_in_the_place_of_a_folder_is_one_line(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    what = "expected a directory, or nothing there yet"
    link = refusal(tmp_path / "link")
    assert link == f"{tmp_path / 'link'} is a link to nowhere, which is not there; {what}"
    assert refusal(tmp_path / "file") == f"{tmp_path / 'file'} is a file; {what}"
    assert refusal(tmp_path / "run") == f"{tmp_path / 'run' / 'checkpoints'} is a file; {what}"


def test_only_ascii_digits_name_a_step(tmp_path):
    for name in ("0", "12", "7", "²", "1²", "٣", "1٣", "007", "3.orbax-checkpoint-tmp", "+5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / checkpoint.MANIFEST).touch()
    assert steps_in(tmp_path) == [12, 7, 0]
    assert step_of("٣") is None and step_of("²") is None and step_of("12") == 12
    assert checkpoint.find(tmp_path).name == "12"
    for name in ("0", "12", "7"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(DmfError, match="expected a step folder with an item 'params'"):
        checkpoint.find(tmp_path)


def test_what_cannot_be_read_back_does_not_count_and_costs_one_save(tmp_path, state, caplog):
    # Orbax skips the merge of its files here, with a warning alone. Nobody could read them.
    saved = store(tmp_path / "lr[1e-3]")
    with pytest.raises(DmfError, match=r"checkpoint .*/checkpoints/3 was written but cannot be re"):
        saved.save(3, state)
    assert saved.complete() == []
    saved.close()
    assert not list(tmp_path.rglob(checkpoint.MANIFEST))
    # Older versions wrote a manifest nevertheless.
    folder = tmp_path / "lr[1e-3]" / "checkpoints" / "3"
    write_manifest(folder)
    for ema, item in ((0, "ema"), (None, "params")):
        with pytest.raises(DmfError, match=f"holds no {item}, or none that can be read"):
            checkpoint.read_params(folder, ema, state.params)
    assert not caplog.records


def test_weights_that_cannot_be_read_back_leave_nothing(tmp_path, state, monkeypatch):
    monkeypatch.setattr(paths, "check_plain", lambda path: None)
    with pytest.raises(DmfError, match=r"was written but cannot be read back: .*lacks weight "):
        checkpoint.save_weights(tmp_path / "conv[1]", state.params, {}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["lacks", "has an unexpected", "is float32"])
def test_other_arrays_than_those_saved_are_named_by_the_read_back(tmp_path, state, how):
    saved = store(tmp_path)
    saved.save(3, state)
    saved.close()
    wanted = {"params": jax.eval_shape(lambda: dict(state.params))}
    first = next(iter(wanted["params"]))
    if how == "lacks":
        wanted["params"]["more"] = jax.ShapeDtypeStruct((3,), np.float32)
    elif how == "is float32":
        wanted["params"][first] = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*x.shape, 2), x.dtype), wanted["params"][first]
        )
    else:
        del wanted["params"][first]
    with pytest.raises(DmfError, match=f"cannot be read back: ValueError: in params, .*{how}"):
        checkpoint.seal(tmp_path / "checkpoints" / "3", wanted)


def test_no_file_of_a_checkpoint_tells_of_the_machine_that_wrote_it(tmp_path, state):
    saved = store(tmp_path / "run")
    saved.save(3, state)
    saved.close()
    checkpoint.save_weights(tmp_path / "weights", state.params, {"config": {}}, {"a": "b"})
    step, told = tmp_path / "run" / "checkpoints" / "3", os.fsencode(tmp_path)
    process = f"partial-{socket.gethostname()}-{os.getpid()}".encode()
    for folder, items in ((step, checkpoint.ITEMS), (tmp_path / "weights", ())):
        files = [p for p in folder.rglob("*") if p.is_file()]
        assert [p for p in files if told in p.read_bytes() or process in p.read_bytes()] == []
        # Orbax itself looks for these files.
        for place in (folder, *(folder / name for name in items)):
            assert (place / checkpoint.COMMITTED).is_file()
        checkpoint.verify(folder)
    assert store(tmp_path / "run").restore_latest(state) is not None


def test_the_systems_own_words_say_why_something_could_not_be_written():
    assert paths.reason(OSError(28, "No space left on device")) == "No space left on device"
    text = f"RESOURCE_EXHAUSTED: Failed writing: {'/long' * 99}: Failed [os_error_code='28'] [x='']"
    assert paths.reason(ValueError(text)) == "No space left on device"
    assert paths.reason(ValueError("other")) == "ValueError: other"
