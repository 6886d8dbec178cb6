import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral import (
    RankCut,
    as_matrix,
    draw_noise,
    filter_gains,
    matched_noise,
    shrink_spectrum,
    singular_values,
    square_roots,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(n=500, d=6):
    return torch.randn(n, d, dtype=torch.float64) * torch.logspace(0.5, -1, d, dtype=torch.float64)


@pytest.mark.parametrize("distribution", ["gaussian", "uniform", "sign_flip"])
@pytest.mark.parametrize("shape", [(16, 30), (16, 2, 3, 3), (16, 1)])
def test_noise_matches_the_error_of_every_channel(shape, distribution):
    weight = torch.randn(shape)
    error = torch.randn(shape) * torch.logspace(-4, 0, 16).reshape(-1, *[1] * (len(shape) - 1))
    error[3] = 0
    noise = matched_noise(weight.double(), error.double(), seeded(), distribution) - weight.double()
    torch.testing.assert_close(as_matrix(noise).norm(dim=1), as_matrix(error).double().norm(dim=1))
    assert noise[3].abs().max() == 0


def test_noise_has_its_distribution_and_follows_the_seed():
    error = torch.ones(1, 4000, dtype=torch.float64)
    gaussian, uniform, flipped = (
        draw_noise(error, name, seeded(1))[0] for name in ("gaussian", "uniform", "sign_flip")
    )
    assert kstest(gaussian.numpy(), "norm").pvalue > 0.01
    assert kstest(uniform.numpy() / 3**0.5 / 2 + 0.5, "uniform").pvalue > 0.01
    assert flipped.abs().eq(1).all() and abs(float(flipped.mean())) < 0.1
    weight = torch.zeros(1, 4000, dtype=torch.float64)
    assert torch.equal(matched_noise(weight, error, seeded(1))[0], gaussian)
    assert not torch.equal(matched_noise(weight, error, seeded(2))[0], gaussian)


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (6, 2, 3, 3)])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_plain_truncation_is_the_best_approximation(shape, k):
    weight = torch.randn(shape, dtype=torch.float64)
    cut = RankCut(weight)
    truncated = cut.keep(0, k)
    sigma = np.linalg.svd(weight.flatten(1).numpy(), compute_uv=False)
    assert truncated.shape == weight.shape and torch.linalg.matrix_rank(truncated.flatten(1)) == k
    lost = float((weight - truncated).square().sum())
    assert lost == pytest.approx((sigma[k:] ** 2).sum())  # Eckart-Young-Mirsky
    assert float(cut.errors()[len(sigma) - k]) == pytest.approx(lost)
    torch.testing.assert_close(cut.keep(k) + truncated, weight)
    assert torch.equal(cut.keep(0), weight)


@pytest.mark.parametrize("is_weighted", [True, False])
@pytest.mark.parametrize("from_top", [True, False])
def test_output_errors_are_those_of_the_inputs(is_weighted, from_top):
    weight, x = torch.randn(9, 6, dtype=torch.float64), inputs()
    moment = x.mT @ x / len(x)
    cut = RankCut(weight, moment, is_weighted)
    for k, claimed in enumerate(cut.errors(from_top)):
        kept = cut.keep(k) if from_top else cut.keep(0, len(cut) - k)
        lost = (x @ (kept - weight).mT).square().sum(1).mean()
        assert float(claimed) == pytest.approx(float(lost), rel=1e-8, abs=1e-12)


def test_weighted_truncation_loses_less_output_than_any_other():
    weight, x = torch.randn(9, 6, dtype=torch.float64), inputs()
    moment = x.mT @ x / len(x)
    plain, weighted = RankCut(weight, moment).errors(), RankCut(weight, moment, is_weighted=True).errors()
    assert (weighted[1:-1] < plain[1:-1]).all()
    sigma = np.linalg.svd((weight @ square_roots(moment)[0]).numpy(), compute_uv=False)  # Eckart-Young on the outputs
    np.testing.assert_allclose(weighted.numpy()[1:], np.cumsum(sigma[::-1] ** 2), rtol=1e-9)


def test_the_number_of_ranks_follows_the_error():
    cut = RankCut(torch.randn(20, 12, dtype=torch.float64))
    errors = cut.errors()
    assert cut.nearest(0.0) == 0
    for k in (1, 5, 12):
        assert cut.nearest(float(errors[k]) * 1.0001) == k
    assert cut.nearest(float(errors[1]) / 100) == 1
    assert cut.nearest(float(cut.errors(from_top=True)[2]), from_top=True) == 2


def test_inputs_that_never_come_do_not_break_the_weighting():
    x = inputs()
    x[:, 2] = 0
    weight = torch.randn(4, 6)
    kept = RankCut(weight, (x.mT @ x).float(), is_weighted=True).keep(0, 3)
    assert torch.isfinite(kept).all() and kept.dtype == torch.float32
    root, inverse = square_roots(x.mT @ x)
    torch.testing.assert_close(root @ root, x.mT @ x, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(root @ inverse @ root, root, rtol=1e-6, atol=1e-8)


def test_gains_of_a_filtered_weight():
    weight = torch.randn(40, 30, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    filtered = torch.linspace(1.1, 0.4, 30, dtype=torch.float64)
    smooth, measured = filter_gains(weight, (u * (filtered * s)) @ vt)
    torch.testing.assert_close(measured, filtered)
    assert float(smooth[0]) == pytest.approx(float(filtered[0]))  # rank 1 is a window of its own
    for k in (4, 20):  # 1-based
        window = slice(math.ceil(k / 2**0.5) - 1, math.floor(k * 2**0.5))
        expected = (filtered * s.square())[window].sum() / s.square()[window].sum()
        assert float(smooth[k - 1]) == pytest.approx(float(expected))


def test_noise_is_not_taken_for_gain_where_singular_values_grow():
    generator = seeded(0)
    u, _, vt = torch.linalg.svd(torch.randn(200, 100, generator=generator, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -2, 100, dtype=torch.float64)
    weight = (u * values) @ vt
    noisy = weight + 0.002 * torch.randn(200, 100, generator=generator, dtype=torch.float64)
    ratio = singular_values(noisy) / values
    smooth, _ = filter_gains(weight, noisy)
    assert ratio[-10:].min() > 1.5  # the ratio would amplify
    assert (smooth - 1).abs().max() < 0.1
    shrunk = singular_values(shrink_spectrum(weight, smooth))
    assert (shrunk <= values * (1 + 1e-9)).all()


def test_shrinking_clips_and_keeps_directions():
    weight = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    gains = torch.tensor([2.0, 0.5, 0.0, -1.0, 1.0])
    shrunk = shrink_spectrum(weight, gains)
    _, measured = filter_gains(weight, shrunk)
    torch.testing.assert_close(measured, torch.tensor([1.0, 0.5, 0.0, 0.0, 1.0], dtype=torch.float64))


def test_a_weight_without_directions_has_gain_one():
    smooth, measured = filter_gains(torch.zeros(3, 4), torch.ones(3, 4))
    assert smooth.eq(1).all() and measured.eq(1).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: RankCut(torch.full((3, 3), math.nan)),
        lambda: RankCut(torch.ones(3, 3), torch.eye(2)),
        lambda: RankCut(torch.ones(3, 3)).keep(2, 1),
        lambda: RankCut(torch.ones(3, 3)).keep(-1),
        lambda: draw_noise(torch.ones(3, 3), "pink", seeded()),
        lambda: matched_noise(torch.ones(3, 3), torch.ones(3, 2), seeded()),
        lambda: matched_noise(torch.ones(3, 3), torch.full((3, 3), math.inf), seeded()),
        lambda: filter_gains(torch.ones(3, 3), torch.ones(3, 2)),
        lambda: shrink_spectrum(torch.ones(3, 3), torch.ones(2)),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(VLMQError):
        call()
