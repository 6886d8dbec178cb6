"""Evaluating made-up records as a run is evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_vlmq.data import EvalSet
from lightning_vlmq.evaluation.evaluators import Evaluator, estimate_all
from lightning_vlmq.evaluation.quantities import AlignedRuns
from lightning_vlmq.evaluation.records import EvaluationSet, SampleMatrix
from lightning_vlmq.evaluation.rows import Row, rows_of
from lightning_vlmq.statistics import Statistics

PUBLISHED = Statistics()
Records = Mapping[str, Mapping[str, Tensor]]


def aligned(sets: Sequence[EvalSet], *runs: Records, settings: Statistics = PUBLISHED) -> AlignedRuns:
    matrices = []
    for s in sets:
        where = EvaluationSet(s.name, s.role, s.corruption, s.severity, s.group)
        tables = {k: {name: c.numpy() for name, c in run[s.name].items()} for k, run in enumerate(runs)}
        matrices.append(SampleMatrix(where, tables, len(runs)))
    return AlignedRuns(matrices, settings)


def rows(
    evaluator: Evaluator,
    sets: Sequence[EvalSet],
    records: Records,
    reference: Records | None,
    settings: Statistics = PUBLISHED,
    means: bool = False,
) -> list[Row]:
    """A run's rows beside a reference; without those of means over a role unless they are asked for."""
    runs = [records] if reference is None else [reference, records]
    found = rows_of(
        estimate_all(aligned(sets, *runs, settings=settings), [evaluator]),
        len(runs) - 1,
        reference is not None,
    )
    return [row for row in found if means or row.dataset]
