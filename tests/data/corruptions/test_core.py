"""What every corruption promises: constants by size, pixels that depend on nothing but image and seed, clear errors."""

import numpy as np
import pytest
import torch
from cases.corruptions import ELASTIC_PIXELS, PUBLISHED, smooth_pixels

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.corruptions import CORRUPTIONS, corrupt
from lightning_vlmq.data.corruptions.core import generator

BENCHMARK = {
    "noise": ["gaussian_noise", "shot_noise", "impulse_noise"],
    "blur": ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur"],
    "weather": ["snow", "frost", "fog"],
    "digital": ["brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"],
    "extra": ["speckle_noise", "gaussian_blur", "spatter", "saturate"],
}
MONOTONE = [
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "speckle_noise",
    "gaussian_blur",
    "defocus_blur",
    "brightness",
    "contrast",
    "jpeg_compression",
    "pixelate",
    "snow",
]


def pictures(*arguments, **fields):
    return torch.from_numpy(smooth_pixels(*arguments, **fields))


def test_registry_holds_the_benchmark_and_the_held_out_families():
    assert {name: CORRUPTIONS[name].family for name in CORRUPTIONS} == {
        name: family for family, names in BENCHMARK.items() for name in names
    }


def test_constants_by_image_size():
    assert sorted([*PUBLISHED, "elastic_transform"]) == sorted(CORRUPTIONS)
    for name, (large, small) in PUBLISHED.items():
        for severity in range(1, 6):
            assert CORRUPTIONS[name].constant(224, 64, severity) == large[severity - 1], (name, severity)
            assert CORRUPTIONS[name].constant(63, 224, severity) == small[severity - 1], (name, severity)
    for side, table in zip((224, 32), ELASTIC_PIXELS):
        for severity, pixels in enumerate(table, 1):
            parts = CORRUPTIONS["elastic_transform"].constant(side, side, severity)
            np.testing.assert_allclose(np.array(parts) * side, pixels, rtol=1e-12)


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_pixels_do_not_depend_on_the_batch(name):
    exposures = torch.arange(1, 8, dtype=torch.uint8)[:, None, None, None]  # no two images share a maximum
    images, seeds = pictures(7, 40, 56) // exposures, torch.tensor([5, -1, 2**62, 0, 5, 7, 123456])
    before = images.clone()
    batch = corrupt(images, name, 4, seeds)
    order = torch.tensor([3, 6, 0, 2, 5, 1, 4])
    assert torch.equal(corrupt(images[order], name, 4, seeds[order]), batch[order])
    assert torch.equal(torch.cat([corrupt(images[i : i + 1], name, 4, seeds[i : i + 1]) for i in range(7)]), batch)
    assert torch.equal(corrupt(images.contiguous(memory_format=torch.channels_last), name, 4, seeds), batch)
    assert torch.equal(images, before)
    assert batch.dtype == torch.uint8 and batch.shape == images.shape
    assert not torch.equal(batch, images)


def test_batches_larger_than_a_chunk(monkeypatch):
    images, seeds = pictures(5, 32, 32), torch.arange(5)
    whole = corrupt(images, "gaussian_noise", 3, seeds)
    monkeypatch.setattr("lightning_vlmq.data.corruptions.core.CHUNK_VALUES", 2 * 3 * 32 * 32)
    assert torch.equal(corrupt(images, "gaussian_noise", 3, seeds), whole)


@pytest.mark.parametrize(
    "name", [*BENCHMARK["noise"], "snow", "frost", "fog", "glass_blur", "spatter", "speckle_noise"]
)
def test_seed_and_severity_choose_the_noise(name):
    first, second = corrupt(pictures(1, 32, 32).repeat(2, 1, 1, 1), name, 3, torch.tensor([1, 2]))
    assert not torch.equal(first, second)
    streams = {generator(name, severity, seed).random() for severity in range(1, 6) for seed in (-1, 0, 1, 2)}
    assert len(streams | {generator("other", 1, 0).random()}) == 21


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (40, 56), (8, 8), (9, 70)])
@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_every_size_and_flat_images(name, size):
    for level in (0, 255):
        flat = torch.full((1, 3, *size), level, dtype=torch.uint8)
        result = corrupt(flat, name, 5, torch.tensor([3]))
        assert result.shape == flat.shape and result.dtype == torch.uint8
        if name in BENCHMARK["blur"] + ["contrast", "gaussian_blur", "elastic_transform", "pixelate"]:
            # The published defocus kernel sums to slightly less than 1 where its disc touches the grid's border.
            assert (result.int() - level).abs().max() <= (1 if name == "defocus_blur" else 0)


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_empty_batch(name):
    empty = torch.empty(0, 3, 32, 32, dtype=torch.uint8)
    assert corrupt(empty, name, 1, torch.empty(0, dtype=torch.int64)).shape == empty.shape


@pytest.mark.parametrize("size", [(224, 224), (32, 32)])
@pytest.mark.parametrize("name", MONOTONE)
def test_change_grows_with_severity(name, size):
    images = pictures(3, *size)
    changes = [
        (corrupt(images, name, severity, torch.arange(3)).double() - images).square().mean().item()
        for severity in range(1, 6)
    ]
    assert changes[0] > 0 and changes == sorted(changes)


@pytest.mark.parametrize("severity", [0, 6, -1, True, 2.5])
def test_bad_severity(severity):
    with pytest.raises(VLMQError, match="severity must be 1, 2, 3, 4 or 5"):
        corrupt(pictures(1, 8, 8), "contrast", severity, torch.zeros(1, dtype=torch.int64))


def test_bad_input():
    images, seeds = pictures(2, 8, 8), torch.arange(2)
    with pytest.raises(VLMQError, match="did you mean gaussian_noise"):
        corrupt(images, "gausian_noise", 1, seeds)
    for bad in (images.float(), images[0], images[:, :1], torch.empty(1, 3, 0, 8, dtype=torch.uint8)):
        with pytest.raises(VLMQError, match="images must be uint8"):
            corrupt(bad, "contrast", 1, seeds)
    for bad in (seeds[:1], seeds.int(), seeds[None]):
        with pytest.raises(VLMQError, match="seeds must be int64"):
            corrupt(images, "contrast", 1, bad)
    with pytest.raises(VLMQError, match="resize to 8 pixels"):
        corrupt(images[..., :7], "contrast", 1, seeds)
