"""The one place where a measure's value and its bootstrap replicates are computed: of k runs on the same samples, one run is k = 1.

A run's rows and a study's comparisons both come from here, with the same :class:`~lightning_vlmq.statistics.Statistics`, which are
stored with the run. Sets of one group (see :class:`~lightning_vlmq.data.EvalSet`) see the same resamples, all others independent ones.
Which ones follows from the group's or set's name, the number of samples and the seed alone: every run and report draws the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.evaluation.estimates import Array, Estimate
from lightning_vlmq.evaluation.records import SampleMatrix
from lightning_vlmq.metrics.functional import aupr_in, aupr_out, fpr95, fpr95_openood, placements
from lightning_vlmq.statistics import RankingMetrics, Statistics, ranking_metrics, resample_counts, selective_metrics
from lightning_vlmq.statistics.replicates import Counts

_CHUNK = 2**21  # weights that are float64 at a time
_KEPT = 2**25  # resampled counts of more samples than this are drawn again each time


class RunRecords(Mapping[str, Tensor]):
    """What a metric sees of one run on one data set: record columns ``[n]``.

    Attributes:
        reference: the first run's records of the same samples.
        settings: the statistics' settings.
    """

    def __init__(self, columns: Mapping[str, Tensor], reference: RunRecords | None, settings: Statistics) -> None:
        self._columns = columns
        self.reference = self if reference is None else reference
        self.settings = settings

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._columns:
            raise VLMQError(f"no column '{name}' was recorded; there are {', '.join(self._columns)}")
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


@dataclass(frozen=True)
class SampleMean:
    """A metric that is the mean of per-sample values, or a function of several such means; the cheapest to resample.

    Attributes:
        columns: of a run's records, ``[n]``, or ``[n, m]`` for m means.
        reduce: of the means ``[..., m]`` and of the columns ``[n, m]`` as they are, to ``[...]``; not needed for ``[n]``.
        doubt: of two runs' columns, the standard deviation of what their difference may be off by that no resample shows.
    """

    columns: Callable[[RunRecords], Tensor]
    reduce: Callable[[Tensor, Tensor], Tensor] | None = None
    doubt: Callable[[Tensor, Tensor], float] | None = None


@dataclass(frozen=True)
class Ranked:
    """A metric that every resample computes anew.

    Attributes:
        function: of record columns ``[..., n]`` by name, and the settings, to ``[...]``.
        names: the columns it reads.
        fast: a field of :class:`~lightning_vlmq.statistics.SelectiveMetrics` that holds its replicates, where there is one.
    """

    function: Callable[[Mapping[str, Tensor], Statistics], Tensor]
    names: tuple[str, ...] = ("confidence", "correct")
    fast: str = ""


class _Means(NamedTuple):
    columns: Tensor  # [n, m] float64
    value: Tensor  # [m]
    replicates: Tensor  # [R, m]


class AlignedRuns:
    """k runs on the same samples, and the estimates that follow from them.

    Args:
        sets: the data sets, each with all runs' records.
        settings: what decides the estimates.
        wanted: whether a metric is asked for, by its name, role and score (or none); everything is where not given.
    """

    def __init__(
        self,
        sets: Sequence[SampleMatrix],
        settings: Statistics,
        wanted: Callable[[str, str, str], bool] = lambda metric, role, score: True,
    ) -> None:
        self.sets = list(sets)
        self.settings = settings
        self.wanted = wanted
        self._records: dict[tuple[int, int], RunRecords] = {}
        self._means: dict[tuple[int, int], dict[Callable[[RunRecords], Tensor], _Means]] = {}
        self._selective: dict[tuple[int, int], Mapping[str, Array]] = {}

    def of_role(self, role: str) -> list[SampleMatrix]:
        """The sets of a role; of corrupted ones without their originals."""
        return [m for m in self.sets if m.where.role == role and (role != "corruption" or m.where.severity)]

    def records(self, matrix: SampleMatrix, run: int) -> RunRecords:
        """One run's records of a set, as tensors."""
        key = id(matrix), run
        if key not in self._records:
            columns = {name: torch.from_numpy(np.array(column)) for name, column in matrix.tables[run].items()}
            reference = self.records(matrix, 0) if run and 0 in matrix.tables else None
            self._records[key] = RunRecords(columns, reference, self.settings)
        return self._records[key]

    def estimate(self, matrix: SampleMatrix, kind: SampleMean | Ranked) -> Estimate:
        """A metric of the set's samples, of every run."""
        n_resamples = self.settings.n_resamples if isinstance(kind, SampleMean) else self.settings.n_resamples_ranking
        value, replicates = np.full(matrix.n_runs, np.nan), np.full((n_resamples, matrix.n_runs), np.nan)
        for run in matrix.tables:
            one = self._mean if isinstance(kind, SampleMean) else self._ranked
            value[run], replicates[:, run] = one(matrix, run, kind)  # type: ignore[arg-type]
        doubt = np.zeros(matrix.n_runs)
        if isinstance(kind, SampleMean) and kind.doubt and 0 in matrix.tables:
            columns = {run: self._means[id(matrix), run][kind.columns].columns for run in matrix.tables}
            for run in matrix.tables:
                doubt[run] = kind.doubt(columns[0], columns[run]) if run else 0.0
        return Estimate(value, replicates, matrix.n, doubt=doubt)

    def _mean(self, matrix: SampleMatrix, run: int, kind: SampleMean) -> tuple[float, Array]:
        known = self._means.setdefault((id(matrix), run), {})
        if kind.columns not in known:  # shared by the plug-in and the debiased error
            columns = kind.columns(self.records(matrix, run)).to(torch.float64)
            flat = columns.reshape(matrix.n, -1)
            parts = [part @ flat / matrix.n for part in self._weights(matrix)]
            known[kind.columns] = _Means(columns, columns.mean(0), torch.cat(parts).reshape(-1, *columns.shape[1:]))
        columns, value, replicates = known[kind.columns]
        if kind.reduce is None:
            return float(value), replicates.numpy()
        return float(kind.reduce(value, columns)), kind.reduce(replicates, columns).numpy()

    def _ranked(self, matrix: SampleMatrix, run: int, kind: Ranked) -> tuple[float, Array]:
        records, settings = self.records(matrix, run), self.settings
        columns = {name: records[name] for name in kind.names}
        value = float(kind.function(columns, settings))
        counts = self.counts(matrix, settings.n_resamples_ranking)
        if kind.fast:
            key = id(matrix), run
            if key not in self._selective:
                arrays = records["confidence"].numpy(), records["correct"].numpy()
                self._selective[key] = selective_metrics(*arrays, counts, settings.risk)._asdict()
            return value, self._selective[key][kind.fast]
        drawn = np.stack([np.repeat(np.arange(matrix.n), column.astype(np.intp)) for column in counts.T])
        index = torch.from_numpy(drawn)
        parts = [
            kind.function({name: column[rows] for name, column in columns.items()}, settings)
            for rows in index.split(max(1, _CHUNK // matrix.n))
        ]
        return value, torch.cat(parts).to(torch.float64).numpy()

    def _weights(self, matrix: SampleMatrix) -> Iterator[Tensor]:
        """How often each sample is drawn, float64 ``[r, n]``, some resamples at a time."""
        place = (matrix.where.group or matrix.where.dataset, matrix.n, self.settings.n_resamples, self.settings.seed)
        if matrix.n * self.settings.n_resamples <= _CHUNK:
            yield _kept_weights(*place)
            return
        counts = torch.from_numpy(drawn_counts(*place)).T
        yield from (part.to(torch.float64) for part in counts.split(max(1, _CHUNK // matrix.n)))

    def counts(self, matrix: SampleMatrix, n_resamples: int) -> Counts:
        """How often each sample of a set is drawn in each resample, float32 ``[n, R]``; sets of a group are drawn alike."""
        return drawn_counts(matrix.where.group or matrix.where.dataset, matrix.n, n_resamples, self.settings.seed)

    def auroc(self, id_sets: Sequence[SampleMatrix], ood: SampleMatrix, score: str) -> Estimate:
        """AUROC of a score, resampled by its structural components (DeLong et al. 1988), which makes its variance DeLong's."""
        n_resamples, k = self.settings.n_resamples, ood.n_runs
        value, replicates = np.full(k, np.nan), np.full((n_resamples, k), np.nan)
        for run, (inside, outside) in self._scores(id_sets, ood, score).items():
            below, above = placements(inside, outside)
            value[run] = float(below.mean())
            drawn = [
                self._resampled_mean(part, s) * s.n for part, s in zip(below.split([s.n for s in id_sets]), id_sets)
            ]
            replicates[:, run] = np.sum(drawn, axis=0) / len(below) + self._resampled_mean(above, ood) - value[run]
        return Estimate(value, replicates, ood.n, n_least=min(ood.n, sum(s.n for s in id_sets)))

    def _resampled_mean(self, column: Tensor, matrix: SampleMatrix) -> Array:
        return torch.cat([part @ column / matrix.n for part in self._weights(matrix)]).numpy()

    def rankings(self, id_sets: Sequence[SampleMatrix], ood: SampleMatrix, score: str) -> dict[str, Estimate]:
        """AUPR and FPR95 in both conventions; ID and OOD sets are resampled independently."""
        n_resamples, k = self.settings.n_resamples_ranking, ood.n_runs
        functions = {"aupr_in": aupr_in, "aupr_out": aupr_out, "fpr95": fpr95, "fpr95_openood": fpr95_openood}
        value = {name: np.full(k, np.nan) for name in functions}
        replicates = {name: np.full((n_resamples, k), np.nan) for name in functions}
        counts = np.concatenate([self.counts(s, n_resamples) for s in id_sets]), self.counts(ood, n_resamples)
        known: dict[bytes, RankingMetrics] = {}  # a tuned logit scale leaves many scores as they are
        for run, (inside, outside) in self._scores(id_sets, ood, score).items():
            key = inside.numpy().tobytes() + outside.numpy().tobytes()
            if key not in known:
                known[key] = ranking_metrics(inside.numpy(), outside.numpy(), *counts)
            for name, function in functions.items():
                value[name][run] = float(function(inside, outside))
                replicates[name][:, run] = getattr(known[key], name)
        least = min(ood.n, sum(s.n for s in id_sets))
        return {name: Estimate(value[name], replicates[name], ood.n, n_least=least) for name in functions}

    def _scores(
        self, id_sets: Sequence[SampleMatrix], ood: SampleMatrix, score: str
    ) -> dict[int, tuple[Tensor, Tensor]]:
        runs = [run for run in ood.tables if all(run in s.tables for s in id_sets)]
        return {
            run: (torch.cat([self.records(s, run)[score] for s in id_sets]), self.records(ood, run)[score])
            for run in runs
        }


def drawn_counts(name: str, n: int, n_resamples: int, seed: int) -> Counts:
    """Resamples of the group or set of that name: float32 ``[n, R]``, see :func:`~lightning_vlmq.statistics.resample_counts`."""
    return (_kept_counts if n * n_resamples <= _KEPT else _counts)(name, n, n_resamples, seed)


def stream_of(text: str) -> int:
    """The random stream of what is called so, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _counts(name: str, n: int, n_resamples: int, seed: int) -> Counts:
    return resample_counts(n, n_resamples, seed, stream_of(f"{name} {n}"))


_kept_counts = lru_cache(maxsize=16)(_counts)


@lru_cache(maxsize=16)
def _kept_weights(name: str, n: int, n_resamples: int, seed: int) -> Tensor:
    """The counts as float64 ``[R, n]``: hundreds of metrics of a run are products with them."""
    return torch.from_numpy(_kept_counts(name, n, n_resamples, seed)).T.to(torch.float64).contiguous()
