"""Bootstrap replicates of metrics that sort or bin: one sort a data set, then every resample is a cumulative sum of counts.

Resampling a column and sorting it again, hundreds of times a data set and model, would take longer than the models. A
resample only repeats samples, so the order stays and the counts change.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics.functional import BinSums
from lightning_vlmq.statistics.bootstrap import bootstrap_indices, seeded_generator

_CHUNK = 64  # resamples at a time: their cumulative sums then stay in the processor's cache

Array = NDArray[np.float64]
Counts = NDArray[np.float32]


def resample_counts(n: int, n_resamples: int, seed: int, stream: int = 0) -> Counts:
    """How often each of ``n`` samples is drawn in each bootstrap resample.

    Args:
        n: number of samples.
        n_resamples: number of resamples R.
        seed: the same seed, stream and ``n`` give the same resamples.
        stream: tells apart sets that are resampled independently (ID and OOD, common and counter).

    Returns:
        float32 ``[n, R]`` of whole numbers; each column sums to ``n``.

    Raises:
        VLMQError: ``n`` is 0 or ``n_resamples`` is negative.
    """
    index = bootstrap_indices(n, n_resamples, seeded_generator(seed, stream)).numpy()
    flat = (index * n_resamples + np.arange(n_resamples)[:, None]).ravel()
    return np.bincount(flat, minlength=n_resamples * n).reshape(n, n_resamples).astype(np.float32)


class ConfidenceMetrics(NamedTuple):
    """Metrics of confidence and correctness on ``R`` resamples, each float64 ``[R]``."""

    ece: Array
    mce: Array
    adaptive_ece: Array
    aurc: Array
    coverage_at_risk: Array


def confidence_metrics(
    confidence: NDArray[np.floating], correct: NDArray[np.bool_], counts: Counts, n_bins: int, risk: float
) -> ConfidenceMetrics:
    """What resampling the samples and calling the functions of :mod:`~lightning_vlmq.metrics.functional` gives.

    Args:
        confidence: ``[n]`` in [0, 1]; float32 as recorded, so that one on an edge falls on the side the metrics put it.
        correct: ``[n]``.
        counts: ``[n, R]``, as from :func:`resample_counts`.
        n_bins: bins of the calibration errors.
        risk: error rate of ``coverage_at_risk``.

    Returns:
        Metrics by resample, all NaN where a confidence is NaN.

    Raises:
        VLMQError: there are no samples, or counts and samples do not fit.
    """
    n, n_resamples = len(confidence), counts.shape[1]
    if len(counts) != n or len(correct) != n or n == 0:
        raise VLMQError("metrics of confidence need samples, with one correctness and one count each")
    if np.isnan(confidence).any():
        return ConfidenceMetrics(*(np.full(n_resamples, np.nan) for _ in ConfidenceMetrics._fields))
    order = np.argsort(-confidence, kind="stable")
    confidence, correct = confidence[order], correct[order]
    ends = np.flatnonzero(np.r_[confidence[1:] != confidence[:-1], True])
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.from_numpy(confidence).dtype).numpy()
    # groups of equal confidence, the highest first, that the bins n_bins (exactly 1), n_bins - 1, ..., 0 end with
    bin_ends = np.searchsorted(-confidence[ends], -edges[::-1], side="right")
    harmonic = np.r_[0.0, np.cumsum(1.0 / np.arange(1, n + 1))]
    chunks: list[ConfidenceMetrics] = []
    for start in range(0, n_resamples, _CHUNK):
        drawn = counts[order, start : start + _CHUNK]
        kept, right = (_running_sum(part, ends) for part in (drawn, drawn * correct[:, None]))
        believed = _running_sum(drawn * confidence[:, None].astype(np.float64), ends)
        by_bin = BinSums(*(_between(part, bin_ends) for part in (kept, believed, right)))
        chunks.append(
            ConfidenceMetrics(
                ece=by_bin.calibration_error("l1").numpy(),
                mce=by_bin.calibration_error("max").numpy(),
                adaptive_ece=_equal_mass_error(kept, right - believed, n_bins),
                aurc=_area_under_risk(kept, kept - right, harmonic),
                coverage_at_risk=np.where(kept - right <= risk * kept.astype(np.float64) + 1e-9, kept, 0).max(0) / n,
            )
        )
    return ConfidenceMetrics(*(np.concatenate(part) for part in zip(*chunks)))


def _between(sums: NDArray[np.floating], ends: NDArray[np.intp]) -> torch.Tensor:
    """Differences of running sums ``[groups + 1, r]`` between the given groups: float64 ``[r, len(ends)]``."""
    return torch.from_numpy(np.diff(sums[ends].astype(np.float64), axis=0, prepend=0).T)


def _running_sum(drawn: NDArray[np.floating], ends: NDArray[np.intp]) -> NDArray[np.floating]:
    """Sums of ``[n, r]`` up to the end of each group of equal values, ``[groups + 1, r]`` from 0."""
    return np.pad(np.cumsum(drawn, axis=0)[ends], ((1, 0), (0, 0)))


def _equal_mass_error(kept: NDArray[np.floating], gap: Array, n_bins: int) -> Array:
    """Adaptive ECE: a cut inside a group of equal confidence divides its sums, as it does in ``equal_mass_bin_sums``."""
    n = int(kept[-1, 0])
    size, larger = divmod(n, n_bins)
    b = np.arange(n_bins + 1)
    cuts = n - (b * size + np.minimum(b, larger))  # the larger bins are those of low confidence, which come last here
    at_cuts = np.stack([np.interp(cuts, kept[:, r], gap[:, r]) for r in range(kept.shape[1])])
    return np.abs(np.diff(at_cuts, axis=1)).sum(1) / n


def _area_under_risk(kept: NDArray[np.floating], errors: NDArray[np.floating], harmonic: Array) -> Array:
    """Mean risk over all coverages; in a group of w samples with e errors, after K with E, the j-th has (E + j e / w) / (K + j)."""
    reach = np.diff(harmonic[kept.astype(np.intp)], axis=0)  # sum of 1 / (K + j)
    kept, errors = kept.astype(np.float64), errors.astype(np.float64)
    step, wrong = np.diff(kept, axis=0), np.diff(errors, axis=0)
    rate = wrong / np.maximum(step, 1)
    return (wrong + (errors[:-1] - rate * kept[:-1]) * reach).sum(0) / kept[-1]


class RankingMetrics(NamedTuple):
    """The metrics of :mod:`lightning_vlmq.metrics.functional.ood` on ``R`` resamples, each float64 ``[R]``."""

    auroc: Array
    aupr_in: Array
    aupr_out: Array
    fpr95: Array
    fpr95_openood: Array


def ranking_metrics(
    id_scores: NDArray[np.floating], ood_scores: NDArray[np.floating], id_counts: Counts, ood_counts: Counts
) -> RankingMetrics:
    """All ranking metrics on every resample: what resampling the scores and calling the metrics' functions gives.

    Args:
        id_scores: ``[n1]``, higher = more in-distribution.
        ood_scores: ``[n2]``.
        id_counts: ``[n1, R]``, as from :func:`resample_counts`.
        ood_counts: ``[n2, R]``.

    Returns:
        Metrics by resample to float32's precision, all NaN where a score is NaN.

    Raises:
        VLMQError: a side is empty, or counts and scores do not fit.
    """
    n_id, n_ood, n_resamples = len(id_scores), len(ood_scores), id_counts.shape[1]
    if len(id_counts) != n_id or len(ood_counts) != n_ood or ood_counts.shape[1] != n_resamples:
        raise VLMQError("ranking metrics need one count per score and resample, for ID and OOD alike")
    if n_id == 0 or n_ood == 0:
        raise VLMQError("ranking metrics need at least one ID and one OOD score")
    scores = np.concatenate([id_scores, ood_scores])
    if np.isnan(scores).any():
        return RankingMetrics(*(np.full(n_resamples, np.nan) for _ in RankingMetrics._fields))
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.r_[scores[order][1:] != scores[order][:-1], True])  # ties are one step of the curve
    chunks = []
    for start in range(0, n_resamples, _CHUNK):
        part = slice(start, start + _CHUNK)
        # Samples accepted as ID at each threshold, from the strictest (none) to the loosest (all).
        accepted_id = _accepted(id_counts[:, part], order, order < n_id, ends)
        accepted_ood = _accepted(ood_counts[:, part], order - n_id, order >= n_id, ends)
        rejected_id, rejected_ood = n_id - accepted_id[::-1], n_ood - accepted_ood[::-1]
        values = {
            "auroc": _area(accepted_id, accepted_ood),
            "aupr_in": _average_precision(accepted_id, accepted_ood),
            "aupr_out": _average_precision(rejected_ood, rejected_id),
            "fpr95": _false_positives_at_95(accepted_id, accepted_ood),
            "fpr95_openood": _false_positives_at_95(rejected_ood, rejected_id),
        }
        chunks.append(values)
    whole = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in RankingMetrics._fields}
    return RankingMetrics(**{name: values.astype(np.float64) for name, values in whole.items()})


def _accepted(counts: Counts, row: NDArray[np.intp], is_own: NDArray[np.bool_], ends: NDArray[np.intp]) -> Counts:
    drawn = np.zeros((len(row), counts.shape[1]), dtype=np.float32)
    drawn[is_own] = counts[row[is_own]]
    return _running_sum(drawn, ends)


def _area(hits: Counts, alarms: Counts) -> Counts:
    """Trapezoids under the ROC curve; counts ``[steps, R]`` grow from 0 to all."""
    return np.einsum("sr,sr->r", np.diff(alarms, axis=0), hits[1:] + hits[:-1]) / (2 * hits[-1] * alarms[-1])


def _average_precision(hits: Counts, alarms: Counts) -> Counts:
    """Precision summed over steps of recall."""
    precision = hits[1:] / np.maximum(hits[1:] + alarms[1:], 1)
    return np.einsum("sr,sr->r", np.diff(hits, axis=0), precision) / hits[-1]


def _false_positives_at_95(hits: Counts, alarms: Counts) -> Counts:
    """Share of alarms at the first step that has at least 95 % of the hits."""
    step = (hits * 100 >= 95 * hits[-1]).argmax(axis=0)
    return alarms[step, np.arange(alarms.shape[1])] / alarms[-1]
