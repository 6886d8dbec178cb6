"""Ranking metrics over streams of any length: fixed state, sums over batches and processes, stated error.

Exact versions keep about five bytes per sample; these pay off beyond some millions of samples or many score columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics.functional import BinSums, confidence_and_correct
from lightning_vlmq.metrics.functional.binned import (
    DetectionCounts,
    SelectiveCounts,
    adaptive_ece_from_cells,
    confidence_cells,
    score_bins,
)
from lightning_vlmq.metrics.functional.selective import checked_risk
from lightning_vlmq.metrics.stateful.base import StreamedMetric


class BinnedDetection(StreamedMetric):
    """AUROC, AUPR-in, AUPR-out and FPR95 (both conventions) from two histograms of scores.

    ``compute`` returns float64 scalars under the keys ``auroc``, ``aupr_in``, ``aupr_out``, ``fpr95``,
    ``fpr95_openood``, and for each ``<key>_error_bound``: the exact value differs by at most that (see
    :class:`~.functional.binned.DetectionCounts`). For scores spread evenly over the range the AUROC's bound is
    1 / (2 n_bins); a range chosen badly shows as a large bound. NaN when a side is empty or a score was NaN.

    Args:
        low: lower end of the range of scores; lower scores count as ``low``.
        high: upper end; higher scores count as ``high``.
        n_bins: number of equal bins; the state is two int64 vectors of this length.
        kwargs: torchmetrics' own arguments.

    Raises:
        VLMQError: ``high`` is not above ``low``, or ``n_bins`` is below 1.
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    id_counts: Tensor
    ood_counts: Tensor
    undefined: Tensor

    def __init__(self, low: float = 0.0, high: float = 1.0, n_bins: int = 16_384, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not low < high or n_bins < 1:
            raise VLMQError(f"need low < high and n_bins >= 1, got low={low}, high={high}, n_bins={n_bins}")
        self.low, self.high, self.n_bins = low, high, n_bins
        self.add_state("id_counts", torch.zeros(n_bins, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("ood_counts", torch.zeros(n_bins, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("undefined", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, score: Tensor, is_id: Tensor) -> None:
        """Add a batch.

        Args:
            score: float ``[n]``, higher means more in-distribution.
            is_id: bool ``[n]``.

        Raises:
            VLMQError: the shapes differ.
        """
        if score.ndim != 1 or score.shape != is_id.shape:
            raise VLMQError(f"score and is_id must be [n], got {tuple(score.shape)} and {tuple(is_id.shape)}")
        defined = ~score.isnan()
        self.undefined += (~defined).sum()
        bins = score_bins(score.nan_to_num(self.low), self.low, self.high, self.n_bins)
        # added where they belong: a histogram of each batch would cost more than the batch
        self.id_counts.index_add_(0, bins, (defined & is_id).long())
        self.ood_counts.index_add_(0, bins, (defined & ~is_id).long())

    def compute(self) -> dict[str, Tensor]:
        """All metrics with their error bounds over all samples so far."""
        counts = DetectionCounts(self.id_counts, self.ood_counts)
        values = {}
        for name in ("auroc", "aupr_in", "aupr_out", "fpr95", "fpr95_openood"):
            bounded = getattr(counts, name)()
            values[name], values[f"{name}_error_bound"] = bounded.value, bounded.error_bound
        return {name: torch.where(self.undefined > 0, torch.nan, value) for name, value in values.items()}


class BinnedAdaptiveCalibrationError(StreamedMetric):
    """Adaptive ECE (equal-mass bins) from sums over a fine grid of confidences.

    ``compute`` returns float64 scalars ``adaptive_ece`` and ``adaptive_ece_error_bound`` (see
    :func:`~.functional.binned.adaptive_ece_from_cells`): for confidences spread evenly the bound is about
    n_bins / (2 cells). NaN without samples.

    Args:
        n_bins: number of equal-mass bins.
        cells: number of equal-width cells over [0, 1]; the state is three float64 vectors of this length plus one.
        kwargs: torchmetrics' own arguments.

    Raises:
        VLMQError: ``n_bins`` or ``cells`` is below 1.
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    cell_count: Tensor
    cell_confidence: Tensor
    cell_correct: Tensor

    def __init__(self, n_bins: int = 15, cells: int = 16_384, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if n_bins < 1 or cells < 1:
            raise VLMQError(f"n_bins and cells must be at least 1, got {n_bins} and {cells}")
        self.n_bins, self.cells = n_bins, cells
        for name in ("cell_count", "cell_confidence", "cell_correct"):
            self.add_state(name, torch.zeros(cells + 1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch: logits float ``[n, C]``, target int64 ``[n]`` (-1: left out). Raises as ``per_sample``."""
        confidence, correct = confidence_and_correct(logits, target)
        keep = target >= 0
        confidence, correct = confidence[keep].double(), correct[keep].double()
        cell = confidence_cells(confidence, self.cells)
        self.cell_count.index_add_(0, cell, torch.ones_like(confidence))
        self.cell_confidence.index_add_(0, cell, confidence)
        self.cell_correct.index_add_(0, cell, correct)

    def compute(self) -> dict[str, Tensor]:
        """The error and its bound over all samples so far."""
        cells = BinSums(self.cell_count, self.cell_confidence, self.cell_correct)
        bounded = adaptive_ece_from_cells(cells, self.n_bins)
        return {"adaptive_ece": bounded.value, "adaptive_ece_error_bound": bounded.error_bound}


class BinnedSelectivePrediction(StreamedMetric):
    """AURC and coverage at risk from counts over a fine grid of confidences.

    ``compute`` returns float64 scalars ``aurc``, ``coverage_at_risk``, and for each ``<key>_error_bound``: the value of
    :class:`~.selective.AURC` and :class:`~.selective.CoverageAtRisk`, which take confidences in float32 as this does,
    differs by at most that, whatever the order inside a cell (see :class:`~.functional.binned.SelectiveCounts`, with
    the derivation). ``coverage_at_risk`` is never above the exact one: a threshold at the edge of a cell keeps it.

    Bounds are small for confidences that spread over the cells, and large where a cell holds much of the data with hits
    and errors mixed; confidences of exactly 1 have a cell of their own and cost nothing. NaN without samples or with an
    undefined confidence.

    Args:
        risk: error rate of ``coverage_at_risk``, in [0, 1].
        cells: number of equal-width cells over [0, 1]; the state is two int64 vectors of this length plus one.
        kwargs: torchmetrics' own arguments.

    Raises:
        VLMQError: ``risk`` is outside [0, 1], or ``cells`` is below 1.
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    cell_count: Tensor
    cell_correct: Tensor
    undefined: Tensor

    def __init__(self, risk: float = 0.05, cells: int = 16_384, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if cells < 1:
            raise VLMQError(f"cells must be at least 1, got {cells}")
        self.risk, self.cells = checked_risk(risk), cells
        self.add_state("cell_count", torch.zeros(cells + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("cell_correct", torch.zeros(cells + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("undefined", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch: logits float ``[n, C]``, target int64 ``[n]`` (-1: left out). Raises as ``per_sample``."""
        confidence, correct = confidence_and_correct(logits, target)
        keep = target >= 0
        self.undefined += (keep & confidence.isnan()).sum()
        cell = confidence_cells(confidence.to(torch.float32), self.cells)  # float32, as what ranks all samples keeps it
        self.cell_count.index_add_(0, cell, keep.long())
        self.cell_correct.index_add_(0, cell, (keep & correct).long())

    def compute(self) -> dict[str, Tensor]:
        """Both metrics with their error bounds over all samples so far."""
        counts = SelectiveCounts(self.cell_count, self.cell_correct)
        values = {}
        for name, bounded in (("aurc", counts.aurc()), ("coverage_at_risk", counts.coverage_at_risk(self.risk))):
            values[name], values[f"{name}_error_bound"] = bounded.value, bounded.error_bound
        return {name: torch.where(self.undefined > 0, torch.nan, value) for name, value in values.items()}
