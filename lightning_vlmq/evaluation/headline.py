"""What to read first of one run: every reliability dimension in full precision and after, the change with its interval, and a mark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_vlmq.evaluation.estimates import Estimate
from lightning_vlmq.evaluation.evaluators import estimate_all, main_score, recorded_scores
from lightning_vlmq.evaluation.measures import Dimension, Measure, dimensions
from lightning_vlmq.evaluation.quantities import AlignedRuns
from lightning_vlmq.evaluation.records import Columns, EvaluationSet, SampleMatrix
from lightning_vlmq.evaluation.rows import change as change_of
from lightning_vlmq.statistics import FALSE_DISCOVERY_RATE, Interval, Statistics, benjamini_hochberg

DEBIASED = "a calibration error's change is debiased, not the difference of the two values"
"""What a table says that shows the values of :attr:`~.measures.Measure.tested_by` measures beside their changes."""


@dataclass(frozen=True)
class HeadlineLine:
    """One dimension.

    Attributes:
        dimension: which, and the measure that stands for it.
        values: the measure of each run, fractions; the first run is what the second is compared with.
        change: the second run's minus the first's, of the measure that stands for this one where a change is tested (a calibration
            error's is debiased, and need not be the difference of the values); NaN for a single run.
        half_width: half its 95 % interval, 1.96 standard errors of a paired bootstrap over samples.
        q_value: that there is no change, two-sided, corrected over the lines (Benjamini & Hochberg); NaN where nothing can be tested.
        n: samples behind it, of all sets that the measure takes in.
    """

    dimension: Dimension
    values: tuple[float, ...]
    change: float = float("nan")
    half_width: float = float("nan")
    q_value: float = float("nan")
    n: int = 0

    @property
    def is_significant(self) -> bool:
        """Whether the change is significant at a false discovery rate of 5 %."""
        return self.q_value < FALSE_DISCOVERY_RATE

    @property
    def is_better(self) -> bool:
        """Whether the change is for the better."""
        return (self.change > 0) == self.dimension.measure.info.higher_is_better


def side_by_side(runs: Sequence[Mapping[EvaluationSet, Columns]]) -> list[SampleMatrix]:
    """Per-sample columns of runs on the same samples; only the sets that all runs have."""
    shared = [where for where in runs[0] if all(where in run for run in runs)]
    return [SampleMatrix(where, {number: run[where] for number, run in enumerate(runs)}, len(runs)) for where in shared]


def headline(sets: Sequence[SampleMatrix], settings: Statistics) -> list[HeadlineLine]:
    """One line per dimension that the sets allow.

    Args:
        sets: samples of one or more runs, as :func:`side_by_side` gives them.
        settings: bins, resamples and their seed.
    """
    inside = [s for s in sets if s.where.role == "id"]
    shown = dimensions(main_score(recorded_scores(inside)) if inside else "")
    needed = {(m.metric, m.role, m.score) for d in shown for m in (d.measure, d.measure.tested_by)}
    found = estimate_all(AlignedRuns(sets, settings, lambda *asked: asked in needed))
    shown = [d for d in shown if d.measure in found]
    changes = [_change(d.measure.tested_by, found) for d in shown]
    p_values = torch.tensor([change.p_value for change in changes], dtype=torch.float64)
    q_values = benjamini_hochberg(p_values).tolist() if shown else []
    return [
        HeadlineLine(
            d,
            tuple(map(float, found[d.measure].value)),
            change.estimate,
            change.high - change.estimate,
            q_value,
            found[d.measure].n,
        )
        for d, change, q_value in zip(shown, changes, q_values)
    ]


def _change(measure: Measure, found: Mapping[Measure, Estimate]) -> Interval:
    """Second run minus first; NaN for a single run."""
    if measure not in found or found[measure].k < 2:
        return Interval.normal(float("nan"), float("nan"))
    return change_of(found[measure], 1, is_relative=False, is_share=measure.info.is_share)[0]
