"""Do the intervals hold? Paired models of known truth, simulated hundreds of times: every tested measure of the report, in each scenario.

Classes are told from Gaussian evidence, of which each model sees a part: its posterior is a calibrated model, and models that see different
parts are paired, of equal or different accuracy; a temperature makes one overconfident.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lightning_vlmq.evaluation.classwise import classwise_estimates
from lightning_vlmq.evaluation.evaluators import estimate_all
from lightning_vlmq.evaluation.measures import METRICS, Measure
from lightning_vlmq.evaluation.quantities import AlignedRuns, Estimate
from lightning_vlmq.evaluation.records import EvaluationSet, SampleMatrix
from lightning_vlmq.metrics import ClasswiseGaps
from lightning_vlmq.metrics.functional import bin_gaps, per_sample
from lightning_vlmq.statistics import Statistics
from lightning_vlmq.study.analysis.comparison import _compare, _Pair
from lightning_vlmq.study.analysis.runs import Setting

C, REPETITIONS, LARGE = 8, 200, 30
SETTINGS = Statistics(n_resamples=200, n_resamples_ranking=200)
QUANTIZED = Setting("minmax", 4, 8, "vision")


@dataclass(frozen=True)
class Model:
    """How strong the evidence is that it shares with the other model, and its own; how overconfident it is."""

    shared: float
    own: float
    temperature: float = 1.0


SCENARIOS = {
    "both calibrated, of different accuracy": (Model(1.7, 1.5), Model(1.7, 0.6)),
    "one overconfident": (Model(1.6, 1.1), Model(1.6, 1.1, 1.6)),
}
SETS = {
    "in": ("id", 800, 1.0),
    "out": ("near_ood", 300, 0.0),
    "b_common": ("spurious", 400, 1.1),
    "b_counter": ("spurious", 400, 0.7),
}
SETS |= {f"shift_{k}": ("shift", 300, 0.9 - 0.2 * k) for k in range(2)}


def logits_of(
    models: tuple[Model, Model], n: int, strength: float, rng: np.random.Generator
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Calibrated logits of both models, before the temperature, and the target."""
    target = rng.integers(0, C, n)
    truth = np.eye(C)[target]
    shared, found = rng.normal(size=(n, C)), []
    for model in models:
        logits = 0.0
        for s, noise in ((model.shared * strength, shared), (model.own * strength, rng.normal(size=(n, C)))):
            logits = logits + s * (
                s * truth + noise
            )  # of unit noise around s in the class's direction: the log posterior
        if not strength:  # no class: what noise alone would say at the usual strength
            logits = model.shared * shared + model.own * rng.normal(size=(n, C))
        found.append(torch.from_numpy(logits))
    return found, torch.from_numpy(target)


def records(logits: torch.Tensor, model: Model, target: torch.Tensor, is_ood: bool) -> dict[str, np.ndarray]:
    scaled = (logits * model.temperature).float()
    columns = per_sample(scaled, torch.full_like(target, -1) if is_ood else target)
    columns |= {"index": torch.arange(len(target)), "target": target, "mcm": scaled.softmax(-1).amax(-1)}
    return {name: column.numpy() for name, column in columns.items()}


def draw(
    models: tuple[Model, Model], rng: np.random.Generator, times: int = 1
) -> tuple[dict[str, list], dict[str, list]]:
    """Records and class-wise gaps by data set, of both models."""
    found, gaps = {}, {}
    for name, (role, size, strength) in SETS.items():
        both, target = logits_of(models, times * size, strength, rng)
        found[name] = [records(logits, model, target, role == "near_ood") for logits, model in zip(both, models)]
        if role == "id":
            gaps[name] = []
            for logits, model in zip(both, models):
                metric = ClasswiseGaps(C)
                metric.update(torch.arange(len(target)), (logits * model.temperature).float(), target)
                gaps[name].append(metric.compute())
    return found, gaps


def estimates(found: dict[str, list], gaps: dict[str, list], settings: Statistics) -> dict[Measure, Estimate]:
    where = {name: EvaluationSet(name, SETS[name][0], "", 0) for name in found}
    sets = [SampleMatrix(where[name], dict(enumerate(tables)), 2) for name, tables in found.items()]
    means = {name for name in METRICS if METRICS[name].is_tested and METRICS[name].tested_by == ""}

    def wanted(metric: str, role: str, score: str) -> bool:
        return metric in means and (
            role in ("id", "near_ood") or (role == "shift" and metric in ("top1", "ece_debiased", "nll"))
        )

    estimated = estimate_all(AlignedRuns(sets, settings, wanted))
    estimated |= classwise_estimates(list(where.values()), gaps, settings)
    tested = {m: e for m, e in estimated.items() if not m.dataset and m.info.is_tested and not m.info.tested_by}
    return {
        m: e for m, e in tested.items() if m.role != "spurious" or m.metric in ("common", "counter", "rsg", "vuln_add")
    }


def truths(models: tuple[Model, Model]) -> dict[Measure, np.ndarray]:
    """Each measure of both models, of thirty times the samples; for errors by bin with the probability of being right in place of hits."""
    rng = np.random.default_rng(99)
    found, gaps = draw(models, rng, LARGE)
    large = estimates(found, gaps, Statistics(n_resamples=2, n_resamples_ranking=2))
    known = {measure: estimate.value.copy() for measure, estimate in large.items()}
    for measure, binning in (
        (m, "mass" if "adaptive" in m.metric else "width") for m in known if m.metric.endswith("ece_debiased")
    ):
        names = [name for name, (role, _, _) in SETS.items() if role == measure.role]
        errors = np.zeros((len(names), 2))
        for row, name in enumerate(names):
            both, _ = logits_of(models, LARGE * SETS[name][1], SETS[name][2], rng)
            for k, (logits, model) in enumerate(zip(both, models)):
                confident = (logits * model.temperature).softmax(-1)
                if "classwise" in measure.metric:
                    cells = torch.stack(
                        [bin_gaps(p.float(), q).mean(0) for p, q in zip(confident.T, logits.softmax(-1).T)]
                    )
                    errors[row, k] = 0 if model.temperature == 1 else float(cells.abs().sum() / C)
                else:
                    right = logits.softmax(-1).amax(-1)
                    gap = bin_gaps(confident.amax(-1).float(), right, binning=binning)
                    errors[row, k] = 0 if model.temperature == 1 else float(gap.mean(0).abs().sum())
        known[measure] = errors.mean(0)
    return known


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_intervals_cover_and_true_nulls_stand(scenario):
    models = SCENARIOS[scenario]
    known = truths(models)
    rng = np.random.default_rng(7)
    covered: dict[Measure, list[bool]] = {}
    rejected: dict[Measure, list[bool]] = {}
    for repetition in range(REPETITIONS):
        settings = Statistics(n_resamples=200, n_resamples_ranking=200, seed=repetition)
        for measure, estimate in estimates(*draw(models, rng), settings).items():
            found = _compare(QUANTIZED, measure, [_Pair(estimate, 1)])
            truth = known[measure][1] - (0.0 if measure.info.needs_reference else known[measure][0])
            covered.setdefault(measure, []).append(found.change.low <= truth <= found.change.high)
            rejected.setdefault(measure, []).append(found.p_value < 0.05)
    wrong = []
    for measure in covered:
        share, positives = np.mean(covered[measure]), np.mean(rejected[measure])
        is_null = "ece_debiased" in measure.metric and "calibrated" in scenario
        line = f"{measure.metric} {measure.role}: covers {100 * share:.1f} %, rejects {100 * positives:.1f} %"
        print(line, "(true null)" if is_null else "")
        if not 0.90 <= share <= 0.985 or (is_null and positives > 0.08):
            wrong.append(line)
    assert not wrong, "\n".join(wrong)
    tested = {name for name in METRICS if METRICS[name].is_tested and not METRICS[name].tested_by}
    assert {measure.metric for measure in covered} == tested
