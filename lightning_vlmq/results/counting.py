"""Results counted as the published study counts: a model on one data-set configuration under one score is an evaluation run."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from lightning_vlmq.core.roles import ROLES

COUNTED = ("top1", "auroc")
"""Metrics that every set has a row of: a labelled one of the first, an OOD set of the second for each of its scores."""


def evaluations_a_model(roles: Iterable[str], n_scores: int) -> int:
    """Evaluation runs of one model: a labelled set counts once, an OOD set once for each OOD score.

    Args:
        roles: of the evaluation sets, one entry a set.
        n_scores: number of OOD scores.
    """
    return sum(n_scores if ROLES[role].is_ood else 1 for role in roles)


def evaluations_in(rows: pd.DataFrame | pa.Table) -> int:
    """Evaluation runs that results rows hold: distinct runs, sets and scores (a tuned logit scale makes another run)."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pandas(rows[_COLUMNS], preserve_index=False)
    is_counted = pc.and_(pc.is_in(table["metric"], value_set=pa.array(COUNTED)), pc.not_equal(table["dataset"], ""))
    own = table.select(_COLUMNS).filter(is_counted).drop_columns(["metric"])
    return int(own.group_by(own.column_names).aggregate([]).num_rows)


_COLUMNS = ["run_id", "dataset", "score", "metric"]
