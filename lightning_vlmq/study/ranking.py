"""Bootstrap of out-of-distribution metrics: one sort a data set, then every resample is a cumulative sum of counts.

Resampling a score column and sorting it again, hundreds of times a data set and model, would make the report of a small
study take minutes. A resample only repeats samples, so the order stays and the counts change.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_vlmq.errors import VLMQError
from lightning_vlmq.metrics import bootstrap_indices

_CHUNK = 64  # resamples at a time: their cumulative sums then stay in the processor's cache

Counts = NDArray[np.float32]


class RankingMetrics(NamedTuple):
    """The metrics of :mod:`lightning_vlmq.metrics.functional.ood` on ``R`` resamples, each float64 ``[R]``."""

    auroc: NDArray[np.float64]
    aupr_in: NDArray[np.float64]
    aupr_out: NDArray[np.float64]
    fpr95: NDArray[np.float64]
    fpr95_openood: NDArray[np.float64]


def resample_counts(n: int, n_resamples: int, seed: int) -> Counts:
    """How often each of ``n`` samples is drawn in each bootstrap resample.

    Args:
        n: number of samples.
        n_resamples: number of resamples R.
        seed: the same seed and ``n`` give the same resamples.

    Returns:
        float32 ``[n, R]`` of whole numbers; each column sums to ``n``.
    """
    index = bootstrap_indices(n, n_resamples, torch.Generator().manual_seed(seed)).numpy()
    flat = (index * n_resamples + np.arange(n_resamples)[:, None]).ravel()
    return np.bincount(flat, minlength=n_resamples * n).reshape(n, n_resamples).astype(np.float32)


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
    return np.pad(np.cumsum(drawn, axis=0)[ends], ((1, 0), (0, 0)))


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
