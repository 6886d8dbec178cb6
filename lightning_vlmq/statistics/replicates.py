"""Bootstrap replicates of metrics that sort: one sort a data set, then every resample is a cumulative sum of counts.

Resampling a column and sorting it again, hundreds of times a data set and model, would take longer than the models. A
resample only repeats samples, so the order stays and the counts change.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.statistics.resamples import bootstrap_indices, seeded_generator

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
    generator = seeded_generator(seed, stream)
    counts = np.empty((n, n_resamples), dtype=np.float32)
    step = max(1, 2**22 // max(n, 1))  # some at a time: indices take eight times the memory of counts
    for start in range(0, n_resamples, step) if n_resamples > 0 else (0,):
        index = bootstrap_indices(n, min(step, n_resamples - start), generator).numpy()
        flat = (index + n * np.arange(len(index))[:, None]).ravel()
        counts[:, start : start + len(index)] = np.bincount(flat, minlength=n * len(index)).reshape(-1, n).T
    return counts


class SelectiveMetrics(NamedTuple):
    """Metrics of the confidences' order on ``R`` resamples, each float64 ``[R]``."""

    aurc: Array
    augrc: Array
    coverage_at_risk: Array


def selective_metrics(
    confidence: NDArray[np.floating], correct: NDArray[np.bool_], counts: Counts, risk: float
) -> SelectiveMetrics:
    """What resampling the samples and calling the functions of :mod:`~lightning_vlmq.metrics.functional` gives.

    Args:
        confidence: ``[n]``.
        correct: ``[n]``.
        counts: ``[n, R]``, as from :func:`resample_counts`.
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
        return SelectiveMetrics(*(np.full(n_resamples, np.nan) for _ in SelectiveMetrics._fields))
    order = np.argsort(-confidence, kind="stable")
    confidence, correct = confidence[order], correct[order]
    ends = np.flatnonzero(np.r_[confidence[1:] != confidence[:-1], True])
    harmonic = np.r_[0.0, np.cumsum(1.0 / np.arange(1, n + 1))]
    chunks: list[SelectiveMetrics] = []
    for start in range(0, n_resamples, _CHUNK):
        drawn = counts[order, start : start + _CHUNK]
        kept, right = (_running_sum(part, ends) for part in (drawn, drawn * correct[:, None]))
        errors = kept - right
        chunks.append(
            SelectiveMetrics(
                aurc=_area_under_risk(kept, errors, harmonic),
                augrc=_area_under_joint_risk(kept.astype(np.float64), errors.astype(np.float64)),
                coverage_at_risk=np.where(errors <= risk * kept.astype(np.float64) + 1e-9, kept, 0).max(0) / n,
            )
        )
    return SelectiveMetrics(*(np.concatenate(part) for part in zip(*chunks)))


def _running_sum(drawn: NDArray[np.floating], ends: NDArray[np.intp]) -> NDArray[np.floating]:
    """Sums of ``[n, r]`` up to the end of each group of equal values, ``[groups + 1, r]`` from 0."""
    return np.pad(np.cumsum(drawn, axis=0)[ends], ((1, 0), (0, 0)))


def _area_under_risk(kept: NDArray[np.floating], errors: NDArray[np.floating], harmonic: Array) -> Array:
    """Mean risk over all coverages; in a group of w samples with e errors, after K with E, the j-th has (E + j e / w) / (K + j)."""
    reach = np.diff(harmonic[kept.astype(np.intp)], axis=0)  # sum of 1 / (K + j)
    kept, errors = kept.astype(np.float64), errors.astype(np.float64)
    step, wrong = np.diff(kept, axis=0), np.diff(errors, axis=0)
    rate = wrong / np.maximum(step, 1)
    return (wrong + (errors[:-1] - rate * kept[:-1]) * reach).sum(0) / kept[-1]


def _area_under_joint_risk(kept: Array, errors: Array) -> Array:
    """Mean over k of errors / n: of w equal samples with e errors, after E, the j-th has E + j e / w: in sum w E + e (w + 1) / 2."""
    step, wrong = np.diff(kept, axis=0), np.diff(errors, axis=0)
    return (step * errors[:-1] + wrong * (step + 1) / 2).sum(0) / kept[-1] ** 2


class RankingMetrics(NamedTuple):
    """Metrics of :mod:`lightning_vlmq.metrics.functional.ood` on ``R`` resamples, each float64 ``[R]``.

    The AUROC is not among them: its components (``placements``) are resampled as means.
    """

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


def _average_precision(hits: Counts, alarms: Counts) -> Counts:
    """Precision summed over steps of recall."""
    precision = hits[1:] / np.maximum(hits[1:] + alarms[1:], 1)
    return np.einsum("sr,sr->r", np.diff(hits, axis=0), precision) / hits[-1]


def _false_positives_at_95(hits: Counts, alarms: Counts) -> Counts:
    """Share of alarms at the first step that has at least 95 % of the hits."""
    step = (hits * 100 >= 95 * hits[-1]).argmax(axis=0)
    return alarms[step, np.arange(alarms.shape[1])] / alarms[-1]
