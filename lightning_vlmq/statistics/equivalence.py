"""Whether one change reproduces another, and which quantity foretells one: pure functions on replicates and columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata
from scipy.stats import t as student

from lightning_vlmq.core.errors import VLMQError

Array = NDArray[np.float64]
EXACT_FLIPS = 14
"""Clusters up to which every flip of signs is tried."""
VERDICTS = ("reproduces", "does not", "undecided", "nothing to reproduce", "no match")
"""Of two changes; the last one is of controls that are no match, and comes from whoever knows that."""


@dataclass(frozen=True)
class Reproduction:
    """A control's change beside the change that it is to reproduce.

    Attributes:
        verdict: one of :data:`VERDICTS`.
        ratio: the control's change over the other; NaN where that is 0.
        low: lower end of the ratio's interval of confidence ``2 confidence - 1``, by the two one-sided tests' level; NaN where
            there is nothing to reproduce.
        high: its upper end.
    """

    verdict: str
    ratio: float
    low: float
    high: float


def reproduction(
    change: float, drawn: Array, control: float, control_drawn: Array, share: float = 0.5, confidence: float = 0.95
) -> Reproduction:
    """Two one-sided tests (Schuirmann 1987) of "the control's change is within ``share`` of the other", as a ratio of both.

    With c and q the changes and s the sign of q, the control reproduces q where both ``s (c - (1 - share) q)`` and
    ``s ((1 + share) q - c)`` are positive at the given confidence; it does not where one of them is negative at it. Both are
    linear in c and q, so the uncertainty of q counts too (as in Fieller 1954). Where q itself does not differ from 0 at the
    two-sided level there is nothing to reproduce, whatever the control does.

    Args:
        change: q, the change to be reproduced.
        drawn: its bootstrap replicates ``[R]``.
        control: c.
        control_drawn: its replicates from the same resamples, ``[R]``; see :func:`over_seeds`.
        share: half-width of the equivalence region, as a share of q.
        confidence: of each one-sided test.

    Returns:
        The verdict. Intervals are the replicates' percentiles, centred on the estimates.

    Raises:
        VLMQError: replicates that are not paired, or a share or confidence outside (0, 1).
    """
    if drawn.shape != control_drawn.shape or drawn.ndim != 1:
        raise VLMQError(f"replicates must be paired, got {drawn.shape} and {control_drawn.shape}")
    if not (0 < share < 1 and 0.5 < confidence < 1):
        raise VLMQError(f"share must be in (0, 1) and confidence in (0.5, 1), got {share} and {confidence}")
    q, c = drawn - np.nanmean(drawn) + change, control_drawn - np.nanmean(control_drawn) + control
    kept = np.isfinite(q) & np.isfinite(c)
    if kept.sum() < 2 or not (math.isfinite(change) and math.isfinite(control)):
        return Reproduction("undecided", math.nan, math.nan, math.nan)
    q, c, sign = q[kept], c[kept], math.copysign(1, change)
    if change == 0 or np.quantile(sign * q, (1 - confidence) / 2) <= 0:
        return Reproduction("nothing to reproduce", control / change if change else math.nan, math.nan, math.nan)
    margins = sign * (c - (1 - share) * q), sign * ((1 + share) * q - c)
    lows, highs = ([float(np.quantile(m, level)) for m in margins] for level in (1 - confidence, confidence))
    verdict = "reproduces" if min(lows) > 0 else "does not" if min(highs) < 0 else "undecided"
    ratios = (c / q)[sign * q > 0]
    low, high = np.quantile(ratios, [1 - confidence, confidence])
    return Reproduction(verdict, control / change, float(low), float(high))


def over_seeds(replicates: Array, seed: int = 0) -> Array:
    """Replicates over samples and seeds: each resample also draws the seeds, with replacement.

    The mean of n drawn of n values varies by their own spread over n, which is (n - 1) / n of what the mean of n new ones does. So each
    seed's deviation from the mean over seeds is stretched by ``sqrt(n / (n - 1))`` first.

    Args:
        replicates: ``[R, seeds]``, of each seed's run on the same R resamples of the samples.
        seed: of the draws.

    Returns:
        ``[R]``.
    """
    r, n = replicates.shape
    centre = replicates.mean(axis=1, keepdims=True)
    drawn = np.random.default_rng([seed, n]).integers(0, n, (r, n))
    deviations = np.take_along_axis(replicates - centre, drawn, axis=1).mean(axis=1)
    # few seeds tell their own spread badly: their quantile is Student's, not the normal's
    wider = float(student.ppf(0.95, n - 1) / norm.ppf(0.95)) if n > 1 else 1.0
    return centre[:, 0] + wider * math.sqrt(n / max(n - 1, 1)) * deviations


@dataclass(frozen=True)
class Association:
    """How a quantity foretells an outcome.

    Attributes:
        rho: mean over clusters of the mean Spearman correlation inside their strata; NaN without a stratum of three.
        low: lower end of its 95 % interval, clusters resampled.
        high: upper end.
        p_value: two-sided, of the exact sign-flip test over clusters (Fisher 1935), no less than ``2^(1 - n_clusters)``: resamples of a
            few clusters that agree would all agree, and make p as small as one likes. NaN with fewer than two clusters.
        left_out_low: smallest rho with one cluster left out.
        left_out_high: largest.
        n_clusters: clusters with a correlation.
        n: rows in them.
    """

    rho: float
    low: float
    high: float
    p_value: float
    left_out_low: float
    left_out_high: float
    n_clusters: int
    n: int


def stratified_association(
    x: Array, y: Array, clusters: NDArray[np.str_], strata: NDArray[np.str_], n_resamples: int = 2000, seed: int = 0
) -> Association:
    """Spearman's rank correlation inside strata (models at one bit-width), averaged inside clusters (models), then over them.

    Correlating only inside strata keeps what differs between them (a noisy model, fewer bits) from passing for a relation.

    Args:
        x: predictor ``[n]``; rows where it or the outcome is not finite are left out.
        y: outcome ``[n]``.
        clusters: what is resampled and left out, ``[n]``.
        strata: inside which rows are ranked, ``[n]``; taken inside clusters.
        n_resamples: bootstrap resamples of clusters.
        seed: of the resamples.

    Raises:
        VLMQError: columns of other lengths.
    """
    if not len(x) == len(y) == len(clusters) == len(strata):
        raise VLMQError(f"columns must be of one length, got {[len(c) for c in (x, y, clusters, strata)]}")
    kept = np.isfinite(x) & np.isfinite(y)
    values: list[float] = []
    used = 0
    for cluster in np.unique(clusters[kept]):
        inside, found = kept & (clusters == cluster), []
        for stratum in np.unique(strata[inside]):
            rows = inside & (strata == stratum)
            rho = _spearman(x[rows], y[rows])
            if not math.isnan(rho):
                found.append(rho)
                used += int(rows.sum())
        if found:
            values.append(float(np.mean(found)))
    if not values:
        return Association(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, 0, 0)
    rhos = np.array(values)
    rho, n = float(rhos.mean()), len(rhos)
    if n < 2:
        return Association(rho, math.nan, math.nan, math.nan, math.nan, math.nan, n, used)
    drawn = rhos[np.random.default_rng([seed, n]).integers(0, n, (n_resamples, n))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    p_value = sign_flip_p(rhos, seed)
    without = (rhos.sum() - rhos) / (n - 1)
    return Association(rho, float(low), float(high), p_value, float(without.min()), float(without.max()), n, used)


def sign_flip_p(values: Array, seed: int = 0) -> float:
    """Two-sided p-value of "values ``[n]`` of independent clusters are symmetric about 0", by their mean under flips of signs.

    All ``2^n`` flips up to 14 values, beyond that as many drawn ones, the values themselves counted in.
    """
    n = len(values)
    if n <= EXACT_FLIPS:
        signs = 1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    else:
        signs = np.random.default_rng([seed, n]).choice([-1.0, 1.0], (2**EXACT_FLIPS, n))
        signs[0] = 1
    return float((np.abs(signs @ values) >= abs(values.sum()) * (1 - 1e-12)).mean())


def _spearman(x: Array, y: Array) -> float:
    if len(x) < 3:
        return math.nan
    a, b = (rankdata(column) - (len(column) + 1) / 2 for column in (x, y))
    spread = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / spread if spread > 0 else math.nan
