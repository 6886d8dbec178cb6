"""Blurs: a kernel, a random walk of pixels, or an average over zooms."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lightning_vlmq.data.corruptions.core import FloatArray, Generators, corruption


def disk_kernel(radius: float, alias_sigma: float) -> FloatArray:
    """A disc of ``radius`` pixels with unit sum, its rim softened by a Gaussian of ``alias_sigma`` pixels.

    As published, the Gaussian has 3 x 3 taps up to radius 8 and 5 x 5 above, the disc's grid is 17 x 17 or just holds
    the disc, and the softening mirrors at the grid's border. Rows and columns of zeros are cut off.

    Returns:
        float64 ``[k, k]``, ``k`` odd.
    """
    reach, taps = (8, 3) if radius <= 8 else (int(radius), 5)
    grid = np.arange(-reach, reach + 1)
    disc = (grid[:, None] ** 2 + grid[None, :] ** 2 <= radius**2).astype(np.float64)
    disc /= disc.sum()
    offsets = np.arange(taps) - taps // 2
    gaussian = np.exp(-0.5 * (offsets / alias_sigma) ** 2)
    gaussian /= gaussian.sum()
    for axis in (0, 1):
        disc = ndimage.correlate1d(disc, gaussian, axis=axis, mode="mirror")
    margin = int(np.flatnonzero(disc.any(axis=0))[0])
    return disc[margin : len(disc) - margin, margin : len(disc) - margin]


@corruption(
    "defocus_blur",
    "blur",
    imagenet=((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    cifar=((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
)
def defocus_blur(x: FloatArray, constant: tuple[float, float], generators: Generators) -> FloatArray:
    """Correlation of each channel with :func:`disk_kernel`, mirrored at the border (radius, rim softening)."""
    return ndimage.correlate(x, disk_kernel(*constant)[None, None], mode="mirror")


@corruption("gaussian_blur", "extra", imagenet=(1, 2, 3, 4, 6), cifar=(0.4, 0.6, 0.7, 0.8, 1))
def gaussian_blur(x: FloatArray, sigma: float, generators: Generators) -> FloatArray:
    """Gaussian blur of ``sigma`` pixels, cut off at 4 sigma, the edge pixel repeated outside the image."""
    return ndimage.gaussian_filter(x, sigma, axes=(2, 3), mode="nearest")


@corruption(
    "glass_blur",
    "blur",
    imagenet=((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    cifar=((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
)
def glass_blur(x: FloatArray, constant: tuple[float, int, int], generators: Generators) -> FloatArray:
    """Gaussian blur, local shuffle of pixels, Gaussian blur (sigma, reach of the shuffle, number of shuffles).

    The published code means to swap each pixel with a neighbour, but its two array views alias and the neighbour's
    value is copied over the pixel instead. ImageNet-C and CIFAR-10-C were made with that copy, so it is kept.
    """
    sigma, reach, rounds = constant
    count, _, height, width = x.shape
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    visits = np.tile((rows[:, None] * width + columns).ravel(), rounds)
    steps = np.stack([generator.integers(-reach, reach, size=(len(visits), 2)) for generator in generators], axis=1)
    sources = visits[:, None] + steps[..., 1] * width + steps[..., 0]
    # Every image visits the same places in the same order, so one pass moves pixel numbers for all images at once.
    origin = np.repeat(np.arange(height * width)[:, None], count, axis=1)
    image = np.arange(count)
    for visit, source in zip(visits.tolist(), sources):
        origin[visit] = origin[source, image]
    blurred = gaussian_blur(x, sigma, generators)
    blurred = np.rint(np.clip(blurred, 0.0, 1.0) * 255.0) / 255.0
    shuffled = np.take_along_axis(blurred.reshape(count, 3, -1), origin.T[:, None], axis=2).reshape(x.shape)
    return gaussian_blur(shuffled, sigma, generators)


def streak(x: FloatArray, radius: int, sigma: float, angle: float) -> FloatArray:
    """ImageMagick's motion blur: a one-sided Gaussian trail of ``2 radius + 1`` whole-pixel steps.

    Args:
        x: float64 ``[..., H, W]``; its edge pixels are repeated outside.
        radius: half the trail's length, in pixels.
        sigma: standard deviation of the trail's weights, in pixels.
        angle: direction in which the trail picks up pixels, in degrees, clockwise from the positive x axis.
    """
    height, width = x.shape[-2:]
    reach = 2 * radius
    steps = np.arange(reach + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    weights /= weights.sum()
    across = np.ceil(steps * np.cos(np.deg2rad(angle)) - 0.5).astype(int)
    down = np.ceil(steps * np.sin(np.deg2rad(angle)) - 0.5).astype(int)
    padded = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(reach, reach)] * 2, mode="edge")
    result = np.zeros_like(x)
    for weight, right, below in zip(weights, across + reach, down + reach):
        result += weight * padded[..., below : below + height, right : right + width]
    return result


@corruption(
    "motion_blur",
    "blur",
    imagenet=((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    cifar=((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
)
def motion_blur(x: FloatArray, constant: tuple[int, float], generators: Generators) -> FloatArray:
    """:func:`streak` (radius, sigma) at a random angle in -45 to 45 degrees."""
    return np.stack([streak(image, *constant, generator.uniform(-45, 45)) for image, generator in zip(x, generators)])


def magnify(x: FloatArray, factor: float) -> FloatArray:
    """Zoom into the middle of ``[..., H, W]`` by ``factor``, at the same size, bilinear.

    As published: a crop of ``ceil(side / factor)`` pixels is stretched corner to corner over ``round(crop factor)``
    pixels and the middle of that is kept. A factor that leaves the crop a full side, as 1.01 at 32 pixels, changes
    nothing.
    """
    for axis in (-2, -1):
        side = x.shape[axis]
        crop = int(np.ceil(side / factor))
        stretched = round(crop * factor)
        place = (np.arange(side) + (stretched - side) // 2) * ((crop - 1) / max(stretched - 1, 1))
        low = np.minimum(place.astype(int), crop - 1)
        share = (place - low).reshape((-1, 1) if axis == -2 else (-1,))
        start = (side - crop) // 2
        below, above = (np.take(x, start + index, axis=axis) for index in (low, np.minimum(low + 1, crop - 1)))
        x = below * (1 - share) + above * share
    return x


@corruption(
    "zoom_blur",
    "blur",
    imagenet=((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    cifar=((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
)
def zoom_blur(x: FloatArray, constant: tuple[float, float], generators: Generators) -> FloatArray:
    """Mean of the image and of its zooms by ``np.arange(1, *constant)``, as :func:`magnify` makes them."""
    factors = np.arange(1, *constant)
    total = x.copy()
    for factor in factors:
        total += magnify(x, factor)
    return total / (len(factors) + 1)
