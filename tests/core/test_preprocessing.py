"""Framing against open_clip's own transform, pixel by pixel, and what it refuses."""

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.preprocessing import Framing, Preprocessing

MEAN, STD = (0.2, 0.4, 0.6), (0.5, 0.25, 0.125)


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng()
    smooth = Image.fromarray(rng.integers(0, 256, (max(height // 8, 2), max(width // 8, 2), 3), dtype=np.uint8))
    return smooth.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [32, 224, 384])
def test_pixels_are_those_of_open_clip(size, mode, interpolation):
    transform = image_transform_v2(
        PreprocessCfg(size, "RGB", MEAN, STD, interpolation, mode, fill_color=7), is_train=False
    )
    framing = Framing(size, mode, interpolation, fill=7)
    for width, height in ((500, 300), (301, 499), (17, 40), (size, size)):
        image = photo(width, height)
        mine = torch.from_numpy(np.array(framing(image).convert("RGB"))).permute(2, 0, 1) / 255
        normal = (mine - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        torch.testing.assert_close(normal, transform(image), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["L", "RGBA", "P"])
def test_other_modes_are_converted_where_open_clip_does_it(kind):
    image = photo(90, 60, kind)
    transform = image_transform_v2(PreprocessCfg(48, mean=(0,) * 3, std=(1,) * 3), is_train=False)
    mine = torch.from_numpy(np.array(Framing(48)(image).convert("RGB"))).permute(2, 0, 1) / 255
    assert torch.equal(mine, transform(image))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_tensors_are_framed_like_images(mode):
    image = photo(130, 70)
    framing = Framing(48, mode, fill=255)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    by_pillow = torch.from_numpy(np.array(framing(image))).permute(2, 0, 1).float()
    assert (framing(pixels).float() - by_pillow).abs().max() <= 2
    assert (framing(pixels / 255).clamp(0, 1) * 255 - by_pillow).abs().max() <= 2


def test_a_larger_side_is_cut_to_the_centre():
    image = photo(100, 80)
    whole = np.array(Framing(60, "squash")(image))
    assert np.array_equal(np.array(Framing(40, "squash", resize_to=60)(image)), whole[10:50, 10:50])


def test_a_thin_image_keeps_a_pixel():
    assert Framing(32, "longest")(photo(1000, 2)).size == (32, 32)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Framing(0), "image_size"),
        (lambda: Framing(8, "squsah"), "squash"),
        (lambda: Framing(8, interpolation="lanczos"), "interpolation"),
        (lambda: Framing(8, fill=300), "fill"),
        (lambda: Framing(8, fill=0.5), "fill is a grey level, a whole number between 0 and 255, got 0.5"),
        (lambda: Framing(8, fill=True), "got True"),
        (lambda: Framing(8, fill=None), "fill is a grey level, a whole number between 0 and 255, got None"),
        (lambda: Framing(8, fill="grey"), "got 'grey'"),
        (lambda: Framing(8, resize_to=4), "resize_to"),
        (lambda: Framing(8, "longest", resize_to=9), "resize_to"),
        (lambda: Preprocessing(Framing(8), (0.5,), (1, 1, 1)), "mean"),
        (lambda: Preprocessing(Framing(8), (0.5,) * 3, (1, 0, 1)), "std"),
        (lambda: Preprocessing(Framing(8), (0.5, float("nan"), 0.5), (1, 1, 1)), "mean has to be finite numbers"),
        (lambda: Preprocessing(Framing(8), (0.5, None, 0.5), (1, 1, 1)), "mean has to be finite numbers"),
        (
            lambda: Preprocessing(Framing(8), (123.7, 116.3, 103.5), (1, 1, 1)),
            r"mean is of pixels in 0\.\.1, .* divide by 255",
        ),
        (lambda: Preprocessing(Framing(8), (0.5,) * 3, (58.4, 57.1, 57.4)), r"std is of pixels in 0\.\.1"),
        (lambda: Preprocessing(Framing(8), ("0.5",) * 3, (1, 1, 1)), "mean has to be finite numbers"),
        (lambda: Preprocessing(Framing(8), (0.5,) * 3, (1, float("inf"), 1)), "std has to be finite numbers"),
        (lambda: Preprocessing(Framing(8), (0.5,) * 3, (1, float("nan"), 1)), "std has to be finite numbers"),
    ],
)
def test_refusals_name_the_setting(make, word):
    with pytest.raises(VLMQError, match=word) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_whole_and_other_numbers_are_taken():
    for fill in (0, 127, 255, np.int64(127), 127.0):
        assert Framing(8, fill=fill).fill == fill and type(Framing(8, fill=fill).fill) is int
    seen = Preprocessing(Framing(8), (0, -1, 2), tuple(np.array([0.5, 1, 2], dtype=np.float32)))
    assert seen.mean == (0.0, -1.0, 2.0) and seen.std == (0.5, 1.0, 2.0)
