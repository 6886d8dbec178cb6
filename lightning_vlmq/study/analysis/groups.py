"""Effects over the grid: by kind of method, bits, scope, architecture and pre-training source, with intervals that hold for other VLMs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.stats import norm

from lightning_vlmq.evaluation.estimates import Array, deviation
from lightning_vlmq.evaluation.measures import Dimension, Measure, dimensions
from lightning_vlmq.statistics import ClusteredMean, Interval, clustered_mean
from lightning_vlmq.study.analysis.change import Comparison, beyond
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.setting import Setting

Kind = Literal["growth", "change", "better", "effect"]
"""Which number of a comparison: (A_q - A_f) / A_f; the change in the measure's unit; 1 where it got better and else 0; or the effect as
figures show it."""

ARCHITECTURES = ("siglip", "align", "coca", "convnext", "vit")
"""Words in the names of VLMs that say their family; the first that fits, for a SigLIP or a CoCa has a ViT too."""
SOURCES = {"noisy": ("noisy", "laion"), "clean": ("clean", "dfn", "metaclip", "wit", "openai")}
"""Parts of the names of VLMs or of their weights that say what captions they were trained on; a size may follow (``laion2b``)."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One VLM in one setting.

    Attributes:
        point: a number.
        stderr: its standard error over test samples; ``None`` where that is not known.
        replicates: what resamples of the test samples make of it, ``[R]``; empty where that is not known. They may show less than
            the standard error.
    """

    point: float
    stderr: float | None = None
    replicates: Array = field(default_factory=lambda: np.empty(0))

    @classmethod
    def of(cls, measure: Measure, c: Comparison, kind: Kind) -> Cell:
        """A comparison as it is asked for."""
        assert c.effect is not None and c.change is not None
        info, drawn = measure.info, c.effects
        changes = -drawn * c.reference if info.is_relative else drawn
        if kind == "better":
            is_better = np.array([info.gain(c.reference, c.reference + change) > 0 for change in changes], dtype=float)
            error = deviation(is_better) if len(changes) else sign_error(c.change)
            return cls(float(info.gain(c.reference, c.value) > 0), error, is_better)
        if kind == "change":
            return cls(c.change.estimate, c.change.stderr, changes)
        if kind == "growth" and not info.is_relative:
            return cls(c.change.estimate / c.reference, c.change.stderr / abs(c.reference), drawn / c.reference)
        sign = -1 if kind == "growth" else 1
        return cls(sign * c.effect.estimate, c.effect.stderr, sign * drawn)


def sign_error(change: Interval) -> float:
    """Standard deviation over test samples of "the change is positive", 1 or 0: of p = Phi(change / stderr), sqrt(p (1 - p))."""
    if change.stderr == 0:
        return 0.0
    z = change.estimate / change.stderr
    return float(np.sqrt(norm.cdf(z) * norm.sf(z)))


def by_vlm(cells: Mapping[str, Sequence[Cell]]) -> ClusteredMean:
    """The mean over VLMs, each with the mean over its cells.

    All are judged on the same test samples. Replicates say how much of their errors is common; what they do not show, and all of it where
    a cell has none, counts as common (as in :func:`~.change.average_effect`). Where a cell's error is not known the interval is over
    VLMs alone.
    """
    groups = list(cells.values())
    every = [cell for own in groups for cell in own]
    points = np.array([np.mean([cell.point for cell in own]) for own in groups])
    is_drawn, drawn = all(len(cell.replicates) for cell in every), None
    if is_drawn:
        drawn = np.stack([np.mean([cell.replicates for cell in own], axis=0) for own in groups], axis=1)
    if any(cell.stderr is None for cell in every):
        return clustered_mean(points, drawn)
    unseen = [
        np.mean([beyond(cell.replicates if is_drawn else np.empty(0), cell.stderr or 0.0) for cell in own])
        for own in groups
    ]
    return clustered_mean(points, drawn, float(np.mean(unseen)))


def architecture_of(vlm: str) -> str:
    """The VLM's family, one of :data:`ARCHITECTURES`; empty where its name says none."""
    return next((word for word in ARCHITECTURES if word in vlm.lower()), "")


def source_of(analysis: StudyAnalysis, vlm: str) -> str:
    """``"noisy"`` or ``"clean"``, by the name of the VLM or of its weights; empty where these say nothing."""
    name = f"{vlm} {analysis.results.runs_of(vlm)[0][0].key.pretrained}".lower()
    parts = {re.sub(r"(?<=[a-z])\d+[kmb]?$", "", part) for part in re.split(r"[^a-z0-9]+", name)}
    return next((source for source, words in SOURCES.items() if parts & set(words)), "")


@dataclass(frozen=True)
class GroupEffect:
    """The mean effect of a group of (VLM, setting) pairs in one dimension.

    Attributes:
        grouping: by what, e.g. ``"bits"``; empty for all pairs.
        group: which, e.g. ``"W4A8"``.
        dimension: the reliability dimension.
        found: mean over VLMs, each with the mean over its settings, with an interval for other VLMs and other test images.
        n_cells: number of pairs.
    """

    grouping: str
    group: str
    dimension: Dimension
    found: ClusteredMean
    n_cells: int


def group_effects(analysis: StudyAnalysis) -> list[GroupEffect]:
    """Effects of all quantizations (no control, no surgery, the logit scale as it came), then by group.

    A grouping that does not divide the pairs, and a pair of which a grouping says nothing, are left out.
    """
    architectures = {vlm: architecture_of(vlm) for vlm in analysis.vlms}
    sources = {vlm: source_of(analysis, vlm) for vlm in analysis.vlms}
    groupings: dict[str, Callable[[str, Setting], str]] = {
        "": lambda vlm, setting: "all",
        "methods": lambda vlm, setting: "trained" if setting.is_trained else "post-training",
        "bits": lambda vlm, setting: setting.bits,
        "scope": lambda vlm, setting: setting.scope,
        "architecture": lambda vlm, setting: architectures[vlm],
        "pre-training": lambda vlm, setting: sources[vlm],
    }
    found = []
    for grouping, group_of in groupings.items():
        groups = effects_by(analysis, grouping, group_of)
        if grouping and len(groups) < 2:
            continue
        order = sorted(groups) if grouping != "bits" else list(dict.fromkeys(s.bits for s in analysis.settings))
        for group in (name for name in order if name in groups):
            found += groups[group]
    return found


def effects_by(
    analysis: StudyAnalysis, grouping: str, group_of: Callable[[str, Setting], str]
) -> dict[str, list[GroupEffect]]:
    """Effects of all quantizations (no control, no surgery, the logit scale as it came) by group, one of each dimension.

    Args:
        analysis: the study.
        grouping: what the groups are called together.
        group_of: the group of a VLM's setting; empty for none.
    """
    groups: dict[str, dict[Dimension, dict[str, list[Cell]]]] = {}
    for dimension in dimensions(analysis.score):
        for vlm, setting, comparison in analysis.comparisons.of(dimension.measure):
            if setting.is_quantization and not setting.is_tuned and (group := group_of(vlm, setting)):
                own = groups.setdefault(group, {}).setdefault(dimension, {}).setdefault(vlm, [])
                own.append(Cell.of(dimension.measure, comparison, "effect"))
    return {
        group: [
            GroupEffect(grouping, group, dimension, by_vlm(cells), sum(map(len, cells.values())))
            for dimension, cells in own.items()
        ]
        for group, own in groups.items()
    }
