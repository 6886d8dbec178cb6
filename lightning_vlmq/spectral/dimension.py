"""How many directions a spectrum has, how fast it falls, and how far two subspaces have turned from each other."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral.moments import EIGENVALUE_FLOOR

RANKME_EPSILON = 1e-7
ALPHA_REQ_RANGE = (5, 50)
"""Ranks, 0-based and half-open, that the eigenspectrum's decay is fitted on, as in the authors' code."""


def participation_ratio(eigenvalues: Tensor) -> float:
    """``(sum l)^2 / sum l^2`` of eigenvalues ``[r]``, between 1 and r; 0 where all are 0 (Gao et al. 2017)."""
    values = _spectrum(eigenvalues)
    return float(values.sum() ** 2 / values.square().sum()) if values.sum() > 0 else 0.0


def effective_rank(values: Tensor) -> float:
    """``exp`` of the entropy of values ``[r]`` normalised to sum 1, between 1 and r; 0 where all are 0.

    Of singular values it is Roy & Vetterli's (2007, eq. 3) effective rank; of eigenvalues (their squares) another,
    smaller number. Say which: the columns that hold it are ``effective_rank_singular`` and ``effective_rank_eigen``.
    """
    p = _spectrum(values)
    p = p / p.max() if p.max() > 0 else p  # before summing, so that subnormal values do not underflow
    return math.exp(float(torch.special.entr(p / p.sum()).sum())) if p.sum() > 0 else 0.0


def rankme(singular_values: Tensor) -> float:
    """RankMe (Garrido et al. 2023, eq. 1-2): entropy of singular values ``[r]`` normalised to sum 1, each plus 1e-7.

    0 where all are 0.
    """
    values = _spectrum(singular_values)
    if values.sum() == 0:
        return 0.0
    p = values / values.sum() + RANKME_EPSILON
    return math.exp(float(-(p * p.log()).sum()))


def alpha_req(eigenvalues: Tensor, ranks: tuple[int, int] = ALPHA_REQ_RANGE) -> float:
    """Decay of an eigenspectrum, ``l_j ~ j^-alpha`` (alpha-ReQ, Agrawal et al. 2022; Stringer et al. 2019).

    Least squares of ``log l_j`` on ``log j`` with weights ``1 / j``, as in both papers' code.

    Args:
        eigenvalues: ``[r]``, largest first.
        ranks: 0-based, half-open range of the fit; its end is cut to eigenvalues above
            :data:`~lightning_vlmq.spectral.moments.EIGENVALUE_FLOOR` of the largest, below which there is only rounding.

    Returns:
        alpha; NaN with fewer than two such eigenvalues in the range.
    """
    values = _spectrum(eigenvalues)
    first, last = ranks[0], min(ranks[1], int((values > EIGENVALUE_FLOOR * values.max()).sum()))
    if last - first < 2:
        return math.nan
    j = torch.arange(first, last, dtype=torch.float64)
    y, x, weight = values[j.long()].log(), (j + 1).log(), 1 / (j + 1)
    x = x - (weight * x).sum() / weight.sum()
    return float(-(weight * x * y).sum() / (weight * x.square()).sum())


TAILS = 64
"""Beginnings of a power law's tail that are tried at a time."""


class PowerLaw(NamedTuple):
    """A power-law tail ``p(x) ~ x^-exponent`` for ``x >= minimum``.

    Attributes:
        exponent: maximum-likelihood estimate.
        stderr: its standard error, ``(exponent - 1) / sqrt(n_tail)``.
        minimum: where the tail begins.
        distance: Kolmogorov-Smirnov distance between the tail and the law.
        n_tail: values in the tail.
    """

    exponent: float
    stderr: float
    minimum: float
    distance: float
    n_tail: int


def power_law_tail(values: Tensor) -> PowerLaw:
    """Fit a power law to the upper tail (Clauset, Shalizi & Newman 2009, eq. 3.1, 3.2 and 3.9).

    Every distinct value but the two largest is tried as the tail's beginning; the one with the least
    Kolmogorov-Smirnov distance counts. The exponent is not bounded.

    Args:
        values: ``[n]``, e.g. the eigenvalues of ``W^T W``; zeros are left out, as they lie in no tail.

    Returns:
        The fit; NaN throughout with fewer than four distinct positive values.
    """
    x: NDArray[np.float64] = np.sort(_spectrum(values).numpy())
    x = x[x > 0]
    distinct, first = np.unique(x, return_index=True)
    if len(distinct) < 4:
        return PowerLaw(math.nan, math.nan, math.nan, math.nan, 0)
    logs, below = np.log(x), first / len(x)
    distinct_logs, starts = logs[first], first[:-2]
    sizes = len(x) - starts
    tails = np.cumsum(logs[::-1])[::-1][starts]  # sums of the logarithms from each start on
    exponents = 1 + sizes / (tails - sizes * logs[starts])
    distances = np.empty(len(starts))
    for begin in range(0, len(starts), TAILS):  # what a block of starts has in common is the ranks behind its first
        own = slice(begin, min(begin + TAILS, len(starts)))
        excess = np.maximum(distinct_logs[begin:] - logs[starts[own], None], 0)
        law = -np.expm1((1 - exponents[own, None]) * excess)
        seen = (below[begin:] - below[own, None]) / (1 - below[own, None])
        gaps = np.triu(np.abs(law - seen))  # before its beginning there is no tail
        distances[own] = gaps.max(1)
    best = int(distances.argmin())
    exponent, n = float(exponents[best]), int(sizes[best])
    return PowerLaw(exponent, (exponent - 1) / math.sqrt(n), float(x[starts[best]]), float(distances[best]), n)


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between two subspaces in radians, largest first (Bjorck & Golub 1973; Knyazev & Argentati 2002).

    Args:
        first: float ``[d, k]``, columns that span one subspace.
        second: float ``[d, l]``, likewise.

    Returns:
        float64 ``[min(k, l)]``, each in [0, pi / 2].

    Raises:
        VLMQError: if the two are not matrices of the same height.
    """
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second) or 0 in (*first.shape, *second.shape):
        raise VLMQError(f"subspaces {list(first.shape)} and {list(second.shape)} must be [d, k] and [d, l]")
    angles = scipy.linalg.subspace_angles(first.detach().cpu().double().numpy(), second.detach().cpu().double().numpy())
    return torch.from_numpy(angles)


def _spectrum(values: Tensor) -> Tensor:
    values = values.detach().to("cpu", torch.float64)
    if values.ndim != 1 or len(values) == 0 or not torch.isfinite(values).all() or (values < 0).any():
        raise VLMQError(f"a spectrum is a non-empty vector of finite values of 0 or more, not {list(values.shape)}")
    return values
