"""Numbers of published claims that are read from the rows of runs as they are: spectra, bands of ranks, single data sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lightning_vlmq.quant.blocks import OUTPUTS
from lightning_vlmq.study.analysis.comparison import StudyAnalysis
from lightning_vlmq.study.analysis.groups import Cell
from lightning_vlmq.study.analysis.queries import GRID, in_grid
from lightning_vlmq.study.analysis.runs import SHIFT_SETS, reference_of
from lightning_vlmq.study.analysis.setting import Setting

Number = Callable[[pd.DataFrame, pd.DataFrame, Setting], float]
"""Of a run's rows, full precision's and the setting: one line per site or data set (``score``, ``dataset``), a column per metric. NaN
where they do not say."""
BLOCK, OUTPUT = r"vision/block (\d+)", OUTPUTS["vision"]
"""Sites of the vision tower's blocks, and of its features."""


@dataclass(frozen=True)
class Recorded:
    """One number of each VLM and setting of the published grid, from rows; means over seeds.

    Attributes:
        what: the number in words.
        metrics: the rows it is made of.
        number: how.
        unit: ``"%"`` or ``"points"``, of hundredths.
        where: fields of a setting and their values.
        is_share: whether its mean is a share.
    """

    what: str
    metrics: tuple[str, ...]
    number: Number
    unit: str = "points"
    where: tuple[tuple[str, Any], ...] = ()
    is_share: bool = False

    def __str__(self) -> str:
        return ", ".join([self.what, *(f"{name}={value}" for name, value in self.where)]) + f"; {GRID}"

    def cells(self, analysis: StudyAnalysis) -> dict[str, list[Cell]]:
        """The numbers by VLM; a VLM without any is left out."""
        results = analysis.results
        rows = results.about(*self.metrics)
        if rows.empty:
            return {}
        wide = rows.pivot_table(index=["run_id", "score", "dataset"], columns="metric", values="value").reset_index()
        wide = wide.reindex(columns=["run_id", "score", "dataset", *self.metrics])
        of_run = dict(iter(wide.groupby("run_id")))
        found: dict[str, list[Cell]] = {}
        for vlm in analysis.vlms:
            references, others = results.runs_of(vlm)
            numbers: dict[Setting, list[float]] = {}
            for run in others:
                setting, reference = run.setting, reference_of(run, references)
                is_asked = all(getattr(setting, name) == value for name, value in self.where) and not setting.is_tuned
                if reference is not None and is_asked and run.run_id in of_run and in_grid(vlm, setting):
                    full = of_run.get(reference.run_id, wide[:0])
                    numbers.setdefault(setting, []).append(self.number(of_run[run.run_id], full, setting))
            cells = [Cell(float(np.mean(own))) for own in numbers.values() if not np.isnan(own).any()]
            if cells:
                found[vlm] = cells
        return found


def shift_growth(own: pd.DataFrame, full: pd.DataFrame, setting: Setting) -> float:
    """Growth of the mean accuracy on those of the published shifted sets that there are."""
    means = [rows.loc[rows["dataset"].isin(SHIFT_SETS), "top1"].mean() for rows in (own, full)]
    return float(means[0] / means[1] - 1) if means[1] else np.nan


def beside(metric: str, other: str, sites: str) -> Number:
    """A metric minus another one of the same run, mean over the sites that the pattern fits."""

    def number(own: pd.DataFrame, full: pd.DataFrame, setting: Setting) -> float:
        return float((own[metric] - own[other])[own["score"].str.fullmatch(sites)].mean())

    return number


def falls_over(*metrics: str) -> Number:
    """1 where each metric is below the one before at the output of the vision tower, else 0."""

    def number(own: pd.DataFrame, full: pd.DataFrame, setting: Setting) -> float:
        values = own.loc[own["score"] == OUTPUT, list(metrics)].to_numpy(float)
        values = values[~np.isnan(values)]
        return float((values[1:] < values[:-1]).all()) if len(values) > 1 else np.nan

    return number


def stable_rank_growth(own: pd.DataFrame, full: pd.DataFrame, setting: Setting) -> float:
    """Growth of the stable rank of weights, mean over the layer groups of the towers that are quantized."""
    both = own.merge(full, on="score", suffixes=("", "_full"))
    both = both[both["score"].str.split("/").str[0].isin(setting.scope.split("_"))]
    return float((both["stable_rank"] / both["stable_rank_full"] - 1).mean())


def block_noise(which: str) -> Number:
    """Noise over signal after vision blocks: of the ``"first half"``, the ``"last"``, or the ``"last minus first half"``."""

    def number(own: pd.DataFrame, full: pd.DataFrame, setting: Setting) -> float:
        block = own["score"].str.extract(BLOCK)[0].astype(float)
        share = 10 ** (-own["mean_sqnr_db"] / 10)
        if block.isna().all():
            return np.nan
        early, last = share[block < (block.max() + 1) / 2].mean(), share[block == block.max()].mean()
        return float({"first half": early, "last": last, "last minus first half": last - early}[which])

    return number
