"""Class-wise calibration errors of k runs, from the gaps of groups of samples: one record per sample does not hold all probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_vlmq.evaluation.estimates import Estimate, average
from lightning_vlmq.evaluation.evaluators import Estimates
from lightning_vlmq.evaluation.measures import Measure
from lightning_vlmq.evaluation.quantities import stream_of
from lightning_vlmq.evaluation.records import EvaluationSet
from lightning_vlmq.metrics.functional import bias_doubt, debiased_error
from lightning_vlmq.statistics import Statistics

MIN_SAMPLES_PER_CLASS = 80
"""With fewer, the debiased error is undefined: what bias is left in it adds up over classes, and is no longer small beside its spread."""

Gaps = Mapping[str, Tensor]
"""What :class:`~lightning_vlmq.metrics.ClasswiseGaps` computes."""


def classwise_estimates(
    sets: Sequence[EvaluationSet], gaps: Mapping[str, Sequence[Gaps | None]], settings: Statistics
) -> Estimates:
    """``classwise_ece``, and its debiased form, of each set and of each role.

    Resamples are of the G groups that the samples were put in, the same ones for all runs (a cluster bootstrap, Davison & Hinkley 1997,
    section 3.8). They spread by sqrt((G - 1) / G) too little, which is made good.

    Args:
        sets: the data sets.
        gaps: by data set, of each run; sets that are not there have no estimate.
        settings: numbers of resamples and seed.
    """
    found: Estimates = {}
    for role in dict.fromkeys(s.role for s in sets if s.dataset in gaps):
        parts: dict[str, Estimates] = {"classwise_ece": {}, "classwise_ece_debiased": {}}
        for s in (s for s in sets if s.role == role and s.dataset in gaps):
            for name, estimate in _of_set(s, gaps[s.dataset], settings).items():
                parts[name][Measure(name, role, s.dataset, "", s.corruption, s.severity)] = estimate
        for name, own in parts.items():
            found |= own | {Measure(name, role): average({part.dataset: estimate for part, estimate in own.items()})}
    return found


def _of_set(s: EvaluationSet, runs: Sequence[Gaps | None], settings: Statistics) -> dict[str, Estimate]:
    n_groups, n_resamples = settings.n_groups, settings.n_resamples_ranking
    rng = np.random.default_rng([settings.seed, stream_of(f"groups of {s.group or s.dataset}")])
    drawn = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_resamples)
    weights = torch.from_numpy(np.vstack([np.ones(n_groups), drawn]))  # the first is the sample as it is
    values = {
        name: np.full((1 + n_resamples, len(runs)), np.nan) for name in ("classwise_ece", "classwise_ece_debiased")
    }
    n, doubt, cells = 0, np.zeros(len(runs)), {}
    for run, own in enumerate(runs):
        if own is None:
            continue
        count, gap, variance = own["count"], own["gap"], own["variance"]
        n, (_, n_classes, _) = int(count.sum()), gap.shape
        means = (weights @ gap.flatten(1)) / (weights @ count).unsqueeze(1)
        means = means[:1] + (n_groups / (n_groups - 1)) ** 0.5 * (means - means[:1])
        values["classwise_ece"][:, run] = means.abs().sum(-1).numpy() / n_classes
        if n >= MIN_SAMPLES_PER_CLASS * n_classes:
            stretch = (variance / own["square"].where(own["square"] > 0, variance)).nan_to_num(1.0).sqrt().flatten()
            stretched = means[:1] + stretch * (
                means - means[:1]
            )  # cells of few samples vary by more than resamples show
            cells[run] = means[0], variance.flatten() / max(n, 1) ** 2
            values["classwise_ece_debiased"][:, run] = (debiased_error(stretched, cells[run][1]) / n_classes).numpy()
            doubt[run] = float(bias_doubt(*cells[0], *cells[run])) / n_classes if run and 0 in cells else 0.0
    doubts = {"classwise_ece": None, "classwise_ece_debiased": doubt}
    return {name: Estimate(value[0], value[1:], n, doubt=doubts[name]) for name, value in values.items()}
