"""Renditions: the same object drawn another way, a semantic shift made from any image set without new data.

They stand in for sets such as ImageNet-R and ImageNet-Sketch (Hendrycks et al. 2021; Wang et al. 2019): the label still
holds for a person, but colour, texture or pose does not look like the training pictures any more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from lightning_vlmq.core.registry import Registry
from lightning_vlmq.data.corruptions.core import check_images

RENDITIONS: Registry[Callable[[Tensor], Tensor]] = Registry("rendition")

ROTATION_DEGREES = 30.0
"""Strong enough that hardly a photograph is taken so, weak enough that up stays up (no 6 turns into a 9)."""

POSTER_LEVELS = 4
"""Levels left per channel: 0, 85, 170, 255."""


def rendition(images: Tensor, name: str) -> Tensor:
    """Draw images another way. Deterministic, each image by itself.

    Args:
        images: uint8 ``[N, 3, H, W]``, RGB, 0 to 255; ``N`` may be 0.
        name: a name in :data:`RENDITIONS`: ``inverted``, ``outline``, ``rotated``, ``posterised``.

    Returns:
        uint8 ``[N, 3, H, W]``, a new tensor on the CPU.

    Raises:
        VLMQError: on an unknown name or images of another dtype or shape.
    """
    draw = RENDITIONS[name]
    check_images(images)
    return draw(images.cpu()) if len(images) else torch.empty(images.shape, dtype=torch.uint8)


@RENDITIONS.register("inverted")
def inverted(images: Tensor) -> Tensor:
    """The photographic negative, ``255 - x``."""
    return 255 - images


@RENDITIONS.register("posterised")
def posterised(images: Tensor) -> Tensor:
    """Each channel cut into :data:`POSTER_LEVELS` equal ranges, redrawn at levels spread over the full 0 to 255."""
    level = images.int() * POSTER_LEVELS // 256
    return (level * (255 // (POSTER_LEVELS - 1))).to(torch.uint8)


@RENDITIONS.register("rotated")
def rotated(images: Tensor) -> Tensor:
    """Turned by :data:`ROTATION_DEGREES` counter-clockwise about the centre, at the same size.

    Bilinear; corners that come from outside are filled with the mirrored image, as black corners would be a shift of
    their own that says nothing about the pose.
    """
    result = np.empty(images.shape, np.float64)
    for source, target in zip(images.numpy().reshape(-1, *images.shape[2:]), result.reshape(-1, *images.shape[2:])):
        ndimage.rotate(
            source.astype(np.float64), ROTATION_DEGREES, reshape=False, order=1, mode="mirror", output=target
        )
    return torch.from_numpy(np.rint(result).clip(0, 255).astype(np.uint8))


@RENDITIONS.register("outline")
def outline(images: Tensor) -> Tensor:
    """A pencil drawing: dark edges on white paper, without colour or shading.

    Darkness is the Sobel gradient magnitude of the luma (ITU-R BT.601), scaled so that the image's strongest 5 % of
    pixels are full black; a gradient under a tenth of the range per pixel never is, so a blank image stays blank. The
    image is smoothed first (1 pixel at 224, in proportion elsewhere) so that lines follow shapes, not fine texture.
    """
    red, green, blue = np.moveaxis(images.numpy() / 255.0, 1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    luma = ndimage.gaussian_filter(luma, min(images.shape[2:]) / 224, axes=(1, 2), mode="nearest")
    # ndimage.sobel smooths over every other axis and so would mix the images of a batch.
    smooth, slope = [0.25, 0.5, 0.25], [-0.5, 0.0, 0.5]
    across = ndimage.correlate1d(
        ndimage.correlate1d(luma, smooth, axis=1, mode="nearest"), slope, axis=2, mode="nearest"
    )
    down = ndimage.correlate1d(ndimage.correlate1d(luma, smooth, axis=2, mode="nearest"), slope, axis=1, mode="nearest")
    edge = np.sqrt(across * across + down * down)
    full = np.maximum(np.quantile(edge, 0.95, axis=(1, 2), keepdims=True), 0.1)
    drawing = np.rint(255.0 * (1.0 - np.clip(edge / full, 0.0, 1.0))).astype(np.uint8)
    return torch.from_numpy(drawing)[:, None].repeat(1, 3, 1, 1)
