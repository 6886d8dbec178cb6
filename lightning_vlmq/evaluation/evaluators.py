"""From per-sample records to results: one small evaluator a reliability dimension, composed in a list.

Records are the columns of :class:`~lightning_vlmq.metrics.SampleRecords`, per data set name, of the model under test and of the
full-precision reference on the same samples in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from lightning_vlmq import metrics, statistics
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.data.sets import EvalSet
from lightning_vlmq.evaluation.quantities import (
    Evaluator,
    Records,
    Resampled,
    Row,
    deviation,
    jackknife,
    quantity_rows,
    row_maker,
)


class ClassificationEvaluator:
    """Accuracy, agreement and calibration on every labelled set: dimensions 1, 2 and 4.

    Args:
        n_bins: bins of the calibration errors.
        risk: error rate at which coverage is reported; its percentage is part of the metric's name.
        n_resamples: bootstrap resamples behind the standard errors.
    """

    def __init__(self, n_bins: int = 15, risk: float = 0.05, n_resamples: int = 100) -> None:
        if n_bins < 1 or not 0 <= risk <= 1:
            raise VLMQError(f"need n_bins of at least 1 and a risk in [0, 1], got {n_bins} and {risk}")
        self.n_bins = n_bins
        self.risk = risk
        self.resampled = Resampled(n_resamples)

    def rows(self, sets: Sequence[EvalSet], records: Records, reference: Records | None) -> list[Row]:
        """``top1``, ``top5``, ``nll``, ``brier``, ``ece``, ``mce``, ``adaptive_ece``, ``aurc``, ``coverage_at_risk_5``.

        Against a reference also the ``delta_*`` of each, ``agreement``, ``flips`` (all changed predictions), ``flips_broken``
        (right to wrong) and ``flips_repaired`` (wrong to right).
        """
        rows: list[Row] = []
        for s in sets:
            if ROLES[s.role].is_ood:
                continue
            mine, make = self._quantities(records[s.name]), row_maker(s, len(records[s.name]["index"]))
            theirs = {} if reference is None else self._quantities(reference[s.name])
            for metric, quantity in mine.items():
                rows += quantity_rows(make, metric, quantity, theirs.get(metric))
            if reference is not None:
                changed = self.resampled.means(_changes(records[s.name], reference[s.name]))
                rows += [row for metric, quantity in changed.items() for row in quantity_rows(make, metric, quantity)]
        return rows

    def _quantities(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {"top1": "correct", "top5": "correct_top5", "nll": "nll", "brier": "brier"}
        found = self.resampled.means({metric: columns[name] for metric, name in names.items()})
        found |= self.resampled.confidences(columns["confidence"], columns["correct"], self.n_bins, self.risk)
        found[f"coverage_at_risk_{100 * self.risk:g}"] = found.pop("coverage_at_risk")
        return found


class OODEvaluator:
    """Out-of-distribution detection, dimension 3: every OOD set against the in-distribution set, for every score.

    Conventions are in the metrics' names: ``fpr95`` and ``aupr_in`` take ID as positive, ``fpr95_openood`` and ``aupr_out`` OOD.

    Args:
        scores: names of the score columns to evaluate; all that were recorded if not given.
        n_resamples: bootstrap resamples behind the standard errors; ID and OOD samples are resampled independently.
    """

    def __init__(self, scores: Sequence[str] | None = None, n_resamples: int = 100) -> None:
        self.scores = None if scores is None else tuple(scores)
        self.resampled = Resampled(n_resamples)

    def rows(self, sets: Sequence[EvalSet], records: Records, reference: Records | None) -> list[Row]:
        """``auroc``, ``aupr_in``, ``aupr_out``, ``fpr95``, ``fpr95_openood`` and their ``delta_*``."""
        inside = next(s.name for s in sets if s.role == "id")
        scores = self.scores or tuple(
            name for name in records[inside] if metrics.score_name(name) in metrics.OOD_SCORES
        )
        rows: list[Row] = []
        for s in sets:
            if not ROLES[s.role].is_ood:
                continue
            for score in scores:
                make = row_maker(s, len(records[s.name]["index"]), score=score)
                mine = self.resampled.rankings(records[inside][score], records[s.name][score])
                theirs = (
                    {}
                    if reference is None
                    else self.resampled.rankings(reference[inside][score], reference[s.name][score])
                )
                for metric, quantity in mine.items():
                    rows += quantity_rows(make, metric, quantity, theirs.get(metric))
        return rows


class SpuriousEvaluator:
    """Reliance on a spurious cue, dimension 5: accuracy on common against counter sets.

    ``rsg`` is the relative spurious gap, ``delta_rsg`` its difference to full precision's, ``vuln_add`` the added vulnerability.

    Args:
        n_resamples: bootstrap resamples behind the standard errors; the two sets are resampled independently.
    """

    def __init__(self, n_resamples: int = 100) -> None:
        self.resampled = Resampled(n_resamples)

    def rows(self, sets: Sequence[EvalSet], records: Records, reference: Records | None) -> list[Row]:
        """A row a pair of sets named ``<pair>_common`` and ``<pair>_counter``."""
        rows: list[Row] = []
        for pair in _pairs(sets):
            names = (f"{pair}_common", f"{pair}_counter")
            make = partial(Row, dataset=pair, role="spurious", n=sum(len(records[name]["index"]) for name in names))
            common, counter = self._accuracies(records, names)
            gap = metrics.relative_spurious_gap(common, counter)
            if reference is None:
                rows += quantity_rows(make, "rsg", gap)
                continue
            common_f, counter_f = self._accuracies(reference, names)
            gap_f = metrics.relative_spurious_gap(common_f, counter_f)
            rows += quantity_rows(make, "rsg", gap, gap_f, change=("delta_rsg", statistics.difference))
            changes = metrics.relative_change(counter_f, counter), metrics.relative_change(common_f, common)
            rows += quantity_rows(make, "vuln_add", metrics.added_vulnerability(*changes))
        return rows

    def _accuracies(self, records: Records, names: Sequence[str]) -> list[Tensor]:
        return [
            self.resampled.means({"top1": records[name]["correct"]}, stream)["top1"]
            for stream, name in enumerate(names)
        ]


class CorruptionEvaluator:
    """Mean corruption error, dimension 4 (Hendrycks & Dietterich 2019), of each suite of corrupted sets.

    A suite is the sets called ``<suite>_<corruption>_<severity>``; those without a suite's name are called ``corruptions``. A severity
    counts if every corruption of the suite has it. Not to be taken for the maximum calibration error, MCE.

    Args:
        baseline: whose errors the model's are divided by: the full-precision ``reference``'s (no rows without one), or ``alexnet``'s
            published ones on ImageNet-C, as in published tables; the metrics' names then end in ``_alexnet``.
        n_resamples: bootstrap resamples behind the standard errors; sets of the same size see the same ones.
        seed: seed of the resamples.
    """

    def __init__(
        self, baseline: Literal["reference", "alexnet"] = "reference", n_resamples: int = 100, seed: int = 0
    ) -> None:
        self.baseline = baseline
        self.resampled = Resampled(n_resamples, seed)

    def rows(self, sets: Sequence[EvalSet], records: Records, reference: Records | None) -> list[Row]:
        """``mean_corruption_error`` and ``relative_mean_corruption_error`` (beyond the id set's error) of each suite, as ratios."""
        published = self.baseline == "alexnet"
        inside = next((s.name for s in sets if s.role == "id"), None)
        if inside is None or (reference is None and not published):
            return []
        rows: list[Row] = []
        for suite, names in _suites(sets).items():
            corruptions = [
                c for c in dict.fromkeys(c for c, _ in names) if c in metrics.ALEXNET_ERRORS or not published
            ]
            severities = [s for s in range(1, 6) if all((c, s) in names for c in corruptions)]
            if not corruptions or not severities:
                continue
            chosen, shape = [names[c, s] for c in corruptions for s in severities], (len(corruptions), len(severities))
            errors, clean = self._errors(records, chosen, inside, shape)
            if published:
                base = torch.tensor([metrics.ALEXNET_ERRORS[c] for c in corruptions]).unsqueeze(1).expand(shape)
                base_clean = torch.tensor(metrics.ALEXNET_CLEAN_ERROR)
            else:
                assert reference is not None
                base, base_clean = self._errors(reference, chosen, inside, shape)
            found = {
                "mean_corruption_error": metrics.mean_corruption_error(errors, base),
                "relative_mean_corruption_error": metrics.relative_mean_corruption_error(
                    errors, base, clean, base_clean
                ),
            }
            n = sum(len(records[name]["index"]) for name in chosen)
            for metric, values in found.items():
                name = f"{metric}_alexnet" if published else metric
                rows.append(Row(suite, "corruption", name, float(values[0]), deviation(values[1:]), n))
        return rows

    def _errors(self, records: Records, names: list[str], inside: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Top-1 errors ``[1 + R, corruptions, severities]`` and clean ones ``[1 + R]``: as they are, then on every resample."""
        wrong = [~records[name]["correct"].bool() for name in (*names, inside)]
        errors = torch.empty(1 + self.resampled.n_resamples, len(wrong), dtype=torch.float64)
        for n in {len(column) for column in wrong}:
            at = [k for k, column in enumerate(wrong) if len(column) == n]
            columns = torch.stack([wrong[k] for k in at], 1).double()
            replicates = statistics.bootstrap_means(columns, self.resampled.n_resamples, self.resampled.seed)
            errors[:, at] = torch.cat([columns.mean(0, keepdim=True), replicates])
        return errors[:, :-1].unflatten(1, shape), errors[:, -1]


def default_evaluators() -> list[Evaluator]:
    """All dimensions with their default settings."""
    return [ClassificationEvaluator(), OODEvaluator(), CorruptionEvaluator(), SpuriousEvaluator()]


def classwise_rows(
    sets: Iterable[EvalSet], errors: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None
) -> list[Row]:
    """``classwise_ece`` and its change; jackknife standard errors, as its bins do not follow from per-sample records.

    Args:
        sets: the evaluation sets.
        errors: by data set, what :class:`~lightning_vlmq.metrics.ClasswiseJackknife` computes; sets that are not there have no row.
        reference: the same of full precision, or ``None``.
    """
    rows: list[Row] = []
    for s in sets:
        if s.name in errors:
            theirs = None if reference is None else reference[s.name]
            make = row_maker(s, len(s.images))
            rows += quantity_rows(make, "classwise_ece", errors[s.name], theirs, spread=jackknife)
    return rows


HEADLINES = {
    "id": ("top1", "ece", "nll", "agreement"),
    "near_ood": ("auroc", "fpr95"),
    "far_ood": ("auroc", "fpr95"),
    "corruption": ("top1", "ece", "mean_corruption_error"),
    "shift": ("top1", "ece"),
    "spurious": ("rsg", "delta_rsg", "vuln_add"),
}


def headline(rows: Sequence[Row]) -> dict[str, float]:
    """The few numbers to read first, ``<role>/<metric>``: means over a role's data sets (and OOD scores)."""
    found = {}
    for role, names in HEADLINES.items():
        for name in names:
            values = [row.value for row in rows if row.role == role and row.metric == name]
            if values:
                found[f"{role}/{name}"] = fmean(values)
    return found


def _pairs(sets: Iterable[EvalSet]) -> list[str]:
    names = {s.name for s in sets if s.role == "spurious"}
    pairs = sorted(name.removesuffix("_common") for name in names if name.endswith("_common"))
    lonely = names ^ {f"{pair}_{kind}" for pair in pairs for kind in ("common", "counter")}
    if lonely:
        raise VLMQError(
            f"spurious sets come in pairs <x>_common and <x>_counter; one of a pair is missing: {', '.join(sorted(lonely))}"
        )
    return pairs


def _suites(sets: Iterable[EvalSet]) -> dict[str, dict[tuple[str, int], str]]:
    """Names of the corrupted sets by suite, then by corruption and severity."""
    suites: dict[str, dict[tuple[str, int], str]] = {}
    for s in sets:
        if s.role == "corruption" and s.severity:
            suite = s.name.removesuffix(f"{s.corruption}_{s.severity}").strip("_") or "corruptions"
            suites.setdefault(suite, {})[s.corruption, s.severity] = s.name
    return suites


def _changes(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    same = (mine["prediction"] == theirs["prediction"]) & (mine["prediction"] >= 0)
    broken, repaired = theirs["correct"] & ~mine["correct"], mine["correct"] & ~theirs["correct"]
    return {"agreement": same, "flips": ~same, "flips_broken": broken, "flips_repaired": repaired}
