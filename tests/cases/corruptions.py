"""What the corruptions' tests share: pictures to corrupt, and the constants as the authors published them. Needs numpy and SciPy alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

# One constant per severity, large images then small ones, as read in the authors' published scripts.
PUBLISHED = {
    "gaussian_noise": ([0.08, 0.12, 0.18, 0.26, 0.38], [0.04, 0.06, 0.08, 0.09, 0.10]),
    "shot_noise": ([60, 25, 12, 5, 3], [500, 250, 100, 75, 50]),
    "impulse_noise": ([0.03, 0.06, 0.09, 0.17, 0.27], [0.01, 0.02, 0.03, 0.05, 0.07]),
    "speckle_noise": ([0.15, 0.2, 0.35, 0.45, 0.6], [0.06, 0.1, 0.12, 0.16, 0.2]),
    "gaussian_blur": ([1, 2, 3, 4, 6], [0.4, 0.6, 0.7, 0.8, 1]),
    "contrast": ([0.4, 0.3, 0.2, 0.1, 0.05], [0.75, 0.5, 0.4, 0.3, 0.15]),
    "brightness": ([0.1, 0.2, 0.3, 0.4, 0.5], [0.05, 0.1, 0.15, 0.2, 0.3]),
    "jpeg_compression": ([25, 18, 15, 10, 7], [80, 65, 58, 50, 40]),
    "pixelate": ([0.6, 0.5, 0.4, 0.3, 0.25], [0.95, 0.9, 0.85, 0.75, 0.65]),
    "saturate": (
        [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)],
        [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)],
    ),
    "defocus_blur": (
        [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
        [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
    ),
    "glass_blur": (
        [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
        [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
    ),
    "motion_blur": (
        [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
        [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
    ),
    "zoom_blur": (
        [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)],
        [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
    ),
    "fog": (
        [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
        [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
    ),
    "frost": (
        [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
        [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
    ),
    "snow": (
        [
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ],
        [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ],
    ),
    "spatter": (
        [
            (0.65, 0.3, 4, 0.69, 0.6, "water"),
            (0.65, 0.3, 3, 0.68, 0.6, "water"),
            (0.65, 0.3, 2, 0.68, 0.5, "water"),
            (0.65, 0.3, 1, 0.65, 1.5, "mud"),
            (0.67, 0.4, 1, 0.65, 1.5, "mud"),
        ],
        [
            (0.62, 0.1, 0.7, 0.7, 0.5, "water"),
            (0.65, 0.1, 0.8, 0.7, 0.5, "water"),
            (0.65, 0.3, 1, 0.69, 0.5, "water"),
            (0.65, 0.1, 0.7, 0.69, 0.6, "mud"),
            (0.65, 0.1, 0.5, 0.68, 0.6, "mud"),
        ],
    ),
}
# Published in pixels, for 224 (with 244 written for 224) and for 32.
ELASTIC_PIXELS = (
    [(488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)],
    [(0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)],
)


def smooth_pixels(count: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth random colour images over the full range, so that every corruption has something to change: ``[count, 3, H, W]``."""
    noise = np.random.default_rng(seed).random((count, 3, height, width))
    smooth = ndimage.gaussian_filter(noise, 2, axes=(2, 3))
    smooth -= smooth.min(axis=(2, 3), keepdims=True)
    return (255 * smooth / smooth.max(axis=(2, 3), keepdims=True)).astype(np.uint8)


IMAGES = {32: 12, 224: 3}
"""How many images the frozen strengths are of, by side."""

DRAWS = 8
"""How many draws of each."""

VARIED = ("fog", "frost")
"""What differs so much from draw to draw that it takes eight times as many."""


def changes(before: NDArray[np.uint8], after: NDArray[np.floating] | NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean change in levels, root mean square change, and share of values that change by more than four levels: ``[count, 3]``."""
    change = np.rint(after.astype(np.float64)) - before
    change = change.reshape(len(change), -1)
    return np.stack([change.mean(1), np.sqrt((change**2).mean(1)), (np.abs(change) > 4).mean(1)], axis=1)
