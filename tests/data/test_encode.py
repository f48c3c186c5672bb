"""Encoding images: values, bits that stay, files that survive a kill or show damage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import data, pretrained, sharding
from dmf.convert import encode
from dmf.data.images import center_crop, open_images
from dmf.errors import DmfError
from dmf.storage.readers.read import sha256
from tests import ROOT
from tests.data.encoding import (
    CLASSES,
    COUNT,
    LATENT,
    SETTINGS,
    SIDE,
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
    other = make_vae(tmp_path, scale=0.5, shift=0.1)
    with pytest.raises(
        DmfError,
        match=r"scale: 0.18215 -> 0.5; shift: \(absent\) -> 0.1; "
        r"vae.network.scale: 0.18215 -> 0.5; vae.network.shift: \(absent\) -> 0.1; expected",
    ):
        encode.encode(other, str(source), copy, **SETTINGS)
    more = shutil.copytree(source, tmp_path / "more" / "pets")
    (more / "class0" / "x.png").write_bytes(encoded(pixels(0)))
    with pytest.raises(DmfError, match="count: 23 -> 24; source.count: 23 -> 24; source.sha256: "):
        encode.encode(vae, str(more), copy, **SETTINGS)
    assert contents(copy) == contents(whole)
