"""`--mode=sample`: what a user may choose of the samples, and the files they go to."""

import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf import pretrained
from dmf.config import parse
from dmf.errors import DmfError
from dmf.evaluation import sampling
from dmf.evaluation.draw import Choice, write_samples
from dmf.method.guidance import Contrast
from dmf.method.samplers import TIMES
from dmf.run import flags
from tests import runs
from tests.tiny import TINY, Setup, merged


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of a flow, then of average velocities: checkpoints of steps 4 and 6."""
    place = tmp_path_factory.mktemp("drawn") / "run"
    stages = dict(stages=2, kinds=("all_pairs", "discrete"), length=2.0, pretrain_length=4.0)
    runs.train(parse(merged(TINY, curriculum=stages)), place)
    return place


def test_guidance_is_sits_contrast_in_an_interval_and_on_the_first_channels():
    class Net:
        """u = label + 1, or 0 without class, at any time."""

        @staticmethod
        def apply(params, z, r, t, label=None, condition=None):
            label = condition.label if label is None else label
            return jnp.where(label == 10, 0.0, label + 1.0)[:, None, None, None] + 0 * z

    config, mesh = Setup(dict(TINY)).config, Setup(dict(TINY)).mesh

    def drawn(by, steps=4):
        config_of = parse(merged(TINY, run=dict(sampler="euler")))
        sampler = sampling.Sampler(Net, config_of, (8, 8, 4), np.array([2], np.int32), mesh, by)
        plain = sampling.Sampler(Net, config_of, (8, 8, 4), np.array([9], np.int32), mesh)
        noise = plain({}, 2, steps) + 10
        return (noise - sampler({}, 2, steps)).mean(axis=(0, 1, 2))

    assert config.num_classes == 10
    np.testing.assert_allclose(drawn(None), 3, atol=1e-5)
    np.testing.assert_allclose(drawn(Contrast(4.0)), 12, atol=1e-5)
    np.testing.assert_allclose(drawn(Contrast(4.0, channels=3)), [12, 12, 12, 3], atol=1e-5)
    # Times 1, 3/4, 1/2, 1/4: two of the four steps are guided.
    np.testing.assert_allclose(drawn(Contrast(4.0, 0.5, 0.75)), 7.5, atol=1e-5)


def test_seed_labels_times_and_forms(workdir, tmp_path, capsys):
    flow = workdir / "checkpoints" / "4"

    def array(name, steps=2, **choice):
        place = write_samples(flow, [steps], 3, str(tmp_path / name), choice=Choice(**choice))
        with np.load(place) as found:
            return found["arr_0"]

    raw = array("a.npz", raw=True)
    assert raw.dtype == np.float32 and raw.shape == (3, 8, 8, 1)
    bytes_ = array("b.npz")
    np.testing.assert_array_equal(bytes_, np.floor(np.clip(127.5 * raw + 128, 0, 255)))
    changed = [dict(seed=5), dict(labels=(7,)), dict(times="edm"), dict(guidance=Contrast(3.0))]
    for i, choice in enumerate(changed):
        assert np.abs(array(f"{i}.npz", raw=True, **choice) - raw).max() > 0
    assert "3 images, NFE 4" in capsys.readouterr().out  # guidance doubles the evaluations
    write_samples(flow, [2], 3, str(tmp_path / "folder"))
    files = sorted((tmp_path / "folder").iterdir())
    assert [f.name for f in files] == ["000000.png", "000001.png", "000002.png"]
    from dmf.data.images import open_images

    images = open_images(str(tmp_path / "folder"))
    np.testing.assert_array_equal(images.read(1)[..., :1], bytes_[1])
    assert list(TIMES) == list(flags.TIMES)


def test_an_array_of_more_than_two_gib_is_written(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)  # in the place of 2 GiB
    place = write_samples(workdir / "checkpoints" / "4", [1], 3, str(tmp_path / "a.npz"))
    with np.load(place) as found:
        assert found["arr_0"].shape == (3, 8, 8, 1)


@pytest.mark.parametrize(
    ("step", "out", "choice", "said"),
    [
        (4, "", dict(labels=(11,)), "11 is no class; expected 0 to 9, or 10 for none"),
        (6, "", dict(guidance=Contrast(2.0)), "a contrast of average velocities"),
        (4, "", dict(guidance=Contrast(2.0, channels=3)), "expected at most 1"),
        (4, "folder", dict(raw=True), "expected an .npz or a .png for raw samples"),
    ],
)
def test_a_choice_that_makes_no_sense_is_one_line(workdir, tmp_path, step, out, choice, said):
    place = str(tmp_path / out) if out else ""
    with pytest.raises(DmfError, match=said):
        write_samples(workdir / "checkpoints" / str(step), [1], 2, place, choice=Choice(**choice))
    assert not list(tmp_path.iterdir())


def test_samples_that_are_not_finite_leave_no_file(workdir, tmp_path, monkeypatch):
    broken = pretrained.open_weights(workdir)
    params = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), broken.params)
    monkeypatch.setattr(pretrained, "open_weights", lambda *_: broken._replace(params=params))
    for name in ("a.png", "a.npz", "folder"):
        with pytest.raises(DmfError, match="have NaN or infinite values"):
            write_samples(workdir, [1], 2, str(tmp_path / name))
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_named(workdir, monkeypatch):
    read = pretrained.checkpoint.read_params

    def wild(*given):
        return jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.inf), read(*given))

    monkeypatch.setattr(pretrained.checkpoint, "read_params", wild)
    with pytest.raises(DmfError, match="1 of the .* values of weight .* are not finite"):
        write_samples(workdir, [1], 2)


def test_a_run_that_replaces_its_checkpoint_is_still_sampled(workdir, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    read, gone = pretrained.checkpoint.read_params, []

    def replaced(folder, *rest):
        if not gone:
            gone.append(folder)
            shutil.copytree(folder, folder.with_name("7"))
            shutil.rmtree(folder)
        return read(folder, *rest)

    monkeypatch.setattr(pretrained.checkpoint, "read_params", replaced)
    assert pretrained.open_weights(run).folder.name == "7" and gone[0].name == "6"
