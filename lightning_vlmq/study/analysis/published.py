"""The published claims held against a study: the same query on anyone's store, its effect over VLMs, and a verdict.

Published: *Less Precise Can Be More Reliable: A Systematic Evaluation of Quantization's Impact on VLMs Beyond Accuracy* (ICML 2026,
arXiv 2509.21173), on other models, data and scales than a study here; agreement is not expected of any line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import t as student

from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.statistics import ClusteredMean, clustered_mean
from lightning_vlmq.study.analysis.change import FULL, Comparison
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.groups import Cell, Kind, architecture_of, by_vlm, source_of
from lightning_vlmq.study.analysis.setting import Setting

ECE = Measure("ece", "id")
SIGN = Measure("signed_calibration_error", "id")
CORRUPTION = Measure("top1", "corruption")
SHIFT = Measure("top1", "shift")
RSG = Measure("rsg", "spurious")
VULNERABILITY = Measure("vuln_add", "spurious")

Expectation = Literal["rises", "falls", "stays", "some"] | float
"""What is published: a direction, no change (within :data:`NEGLIGIBLE`), that it happens at all, or about this share."""

NEGLIGIBLE = 0.02
"""A change within which the published "not significant" counts as met."""
SHARE_MARGIN = 0.15
"""Half width of an interval above which it is too wide to agree with a share."""


@dataclass(frozen=True)
class Query:
    """Which numbers a claim is about: one of each VLM and quantized setting that it names; controls and surgeries never count.

    Attributes:
        measure: what is compared with full precision; the OOD score is the study's main one.
        of: ``"growth"`` (A_q - A_f) / A_f, ``"change"`` in the measure's unit, or ``"better"``, 1 where it got better and else 0.
        where: fields of a setting and their values.
        is_tuned: settings with the logit scale tuned.
    """

    measure: Measure
    of: Kind = "growth"
    where: tuple[tuple[str, Any], ...] = ()
    is_tuned: bool = False

    def __str__(self) -> str:
        parts = [f"{self.measure.metric} on {self.measure.role}", *(f"{name}={value}" for name, value in self.where)]
        return f"{self.of} of {', '.join(parts)}{', logit scale tuned' if self.is_tuned else ''}"

    def cells(self, analysis: StudyAnalysis) -> dict[str, list[Cell]]:
        """The numbers by VLM; a VLM without any is left out."""
        measure = self.measure
        if measure.metric == "auroc":
            measure = Measure(measure.metric, measure.role, measure.dataset, analysis.score)
        found: dict[str, list[Cell]] = {}
        for vlm, setting, comparison in _compared(analysis, measure):
            if setting.is_tuned == self.is_tuned and all(getattr(setting, name) == value for name, value in self.where):
                found.setdefault(vlm, []).append(Cell.of(measure, comparison, self.of))
        return found


@dataclass(frozen=True)
class Claim:
    """One published claim beside the study's own figure.

    Attributes:
        claim: what is claimed.
        published: the published figure.
        expects: what would agree.
        found: this study's, with a 95 % interval over VLMs and test samples; over samples alone where there is one VLM, and over VLMs
            alone of a share in which several measures count together.
        unit: ``"%"`` or ``"points"``, of hundredths.
        n_cells: VLMs and settings behind it.
        query: which numbers they are.
    """

    claim: str
    published: str
    expects: Expectation
    found: ClusteredMean
    unit: str
    n_cells: int
    query: str

    @property
    def verdict(self) -> str:
        """``"agrees"``, ``"disagrees"`` or ``"undecided"``: by where the interval lies, never by the estimate alone."""
        _, _, low, high, _ = self.found
        if math.isnan(low):
            return "undecided"
        if isinstance(self.expects, float):
            if not low <= self.expects <= high:
                return "disagrees"
            return "agrees" if high - low <= 2 * SHARE_MARGIN else "undecided"
        if self.expects == "stays":
            if low > 0 or high < 0:
                return "disagrees"
            return "agrees" if max(-low, high) <= NEGLIGIBLE else "undecided"
        sign = -1 if self.expects == "falls" else 1
        if min(sign * low, sign * high) > 0:
            return "agrees"
        return (
            "disagrees" if max(sign * low, sign * high) < 0 or (self.expects == "some" and high <= 0) else "undecided"
        )


def held_against(analysis: StudyAnalysis) -> list[Claim]:
    """Every published claim that the study has numbers for, in the order of the paper's figures."""
    found = []
    for claim, published, expects, query in _MEANS:
        if cells := query.cells(analysis):
            unit = "points" if query.of == "change" else "%"
            found.append(_claim(claim, published, expects, cells, unit, str(query)))
    for special in (_worst_text_tower, _sources, _sign, _architectures, _ood_without_calibration, _all_three):
        if (own := special(analysis)) is not None:
            found.append(own)
    return found


def _where(**fields: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(fields.items())


_W8A8, _W4A8 = {"weight_bits": 8, "act_bits": 8}, {"weight_bits": 4, "act_bits": 8}
_GAPS: tuple[tuple[str, str, dict[str, int], str, str, Expectation], ...] = (
    ("simple PTQ, W8A8", "minmax", _W8A8, "+2.6", "+3.0", "rises"),
    ("QAT contrastive, W8A8", "lsq_contrastive", _W8A8, "+1.6", "+1.9", "rises"),
    ("Rot+LSQ, W8A8", "rot_lsq_contrastive", _W8A8, "−0.1 (n.s.)", "−0.2 (n.s.)", "stays"),
    ("simple PTQ, W4A8", "minmax", _W4A8, "+12.5", "+10.3", "rises"),
    ("Rot+LSQ, W4A8", "rot_lsq_contrastive", _W4A8, "+4.0", "+4.4", "rises"),
)
_MEANS: list[tuple[str, str, Expectation, Query]] = [
    ("share of W8A8 models whose calibration improves", "about 40 %", 0.4, Query(ECE, "better", _where(**_W8A8))),
    (
        "ECE, both towers quantized and logit scale tuned, against full precision",
        "1.1 % against 6.9 %",
        "falls",
        Query(ECE, "growth", _where(scope="vision_text"), is_tuned=True),
    ),
    ("accuracy under synthetic corruption", "+8.9 %, almost all architectures", "rises", Query(CORRUPTION)),
    ("accuracy under semantic shift", "falls (ImageNet-A/R/Sketch)", "falls", Query(SHIFT)),
]
"""Claims that are a mean over VLMs of one query."""
for _title, _method, _bits, _gap, _vulnerability, _expects in _GAPS:
    for _name, _measure, _figure in (("ΔRSG", RSG, _gap), ("added vulnerability", VULNERABILITY, _vulnerability)):
        _query = Query(_measure, "change", _where(method=_method, **_bits))
        _MEANS.append((f"{_name}, {_title}", _figure, _expects, _query))


def _compared(analysis: StudyAnalysis, measure: Measure) -> Iterator[tuple[str, Setting, Comparison]]:
    """Every comparison of a measure that is known, of quantizations: no controls, no surgeries."""
    for vlm, setting, comparison in analysis.comparisons.of(measure):
        if setting.is_quantization:
            yield vlm, setting, comparison


def _claim(
    claim: str, published: str, expects: Expectation, cells: Mapping[str, Sequence[Cell]], unit: str, query: str
) -> Claim:
    found = by_vlm(cells)
    if query.startswith(("share", "better")):  # an interval of a share ends where shares do
        found = found._replace(low=float(np.clip(found.low, 0, 1)), high=float(np.clip(found.high, 0, 1)))
    return Claim(claim, published, expects, found, unit, sum(map(len, cells.values())), query)


def _contrast(
    claim: str, published: str, expects: Expectation, groups: Sequence[Mapping[str, Sequence[Cell]]], query: str
) -> Claim | None:
    """The first group of VLMs minus the second, by Welch's interval; samples are common to both and cancel."""
    if not all(groups):
        return None
    means = [clustered_mean(np.array([np.mean([cell.point for cell in own]) for own in g.values()])) for g in groups]
    point, variances = means[0].estimate - means[1].estimate, [m.stderr**2 for m in means]
    n = min(m.n_clusters for m in means)
    stderr = math.sqrt(sum(variances)) if n > 1 else math.nan
    terms = sum(v**2 / (m.n_clusters - 1) for v, m in zip(variances, means)) if n > 1 else math.nan
    half = float(student.ppf(0.975, stderr**4 / terms)) * stderr if terms and not math.isnan(terms) else math.nan
    found = ClusteredMean(point, stderr, point - half, point + half, sum(m.n_clusters for m in means))
    return Claim(claim, published, expects, found, "points", sum(len(own) for g in groups for own in g.values()), query)


def _worst_text_tower(analysis: StudyAnalysis) -> Claim | None:
    query = Query(ECE, "growth", _where(scope="vision_text"))
    cells = query.cells(analysis)
    if not cells:
        return None
    vlm, worst = max(((vlm, cell) for vlm, own in cells.items() for cell in own), key=lambda found: found[1].point)
    title = f"largest growth of ECE with the text tower quantized: here {vlm}'s; not corrected for being chosen"
    return _claim(title, "up to +98 %", "rises", {vlm: [worst]}, "%", f"largest {query}")


def _sources(analysis: StudyAnalysis) -> Claim | None:
    """Noisy against clean pre-training, where VLMs' names (or weights) say so."""
    cells = Query(ECE).cells(analysis)

    groups = [
        {vlm: own for vlm, own in cells.items() if source_of(analysis, vlm) == source} for source in ("noisy", "clean")
    ]
    title = "growth of ECE, VLMs from noisy captions (LAION) minus those from clean ones (WIT, DFN)"
    return _contrast(title, "+49 % on LAION; falls on clean sources", "rises", groups, "growth of ece on id, by source")


def _sign(analysis: StudyAnalysis) -> Claim | None:
    """The driver that version 3's abstract names: underconfident models improve, overconfident ones degrade."""
    cells = Query(ECE, "change").cells(analysis)
    signs = {vlm: analysis.comparisons.get((vlm, FULL, SIGN)) for vlm in cells}
    groups = [
        {vlm: cells[vlm] for vlm, sign in signs.items() if sign is not None and way * sign.value > 0} for way in (1, -1)
    ]
    title = "change of ECE, VLMs overconfident in full precision minus underconfident ones"
    return _contrast(
        title,
        "underconfident models improve, overconfident ones degrade",
        "rises",
        groups,
        "change of ece on id, by sign",
    )


def _architectures(analysis: StudyAnalysis) -> Claim | None:
    groups = []
    for family in ("convnext", "vit"):
        merged: dict[str, list[Cell]] = {}
        for role in ("near_ood", "far_ood"):
            for vlm, own in Query(Measure("auroc", role)).cells(analysis).items():
                if architecture_of(vlm) == family:
                    merged.setdefault(vlm, []).extend(own)
        groups.append(merged)
    title = "growth of AUROC (near and far OOD), ConvNeXt minus ViT"
    return _contrast(
        title, "ConvNeXt gains more", "rises", groups, "growth of auroc on near_ood and far_ood, by architecture"
    )


def _share(analysis: StudyAnalysis, holds: Callable[[dict[str, float]], bool], trained: bool) -> dict[str, list[Cell]]:
    """1 where it holds of a setting's gains in accuracy, ECE and AUROC, else 0; by VLM. What samples do to it is not known."""
    found: dict[str, list[Cell]] = {}
    for (vlm, setting), gains in analysis.joint_gains().items():
        if setting.is_trained or not trained:
            found.setdefault(vlm, []).append(Cell(float(holds(gains))))
    return found


def _ood_without_calibration(analysis: StudyAnalysis) -> Claim | None:
    cells = _share(analysis, lambda gain: gain["auroc"] > 0 > gain["ece"], trained=False)
    title = "share of models whose AUROC rises while their ECE worsens"
    query = "share with a gain in auroc (mean of near and far) and a loss in ece"
    return _claim(title, "it happens", "some", cells, "%", query) if cells else None


def _all_three(analysis: StudyAnalysis) -> Claim | None:
    cells = _share(analysis, lambda gain: min(gain["top1"], gain["ece"], gain["auroc"]) > 0, trained=True)
    title = "share of trained models that gain in accuracy, calibration and OOD detection at once"
    query = "share of trained methods with a gain in top1, ece and auroc (mean of near and far)"
    return _claim(title, "some do", "some", cells, "%", query) if cells else None
