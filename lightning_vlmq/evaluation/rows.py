"""From estimates to a run's results: each measure, and its change against full precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lightning_vlmq.evaluation.estimates import Array, Estimate, standard_error
from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.metrics.functional import relative_change
from lightning_vlmq.statistics import Interval


@dataclass(frozen=True)
class Row:
    """One result: a metric of one model on one data set (empty: the mean over a role's), its standard error, its number of samples."""

    dataset: str
    role: str
    metric: str
    value: float
    stderr: float
    n: int
    corruption: str = ""
    severity: int = 0
    score: str = ""


def rows_of(estimates: Mapping[Measure, Estimate], run: int, is_compared: bool) -> list[Row]:
    """A run's results: each measure, and its change ``delta_<metric>`` against the first run where it is compared with that.

    Args:
        estimates: of aligned runs, the first of which is full precision where any is compared.
        run: the run's number.
        is_compared: whether it has a reference: ``False`` for full precision itself.
    """
    rows: list[Row] = []
    for measure, estimate in estimates.items():
        if measure.info.needs_reference and not is_compared:
            continue
        info = measure.info
        rows.append(_row(measure, measure.metric, estimate.value[run], estimate.stderr(run, info.is_share), estimate.n))
        if is_compared and not info.needs_reference:
            found, _ = change(estimate, run, info.is_relative, info.is_share)
            rows.append(_row(measure, f"delta_{measure.metric}", found.estimate, found.stderr, estimate.n))
    return rows


def change(estimate: Estimate, run: int, is_relative: bool, is_share: bool) -> tuple[Interval, Array]:
    """A run's change against the first one, relative, (A_f - A_q) / A_f, or the difference q - f; and its replicates.

    Its standard error is that of the replicates (:func:`~.estimates.standard_error`) and of what they do not show, see
    :class:`~.estimates.Estimate`.
    """
    pairs = [(values[..., 0], values[..., run]) for values in (estimate.value, estimate.replicates)]
    doubt, scale = 0.0 if estimate.doubt is None else float(estimate.doubt[run]), 1.0
    if is_relative:
        value, replicates = (relative_change(*map(torch.as_tensor, pair)).numpy() for pair in pairs)
        scale = 1 / abs(float(pairs[0][0])) if pairs[0][0] else float("nan")
    else:
        value, replicates = (after - before for before, after in pairs)
    spread = standard_error(replicates, is_share, estimate.n_least or estimate.n, scale)
    return Interval.normal(float(value), float(np.hypot(spread, scale * doubt))), replicates


def _row(measure: Measure, metric: str, value: float, stderr: float, n: int) -> Row:
    place = {"corruption": measure.corruption, "severity": measure.severity, "score": measure.score}
    return Row(measure.dataset, measure.role, metric, float(value), stderr, n, **place)  # type: ignore[arg-type]


def headline(rows: Sequence[Row]) -> dict[str, float]:
    """The few numbers to read first, ``<role>/<metric>``: means over a role's data sets, of the main OOD score."""
    wanted = {
        "id": ("top1", "ece", "nll", "agreement"),
        "near_ood": ("auroc", "fpr95"),
        "far_ood": ("auroc", "fpr95"),
        "corruption": ("top1", "ece"),
        "shift": ("top1", "ece"),
        "spurious": ("rsg", "delta_rsg", "vuln_add"),
    }
    means = {(row.role, row.metric): row.value for row in rows if row.dataset == ""}
    return {
        f"{role}/{name}": means[role, name] for role, names in wanted.items() for name in names if (role, name) in means
    }
