"""Radial power spectrum of feature and attention maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError


@dataclass(frozen=True, eq=False)
class RadialSpectrum:
    """Power by spatial frequency, averaged over all directions.

    Args:
        frequency: float64 ``[f]``, cycles per pixel, from 0 to at most 0.5.
        power: ``[..., f]``, mean of ``|DFT|^2 / (H * W)`` over the ring around each frequency.
    """

    frequency: Tensor
    power: Tensor


def fourier_spectrum_2d(maps: Tensor) -> RadialSpectrum:
    """Radially averaged power spectrum of two-dimensional maps, as used by Park & Kim (2022) on vision transformers.

    Rings are one fundamental of the shorter side wide. The corners of the frequency plane beyond the Nyquist frequency
    of the axes are left out, as no full ring lies there.

    Args:
        maps: float ``[..., H, W]``: activations, attention or images.

    Returns:
        ``min(H, W) // 2 + 1`` frequencies and the power at each, in the dtype of the maps (at least float32).

    Raises:
        VLMQError: if there are fewer than two dimensions, a side is empty, or values are not finite floats.
    """
    if maps.ndim < 2 or 0 in maps.shape[-2:] or not maps.is_floating_point():
        raise VLMQError(f"maps must be float [..., H, W], not {maps.dtype} of shape {list(maps.shape)}")
    if not torch.isfinite(maps).all():
        raise VLMQError("maps hold NaN or infinity; check the model that made them")
    maps = maps.detach().to(torch.promote_types(maps.dtype, torch.float32))
    height, width = maps.shape[-2:]
    side = min(height, width)
    power = torch.fft.fft2(maps, norm="ortho").abs().square().flatten(-2)
    radius = torch.hypot(
        torch.fft.fftfreq(height, dtype=torch.float64)[:, None], torch.fft.fftfreq(width, dtype=torch.float64)[None, :]
    )
    ring = (radius * side).round().long().flatten().to(maps.device)
    n_rings = side // 2 + 1
    inside = ring < n_rings
    sums = power.new_zeros(*power.shape[:-1], n_rings).index_add_(-1, ring[inside], power[..., inside])
    counts = torch.bincount(ring[inside], minlength=n_rings)
    return RadialSpectrum(torch.arange(n_rings, dtype=torch.float64) / side, sums / counts)
