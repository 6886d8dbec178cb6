"""Calibration metrics that stream over batches of logits; samples without a class (target -1) are left out.

Equal-width errors, Brier and NLL keep sums only. :class:`AdaptiveCalibrationError` ranks all samples, so it keeps one
confidence and one bool per sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.metrics.functional import (
    BinSums,
    aurc,
    calibration_error,
    classwise_bin_sums,
    confidence_and_correct,
    coverage_at_risk,
    equal_width_bin_sums,
    per_sample,
)
from lightning_vlmq.metrics.functional.calibration import Norm
from lightning_vlmq.metrics.functional.selective import checked_risk
from lightning_vlmq.metrics.functional.temperature import checked_temperature, divided
from lightning_vlmq.metrics.stateful.base import StreamedMetric
from lightning_vlmq.metrics.stateful.records import ColumnMetric


def _labelled(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    confidence, correct = confidence_and_correct(logits, target)
    return confidence[target >= 0], correct[target >= 0]


class _MeanOfRecord(StreamedMetric):
    """Mean of one per-sample column over the labelled samples. float64 scalar, NaN without samples."""

    higher_is_better = False
    plot_lower_bound = 0.0
    _record: str
    sum: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sum", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: float ``[n, C]``, before the softmax.
            target: int64 ``[n]``, -1 where there is no class.

        Raises:
            VLMQError: as :func:`~.functional.per_sample`.
        """
        values, labelled = per_sample(logits, target, (self._record,))[self._record], target >= 0
        self.sum += torch.where(labelled, values, 0).sum(dtype=torch.float64)
        self.total += labelled.sum()

    def compute(self) -> Tensor:
        """The mean over all labelled samples so far; NaN if one of them had undefined logits."""
        return self.sum / self.total


class BrierScore(_MeanOfRecord):
    """Mean multi-class Brier score, sum form sum_c (p_c - 1[c = target])^2, in [0, 2] (Brier 1950)."""

    plot_upper_bound = 2.0
    _record = "brier"


class NegativeLogLikelihood(_MeanOfRecord):
    """Mean -log p(target) in nats."""

    _record = "nll"


class _BinnedCalibrationError(StreamedMetric):
    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    bin_count: Tensor
    bin_confidence: Tensor
    bin_correct: Tensor

    def _add_bins(self, *shape: int) -> None:
        for name in ("bin_count", "bin_confidence", "bin_correct"):
            self.add_state(name, torch.zeros(*shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, sums: BinSums) -> None:
        self.bin_count += sums.count
        self.bin_confidence += sums.confidence
        self.bin_correct += sums.correct

    def _sums(self) -> BinSums:
        return BinSums(self.bin_count, self.bin_confidence, self.bin_correct)


class CalibrationError(_BinnedCalibrationError):
    """Equal-width calibration error from bin sums: exact, in memory that does not grow with the samples.

    The same value as :class:`torchmetrics.classification.MulticlassCalibrationError` on softmax probabilities, which
    keeps every sample. ``compute`` returns a float64 scalar, NaN without samples.

    With a ``temperature`` it is the temperature-scaled error (Guo et al. 2017; the functional form is
    :func:`~.functional.temperature_scaled_ece`): what one scalar leaves of the miscalibration. It is an argument and no
    class of its own because all else is the same: ``CalibrationError(temperature=fit_temperature(logits, target))``,
    fitted on samples that this metric does not see.

    Args:
        n_bins: number of bins.
        norm: ``"l1"`` expected, ``"max"`` maximum, ``"l2"`` root mean square calibration error.
        temperature: divides the logits before the softmax; 1 leaves them as they are. A NaN, which
            :func:`~.functional.fit_temperature` returns for broken logits, makes the error NaN.
        kwargs: torchmetrics' own arguments.

    Raises:
        VLMQError: ``n_bins`` is below 1, ``norm`` is unknown, or the temperature is not positive.
    """

    def __init__(self, n_bins: int = 15, norm: Norm = "l1", temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if n_bins < 1:
            raise VLMQError(f"n_bins must be at least 1, got {n_bins}")
        if norm not in ("l1", "max", "l2"):
            raise unknown("norm", norm, ["l1", "max", "l2"])
        self.n_bins = n_bins
        self.norm: Norm = norm
        self.temperature = checked_temperature(temperature)
        self._add_bins(n_bins + 1)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch: logits float ``[n, C]``, target int64 ``[n]`` (-1: no class). Raises as ``per_sample``."""
        if self.temperature != 1:
            logits = divided(logits, self.temperature)
        self._add(equal_width_bin_sums(*_labelled(logits, target), self.n_bins))

    def compute(self) -> Tensor:
        """The error over all samples so far."""
        return self._sums().calibration_error(self.norm)


class MaximumCalibrationError(CalibrationError):
    """Largest gap between confidence and accuracy over equal-width bins (Naeini et al. 2015).

    Args:
        n_bins: number of bins.
        kwargs: ``temperature`` of :class:`CalibrationError`, and torchmetrics' own arguments.
    """

    def __init__(self, n_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(n_bins=n_bins, norm="max", **kwargs)


class ClasswiseCalibrationError(_BinnedCalibrationError):
    """Class-wise calibration error; see :func:`~.functional.classwise_ece`. State: 3 x C x (n_bins + 1) sums.

    Args:
        num_classes: C, the width of the logits.
        n_bins: number of equal-width bins per class.
        kwargs: torchmetrics' own arguments.

    Raises:
        VLMQError: ``num_classes`` or ``n_bins`` is below 1.
    """

    def __init__(self, num_classes: int, n_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1 or n_bins < 1:
            raise VLMQError(f"num_classes and n_bins must be at least 1, got {num_classes} and {n_bins}")
        self.num_classes = num_classes
        self.n_bins = n_bins
        self._add_bins(num_classes, n_bins + 1)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: float ``[n, C]``.
            target: int64 ``[n]``, -1 where there is no class.

        Raises:
            VLMQError: C is not ``num_classes``, or a target is outside [-1, C).
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise VLMQError(f"logits must be [n, {self.num_classes}], got {tuple(logits.shape)}")
        keep = target >= 0
        logits = logits[keep]
        probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        self._add(classwise_bin_sums(probs, target[keep], self.n_bins))

    def compute(self) -> Tensor:
        """The mean over classes of the classes' errors. float64 scalar."""
        return self._sums().calibration_error("l1").mean()


class ConfidenceMetric(ColumnMetric):
    """Base of metrics that rank all samples by softmax confidence: the columns ``confidence`` and ``correct``.

    Args:
        kwargs: torchmetrics' own arguments.
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__({"confidence": torch.float32, "correct": torch.bool}, **kwargs)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch: logits float ``[n, C]``, target int64 ``[n]`` (-1: no class). Raises as ``per_sample``."""
        confidence, correct = _labelled(logits, target)
        self.append(confidence=confidence, correct=correct)


class AdaptiveCalibrationError(ConfidenceMetric):
    """Calibration error over equal-mass bins (Nixon et al. 2019); see :func:`~.functional.calibration_error`.

    Args:
        n_bins: number of bins.
        norm: how the bins' gaps are reduced.
        kwargs: torchmetrics' own arguments.

    Raises:
        VLMQError: ``n_bins`` is below 1 or ``norm`` is unknown.
    """

    def __init__(self, n_bins: int = 15, norm: Norm = "l1", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if n_bins < 1:
            raise VLMQError(f"n_bins must be at least 1, got {n_bins}")
        if norm not in ("l1", "max", "l2"):
            raise unknown("norm", norm, ["l1", "max", "l2"])
        self.n_bins = n_bins
        self.norm: Norm = norm

    def compute(self) -> Tensor:
        """The error over all samples so far. float64 scalar, NaN without samples."""
        return calibration_error(self.column("confidence"), self.column("correct"), self.n_bins, self.norm, "mass")


class AURC(ConfidenceMetric):
    """Area under the risk-coverage curve of the softmax confidence; see :func:`~.functional.aurc`. Lower is better."""

    def compute(self) -> Tensor:
        """The area over all samples so far. float64 scalar, NaN without samples or with an undefined confidence."""
        return aurc(self.column("confidence"), self.column("correct"))


class CoverageAtRisk(ConfidenceMetric):
    """Largest share of samples that a threshold on the softmax confidence keeps at a risk of at most ``risk``.

    See :func:`~.functional.coverage_at_risk` (Geifman & El-Yaniv 2017). Higher is better.

    Args:
        risk: error rate to stay at or below, in [0, 1].
        kwargs: torchmetrics' own arguments.

    Raises:
        VLMQError: ``risk`` is outside [0, 1].
    """

    higher_is_better = True

    def __init__(self, risk: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.risk = checked_risk(risk)

    def compute(self) -> Tensor:
        """The coverage over all samples so far.

        float64 scalar in [0, 1]; 0 where no threshold reaches the risk, NaN without samples or with an undefined
        confidence.
        """
        return coverage_at_risk(self.column("confidence"), self.column("correct"), self.risk)
