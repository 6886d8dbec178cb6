"""Every metric once: how it is called, read and computed. A new one is one registration here (or anywhere)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_vlmq.core.registry import Registry
from lightning_vlmq.evaluation.quantities import Ranked, RunRecords, SampleMean
from lightning_vlmq.metrics.functional import (
    augrc,
    aurc,
    bias_doubt,
    bin_gaps,
    calibration_error,
    coverage_at_risk,
    debiased_error,
    gap_variances,
)
from lightning_vlmq.metrics.scores import OOD_SCORES, score_name


@dataclass(frozen=True)
class Metric:
    """How a metric is written, read, tested and computed.

    Attributes:
        title: column heading.
        higher_is_better: direction.
        of: how it is computed from the records of a labelled set; ``None`` where an evaluator of its own does that.
        is_relative: whether its change is reported relative to full precision, (A_f - A_q) / A_f (else as a difference, q - f).
        is_tested: whether its change has an interval and a p-value. A metric whose interval does not hold says no here.
        tested_by: the metric whose change stands for this one's wherever an interval or a test is asked for.
        follows_logit_scale: whether another logit scale can change it.
        needs_reference: whether it compares with full precision already: it has no change of its own, and no row without a reference.
        is_shown: whether the report's tables have a column for it.
        in_percent: whether it is a fraction that is written in percent.
        best_at_zero: whether it has a sign, and is better the nearer it is to zero.
        is_share: whether it counts samples (or pairs of them): no resample differs where they are all alike, and its standard error is
            then that of one sample, not 0; see :func:`~.estimates.standard_error`.
        convention: where peers differ, which one it follows; said in the report and in ``comparisons.csv``.
    """

    title: str
    higher_is_better: bool
    of: SampleMean | Ranked | None = None
    is_relative: bool = True
    is_tested: bool = True
    tested_by: str = ""
    follows_logit_scale: bool = True
    needs_reference: bool = False
    is_shown: bool = True
    in_percent: bool = True
    best_at_zero: bool = False
    is_share: bool = False
    convention: str = ""

    @property
    def direction(self) -> str:
        """Which way is better, in words."""
        if self.best_at_zero:
            return "best at zero"
        return f"{'higher' if self.higher_is_better else 'lower'} is better"

    def gain(self, before: float, after: float) -> float:
        """By how much it got better, in its own unit; negative for the worse."""
        if self.best_at_zero:
            return abs(before) - abs(after)
        return after - before if self.higher_is_better else before - after


METRICS: Registry[Metric] = Registry("metric")
"""Every metric by name, in display order."""


def _column(name: str) -> SampleMean:
    def of(records: RunRecords) -> Tensor:
        return records[name]

    return SampleMean(of)


def _add(name: str, *arguments: object, **fields: object) -> None:
    METRICS.register(name)(Metric(*arguments, **fields))  # type: ignore[arg-type]


def _of_predictions(name: str, title: str, higher: bool, function: Callable[[RunRecords], Tensor], shown: bool) -> None:
    """A share of samples by what became of full precision's prediction."""
    flags = {
        "is_relative": False,
        "is_tested": False,
        "follows_logit_scale": False,
        "needs_reference": True,
        "is_share": True,
    }
    _add(name, title, higher, SampleMean(function), is_shown=shown, **flags)


def _agrees(r: RunRecords) -> Tensor:
    return (r["prediction"] == r.reference["prediction"]) & (r["prediction"] >= 0)


def _width(r: RunRecords) -> Tensor:
    return bin_gaps(r["confidence"], r["correct"], r.settings.n_bins)


def _mass(r: RunRecords) -> Tensor:
    return bin_gaps(r["confidence"], r["correct"], r.settings.n_bins, "mass")


def _sum_of_gaps(means: Tensor, columns: Tensor) -> Tensor:
    return means.abs().sum(-1)


def _debiased_sum(means: Tensor, columns: Tensor) -> Tensor:
    variances, centre = gap_variances(columns), columns.mean(0)
    drawn = (columns.square().mean(0) - centre.square()) / len(
        columns
    )  # what resampling gives: too little in bins of few samples
    stretch = (variances / drawn.where(drawn > 0, variances)).nan_to_num(1.0).sqrt()
    return debiased_error(centre + stretch * (means - centre), variances)


def _debiased_doubt(before: Tensor, after: Tensor) -> float:
    return float(bias_doubt(before.mean(0), gap_variances(before), after.mean(0), gap_variances(after)))


_BINS = "equal-width bins [lo, hi), a confidence of exactly 1 in one of its own, as torchmetrics"
_DEBIASED = {"is_relative": False, "is_shown": False, "convention": "debiased, for tests; see functional.debiased"}

_add("top1", "top-1", True, _column("correct"), follows_logit_scale=False, is_share=True)
_add("top5", "top-5", True, _column("correct_top5"), follows_logit_scale=False, is_share=True)
_of_predictions("agreement", "agreement", True, _agrees, shown=True)
_of_predictions("flips", "flips", False, lambda r: ~_agrees(r), shown=False)
_of_predictions(
    "flips_broken", "flips right → wrong", False, lambda r: r.reference["correct"] & ~r["correct"], shown=False
)
_of_predictions(
    "flips_repaired", "flips wrong → right", True, lambda r: r["correct"] & ~r.reference["correct"], shown=False
)
_add(
    "kl",
    "KL",
    False,
    _column("kl"),
    is_relative=False,
    is_tested=False,
    needs_reference=True,
    in_percent=False,
    convention="nats, of full precision's class probabilities from this model's",
)
_add("ece", "ECE", False, SampleMean(_width, _sum_of_gaps), tested_by="ece_debiased", convention=_BINS)
_add("ece_debiased", "ECE, debiased", False, SampleMean(_width, _debiased_sum, _debiased_doubt), **_DEBIASED)
_add(
    "adaptive_ece",
    "adaptive ECE",
    False,
    SampleMean(_mass, _sum_of_gaps),
    tested_by="adaptive_ece_debiased",
    convention="bins of equal mass; equal confidences that a cut divides share their mean correctness",
)
_add(
    "adaptive_ece_debiased",
    "adaptive ECE, debiased",
    False,
    SampleMean(_mass, _debiased_sum, _debiased_doubt),
    **_DEBIASED,
)
_add(
    "classwise_ece",
    "class-wise ECE",
    False,
    tested_by="classwise_ece_debiased",
    convention=f"mean over classes; {_BINS}",
)
_add("classwise_ece_debiased", "class-wise ECE, debiased", False, **_DEBIASED)
_add(
    "signed_calibration_error",
    "signed CE",
    False,
    SampleMean(lambda r: r["confidence"].double() - r["correct"].double()),
    is_relative=False,
    best_at_zero=True,
    convention="confidence − accuracy: negative is underconfident",
)
_add(
    "mce",
    "MCE",
    False,
    Ranked(lambda c, s: calibration_error(c["confidence"], c["correct"], s.n_bins, norm="max")),
    is_tested=False,
    convention=f"largest gap of a bin; {_BINS}; not tested, a maximum of noisy gaps has no interval that holds",
)
_add("brier", "Brier", False, _column("brier"), convention="sum over classes, in [0, 2]")
_add("nll", "NLL", False, _column("nll"), in_percent=False, convention="nats")
_add("aurc", "AURC", False, Ranked(lambda c, s: aurc(c["confidence"], c["correct"]), fast="aurc"), is_share=True)
_add("augrc", "AUGRC", False, Ranked(lambda c, s: augrc(c["confidence"], c["correct"]), fast="augrc"), is_share=True)
_add(
    "coverage_at_risk",
    "coverage at risk",
    True,
    Ranked(lambda c, s: coverage_at_risk(c["confidence"], c["correct"], s.risk), fast="coverage_at_risk"),
    is_share=True,
    convention="of a threshold, whole groups of equal confidence",
)

_PRECISION = "average precision, as scikit-learn's (OpenOOD takes trapezoids)"
_TIES = "threshold at the first point of the curve with at least 95 % of them; equal scores are one point"
_add("auroc", "AUROC", True, is_share=True, convention="equal scores count half")
_add("aupr_in", "AUPR-in", True, is_share=True, convention=f"ID positive; {_PRECISION}")
_add("aupr_out", "AUPR-out", True, is_share=True, convention=f"OOD positive; {_PRECISION}")
_add("fpr95", "FPR95", False, is_share=True, convention=f"ID positive; {_TIES}")
_add("fpr95_openood", "FPR95 (OpenOOD)", False, is_share=True, convention=f"OOD positive; {_TIES}")

_GROUPS = {"follows_logit_scale": False, "is_share": True}
_add("common", "top-1 common", True, **_GROUPS)
_add("counter", "top-1 counter", True, **_GROUPS)
_add("rsg", "RSG", False, is_relative=False, **_GROUPS)
_add("vuln_add", "Vuln_add", False, is_relative=False, needs_reference=True, **_GROUPS)

_RATIO = {
    "is_relative": False,
    "is_tested": False,
    "is_shown": False,
    "in_percent": False,
    "follows_logit_scale": False,
}
for _name, _title in {"mean_corruption_error": "mCE", "relative_mean_corruption_error": "relative mCE"}.items():
    _add(_name, _title, False, needs_reference=True, convention="ratio to full precision's; 1 is no change", **_RATIO)
    _add(f"{_name}_alexnet", f"{_title} (AlexNet)", False, convention="ratio to AlexNet's published errors", **_RATIO)


@dataclass(frozen=True)
class Measure:
    """One number per run.

    Attributes:
        metric: key of :data:`METRICS`.
        role: the role of the data sets it is measured on.
        dataset: one data set (a pair, a suite), or empty for the mean over all of the role.
        score: OOD score, empty where none is involved.
        corruption: the data set's corruption or rendition, if any.
        severity: its severity.
    """

    metric: str
    role: str
    dataset: str = ""
    score: str = ""
    corruption: str = ""
    severity: int = 0

    @property
    def info(self) -> Metric:
        """The metric's title and direction."""
        return METRICS[self.metric]

    @property
    def follows_logit_scale(self) -> bool:
        """Whether another logit scale can change the number: the metric's word, and the score's where there is one."""
        score = score_name(self.score)
        return self.info.follows_logit_scale and (score not in OOD_SCORES or OOD_SCORES[score].follows_logit_scale)

    @property
    def tested_by(self) -> Measure:
        """The measure whose change has the interval and the test: itself, as a rule."""
        return replace(self, metric=self.info.tested_by or self.metric)

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
