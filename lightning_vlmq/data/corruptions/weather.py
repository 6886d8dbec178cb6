"""Weather: fog, frost, snow and splashes laid over the image."""

from __future__ import annotations

import functools

import numpy as np
from scipy import ndimage, spatial
from skimage.feature import canny

from lightning_vlmq.data.corruptions.blur import magnify, streak
from lightning_vlmq.data.corruptions.core import FloatArray, Generators, corruption

LUMA = np.array([0.299, 0.587, 0.114])[:, None, None]
"""Weights of red, green and blue in the grey value (ITU-R BT.601)."""

PALE_BLUE = np.array([0.88, 0.95, 1.0])[:, None, None]
"""Colour of the ice."""

FROST_PANES = 5
"""Frozen panes to crop from."""


def plasma(height: int, width: int, decay: float, generators: Generators) -> FloatArray:
    """Fractal height maps by the diamond-square algorithm, wrapped round at the borders.

    The random offset has amplitude ``100^2`` at the coarsest step and falls by ``decay^2`` each time the step halves.

    Args:
        height: rows wanted. The map is made square, with a power of two as its side, and then cut.
        width: columns wanted.
        decay: roughness; smaller is rougher.
        generators: one per map.

    Returns:
        float64 ``[N, H, W]``, each map scaled to run from 0 to 1 before it was cut.
    """
    side = 1 << (max(height, width) - 1).bit_length()
    heights = np.zeros((len(generators), side, side))

    def offsets(cells: int, amplitude: float) -> FloatArray:
        return np.stack([generator.uniform(-amplitude, amplitude, (cells, cells)) for generator in generators])

    step, amplitude = side, 100.0**2
    while step >= 2:
        half, cells = step // 2, side // step
        corner = heights[:, ::step, ::step]
        right, below = np.roll(corner, -1, axis=2), np.roll(corner, -1, axis=1)
        centre = (corner + right + below + np.roll(right, -1, axis=1)) / 4 + offsets(cells, amplitude)
        top = (corner + right + centre + np.roll(centre, 1, axis=1)) / 4 + offsets(cells, amplitude)
        left = (corner + below + centre + np.roll(centre, 1, axis=2)) / 4 + offsets(cells, amplitude)
        heights[:, half::step, half::step] = centre
        heights[:, ::step, half::step] = top
        heights[:, half::step, ::step] = left
        step, amplitude = half, amplitude / decay**2
    heights -= heights.min(axis=(1, 2), keepdims=True)
    heights /= heights.max(axis=(1, 2), keepdims=True)
    return heights[:, :height, :width]


@corruption(
    "fog",
    "weather",
    imagenet=((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    cifar=((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
)
def fog(x: FloatArray, constant: tuple[float, float], generators: Generators) -> FloatArray:
    """Add a :func:`plasma` fog (thickness, decay), then scale back to the image's own maximum."""
    thickness, decay = constant
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    height, width = x.shape[2:]
    cloud = plasma(height, width, decay, generators)[:, None]
    return (x + thickness * cloud) * brightest / (brightest + thickness)


@functools.lru_cache(maxsize=FROST_PANES)
def frost_pane(number: int, height: int, width: int) -> FloatArray:
    """Procedural ice on a window pane: needles over a cloudy film. The same arguments give the same pane.

    Needles are the seams of two Voronoi diagrams, one coarse and one fine, each stretched along a direction of its own;
    the film is a :func:`plasma`. Everything scales with the shorter side of the image to be covered.

    Args:
        number: which of the panes, 0 to :data:`FROST_PANES` - 1.
        height: rows of the images to be covered; the pane has twice as many.
        width: columns of the images to be covered; the pane has twice as many.

    Returns:
        float64 ``[2 H, 2 W]``, brightness in [0, 1], not to be written to.
    """
    generator = np.random.Generator(np.random.PCG64(number))
    down, across = np.indices((2 * height, 2 * width)) / min(height, width)
    film, *warps = plasma(2 * height, 2 * width, 1.7, generator.spawn(3))
    down, across = down + 0.25 * warps[0], across + 0.25 * warps[1]
    needles = np.zeros(film.shape)
    for seeds_per_area, thickness in ((36, 0.05), (256, 0.02)):
        angle = generator.uniform(0, np.pi)
        along = 0.7 * (np.cos(angle) * across - np.sin(angle) * down)
        athwart = 2.0 * (np.sin(angle) * across + np.cos(angle) * down)
        stretched = np.stack([along, athwart], axis=-1).reshape(-1, 2)
        low, high = stretched.min(axis=0), stretched.max(axis=0)
        seeds = generator.uniform(low, high, (int(seeds_per_area * np.prod(high - low)), 2))
        nearest, second = spatial.KDTree(seeds).query(stretched, k=2)[0].T
        needles += np.exp((nearest - second) / thickness).reshape(film.shape)
    return np.clip(0.05 + film * (0.5 + 0.4 * needles), 0.0, 1.0)


@corruption(
    "frost",
    "weather",
    imagenet=((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    cifar=((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
)
def frost(x: FloatArray, constant: tuple[float, float], generators: Generators) -> FloatArray:
    """A weighted sum of the image and a random crop of a frozen pane (weight of the image, weight of the ice).

    Not the published ice: ImageNet-C crops photographs of frozen windows, which are not free to pass on. Here
    :func:`frost_pane` draws the ice, tinted pale blue; the weights are the published ones. Figures on this corruption
    compare models measured here with each other, not with published ImageNet-C figures.
    """
    keep, ice = constant
    height, width = x.shape[2:]
    crops = np.empty((len(x), 1, height, width))
    for crop, generator in zip(crops, generators):
        number, top, left = generator.integers(0, (FROST_PANES, height + 1, width + 1)).tolist()
        crop[0] = frost_pane(number, height, width)[top : top + height, left : left + width]
    return keep * x + ice * PALE_BLUE * crops


@corruption(
    "snow",
    "weather",
    imagenet=(
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    cifar=(
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
)
def snow(x: FloatArray, constant: tuple[float, ...], generators: Generators) -> FloatArray:
    """Whiten the image and lay falling flakes over it, twice, the second time turned by 180 degrees.

    Flakes: normal noise (mean, standard deviation), magnified, cut below a threshold, streaked (radius, sigma) at a
    random angle in -135 to -45 degrees. The last constant is the share of the image that is not whitened.
    """
    mean, deviation, zoom, threshold, radius, sigma, keep = constant
    layers = np.empty((len(x), 1, *x.shape[2:]))
    for layer, generator in zip(layers, generators):
        flakes = magnify(generator.normal(mean, deviation, layer.shape), zoom)
        flakes = np.where(flakes < threshold, 0.0, np.clip(flakes, 0.0, 1.0))
        layer[...] = streak(flakes, int(radius), sigma, generator.uniform(-135, -45))
    luma = (x * LUMA).sum(axis=1, keepdims=True)
    whitened = keep * x + (1 - keep) * np.maximum(x, luma * 1.5 + 0.5)
    return whitened + layers + layers[:, :, ::-1, ::-1]


def equalise(image: FloatArray) -> FloatArray:
    """Histogram equalisation of whole numbers 0 to 255, as 8-bit image tools define it; a flat image stays as it is."""
    levels = image.astype(np.uint8)
    cumulative = np.bincount(levels.ravel(), minlength=256).cumsum()
    darkest = cumulative[levels.min()]
    if darkest == levels.size:
        return image
    return np.rint((cumulative - darkest) * (255.0 / (levels.size - darkest)))[levels]


def water(liquid: FloatArray) -> FloatArray:
    """How strongly water shows at each pixel: bright rims on one side of each drop.

    Args:
        liquid: float64 ``[H, W]`` in [0, 1], 0 where there is none.

    Returns:
        float64 ``[H, W]`` scaled to a maximum of 1, or all 0 where there is no liquid.
    """
    depth = np.floor(liquid * 255.0)
    edges = canny(depth / 255.0, sigma=0, low_threshold=50 / 255, high_threshold=150 / 255, mode="nearest")
    distance = np.minimum(ndimage.distance_transform_edt(~edges), 20.0) if edges.any() else np.full(liquid.shape, 20.0)
    smooth = ndimage.uniform_filter(distance, 3, mode="mirror").astype(
        np.float32
    )  # float32: no whole number falls short
    relief = equalise(
        np.floor(smooth).astype(np.float64)
    )  # cut to whole levels, as published; the later mean is rounded
    emboss = np.array([[-2.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    relief = np.clip(ndimage.correlate(relief, emboss, mode="mirror"), 0.0, 255.0)
    shine = depth * np.rint(ndimage.uniform_filter(relief, 3, mode="mirror"))
    return shine / max(shine.max(), 1.0)


@corruption(
    "spatter",
    "extra",
    imagenet=(
        (0.65, 0.3, 4, 0.69, 0.6, "water"),
        (0.65, 0.3, 3, 0.68, 0.6, "water"),
        (0.65, 0.3, 2, 0.68, 0.5, "water"),
        (0.65, 0.3, 1, 0.65, 1.5, "mud"),
        (0.67, 0.4, 1, 0.65, 1.5, "mud"),
    ),
    cifar=(
        (0.62, 0.1, 0.7, 0.7, 0.5, "water"),
        (0.65, 0.1, 0.8, 0.7, 0.5, "water"),
        (0.65, 0.3, 1, 0.69, 0.5, "water"),
        (0.65, 0.1, 0.7, 0.69, 0.6, "mud"),
        (0.65, 0.1, 0.5, 0.68, 0.6, "mud"),
    ),
)
def spatter(
    x: FloatArray, constant: tuple[float, float, float, float, float, str], generators: Generators
) -> FloatArray:
    """Splashes of water or mud where smoothed noise (mean, standard deviation, sigma) passes a threshold.

    Water adds pale turquoise with the fifth constant as strength; mud covers with brown, its rim smoothed by the fifth
    constant and cut below 0.8. The published code shapes water with OpenCV; here scikit-image's Canny edges (which
    measures gradients in L2, not L1) and SciPy's exact distance transform take its place, so rims differ in detail.
    """
    mean, deviation, sigma, threshold, strength, kind = constant
    noise = np.stack([generator.normal(mean, deviation, x.shape[2:]) for generator in generators])
    liquid = np.clip(ndimage.gaussian_filter(noise, sigma, axes=(1, 2), mode="nearest"), 0.0, 1.0)
    liquid[liquid < threshold] = 0.0
    if kind == "water":
        turquoise = np.array([175.0, 238.0, 238.0])[:, None, None] / 255.0
        return x + strength * turquoise * np.stack([water(drops) for drops in liquid])[:, None]
    cover = ndimage.gaussian_filter((liquid > threshold).astype(np.float64), strength, axes=(1, 2), mode="nearest")
    cover = np.where(cover < 0.8, 0.0, cover)[:, None]
    brown = np.array([63.0, 42.0, 20.0])[:, None, None] / 255.0
    return x * (1 - cover) + brown * cover
