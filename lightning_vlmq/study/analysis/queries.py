"""Which numbers of a study a published claim is about, and what is made of them: means, differences, largest ones and shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import norm
from scipy.stats import t as student

from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.quant.outliers import MARK
from lightning_vlmq.statistics import FALSE_DISCOVERY_RATE, ClusteredMean, Interval, benjamini_hochberg, clustered_mean
from lightning_vlmq.study.analysis.change import Comparison, average_effect
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.groups import Cell, Kind, by_vlm
from lightning_vlmq.study.analysis.setting import Setting

_POST_TRAINING = ("minmax", "percentile", "mse", "smoothquant", "awq", "gptq", "hqq", "quarot")
_TRAINED = ("ste", "lsq", "lsqplus", "rot_lsq")
METHODS = frozenset([*_POST_TRAINING, *(f"{name}_{loss}" for name in _TRAINED for loss in ("contrastive", "feature"))])
"""The published study's sixteen."""
BITS = ((8, 8), (6, 8), (4, 8))
"""Its bits of weights and activations."""
GRID = "16 methods, W8A8 to W4A8"
"""The published grid in words, which stand in every query."""

CONFIDENCE = 0.95
"""Of every interval here."""

Cells = Mapping[str, Sequence[Cell]]
"""Numbers by VLM."""


def in_grid(vlm: str, setting: Setting) -> bool:
    """Whether a quantization counts as one of the published grid: no control, surgery, other method or bits, no planted outliers."""
    is_known = setting.method in METHODS and (setting.weight_bits, setting.act_bits) in BITS
    return is_known and setting.is_quantization and MARK not in vlm


@dataclass(frozen=True)
class Query:
    """Numbers of each VLM and setting of the published grid, or of a part of it; nothing outside the grid ever counts.

    Attributes:
        measure: what is compared with full precision; the OOD score is the study's main one.
        of: ``"growth"`` (A_q - A_f) / A_f, ``"change"`` in the measure's unit, ``"better"``, 1 where it got better and else 0, or the
            ``"value"`` itself and the ``"reference"``'s.
        where: fields of a setting and their values.
        is_tuned: settings with the logit scale tuned.
    """

    measure: Measure
    of: Kind | Literal["value", "reference"] = "growth"
    where: tuple[tuple[str, Any], ...] = ()
    is_tuned: bool = False

    def __str__(self) -> str:
        parts = [f"{self.measure.metric} on {self.measure.role}", *(f"{name}={value}" for name, value in self.where)]
        return f"{self.of} of {', '.join(parts)}{', logit scale tuned' if self.is_tuned else ''}; {GRID}"

    @property
    def unit(self) -> str:
        """See :class:`~lightning_vlmq.study.analysis.claims.Claim`."""
        return "points" if self.of == "change" else "%"

    @property
    def is_share(self) -> bool:
        """Whether its mean is a share."""
        return self.of == "better"

    def compared(self, analysis: StudyAnalysis) -> Iterator[tuple[str, Comparison]]:
        """Every comparison that counts, with its VLM."""
        measure = self.measure
        if measure.metric == "auroc":
            measure = Measure(measure.metric, measure.role, measure.dataset, analysis.score)
        for vlm, setting, comparison in analysis.comparisons.of(measure):
            is_asked = all(getattr(setting, name) == value for name, value in self.where)
            if in_grid(vlm, setting) and setting.is_tuned == self.is_tuned and is_asked:
                yield vlm, comparison

    def cells(self, analysis: StudyAnalysis) -> dict[str, list[Cell]]:
        """The numbers by VLM; a VLM without any is left out."""
        found: dict[str, list[Cell]] = {}
        for vlm, comparison in self.compared(analysis):
            found.setdefault(vlm, []).append(self._cell(comparison))
        return found

    def _cell(self, c: Comparison) -> Cell:
        if self.of == "value":
            return Cell(c.value)
        return Cell(c.reference) if self.of == "reference" else Cell.of(self.measure, c, self.of)


def count(*groups: Cells) -> int:
    """How many numbers there are."""
    return sum(len(own) for cells in groups for own in cells.values())


def mean(cells: Cells, is_share: bool = False) -> ClusteredMean:
    """The mean over VLMs, each with the mean over its settings; a share's interval ends where shares do."""
    found = by_vlm(cells)
    if not is_share:
        return found
    return found._replace(low=float(np.clip(found.low, 0, 1)), high=float(np.clip(found.high, 0, 1)))


def mean_share(cells: Cells) -> ClusteredMean:
    """The mean of shares, where all VLMs have a share of 1, or of 0, with the interval that this leaves open.

    VLMs without any spread would have an interval without width, however few they are. k of k ones hold with a true mean of p at most with
    the chance p^k, whatever shares other VLMs have (Clopper & Pearson 1934): so far as that is 2.5 % the interval reaches.
    """
    found = mean(cells, is_share=True)
    reach = (1 - CONFIDENCE) / 2
    if found.n_clusters > 1 and found.estimate == 1:
        return found._replace(low=min(found.low, reach ** (1 / found.n_clusters)))
    if found.n_clusters > 1 and found.estimate == 0:
        return found._replace(high=max(found.high, 1 - reach ** (1 / found.n_clusters)))
    return found


def difference(first: Cells, second: Cells) -> ClusteredMean:
    """The first group of VLMs minus the second, by Welch's interval; samples are common to both and cancel."""
    groups = (first, second)
    means = [clustered_mean(np.array([np.mean([cell.point for cell in own]) for own in g.values()])) for g in groups]
    point, variances = means[0].estimate - means[1].estimate, [m.stderr**2 for m in means]
    n = min(m.n_clusters for m in means)
    stderr = math.sqrt(sum(variances)) if n > 1 else math.nan
    terms = sum(v**2 / (m.n_clusters - 1) for v, m in zip(variances, means)) if n > 1 else math.nan
    half = float(student.ppf(0.975, stderr**4 / terms)) * stderr if terms and not math.isnan(terms) else math.nan
    return ClusteredMean(point, stderr, point - half, point + half, sum(m.n_clusters for m in means))


def largest_growth(compared: Sequence[tuple[str, Comparison]]) -> tuple[ClusteredMean, str]:
    """The largest growth of some comparisons, and whose it is.

    The interval is of the largest true one over test samples: from the highest lower end to the highest upper end of Bonferroni's
    intervals over all of them, which hold together. The estimate itself is chosen, and too large.
    """
    growths = [
        (c.change.estimate / c.reference, c.change.stderr / abs(c.reference), vlm)
        for vlm, c in compared
        if c.change is not None and c.reference
    ]
    z = float(norm.isf(0.025 / len(growths))) if growths else math.nan
    point, stderr, vlm = max(growths, default=(math.nan, math.nan, ""))
    lows, highs = ([point + way * z * stderr for point, stderr, _ in growths] for way in (-1, 1))
    low, high = (math.nan, math.nan) if np.isnan(lows).all() else (float(np.nanmax(lows)), float(np.nanmax(highs)))
    return ClusteredMean(point, stderr, low, high, len({vlm for vlm, _ in compared})), vlm


def tested_gains(analysis: StudyAnalysis) -> dict[tuple[str, Setting], dict[str, Interval]]:
    """By how much ``top1``, ``ece`` and ``auroc`` (mean of near- and far-OOD's) got better, with errors over samples; the published grid.

    In the unit that is tested: points, AUROC's as a share of full precision's.
    """
    parts = analysis.joint_measures
    found = {}
    for vlm, setting in analysis.joint_gains():
        if not in_grid(vlm, setting):
            continue
        own = {name: [analysis.comparisons[vlm, setting, m] for m in measures] for name, measures in parts.items()}
        gains = {}
        for name, comparisons in own.items():
            change = comparisons[0].change if name != "auroc" else average_effect(comparisons)
            assert change is not None
            sign = 1 if name == "top1" else -1  # an error is better the less it is, an effect is a loss
            gains[name] = Interval.normal(sign * change.estimate, change.stderr)
        found[vlm, setting] = gains
    return found


def joint_share(gains: Mapping[tuple[str, Setting], Mapping[str, Interval]], signs: Mapping[str, int]) -> ClusteredMean:
    """Share of models whose gains have these signs, all at once.

    Counting signs would find some by chance alone, half of them for each gain. Here the estimate is the share in which all gains are
    significantly of their sign; the interval begins at the lower end of that share's, and ends at the upper end of the share's that
    has no gain significantly of the other sign. Both tests are corrected over the models (Benjamini & Hochberg).
    """
    own = [
        [(sign * gain[name].estimate > 0, gain[name].p_value) for name, sign in signs.items()]
        for gain in gains.values()
    ]
    holds = [max(p for _, p in tests) if all(way for way, _ in tests) else 1.0 for tests in own]
    fails = [min(1.0, len(tests) * min((p for way, p in tests if not way), default=1.0)) for tests in own]
    surely, not_so = (benjamini_hochberg(torch.tensor(p)).numpy() < FALSE_DISCOVERY_RATE for p in (holds, fails))
    return bounded(*({k: float(x) for k, x in zip(gains, column)} for column in (surely, ~not_so)))


def bounded(surely: Mapping[tuple[str, Setting], float], maybe: Mapping[tuple[str, Setting], float]) -> ClusteredMean:
    """The share that surely is, with an interval up to that of the share that may be; means over VLMs."""
    low, high = (mean(shares_by_vlm(shares), is_share=True) for shares in (surely, maybe))
    return low._replace(high=high.high)


def shares_by_vlm(holds: Mapping[tuple[str, Setting], float]) -> dict[str, list[Cell]]:
    """1 or 0 of every model, by VLM."""
    found: dict[str, list[Cell]] = {}
    for (vlm, _), value in holds.items():
        found.setdefault(vlm, []).append(Cell(value))
    return found


def share_of_groups(cells: Cells, group_of: Callable[[str], str]) -> tuple[ClusteredMean, list[str]]:
    """Share of groups of VLMs whose mean is positive, and the groups; from those whose interval says so to those where it may be."""
    groups: dict[str, dict[str, Sequence[Cell]]] = {}
    for vlm, own in cells.items():
        if group := group_of(vlm):
            groups.setdefault(group, {})[vlm] = own
    means = [mean(own) for own in groups.values()]
    positive, surely, maybe = (
        float(np.mean([test(m) for m in means])) if means else math.nan
        for test in (lambda m: m.estimate > 0, lambda m: m.low > 0, lambda m: not m.high <= 0)
    )
    return ClusteredMean(positive, math.nan, surely, maybe, sum(map(len, groups.values()))), sorted(groups)
