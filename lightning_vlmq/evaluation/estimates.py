"""Estimates of every measure with bootstrap replicates.

Every estimate is an array over the runs of one VLM, the full-precision run first. Replicates of all runs, and of all
data sets of equal size, come from the same resamples, so that differences and averages of replicates are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lightning_vlmq.evaluation.measures import N_BINS, N_RESAMPLES, N_RESAMPLES_SLOW, RISK, Measure
from lightning_vlmq.evaluation.records import SampleMatrix
from lightning_vlmq.metrics.functional import (
    added_vulnerability,
    aupr_in,
    aupr_out,
    aurc,
    auroc,
    calibration_error,
    coverage_at_risk,
    fpr95,
    fpr95_openood,
    relative_change,
    relative_spurious_gap,
)
from lightning_vlmq.statistics import (
    DeLongResult,
    RankingMetrics,
    bootstrap_means,
    confidence_metrics,
    delong,
    ranking_metrics,
    resample_counts,
)

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A measure on ``k`` runs, the first of which is full precision.

    Attributes:
        value: ``[k]``, NaN where a run lacks a data set.
        replicates: ``[R, k]``; empty (``R = 0``) where there is a closed form.
        closed_form: ``[2, k]``, standard errors of the value and of its difference to the first run, where they need no
            resampling.
    """

    value: Array
    replicates: Array
    closed_form: Array | None = None


def estimate_all(sets: Mapping[str, list[SampleMatrix]], seed: int = 0) -> dict[Measure, Estimate]:
    """Every measure that the data sets at hand allow.

    Args:
        sets: aligned samples by role, see :func:`~lightning_vlmq.study.analysis.runs.align`.
        seed: seed of the resamples.

    Returns:
        Estimates by measure, in display order.
    """
    estimates: dict[Measure, Estimate] = {}
    for role in ("id", "corruption", "shift"):
        if role in sets:
            changed = [matrix for matrix in sets[role] if role != "corruption" or matrix.where.severity]
            if changed:
                estimates |= _classification(role, changed, seed)
    if "id" in sets:
        estimates |= _confidence(sets["id"], seed)
        for role in ("near_ood", "far_ood"):
            if role in sets:
                estimates |= _detection(role, sets["id"], sets[role], seed)
    estimates |= _spurious(sets.get("spurious", []), seed)
    return estimates


def main_score(matrix: SampleMatrix) -> str | None:
    """The score that stands for OOD detection in summaries: ``mcm`` where recorded, else the first one."""
    scores = matrix.scores
    return "mcm" if "mcm" in scores else next(iter(scores), None)


def stored_estimates(rows: pd.DataFrame, run_ids: Sequence[str]) -> dict[Measure, Estimate]:
    """Measures that the samples do not hold but the rows do, with the standard errors that are stored: class-wise ECE.

    Args:
        rows: results rows.
        run_ids: the runs, full precision first.
    """
    own = rows[(rows["role"] == "id") & rows["metric"].isin(["classwise_ece", "delta_classwise_ece"])]
    means = own.groupby(["metric", "run_id"])[["value", "stderr"]].mean()  # over sets, of which there is one as a rule
    value, stderr, change = (np.full(len(run_ids), np.nan) for _ in range(3))
    for k, run_id in enumerate(run_ids):
        if ("classwise_ece", run_id) in means.index:
            value[k], stderr[k] = means.loc[("classwise_ece", run_id)]
        if ("delta_classwise_ece", run_id) in means.index:  # relative to full precision's value
            change[k] = means.loc[("delta_classwise_ece", run_id), "stderr"] * value[0]
    if np.isnan(value).all():
        return {}
    return {Measure("classwise_ece", "id"): Estimate(value, np.empty((0, len(value))), np.stack([stderr, change]))}


def _means(columns: Array, seed: int) -> Array:
    return bootstrap_means(torch.from_numpy(columns), N_RESAMPLES, seed).numpy()


def _average(parts: list[Estimate]) -> Estimate:
    """Mean over data sets; where they have the same size, their samples were resampled together."""
    return Estimate(
        np.mean([part.value for part in parts], axis=0), np.mean([part.replicates for part in parts], axis=0)
    )


def _classification(role: str, matrices: list[SampleMatrix], seed: int) -> dict[Measure, Estimate]:
    by_metric: dict[str, list[Estimate]] = {}
    for matrix in matrices:
        prediction = matrix["prediction"]
        agreed = np.where(np.isnan(prediction), np.nan, (prediction == prediction[:, :1]) & (prediction >= 0))
        columns = {"top1": matrix["correct"], "top5": matrix["correct_top5"], "agreement": agreed}
        columns |= {"brier": matrix["brier"], "nll": matrix["nll"]}
        gaps = calibration_gaps(matrix["confidence"], columns["top1"])
        k = matrix.n_runs
        replicates = _means(np.concatenate([*columns.values(), gaps.reshape(matrix.n, -1)], axis=1), seed)
        for position, (metric, column) in enumerate(columns.items()):
            part = replicates[:, position * k : (position + 1) * k]
            by_metric.setdefault(metric, []).append(Estimate(column.mean(0), part))
        binned = replicates[:, len(columns) * k :].reshape(-1, k, N_BINS + 1)
        by_metric.setdefault("ece", []).append(Estimate(np.abs(gaps.mean(0)).sum(-1), np.abs(binned).sum(-1)))
    return {Measure(metric, role): _average(parts) for metric, parts in by_metric.items()}


def calibration_gaps(confidence: Array, correct: Array) -> Array:
    """What each sample adds to its bin's gap: ECE is the sum over bins of the mean's absolute value.

    Args:
        confidence: ``[n, k]`` in [0, 1], NaN for runs without the data set.
        correct: ``[n, k]``, 0 or 1.

    Returns:
        ``[n, k, 16]``: correct minus confidence in the sample's bin, 0 in the others; the bins are those of
        :func:`~lightning_vlmq.metrics.functional.equal_width_bin_sums`. NaN throughout where confidence is NaN.
    """
    # float32 like the stored column, so that a confidence on an edge falls on the side the metric puts it
    edges = torch.linspace(0, 1, N_BINS + 1, dtype=torch.float32)
    stored = torch.from_numpy(np.nan_to_num(confidence)).to(torch.float32)
    bins = torch.bucketize(stored, edges, right=True).numpy() - 1
    gaps = np.where(np.isnan(confidence)[..., None], np.nan, np.zeros((*confidence.shape, N_BINS + 1)))
    np.put_along_axis(gaps, bins[..., None], (correct - confidence)[..., None], axis=-1)
    return gaps


def _confidence(matrices: list[SampleMatrix], seed: int) -> dict[Measure, Estimate]:
    """Metrics of the confidences' order, one run at a time."""

    def of_run(confidence: NDArray[np.float32], correct: NDArray[np.bool_]) -> tuple[Array, Array]:
        columns = torch.from_numpy(confidence), torch.from_numpy(correct)
        values = [calibration_error(*columns, N_BINS, binning="mass"), calibration_error(*columns, N_BINS, "max")]
        values += [aurc(*columns), coverage_at_risk(*columns, RISK)]
        drawn = confidence_metrics(confidence, correct, _counts(len(confidence), seed), N_BINS, RISK)
        replicates = drawn.adaptive_ece, drawn.mce, drawn.aurc, drawn.coverage_at_risk
        return torch.stack(values).numpy(), np.stack(replicates, axis=1)

    names = ("adaptive_ece", "mce", "aurc", "coverage_at_risk_5")
    parts = []
    for matrix in matrices:
        value = np.full((matrix.n_runs, len(names)), np.nan)
        replicates = np.full((N_RESAMPLES_SLOW, matrix.n_runs, len(names)), np.nan)
        for run, table in matrix.tables.items():
            value[run], replicates[:, run] = of_run(table["confidence"].copy(), table["correct"].copy())
        parts.append((value, replicates))
    return {
        Measure(name, "id"): _average([Estimate(value[:, k], drawn[:, :, k]) for value, drawn in parts])
        for k, name in enumerate(names)
    }


def _detection(
    role: str, id_sets: list[SampleMatrix], ood_sets: list[SampleMatrix], seed: int
) -> dict[Measure, Estimate]:
    main = main_score(id_sets[0])
    averaged: dict[str, list[Estimate]] = {name: [] for name in RankingMetrics._fields}
    closed_form: dict[Measure, Estimate] = {}
    for ood in ood_sets:
        for score in ood.scores:
            if not all(score in id_set for id_set in id_sets):
                continue
            id_scores, ood_scores = np.concatenate([id_set[score] for id_set in id_sets]), ood[score]
            closed_form[Measure("auroc", role, ood.where.dataset, score)] = _delong(id_scores, ood_scores)
            if score == main:
                for name, estimate in _ranking(id_scores, ood_scores, seed).items():
                    averaged[name].append(estimate)
    means = {Measure(name, role, "", main or ""): _average(parts) for name, parts in averaged.items() if parts}
    return means | closed_form


def _delong(id_scores: Array, ood_scores: Array) -> Estimate:
    """AUROC of each run with DeLong's standard errors, and those of the difference to the first run."""
    ids, oods = torch.from_numpy(id_scores), torch.from_numpy(ood_scores)
    results: list[DeLongResult] = []
    for k, twin in enumerate(_twins(np.concatenate([id_scores, ood_scores]))):
        results.append(results[twin] if twin < k else delong(ids[:, 0], oods[:, 0], ids[:, k], oods[:, k]))
    return Estimate(
        value=np.array([result.auroc_q for result in results]),
        replicates=np.empty((0, len(results))),
        closed_form=np.array([[result.stderr_q for result in results], [result.stderr for result in results]]),
    )


def _twins(columns: Array) -> list[int]:
    """The first run whose column of ``[n, k]`` is the same: a tuned logit scale leaves many scores as they are."""
    first: dict[bytes, int] = {}
    return [first.setdefault(column.tobytes(), k) for k, column in enumerate(columns.T)]


@cache
def _counts(n: int, seed: int, stream: int = 0) -> NDArray[np.float32]:
    return resample_counts(n, N_RESAMPLES_SLOW, seed, stream)


def _ranking(id_scores: Array, ood_scores: Array, seed: int) -> dict[str, Estimate]:
    statistics = {"auroc": auroc, "aupr_in": aupr_in, "aupr_out": aupr_out}
    statistics |= {"fpr95": fpr95, "fpr95_openood": fpr95_openood}
    ids, oods = torch.from_numpy(id_scores.T.copy()), torch.from_numpy(ood_scores.T.copy())
    # ID and OOD sets are independent samples, so they get independent resamples
    counts = _counts(len(id_scores), seed), _counts(len(ood_scores), seed, 1)
    drawn: list[RankingMetrics] = []
    for k, twin in enumerate(_twins(np.concatenate([id_scores, ood_scores]))):
        drawn.append(drawn[twin] if twin < k else ranking_metrics(id_scores[:, k], ood_scores[:, k], *counts))
    return {
        name: Estimate(statistic(ids, oods).numpy(), np.stack([getattr(d, name) for d in drawn], axis=1))
        for name, statistic in statistics.items()
    }


def _spurious(matrices: list[SampleMatrix], seed: int) -> dict[Measure, Estimate]:
    by_name = {matrix.where.dataset: matrix for matrix in matrices}
    parts: dict[str, list[Estimate]] = {name: [] for name in ("common", "counter", "rsg", "vuln_add")}
    for name, common_set in by_name.items():
        counter_set = by_name.get(name.removesuffix("_common") + "_counter")
        if not name.endswith("_common") or counter_set is None:
            continue
        correct = {"common": common_set["correct"], "counter": counter_set["correct"]}
        common, counter = (Estimate(column.mean(0), _means(column, seed)) for column in correct.values())
        parts["common"].append(common)
        parts["counter"].append(counter)
        gaps = _gap(common.value, counter.value), _gap(common.replicates, counter.replicates)
        parts["rsg"].append(Estimate(*gaps))
        parts["vuln_add"].append(
            Estimate(_vulnerability(common.value, counter.value), _vulnerability(common.replicates, counter.replicates))
        )
    return {Measure(name, "spurious"): _average(found) for name, found in parts.items() if found}


def _gap(common: Array, counter: Array) -> Array:
    return relative_spurious_gap(torch.from_numpy(common), torch.from_numpy(counter)).numpy()


def _vulnerability(common: Array, counter: Array) -> Array:
    """Added vulnerability of each run against the first, ``[..., k]``; 0 for the first itself."""
    delta = [
        relative_change(torch.from_numpy(accuracy[..., :1].copy()), torch.from_numpy(accuracy))
        for accuracy in (counter, common)
    ]
    return added_vulnerability(*delta).numpy()
