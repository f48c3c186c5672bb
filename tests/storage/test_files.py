"""What a run writes: checkpoints that prove themselves, logs that survive a kill, pictures."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from dmf.errors import DmfError
from dmf.evaluation import pictures
from dmf.logging import Count, JsonLines, Progress, TensorBoard
from dmf.storage import checkpoint
from dmf.storage.checkpoint import Checkpoints
from tests.tiny import Setup


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A state and the work directory that holds it at step 7."""
    workdir = tmp_path_factory.mktemp("saved")
    state = Setup().run("all_pairs", 2)[0]
    store = Checkpoints(workdir, 1, [], {"config": {"seed": 3}, "image_shape": [8, 8, 1]})
    store.save(7, state)
    store.close()
    return workdir, state


def reopened(workdir):
    return Checkpoints(workdir, 1, [], {"config": {}})


def test_a_state_comes_back_bit_for_bit_on_another_number_of_devices(saved):
    workdir, state = saved
    target = Setup(devices=8).state()
    found = reopened(workdir).restore_latest(target)
    for a, b, c in zip(*map(jax.tree.leaves, (found, state, target)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype and a.sharding == c.sharding
    assert checkpoint.metadata(workdir / "checkpoints" / "7")["config"] == {"seed": 3}


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "empty", "manifest"])
def test_every_damage_is_detected_and_named(saved, tmp_path, damage):
    workdir, state = saved
    shutil.copytree(workdir, tmp_path / "copy")
    folder = tmp_path / "copy" / "checkpoints" / "7"
    victim = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "flip":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "delete":
        victim.unlink()
    elif damage == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        (folder / checkpoint.MANIFEST).write_text("{")
    name = (
        checkpoint.MANIFEST
        if damage in ("empty", "manifest")
        else victim.relative_to(folder).as_posix()
    )
    with pytest.raises(DmfError, match=f"checkpoints/7: .*{name}"):
        checkpoint.verify(folder)
    store = reopened(tmp_path / "copy")
    if damage == "empty":  # a save that was never completed is no checkpoint
        assert store.restore_latest(state) is None
        return
    with pytest.raises(DmfError, match=r"none of the checkpoints of steps \[7\] can be read"):
        store.restore_latest(state)


def test_a_disk_that_cannot_read_the_newest_checkpoint_lets_the_one_before_be_taken(
    saved, tmp_path, monkeypatch, caplog
):
    workdir, state = saved
    shutil.copytree(workdir, tmp_path / "copy")
    newest = tmp_path / "copy" / "checkpoints" / "8"
    shutil.copytree(newest.parent / "7", newest)
    real = hashlib.file_digest

    def read(file, name):
        if newest in Path(file.name).parents:
            raise OSError(5, "Input/output error")
        return real(file, name)

    monkeypatch.setattr(hashlib, "file_digest", read)
    found = reopened(tmp_path / "copy").restore_latest(state)
    assert found is not None and int(found.step) == int(state.step)
    assert f"checkpoint {newest}: OSError: [Errno 5] Input/output error: '{newest}/" in caplog.text


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path):
    assert reopened(tmp_path).restore_latest(Setup().state()) is None


def test_weights_of_another_shape_or_type_are_refused_by_name(saved):
    workdir, state = saved
    folder = checkpoint.find(workdir)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params
    )
    found = checkpoint.read_params(folder, 1, like)
    np.testing.assert_array_equal(jax.tree.leaves(found)[0], jax.tree.leaves(state.ema[1])[0])
    kernel = like["x_embedder"]["proj"]["kernel"]
    like["x_embedder"]["proj"]["kernel"] = jax.ShapeDtypeStruct(
        (3, 5), kernel.dtype, sharding=kernel.sharding
    )
    with pytest.raises(
        DmfError,
        match=r"weight x_embedder.proj.kernel is float32\[4, 4, 1, 32\], "
        r"not float32\[3, 5\]",
    ):
        checkpoint.read_params(folder, None, like)
    like["x_embedder"]["proj"]["kernel"] = jax.ShapeDtypeStruct(
        kernel.shape, "bfloat16", sharding=kernel.sharding
    )
    with pytest.raises(DmfError, match="is float32.*not bfloat16"):
        checkpoint.read_params(folder, None, like)
    del like["x_embedder"]
    with pytest.raises(DmfError, match=r"has an unexpected weight x_embedder"):
        checkpoint.read_params(folder, None, like)


def test_a_full_disk_is_one_sentence_and_loses_nothing(saved, monkeypatch):
    workdir, state = saved
    store = reopened(workdir)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store._checkpointer, "save_checkpointables_async", full)
    with pytest.raises(
        DmfError,
        match="checkpoint of step 9 could not be written .*No space left on device.*untouched",
    ):
        store.save(9, state)
    checkpoint.verify(workdir / "checkpoints" / "7")


def test_json_lines_forget_what_lies_beyond_the_resumed_step_and_a_torn_last_line(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    assert lines.read() == []
    for n in (1, 2, 3):
        lines.write({"step": n})
    with lines.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [r["step"] for r in lines.read()] == [1, 2, 3]
    lines.resume(2)
    assert lines.path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert list(tmp_path.iterdir()) == [lines.path]


def test_event_files_are_written_where_wanted(tmp_path):
    board = TensorBoard(tmp_path / "on", True)
    board.write(3, {"loss": 0.5})
    board.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "on"))
    events.Reload()
    assert events.Tags()["tensors"] == ["loss"]
    quiet = TensorBoard(tmp_path / "off", False)
    quiet.write(3, {"loss": 0.5})
    quiet.close()
    assert not (tmp_path / "off").exists()


def test_event_files_that_cannot_be_written_are_told_once_and_do_without(
    tmp_path, monkeypatch, caplog
):
    from clu import metric_writers

    class Broken:
        def __init__(self, folder):
            self.write_scalars = self.close = self._fail

        def _fail(self, *_):
            raise RuntimeError("the disk is full")

    monkeypatch.setattr(metric_writers, "SummaryWriter", Broken)
    for use in (lambda board: board.write(1, {"loss": 0.5}), TensorBoard.close):
        caplog.clear()
        board = TensorBoard(tmp_path / "tensorboard", True)
        board.open()
        use(board)
        board.write(2, {"loss": 0.5})
        board.close()
        (said,) = caplog.messages
        assert (
            said == f"{tmp_path}/tensorboard: RuntimeError: the disk is full; "
            "no more event files are written"
        )


def test_nothing_to_write_opens_no_event_file(tmp_path):
    board = TensorBoard(tmp_path / "tensorboard", True)
    board.write(0, {})
    board.close()
    assert not (tmp_path / "tensorboard").exists()


def test_progress_shows_rate_and_time_left(capsys, monkeypatch):
    now = iter([-9.0, 0.0, 0.0, 10.0, 30.0])
    monkeypatch.setattr("dmf.logging.time.monotonic", lambda: next(now))
    progress = Progress(401, 0)
    progress.restart(1)  # the first step, with all that comes with it, tells no rate
    progress.show(1, "stage 1", 0.75)
    progress.show(101, "stage 1", 0.25)  # 10 steps a second
    progress.show(201, "stage 1", 0.5)
    text = capsys.readouterr().out.splitlines()
    assert text[0] == "stage 1    step 1/401  loss 0.75"
    assert text[1] == "stage 1    step 101/401  loss 0.25  10.0 steps/s  0:00:30 left"
    assert "8.5 steps/s" in text[2]  # .7 * 10 + .3 * 5


def test_a_count_comes_every_ten_seconds_and_at_its_end(capsys, monkeypatch):
    now = iter([0.0, 5.0, 10.0, 15.0, 20.0])
    monkeypatch.setattr("dmf.logging.time.monotonic", lambda: next(now))
    count = Count("encode", 2000, "images")
    for done in (500, 1000, 1500, 2000):
        count.show(done)
    text = capsys.readouterr().out.splitlines()
    assert text == [
        "encode     1,000/2,000 images  100/s  0:00:10 left",
        "encode     2,000/2,000 images  100/s  0:00:20",
    ]


def test_a_terminal_shows_a_line_of_progress_rewritten(capsys, monkeypatch):
    monkeypatch.setattr("dmf.logging.sys.stdout.isatty", lambda: True, raising=False)
    count, progress = Count("encode", 2, "images"), Progress(2, 0)
    for show in (lambda n: count.show(n), lambda n: progress.show(n, "stage 1", 0.5)):
        show(1)
        show(2)
    first, second, *steps = capsys.readouterr().out.split("\r")[1:]
    assert first.endswith("\033[K") and second.endswith("\033[K\n")  # the last one is kept
    assert [line.endswith("\033[K") for line in steps] == [True, True]  # until `pause`


def test_a_grid_shows_every_sample_where_it_belongs(tmp_path):
    samples = np.full((4, 8, 8, 1), -1.0, np.float32)
    samples[2] = 1.0
    pictures.panels(tmp_path / "p.png", {"a": samples, "b": -samples}, 2)
    page = np.asarray(Image.open(tmp_path / "p.png").convert("L"))
    cell = 8 * 4 + pictures.GAP
    assert page.shape == (2 * cell + pictures.CAPTION, 2 * 2 * cell + 4 * pictures.GAP)
    middle = lambda panel, row, column: page[  # noqa: E731
        pictures.CAPTION + row * cell + 16,
        panel * (2 * cell + 4 * pictures.GAP) + column * cell + 16,
    ]
    assert [int(middle(0, r, c)) for r in (0, 1) for c in (0, 1)] == [0, 0, 255, 0]
    assert [int(middle(1, r, c)) for r in (0, 1) for c in (0, 1)] == [255, 255, 0, 255]
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["p.png"]'


def test_colour_is_kept():
    red = np.zeros((1, 4, 4, 3), np.float32) + np.array([1.0, -1.0, -1.0], np.float32)
    assert pictures.grid(pictures.pixels_of(red), 1, 2).getpixel((3, 3)) == (255, 0, 0)
