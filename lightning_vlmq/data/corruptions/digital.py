"""Changes of colour, resolution and geometry, and lossy storage."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.color import hsv2rgb, rgb2hsv

from lightning_vlmq.data.corruptions.core import FloatArray, Generators, corruption


@corruption("brightness", "digital", imagenet=(0.1, 0.2, 0.3, 0.4, 0.5), cifar=(0.05, 0.1, 0.15, 0.2, 0.3))
def brightness(x: FloatArray, shift: float, generators: Generators) -> FloatArray:
    """Add ``shift`` to the value channel of HSV."""
    hsv = rgb2hsv(x, channel_axis=1)
    hsv[:, 2] = np.clip(hsv[:, 2] + shift, 0.0, 1.0)
    return hsv2rgb(hsv, channel_axis=1)


@corruption("contrast", "digital", imagenet=(0.4, 0.3, 0.2, 0.1, 0.05), cifar=(0.75, 0.5, 0.4, 0.3, 0.15))
def contrast(x: FloatArray, factor: float, generators: Generators) -> FloatArray:
    """Pull each channel towards its mean over the image: ``(x - mean) factor + mean``."""
    means = x.mean(axis=(2, 3), keepdims=True)
    return (x - means) * factor + means


@corruption(
    "saturate",
    "extra",
    imagenet=((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    cifar=((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
)
def saturate(x: FloatArray, constant: tuple[float, float], generators: Generators) -> FloatArray:
    """Scale and shift the saturation channel of HSV (factor, shift): 1 and 2 wash out, 3 to 5 oversaturate."""
    factor, shift = constant
    hsv = rgb2hsv(x, channel_axis=1)
    hsv[:, 1] = np.clip(hsv[:, 1] * factor + shift, 0.0, 1.0)
    return hsv2rgb(hsv, channel_axis=1)


def to_pictures(x: FloatArray) -> list[Image.Image]:
    """One 8-bit RGB picture per image of ``[N, 3, H, W]``."""
    pixels: NDArray[np.uint8] = np.rint(x * 255.0).astype(np.uint8)
    return [Image.fromarray(image) for image in np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))]


def from_pictures(pictures: Sequence[Image.Image]) -> FloatArray:
    """The inverse of :func:`to_pictures`."""
    return np.stack([np.asarray(picture) for picture in pictures]).transpose(0, 3, 1, 2) / 255.0


@corruption("jpeg_compression", "digital", imagenet=(25, 18, 15, 10, 7), cifar=(80, 65, 58, 50, 40))
def jpeg_compression(x: FloatArray, quality: int, generators: Generators) -> FloatArray:
    """Store as JPEG at ``quality`` and read back."""
    stored = []
    for picture in to_pictures(x):
        buffer = BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        stored.append(Image.open(buffer))
    return from_pictures(stored)


@corruption("pixelate", "digital", imagenet=(0.6, 0.5, 0.4, 0.3, 0.25), cifar=(0.95, 0.9, 0.85, 0.75, 0.65))
def pixelate(x: FloatArray, factor: float, generators: Generators) -> FloatArray:
    """Shrink both sides by ``factor`` and enlarge again, box filter both ways."""
    height, width = x.shape[2:]
    small = (int(width * factor), int(height * factor))
    box = Image.Resampling.BOX
    return from_pictures([picture.resize(small, box).resize((width, height), box) for picture in to_pictures(x)])


def jittered_affine(side_x: int, side_y: int, jitter: float, generator: np.random.Generator) -> FloatArray:
    """Where each output pixel of a random affine map comes from.

    Three corners of a square about the centre, a third of the shorter side away from it, each move by up to
    ``jitter`` pixels in x and in y.

    Returns:
        float64 ``[2, 3]``: ``(x, y, 1)`` of the output to ``(x, y)`` of the input.
    """
    centre_x, centre_y, reach = side_x // 2, side_y // 2, min(side_x, side_y) // 3
    corners = np.array(
        [
            [centre_x + reach, centre_y + reach],
            [centre_x + reach, centre_y - reach],
            [centre_x - reach, centre_y - reach],
        ],
        dtype=np.float64,
    )
    moved = corners + generator.uniform(-jitter, jitter, size=(3, 2))
    return np.asarray(np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners).T, dtype=np.float64)


@corruption(
    "elastic_transform",
    "digital",
    imagenet=tuple(
        tuple(244 / 224 * part for part in parts)
        for parts in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
    ),
    cifar=((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
)
def elastic_transform(x: FloatArray, constant: tuple[float, float, float], generators: Generators) -> FloatArray:
    """A random affine map, then a random smooth displacement, both bilinear (amplitude, smoothing, affine jitter).

    The constants are parts of the shorter side. ImageNet-C's are published as multiples of 244 pixels at image size
    224 and so divided by 224 here.
    """
    height, width = x.shape[2:]
    amplitude, sigma, jitter = (part * min(height, width) for part in constant)
    down, across = np.mgrid[:height, :width].astype(np.float64)
    result = np.empty_like(x)
    for image, target, generator in zip(x, result, generators):
        to_x, to_y = jittered_affine(width, height, jitter, generator)
        source = (to_y[0] * across + to_y[1] * down + to_y[2], to_x[0] * across + to_x[1] * down + to_x[2])
        shift_x, shift_y = (
            amplitude * ndimage.gaussian_filter(generator.uniform(-1, 1, (height, width)), sigma, truncate=3)
            for _ in range(2)
        )
        for channel, output in zip(image, target):
            mapped = ndimage.map_coordinates(channel, source, order=1, mode="mirror")
            ndimage.map_coordinates(mapped, (down + shift_y, across + shift_x), output, order=1, mode="reflect")
    return result
