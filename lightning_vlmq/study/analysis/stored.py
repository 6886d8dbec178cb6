"""Comparisons from the rows of runs alone: of studies too large for all their samples, and of runs whose samples were not kept.

A row holds a measure and its standard error, its ``delta_`` row the change against full precision and its own, from the paired bootstrap
of the run itself; so values, intervals and tests are those of :func:`~.change.compare` (to first order where a change is relative, see
:func:`change_error`). What rows do not hold are the resamples, which say
how the estimates of several VLMs on the same images vary together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from lightning_vlmq.evaluation.measures import METRICS, Measure
from lightning_vlmq.statistics import Interval
from lightning_vlmq.study.analysis.change import FULL, Comparison
from lightning_vlmq.study.analysis.runs import Setting, StudyResults, reference_of

Key = tuple[str, Setting, Measure]
_MEASURE = ["metric", "role", "dataset", "score"]


def comparisons_from_rows(results: StudyResults) -> tuple[dict[Key, Comparison], list[str]]:
    """Every measure of a role, and AUROC of every set and score, of every setting beside full precision.

    Over seeds, values and changes are averaged; so are standard errors, as one test set's error is nearly the same in all.

    Returns:
        The comparisons, p-values not yet corrected; and the VLMs that have no full-precision run.
    """
    rows, runs, unreferenced = results.rows, *_runs(results)
    shown = (rows["dataset"] == "") | ((rows["metric"].isin(["auroc", "delta_auroc"])) & (rows["role"] != "spurious"))
    own = rows.loc[shown, ["run_id", *_MEASURE, "value", "stderr"]]
    is_delta = own["metric"].str.startswith("delta_")
    values = own[~is_delta & own["metric"].isin(list(METRICS))]
    deltas = own[is_delta].assign(metric=own["metric"].str.removeprefix("delta_"))
    deltas = deltas.rename(columns={"value": "delta", "stderr": "delta_stderr"})
    references = values.rename(columns={"run_id": "reference", "value": "full", "stderr": "full_stderr"})
    joined = values.merge(runs, on="run_id")
    joined = joined.merge(references, on=["reference", *_MEASURE], how="left")
    joined = joined.merge(deltas, on=["run_id", *_MEASURE], how="left")
    by = ["vlm", "setting", *_MEASURE]
    means = joined.groupby(by, sort=False)[["value", "stderr", "full", "full_stderr", "delta", "delta_stderr"]].mean()
    means["n_seeds"] = joined.groupby(by, sort=False).size()
    return dict(_compared(means.reset_index(), results)), unreferenced


def _runs(results: StudyResults) -> tuple[pd.DataFrame, list[str]]:
    """By run: its VLM, the number of its setting (-1: full precision), and the full-precision run that it is compared with."""
    numbers = {setting: n for n, setting in enumerate(_settings(results))}
    lines, unreferenced = [], []
    for vlm in results.vlms:
        references, others = results.runs_of(vlm)
        if not references:
            unreferenced.append(vlm)
        for run in references:
            lines.append((run.run_id, vlm, -1, run.run_id))
        for run in others:
            if (reference := reference_of(run, references)) is not None:
                lines.append((run.run_id, vlm, numbers[run.setting], reference.run_id))
    return pd.DataFrame(lines, columns=["run_id", "vlm", "setting", "reference"]), unreferenced


def _settings(results: StudyResults) -> list[Setting]:
    return list(dict.fromkeys(run.setting for run in results.runs if not run.key.is_full_precision))


def _compared(means: pd.DataFrame, results: StudyResults) -> Iterator[tuple[Key, Comparison]]:
    settings, measures = _settings(results), dict[tuple[str, ...], Measure]()
    columns: Any = (means[name].to_list() for name in means.columns)
    for vlm, number, *named, value, stderr, full, full_stderr, delta, delta_stderr, n_seeds in zip(*columns):
        metric, role, dataset, score = named
        measure = measures.setdefault(tuple(named), Measure(metric, role, dataset, score))
        setting = FULL if number < 0 else settings[number]
        if np.isnan(value) or (setting.is_tuned and not measure.follows_logit_scale):
            continue
        info = measure.info
        bare = Comparison(value, stderr, full, int(n_seeds))
        if setting == FULL or (info.needs_reference and not info.is_tested):
            yield (vlm, setting, measure), bare
            continue
        if info.needs_reference:  # a comparison with full precision already
            change = effect = Interval.normal(value, stderr)
        else:
            error = delta_stderr if info.is_tested else float("nan")
            effect = Interval.normal(delta, error)
            change = effect
            if info.is_relative:
                change = Interval.normal(value - full, change_error(value, stderr, full, full_stderr, error))
        reference = 0.0 if info.needs_reference else full
        yield (
            (vlm, setting, measure),
            Comparison(value, stderr, reference, int(n_seeds), change, effect, change.p_value),
        )


def change_error(value: float, stderr: float, full: float, full_stderr: float, delta_stderr: float) -> float:
    """Standard error of ``value - full`` from that of ``delta = 1 - value / full`` and of the two, to first order.

    With ``r = value / full`` the delta method has ``full^2 var(delta) = var(value) + r^2 var(full) - 2 r cov``, which gives the
    covariance that ``var(value - full)`` needs.
    """
    ratio = value / full if full else 0.0
    if not ratio > 0:
        return delta_stderr * abs(full)
    variance = stderr**2 * (1 - 1 / ratio) + full_stderr**2 * (1 - ratio) + (full * delta_stderr) ** 2 / ratio
    return float(np.sqrt(max(variance, 0.0))) if not np.isnan(variance) else float("nan")
