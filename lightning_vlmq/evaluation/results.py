"""From the records of judged variants to result rows."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.evaluation.classwise import classwise_estimates
from lightning_vlmq.evaluation.evaluators import Evaluator, Row, estimate_all, rows_of
from lightning_vlmq.evaluation.judged import Variant
from lightning_vlmq.evaluation.quantities import AlignedRuns
from lightning_vlmq.evaluation.records import EvaluationSet, SampleMatrix
from lightning_vlmq.statistics import Statistics


def rows_by_variant(
    variants: Sequence[Variant], sets: Sequence[EvalSet], evaluators: Sequence[Evaluator], settings: Statistics
) -> list[list[Row]]:
    """The rows of each variant, all evaluated together; those after the first are compared with the first.

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
    return [rows_of(estimates, run, 0 if run else None) for run in range(len(variants))]
