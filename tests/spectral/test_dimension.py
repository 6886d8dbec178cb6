import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral import (
    alpha_req,
    effective_rank,
    participation_ratio,
    power_law_tail,
    principal_angles,
    rankme,
)


def test_counts_of_directions_agree_with_their_formulas():
    z = np.random.default_rng(0).normal(size=(100, 20)) * np.logspace(0, -2, 20)
    sigma = np.linalg.svd(z, compute_uv=False)
    values = torch.from_numpy(sigma)
    assert effective_rank(values) == pytest.approx(np.exp(scipy.stats.entropy(sigma)))
    assert effective_rank(values.square()) == pytest.approx(np.exp(scipy.stats.entropy(sigma**2)))
    p = sigma / sigma.sum() + 1e-7
    assert rankme(values) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    covariance = z.T @ z
    expected = np.trace(covariance) ** 2 / np.trace(covariance @ covariance)
    assert participation_ratio(values.square()) == pytest.approx(expected)


@pytest.mark.parametrize("measure", [participation_ratio, effective_rank, rankme])
def test_equal_one_and_no_directions(measure):
    assert measure(torch.ones(7)) == pytest.approx(7, rel=1e-4)
    assert measure(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1, rel=1e-4)
    assert measure(torch.zeros(3)) == 0.0
    for bad in (torch.tensor([1.0, -1.0]), torch.tensor([math.nan]), torch.zeros(0), torch.ones(2, 2)):
        with pytest.raises(VLMQError):
            measure(bad)


def test_alpha_of_an_exact_power_law_and_of_the_published_code():
    j = torch.arange(1, 201, dtype=torch.float64)
    assert alpha_req(3 * j**-1.37) == pytest.approx(1.37)
    values = (j**-1.2 * (1 + 0.1 * torch.sin(j))).sort(descending=True).values
    trange = np.arange(5, 50)  # get_powerlaw of Stringer et al. 2019, which alpha-ReQ's code takes over
    logss, t = np.log(np.abs(values.numpy())), trange + 1
    x = np.stack([-np.log(t), np.ones(len(t))], axis=1)
    w = 1.0 / t[:, None]
    expected = np.linalg.solve(x.T @ (x * w), (w * x).T @ logss[trange][:, None]).flatten()[0]
    assert alpha_req(values) == pytest.approx(expected)
    assert math.isnan(alpha_req(torch.ones(6)))
    resolved, rounding = j[:9] ** -1.2, 1e-16 * torch.rand(30, dtype=torch.float64).sort(descending=True).values
    assert alpha_req(torch.cat([resolved, rounding])) == pytest.approx(1.2)
    for short in (torch.zeros(1), torch.ones(1), torch.tensor([1.0, 0.0, 0.0])):
        assert math.isnan(alpha_req(short))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["pareto", "wishart", "ties"])
def test_tail_exponent_is_that_of_the_powerlaw_package(seed, kind):
    powerlaw = pytest.importorskip("powerlaw", reason="pip install powerlaw, a development dependency")
    rng = np.random.default_rng(seed)
    if kind == "pareto":
        x = rng.pareto(1.7, 300) + 0.5
    elif kind == "wishart":
        x = np.linalg.eigvalsh(np.cov(rng.normal(size=(80, 200)) * np.logspace(0, -1, 80)[:, None]))
    else:
        x = np.round(rng.pareto(1.5, 200) + 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = powerlaw.Fit(x, verbose=False, parameter_ranges={"alpha": [0, None]})
        exponent, error = theirs.alpha, theirs.sigma
    mine = power_law_tail(torch.from_numpy(x))
    assert mine.exponent == pytest.approx(exponent, rel=1e-6)
    assert mine.stderr == pytest.approx(error, rel=1e-6)
    assert mine.minimum == pytest.approx(theirs.xmin, rel=1e-12)
    assert mine.n_tail == (x >= theirs.xmin).sum()


def test_a_known_exponent_is_found_and_zeros_do_not_count():
    rng = np.random.default_rng(0)
    x = rng.pareto(1.5, 5000) + 1  # density exponent 2.5 from 1 on
    fit = power_law_tail(torch.from_numpy(np.r_[x, np.zeros(100)]))
    assert abs(fit.exponent - 2.5) < 4 * fit.stderr
    assert math.isnan(power_law_tail(torch.tensor([1.0, 1.0, 2.0, 3.0])).exponent)


def test_principal_angles():
    e = torch.eye(5)
    turned = torch.tensor([math.cos(0.3), 0, 0, math.sin(0.3), 0])
    angles = principal_angles(e[:, :2], torch.stack([turned, e[1]], 1))
    np.testing.assert_allclose(angles.numpy(), [0.3, 0], atol=1e-6)
    np.testing.assert_allclose(principal_angles(e[:, :2], e[:, 2:4]).numpy(), [math.pi / 2] * 2)
    with pytest.raises(VLMQError):
        principal_angles(e, torch.eye(4))
