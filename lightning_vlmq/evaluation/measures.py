"""What is measured on a study's samples: names, directions, conventions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_vlmq.metrics import score_name

N_BINS = 15
N_RESAMPLES = 1000
N_RESAMPLES_SLOW = 200
"""Resamples where each one costs a pass over the ranking: what sorts confidences, and the OOD metrics."""
RISK = 0.05
"""Error rate at which coverage is reported."""


@dataclass(frozen=True)
class Metric:
    """How a metric is written and read.

    Attributes:
        title: column heading.
        higher_is_better: direction.
        is_relative: whether its change is reported relative to full precision (else in points).
    """

    title: str
    higher_is_better: bool
    is_relative: bool = True


METRICS: Mapping[str, Metric] = {
    "top1": Metric("top-1", True),
    "top5": Metric("top-5", True),
    "agreement": Metric("agreement", True, is_relative=False),
    "ece": Metric("ECE", False),
    "adaptive_ece": Metric("adaptive ECE", False),
    "classwise_ece": Metric("class-wise ECE", False),
    "mce": Metric("MCE", False),
    "brier": Metric("Brier", False),
    "nll": Metric("NLL", False),
    "aurc": Metric("AURC", False),
    "coverage_at_risk_5": Metric("coverage at 5 % risk", True),
    "auroc": Metric("AUROC", True),
    "aupr_in": Metric("AUPR-in", True),
    "aupr_out": Metric("AUPR-out", True),
    "fpr95": Metric("FPR95", False),
    "fpr95_openood": Metric("FPR95 (OpenOOD)", False),
    "common": Metric("top-1 common", True),
    "counter": Metric("top-1 counter", True),
    "rsg": Metric("RSG", False, is_relative=False),
    "vuln_add": Metric("Vuln_add", False, is_relative=False),
}


@dataclass(frozen=True)
class Measure:
    """One number per run.

    Attributes:
        metric: key of :data:`METRICS`.
        role: the role of the data sets it is measured on.
        dataset: one data set, or empty for the mean over all of the role.
        score: OOD score, empty where none is involved.
    """

    metric: str
    role: str
    dataset: str = ""
    score: str = ""

    @property
    def info(self) -> Metric:
        """The metric's title and direction."""
        return METRICS[self.metric]

    @property
    def follows_logit_scale(self) -> bool:
        """Whether another logit scale can change the number: neither predictions nor scores of the cosines follow it."""
        of_predictions = self.metric in ("top1", "top5", "agreement", "common", "counter", "rsg", "vuln_add")
        return not of_predictions and score_name(self.score) not in ("mcm", "maxlogit", "gl_mcm", "knn", "mahalanobis")

    @property
    def worse_is_positive(self) -> bool:
        """Whether a positive effect is for the worse; delta = (A_f - A_q) / A_f is where a higher metric is better."""
        return self.info.higher_is_better == self.info.is_relative


@dataclass(frozen=True)
class Dimension:
    """A reliability dimension.

    Attributes:
        title: what the dimension is called.
        measure: the number that stands for it.
        effect: how its effect is written, with the unit.
        heading: the measure's name where there is little room.
    """

    title: str
    measure: Measure
    effect: str
    heading: str


def dimensions(score: str) -> list[Dimension]:
    """The reliability dimensions in display order; ``score`` is the OOD score that stands for detection."""
    return [
        Dimension("Accuracy", Measure("top1", "id"), "δ top-1, %", "top-1"),
        Dimension("Calibration", Measure("ece", "id"), "δ ECE, %", "ECE"),
        Dimension("Near-OOD detection", Measure("auroc", "near_ood", "", score), "δ AUROC, %", "AUROC near"),
        Dimension("Far-OOD detection", Measure("auroc", "far_ood", "", score), "δ AUROC, %", "AUROC far"),
        Dimension("Corruptions", Measure("top1", "corruption"), "δ top-1, %", "corrupted"),
        Dimension("Semantic shift", Measure("top1", "shift"), "δ top-1, %", "shifted"),
        Dimension("Spurious correlation", Measure("rsg", "spurious"), "ΔRSG, points", "RSG"),
    ]
