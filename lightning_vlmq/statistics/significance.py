"""Closed-form uncertainty: standard errors of means and AUROCs, DeLong's paired test, many comparisons at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr
from scipy.stats import binomtest, false_discovery_control, norm
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.metrics.functional.ood import placements


def standard_error_of_mean(column: Tensor) -> Tensor:
    """Standard error of the mean, std(ddof=1) / sqrt(n).

    Args:
        column: ``[..., n]``, bool, integer or float.

    Returns:
        float64 ``[...]``; NaN for fewer than two samples.
    """
    column = column.to(torch.float64)
    n = column.shape[-1]
    if n < 2:
        return torch.full(column.shape[:-1], torch.nan, dtype=torch.float64, device=column.device)
    return column.std(-1, correction=1) / n**0.5


Z95 = float(norm.ppf(0.975))
"""Standard errors to either side of an estimate that make a 95 % interval."""

FALSE_DISCOVERY_RATE = 0.05
"""A corrected p-value below this is called significant, in every table, figure and screen."""


class Interval(NamedTuple):
    """An estimate with its standard error and 95 % interval over test samples."""

    estimate: float
    stderr: float
    low: float
    high: float

    @classmethod
    def normal(cls, estimate: float, stderr: float) -> Interval:
        """The estimate and :data:`Z95` standard errors to either side: it holds 0 exactly where :attr:`p_value` is above 0.05."""
        return cls(estimate, stderr, estimate - Z95 * stderr, estimate + Z95 * stderr)

    @property
    def p_value(self) -> float:
        """Two-sided p-value, see :func:`p_values`."""
        return float(p_values(self.estimate, self.stderr))


def p_values(estimate: ArrayLike, stderr: ArrayLike) -> NDArray[np.float64]:
    """Two-sided p-values of z = estimate / standard error; 1 where there is neither change nor spread, NaN where only spread lacks.

    Args:
        estimate: ``[...]``, e.g. changes.
        stderr: their standard errors, ``[...]``.

    Returns:
        ``[...]``, NaN where either is.
    """
    estimate, stderr = np.asarray(estimate, np.float64), np.asarray(stderr, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = 2 * ndtr(-np.abs(estimate) / stderr)
    # else the runs agree on every sample, up to rounding; or differ by the same amount on each
    found = np.where(stderr < 1e-12, np.where(np.abs(estimate) < 1e-9, 1.0, np.nan), found)
    return np.where(np.isnan(estimate) | np.isnan(stderr), np.nan, found)


@dataclass(frozen=True)
class DeLongResult:
    """Two correlated AUROCs and their difference.

    Attributes:
        auroc_f: AUROC of the full-precision model.
        auroc_q: AUROC of the quantized model.
        difference: ``auroc_q - auroc_f``.
        stderr_f: standard error of ``auroc_f``.
        stderr_q: standard error of ``auroc_q``.
        stderr: standard error of the difference.
        z: difference / stderr.
        p_value: two-sided, from the normal approximation.
        low: lower end of the normal interval of the difference.
        high: upper end.
    """

    auroc_f: float
    auroc_q: float
    difference: float
    stderr_f: float
    stderr_q: float
    stderr: float
    z: float
    p_value: float
    low: float
    high: float


def _components(id_scores: NDArray[np.float64], ood_scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    return tuple(part.numpy() for part in placements(torch.from_numpy(id_scores), torch.from_numpy(ood_scores)))


def _standard_error(below: NDArray[np.float64], above: NDArray[np.float64]) -> float:
    return float(np.sqrt(below.var(ddof=1) / len(below) + above.var(ddof=1) / len(above)))


def _stacked(name: str, *scores: Tensor) -> NDArray[np.float64]:
    if any(s.ndim != 1 for s in scores) or len({s.shape for s in scores}) != 1:
        raise VLMQError(f"{name} scores must be [n], of both models on the same samples, got {[*map(_shape, scores)]}")
    return torch.stack([s.detach().to("cpu", torch.float64) for s in scores]).numpy()


def _shape(scores: Tensor) -> tuple[int, ...]:
    return tuple(scores.shape)


def _undefined(*scores: NDArray[np.float64]) -> bool:
    return any(s.shape[1] < 2 or bool(np.isnan(s).any()) for s in scores)


def delong(
    id_scores_f: Tensor,
    ood_scores_f: Tensor,
    id_scores_q: Tensor,
    ood_scores_q: Tensor,
    confidence: float = 0.95,
) -> DeLongResult:
    """Test whether two models' AUROCs on the same samples differ (DeLong et al. 1988), in O(n log n) (Sun & Xu 2014).

    Args:
        id_scores_f: float ``[n1]``, the full-precision model's scores on ID samples, higher means more ID.
        ood_scores_f: float ``[n2]``, on OOD samples.
        id_scores_q: float ``[n1]``, the quantized model's, same samples in the same order.
        ood_scores_q: float ``[n2]``.
        confidence: coverage of the interval of the difference, in (0, 1).

    Returns:
        Both AUROCs with standard errors and the test. Everything is NaN when a side has fewer than two samples or a
        score is NaN. Where the estimated variance of the difference is 0, equal AUROCs give p = 1 and different ones
        (both without any spread) NaN: the normal approximation says nothing there, use the paired bootstrap.

    Raises:
        VLMQError: scores are not one-dimensional, differ in size between the models, or ``confidence`` is outside
            (0, 1).
    """
    if not 0 < confidence < 1:
        raise VLMQError(f"confidence must lie in (0, 1), got {confidence}")
    id_scores = _stacked("ID", id_scores_f, id_scores_q)
    ood_scores = _stacked("OOD", ood_scores_f, ood_scores_q)
    if _undefined(id_scores, ood_scores):
        return DeLongResult(*[np.nan] * 10)
    (below_f, below_q), (above_f, above_q) = _components(id_scores, ood_scores)
    change = float((below_q - below_f).mean())
    # the variance of the components' difference, and not var + var - 2 cov, whose rounding noise can be negative
    stderr = _standard_error(below_q - below_f, above_q - above_f)
    if stderr > 0:
        z = change / stderr
        p_value = float(2 * norm.sf(abs(z)))
    else:
        z, p_value = (0.0, 1.0) if change == 0 else (np.nan, np.nan)
    half = float(norm.ppf((1 + confidence) / 2)) * stderr
    return DeLongResult(
        auroc_f=float(below_f.mean()),
        auroc_q=float(below_q.mean()),
        difference=change,
        stderr_f=_standard_error(below_f, above_f),
        stderr_q=_standard_error(below_q, above_q),
        stderr=stderr,
        z=z,
        p_value=p_value,
        low=change - half,
        high=change + half,
    )


def delong_standard_error(id_scores: Tensor, ood_scores: Tensor) -> float:
    """Standard error of one AUROC (DeLong et al. 1988).

    Args:
        id_scores: float ``[n1]``.
        ood_scores: float ``[n2]``.

    Returns:
        The standard error; NaN when a side has fewer than two samples or a score is NaN.

    Raises:
        VLMQError: scores are not one-dimensional.
    """
    ids, oods = _stacked("ID", id_scores), _stacked("OOD", ood_scores)
    if _undefined(ids, oods):
        return float("nan")
    below, above = _components(ids, oods)
    return _standard_error(below[0], above[0])


def benjamini_hochberg(p_values: Tensor) -> Tensor:
    """Adjust p-values to control the false discovery rate over many comparisons (Benjamini & Hochberg 1995).

    Args:
        p_values: float, any shape, in [0, 1]. NaN marks a comparison that was not made: it stays NaN and does
            not count.

    Returns:
        float64 of the same shape: reject where the value is at most the wanted false discovery rate.

    Raises:
        VLMQError: a p-value is outside [0, 1].
    """
    values = p_values.detach().to("cpu", torch.float64)
    tested = ~values.isnan()
    if bool(((values < 0) | (values > 1)).any()):
        raise VLMQError("p-values must lie in [0, 1]")
    adjusted = values.clone()
    if bool(tested.any()):
        adjusted[tested] = torch.from_numpy(false_discovery_control(values[tested].numpy(), method="bh"))
    return adjusted


@dataclass(frozen=True)
class ShareImproved:
    """In how many of many comparisons the quantized model does better.

    Attributes:
        share: improved / compared; NaN without comparisons.
        low: lower end of the Wilson interval of the share.
        high: upper end.
        n_improved: comparisons that improved.
        n_compared: comparisons with both values defined.
    """

    share: float
    low: float
    high: float
    n_improved: int
    n_compared: int


def share_improved(
    values_f: Tensor, values_q: Tensor, better: Literal["higher", "lower"], confidence: float = 0.95
) -> ShareImproved:
    """Share of runs in which quantization improved a metric, with a Wilson interval (Wilson 1927).

    The interval takes the runs as independent; runs that share a model or a data set are not, and it is then too
    narrow.

    Args:
        values_f: float, any shape, the full-precision models' metric values.
        values_q: float, same shape, the quantized models'. Equal values are no improvement; a pair with a NaN does not
            count.
        better: which way the metric improves: ``"lower"`` for calibration errors.
        confidence: coverage of the interval, in (0, 1).

    Raises:
        VLMQError: the shapes differ, ``better`` is neither, or ``confidence`` is outside (0, 1).
    """
    if values_f.shape != values_q.shape:
        raise VLMQError(f"values must be paired, got {tuple(values_f.shape)} and {tuple(values_q.shape)}")
    if better not in ("higher", "lower"):
        raise unknown("direction", better, ["higher", "lower"])
    if not 0 < confidence < 1:
        raise VLMQError(f"confidence must lie in (0, 1), got {confidence}")
    compared = ~(values_f.isnan() | values_q.isnan())
    improved = (values_q > values_f) if better == "higher" else (values_q < values_f)
    k, n = int((improved & compared).sum()), int(compared.sum())
    if n == 0:
        return ShareImproved(np.nan, np.nan, np.nan, 0, 0)
    interval = binomtest(k, n).proportion_ci(confidence, method="wilson")
    return ShareImproved(k / n, float(interval.low), float(interval.high), k, n)
