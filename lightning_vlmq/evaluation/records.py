"""Per-sample records of several runs, aligned sample by sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_vlmq.results.schema import SAMPLE_SCHEMA

Columns = dict[str, NDArray[Any]]
"""Per-sample columns of one data set, each ``[n]`` and sorted by sample index."""


@dataclass(frozen=True)
class EvaluationSet:
    """Which data set a table of samples comes from, as :class:`~lightning_vlmq.data.EvalSet` has it."""

    dataset: str
    role: str
    corruption: str
    severity: int
    group: str = ""


class SampleMatrix:
    """Per-sample columns of one data set over several runs, aligned sample by sample.

    Args:
        where: the data set.
        tables: the runs' columns of it by run number, all on the same samples.
        n_runs: number of runs; runs without this data set are NaN in every column.

    Attributes:
        n: number of samples.
    """

    def __init__(self, where: EvaluationSet, tables: dict[int, Columns], n_runs: int) -> None:
        self.where = where
        self.tables = tables
        self.n_runs = n_runs
        self.n = len(next(iter(tables.values()))["index"])

    def __contains__(self, column: str) -> bool:
        return all(column in table for table in self.tables.values())

    def __getitem__(self, column: str) -> NDArray[np.float64]:
        """A column as float64 ``[n, runs]``."""
        matrix = np.full((self.n, self.n_runs), np.nan)
        for run, table in self.tables.items():
            matrix[:, run] = table[column]
        return matrix

    @property
    def scores(self) -> list[str]:
        """Names of the OOD scores that every run recorded."""
        return [name for name in next(iter(self.tables.values())) if name not in SAMPLE_SCHEMA.names and name in self]
