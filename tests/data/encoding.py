"""A tiny encoding of images for tests: autoencoder, images, its files and what they hold."""

from __future__ import annotations

import functools
import hashlib
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader

from dmf import pretrained, sharding
from dmf.convert import encode
from dmf.convert.command import convert
from dmf.convert.vae import SD_VAE
from dmf.data import DataConfig
from dmf.networks.frozen.vae import VAEConfig
from tests.conversion import export_arrays, small_noise
from tests.data.test_images import encoded, pixels

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


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


class Crash(BaseException):
    """Stands for the end of the process."""


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[min(len(content) // 3, 10_000)] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def config(out: Path, flip: bool = False) -> DataConfig:
    return DataConfig(name="imagenet256_latents", data_dir=str(out), flip=flip)
