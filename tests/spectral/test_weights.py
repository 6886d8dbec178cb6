import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral import Spectrum, as_matrix, log_ratio, singular_values, stacked_singular_values

SHAPES = [(7, 5), (5, 7), (1, 9), (9, 1), (1, 1), (6, 3, 3, 3), (8, 1, 5, 5), (4, 2, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_values_agree_with_scipy(shape, dtype):
    weight = torch.randn(shape, dtype=dtype)
    expected = scipy.linalg.svd(weight.double().numpy().reshape(shape[0], -1), compute_uv=False, lapack_driver="gesvd")
    values = singular_values(weight)
    assert values.dtype == torch.float64
    assert values.shape == (min(shape[0], math.prod(shape[1:])),)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("decades", [1, 3, 6])
@pytest.mark.parametrize("shape", [(40, 40), (30, 80), (80, 30)])
def test_small_singular_values_are_exact_too(shape, decades):
    rng = np.random.default_rng(decades)
    size = min(shape)
    expected = np.logspace(0, -decades, size)
    left, right = (scipy.stats.ortho_group.rvs(n, random_state=rng)[:, :size] for n in shape)
    found = singular_values(torch.from_numpy(left * expected @ right.T))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_weights_of_one_shape_together_are_as_alone():
    weights = [torch.randn(6, 9), torch.zeros(6, 9), torch.randn(6, 1) @ torch.randn(1, 9), 1e30 * torch.randn(6, 9)]
    for weight, found in zip(weights, stacked_singular_values(weights)):
        torch.testing.assert_close(found, singular_values(weight), rtol=1e-12, atol=0)
        exact = np.linalg.svd(weight.double().numpy(), compute_uv=False)
        np.testing.assert_allclose(found.numpy(), exact, rtol=1e-6, atol=1e-13 * exact[0])


def test_depthwise_convolution_is_a_matrix_of_channels_by_kernel():
    convolution = torch.nn.Conv2d(12, 12, 3, groups=12)
    assert as_matrix(convolution.weight).shape == (12, 9)


def test_convolution_matrix_maps_patches_to_outputs():
    convolution = torch.nn.Conv2d(3, 5, 4, stride=4, bias=False, dtype=torch.float64)
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    patches = torch.nn.functional.unfold(image, 4, stride=4)[0]
    torch.testing.assert_close(as_matrix(convolution.weight) @ patches, convolution(image)[0].flatten(1))


def test_singular_values_take_parameters_and_half_precision():
    weight = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.bfloat16))
    values = singular_values(weight)
    assert values.dtype == torch.float64
    assert not values.requires_grad
    np.testing.assert_allclose(values.numpy(), scipy.linalg.svdvals(weight.detach().float().numpy()), rtol=1e-5)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, math.nan]]), "NaN"),
        (torch.tensor([[1.0, math.inf]]), "NaN or infinity"),
        (torch.zeros(4), "no matrix"),
        (torch.zeros(0, 4), "no matrix"),
        (torch.zeros(3, 4, dtype=torch.int8), "dequantized"),
    ],
)
def test_bad_weights_are_named(weight, message):
    with pytest.raises(VLMQError, match=message):
        singular_values(weight)


def test_rotation_leaves_singular_values_and_scaling_scales_them():
    weight = torch.randn(10, 6, dtype=torch.float64)
    rotation = torch.from_numpy(scipy.stats.ortho_group.rvs(6, random_state=0))
    before = singular_values(weight)
    torch.testing.assert_close(singular_values(weight @ rotation), before)
    torch.testing.assert_close(singular_values(-3 * weight), 3 * before)


def test_spectrum_scalars_agree_with_numpy():
    weight = torch.randn(20, 13, dtype=torch.float64)
    matrix = weight.numpy()
    spectrum = Spectrum.of(weight)
    assert len(spectrum) == 13
    assert spectrum.stable_rank == pytest.approx(np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2)
    sigma = np.linalg.svd(matrix, compute_uv=False)
    assert spectrum.effective_rank == pytest.approx(np.exp(scipy.stats.entropy(sigma)))  # entropy normalises to sum 1
    for k in (0, 1, 8, 13, 99):
        assert spectrum.energy_at(k) == pytest.approx((sigma[:k] ** 2).sum() / (sigma**2).sum())
    assert spectrum.energy_at(99) <= 1


def test_orthogonal_matrix_has_full_rank_by_every_measure():
    spectrum = Spectrum.of(torch.from_numpy(scipy.stats.ortho_group.rvs(16, random_state=1)))
    assert spectrum.stable_rank == pytest.approx(16)
    assert spectrum.effective_rank == pytest.approx(16)
    assert spectrum.energy_at(4) == pytest.approx(0.25)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_rank_one_matrix_has_rank_one_by_every_measure_at_any_scale(scale):
    spectrum = Spectrum.of(scale * torch.outer(torch.rand(6) + 0.1, torch.rand(4) + 0.1))
    assert spectrum.stable_rank == pytest.approx(1, abs=1e-5)
    assert spectrum.effective_rank == pytest.approx(1, abs=1e-4)
    assert spectrum.energy_at(1) == pytest.approx(1, abs=1e-6)


def test_zero_matrix_has_rank_and_energy_zero():
    spectrum = Spectrum.of(torch.zeros(3, 5))
    assert (spectrum.stable_rank, spectrum.effective_rank, spectrum.energy_at(3)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(0),
        torch.ones(2, 2),
        torch.tensor([1, 0]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([1.0, -1.0]),
        torch.tensor([math.nan, 1.0]),
    ],
)
def test_spectrum_refuses_what_is_none(values):
    with pytest.raises(VLMQError):
        Spectrum(values)


def test_negative_rank_is_refused():
    with pytest.raises(VLMQError, match="-1"):
        Spectrum(torch.ones(3)).energy_at(-1)


def test_log_ratio_is_log2_of_the_quotient():
    quantized, reference = torch.rand(9, dtype=torch.float64) + 0.1, torch.rand(9, dtype=torch.float64) + 0.1
    np.testing.assert_allclose(log_ratio(quantized, reference), np.log2(quantized.numpy() / reference.numpy()))
    torch.testing.assert_close(log_ratio(quantized, reference), -log_ratio(reference, quantized))


def test_log_ratio_of_missing_ranks_is_finite():
    reference = torch.tensor([1.0, 0.0, 0.0, 1e-9])
    quantized = torch.tensor([1.0, 0.0, 0.5, 0.0])
    np.testing.assert_allclose(log_ratio(quantized, reference), [0, 0, np.log2(0.5 / 1e-6), 0], rtol=1e-6)
    assert log_ratio(torch.zeros(3), torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("quantized", "reference", "floor"),
    [
        (torch.ones(3), torch.ones(4), 1e-6),
        (torch.ones(0), torch.ones(0), 1e-6),
        (torch.ones(3), torch.tensor([1.0, math.nan, 1.0]), 1e-6),
        (-torch.ones(3), torch.ones(3), 1e-6),
        (torch.ones(3), torch.ones(3), 0.0),
    ],
)
def test_log_ratio_refuses_bad_input(quantized, reference, floor):
    with pytest.raises(VLMQError):
        log_ratio(quantized, reference, floor)
