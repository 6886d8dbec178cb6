"""Models at equal damage, models that no other beats, and how much a seed moves a number beside how much the test images do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_vlmq.evaluation.about import BITS_PER_WEIGHT, OUTPUT_SQNR
from lightning_vlmq.evaluation.measures import Dimension, Measure, dimensions
from lightning_vlmq.study.analysis.change import FULL
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.setting import Setting

Cell = tuple[str, Setting]
"""A VLM in a setting."""


def of_models(analysis: StudyAnalysis, metric: str) -> dict[Cell, float]:
    """A number about models alone (:data:`OUTPUT_SQNR`, :data:`BITS_PER_WEIGHT`) by VLM and setting, means over seeds."""
    rows = analysis.results.about(metric)
    stored = dict(zip(rows["run_id"], rows["value"]))
    found: dict[Cell, list[float]] = {}
    for run in analysis.results.runs:
        if run.run_id in stored and not run.setting.is_tuned:
            found.setdefault((analysis.results.vlm_of(run), run.setting), []).append(stored[run.run_id])
    return {cell: float(np.mean(values)) for cell, values in found.items()}


def damage(analysis: StudyAnalysis) -> dict[Cell, float]:
    """Signal-to-quantization-noise ratio of the image features in dB, by VLM and setting: the less, the more damage."""
    return of_models(analysis, OUTPUT_SQNR)


@dataclass(frozen=True)
class Candidate:
    """A model as one weighs it: each number turned so that more is better.

    Attributes:
        vlm: the VLM.
        setting: how it is quantized, :data:`~.change.FULL` for not at all.
        top1: accuracy in distribution.
        ece: calibration error, as it is.
        auroc: mean of near- and far-OOD.
        bits: mean bits of a matrix weight of both towers, 32 in full precision.
    """

    vlm: str
    setting: Setting
    top1: float
    ece: float
    auroc: float
    bits: float

    @property
    def goods(self) -> tuple[float, float, float, float]:
        """What is wanted, more of each being better."""
        return self.top1, -self.ece, self.auroc, -self.bits


def pareto_front(analysis: StudyAnalysis) -> dict[str, list[Candidate]]:
    """Of each VLM the models that none of its others beats in one of accuracy, ECE, OOD detection and size without losing in another.

    By the values as they are, whose errors the tables have; controls and surgeries do not take part. By falling size.
    """
    bits = of_models(analysis, BITS_PER_WEIGHT)
    found: dict[str, list[Candidate]] = {}
    for vlm in analysis.vlms:
        candidates = []
        for setting in [FULL, *analysis.settings]:
            size = 32.0 if setting == FULL else bits.get((vlm, setting), float("nan"))
            named = {m: analysis.comparisons.get((vlm, setting, m)) for m in _measures(analysis)}
            values = [c.value for c in named.values() if c is not None]
            if setting.is_quantization and len(values) == len(named) and not np.isnan([*values, size]).any():
                top1, ece, near, far = values
                candidates.append(Candidate(vlm, setting, top1, ece, (near + far) / 2, size))
        kept = undominated(np.array([c.goods for c in candidates]).reshape(-1, 4))
        found[vlm] = sorted((c for c, stays in zip(candidates, kept) if stays), key=lambda c: (-c.bits, -c.top1))
    return {vlm: front for vlm, front in found.items() if len(front) > 1}


def undominated(goods: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of ``[n, objectives]`` no other line beats: at least as good in everything, and better in something. ``[n]``."""
    at_least = np.all(goods[None, :] >= goods[:, None], axis=-1)
    better = np.any(goods[None, :] > goods[:, None], axis=-1)
    return np.logical_not(np.any(at_least & better, axis=1))


def _measures(analysis: StudyAnalysis) -> list[Measure]:
    auroc = [Measure("auroc", role, "", analysis.score) for role in ("near_ood", "far_ood")]
    return [Measure("top1", "id"), Measure("ece", "id"), *auroc]


@dataclass(frozen=True)
class SeedSpread:
    """How much seeds move a dimension's number.

    Attributes:
        kind: ``"post-training"`` or ``"trained"``.
        dimension: which number.
        over_seeds: root mean square over (VLM, setting) pairs of the standard deviation over seeds.
        over_samples: root mean square of the number's standard error over test images.
        n_pairs: such pairs.
        n_seeds: runs behind them.
    """

    kind: str
    dimension: Dimension
    over_seeds: float
    over_samples: float
    n_pairs: int
    n_seeds: int


def seed_spread(analysis: StudyAnalysis) -> list[SeedSpread]:
    """The spread over seeds apart from that over test images, by kind of method and dimension; empty with one seed."""
    results = analysis.results
    cells = {
        run.run_id: (results.vlm_of(run), run.setting)
        for run in results.runs
        if not run.key.is_full_precision and not run.setting.is_tuned and run.setting.is_quantization
    }
    shown = dimensions(analysis.score)
    rows = results.about(*{dimension.measure.metric for dimension in shown})
    rows = rows[(rows["dataset"] == "") & rows["run_id"].isin(cells)]
    found = []
    for dimension in shown:
        m = dimension.measure
        own = rows[(rows["metric"] == m.metric) & (rows["role"] == m.role) & (rows["score"] == m.score)]
        values: dict[Cell, list[tuple[float, float]]] = {}
        for run_id, value, stderr in own[["run_id", "value", "stderr"]].itertuples(index=False, name=None):
            values.setdefault(cells[run_id], []).append((value, stderr))
        for kind, is_trained in (("post-training", False), ("trained", True)):
            several = [np.array(v) for (_, s), v in values.items() if len(v) > 1 and s.is_trained == is_trained]
            if several:
                found.append(_spread(kind, dimension, several))
    return found


def _spread(kind: str, dimension: Dimension, several: Sequence[NDArray[np.float64]]) -> SeedSpread:
    variances = [pairs[:, 0].var(ddof=1) for pairs in several]
    errors = [np.mean(pairs[:, 1] ** 2) for pairs in several]
    roots = float(np.sqrt(np.nanmean(variances))), float(np.sqrt(np.nanmean(errors)))
    return SeedSpread(kind, dimension, *roots, len(several), sum(map(len, several)))
