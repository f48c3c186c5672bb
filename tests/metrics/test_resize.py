"""Each resize equals its library routine, on stored outputs and with the installed library."""

import functools
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from dmf.errors import DmfError
from dmf.metrics.resize import RESIZES, resize

# Allowed error, of values in 0..255. The last digit of 255 is worth 1.5e-5.
# Bicubic sums of 15 x 15 terms are up to six times that off.
BOUND = 1e-4
CASES = (
    (32, 32, 299),
    (256, 256, 299),
    (512, 512, 299),
    (299, 299, 299),
    (37, 50, 299),
    (48, 40, 31),
)
MORE = (
    (500, 375, 299),
    (301, 298, 299),
    (299, 200, 299),
    (7, 5, 299),
    (1, 2, 9),
    (256, 256, 224),
    (64, 50, 7),
)
needs_libraries = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "torch_fidelity", "cleanfid")),
    reason="torch, torch-fidelity and clean-fid are not installed: nothing to compare with "
    "(stored outputs are still checked)",
)


def picture(height: int, width: int) -> np.ndarray:
    """(1, H, W, 3) float32: random bytes, a smooth pattern, and a checkerboard of 0 and 255."""
    row, column = np.mgrid[:height, :width]
    noise = np.random.RandomState(height + width).randint(0, 256, (height, width))
    smooth = np.rint(127.5 + 127.5 * np.sin(0.07 * column + 0.11 * row))
    return np.stack([noise, smooth, 255 * ((row + column) % 2)], axis=-1)[None].astype(np.float32)


def ours(x: np.ndarray, size: int, method: str) -> np.ndarray:
    return np.asarray(jax.jit(functools.partial(resize, size=size, method=method))(x))


def from_library(x: np.ndarray, size: int, method: str) -> np.ndarray:
    """x (B, H, W, 3) resized by the library. resize_reference.npz holds pixels of the results."""
    import torch
    from cleanfid.resize import make_resizer

    if method == "bicubic_clean":
        return np.stack([make_resizer("PIL", False, "bicubic", (size, size))(image) for image in x])
    pixels = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    if method == "tf1_bilinear":
        # By its file: the package would import torchvision, which may lack its operators.
        folder = Path(str(importlib.util.find_spec("torch_fidelity").origin)).parent
        spec = importlib.util.spec_from_file_location(
            "interpolate", folder / "interpolate_compat_tensorflow.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        y = module.interpolate_bilinear_2d_like_tensorflow1x(
            pixels, size=(size, size), align_corners=False
        )
    else:
        mode, _, antialias = method.partition("_")
        y = torch.nn.functional.interpolate(
            pixels,
            size=(size, size),
            mode=mode,
            align_corners=False,
            antialias=antialias == "antialias",
        )
    return y.numpy().transpose(0, 2, 3, 1)


def stored_pixels(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns that the stored outputs hold: edges, and some of the middle."""
    return np.linspace(0, size - 1, 8).astype(int)[:, None], np.linspace(0, size - 1, 20).astype(
        int
    )[None]


@pytest.mark.parametrize("method", RESIZES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stored_outputs_of_the_libraries(golden, method, case):
    height, width, size = case
    with golden("resize_reference.npz") as stored:
        expected = stored[f"{method}/{height}x{width}_to_{size}"]
    rows, columns = stored_pixels(size)
    got = ours(picture(height, width), size, method)[0][rows, columns]
    assert got.shape == expected.shape == (8, 20, 3)
    np.testing.assert_allclose(got, expected, rtol=0, atol=BOUND)


@needs_libraries
@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")  # clean-fid's call of Pillow
@pytest.mark.parametrize("method", RESIZES)
@pytest.mark.parametrize("case", CASES + MORE, ids=str)
def test_whole_images_of_the_libraries(method, case):
    # torch computes weights with fused multiply-adds.
    # On a processor without them torch is up to 1e-3 from these values.
    x = picture(*case[:2])
    np.testing.assert_allclose(
        ours(x, case[2], method), from_library(x, case[2], method), rtol=0, atol=BOUND
    )


def test_weights_known_by_hand():
    tf1, half_pixel, wide, cubic = (
        RESIZES[k] for k in ("tf1_bilinear", "bilinear", "bilinear_antialias", "bicubic_clean")
    )
    assert np.array_equal(tf1(2, 4), [[1, 0], [0.5, 0.5], [0, 1], [0, 1]])
    assert np.array_equal(tf1(4, 2), [[1, 0, 0, 0], [0, 0, 1, 0]])
    assert np.array_equal(half_pixel(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    assert np.array_equal(half_pixel(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    # Triangles of half width 2 around 1 and 3, at pixel centres .5, 1.5, ...
    # They give 3/4, 3/4 and 1/4, divided by their sum.
    np.testing.assert_allclose(wide(4, 2), np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7, atol=1e-7)
    # Position 2.25 is 1.75, .75, .25, 1.25 from the four centres.
    np.testing.assert_allclose(
        cubic(4, 8)[4], [-0.0234375, 0.2265625, 0.8671875, -0.0703125], atol=1e-15
    )


@pytest.mark.parametrize("method", RESIZES)
@pytest.mark.parametrize(
    "sizes", [(32, 299), (256, 299), (512, 299), (1, 5), (5, 1), (299, 299)], ids=str
)
def test_weights_of_a_row_sum_to_one_and_a_constant_stays(method, sizes):
    weights = RESIZES[method](*sizes)
    assert weights.shape == sizes[::-1]
    np.testing.assert_allclose(
        weights.sum(axis=1), 1.0, rtol=0, atol=3e-7
    )  # torch normalises in float32
    flat = np.full((1, sizes[0], sizes[0], 2), 201.0, np.float32)
    np.testing.assert_allclose(ours(flat, sizes[1], method), 201.0, rtol=0, atol=BOUND)


@pytest.mark.parametrize(("method", "offset"), [("bilinear", 0.5), ("tf1_bilinear", 0.0)])
def test_a_ramp_is_reproduced_at_the_positions_of_the_method(method, offset):
    ramp = np.broadcast_to(np.arange(32, dtype=np.float32)[None, :, None, None], (1, 32, 32, 1))
    position = (np.arange(299) + offset) * 32 / 299 - offset
    inside = (position >= 0) & (position <= 31)
    assert inside.sum() > 280
    np.testing.assert_allclose(
        ours(ramp, 299, method)[0, inside, 7, 0], position[inside], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("method", RESIZES)
def test_rows_and_columns_are_treated_alike_and_images_and_channels_apart(method):
    x = np.concatenate([picture(20, 33), 255 - picture(20, 33)])
    y = ours(x, 27, method)
    turned = ours(np.ascontiguousarray(x.transpose(0, 2, 1, 3)), 27, method).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(
        y, turned, rtol=0, atol=BOUND
    )  # the two passes are swapped, so rounding differs
    assert np.array_equal(ours(x[1:, :, :, 2:], 27, method), y[1:, :, :, 2:])
    assert ours(x[:0], 27, method).shape == (0, 27, 27, 3)


@pytest.mark.parametrize("method", RESIZES)
def test_an_image_of_the_size_already_is_returned_bit_for_bit(method):
    x = np.random.RandomState(0).uniform(-20, 300, (2, 31, 31, 3)).astype(np.float32)
    assert np.array_equal(ours(x, 31, method), x)


def test_clean_bicubic_is_the_antialiased_one_clipped():
    x = picture(40, 40)
    free, clipped = ours(x, 299, "bicubic_antialias"), ours(x, 299, "bicubic_clean")
    assert free.min() < -20 and free.max() > 275  # the overshoot is what tells the two
    np.testing.assert_allclose(
        clipped, np.clip(free, 0, 255), rtol=0, atol=5e-3
    )  # torch rounds positions to float32


def test_bad_input_is_refused():
    x = np.zeros((1, 8, 8, 3), np.float32)
    with pytest.raises(
        DmfError, match=r"unknown resize 'lanczos', expected one of tf1_bilinear, bilinear, "
    ):
        resize(x, 299, "lanczos")
    with pytest.raises(
        DmfError, match=r"float32 of shape \(B, H, W, C\), got float32 of shape \(8, 8, 3\)"
    ):
        resize(x[0], 299, "bilinear")
    with pytest.raises(
        DmfError, match=r"float32 of shape \(B, H, W, C\), got uint8 of shape \(1, 8, 8, 3\)"
    ):
        resize(x.astype(np.uint8), 8, "bilinear")
    with pytest.raises(DmfError, match=r"got float32 of shape \(1, 0, 8, 3\)"):
        resize(x[:, :0], 299, "bilinear")
    with pytest.raises(DmfError, match="size of resized images must be at least 1, got 0"):
        resize(x, 0, "bilinear")
