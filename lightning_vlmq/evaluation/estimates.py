"""A measure's value on k runs with its bootstrap replicates, and what follows from both: sums, means, standard errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A measure on ``k`` runs, the first of which is full precision where there are several.

    Attributes:
        value: ``[k]``, NaN where a run lacks a data set.
        replicates: ``[R, k]``, its values on R bootstrap resamples, the same for all runs; none where only standard errors are known.
        n: number of samples that it is computed from.
        closed_form: ``[2, k]``, standard errors of the value and of its change, where there are no replicates.
        doubt: ``[k]``, standard deviation of what the change against the first run may be off by that no resample shows; zeros if none.
        n_least: samples of the smallest set that it follows from; ``n`` if 0.
    """

    value: Array
    replicates: Array
    n: int
    closed_form: Array | None = None
    doubt: Array | None = None
    n_least: int = 0

    @property
    def k(self) -> int:
        """Number of runs."""
        return len(self.value)

    def stderr(self, run: int, is_share: bool) -> float:
        """Standard error of a run's value; see :func:`standard_error`."""
        return standard_error(self.replicates[:, run], is_share, self.n_least or self.n)


def combined(formula: Callable[..., Tensor], *parts: Estimate) -> Estimate:
    """A function of several estimates, on values and on every resample alike."""
    value, replicates = (
        formula(*(torch.from_numpy(np.ascontiguousarray(getattr(part, name))) for part in parts)).numpy()
        for name in ("value", "replicates")
    )
    return Estimate(value, replicates, sum(part.n for part in parts), n_least=_least(parts))


def average(parts: Mapping[str, Estimate]) -> Estimate:
    """Mean over data sets, which are added in the order of their names: the same to the last bit for any order and number of runs."""
    ordered = [parts[name] for name in sorted(parts)]
    value, replicates = (
        sum(getattr(part, name) for part in ordered) / len(ordered) for name in ("value", "replicates")
    )
    doubts = [
        np.zeros(part.k) if part.doubt is None else part.doubt for part in ordered
    ]  # may be of one sign: they add
    return Estimate(
        value, replicates, sum(part.n for part in ordered), doubt=np.mean(doubts, axis=0), n_least=_least(ordered)
    )


def _least(parts: Iterable[Estimate]) -> int:
    return min(part.n_least or part.n for part in parts)


def deviation(replicates: Array) -> float:
    """Standard deviation (ddof 1) of the finite replicates of ``[R]``; NaN for fewer than two (Efron & Tibshirani 1993, chapter 6)."""
    defined = replicates[np.isfinite(replicates)]
    return float(defined.std(ddof=1)) if len(defined) > 1 else float("nan")


def unanimous_error(n: int) -> float:
    """Standard error of a share of ``n`` samples that are all alike: 1 / (n + 2).

    That none of n samples flips, or is wrong, is no proof that none would. Half a sample more in each cell of the paired counts (Agresti
    & Min 2005, Statistics in Medicine 24, 729) gives a difference without discordant pairs that standard error.
    """
    return 1 / (n + 2)


def standard_error(replicates: Array, is_share: bool, n: int, scale: float = 1.0) -> float:
    """The replicates' :func:`deviation`; where no resample of a share of samples differs, :func:`unanimous_error`.

    Args:
        replicates: ``[R]``.
        is_share: whether the measure counts samples, see :class:`~.measures.Metric`.
        n: number of samples.
        scale: what a share of one is in the replicates' unit.
    """
    spread = deviation(replicates)
    return scale * unanimous_error(n) if is_share and spread < 1e-12 else spread
