"""Reliability diagrams as numbers: what each bin of confidence holds, of one model or followed from one to others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics.functional.calibration import checked_confidences, equal_width_bin_sums, equal_width_bins


@dataclass(frozen=True)
class ReliabilityBins:
    """A reliability diagram.

    Attributes:
        edges: float64 ``[n_bins + 1]``, bin edges on the confidence axis.
        count: float64 ``[..., n_bins]``, samples per bin.
        confidence: float64 ``[..., n_bins]``, mean confidence, NaN in an empty bin.
        accuracy: float64 ``[..., n_bins]``, share of correct samples, NaN in an empty bin.
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor


def reliability_bins(confidence: Tensor, correct: Tensor, n_bins: int = 15) -> ReliabilityBins:
    """Points of a reliability diagram over equal-width bins (DeGroot & Fienberg 1983).

    Args:
        confidence: float ``[..., n]`` in [0, 1]. Confidence exactly 1 belongs to the last bin here.
        correct: bool ``[..., n]``.
        n_bins: number of bins.

    Raises:
        VLMQError: as :func:`equal_width_bin_sums`.
    """
    sums = equal_width_bin_sums(confidence, correct, n_bins)
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64, device=confidence.device)

    def fold(values: Tensor) -> Tensor:
        return torch.cat([values[..., : n_bins - 1], values[..., n_bins - 1 :].sum(-1, keepdim=True)], -1)

    count = fold(sums.count)  # 0 / 0 is the NaN that marks an empty bin
    return ReliabilityBins(edges, count, fold(sums.confidence) / count, fold(sums.correct) / count)


@dataclass(frozen=True)
class TrajectoryBins:
    """A trajectory reliability diagram: the samples of each confidence bin of the first model, followed to the others.

    Attributes:
        edges: float64 ``[n_bins + 1]``, edges on the first model's confidence.
        count: float64 ``[n_bins]``, samples per bin; the same samples for every model.
        confidence: float64 ``[models, n_bins]``, their mean confidence under each model, NaN in an empty bin.
        accuracy: float64 ``[models, n_bins]``, the share of them each model gets right.
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor


def trajectory_bins(confidence: Tensor, correct: Tensor, n_bins: int = 15) -> TrajectoryBins:
    """Follow each of the first model's confidence bins to the other models, e.g. FP32, quantized, logit-scale-tuned.

    Args:
        confidence: float ``[models, n]`` in [0, 1], the same samples in the same order in every row.
        correct: bool ``[models, n]``.
        n_bins: number of equal-width bins of the first row's confidence; confidence 1 belongs to the last.

    Raises:
        VLMQError: the shapes are not ``[models, n]`` with at least one model, ``n_bins`` is below 1, or a confidence is
            outside [0, 1] or, in the first row, NaN.
    """
    confidence, correct = checked_confidences(confidence, correct, n_bins)
    if confidence.ndim != 2 or confidence.shape[0] == 0:
        raise VLMQError(f"trajectories need confidence [models, n], got {tuple(confidence.shape)}")
    if bool(confidence[0].isnan().any()):
        raise VLMQError("trajectories start from the first model's confidence, which has NaN: leave these samples out")
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64, device=confidence.device)
    bins = equal_width_bins(confidence[0], n_bins).clamp(max=n_bins - 1).expand(confidence.shape)
    zeros = torch.zeros(confidence.shape[0], n_bins, dtype=torch.float64, device=confidence.device)
    confidence = confidence.to(torch.float64)
    count = zeros.scatter_add(-1, bins, torch.ones_like(confidence))
    return TrajectoryBins(
        edges=edges,
        count=count[0],
        confidence=zeros.scatter_add(-1, bins, confidence) / count,
        accuracy=zeros.scatter_add(-1, bins, correct.to(torch.float64)) / count,
    )
