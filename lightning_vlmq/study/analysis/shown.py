"""What the report shows of runs on the same samples: which metrics of which sets; from the rows what needs more than samples."""

from __future__ import annotations

import numpy as np

from lightning_vlmq.evaluation.estimates import Estimate
from lightning_vlmq.evaluation.evaluators import estimate_all, main_score, recorded_scores
from lightning_vlmq.evaluation.measures import METRICS, Measure
from lightning_vlmq.evaluation.quantities import AlignedRuns, SampleMean
from lightning_vlmq.evaluation.records import SampleMatrix
from lightning_vlmq.statistics import Statistics
from lightning_vlmq.study.analysis.runs import StoredRun, StudyResults


def shown_estimates(
    sets: dict[str, list[SampleMatrix]], results: StudyResults, runs: list[StoredRun], settings: Statistics
) -> dict[Measure, Estimate]:
    """What the report shows: everything in distribution, means on other labelled sets, all metrics of the main OOD score, AUROC of all.

    Corrupted and shifted sets are left out of what takes a pass over every resample: there are hundreds of them.
    """
    main = main_score(recorded_scores(sets["id"])) if "id" in sets else ""
    quick = {name for name in METRICS if isinstance(METRICS[name].of, SampleMean)} | {"mean_corruption_error"}
    quick -= {"adaptive_ece", "adaptive_ece_debiased"}

    def wanted(metric: str, role: str, score: str) -> bool:
        if score:
            return metric == "auroc" or score == main
        return role == "id" or (role != "spurious" and metric in quick)

    every = [matrix for matrices in sets.values() for matrix in matrices]
    estimates = estimate_all(AlignedRuns(every, settings, wanted))
    shown = {m: e for m, e in estimates.items() if not m.dataset or (m.metric == "auroc" and m.role != "spurious")}
    return shown | _stored_estimates(results, [run.run_id for run in runs])


def _stored_estimates(results: StudyResults, run_ids: list[str]) -> dict[Measure, Estimate]:
    """Measures that follow from more than samples, from the rows: class-wise errors, each with its standard error and its change's."""
    found: dict[Measure, Estimate] = {}
    for name in ("classwise_ece", "classwise_ece_debiased"):
        rows = results.about(name, f"delta_{name}")
        own = rows[(rows["role"] == "id") & (rows["dataset"] == "")]
        stored = own.set_index(["metric", "run_id"])[["value", "stderr"]]
        value, stderr, change = (np.full(len(run_ids), np.nan) for _ in range(3))
        for k, run_id in enumerate(run_ids):
            if (name, run_id) in stored.index:
                value[k], stderr[k] = stored.loc[(name, run_id)]
            if (f"delta_{name}", run_id) in stored.index:
                scale = value[0] if METRICS[name].is_relative else 1.0
                change[k] = stored.loc[(f"delta_{name}", run_id), "stderr"] * scale
        if not np.isnan(value).all():
            n = int(own["n"].max())
            empty = np.empty((0, len(value)))
            found[Measure(name, "id")] = Estimate(value, empty, n, np.stack([stderr, change]))
    return found
