"""Does confidence mean what it says: calibration errors over binned confidences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.metrics.functional.ties import tie_group_means

Norm = Literal["l1", "max", "l2"]
Binning = Literal["width", "mass"]


@dataclass(frozen=True)
class BinSums:
    """Sufficient statistics of a binned calibration error; they add up over batches and processes.

    Attributes:
        count: float64 ``[..., bins]``, samples in the bin.
        confidence: float64 ``[..., bins]``, sum of their confidences.
        correct: float64 ``[..., bins]``, sum of their correctness.
    """

    count: Tensor
    confidence: Tensor
    correct: Tensor

    def calibration_error(self, norm: Norm = "l1") -> Tensor:
        """Reduce the bins; see :func:`calibration_error`. float64 ``[...]``, NaN without any sample."""
        gap = (self.correct - self.confidence).abs()
        total = self.count.sum(-1)
        per_bin = torch.where(self.count > 0, gap / self.count, 0.0)
        if norm == "l1":
            value = gap.sum(-1) / total
        elif norm == "max":
            value = per_bin.amax(-1)
        elif norm == "l2":
            value = ((per_bin.square() * self.count).sum(-1) / total).sqrt()
        else:
            raise unknown("norm", norm, ["l1", "max", "l2"])
        return torch.where(total > 0, value, torch.nan)


def checked_confidences(confidence: Tensor, correct: Tensor, n_bins: int) -> tuple[Tensor, Tensor]:
    """Confidences, at least float32, and correctness, both ``[..., n]``.

    Raises:
        VLMQError: shapes differ, ``n_bins`` is below 1, or a confidence is outside [0, 1].
    """
    if n_bins < 1:
        raise VLMQError(f"n_bins must be at least 1, got {n_bins}")
    if confidence.shape != correct.shape or confidence.ndim == 0:
        raise VLMQError(
            f"confidence and correct must share a shape [..., n], got {tuple(confidence.shape)}"
            f" and {tuple(correct.shape)}"
        )
    confidence = confidence.to(torch.promote_types(confidence.dtype, torch.float32))
    if bool(((confidence < 0) | (confidence > 1)).any()):
        raise VLMQError("confidences must lie in [0, 1]: hand probabilities, not logits")
    return confidence, correct


def equal_width_bins(confidence: Tensor, n_bins: int) -> Tensor:
    """The bin of each confidence: ``n_bins`` equal ones [lo, hi), and one more for those of exactly 1 (and NaN).

    Edges are computed in the confidence's own dtype, as torchmetrics does, so that a value on an edge falls on the same side.

    Args:
        confidence: float32 or float64 ``[...]`` in [0, 1].
        n_bins: number of bins.

    Returns:
        int64 ``[...]`` in [0, n_bins].
    """
    edges = torch.linspace(0, 1, n_bins + 1, dtype=confidence.dtype, device=confidence.device)
    return (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=n_bins)


def equal_width_bin_sums(confidence: Tensor, correct: Tensor, n_bins: int = 15) -> BinSums:
    """Sum samples into ``n_bins`` equal-width bins [lo, hi), and those of confidence exactly 1 into one more.

    The extra bin is torchmetrics' convention, kept so that the errors are equal to
    :class:`torchmetrics.classification.MulticlassCalibrationError`'s.

    Args:
        confidence: float ``[..., n]`` in [0, 1].
        correct: bool or float ``[..., n]``.
        n_bins: number of bins.

    Returns:
        Sums of shape ``[..., n_bins + 1]``. A NaN confidence makes the last bin's sum NaN.

    Raises:
        VLMQError: shapes differ, ``n_bins`` is below 1, or a confidence is outside [0, 1].
    """
    confidence, correct = checked_confidences(confidence, correct, n_bins)
    bins = equal_width_bins(confidence, n_bins)
    zeros = torch.zeros(*confidence.shape[:-1], n_bins + 1, dtype=torch.float64, device=confidence.device)
    confidence = confidence.to(torch.float64)
    return BinSums(
        count=zeros.scatter_add(-1, bins, torch.ones_like(confidence)),
        confidence=zeros.scatter_add(-1, bins, confidence),
        correct=zeros.scatter_add(-1, bins, correct.to(torch.float64)),
    )


def equal_mass_bin_sums(confidence: Tensor, correct: Tensor, n_bins: int = 15) -> BinSums:
    """Sort by confidence and sum consecutive samples into ``n_bins`` bins of equal size.

    Sizes differ by at most one sample, the larger bins first (as :func:`torch.tensor_split` cuts). Samples of equal
    confidence that a cut would divide share their mean correctness, so the result does not depend on sample order.

    Args:
        confidence: float ``[..., n]`` in [0, 1].
        correct: bool or float ``[..., n]``.
        n_bins: number of bins; with fewer samples than bins the last bins stay empty.

    Returns:
        Sums of shape ``[..., n_bins]``.

    Raises:
        VLMQError: as :func:`equal_width_bin_sums`.
    """
    confidence, correct = checked_confidences(confidence, correct, n_bins)
    n = confidence.shape[-1]
    confidence, order = confidence.sort(-1)
    correct = tie_group_means(confidence, correct.gather(-1, order))
    confidence = confidence.to(torch.float64)
    bins = _mass_bin_of_rank(n, n_bins, confidence.device).expand(confidence.shape)
    zeros = torch.zeros(*confidence.shape[:-1], n_bins, dtype=torch.float64, device=confidence.device)
    return BinSums(
        count=zeros.scatter_add(-1, bins, torch.ones_like(confidence)),
        confidence=zeros.scatter_add(-1, bins, confidence),
        correct=zeros.scatter_add(-1, bins, correct),
    )


def _mass_bin_of_rank(n: int, n_bins: int, device: torch.device) -> Tensor:
    size, larger = divmod(n, n_bins)
    position = torch.arange(n, device=device)
    return torch.where(
        position < larger * (size + 1),
        position // (size + 1),
        larger + (position - larger * (size + 1)).div(max(size, 1), rounding_mode="floor"),
    )


def bin_gaps(confidence: Tensor, correct: Tensor, n_bins: int = 15, binning: Binning = "width") -> Tensor:
    """What each sample adds to its bin's gap: the calibration error is the sum over bins of the absolute mean over samples.

    Args:
        confidence: float ``[n]`` in [0, 1].
        correct: bool ``[n]``.
        n_bins: number of bins.
        binning: as :func:`calibration_error`. Of samples of equal confidence that a cut divides, each has the mean correctness.

    Returns:
        float64 ``[n, n_bins + 1]`` (``"mass"``: ``[n, n_bins]``), correct - confidence in the sample's bin and 0 in the others.

    Raises:
        VLMQError: as :func:`calibration_error`, or more dimensions than one.
    """
    confidence, correct = checked_confidences(confidence, correct, n_bins)
    if confidence.ndim != 1:
        raise VLMQError(f"gaps are of samples [n], got {tuple(confidence.shape)}")
    if binning == "width":
        bins, right = equal_width_bins(confidence, n_bins), correct.to(torch.float64)
    elif binning == "mass":
        ordered, order = confidence.sort()
        back = order.argsort()
        bins = _mass_bin_of_rank(len(confidence), n_bins, confidence.device)[back]
        right = tie_group_means(ordered, correct[order])[back]
    else:
        raise unknown("binning", binning, ["width", "mass"])
    gaps = torch.zeros(len(confidence), n_bins + (binning == "width"), dtype=torch.float64, device=confidence.device)
    return gaps.scatter_(1, bins.unsqueeze(1), (right - confidence.to(torch.float64)).unsqueeze(1))


def calibration_error(
    confidence: Tensor, correct: Tensor, n_bins: int = 15, norm: Norm = "l1", binning: Binning = "width"
) -> Tensor:
    """Distance between confidence and accuracy over bins of confidence.

    ``norm="l1"`` with equal-width bins is the expected calibration error (Naeini et al. 2015; Guo et al. 2017) and
    equals torchmetrics' value; with ``binning="mass"`` it is the adaptive ECE (Nguyen & O'Connor 2015; Nixon et al.
    2019). ``norm="max"`` is the maximum calibration error, ``"l2"`` the root mean square one.

    Args:
        confidence: float ``[..., n]`` in [0, 1].
        correct: bool ``[..., n]``.
        n_bins: number of bins.
        norm: how the bins' gaps are reduced.
        binning: ``"width"`` (see :func:`equal_width_bin_sums`) or ``"mass"`` (:func:`equal_mass_bin_sums`).

    Returns:
        float64 ``[...]`` in [0, 1]; NaN where ``n`` is 0 or a confidence is NaN.

    Raises:
        VLMQError: shapes differ, ``n_bins`` is below 1, a confidence is outside [0, 1], or a name is unknown.
    """
    if binning == "width":
        return equal_width_bin_sums(confidence, correct, n_bins).calibration_error(norm)
    if binning == "mass":
        return equal_mass_bin_sums(confidence, correct, n_bins).calibration_error(norm)
    raise unknown("binning", binning, ["width", "mass"])


def signed_calibration_error(confidence: Tensor, correct: Tensor) -> Tensor:
    """Mean confidence minus accuracy: sum_b (n_b / n) (conf_b - acc_b), whatever the bins. Negative is underconfident.

    Args:
        confidence: float ``[..., n]`` in [0, 1].
        correct: bool ``[..., n]``.

    Returns:
        float64 ``[...]`` in [-1, 1]; NaN where ``n`` is 0 or a confidence is NaN.
    """
    return (confidence.to(torch.float64) - correct.to(torch.float64)).mean(-1)


def classwise_bin_sums(probs: Tensor, target: Tensor, n_bins: int = 15) -> BinSums:
    """Bin every class's probability against "is this the class": sums of shape ``[..., C, n_bins + 1]``.

    Args:
        probs: float ``[..., n, C]`` in [0, 1].
        target: int64 ``[..., n]`` in [0, C).
        n_bins: number of equal-width bins per class.

    Raises:
        VLMQError: shapes do not fit, a target is outside [0, C), or a probability is outside [0, 1].
    """
    if probs.ndim < 2 or target.shape != probs.shape[:-1]:
        raise VLMQError(
            f"probs must be [..., n, C] and target [..., n], got {tuple(probs.shape)} and {tuple(target.shape)}"
        )
    n_classes = probs.shape[-1]
    if target.numel() and (int(target.min()) < 0 or int(target.max()) >= n_classes):
        raise VLMQError(f"class-wise calibration needs targets in [0, {n_classes}); drop samples without a class")
    is_class = target.unsqueeze(-2) == torch.arange(n_classes, device=target.device).unsqueeze(-1)
    return equal_width_bin_sums(probs.transpose(-1, -2).contiguous(), is_class, n_bins)


def classwise_ece(probs: Tensor, target: Tensor, n_bins: int = 15) -> Tensor:
    """Class-wise (static) calibration error: the mean over classes of each class's ECE (Nixon et al. 2019, Kull 2019).

    Args:
        probs: float ``[..., n, C]``, softmax probabilities.
        target: int64 ``[..., n]`` in [0, C).
        n_bins: number of equal-width bins per class.

    Returns:
        float64 ``[...]``; NaN where ``n`` is 0 or a probability is NaN.

    Raises:
        VLMQError: as :func:`classwise_bin_sums`.
    """
    return classwise_bin_sums(probs, target, n_bins).calibration_error("l1").mean(-1)
