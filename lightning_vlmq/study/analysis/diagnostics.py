"""What figures show of a VLM in a setting beyond single numbers: reliability bins, flips, accuracy per corruption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_vlmq.evaluation.estimates import unanimous_error
from lightning_vlmq.evaluation.records import Columns, SampleMatrix
from lightning_vlmq.metrics.functional import BinSums, TrajectoryBins, equal_width_bin_sums, trajectory_bins

_SUMS = ("count", "confidence", "correct")


class Accuracy(NamedTuple):
    """A share of correct predictions with its binomial standard error; that of one sample where all are alike."""

    value: float
    stderr: float


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """One VLM in one setting; sums or means over seeds.

    Attributes:
        bins: reliability bins on the in-distribution data, each sum ``[n_bins]``.
        flips: shares of in-distribution samples by what became of full precision's prediction: ``unchanged``,
            ``broken`` (right to wrong), ``repaired`` (wrong to right), ``moved`` (wrong to another wrong).
        clean: in-distribution accuracy.
        corruption: accuracy by corruption and severity.
    """

    bins: BinSums
    flips: dict[str, float]
    clean: Accuracy
    corruption: dict[tuple[str, int], Accuracy]


def diagnose(sets: dict[str, list[SampleMatrix]], position: int, n_bins: int) -> Diagnostics | None:
    """Diagnostics of one run of aligned samples, or ``None`` where it has no in-distribution data.

    Args:
        sets: aligned samples by role, the full-precision run first.
        position: the run's number.
        n_bins: bins of the reliability diagram.
    """
    own = {role: [m for m in matrices if position in m.tables] for role, matrices in sets.items()}
    if not own.get("id"):
        return None
    run, reference = (_concatenated(own["id"], number) for number in (position, 0))
    right, was_right = run["correct"], reference["correct"]
    same = run["prediction"] == reference["prediction"]
    kinds = {"unchanged": same, "broken": was_right & ~right, "repaired": ~was_right & right}
    kinds["moved"] = ~same & ~was_right & ~right
    sums = equal_width_bin_sums(torch.from_numpy(run["confidence"]), torch.from_numpy(right), n_bins)
    return Diagnostics(
        bins=BinSums(*(_fold(getattr(sums, name)) for name in _SUMS)),
        flips={name: float(np.mean(which)) for name, which in kinds.items()},
        clean=_accuracy(right),
        corruption={
            (m.where.corruption, m.where.severity): _accuracy(m.tables[position]["correct"])
            for m in own.get("corruption", [])
            if m.where.severity
        },
    )


def trajectory(sets: dict[str, list[SampleMatrix]], positions: Sequence[int], n_bins: int) -> TrajectoryBins | None:
    """Reliability of the in-distribution samples of each confidence bin of the first run, under each run.

    Args:
        sets: aligned samples by role.
        positions: the runs' numbers, e.g. full precision, quantized, quantized with a tuned logit scale.
        n_bins: bins of the first run's confidence.

    Returns:
        The bins; ``None`` where a run lacks the data, or the first has an undefined confidence.
    """
    own = [matrix for matrix in sets.get("id", []) if all(position in matrix.tables for position in positions)]
    if not own:
        return None
    columns = [_concatenated(own, position) for position in positions]
    confidence, correct = (torch.from_numpy(np.stack([c[name] for c in columns])) for name in ("confidence", "correct"))
    return None if bool(confidence[0].isnan().any()) else trajectory_bins(confidence, correct, n_bins)


def merge_trajectories(seeds: list[TrajectoryBins]) -> TrajectoryBins:
    """Pool the runs of several seeds, each bin's means weighted by its samples."""
    counts = torch.stack([bins.count for bins in seeds])
    total = counts.sum(0)

    def pooled(name: str) -> Tensor:
        means = torch.stack([getattr(bins, name) for bins in seeds])
        return torch.where(counts.unsqueeze(1) > 0, means * counts.unsqueeze(1), 0.0).sum(0) / total

    return TrajectoryBins(seeds[0].edges, total, pooled("confidence"), pooled("accuracy"))


def merge(seeds: list[Diagnostics]) -> Diagnostics:
    """Pool the runs of several seeds: bins add up, shares and accuracies are averaged.

    Their standard errors are averaged too: the seeds share one test set, whose error averaging does not shrink.
    """

    def mean(parts: list[Accuracy]) -> Accuracy:
        return Accuracy(*(float(np.mean(column)) for column in zip(*parts)))

    conditions = set.intersection(*(set(d.corruption) for d in seeds))
    return Diagnostics(
        bins=BinSums(*(torch.stack([getattr(d.bins, name) for d in seeds]).sum(0) for name in _SUMS)),
        flips={name: float(np.mean([d.flips[name] for d in seeds])) for name in seeds[0].flips},
        clean=mean([d.clean for d in seeds]),
        corruption={key: mean([d.corruption[key] for d in seeds]) for key in sorted(conditions)},
    )


def _concatenated(matrices: list[SampleMatrix], run: int) -> Columns:
    names = ("confidence", "correct", "prediction")
    return {name: np.concatenate([matrix.tables[run][name] for matrix in matrices]) for name in names}


def _fold(sums: Tensor) -> Tensor:
    """In a diagram, confidence exactly 1 belongs to the last bin."""
    return torch.cat([sums[:-2], sums[-2:].sum(0, keepdim=True)])


def _accuracy(correct: NDArray[np.bool_]) -> Accuracy:
    accuracy = float(np.mean(correct))
    return Accuracy(accuracy, float(np.sqrt(accuracy * (1 - accuracy) / len(correct))) or unanimous_error(len(correct)))
