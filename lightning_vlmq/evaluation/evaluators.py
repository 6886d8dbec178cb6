"""From aligned records to estimates of every measure, one small evaluator per reliability dimension, composed in a list; and to rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.data.sets import spurious_pairs
from lightning_vlmq.evaluation.estimates import Estimate, average, combined, deviation
from lightning_vlmq.evaluation.measures import METRICS, Measure
from lightning_vlmq.evaluation.quantities import AlignedRuns, Ranked, SampleMean
from lightning_vlmq.evaluation.records import SampleMatrix
from lightning_vlmq.metrics.functional import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    added_vulnerability,
    mean_corruption_error,
    relative_change,
    relative_mean_corruption_error,
    relative_spurious_gap,
)
from lightning_vlmq.metrics.scores import OOD_SCORES, score_name

log = logging.getLogger(__name__)

Estimates = dict[Measure, Estimate]


class Evaluator(Protocol):
    """Estimates the measures of one reliability dimension. What it is set to is part of a run's identity: make it a frozen dataclass."""

    def estimates(self, runs: AlignedRuns) -> Estimates:
        """Every measure that the runs' sets allow and ``runs.wanted`` asks for."""
        ...


@dataclass(frozen=True)
class ClassificationEvaluator:
    """Every metric of :data:`~.measures.METRICS` that follows from records, on every labelled set, and its mean over each role's sets."""

    def estimates(self, runs: AlignedRuns) -> Estimates:
        """Measures of each set and of each role (``dataset=""``)."""
        found: Estimates = {}
        for role in (name for name in ROLES if not ROLES[name].is_ood):
            for name in METRICS:
                kind = METRICS[name].of
                if kind is None or not runs.wanted(name, role, ""):
                    continue
                own = {_measure(name, s): runs.estimate(s, kind) for s in runs.of_role(role)}
                found |= own | _mean(Measure(name, role), own)
        for s in runs.sets:  # originals of corrupted sets: a line of their own, in no mean
            if s not in runs.of_role(s.where.role):
                found[_measure("top1", s)] = runs.estimate(s, _top1())
        return found


@dataclass(frozen=True)
class OODEvaluator:
    """Out-of-distribution detection: every OOD set against the in-distribution sets, for every score.

    Attributes:
        scores: the score columns to evaluate; all that were recorded if not given.
    """

    scores: tuple[str, ...] | None = None

    def estimates(self, runs: AlignedRuns) -> Estimates:
        """AUROC, AUPR and FPR95 of each set and score, and the means over each role's sets for the main score."""
        found: Estimates = {}
        inside = runs.of_role("id")
        if not inside:
            return found
        scores = self.scores or recorded_scores(inside)
        main = main_score(scores)
        for role in (name for name in ROLES if ROLES[name].is_ood):
            by_metric: dict[str, Estimates] = {}
            for s in runs.of_role(role):
                for score in (score for score in scores if score in s):
                    parts = {"auroc": runs.auroc(inside, s, score)} if runs.wanted("auroc", role, score) else {}
                    if runs.wanted("aupr_in", role, score):
                        parts |= runs.rankings(inside, s, score)
                    for name, estimate in parts.items():
                        measure = Measure(name, role, s.where.dataset, score)
                        found[measure] = estimate
                        if score == main:
                            by_metric.setdefault(name, {})[measure] = estimate
            for name, own in by_metric.items():
                found |= _mean(Measure(name, role, "", main), own)
        return found


@dataclass(frozen=True)
class SpuriousEvaluator:
    """Reliance on a spurious cue: accuracy on the sets ``<pair>_common`` against ``<pair>_counter``, and their means over pairs."""

    def estimates(self, runs: AlignedRuns) -> Estimates:
        """``common``, ``counter``, the relative spurious gap ``rsg`` and the added vulnerability ``vuln_add``."""
        found: Estimates = {}
        by_metric: dict[str, Estimates] = {}
        sets = {s.where.dataset: s for s in runs.of_role("spurious")}
        for pair, names in spurious_pairs(sets).items():
            common, counter = (runs.estimate(sets[name], _top1()) for name in names)
            parts = {"common": common, "counter": counter, "rsg": combined(relative_spurious_gap, common, counter)}
            parts["vuln_add"] = combined(_vulnerability, common, counter)
            for name, estimate in parts.items():
                by_metric.setdefault(name, {})[Measure(name, "spurious", pair)] = estimate
        for name, own in by_metric.items():
            found |= own | _mean(Measure(name, "spurious"), own)
        return found


@dataclass(frozen=True)
class CorruptionEvaluator:
    """Mean corruption error (Hendrycks & Dietterich 2019) of each suite of corrupted sets.

    A suite is the sets called ``<suite>_<corruption>_<severity>``; those without a suite's name are called ``corruptions``. A severity
    counts if every corruption of the suite has it. Not to be taken for the maximum calibration error, MCE.

    Attributes:
        baseline: whose errors the model's are divided by: the full-precision ``reference``'s, or ``alexnet``'s published ones on
            ImageNet-C, as in published tables; the metrics' names then end in ``_alexnet``.
    """

    baseline: Literal["reference", "alexnet"] = "reference"

    def estimates(self, runs: AlignedRuns) -> Estimates:
        """``mean_corruption_error``, and ``relative_mean_corruption_error`` where the originals are there (severity 0 of the group).

        NaN, with a warning, where what the errors are divided by is not more than twice its standard error above 0.
        """
        published = self.baseline == "alexnet"
        found: Estimates = {}
        if not runs.wanted("mean_corruption_error", "corruption", ""):
            return found
        for suite, sets in _suites(runs.of_role("corruption")).items():
            names = dict.fromkeys(corruption for corruption, _ in sets)
            corruptions = [c for c in names if c in ALEXNET_ERRORS or not published]
            severities = [s for s in range(1, 6) if all((c, s) in sets for c in corruptions)]
            if not corruptions or not severities:
                continue
            chosen = [sets[c, s] for c in corruptions for s in severities]
            errors = _errors(runs, chosen, (len(corruptions), len(severities)))
            if published:
                means = torch.tensor([ALEXNET_ERRORS[c] for c in corruptions], dtype=torch.float64)
                baseline = means.unsqueeze(1).expand(errors.shape)
            else:
                baseline = errors[:, :1].expand(errors.shape)
            n, kinds = sum(s.n for s in chosen), {"mean_corruption_error": mean_corruption_error(errors, baseline)}
            divisors = {"mean_corruption_error": baseline.sum(-1)}
            original = _original(runs, chosen[0])
            if original is not None:
                clean = _errors(runs, [original], (1, 1))[..., 0, 0]
                clean_baseline = (
                    torch.full_like(clean, ALEXNET_CLEAN_ERROR) if published else clean[:, :1].expand_as(clean)
                )
                name = "relative_mean_corruption_error"
                kinds[name] = relative_mean_corruption_error(errors, baseline, clean, clean_baseline)
                divisors[name] = (baseline - clean_baseline[..., None, None]).sum(-1)
            for name, ratios in kinds.items():
                doubtful = [
                    c for c, divisor in zip(corruptions, divisors[name][:, 0].unbind(-1)) if not _is_positive(divisor)
                ]
                if doubtful:
                    log.warning(
                        "%s of %s is undefined: the baseline loses nothing that can be told from 0 on %s",
                        name,
                        suite,
                        ", ".join(doubtful),
                    )
                    ratios = torch.full_like(ratios, torch.nan)
                metric = f"{name}_alexnet" if published else name
                found[Measure(metric, "corruption", suite)] = Estimate(ratios[0].numpy(), ratios[1:].numpy(), n)
        return found


def default_evaluators() -> list[Evaluator]:
    """All dimensions."""
    return [ClassificationEvaluator(), OODEvaluator(), CorruptionEvaluator(), SpuriousEvaluator()]


def estimate_all(runs: AlignedRuns, evaluators: Sequence[Evaluator] | None = None) -> Estimates:
    """Estimates of every measure, in the evaluators' order; of all default ones if none are given."""
    found: Estimates = {}
    for evaluator in default_evaluators() if evaluators is None else evaluators:
        found |= evaluator.estimates(runs)
    return found


def recorded_scores(sets: Sequence[SampleMatrix]) -> tuple[str, ...]:
    """Names of the OOD scores that every set holds of every run."""
    return tuple(name for name in sets[0].scores if score_name(name) in OOD_SCORES and all(name in s for s in sets))


def main_score(scores: Sequence[str]) -> str:
    """The score that stands for OOD detection in summaries: ``mcm`` where recorded, else the first one; empty without any."""
    return "mcm" if "mcm" in scores else next(iter(scores), "")


def _top1() -> SampleMean | Ranked:
    kind = METRICS["top1"].of
    assert kind is not None
    return kind


def _measure(metric: str, s: SampleMatrix) -> Measure:
    where = s.where
    return Measure(metric, where.role, where.dataset, "", where.corruption, where.severity)


def _mean(measure: Measure, parts: Estimates) -> Estimates:
    return {measure: average({part.dataset: estimate for part, estimate in parts.items()})} if parts else {}


def _vulnerability(common: Tensor, counter: Tensor) -> Tensor:
    """Added vulnerability of each run against the first, ``[..., k]``; 0 for the first itself."""
    return added_vulnerability(*(relative_change(accuracy[..., :1], accuracy) for accuracy in (counter, common)))


def _errors(runs: AlignedRuns, sets: Sequence[SampleMatrix], shape: tuple[int, int]) -> Tensor:
    """Top-1 errors ``[1 + R, k, corruptions, severities]``: as they are, then on every resample."""
    found = [runs.estimate(s, _top1()) for s in sets]
    return 1 - torch.from_numpy(np.stack([np.vstack([e.value, e.replicates]) for e in found], -1)).unflatten(-1, shape)


def _is_positive(divisor: Tensor) -> bool:
    """Whether ``[1 + R]`` is clearly above 0."""
    return bool(divisor[0] > max(2 * deviation(divisor[1:].numpy()), 1e-12))


def _original(runs: AlignedRuns, corrupted: SampleMatrix) -> SampleMatrix | None:
    """The uncorrupted images that a corrupted set was made of."""
    for s in runs.sets:
        where, is_whole = s.where, s.n == corrupted.n and s.where.severity == 0 and s.where.role in ("id", "corruption")
        if where.group == corrupted.where.group != "" and is_whole and np.array_equal(_targets(s), _targets(corrupted)):
            return s
    return None


def _targets(s: SampleMatrix) -> NDArray[np.int64]:
    return next(iter(s.tables.values()))["target"]


def _suites(sets: Iterable[SampleMatrix]) -> dict[str, dict[tuple[str, int], SampleMatrix]]:
    """The corrupted sets by suite, then by corruption and severity."""
    suites: dict[str, dict[tuple[str, int], SampleMatrix]] = {}
    for s in sets:
        where = s.where
        suite = where.dataset.removesuffix(f"{where.corruption}_{where.severity}").strip("_") or "corruptions"
        suites.setdefault(suite, {})[where.corruption, where.severity] = s
    return suites
