"""Results as rows: a value, its standard error, and both again for its change against full precision.

A measured quantity is a float64 tensor ``[1 + R]`` here: its value on the samples as they are, then on each of R bootstrap
resamples. What is computed from several quantities (a gap, a relative change) is computed on all entries alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_vlmq import metrics
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.metrics.functional import calibration_error, coverage_at_risk
from lightning_vlmq.statistics.replicates import Counts, confidence_metrics, ranking_metrics, resample_counts

Records = Mapping[str, Mapping[str, Tensor]]
"""Columns of :class:`~lightning_vlmq.metrics.SampleRecords`, each ``[n]``, by data set."""


@dataclass(frozen=True)
class Row:
    """One result: a metric of one model on one data set, with its standard error and number of samples."""

    dataset: str
    role: str
    metric: str
    value: float
    stderr: float
    n: int
    corruption: str = ""
    severity: int = 0
    score: str = ""


class Evaluator(Protocol):
    """Turns records into rows; ``reference`` is ``None`` when the model under test is itself full precision."""

    def rows(self, sets: Sequence[EvalSet], records: Records, reference: Records | None) -> list[Row]:
        """Evaluate every set that this evaluator is about."""
        ...


class Resampled:
    """Quantities with their bootstrap replicates; all models, and all sets of the same size, see the same resamples.

    Standard errors are bootstrap standard deviations (Efron & Tibshirani 1993, chapter 6).

    Args:
        n_resamples: number of bootstrap resamples R.
        seed: seed of the resamples.
    """

    def __init__(self, n_resamples: int, seed: int = 0) -> None:
        if n_resamples < 2:
            raise VLMQError(f"n_resamples must be at least 2, got {n_resamples}")
        self.n_resamples = n_resamples
        self.seed = seed
        self._drawn: dict[tuple[int, int], Counts] = {}

    def _counts(self, n: int, stream: int) -> Counts:
        if (n, stream) not in self._drawn:
            self._drawn[n, stream] = resample_counts(n, self.n_resamples, self.seed, stream)
        return self._drawn[n, stream]

    def means(self, columns: Mapping[str, Tensor], stream: int = 0) -> dict[str, Tensor]:
        """Means of columns ``[n]``; sets that are resampled independently have different streams."""
        values = torch.stack([column.double() for column in columns.values()], 1)
        weights = torch.from_numpy(self._counts(len(values), stream)).T.double()
        drawn = torch.cat([values.mean(0, keepdim=True), weights @ values / len(values)])
        return dict(zip(columns, drawn.unbind(1)))

    def confidences(self, confidence: Tensor, correct: Tensor, n_bins: int, risk: float) -> dict[str, Tensor]:
        """The metrics of :class:`~lightning_vlmq.statistics.ConfidenceMetrics` of columns ``[n]``."""
        error = partial(calibration_error, confidence, correct, n_bins)
        values = {"ece": error(), "mce": error(norm="max"), "adaptive_ece": error(binning="mass")}
        values |= {"aurc": metrics.aurc(confidence, correct)}
        values |= {"coverage_at_risk": coverage_at_risk(confidence, correct, risk)}
        counts = self._counts(len(confidence), 0)
        drawn = confidence_metrics(confidence.numpy(), correct.numpy(), counts, n_bins, risk)
        return {name: _joined(value, getattr(drawn, name)) for name, value in values.items()}

    def rankings(self, id_scores: Tensor, ood_scores: Tensor) -> dict[str, Tensor]:
        """The metrics of :class:`~lightning_vlmq.statistics.RankingMetrics` of ``[n1]`` and ``[n2]`` scores."""
        counts = self._counts(len(id_scores), 0), self._counts(len(ood_scores), 1)
        drawn = ranking_metrics(id_scores.numpy(), ood_scores.numpy(), *counts)
        return {
            name: _joined(getattr(metrics, name)(id_scores, ood_scores), getattr(drawn, name)) for name in drawn._fields
        }


def quantity_rows(
    make: Callable[..., Row],
    metric: str,
    mine: Tensor,
    theirs: Tensor | None = None,
    change: tuple[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
    spread: Callable[[Tensor], float] | None = None,
) -> list[Row]:
    """A quantity's row, and the row of its change where there is a reference.

    Args:
        make: builds a row from ``metric``, ``value`` and ``stderr``.
        metric: the metric's name.
        mine: the model's quantity, ``[1 + R]``.
        theirs: the reference's, or ``None``.
        change: name and formula ``(theirs, mine)`` of the change; ``delta_<metric>``, the relative change, if not given.
        spread: the standard error that the entries after the first give; :func:`deviation` of bootstrap replicates if not given.
    """
    rows = [make(metric=metric, value=float(mine[0]), stderr=(spread or deviation)(mine[1:]))]
    if theirs is not None:
        name, formula = change or (f"delta_{metric}", metrics.relative_change)
        rows += quantity_rows(make, name, formula(theirs, mine), spread=spread)
    return rows


def row_maker(s: EvalSet, n: int, **fixed: Any) -> Callable[..., Row]:
    """A function that makes rows of a data set with ``n`` samples."""
    return partial(Row, dataset=s.name, role=s.role, corruption=s.corruption, severity=s.severity, n=n, **fixed)


def deviation(replicates: Tensor) -> float:
    """Standard deviation of the replicates that are defined; NaN for fewer than two."""
    defined = replicates[~replicates.isnan()]
    return float(defined.std(correction=1)) if defined.numel() > 1 else torch.nan


def jackknife(left_out: Tensor) -> float:
    """As :func:`deviation`, of values without each group of samples."""
    return float(metrics.jackknife_standard_error(left_out))


def _joined(value: Tensor, replicates: Any) -> Tensor:
    return torch.cat([value.double().reshape(1), torch.from_numpy(replicates)])
