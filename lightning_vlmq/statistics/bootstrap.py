"""The bootstrap: standard errors, intervals and p-values of any statistic, of one model or of two on the same samples.

A statistic is a function of columns ``[..., n] -> [...]``, as those of :mod:`~lightning_vlmq.metrics.functional`, so
that many resamples are one call; which samples each draws is said in :mod:`~lightning_vlmq.statistics.resamples`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.statistics.resamples import bootstrap_replicates


@dataclass(frozen=True)
class BootstrapResult:
    """A statistic with its bootstrap uncertainty.

    Attributes:
        estimate: the statistic on the samples as they are.
        stderr: standard deviation (ddof 1) over the resamples.
        low: lower end of the percentile interval.
        high: upper end.
        p_value: two-sided, of the null hypothesis that the statistic is the null value.
        n_resamples: resamples in which the statistic was defined (not NaN); only these enter the numbers above.
    """

    estimate: float
    stderr: float
    low: float
    high: float
    p_value: float
    n_resamples: int


def summarise(
    estimate: float | Tensor, replicates: Tensor, confidence: float = 0.95, null: float = 0.0
) -> BootstrapResult:
    """Turn bootstrap replicates into standard error, percentile interval and p-value.

    The interval holds the central ``confidence`` share of the replicates (Efron & Tibshirani 1993, section 13.3). The
    p-value inverts it: p = 2 min((1 + #{t <= null}) / (R + 1), (1 + #{t >= null}) / (R + 1)), at most 1 (Davison &
    Hinkley 1997, section 4.2.5). It is never 0; its smallest value 2 / (R + 1) says how many resamples a correction
    over many comparisons needs.

    Args:
        estimate: the statistic on the samples as they are.
        replicates: float ``[R]``. NaN (a resample on which the statistic is undefined) is left out and not counted.
        confidence: coverage of the interval, in (0, 1).
        null: value of the statistic under the null hypothesis.

    Returns:
        The summary; all NaN but the estimate with fewer than two defined replicates or an undefined estimate.

    Raises:
        VLMQError: ``confidence`` is outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise VLMQError(f"confidence must lie in (0, 1), got {confidence}")
    point = float(estimate)
    defined = replicates[~replicates.isnan()].to(torch.float64)
    r = defined.numel()
    if r < 2 or np.isnan(point):
        return BootstrapResult(point, np.nan, np.nan, np.nan, np.nan, r)
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined.numpy(), [tail, 1 - tail])
    at_most, at_least = int((defined <= null).sum()), int((defined >= null).sum())
    p_value = min(1.0, 2 * (1 + min(at_most, at_least)) / (r + 1))
    return BootstrapResult(point, float(defined.std(correction=1)), float(low), float(high), p_value, r)


def bootstrap(
    fn: Callable[..., Tensor],
    *columns: Tensor,
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    groups: Sequence[int] | None = None,
    null: float = 0.0,
) -> BootstrapResult:
    """Bootstrap any statistic of columns, of one model or of two models side by side.

    Example:
        The added vulnerability of a quantized model, common and counter groups resampled independently::

            def vuln_add(common_f, counter_f, common_q, counter_q):
                def accuracy(correct):
                    return correct.double().mean(-1)

                return added_vulnerability(
                    relative_change(accuracy(counter_f), accuracy(counter_q)),
                    relative_change(accuracy(common_f), accuracy(common_q)),
                )


            bootstrap(vuln_add, common_f, counter_f, common_q, counter_q, groups=(0, 1, 0, 1))

    Args:
        fn: the statistic, columns ``[..., n_i]`` to ``[...]``.
        columns: tensors ``[n_i]``.
        n_resamples: number of resamples.
        seed: non-negative seed.
        confidence: coverage of the interval.
        groups: the group of each column; see :mod:`~lightning_vlmq.statistics.resamples`.
        null: value under the null hypothesis, for the p-value.

    Raises:
        VLMQError: as :func:`bootstrap_replicates` and :func:`summarise`.
    """
    replicates = bootstrap_replicates(fn, *columns, n_resamples=n_resamples, seed=seed, groups=groups)
    return summarise(fn(*columns), replicates, confidence, null)


def bootstrap_standard_error(
    fn: Callable[..., Tensor],
    *columns: Tensor,
    n_resamples: int = 200,
    seed: int = 0,
    groups: Sequence[int] | None = None,
) -> float:
    """Standard error of a statistic: the standard deviation over bootstrap resamples (Efron 1979).

    Args:
        fn: the statistic, columns ``[..., n_i]`` to ``[...]``, e.g. ``auroc`` with ``groups=(0, 1)``.
        columns: tensors ``[n_i]``.
        n_resamples: number of resamples; 200 give the standard error itself to about 5 %.
        seed: non-negative seed.
        groups: the group of each column; see :mod:`~lightning_vlmq.statistics.resamples`.

    Returns:
        The standard error in the statistic's unit; NaN with fewer than two defined resamples.

    Raises:
        VLMQError: as :func:`bootstrap_replicates`.
    """
    replicates = bootstrap_replicates(fn, *columns, n_resamples=n_resamples, seed=seed, groups=groups)
    defined = replicates[~replicates.isnan()]
    return float(defined.std(correction=1)) if defined.numel() > 1 else float("nan")


def difference(value_f: Tensor, value_q: Tensor) -> Tensor:
    """The quantized model's value minus the full-precision model's."""
    return value_q - value_f


def paired_bootstrap(
    fn: Callable[..., Tensor],
    columns_f: Sequence[Tensor],
    columns_q: Sequence[Tensor],
    n_resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
    groups: Sequence[int] | None = None,
    combine: Callable[[Tensor, Tensor], Tensor] = difference,
) -> BootstrapResult:
    """Compare two models on the same samples: both see the same resamples, so what they share cancels.

    Args:
        fn: the metric, columns ``[..., n_i]`` to ``[...]``.
        columns_f: the full-precision model's columns, each ``[n_i]``.
        columns_q: the quantized model's columns on the same samples, in the same order.
        n_resamples: number of resamples.
        seed: non-negative seed.
        confidence: coverage of the interval.
        groups: the group of each of the metric's columns, e.g. (0, 1) for ID and OOD scores; one group if not given.
        combine: what to report of the two values, as a function (value_f, value_q) whose null value is 0:
            :func:`difference` (q - f) or ``relative_change`` ((f - q) / f).

    Returns:
        The combined statistic with interval and p-value. A statistic that needs both models' columns at once
        (agreement) goes to :func:`bootstrap`.

    Raises:
        VLMQError: the two models' columns differ in number or size; else as :func:`bootstrap`.
    """
    columns_f, columns_q = list(columns_f), list(columns_q)
    if [c.shape for c in columns_f] != [c.shape for c in columns_q]:
        raise VLMQError(
            "a paired bootstrap needs both models' columns on the same samples, got shapes "
            f"{[tuple(c.shape) for c in columns_f]} and {[tuple(c.shape) for c in columns_q]}"
        )
    k = len(columns_f)
    groups = [0] * k if groups is None else list(groups)

    def statistic(*columns: Tensor) -> Tensor:
        return combine(fn(*columns[:k]), fn(*columns[k:]))

    return bootstrap(
        statistic,
        *columns_f,
        *columns_q,
        n_resamples=n_resamples,
        seed=seed,
        confidence=confidence,
        groups=[*groups, *groups],
    )
