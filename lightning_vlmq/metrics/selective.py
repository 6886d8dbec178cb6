"""Selective prediction: metrics of what is left when the least confident samples are left out.

Both rank all samples, so they keep one confidence and one bool per sample; samples without a class (target -1) are left
out. :class:`~.bounded.BinnedSelectivePrediction` bounds the memory.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_vlmq.metrics.calibration import ConfidenceMetric
from lightning_vlmq.metrics.functional import aurc, coverage_at_risk
from lightning_vlmq.metrics.functional.selective import checked_risk


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
