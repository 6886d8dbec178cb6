"""Renditions against their definitions, and each image by itself."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage.filters import gaussian

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.renditions import RENDITIONS, rendition

NAMES = ["inverted", "outline", "posterised", "rotated"]


def pictures(count, height, width, seed=0):
    """Uniform random pixels."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, height, width)).astype(np.uint8))


def test_registry():
    assert sorted(RENDITIONS) == NAMES


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (224, 224), (40, 56), (1, 1), (2, 9)])
@pytest.mark.parametrize("name", NAMES)
def test_each_image_by_itself(name, size):
    images = pictures(5, *size)
    before = images.clone()
    batch = rendition(images, name)
    assert batch.dtype == torch.uint8 and batch.shape == images.shape
    assert torch.equal(torch.cat([rendition(images[i : i + 1], name) for i in range(5)]), batch)
    assert torch.equal(rendition(images.flip(0), name).flip(0), batch)
    assert torch.equal(rendition(images.contiguous(memory_format=torch.channels_last), name), batch)
    assert torch.equal(images, before)
    assert rendition(images[:0], name).shape == (0, 3, *size)


def test_inverted():
    images = pictures(2, 16, 16)
    assert torch.equal(rendition(images, "inverted").int(), 255 - images.int())
    assert torch.equal(rendition(rendition(images, "inverted"), "inverted"), images)


def test_posterised():
    ramp = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[None, :, None]
    expected = [85 * (value // 64) for value in range(256)]
    assert rendition(ramp, "posterised")[0, 1, 0].tolist() == expected


def test_rotated_is_a_counter_clockwise_turn():
    """Pillow's rotation agrees wherever the source lies inside; corners hold mirrored pixels, not black."""
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).random((3, 63, 63)) * 255, 3, axes=(1, 2)) * 2 - 127
    image = torch.from_numpy(smooth.clip(1, 255).astype(np.uint8))[None]
    turned = rendition(image, "rotated")[0].numpy().astype(int)
    reference = Image.fromarray(image[0].permute(1, 2, 0).numpy()).rotate(30, Image.Resampling.BILINEAR)
    down, across = np.mgrid[:63, :63] - 31
    inside = down**2 + across**2 <= 30**2
    assert np.abs(turned - np.asarray(reference).transpose(2, 0, 1))[:, inside].max() <= 2
    assert np.abs(turned - image[0].numpy())[:, inside].mean() > 5
    assert turned.min() > 0


@pytest.mark.parametrize("size", [(32, 32), (40, 56), (224, 224)])
def test_outline(size):
    """The gradient re-derived with explicit neighbour differences on a padded grey image."""
    smooth = ndimage.gaussian_filter(np.random.default_rng(1).random((3, *size)), 2, axes=(1, 2))
    levels = (255 * (smooth - smooth.min()) / (smooth.max() - smooth.min())).astype(np.uint8)
    grey = np.tensordot([0.299, 0.587, 0.114], levels / 255, 1)
    padded = np.pad(gaussian(grey, min(size) / 224, mode="nearest", truncate=4), 1, mode="edge")

    def window(down, across):
        return padded[1 + down : 1 + down + size[0], 1 + across : 1 + across + size[1]]

    right = sum(weight * (window(row, 1) - window(row, -1)) for row, weight in ((-1, 1), (0, 2), (1, 1))) / 8
    below = sum(weight * (window(1, column) - window(-1, column)) for column, weight in ((-1, 1), (0, 2), (1, 1))) / 8
    edge = np.hypot(right, below)
    expected = 255 * (1 - np.minimum(edge / max(np.quantile(edge, 0.95), 0.1), 1))
    drawn = rendition(torch.from_numpy(levels)[None], "outline")[0].numpy().astype(float)
    assert np.abs(drawn - expected).max() <= 0.5 + 1e-6
    assert drawn.min() < 200


def test_outline_of_blank_paper_and_of_a_box():
    blank = torch.full((2, 3, 32, 32), 90, dtype=torch.uint8)
    blank[1, :, 8:24, 8:24] = 200
    paper, box = rendition(blank, "outline")
    assert (paper == 255).all()
    assert (box[:, 16, 7:9] == 0).all() and (box[:, 16, 16] == 255).all() and (box[:, 2] == 255).all()


def test_bad_input():
    with pytest.raises(VLMQError, match="did you mean rotated"):
        rendition(pictures(1, 8, 8), "rotate")
    for bad in (pictures(1, 8, 8).float(), pictures(1, 8, 8)[0], torch.empty(1, 3, 0, 8, dtype=torch.uint8)):
        with pytest.raises(VLMQError, match="images must be uint8"):
            rendition(bad, "inverted")
