"""What to read first of one run: every reliability dimension in full precision and after, the change with its interval, and a mark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm

from lightning_vlmq.evaluation.estimates import Estimate, estimate_all, main_score
from lightning_vlmq.evaluation.measures import Dimension, Measure, dimensions
from lightning_vlmq.evaluation.records import Columns, EvaluationSet, SampleMatrix
from lightning_vlmq.statistics import benjamini_hochberg

Z95 = float(norm.ppf(0.975))


@dataclass(frozen=True)
class HeadlineLine:
    """One dimension.

    Attributes:
        dimension: which, and the measure that stands for it.
        values: the measure of each run, fractions; the first run is what the second is compared with.
        change: the second run's minus the first's; NaN for a single run.
        half_width: half its 95 % interval, 1.96 standard errors of a paired bootstrap over samples.
        q_value: that there is no change, two-sided, corrected over the lines (Benjamini & Hochberg); NaN where nothing can be tested.
    """

    dimension: Dimension
    values: tuple[float, ...]
    change: float = float("nan")
    half_width: float = float("nan")
    q_value: float = float("nan")

    @property
    def is_significant(self) -> bool:
        """Whether the change is significant at a false discovery rate of 5 %."""
        return self.q_value < 0.05

    @property
    def is_better(self) -> bool:
        """Whether the change is for the better."""
        return (self.change > 0) == self.dimension.measure.info.higher_is_better


def side_by_side(runs: Sequence[Mapping[EvaluationSet, Columns]]) -> dict[str, list[SampleMatrix]]:
    """Per-sample columns of runs on the same samples, by role; only the sets that all runs have."""
    sets: dict[str, list[SampleMatrix]] = {}
    for where in runs[0]:
        if all(where in run for run in runs):
            tables = {number: run[where] for number, run in enumerate(runs)}
            sets.setdefault(where.role, []).append(SampleMatrix(where, tables, len(runs)))
    return sets


def headline(sets: Mapping[str, list[SampleMatrix]], seed: int = 0) -> list[HeadlineLine]:
    """A line a dimension that the sets allow.

    Args:
        sets: samples of one or more runs by role, as :func:`side_by_side` gives them.
        seed: seed of the bootstrap.
    """
    score = main_score(sets["id"][0]) if sets.get("id") else None
    return lines_of(estimate_all(sets, seed), score or "")


def lines_of(estimates: Mapping[Measure, Estimate], score: str) -> list[HeadlineLine]:
    """The lines that estimates give; ``score`` is the OOD score that stands for detection."""
    found = [(d, estimates[d.measure]) for d in dimensions(score) if d.measure in estimates]
    changes = [_change(estimate) for _, estimate in found]
    p_values = [p_value_of(*change) for change in changes]
    q_values = benjamini_hochberg(torch.tensor(p_values, dtype=torch.float64)).tolist() if found else []
    return [
        HeadlineLine(dimension, tuple(map(float, estimate.value)), change, Z95 * stderr, q_value)
        for (dimension, estimate), (change, stderr), q_value in zip(found, changes, q_values)
    ]


def _change(estimate: Estimate) -> tuple[float, float]:
    """Second run minus first, and its standard error; NaN for a single run."""
    if len(estimate.value) < 2:
        return float("nan"), float("nan")
    drawn = estimate.replicates[:, 1] - estimate.replicates[:, 0]
    drawn = drawn[np.isfinite(drawn)]
    return float(estimate.value[1] - estimate.value[0]), float(drawn.std(ddof=1)) if len(drawn) > 1 else float("nan")


def p_value_of(change: float, stderr: float) -> float:
    """Two-sided p-value of z = change / standard error; 1 where there is neither change nor spread, NaN where only spread lacks."""
    if np.isnan(change) or np.isnan(stderr):
        return float("nan")
    if stderr < 1e-12:
        return 1.0 if abs(change) < 1e-9 else float("nan")
    return float(2 * norm.sf(abs(change) / stderr))
