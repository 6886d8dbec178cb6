"""Noise drawn per pixel and channel."""

from __future__ import annotations

import numpy as np

from lightning_vlmq.data.corruptions.core import FloatArray, Generators, corruption


def standard_normal(x: FloatArray, generators: Generators) -> FloatArray:
    """Independent N(0, 1) draws of the shape of ``x``, each image's from its own generator."""
    draws = np.empty_like(x)
    for image, generator in zip(draws, generators):
        generator.standard_normal(out=image)
    return draws


@corruption("gaussian_noise", "noise", imagenet=(0.08, 0.12, 0.18, 0.26, 0.38), cifar=(0.04, 0.06, 0.08, 0.09, 0.10))
def gaussian_noise(x: FloatArray, scale: float, generators: Generators) -> FloatArray:
    """Additive normal noise of standard deviation ``scale`` (pixel values in [0, 1])."""
    return x + scale * standard_normal(x, generators)


@corruption("shot_noise", "noise", imagenet=(60, 25, 12, 5, 3), cifar=(500, 250, 100, 75, 50))
def shot_noise(x: FloatArray, photons: float, generators: Generators) -> FloatArray:
    """Poisson counting noise of a sensor that counts ``photons`` at full brightness."""
    return np.stack([generator.poisson(image * photons) for image, generator in zip(x, generators)]) / photons


@corruption("impulse_noise", "noise", imagenet=(0.03, 0.06, 0.09, 0.17, 0.27), cifar=(0.01, 0.02, 0.03, 0.05, 0.07))
def impulse_noise(x: FloatArray, share: float, generators: Generators) -> FloatArray:
    """Salt and pepper: a ``share`` of all values, each channel by itself, becomes 0 or 1 with equal chance."""
    draws = np.stack([generator.random(image.shape) for image, generator in zip(x, generators)])
    return np.where(draws < share, draws < share / 2, x)


@corruption("speckle_noise", "extra", imagenet=(0.15, 0.2, 0.35, 0.45, 0.6), cifar=(0.06, 0.1, 0.12, 0.16, 0.2))
def speckle_noise(x: FloatArray, scale: float, generators: Generators) -> FloatArray:
    """Normal noise in proportion to the pixel value: ``x + x N(0, scale^2)``."""
    return x + scale * x * standard_normal(x, generators)
