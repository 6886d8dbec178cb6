import math

import numpy as np
import pytest
import torch

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral import fourier_spectrum_2d


@pytest.mark.parametrize("shape", [(8, 8), (7, 7), (6, 10), (11, 4), (1, 5), (1, 1)])
def test_agrees_with_a_loop_over_numpys_transform(shape):
    height, width = shape
    maps = torch.randn(2, 3, *shape, dtype=torch.float64)
    spectrum = fourier_spectrum_2d(maps)
    side = min(shape)
    assert spectrum.frequency.tolist() == pytest.approx([ring / side for ring in range(side // 2 + 1)])
    for i, j in np.ndindex(2, 3):
        power = np.abs(np.fft.fft2(maps[i, j].numpy())) ** 2 / (height * width)
        rings: dict[int, list[float]] = {}
        for row in range(height):
            for column in range(width):
                fy, fx = np.fft.fftfreq(height)[row], np.fft.fftfreq(width)[column]
                rings.setdefault(round(math.hypot(fy, fx) * side), []).append(power[row, column])
        expected = [np.mean(rings[ring]) for ring in range(side // 2 + 1)]
        np.testing.assert_allclose(spectrum.power[i, j].numpy(), expected)


def test_sinusoid_lies_in_its_ring():
    x = torch.arange(16, dtype=torch.float64)
    power = fourier_spectrum_2d(torch.sin(2 * math.pi * 3 * x / 16).expand(16, 16)).power
    assert power.argmax() == 3
    assert power[[0, 1, 2, 4, 5, 6, 7, 8]].abs().max() < 1e-20


def test_impulse_is_white_and_constant_is_all_at_zero():
    impulse = torch.zeros(9, 9)
    impulse[4, 2] = 9
    torch.testing.assert_close(fourier_spectrum_2d(impulse).power, torch.ones(5))
    torch.testing.assert_close(fourier_spectrum_2d(torch.ones(4, 4)).power, torch.tensor([16.0, 0, 0]))


def test_half_precision_maps_are_computed_in_single():
    maps = torch.randn(8, 8).half()
    torch.testing.assert_close(fourier_spectrum_2d(maps).power, fourier_spectrum_2d(maps.float()).power)


@pytest.mark.parametrize(
    "maps", [torch.ones(3), torch.ones(0, 3), torch.ones(3, 3, dtype=torch.uint8), torch.full((3, 3), math.nan)]
)
def test_bad_maps_are_refused(maps):
    with pytest.raises(VLMQError):
        fourier_spectrum_2d(maps)
