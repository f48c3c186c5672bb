"""Encoded images: values, bits that stay, files that survive a kill or show damage, batches."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader

from dmf import data, pretrained, sharding, step
from dmf.config import parse
from dmf.convert import encode
from dmf.convert.command import convert
from dmf.convert.vae import SD_VAE
from dmf.data import DataConfig, shards
from dmf.data.images import center_crop, open_images
from dmf.errors import DmfError
from dmf.networks.frozen.vae import VAEConfig
from dmf.storage import checkpoint
from dmf.storage.readers.read import sha256
from tests import ROOT, runs
from tests.conversion import export_arrays, small_noise
from tests.data.test_data import PARTITIONS, WITHOUT_TENSORFLOW, numbered, reassembled
from tests.data.test_images import COUNTS, TinyFaces, encoded, pixels
from tests.tiny import TINY, merged

COUNT, CLASSES, SIDE, SHARD, TOTAL = 23, 3, 16, 6, 4
SETTINGS = {"size": SIDE, "shard_size": SHARD, "batch": 2}
LATENT = (SIDE // 2, SIDE // 2, 4)


def make_vae(folder: Path, **given: object) -> Path:
    """A tiny autoencoder with random weights, converted from a file in diffusers' layout."""
    config = VAEConfig(channels=(16, 32), blocks=1, groups=8)
    network = pretrained.build(config, ())
    params = small_noise(network.init(jax.random.key(0)))
    safetensors.numpy.save_file(
        export_arrays(SD_VAE, config, (), network, params), folder / "vae.safetensors"
    )
    convert(
        "sd_vae",
        folder / "vae.safetensors",
        folder / "vae",
        given={"groups": 8, **given},
        check="none",
    )
    return folder / "vae"


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of several sizes in three classes."""
    root = tmp_path_factory.mktemp("images") / "pets"
    for i in range(COUNT):
        path = root / f"class{i % CLASSES}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(pixels(i, 16 + i, 40 - i)))
    return root


@pytest.fixture(scope="module", autouse=True)
def program() -> object:
    """The encoder, read and compiled once per mesh for all calls below."""
    compiled, load, patch = encode._program, pretrained.load_folder, pytest.MonkeyPatch()
    network = pretrained.build(VAEConfig(channels=(16, 32), blocks=1, groups=8), ())
    programs = functools.cache(lambda mesh: compiled(network, mesh))
    weights: dict[object, object] = {}

    def load_once(folder: Path, stored: dict[str, object], ema: float | None = None) -> object:
        key = folder, sharding.make_mesh()
        if key not in weights:
            weights[key] = load(folder, stored, ema)
        return weights[key]

    patch.setattr(encode, "_program", lambda network, mesh: programs(mesh))
    patch.setattr(pretrained, "load_folder", load_once)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def whole(vae: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoding of `source` that was never interrupted: OUT."""
    out = tmp_path_factory.mktemp("whole")
    assert encode.encode(vae, str(source), out, **SETTINGS) == out / "train"
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def contents(out: Path) -> dict[str, str]:
    """{relative path: SHA-256} of every file, hidden ones too."""
    files = [p for p in out.rglob("*") if p.is_file()]
    return {
        p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def shard(out: Path, i: int) -> Path:
    return out / "train" / f"latents-{i:05}-of-{TOTAL:05}.array_record"


def records(out: Path, dtype: str = "<f4") -> np.ndarray:
    """All records (2 N, mean or std, h, w, c), read without our code."""
    raw = [
        record for i in range(TOTAL) for record in ArrayRecordReader(str(shard(out, i))).read_all()
    ]
    return np.stack([np.frombuffer(record, dtype).reshape(2, *LATENT) for record in raw])


def test_every_record_is_the_law_of_an_image_or_of_its_mirror_image(
    whole: Path, vae: Path, source: Path
) -> None:
    network, params = pretrained.load(vae)
    images, found = open_images(str(source)), records(whole)
    assert len(found) == 2 * COUNT
    x = (
        np.stack([center_crop(images.read(i), SIDE) for i in range(COUNT)]).astype(np.float32)
        / 127.5
        - 1
    )
    both = np.stack([x, x[:, :, ::-1]], axis=1).reshape(-1, SIDE, SIDE, 3)
    with jax.default_matmul_precision("highest"):
        mean, logvar = jax.jit(network.encode)(params, both)
    np.testing.assert_allclose(found[:, 0], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[:, 1], np.exp(np.asarray(logvar) / 2), rtol=1e-4)
    assert np.abs(mean).mean() > 0.1 and found[:, 1].std() > 1e-3
    # The mirror image has a latent of its own.
    assert np.abs(found[1::2, 0] - found[::2, 0][:, :, ::-1]).mean() > 0.01


def test_the_metadata_tell_what_was_encoded_by_what(whole: Path, vae: Path, source: Path) -> None:
    about = json.loads((whole / "train" / "metadata.json").read_text())
    assert (
        about["vae"]["sha256"] == sha256(vae.parent / "vae.safetensors")
        and about["vae"]["file"] == "vae.safetensors"
    )
    assert about["vae"]["network"]["channels"] == [16, 32]
    assert about["source"] == open_images(str(source)).about and about["source"]["name"] == "pets"
    assert (
        about["count"] == COUNT
        and about["num_classes"] == CLASSES
        and about["latent_shape"] == list(LATENT)
    )
    assert (
        about["scale"] == 0.18215
        and about["dtype"] == "float32"
        and about["image_size"] == SIDE
        and about["flips"]
    )
    assert about["made_with"][0]["jax"] == jax.__version__ and len(about["made_with"]) == 1
    assert [s["count"] for s in about["shards"]] == [6, 6, 6, 5]
    assert {s["name"]: s["sha256"] for s in about["shards"]} == {
        name.removeprefix("train/"): digest
        for name, digest in contents(whole).items()
        if name.endswith("array_record")
    }
    labels = np.load(whole / "train" / "labels.npy")
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, np.sort(np.arange(COUNT) % CLASSES))
    assert (
        encode.verify(whole)
        == encode.verify(whole / "train")
        == [{k: v for k, v in about.items() if k != "seal"}]
    )


def test_the_program_multiplies_at_the_highest_precision(vae: Path) -> None:
    network, params = pretrained.load(vae)
    mesh = sharding.make_mesh()
    lowered = encode._program(network, mesh).lower(
        params, jax.ShapeDtypeStruct((16, SIDE, SIDE, 3), jnp.uint8)
    )
    products = [
        line
        for line in lowered.as_text().splitlines()
        if "stablehlo.convolution" in line or "dot_general" in line
    ]
    assert len(products) > 10 and all(line.count("HIGHEST") == 2 for line in products)


def test_one_device_gives_the_bits_of_eight(
    whole: Path, vae: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, used = sharding.make_mesh, []
    monkeypatch.setattr(
        sharding, "make_mesh", lambda: used.append(real(devices=jax.devices()[:1])) or used[-1]
    )
    encode.encode(vae, str(source), tmp_path, **SETTINGS)
    assert {mesh.devices.size for mesh in used} == {1} and real().devices.size == 8
    assert contents(tmp_path) == contents(whole)


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from dmf.data import images, shards
from dmf.convert.encode import encode
write = shards.write_shard
# so that shards come one by one
shards.write_shard = lambda *arguments: time.sleep(0.3) or write(*arguments)
crop = images.center_crop
images.center_crop = lambda *arguments: time.sleep(0.05) or crop(*arguments)  # time to be killed in
vae, source, out, kills = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
draw = random.Random()
for kill in range(kills):
    child = os.fork()  # jax has started nothing yet
    if child == 0:
        encode(vae, source, out, size={size}, shard_size={shard_size}, batch={batch})
        os._exit(0)
    # so that the work goes on from kill to kill
    wanted, deadline = kill // 3, time.monotonic() + 60
    while time.monotonic() < deadline and not Path(out, "train", "plan.json").exists():
        time.sleep(0.001)
    there = lambda: len(list(Path(out).glob("train/*.array_record")))
    while time.monotonic() < deadline and there() < wanted:
        time.sleep(0.001)
    time.sleep(draw.random() * (0.1 if wanted else 0.8))
    os.kill(child, signal.SIGKILL)  # one that has ended waits to be asked for its status
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    # flushed: else the next child would inherit the line and print it again
    print("\\nkilled", killed, there(), flush=True)
""".format(**SETTINGS)


def test_an_encoding_killed_at_random_moments_ends_in_the_same_bytes(
    whole: Path, vae: Path, source: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLS, str(vae), str(source), str(tmp_path), "8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("killed")]
    assert (
        len(kills) == 8 and sum(killed == "True" for killed, _ in kills) >= 6
    )  # a fast one may end before its kill
    assert any(0 < int(there) < TOTAL for _, there in kills)
    encode.encode(vae, str(source), tmp_path, **SETTINGS)
    assert contents(tmp_path) == contents(whole)


class Crash(BaseException):
    """Stands for the end of the process."""


def test_an_encoding_that_ends_before_any_change_on_disk_goes_on_to_the_same_bytes(
    vae: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends the process at each rename and each sync in turn; a dead process cleans nothing up."""
    real = {"replace": Path.replace, "fsync": os.fsync, "unlink": Path.unlink}
    settings, left, seen, place = SETTINGS | {"shard_size": 12}, [0], set(), 0
    encode.encode(vae, str(source), tmp_path / "whole", **settings)
    wanted, out = contents(tmp_path / "whole"), tmp_path / "out"

    def dying(name: str) -> Callable:
        def call(*arguments: object) -> object:
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            return real[name](*arguments)

        return call

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if left[0]:
            real["unlink"](path, missing_ok)

    for place in range(100):
        left[0] = place
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dying("replace"))
            patch.setattr(os, "fsync", dying("fsync"))
            patch.setattr(Path, "unlink", unlink)
            try:
                encode.encode(vae, str(source), out, **settings)
                break
            except Crash:
                seen.add(frozenset(contents(out)))
        encode.encode(vae, str(source), out, **settings)
        assert contents(out) == wanted, place
        shutil.rmtree(out)
    # plan, two shards with their .json, labels, metadata: each is synced, renamed, and its
    # directory synced
    assert place == 3 * (1 + 2 * 2 + 2) and len(seen) > 8


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[min(len(content) // 3, 10_000)] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "flipped byte": ("latents-00001-of-00004.array_record", flip_a_byte, "another SHA-256"),
    "cut": ("latents-00003-of-00004.array_record", cut, "bytes: expected"),
    "missing": ("latents-00000-of-00004.array_record", Path.unlink, "is missing: expected"),
    "labels": ("labels.npy", flip_a_byte, "another SHA-256"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_named_and_made_again(
    case: str, copy: Path, whole: Path, vae: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, damage, message = DAMAGE[case]
    damage(copy / "train" / name)
    with pytest.raises(DmfError, match=f"{name} .*{message}") as error:
        encode.verify(copy)
    assert "\n" not in str(error.value)
    kept = {
        p: p.stat().st_mtime_ns for p in (copy / "train").glob("*.array_record") if p.name != name
    }
    encode.encode(vae, str(source), copy, **SETTINGS)
    printed = capsys.readouterr().out
    assert contents(copy) == contents(whole)
    assert kept == {p: p.stat().st_mtime_ns for p in kept}  # what is intact is not made again
    if name.endswith("array_record"):
        assert (
            f"again     {copy / 'train' / name} " in printed
            and "3 of 4 shards are there" in printed
        )
    encode.verify(copy)


def test_while_a_shard_is_made_again_the_directory_is_not_complete(
    copy: Path, vae: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_a_byte(shard(copy, 3))

    def killed(*arguments: object) -> None:
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(encode, "_encode_shards", killed)
        encode.encode(vae, str(source), copy, **SETTINGS)
    with pytest.raises(DmfError, match="train is not encoded to its end"):
        data.load(config(copy), "train")
    with pytest.raises(DmfError, match="train is not encoded to its end"):
        encode.verify(copy)


@pytest.mark.parametrize(
    "damage",
    [flip_a_byte, cut, Path.unlink, lambda p: p.write_text(p.read_text().replace("[0,", "[1,"))],
)
def test_what_vouches_for_a_shard_is_vouched_for_too(
    damage: Callable[[Path], object], copy: Path, whole: Path, vae: Path, source: Path
) -> None:
    path = shard(copy, 0).with_suffix(".json")
    before = path.read_bytes()
    damage(path)
    assert not path.exists() or path.read_bytes() != before
    encode.encode(vae, str(source), copy, **SETTINGS)
    assert contents(copy) == contents(whole)


def test_a_complete_encoding_is_left_as_it_is(
    copy: Path, vae: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stamps = {p: p.stat().st_mtime_ns for p in (copy / "train").glob("*.array_record")}
    encode.encode(vae, str(source), copy, **SETTINGS)
    assert "4 of 4 shards are there" in capsys.readouterr().out
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 32}, r"image_size: 16 -> 32; latent_shape: \[8, 8, 4\] -> \[16, 16, 4\]"),
        ({"dtype": "float16"}, "dtype: float32 -> float16"),
        ({"shard_size": 7}, "shard_size: 6 -> 7"),
        ({"batch": 1}, "batch_per_device: 2 -> 1"),
        ({"split": "train[:1]"}, r"source.split: train -> train\[:1\]"),
    ],
)
def test_a_directory_begun_with_other_settings_is_refused(
    change: dict[str, object], message: str, copy: Path, whole: Path, vae: Path, source: Path
) -> None:
    with pytest.raises(
        DmfError, match=f"was begun otherwise: {message}; expected the same command"
    ) as error:
        encode.encode(vae, str(source), copy, **(SETTINGS | change))
    assert "\n" not in str(error.value) and contents(copy) == contents(whole)


def test_a_directory_begun_with_another_autoencoder_or_other_images_is_refused(
    copy: Path, whole: Path, vae: Path, source: Path, tmp_path: Path
) -> None:
    other = make_vae(tmp_path, scale=0.5)
    with pytest.raises(
        DmfError, match=r"scale: 0.18215 -> 0.5; vae.network.scale: 0.18215 -> 0.5; expected"
    ):
        encode.encode(other, str(source), copy, **SETTINGS)
    more = shutil.copytree(source, tmp_path / "more" / "pets")
    (more / "class0" / "x.png").write_bytes(encoded(pixels(0)))
    with pytest.raises(DmfError, match="count: 23 -> 24; source.count: 23 -> 24; source.sha256: "):
        encode.encode(vae, str(more), copy, **SETTINGS)
    assert contents(copy) == contents(whole)


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
    made_with = encode._made_with()
    monkeypatch.setattr(encode, "_made_with", lambda: made_with | {"jax": "99"})
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
        with pytest.raises(DmfError, match="train: another process encodes into it"):
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
    with pytest.raises(DmfError, match=r"plan.json cannot be read \(JSONDecodeError\)"):
        encode.encode(vae, str(source), tmp_path, **SETTINGS)


# The data set


def config(out: Path, flip: bool = False) -> DataConfig:
    return DataConfig(name="imagenet256_latents", data_dir=str(out), flip=flip)


def test_a_batch_is_the_scaled_law_of_the_rows_that_any_data_set_would_give(whole: Path) -> None:
    dataset, stored, like = data.load(config(whole), "train"), records(whole), numbered(COUNT)
    assert (
        len(dataset) == COUNT and dataset.image_shape == LATENT and dataset.num_classes == CLASSES
    )
    assert (
        dataset.name == "imagenet256_latents"
        and dataset.split == "train"
        and dataset.about["vae"]["sha256"]
    )
    for n in (0, 1, 7):
        batch, rows = data.batch(dataset, 5, n, 8), data.batch(like, 5, n, 8)["label"]
        assert set(batch) == {"x", "std", "label"}
        np.testing.assert_array_equal(batch["label"], dataset.labels[rows])
        np.testing.assert_array_equal(batch["x"], np.float32(0.18215) * stored[2 * rows, 0])
        np.testing.assert_array_equal(batch["std"], np.float32(0.18215) * stored[2 * rows, 1])
        assert (
            batch["x"].dtype == batch["std"].dtype == np.float32
            and batch["label"].dtype == np.int32
        )


def test_with_flip_each_row_is_one_of_the_two_copies_drawn_by_seed_and_step(whole: Path) -> None:
    dataset, plain = data.load(config(whole, flip=True), "train"), data.load(config(whole), "train")
    stored, like = np.float32(0.18215) * records(whole), numbered(COUNT)
    copies = []
    for seed, n in [(s, n) for s in range(3) for n in range(12)]:
        batch, rows = data.batch(dataset, seed, n, 8), data.batch(like, seed, n, 8)["label"]
        mirrored = np.array(
            [np.array_equal(x, stored[2 * i + 1, 0]) for x, i in zip(batch["x"], rows, strict=True)]
        )
        for name, part in (("x", 0), ("std", 1)):
            np.testing.assert_array_equal(batch[name], stored[2 * rows + mirrored, part])
        np.testing.assert_array_equal(batch["label"], data.batch(plain, seed, n, 8)["label"])
        copies.append(mirrored)
    assert abs(np.mean(copies) - 0.5) < 4 * 0.5 / np.sqrt(36 * 8)
    assert len({tuple(c) for c in copies}) > 30  # another draw at every seed and step


@pytest.mark.parametrize("parts", PARTITIONS.values(), ids=PARTITIONS)
def test_the_copies_do_not_depend_on_which_host_asks_for_them(
    parts: list[list[int]], whole: Path
) -> None:
    dataset = data.load(config(whole, flip=True), "train")
    together, found = data.batch(dataset, 1, 3, 8), reassembled(dataset, 1, 3, 8, parts)
    for name in ("x", "std", "label"):
        np.testing.assert_array_equal(found[name], together[name])


def test_the_copies_never_change_between_versions_and_know_nothing_of_the_order() -> None:
    assert "".join(map(str, data._mirrored(3, 17, 24))) == "110011110010011010100111"
    # The same key serves both where step and epoch agree: the streams must differ nevertheless.
    order, copies = np.argsort(data._permutation(4096, 0, 5)), data._mirrored(0, 5, 4096)
    assert abs(np.corrcoef(order, copies)[0, 1]) < 5 / np.sqrt(4096)


def test_a_mock_goes_the_same_way(whole: Path) -> None:
    for flip in (False, True):
        dataset = data.load(DataConfig(name="imagenet256_latents", mock=True, flip=flip), "train")
        batch, plain = (
            data.batch(dataset, 0, 2, 64),
            data.batch(data.load(DataConfig("imagenet256_latents", mock=True), "train"), 0, 2, 64),
        )
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            "x": ((64, 32, 32, 4), np.float32),
            "std": ((64, 32, 32, 4), np.float32),
            "label": ((64,), np.int32),
        }
        same = (batch["x"] == plain["x"]).all((1, 2, 3))
        turned = (batch["x"] == plain["x"][:, :, ::-1]).all((1, 2, 3))
        assert (same | turned).all() and turned.any() == flip and same.any()


def test_a_tfds_data_set_is_encoded_and_read_split_by_split(vae: Path, tmp_path: Path) -> None:
    TinyFaces(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    for split in COUNTS:
        encode.encode(
            vae,
            "tfds:tiny_faces",
            tmp_path / "out",
            **SETTINGS,
            data_dir=str(tmp_path / "tfds"),
            split=split,
        )
    assert [about["count"] for about in encode.verify(tmp_path / "out")] == [11, 4]
    for split, part in (("train", "train"), ("validation", "heldout")):
        dataset = data.load(config(tmp_path / "out", flip=True), part)
        images = open_images("tfds:tiny_faces", str(tmp_path / "tfds"), split)
        assert dataset.labels.tolist() == [images.example(i)[1] for i in range(COUNTS[split])]
        assert (
            len(dataset) == COUNTS[split] and dataset.about["source"]["name"] == "tiny_faces/1.0.0"
        )
        assert dataset.flip == (part == "train")  # what is held out is shown as it is
        # The folder itself will do for training.
        if part == "train":
            assert len(data.load(config(tmp_path / "out" / "train"), "train")) == COUNTS[split]


def test_a_training_step_is_taken_from_encoded_images(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])  # one device compiles faster
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: mesh)
    where = {"name": "imagenet256_latents", "data_dir": str(whole), "flip": True}
    run = runs.open_run(
        parse(
            merged(
                TINY,
                batch_size=16,
                data=where,
                network={"num_classes": CLASSES},
                times={"r_neq_t_fraction": 0.5},
            )
        ),
        tmp_path,
    )
    batch = sharding.put_rows(mesh, data.batch(run.dataset, 0, 0, 16))
    scalars = step.step_scalars(0, run.stages[0], run.stages, run.config)
    before = runs.begin(run)
    start = jax.tree.leaves(jax.device_get(before.params))
    now, metrics = run.steps[run.stages[0].kind](before, batch, scalars)
    run.close()
    assert (
        int(now.step) == 1
        and np.isfinite(float(metrics["loss"]))
        and int(metrics["nonfinite_leaf"]) == -1
    )
    assert any(
        not np.array_equal(a, b) for a, b in zip(start, jax.tree.leaves(now.params), strict=True)
    )


def test_latents_are_read_where_neither_tensorflow_nor_jax_is_imported(whole: Path) -> None:
    code = f"""
from dmf.data import DataConfig, batch, load
dataset = load(DataConfig("imagenet256_latents", data_dir={str(whole)!r}, flip=True), "train")
print(float(batch(dataset, 0, 0, 16)["x"].sum(dtype="f8")))
assert "jax" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", WITHOUT_TENSORFLOW + code]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = data.batch(data.load(config(whole, flip=True), "train"), 0, 0, 16)["x"].sum(dtype="f8")
    assert float(done.stdout) == float(ours)


def change(**values: object) -> Callable[[Path], None]:
    """Metadata with other values and a fitting seal."""

    def damage(folder: Path) -> None:
        path = folder / "metadata.json"
        found = {k: v for k, v in json.loads(path.read_text()).items() if k != "seal"}
        path.write_text(json.dumps(shards.sealed(found | values)))

    return damage


def replace(old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / "metadata.json").read_text()
        assert text.count(old) == 1
        (folder / "metadata.json").write_text(text.replace(old, new))

    return damage


ENTRY = {"name": "latents-00000-of-00004.array_record", "bytes": 1, "sha256": "0" * 64, "count": 6}


SHARD_FILE = "latents-00001-of-00004.array_record"
UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "unfinished": (
        lambda d: (d / "metadata.json").unlink(),
        "train is not encoded to its end .no metadata.json",
    ),
    "nothing there": (shutil.rmtree, "train holds no encoded images .no metadata.json"),
    "missing shard": (
        lambda d: (d / SHARD_FILE).unlink(),
        f"{SHARD_FILE} is missing: expected [0-9,]+ bytes",
    ),
    "cut shard": (
        lambda d: cut(d / SHARD_FILE),
        f"{SHARD_FILE} has [0-9,]+ bytes: expected [0-9,]+ bytes",
    ),
    "flipped byte": (
        lambda d: flip_a_byte(d / SHARD_FILE),
        f"{SHARD_FILE} is damaged .*: the encoding's command makes it",
    ),
    "other file of the size": (
        lambda d: (d / SHARD_FILE).write_bytes(bytes((d / SHARD_FILE).stat().st_size)),
        f"{SHARD_FILE} holds 0 readable records, expected 12",
    ),
    "labels": (lambda d: flip_a_byte(d / "labels.npy"), "labels.npy has another SHA-256"),
    "format": (change(format=2), "format is 2, expected 1"),
    "other shape": (change(latent_shape=[4, 4, 4]), "record . has not the 512 bytes of float32"),
    "dtype": (
        change(dtype="bfloat16"),
        "metadata.json: dtype is 'bfloat16', expected one of float32, float16",
    ),
    "altered scale": (
        replace('\n "scale": 0.18215', '\n "scale": 0.28215'),
        "metadata.json cannot be read .*its bytes were altered",
    ),
    "no seal": (replace('"seal"', '"deal"'), "metadata.json cannot be read .*seal missing"),
    "infinite scale": (
        change(scale=float("inf")),
        "metadata.json: scale is inf, expected a finite number above 0",
    ),
    "negative scale": (change(scale=-1.0), "metadata.json: scale is -1.0, expected a finite"),
    "text for a scale": (change(scale="1"), "metadata.json: scale is '1', expected a finite"),
    "flat latents": (
        change(latent_shape=[8, 8]),
        r"latent_shape is \[8, 8\], expected three whole numbers above 0",
    ),
    "empty latents": (
        change(latent_shape=[8, 0, 4]),
        r"latent_shape is \[8, 0, 4\], expected three",
    ),
    "no shape": (change(latent_shape=8), "latent_shape is 8, expected three"),
    "classes": (change(num_classes=-1), "num_classes is -1, expected a whole number, 0 or more"),
    "half a count": (change(count=22.5), "count is 22.5, expected a whole number above 0"),
    "shard size": (change(shard_size=0), "shard_size is 0, expected a whole number above 0"),
    "too many images": (change(count=25), "4 shards, expected 5 of 6 images for count 25"),
    "one more image": (change(count=24), "shard 3 is .* of 5 images, expected .*'count': 6"),
    "other shards": (
        change(count=24, shards=[ENTRY] * 4),
        "shard 1 is 'latents-00000-of-00004.* expected .*latents-00001",
    ),
    "shard without a name": (
        change(shards=[{"count": 6}] * 4),
        "shards is .*expected a list of files",
    ),
    "labels elsewhere": (
        change(labels=ENTRY | {"name": "../labels.npy"}),
        "labels is .*expected the file labels.npy",
    ),
    "no JSON": (
        lambda d: (d / "metadata.json").write_text("{"),
        "metadata.json cannot be read .JSONDecodeError",
    ),
    "no object": (
        lambda d: (d / "metadata.json").write_text("[]"),
        "metadata.json cannot be read .TypeError",
    ),
    "half the fields": (
        lambda d: (d / "metadata.json").write_text('{"format": 1}'),
        "metadata.json cannot be read .*count, .*seal missing",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_damaged_files_are_one_line_that_names_them(case: str, copy: Path) -> None:
    damage, message = UNREADABLE[case]
    damage(copy / "train")
    with pytest.raises(DmfError, match=message) as error:
        data.batch(data.load(config(copy), "train"), 0, 0, COUNT)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_a_run_needs_the_directory_and_the_split(whole: Path) -> None:
    with pytest.raises(
        DmfError,
        match="config.data.data_dir is '' for 'imagenet256_latents': expected .*--mode=encode",
    ):
        data.load(DataConfig(name="imagenet256_latents"), "train")
    with pytest.raises(DmfError, match="heldout holds no encoded images"):
        data.load(config(whole), "heldout")
    with pytest.raises(
        DmfError, match="heldout holds no encoded images"
    ):  # the training images are not held out
        data.load(config(whole / "train"), "heldout")


def test_shards_are_listed_by_their_metadata_alone(whole: Path, copy: Path) -> None:
    (copy / "train" / "latents-00009-of-00004.array_record").write_bytes(b"x")
    found = shards.Shards(copy / "train", shards.metadata(copy / "train")).fetch(
        np.array([45, 0, 12, 0])
    )
    np.testing.assert_array_equal(found, records(whole)[[45, 0, 12, 0]])
