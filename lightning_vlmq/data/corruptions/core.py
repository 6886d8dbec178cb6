"""What all corruptions share: the table of entries, the choice of constants by image size, and seeding per image."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.registry import Registry

FloatArray = NDArray[np.float64]
Generators = Sequence[np.random.Generator]
Apply = Callable[[FloatArray, Any, Generators], FloatArray]

SMALL_IMAGE = 64
"""Images whose shorter side is below this many pixels take the CIFAR-10-C constants, others the ImageNet-C ones."""

SMALLEST_SIDE = 8
"""Below this many pixels a side no corruption is defined."""

CHUNK_VALUES = 2_000_000
"""Most pixel values held in float64 at once. Images are independent of each other, so it cannot change a result."""


@dataclass(frozen=True)
class Corruption:
    """One corruption family of ImageNet-C and CIFAR-10-C.

    Attributes:
        name: its key in :data:`CORRUPTIONS`.
        family: ``"noise"``, ``"blur"``, ``"weather"``, ``"digital"`` (the 15 of the benchmark) or ``"extra"`` (the 4
            that the benchmark holds out).
        imagenet: five constants, severity 1 to 5, from ImageNet-C (made for 224 x 224 pixels).
        cifar: the same from CIFAR-10-C (made for 32 x 32 pixels).
        apply: ``(x, constant, generators) -> y`` on float64 ``[N, 3, H, W]`` in [0, 1], one numpy generator per
            image. It must treat each image alone and must not write to ``x``; ``y`` is clipped by the caller.
    """

    name: str
    family: str
    imagenet: tuple[Any, ...]
    cifar: tuple[Any, ...]
    apply: Apply

    def constant(self, height: int, width: int, severity: int) -> Any:
        """The published constant for an image of ``height`` x ``width`` pixels at ``severity`` 1 to 5."""
        table = self.cifar if min(height, width) < SMALL_IMAGE else self.imagenet
        return table[severity - 1]


CORRUPTIONS: Registry[Corruption] = Registry("corruption")


def corruption(name: str, family: str, imagenet: Sequence[Any], cifar: Sequence[Any]) -> Callable[[Apply], Apply]:
    """Decorator that files the ``apply`` function of a :class:`Corruption` in :data:`CORRUPTIONS`."""

    def file(apply: Apply) -> Apply:
        CORRUPTIONS.register(name)(Corruption(name, family, tuple(imagenet), tuple(cifar), apply))
        return apply

    return file


def generator(name: str, severity: int, seed: int) -> np.random.Generator:
    """The random stream of one image: a function of corruption, severity and the image's own seed, of nothing else."""
    return np.random.Generator(np.random.PCG64([seed % 2**64, zlib.crc32(name.encode()), severity]))


def corrupt(images: Tensor, name: str, severity: int, seeds: Tensor) -> Tensor:
    """Corrupt images as ImageNet-C does (Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness").

    The pixels of an image depend on the image, ``name``, ``severity`` and its own seed, never on the batch it came
    in, its place there or the worker. Constants are the published ones: CIFAR-10-C's when ``min(H, W) <``
    :data:`SMALL_IMAGE`, else ImageNet-C's. They are in pixels and are not rescaled to other sizes, except where a
    corruption says so. The result is rounded to the nearest level, where the published code truncates, so that an
    untouched pixel keeps its value.

    Args:
        images: uint8 ``[N, 3, H, W]``, RGB, 0 to 255; ``H`` and ``W`` at least :data:`SMALLEST_SIDE`.
        name: a name in :data:`CORRUPTIONS`.
        severity: 1 (mild) to 5.
        seeds: int64 ``[N]``, one per image, e.g. the sample's index in its data set plus a run seed.

    Returns:
        uint8 ``[N, 3, H, W]`` on the CPU.

    Raises:
        VLMQError: on an unknown name, a severity outside 1..5, or images or seeds of another shape or dtype.
    """
    entry = CORRUPTIONS[name]
    if isinstance(severity, bool) or severity not in (1, 2, 3, 4, 5):
        raise VLMQError(f"corruption severity must be 1, 2, 3, 4 or 5, not {severity}")
    check_images(images)
    if seeds.dtype != torch.int64 or seeds.shape != images.shape[:1]:
        raise VLMQError(
            f"seeds must be int64 [{len(images)}], one per image, not {seeds.dtype} {list(seeds.shape)}; "
            "pass e.g. the sample indices"
        )
    height, width = images.shape[2:]
    if min(height, width) < SMALLEST_SIDE:
        raise VLMQError(
            f"cannot corrupt images of {height} x {width} pixels; resize to {SMALLEST_SIDE} pixels a side or more"
        )
    constant = entry.constant(height, width, severity)
    pixels = images.cpu().contiguous().numpy()  # sums must not depend on the memory layout
    result = np.empty_like(pixels)
    step = max(1, CHUNK_VALUES // (3 * height * width))
    for start in range(0, len(pixels), step):
        chunk = slice(start, start + step)
        generators = [generator(name, severity, seed) for seed in seeds[chunk].tolist()]
        corrupted = entry.apply(pixels[chunk] / 255.0, constant, generators)
        result[chunk] = np.rint(np.clip(corrupted, 0.0, 1.0) * 255.0)
    return torch.from_numpy(result)


def check_images(images: Tensor) -> None:
    """Raise ``VLMQError`` unless ``images`` is uint8 ``[N, 3, H, W]``."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise VLMQError(f"images must be uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}")
