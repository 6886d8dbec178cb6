"""One measure of a quantized setting beside full precision: the change, its effect, and what is known of both."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from lightning_vlmq.evaluation.estimates import Array, Estimate, deviation
from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.evaluation.rows import change as change_of
from lightning_vlmq.quant.scheme import FULL_PRECISION
from lightning_vlmq.statistics import FALSE_DISCOVERY_RATE, Interval
from lightning_vlmq.study.analysis.setting import Setting

FULL = Setting(FULL_PRECISION, 32, 32, "none")
"""The setting every VLM is compared with."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """A measure of one VLM in one setting, beside full precision; means over seeds.

    Attributes:
        value: the measure, NaN where the setting lacks a data set.
        stderr: its standard error over test samples.
        reference: the measure of full precision.
        n_seeds: number of runs averaged.
        change: value minus reference, in the measure's unit; Vuln_add, a change in itself, is taken as it is. ``None``
            for full precision, and for agreement, of which full precision has none.
        effect: the change as the figures show it: delta = (reference - value) / reference for measures whose change is
            relative, else the change itself.
        p_value: two-sided, that there is no change; NaN where nothing is tested.
        q_value: the p-value adjusted over every comparison of the study (Benjamini & Hochberg).
        effects: the effect's bootstrap replicates ``[R]``, which show less than its standard error where an estimate has a ``doubt``;
            empty where the standard error is a closed form, where a study is analysed from rows, and of measures that nothing averages.
    """

    value: float
    stderr: float
    reference: float
    n_seeds: int
    change: Interval | None = None
    effect: Interval | None = None
    p_value: float = float("nan")
    q_value: float = float("nan")
    effects: Array = field(default_factory=lambda: np.empty(0), repr=False)

    @property
    def is_significant(self) -> bool:
        """Whether the change is significant at the study's false discovery rate; not where nothing is tested."""
        return self.q_value < FALSE_DISCOVERY_RATE


@dataclass(frozen=True, eq=False)
class Pair:
    """One run's part of an estimate, beside full precision's (position 0)."""

    estimate: Estimate
    position: int


def compare(setting: Setting, measure: Measure, pairs: list[Pair]) -> Comparison:
    """One measure by itself; what is tested by another measure gets its change from there later.

    Args:
        setting: which the pairs' runs are of; :data:`FULL` has no change.
        measure: what is compared.
        pairs: one per seed.
    """
    value = float(np.mean([pair.estimate.value[pair.position] for pair in pairs]))
    reference = float(np.mean([pair.estimate.value[0] for pair in pairs]))
    if pairs[0].estimate.closed_form is not None:
        return _closed_form(setting, measure, pairs, value, reference)
    drawn, info = np.mean([pair.estimate.replicates[:, pair.position] for pair in pairs], axis=0), measure.info
    doubts = [0.0 if pair.estimate.doubt is None else pair.estimate.doubt[pair.position] for pair in pairs]
    both = Estimate(
        np.array([reference, value]),
        np.stack([np.mean([pair.estimate.replicates[:, 0] for pair in pairs], axis=0), drawn], axis=1),
        pairs[0].estimate.n,
        doubt=np.array([0.0, np.mean(doubts)]),
        n_least=pairs[0].estimate.n_least,
    )
    bare = Comparison(value, both.stderr(1, info.is_share), reference, len(pairs))
    if setting == FULL:
        return bare
    if info.needs_reference:
        if not info.is_tested:
            return bare
        change = Interval.normal(value, bare.stderr)  # a comparison with full precision already
        return replace(bare, change=change, effect=change, p_value=change.p_value, effects=drawn)
    change, _ = change_of(both, 1, False, info.is_share)
    effect, drawn_effect = change_of(both, 1, info.is_relative, info.is_share)
    if not info.is_tested:
        change, effect = (Interval.normal(known.estimate, float("nan")) for known in (change, effect))
    return replace(bare, change=change, effect=effect, p_value=change.p_value, effects=drawn_effect)


def _closed_form(setting: Setting, measure: Measure, pairs: list[Pair], value: float, reference: float) -> Comparison:
    """As :func:`compare`, with the standard errors that a run's rows hold.

    Over seeds, standard errors are averaged: one test set's error is nearly the same in all, so averaging runs does not
    shrink it.
    """
    errors = [pair.estimate.closed_form[:, pair.position] for pair in pairs if pair.estimate.closed_form is not None]
    stderr, change_stderr = (float(error) for error in np.mean(errors, axis=0))
    bare = Comparison(value, stderr, reference, len(pairs))
    if setting == FULL:
        return bare
    change = Interval.normal(value - reference, change_stderr)
    effect = relative(change, reference) if measure.info.is_relative else change
    return replace(bare, change=change, effect=effect, p_value=change.p_value)


def tested_gain(measure: Measure, comparison: Comparison) -> float:
    """By how much a setting is better than full precision by the change that is tested (see ``Metric.tested_by``)."""
    change = 0.0 if comparison.change is None else comparison.change.estimate
    return measure.info.gain(comparison.reference, comparison.reference + change)


def relative(change: Interval, reference: float) -> Interval:
    """Delta from a change, the reference taken as known."""
    if reference == 0:
        return Interval.normal(float("nan"), float("nan"))
    return Interval.normal(-change.estimate / reference, change.stderr / abs(reference))


def over_samples(estimate: float, replicates: Array) -> Interval:
    """What an estimate's replicates say of it; those that are not finite are left out, as in every standard error."""
    return Interval.normal(estimate, deviation(replicates))


def beyond(replicates: Array, stderr: float) -> float:
    """The part of a standard error that replicates ``[R]`` do not show: all of it where there are none; variances add up."""
    return stderr if not len(replicates) else float(max(stderr**2 - deviation(replicates) ** 2, 0.0) ** 0.5)


def average_effect(comparisons: list[Comparison]) -> Interval:
    """Mean effect of several comparisons of one measure.

    Replicates of all comparisons come from the same resamples, so the interval accounts for their common test images. Where there are
    none, the comparisons' errors count as one and the same, which is the most that they can be.
    """
    effects = [(c.effect, c.effects) for c in comparisons if c.effect]
    if not all(len(drawn) for _, drawn in effects):
        estimates, errors = zip(*((own.estimate, own.stderr) for own, _ in effects))
        return Interval.normal(float(np.mean(estimates)), float(np.mean(errors)))
    common = over_samples(
        float(np.mean([own.estimate for own, _ in effects])), np.mean([drawn for _, drawn in effects], axis=0)
    )
    doubt = np.mean([beyond(drawn, own.stderr) for own, drawn in effects])  # of one sign, maybe
    return Interval.normal(common.estimate, float(np.hypot(common.stderr, doubt)))
