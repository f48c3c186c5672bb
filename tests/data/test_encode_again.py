"""Encodings that go on, and directories and input that are refused in one line."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from dmf import data, pretrained
from dmf.convert import encode
from dmf.data import shards
from dmf.data.images import open_images
from dmf.errors import DmfError
from dmf.storage import checkpoint
from tests.data.encoding import (
    COUNT,
    SETTINGS,
    TOTAL,
    Crash,
    config,
    contents,
    cut,
    flip_a_byte,
    make_vae,
    records,
    shard,
)
from tests.data.encoding import copy as copy
from tests.data.encoding import program as program
from tests.data.encoding import source as source
from tests.data.encoding import vae as vae
from tests.data.encoding import whole as whole
from tests.data.test_images import encoded, pixels


def interrupted(vae: Path, source: Path, out: Path, finished: int) -> None:
    """Begins an encoding that ends after `finished` shards."""
    real = shards.write_shard

    def write_shard(path: Path, *arguments: object) -> None:
        if len(shards.begun(path.parent)) == finished:
            raise Crash
        real(path, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(shards, "write_shard", write_shard)
        encode.encode(vae, str(source), out, **SETTINGS)


def test_settings_may_change_as_long_as_no_shard_is_finished(
    vae: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(vae, source, tmp_path / "out", 0)
    (tmp_path / "out" / "train" / "latents-00000-of-00004.array_record").write_bytes(
        b"renamed, not vouched for"
    )
    encode.encode(vae, str(source), tmp_path / "out", **(SETTINGS | {"shard_size": 12}))
    assert "note      " in capsys.readouterr().out
    encode.encode(vae, str(source), tmp_path / "new", **(SETTINGS | {"shard_size": 12}))
    assert contents(tmp_path / "out") == contents(tmp_path / "new")
    interrupted(vae, source, tmp_path / "one", 1)
    with pytest.raises(DmfError, match="begun otherwise: shard_size: 6 -> 7"):
        encode.encode(vae, str(source), tmp_path / "one", **(SETTINGS | {"shard_size": 7}))


def test_an_image_is_repaired_without_losing_the_shards_of_others(
    whole: Path, vae: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = shutil.copytree(source, tmp_path / "pets"), tmp_path / "out"
    order = [p.relative_to(images) for p in sorted(images.rglob("*.png"))]
    cut(images / order[20])  # in the last shard; those before it are on their way by then
    with pytest.raises(DmfError, match=f"{order[20].name} cannot be read"):
        encode.encode(vae, str(images), out, **SETTINGS)
    kept = {path: path.stat().st_mtime_ns for path in shards.begun(out / "train")}
    shutil.copy(source / order[20], images / order[20])
    encode.encode(vae, str(images), out, **SETTINGS)
    assert (
        kept
        and f"{len(kept)} of {len(kept)} finished shards are of unchanged ones"
        in capsys.readouterr().out
    )
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert contents(out) == contents(whole)
    # Of a complete encoding the one shard whose images have changed is made again.
    with (images / order[0]).open("ab") as file:
        file.write(b"longer")
    stamps = {i: shard(out, i).stat().st_mtime_ns for i in range(TOTAL)}
    encode.encode(vae, str(images), out, **SETTINGS)
    assert f"again     {shard(out, 0)} is of other images" in capsys.readouterr().out
    assert [i for i in range(TOTAL) if shard(out, i).stat().st_mtime_ns != stamps[i]] == [0]
    about = encode.verify(out)[0]
    assert about["source"] == open_images(str(images)).about
    np.testing.assert_array_equal(
        records(out), records(whole)
    )  # what follows a PNG is no part of the image


def test_a_source_that_has_no_image_of_the_finished_shards_is_refused(
    copy: Path, whole: Path, vae: Path, source: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(source, tmp_path / "other" / "pets")
    for path in other.rglob("*.png"):
        with path.open("ab") as file:
            file.write(b"x")
    with pytest.raises(
        DmfError,
        match="begun otherwise: source.sha256: .*; expected the same command, or another "
        "directory$",
    ):
        encode.encode(vae, str(other), copy, **SETTINGS)
    next(other.rglob("*.png")).unlink()
    with pytest.raises(
        DmfError,
        match="source.count: 23 -> 22; .*an image that cannot be read is replaced under its name",
    ):
        encode.encode(vae, str(other), copy, **SETTINGS)
    assert contents(copy) == contents(whole)


def test_a_resumed_run_says_that_other_versions_made_the_finished_shards(
    whole: Path,
    vae: Path,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted(vae, source, tmp_path, 2)
    encode.encode(vae, str(source), tmp_path, **SETTINGS)
    printed = capsys.readouterr().out
    assert (
        "note" not in printed
        and "verify     2/2 shards" in printed
        and "23 images in 3 classes, 2 of 4 shards" in printed
    )
    shard(tmp_path, 3).unlink()
    made_with = encode.made_with()
    monkeypatch.setattr(encode, "made_with", lambda: made_with | {"jax": "99"})
    encode.encode(vae, str(source), tmp_path, **SETTINGS)
    assert (
        f"note      finished shards were made otherwise (jax: {jax.__version__} -> 99): the "
        "others may" in capsys.readouterr().out
    )
    assert [made["jax"] for made in encode.verify(tmp_path)[0]["made_with"]] == [
        jax.__version__,
        "99",
    ]


def test_what_dead_processes_of_this_machine_left_is_cleared(
    vae: Path, source: Path, tmp_path: Path
) -> None:
    interrupted(vae, source, tmp_path, 1)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, start = socket.gethostname(), ".latents-00002-of-00004.array_record.partial-"
    left = {
        name: tmp_path / "train" / (start + name)
        for name in (f"{host}-{dead.pid}", f"{host}-1", f"not-{host}-{dead.pid}")
    }
    for path in left.values():
        path.write_bytes(b"half")
    encode.encode(vae, str(source), tmp_path, **SETTINGS)
    assert [path.exists() for path in left.values()] == [
        False,
        True,
        True,
    ]  # process 1 lives, and of another machine none knows


def test_a_batch_that_does_not_fit_is_one_line_that_names_it(
    vae: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(message: str) -> Callable:
        def program(*_: object) -> None:
            raise jax.errors.JaxRuntimeError(message)

        return lambda network, mesh: program

    monkeypatch.setattr(
        encode, "_program", no_room("RESOURCE_EXHAUSTED: Out of memory\nwhile trying")
    )
    with pytest.raises(
        DmfError, match="batch is 2: expected one that fits into the device's memory .RESOURCE"
    ) as error:
        encode.encode(vae, str(source), tmp_path, **SETTINGS)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(encode, "_program", no_room("INTERNAL: our bug"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="our bug"):
        encode.encode(vae, str(source), tmp_path, **SETTINGS)


def test_a_disk_that_cannot_read_a_finished_shard_lets_it_be_made_again(
    copy: Path,
    whole: Path,
    vae: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, bad = shards.sha256, [shard(copy, 2)]

    def failing(path: Path) -> str:
        if path in bad:
            bad.remove(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setattr(shards, "sha256", failing)
    encode.encode(vae, str(source), copy, **SETTINGS)
    assert (
        f"again     {shard(copy, 2)} cannot be read (Input/output error)" in capsys.readouterr().out
    )
    assert contents(copy) == contents(whole)
    real_unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == "metadata.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        real_unlink(path, missing_ok)

    flip_a_byte(shard(copy, 1))
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(DmfError, match="train cannot be written .*Permission denied"):
        encode.encode(vae, str(source), copy, **SETTINGS)


@pytest.mark.parametrize(
    ("split", "folder"),
    [
        ("train", "train"),
        ("train[:10%]", "train"),
        ("train2", "heldout"),
        ("validation[5:]", "heldout"),
        ("train[:10]+validation", ""),
        ("validation+train", ""),
        ("all", ""),
    ],
)
def test_a_split_goes_to_one_of_two_folders_and_never_to_both(
    split: str, folder: str, tmp_path: Path
) -> None:
    if folder:
        assert encode._part(split) == folder
        return
    with pytest.raises(
        DmfError, match="split is .*, which may mix what is trained on and what is held out"
    ):
        encode.encode(tmp_path, str(tmp_path), tmp_path / "out", split=split)
    assert not (tmp_path / "out").exists()


def test_half_precision_rounds_the_same_values(
    whole: Path, vae: Path, source: Path, tmp_path: Path
) -> None:
    encode.encode(vae, str(source), tmp_path, **SETTINGS, dtype="float16")
    exact, found = records(whole), records(tmp_path, "<f2")
    np.testing.assert_array_equal(found, exact.astype(np.float16))
    batch = data.batch(data.load(config(tmp_path, flip=True), "train"), 0, 0, COUNT)
    assert batch["x"].dtype == batch["std"].dtype == np.float32
    same = data.batch(data.load(config(whole, flip=True), "train"), 0, 0, COUNT)
    np.testing.assert_allclose(batch["x"], same["x"], rtol=2**-11, atol=1e-8)
    np.testing.assert_allclose(batch["std"], same["std"], rtol=2**-11, atol=1e-8)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    whole: Path, vae: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (50_000, 100_000, 300):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            with pytest.raises(
                DmfError, match="train cannot be written .*File too large.*: expected .* with room"
            ) as error:
                encode.encode(vae, str(source), tmp_path, **SETTINGS)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert "\n" not in str(error.value)
        assert (
            {p.name for p in (tmp_path / "train").iterdir()} == {"plan.json"}
            if size > 300
            else True
        )
        if size == 100_000:
            shutil.rmtree(tmp_path / "train")
    encode.encode(vae, str(source), tmp_path, **SETTINGS)
    assert contents(tmp_path) == contents(whole)


def test_two_processes_cannot_encode_into_one_directory(
    copy: Path, vae: Path, source: Path
) -> None:
    handle = os.open(copy / "train", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        with pytest.raises(DmfError, match="train: another process writes into it"):
            encode.encode(vae, str(source), copy, **SETTINGS)
    finally:
        os.close(handle)
    encode.encode(vae, str(source), copy, **SETTINGS)


def truncated(folder: Path) -> str:
    for i in range(20):
        (folder / f"{i:02}.jpg").write_bytes(encoded(pixels(i), "jpeg"))
    (folder / "17.jpg").write_bytes(encoded(pixels(17, 64, 64), "jpeg", quality=95)[:-200])
    return str(folder)


def nan_images(folder: Path) -> str:
    np.savez(folder / "nan.npz", np.full((4, 8, 8, 3), np.nan))
    return str(folder / "nan.npz")


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (str, {}, "holds no images"),
        (nan_images, {}, r"arr_0 is float64\[4, 8, 8, 3\]: expected images \(N, H, W, 3\) uint8"),
        (truncated, {}, "17.jpg cannot be read .*truncated"),
        (truncated, {"size": 15}, "size is 15: expected a multiple of 2"),
        (truncated, {"dtype": "bfloat16"}, "dtype is 'bfloat16': expected one of float32, float16"),
        (truncated, {"shard_size": 0}, "shard_size is 0: expected 1 or more"),
        (truncated, {"batch": 0}, "batch is 0: expected 1 or more"),
    ],
)
def test_bad_input_is_one_line(
    make: Callable[[Path], str], change: dict[str, object], message: str, vae: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DmfError, match=message) as error:
        encode.encode(vae, make(tmp_path / "in"), tmp_path / "out", **(SETTINGS | change))
    assert "\n" not in str(error.value)
    left = [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert not any(
        name.startswith(".") or "00002-of" in name for name in left
    )  # the bad image stands in the third shard


def test_only_an_autoencoder_with_its_encoder_encodes(
    vae: Path, source: Path, tmp_path: Path
) -> None:
    decoder = make_vae(tmp_path, part="decoder")
    with pytest.raises(
        DmfError,
        match="holds the part 'decoder' .*: expected an autoencoder of RGB images with its encoder",
    ):
        encode.encode(decoder, str(source), tmp_path / "out", **SETTINGS)
    network = pretrained.network_config(
        {"kind": "dit", "depth": 1, "width": 32, "heads": 2, "patch": 4}
    )
    metadata = pretrained.metadata(network, (8, 8, 4), {})
    checkpoint.save_weights(tmp_path / "flow", {"w": np.zeros(1, np.float32)}, metadata, {})
    with pytest.raises(DmfError, match="flow holds a dit: expected an autoencoder"):
        encode.encode(tmp_path / "flow", str(source), tmp_path / "out", **SETTINGS)
    with pytest.raises(DmfError, match="none: no such file or directory"):
        encode.encode(tmp_path / "none", str(source), tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_a_latent_that_overflows_is_one_line_that_names_the_image(
    vae: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = encode._program

    def large(network: object, mesh: object) -> Callable:
        program = real(network, mesh)
        return lambda params, pixels: program(params, pixels).at[3].multiply(1e6)

    monkeypatch.setattr(encode, "_program", large)
    with pytest.raises(
        DmfError, match="image 3 of pets has a latent that is not finite in float16"
    ):
        encode.encode(vae, str(source), tmp_path, **SETTINGS, dtype="float16")


def test_foreign_directories_are_left_alone(vae: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "thesis.tex").write_text("")
    with pytest.raises(DmfError, match="train is not empty, and holds no plan.json"):
        encode.encode(vae, str(source), tmp_path, **SETTINGS)
    (tmp_path / "train" / "plan.json").write_text("[")
    with pytest.raises(DmfError, match=r"plan.json line 1: no JSON"):
        encode.encode(vae, str(source), tmp_path, **SETTINGS)


def test_what_an_earlier_version_began_goes_on_as_it_read(
    vae: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = Path(shutil.copytree(source, tmp_path / "pets"))
    for i, name in enumerate(("1", "2", "10")):
        (numbers / f"class{i}").rename(numbers / name)
    encode.encode(vae, str(numbers), tmp_path / "new", **SETTINGS)
    about = shards.metadata(tmp_path / "new" / "train")
    assert about["classes"] == ["1", "2", "10"] and "EXIF" in about["reading"]
    assert data.load(config(tmp_path / "new"), "train").classes == ("1", "2", "10")
    assert "classes   0 1, 1 2, 2 10" in capsys.readouterr().out
    out = tmp_path / "old"
    with pytest.MonkeyPatch.context() as patch:  # as the version before wrote it
        patch.setattr(encode, "is_former", lambda folder: True)
        encode.encode(vae, str(numbers), out, **SETTINGS)
    before, count = contents(out), len(shards.metadata(out / "train")["shards"])
    assert not {"classes", "reading"} & shards.metadata(out / "train").keys()
    shard(out, 1).unlink()
    encode.encode(vae, str(numbers), out, **SETTINGS)
    told = capsys.readouterr().out
    assert "was begun by an earlier version" in told and f"{count - 1} of {count} shards" in told
    assert contents(out) == before
    text, number = (np.load(tmp_path / p / "train" / shards.LABELS) for p in ("old", "new"))
    assert text.tolist() == np.array([0, 2, 1])[number].tolist()
