"""A mean over things of which there are several measurements each: VLMs, each quantized in many ways and judged on the same images."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.statistics.significance import Z95


class ClusteredMean(NamedTuple):
    """A mean over clusters.

    Attributes:
        estimate: the mean, every cluster with the same weight.
        stderr: its standard error, of clusters drawn anew and of samples drawn anew; of samples alone with one cluster.
        low: lower end of the 95 % interval.
        high: its upper end.
        n_clusters: clusters.
    """

    estimate: float
    stderr: float
    low: float
    high: float
    n_clusters: int


def clustered_mean(
    points: NDArray[np.float64], replicates: NDArray[np.float64] | None = None, unseen: float | None = None
) -> ClusteredMean:
    """Mean over clusters, with an interval for another draw of clusters and of the samples that all of them share.

    The clusters' own spread holds what differs between them and each one's sampling noise, ``s^2 / k``; what the common samples do to
    all at once is not in it, and is the mean covariance c of their bootstrap replicates. Where there are none, or they do not show all
    that samples do, the rest u counts as one and the same error of all clusters, which is the most that it can be::

        stderr^2 = s^2 / k + max(c, 0) + u^2

    The interval takes Student's t with k - 1 degrees of freedom for the first part, as cluster-robust errors of few clusters do (Cameron &
    Miller 2015, section VI.D), and the normal quantile for the others, which are known from many samples. Both half-widths are added as
    squares (Howe 1974, JASA 69, 789): 95 % coverage or a little more, for any k and shares of the parts. One cluster says nothing about
    others: its interval is over samples alone.

    Args:
        points: float ``[k]``, each cluster's own mean.
        replicates: float ``[R, k]``, bootstrap replicates of them, of the same resample in a row; ``None`` where there are none.
        unseen: u, the mean over clusters of each one's standard error over samples beyond its replicates; ``None`` where nothing is known
            of it: without replicates, samples then count as fixed.

    Returns:
        The mean; its error and interval are NaN for one cluster of which nothing else is given.

    Raises:
        VLMQError: there are no clusters, or shapes do not fit.
    """
    points = np.asarray(points, dtype=np.float64)
    k = points.size
    if points.ndim != 1 or k == 0 or (replicates is not None and (replicates.ndim != 2 or replicates.shape[1] != k)):
        given = None if replicates is None else replicates.shape
        raise VLMQError(f"need points [k], k > 0, and replicates [R, k], got {points.shape} and {given}")
    estimate = float(points.mean())
    cov, rest = None, unseen or 0.0
    if replicates is not None:
        finite = replicates[np.isfinite(replicates).all(1)]
        cov = np.atleast_2d(np.cov(finite, rowvar=False)) if len(finite) > 1 else np.full((k, k), math.nan)
    if k == 1:
        shown = 0.0 if cov is None else cov[0, 0] ** 0.5
        stderr = math.nan if cov is None and unseen is None else math.hypot(shown, rest)
        half = Z95 * stderr
    else:
        common = 0.0 if cov is None else float((cov.sum() - np.trace(cov)) / (k * (k - 1)))
        shared = math.hypot(max(common, 0.0) ** 0.5, rest) if not math.isnan(common) else math.nan
        own = math.sqrt(points.var(ddof=1) / k)
        stderr, half = math.hypot(own, shared), math.hypot(student.ppf(0.975, k - 1) * own, Z95 * shared)
    return ClusteredMean(estimate, stderr, estimate - half, estimate + half, k)
