"""From the records of judged variants to result rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.evaluation.about import model_rows
from lightning_vlmq.evaluation.classwise import classwise_estimates
from lightning_vlmq.evaluation.evaluators import Evaluator, estimate_all
from lightning_vlmq.evaluation.judged import Judged, Records, Variant
from lightning_vlmq.evaluation.quantities import AlignedRuns
from lightning_vlmq.evaluation.records import EvaluationSet, SampleMatrix
from lightning_vlmq.evaluation.rows import Row, rows_of
from lightning_vlmq.statistics import Statistics

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """What a validation found.

    Attributes:
        rows: the judged model's results, compared with full precision where there is one beside it.
        tuned_rows: the same with the logit scale tuned; empty where it was not.
        records: per-sample columns by data set.
        reference_records: full precision's, or ``None``.
        tuned_records: with the logit scale tuned, or ``None``.
    """

    rows: list[Row]
    tuned_rows: list[Row]
    records: Records
    reference_records: Records | None
    tuned_records: Records | None


def outcome(
    judged: Judged,
    reference: Judged | None,
    sets: Sequence[EvalSet],
    evaluators: Sequence[Evaluator],
    settings: Statistics,
) -> Outcome:
    """Rows of what a model and its full-precision reference have gathered."""
    variants = [*([reference.own] if reference else []), *judged.variants]
    rows = dict(zip(map(id, variants), rows_by_variant(variants, sets, evaluators, settings)))
    tuned = judged.tuned
    return Outcome(
        rows[id(judged.own)],
        [] if tuned is None else rows[id(tuned)],
        judged.own.records,
        None if reference is None else reference.own.records,
        None if tuned is None else tuned.records,
    )


def rows_by_variant(
    variants: Sequence[Variant], sets: Sequence[EvalSet], evaluators: Sequence[Evaluator], settings: Statistics
) -> list[list[Row]]:
    """The rows of each variant and its logit scale, all evaluated together; those after the first are compared with the first.

    Args:
        variants: gathered; the first is full precision as it came.
        sets: the evaluation sets.
        evaluators: what to make of the records.
        settings: the statistics' settings.
    """
    where = [EvaluationSet(s.name, s.role, s.corruption, s.severity, s.group) for s in sets]
    matrices = []
    for s in where:
        tables = [{name: column.numpy() for name, column in v.records[s.dataset].items()} for v in variants]
        matrices.append(SampleMatrix(s, dict(enumerate(tables)), len(variants)))
    estimates = estimate_all(AlignedRuns(matrices, settings), evaluators)
    estimates |= classwise_estimates(
        where, {name: [v.gaps[name] for v in variants] for name in variants[0].gaps}, settings
    )
    facts = [{"logit_scale": v.scale.scale, "logit_bias": v.scale.bias, "pairs_nll": v.pairs_nll} for v in variants]
    return [rows_of(estimates, run, is_compared=run > 0) + model_rows(sets, facts[run]) for run in range(len(variants))]
