"""From per-sample records to results: one small evaluator a reliability dimension, composed in a list.

Records are the columns of :class:`~lightning_vlmq.metrics.SampleRecords`, per data set name, of the model under test and of the
full-precision reference on the same samples in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_vlmq import metrics
from lightning_vlmq.data.datamodule import OOD_ROLES, EvalSet
from lightning_vlmq.errors import VLMQError

Records = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Row:
    """One result: a metric of one model on one data set, with its standard error and number of samples."""

    dataset: str
    role: str
    metric: str
    value: float
    stderr: float
    n: int
    corruption: str = ""
    severity: int = 0
    score: str = ""


class Evaluator(Protocol):
    """Turns records into rows; ``reference`` is ``None`` when the model under test is itself full precision."""

    def rows(self, sets: Sequence[EvalSet], records: Records, reference: Records | None) -> list[Row]:
        """Evaluate every set that this evaluator is about."""
        ...


class Resampled:
    """A metric's value, its standard error, and the same for its relative change against a reference.

    Standard errors are bootstrap standard deviations (Efron & Tibshirani 1993, chapter 6); both models see the same resamples.

    Args:
        n_resamples: number of bootstrap resamples.
        seed: seed of the resamples.
    """

    def __init__(self, n_resamples: int, seed: int = 0) -> None:
        if n_resamples < 2:
            raise VLMQError(f"n_resamples must be at least 2, got {n_resamples}")
        self.n_resamples = n_resamples
        self.seed = seed

    def rows(
        self,
        make: Callable[..., Row],
        metric: str,
        fn: Callable[..., Tensor],
        columns: Sequence[Tensor],
        reference: Sequence[Tensor] | None,
        groups: Sequence[int] | None = None,
        change: tuple[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
    ) -> list[Row]:
        """The metric's row, and the row of its change where there is a reference.

        Args:
            make: builds a row from ``metric``, ``value`` and ``stderr``.
            metric: the metric's name.
            fn: the metric, columns ``[..., n]`` to ``[...]``.
            columns: the model's columns.
            reference: the reference's columns, or ``None``.
            groups: which columns are resampled together.
            change: name and formula ``(reference value, value)`` of the change; relative change if not given.
        """
        replicates = partial(metrics.bootstrap_replicates, n_resamples=self.n_resamples, seed=self.seed, groups=groups)
        value, spread = fn(*columns), replicates(fn, *columns)
        rows = [make(metric=metric, value=float(value), stderr=_deviation(spread))]
        if reference is not None:
            name, formula = change or (f"delta_{metric}", metrics.relative_change)
            changed = formula(replicates(fn, *reference), spread)
            point = formula(fn(*reference).double(), value.double())
            rows.append(make(metric=name, value=float(point), stderr=_deviation(changed)))
        return rows


class ClassificationEvaluator:
    """Accuracy, agreement and calibration on every labelled set: dimensions 1, 2 and 4.

    Args:
        n_bins: bins of the calibration errors.
        n_resamples: bootstrap resamples behind the standard errors.
    """

    def __init__(self, n_bins: int = 15, n_resamples: int = 100) -> None:
        self.n_bins = n_bins
        self.resampled = Resampled(n_resamples)

    def rows(self, sets: Sequence[EvalSet], records: Records, reference: Records | None) -> list[Row]:
        """``top1``, ``top5``, ``nll``, ``brier``, ``ece``, ``adaptive_ece``; against a reference also ``agreement`` and ``delta_*``."""
        ece = partial(metrics.calibration_error, n_bins=self.n_bins)
        table: list[tuple[str, Callable[..., Tensor], tuple[str, ...]]] = [
            ("top1", _mean, ("correct",)),
            ("top5", _mean, ("correct_top5",)),
            ("nll", _mean, ("nll",)),
            ("brier", _mean, ("brier",)),
            ("ece", ece, ("confidence", "correct")),
            ("adaptive_ece", partial(ece, binning="mass"), ("confidence", "correct")),
        ]
        rows: list[Row] = []
        for s in sets:
            if s.role in OOD_ROLES:
                continue
            mine, theirs = records[s.name], None if reference is None else reference[s.name]
            make = _maker(s, len(mine["index"]))
            for metric, fn, names in table:
                base = None if theirs is None else [theirs[c] for c in names]
                rows += self.resampled.rows(make, metric, fn, [mine[c] for c in names], base)
            if theirs is not None:
                kept = (mine["prediction"] == theirs["prediction"]) & (mine["prediction"] >= 0)
                stderr = float(metrics.standard_error_of_mean(kept))
                rows.append(make(metric="agreement", value=float(_mean(kept)), stderr=stderr))
        return rows


class OODEvaluator:
    """Out-of-distribution detection, dimension 3: every OOD set against the in-distribution set, for every score.

    Conventions are in the metrics' names: ``fpr95`` and ``aupr_in`` take ID as positive, ``fpr95_openood`` and ``aupr_out`` OOD.

    Args:
        scores: names of the score columns to evaluate.
        n_resamples: bootstrap resamples behind the standard errors; ID and OOD samples are resampled independently.
    """

    METRICS = ("auroc", "aupr_in", "aupr_out", "fpr95", "fpr95_openood")

    def __init__(self, scores: Sequence[str] = ("mcm", "energy"), n_resamples: int = 100) -> None:
        self.scores = tuple(scores)
        self.resampled = Resampled(n_resamples)

    def rows(self, sets: Sequence[EvalSet], records: Records, reference: Records | None) -> list[Row]:
        """``auroc``, ``aupr_in``, ``aupr_out``, ``fpr95``, ``fpr95_openood`` and their ``delta_*``."""
        inside = next(s.name for s in sets if s.role == "id")
        rows: list[Row] = []
        for s in sets:
            if s.role not in OOD_ROLES:
                continue
            for score in self.scores:
                make = _maker(s, len(records[s.name]["index"]), score=score)
                columns = [records[name][score] for name in (inside, s.name)]
                base = None if reference is None else [reference[name][score] for name in (inside, s.name)]
                for metric in self.METRICS:
                    rows += self.resampled.rows(make, metric, getattr(metrics, metric), columns, base, groups=(0, 1))
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
            n = sum(len(records[name]["index"]) for name in names)
            make = partial(Row, dataset=pair, role="spurious", n=n)
            columns = [records[name]["correct"] for name in names]
            base = None if reference is None else [reference[name]["correct"] for name in names]
            rows += self.resampled.rows(
                make, "rsg", _spurious_gap, columns, base, groups=(0, 1), change=("delta_rsg", metrics.difference)
            )
            if base is not None:
                result = metrics.bootstrap(
                    _added_vulnerability,
                    *base,
                    *columns,
                    groups=(0, 1, 0, 1),
                    n_resamples=self.resampled.n_resamples,
                    seed=self.resampled.seed,
                )
                rows.append(make(metric="vuln_add", value=result.estimate, stderr=result.stderr))
        return rows


def default_evaluators() -> list[Evaluator]:
    """All dimensions with their default settings."""
    return [ClassificationEvaluator(), OODEvaluator(), SpuriousEvaluator()]


HEADLINES = {
    "id": ("top1", "ece", "nll", "agreement"),
    "near_ood": ("auroc", "fpr95"),
    "far_ood": ("auroc", "fpr95"),
    "corruption": ("top1", "ece"),
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


def _maker(s: EvalSet, n: int, **fixed: Any) -> Callable[..., Row]:
    return partial(Row, dataset=s.name, role=s.role, corruption=s.corruption, severity=s.severity, n=n, **fixed)


def _mean(column: Tensor) -> Tensor:
    return column.double().mean(-1)


def _spurious_gap(common: Tensor, counter: Tensor) -> Tensor:
    return metrics.relative_spurious_gap(_mean(common), _mean(counter))


def _added_vulnerability(common_f: Tensor, counter_f: Tensor, common_q: Tensor, counter_q: Tensor) -> Tensor:
    counter = metrics.relative_change(_mean(counter_f), _mean(counter_q))
    return metrics.added_vulnerability(counter, metrics.relative_change(_mean(common_f), _mean(common_q)))


def _deviation(replicates: Tensor) -> float:
    defined = replicates[~replicates.isnan()]
    return float(defined.std(correction=1)) if defined.numel() > 1 else torch.nan
