import math

import numpy as np
import pytest
import torch

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral import as_matrix, matched_noise, truncate_rank


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (6, 2, 3, 3)])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_truncation_is_the_best_approximation(shape, k):
    weight = torch.randn(shape, dtype=torch.float64)
    truncated = truncate_rank(weight, k)
    assert truncated.shape == weight.shape
    sigma = np.linalg.svd(weight.flatten(1).numpy(), compute_uv=False)
    assert torch.linalg.matrix_rank(truncated.flatten(1)) == k
    assert float((weight - truncated).norm()) == pytest.approx(np.sqrt((sigma[k:] ** 2).sum()))  # Eckart-Young-Mirsky


def test_truncation_at_full_rank_copies():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    truncated = truncate_rank(weight, 3)
    assert torch.equal(truncated, weight)
    assert not truncated.requires_grad
    assert truncated.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("shape", [(16, 30), (16, 2, 3, 3), (16, 1)])
def test_noise_matches_the_error_of_every_channel(shape):
    weight = torch.randn(shape)
    error = torch.randn(shape) * torch.logspace(-4, 0, 16).reshape(-1, *[1] * (len(shape) - 1))
    noise = matched_noise(weight.double(), error.double(), seeded()) - weight.double()
    torch.testing.assert_close(as_matrix(noise).norm(dim=1), as_matrix(error).double().norm(dim=1))
    assert float(noise.norm()) == pytest.approx(float(error.double().norm()))


def test_noise_is_gaussian_independent_of_the_error_and_follows_the_seed():
    from scipy.stats import kstest

    weight, error = torch.zeros(1, 4000, dtype=torch.float64), torch.ones(1, 4000, dtype=torch.float64)
    noise = matched_noise(weight, error, seeded(1))
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(float((noise * error).mean())) < 0.1
    assert torch.equal(noise, matched_noise(weight, error, seeded(1)))
    assert not torch.equal(noise, matched_noise(weight, error, seeded(2)))


def test_no_error_means_no_noise():
    weight = torch.randn(4, 5)
    assert torch.equal(matched_noise(weight, torch.zeros(4, 5), seeded()), weight)


@pytest.mark.parametrize(
    "call",
    [
        lambda: truncate_rank(torch.ones(3, 3), -1),
        lambda: truncate_rank(torch.full((3, 3), math.nan), 1),
        lambda: matched_noise(torch.ones(3, 3), torch.ones(3, 2), seeded()),
        lambda: matched_noise(torch.ones(3, 3), torch.full((3, 3), math.inf), seeded()),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(VLMQError):
        call()
