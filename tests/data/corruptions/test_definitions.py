"""Each corruption against its definition, re-derived here in float64, plain loops where the package uses array code."""

import colorsys
import io

import numpy as np
import pytest
import torch
from cases.corruptions import smooth_pixels
from PIL import Image
from scipy import ndimage, stats
from skimage.feature import canny
from skimage.filters import gaussian

from lightning_vlmq.data.corruptions import CORRUPTIONS, corrupt
from lightning_vlmq.data.corruptions.blur import disk_kernel, magnify, streak
from lightning_vlmq.data.corruptions.core import generator
from lightning_vlmq.data.corruptions.digital import jittered_affine
from lightning_vlmq.data.corruptions.weather import FROST_PANES, equalise, frost_pane, plasma, water

SIZES = [(224, 224), (32, 32)]


def pictures(*arguments, **fields):
    return torch.from_numpy(smooth_pixels(*arguments, **fields))


def one(image, name, severity, seed=0):
    """Corrupt one ``[3, H, W]`` image; float64 result in levels."""
    return corrupt(image[None], name, severity, torch.tensor([seed]))[0].numpy().astype(np.float64)


def assert_levels(actual, expected):
    """Equal once the float64 expectation in [0, 1] is clipped and rounded; a tie may go either way."""
    assert np.abs(actual - 255 * np.clip(expected, 0, 1)).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("severity", range(1, 6))
def test_noise_moments(size, severity):
    """Mean and variance of each noise on a grey image, against the exact moments of the clipped distribution."""
    grey = torch.full((3, *size), 102, dtype=torch.uint8)  # 0.4
    normal = np.linspace(-8, 8, 200_001)
    weights = stats.norm.pdf(normal) / stats.norm.pdf(normal).sum()
    constant = {name: CORRUPTIONS[name].constant(*size, severity) for name in CORRUPTIONS}
    counts = np.arange(2000)
    share = constant["impulse_noise"]
    for name, values, chances in (
        ("gaussian_noise", 0.4 + constant["gaussian_noise"] * normal, weights),
        ("speckle_noise", 0.4 * (1 + constant["speckle_noise"] * normal), weights),
        ("shot_noise", counts / constant["shot_noise"], stats.poisson.pmf(counts, 0.4 * constant["shot_noise"])),
        ("impulse_noise", np.array([0.0, 0.4, 1.0]), np.array([share / 2, 1 - share, share / 2])),
    ):
        values = np.clip(values, 0, 1)
        mean = (chances * values).sum()
        central = [(chances * (values - mean) ** power).sum() for power in (2, 4)]
        drawn = one(grey, name, severity, seed=11) / 255
        spread = np.sqrt(central[0] / drawn.size)
        assert abs(drawn.mean() - mean) < 5 * spread + 1e-3, name
        assert abs(drawn.var() - central[0]) < 5 * np.sqrt((central[1] - central[0] ** 2) / drawn.size) + 1e-5, name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_defocus_blur(size, severity):
    radius, sigma = CORRUPTIONS["defocus_blur"].constant(*size, severity)
    reach, half = (8, 1) if radius <= 8 else (radius, 2)
    disc = np.array(
        [[float(r * r + c * c <= radius**2) for c in range(-reach, reach + 1)] for r in range(-reach, reach + 1)]
    )
    padded = np.pad(disc / disc.sum(), half, mode="reflect")  # without repeating the edge, as OpenCV's default
    bell = np.array(
        [[np.exp(-(r * r + c * c) / (2 * sigma**2)) for c in range(-half, half + 1)] for r in range(-half, half + 1)]
    )
    kernel = sum(
        bell[r, c] / bell.sum() * padded[r : r + len(disc), c : c + len(disc)]
        for r in range(len(bell))
        for c in range(len(bell))
    )
    trimmed = disk_kernel(radius, sigma)
    margin = (len(kernel) - len(trimmed)) // 2
    np.testing.assert_allclose(np.pad(trimmed, margin), kernel, atol=1e-15)
    image = pictures(1, *size)[0]
    wide = np.pad(image.numpy() / 255, [(0, 0), (reach, reach), (reach, reach)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(wide, kernel.shape, axis=(1, 2))[:, ::7, ::5]
    assert_levels(one(image, "defocus_blur", severity)[:, ::7, ::5], (windows * kernel).sum(axis=(3, 4)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_deterministic_corruptions(size, severity):
    image = pictures(1, *size, seed=severity)[0]
    x = image.numpy() / 255
    constant = {name: CORRUPTIONS[name].constant(*size, severity) for name in CORRUPTIONS}

    blurred = gaussian(x, sigma=constant["gaussian_blur"], channel_axis=0, mode="nearest", truncate=4)
    assert_levels(one(image, "gaussian_blur", severity), blurred)

    means = np.array([[[sum(map(float, channel.ravel())) / channel.size]] for channel in x])
    assert_levels(one(image, "contrast", severity), (x - means) * constant["contrast"] + means)

    factor, shift = constant["saturate"]
    bright, vivid = one(image, "brightness", severity), one(image, "saturate", severity)
    for r, c in np.random.default_rng(0).integers(0, size[0], (200, 2)):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[:, r, c])
        brighter = colorsys.hsv_to_rgb(hue, saturation, min(value + constant["brightness"], 1))
        stronger = colorsys.hsv_to_rgb(hue, min(saturation * factor + shift, 1), value)
        assert_levels(bright[:, r, c], np.array(brighter))
        assert_levels(vivid[:, r, c], np.array(stronger))

    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.save(stored := io.BytesIO(), "JPEG", quality=constant["jpeg_compression"])
    reread = np.asarray(Image.open(stored)).transpose(2, 0, 1)
    assert np.array_equal(one(image, "jpeg_compression", severity), reread)


def test_pixelate_is_block_means():
    x = pictures(1, 224, 224)[0]
    blocks = x.numpy().reshape(3, 56, 4, 56, 4).mean(axis=(2, 4)).repeat(4, axis=1).repeat(4, axis=2)
    assert np.abs(one(x, "pixelate", 5) - blocks).max() <= 1  # the box filter rounds once per direction
    small = one(pictures(1, 40, 56)[0], "pixelate", 4)
    assert len(np.unique(small[0], axis=0)) == 30 and len(np.unique(small[0], axis=1).T) == 42


@pytest.mark.parametrize("angle", [-135.0, -90.0, -45.0, 0.0, 17.0, 45.0])
def test_streak_follows_imagemagick(angle):
    x = np.random.default_rng(1).random((13, 18))
    radius, sigma = 4, 2.5
    weights = [np.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    expected = np.zeros_like(x)
    for r in range(13):
        for c in range(18):
            for i, weight in enumerate(weights):
                down = int(np.ceil(i * np.sin(np.radians(angle)) - 0.5))
                across = int(np.ceil(i * np.cos(np.radians(angle)) - 0.5))
                expected[r, c] += weight * x[min(max(r + down, 0), 12), min(max(c + across, 0), 17)]
    np.testing.assert_allclose(streak(x, radius, sigma, angle), expected / sum(weights), atol=1e-12)


def zoom_reference(x, factor):
    """SciPy's own zoom of the middle of a square ``[H, H]``, then its middle."""
    crop = int(np.ceil(len(x) / factor))
    start = (len(x) - crop) // 2
    large = ndimage.zoom(x[start : start + crop, start : start + crop], factor, order=1)
    trim = (len(large) - len(x)) // 2
    return large[trim : trim + len(x), trim : trim + len(x)]


def test_zoom_and_motion_blur():
    for side, factors, severity in ((32, np.arange(1, 1.26, 0.01), 5), (80, np.arange(1, 1.21, 0.02), 3)):
        image = pictures(1, side, side)[0]
        x = image.numpy() / 255
        for factor in (1.0, 1.01, 1.17, 2.25, 4.5):
            np.testing.assert_allclose(magnify(x[0], factor), zoom_reference(x[0], factor), atol=1e-12)
        zoomed = [np.stack([zoom_reference(channel, factor) for channel in x]) for factor in factors]
        assert_levels(one(image, "zoom_blur", severity), (x + sum(zoomed)) / (len(factors) + 1))
        radius, sigma = (9, 2.5) if side == 32 else (15, 8)
        angle = generator("motion_blur", severity, 4).uniform(-45, 45)
        assert_levels(one(image, "motion_blur", severity, seed=4), streak(x, radius, sigma, angle))


@pytest.mark.parametrize("side, severity, constant", [(32, 5, (0.4, 1, 2)), (66, 3, (1, 2, 3))])
def test_glass_blur_copies_neighbours(side, severity, constant):
    sigma, reach, rounds = constant
    image = pictures(1, side, side)[0]
    blur = {"sigma": sigma, "channel_axis": 0, "mode": "nearest"}
    x = np.rint(gaussian(image.numpy() / 255, **blur) * 255)
    visits = (side - 2 * reach) ** 2 * rounds
    steps = iter(generator("glass_blur", severity, 9).integers(-reach, reach, size=(visits, 2)).tolist())
    for _ in range(rounds):
        for row in range(side - reach, reach, -1):
            for column in range(side - reach, reach, -1):
                right, down = next(steps)
                x[:, row, column] = x[:, row + down, column + right]
    assert_levels(one(image, "glass_blur", severity, seed=9), gaussian(x / 255, **blur))


def test_plasma_is_diamond_square():
    decay, side = 1.7, 16
    stream, field = generator("fog", 1, 2), np.zeros((side, side))
    step, amplitude = side, 100.0 * 100.0
    while step > 1:
        half, cells = step // 2, side // step
        for kind in ("square", "top", "left"):
            draws = stream.uniform(-amplitude, amplitude, (cells, cells))
            arms = [(-half, 0), (half, 0), (0, -half), (0, half)]
            if kind == "square":
                arms = [(-half, -half), (-half, half), (half, -half), (half, half)]
            for i, j in np.ndindex(cells, cells):
                r, c = i * step + half * (kind != "top"), j * step + half * (kind != "left")
                field[r, c] = sum(field[(r + a) % side, (c + b) % side] for a, b in arms) / 4 + draws[i, j]
        step, amplitude = half, amplitude / decay / decay
    field = (field - field.min()) / (field.max() - field.min())
    np.testing.assert_allclose(plasma(9, 16, decay, [generator("fog", 1, 2)])[0], field[:9], atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_fog_and_frost_weights(size, severity):
    image = pictures(1, *size)[0] // 2
    x = image.numpy() / 255
    thickness, decay = CORRUPTIONS["fog"].constant(*size, severity)
    cloud = plasma(*size, decay, [generator("fog", severity, 6)])[0]
    expected = (x + thickness * cloud) * x.max() / (x.max() + thickness)
    assert_levels(one(image, "fog", severity, seed=6), expected)

    keep, weight = CORRUPTIONS["frost"].constant(*size, severity)
    stream = generator("frost", severity, 6)
    number, top, left = (int(stream.integers(high)) for high in (FROST_PANES, size[0] + 1, size[1] + 1))
    ice = frost_pane(number, *size)[top : top + size[0], left : left + size[1]]
    assert_levels(one(image, "frost", severity, seed=6), keep * x + weight * np.stack([0.88 * ice, 0.95 * ice, ice]))


def test_frost_panes_differ_and_fill_the_range():
    panes = [frost_pane(number, 32, 40) for number in range(FROST_PANES)]
    for pane in panes:
        assert pane.shape == (64, 80) and 0 <= pane.min() < 0.2 and 0.6 < pane.max() <= 1 and pane.std() > 0.1
    assert len({pane.tobytes() for pane in panes}) == FROST_PANES
    frost_pane.cache_clear()
    assert np.array_equal(frost_pane(0, 32, 40), panes[0])


@pytest.mark.parametrize(
    "side, severity, constant",
    [(32, 3, (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9)), (70, 5, (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55))],
)
def test_snow(side, severity, constant):
    mean, deviation, zoom, threshold, radius, sigma, keep = constant
    image = pictures(1, side, side)[0]
    x = image.numpy() / 255
    stream = generator("snow", severity, 8)
    layer = np.clip(zoom_reference(stream.normal(mean, deviation, (side, side)), zoom), 0, 1)
    layer[layer < threshold] = 0
    layer = streak(layer, radius, sigma, stream.uniform(-135, -45))
    grey = np.tensordot([0.299, 0.587, 0.114], x, 1)
    whitened = keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5)
    assert_levels(one(image, "snow", severity, seed=8), whitened + layer + np.rot90(layer, 2))


def test_elastic_transform():
    """Two bilinear look-ups, first mirrored about edge pixels' centres, then about their outer borders."""

    def look_up(image, down, across, period_of):
        def fold(index, side):
            period = period_of(side)
            index = index % period
            return np.where(index < side, index, (2 * side - 2 if period == 2 * side - 2 else 2 * side - 1) - index)

        top, left = np.floor(down).astype(int), np.floor(across).astype(int)
        r, c = down - top, across - left
        height, width = image.shape
        corner = [[image[fold(top + i, height), fold(left + j, width)] for j in (0, 1)] for i in (0, 1)]
        return (1 - r) * ((1 - c) * corner[0][0] + c * corner[0][1]) + r * ((1 - c) * corner[1][0] + c * corner[1][1])

    height, width, severity = 32, 40, 4
    image = pictures(1, height, width)[0]
    stream = generator("elastic_transform", severity, 5)
    affine = jittered_affine(width, height, 0.05 * 32, stream)
    down, across = np.mgrid[:height, :width].astype(float)
    source = np.tensordot(affine, np.stack([across, down, np.ones_like(down)]), 1)
    shifts = [
        0.1 * 32 * gaussian(stream.uniform(-1, 1, (height, width)), 0.04 * 32, mode="reflect", truncate=3)
        for _ in range(2)
    ]
    moved = [look_up(channel / 255, source[1], source[0], lambda side: 2 * side - 2) for channel in image.numpy()]
    expected = [look_up(channel, down + shifts[1], across + shifts[0], lambda side: 2 * side) for channel in moved]
    assert_levels(one(image, "elastic_transform", severity, seed=5), np.stack(expected))


def test_jittered_affine_returns_the_corners():
    for seed in range(5):
        affine = jittered_affine(56, 40, 3.0, np.random.default_rng(seed))
        jitter = np.random.default_rng(seed).uniform(-3, 3, (3, 2))
        for corner, shift in zip(np.array([(41.0, 33.0), (41.0, 7.0), (15.0, 7.0)]), jitter):
            np.testing.assert_allclose(affine @ [*(corner + shift), 1.0], corner, atol=1e-9)
    np.testing.assert_allclose(
        jittered_affine(32, 32, 0.0, np.random.default_rng(0)), [[1, 0, 0], [0, 1, 0]], atol=1e-12
    )


def test_spatter():
    image = pictures(1, 64, 64)[0]
    x = image.numpy() / 255
    noise = generator("spatter", 5, 3).normal(0.67, 0.4, (64, 64))
    wet = np.clip(gaussian(noise, 1, mode="nearest"), 0, 1) > 0.65
    cover = gaussian(wet.astype(float), 1.5, mode="nearest")
    cover[cover < 0.8] = 0
    brown = np.array([63, 42, 20])[:, None, None] / 255
    assert 0.05 < (cover > 0).mean() < 0.6
    assert_levels(one(image, "spatter", 5, seed=3), x * (1 - cover) + brown * cover)

    drops = one(torch.zeros_like(image), "spatter", 3, seed=3)
    assert drops[1].max() == round(238 * 0.5) and np.array_equal(drops[1], drops[2])
    assert np.abs(drops[0] - drops[1] * 175 / 238).max() <= 1
    liquid = gaussian(generator("spatter", 3, 3).normal(0.65, 0.3, (64, 64)), 2, mode="nearest")
    assert not drops[:, liquid < 0.68].any()


def test_water_shines_along_embossed_rims():
    liquid = gaussian(np.random.default_rng(2).normal(0.65, 0.3, (40, 30)), 2)
    liquid[liquid < 0.68] = 0

    def windows(image):
        return np.lib.stride_tricks.sliding_window_view(np.pad(image, 1, mode="reflect"), (3, 3))

    depth = np.floor(liquid * 255)
    rims = np.argwhere(canny(depth / 255, sigma=0, low_threshold=50 / 255, high_threshold=150 / 255))
    assert len(rims) > 20
    away = np.array([[min(np.hypot(r - a, c - b) for a, b in rims) for c in range(30)] for r in range(40)])
    relief = equalise(np.floor(windows(np.minimum(away, 20)).mean(axis=(2, 3)) + 1e-6))
    embossed = (windows(relief) * np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])).sum(axis=(2, 3)).clip(0, 255)
    shine = depth * np.rint(windows(embossed).mean(axis=(2, 3)))
    np.testing.assert_allclose(water(liquid), shine / shine.max(), atol=1e-12)
    assert not water(np.zeros((9, 9))).any()


def test_equalise():
    assert equalise(np.array([[10.0, 10.0], [20.0, 30.0]])).tolist() == [[0.0, 0.0], [128.0, 255.0]]
    assert equalise(np.full((3, 3), 7.0)).tolist() == [[7.0] * 3] * 3
