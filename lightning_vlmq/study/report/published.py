"""The published figures beside the study's own: only claims that the stored results can be held against.

Published: *Less Precise Can Be More Reliable: A Systematic Evaluation of Quantization's Impact on VLMs Beyond Accuracy*
(ICML 2026, arXiv 2509.21173), on other models, data and scales than a study here; agreement is not expected of any line.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.statistics import Interval, share_improved, summarise
from lightning_vlmq.study.analysis.change import Comparison
from lightning_vlmq.study.analysis.comparison import StudyAnalysis, average_effect
from lightning_vlmq.study.report.notation import percent_interval

ECE = Measure("ece", "id")
CORRUPTION = Measure("top1", "corruption")
SHIFT = Measure("top1", "shift")
RSG = Measure("rsg", "spurious")
VULNERABILITY = Measure("vuln_add", "spurious")

_PUBLISHED_GAPS = {
    ("minmax", 8, 8): ("simple PTQ, W8A8", "+2.6 / +3.0"),
    ("lsq_contrastive", 8, 8): ("QAT contrastive, W8A8", "+1.6 / +1.9"),
    ("rot_lsq_contrastive", 8, 8): ("Rot+LSQ, W8A8", "−0.1 / −0.2 (n.s.)"),
    ("minmax", 4, 8): ("simple PTQ, W4A8", "+12.5 / +10.3"),
    ("rot_lsq_contrastive", 4, 8): ("Rot+LSQ, W4A8", "+4.0 / +4.4"),
}


@dataclass(frozen=True)
class Claim:
    """One published figure beside the own.

    Attributes:
        claim: what is claimed.
        published: the paper's figure.
        own: this study's, with its 95 % interval over test samples.
        basis: what the own figure is computed from.
    """

    claim: str
    published: str
    own: str
    basis: str


def compare_with_published(analysis: StudyAnalysis) -> list[Claim]:
    """Every claim that the study has results for."""
    return [*_calibration(analysis), *_robustness(analysis), *_spurious(analysis), *_architectures(analysis)]


def percent(interval: Interval, flip: bool = False) -> str:
    """An interval of a fraction, signed and in percent; ``flip`` turns delta into growth, (A_q - A_f) / A_f."""
    estimate, _, low, high = interval
    return " ".join(percent_interval(-estimate, -high, -low) if flip else percent_interval(estimate, low, high))


def _basis(comparisons: list[Comparison]) -> str:
    return f"mean over {len(comparisons)} (VLM, setting) pairs" if len(comparisons) > 1 else "one VLM and setting"


def _calibration(analysis: StudyAnalysis) -> list[Claim]:
    claims = []
    if w8a8 := analysis.changes(ECE, weight_bits=8, act_bits=8):
        references, values = (torch.tensor([getattr(c, name) for c in w8a8]) for name in ("reference", "value"))
        share = share_improved(references, values, better="lower")
        own = f"{100 * share.share:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"
        basis = f"{share.n_improved} of {share.n_compared}, Wilson interval, taking them as independent"
        claims.append(Claim("share of W8A8 runs whose calibration improves", "about 40 %", own, basis))
    if with_text := analysis.changes(ECE, scope="vision_text"):
        worst = min(with_text, key=lambda c: c.effect.estimate if c.effect else np.inf)
        assert worst.effect is not None
        own = f"up to {percent(worst.effect, flip=True)} %"
        basis = f"the largest of {len(with_text)} (VLM, setting) pairs; its own interval, not corrected for choosing it"
        claims.append(Claim("ECE with the text tower quantized, before logit scale tuning", "up to +98 %", own, basis))
    if tuned := analysis.changes(ECE, is_tuned=True, scope="vision_text"):
        after, before = (np.mean([getattr(c, name) for c in tuned]) for name in ("value", "reference"))
        own = f"{100 * after:.1f} % vs {100 * before:.1f} %, a relative change of {percent(average_effect(tuned), flip=True)} %"
        claims.append(
            Claim("ECE, fully quantized with tuned logit scale vs FP32", "1.1 % vs 6.9 %", own, _basis(tuned))
        )
    sources: dict[str, list[Comparison]] = {}
    for vlm in analysis.vlms:
        pretrained = analysis.results.runs_of(vlm)[0][0].key.pretrained
        sources.setdefault(pretrained, []).extend(analysis.changes(ECE, vlm))
    for source, found in sources.items():
        if found and len(sources) > 1:
            own = f"{percent(average_effect(found), flip=True)} %"
            claim = f"relative ECE change by source of pre-training: here “{source}”"
            claims.append(Claim(claim, "+49 % on LAION; falls on clean sources (WIT, DFN)", own, _basis(found)))
    return claims


def _robustness(analysis: StudyAnalysis) -> list[Claim]:
    claims = []
    for measure, claim, published in (
        (CORRUPTION, "relative change of accuracy under synthetic corruption", "+8.9 %, almost all architectures"),
        (SHIFT, "relative change of accuracy under semantic shift", "falls (ImageNet-A/R/Sketch)"),
    ):
        if found := analysis.changes(measure):
            own = f"{percent(average_effect(found), flip=True)} %"
            claims.append(Claim(claim, published, own, _basis(found)))
    return claims


def _spurious(analysis: StudyAnalysis) -> list[Claim]:
    claims = []
    for (method, weight_bits, act_bits), (title, published) in _PUBLISHED_GAPS.items():
        gaps, vulnerabilities = (
            analysis.changes(measure, method=method, weight_bits=weight_bits, act_bits=act_bits)
            for measure in (RSG, VULNERABILITY)
        )
        if gaps and vulnerabilities:
            own = f"{percent(average_effect(gaps))} / {percent(average_effect(vulnerabilities))}"
            claims.append(Claim(f"ΔRSG / Vuln_add in points, {title}", published, own, f"{method}, {_basis(gaps)}"))
    return claims


def _architectures(analysis: StudyAnalysis) -> list[Claim]:
    effects: dict[str, list[Comparison]] = {"convnext": [], "vit": []}
    for vlm in analysis.vlms:
        for family, found in effects.items():
            if vlm.lower().startswith(family):
                for role in ("near_ood", "far_ood"):
                    found += analysis.changes(Measure("auroc", role, "", analysis.score), vlm)
    if not all(effects.values()):
        return []
    means = {family: np.mean([c.effects for c in found], axis=0) for family, found in effects.items()}
    points = {family: average_effect(found).estimate for family, found in effects.items()}
    point = points["vit"] - points["convnext"]
    summary = summarise(point, torch.from_numpy(means["vit"] - means["convnext"]))
    difference = Interval(point, summary.stderr, summary.low, summary.high)
    basis = f"mean over near- and far-OOD, {len(effects['convnext'])} and {len(effects['vit'])} comparisons"
    claim = "relative AUROC change of ConvNeXt minus that of ViT"
    return [Claim(claim, "positive (ConvNeXt gains more)", f"{percent(difference)} points", basis)]
