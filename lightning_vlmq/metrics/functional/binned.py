"""Bounded-memory versions of metrics that rank samples: counts in fixed bins, and how far off the value can be.

The error bounds are not asymptotic: they follow from the counts of the run at hand and hold for every data set that
gives these counts, whatever the order inside a bin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vlmq.errors import VLMQError
from lightning_vlmq.metrics.functional.calibration import BinSums


@dataclass(frozen=True)
class Bounded:
    """A value with the most it can differ from the exact one.

    Attributes:
        value: float64 scalar tensor.
        error_bound: float64 scalar tensor; ``|value - exact| <= error_bound``, up to float64 rounding.
    """

    value: Tensor
    error_bound: Tensor


def score_counts(scores: Tensor, low: float, high: float, n_bins: int) -> Tensor:
    """Count scores in equal bins over [low, high]; scores outside fall into the first and last bin.

    Args:
        scores: float ``[n]``, none NaN.
        low: lower end of the range.
        high: upper end, above ``low``.
        n_bins: number of bins.

    Returns:
        int64 ``[n_bins]``.

    Raises:
        VLMQError: a score is NaN: it has no place in the order.
    """
    if bool(scores.isnan().any()):
        raise VLMQError("binned detection metrics cannot place NaN scores; use the exact functions, which report NaN")
    position = (scores.to(torch.float64) - low) / (high - low) * n_bins
    return torch.bincount(position.clamp(0, n_bins - 1).long(), minlength=n_bins)


@dataclass(frozen=True)
class DetectionCounts:
    """Binned ID and OOD scores, and the detection metrics computed as if the scores of one bin were tied.

    A metric is NaN, with a NaN bound, when a side is empty.

    Attributes:
        id_counts: int64 ``[bins]``, ID samples per bin of ascending score.
        ood_counts: int64 ``[bins]``, OOD samples.
    """

    id_counts: Tensor
    ood_counts: Tensor

    def auroc(self) -> Bounded:
        """AUROC. Only pairs inside one bin can be misjudged, each by 1/2: bound sum_b id_b ood_b / (2 n1 n2)."""
        ids, oods = self.id_counts.to(torch.float64), self.ood_counts.to(torch.float64)
        n_pairs = ids.sum() * oods.sum()
        below = oods.cumsum(0) - oods
        within = (ids * oods).sum() / (2 * n_pairs)
        return Bounded((ids * below).sum() / n_pairs + within, within)

    def fpr95(self) -> Bounded:
        """FPR at 95 % TPR, ID positive. The threshold lies in a known bin: the bound is that bin's share of OOD."""
        return _rate_at_95(self.id_counts.flip(0), self.ood_counts.flip(0))

    def fpr95_openood(self) -> Bounded:
        """FPR at 95 % TPR, OOD positive. The threshold lies in a known bin: the bound is that bin's share of ID."""
        return _rate_at_95(self.ood_counts, self.id_counts)

    def aupr_in(self) -> Bounded:
        """Average precision, ID positive; see :func:`_precision_by_bin` for the bound."""
        return _precision_by_bin(self.id_counts.flip(0), self.ood_counts.flip(0))

    def aupr_out(self) -> Bounded:
        """Average precision, OOD positive, ranked by the negated score."""
        return _precision_by_bin(self.ood_counts, self.id_counts)


def _rate_at_95(positive: Tensor, negative: Tensor) -> Bounded:
    n1, n2 = int(positive.sum()), int(negative.sum())
    if n1 * n2 == 0:
        nan = torch.tensor(torch.nan, dtype=torch.float64, device=positive.device)
        return Bounded(nan, nan)
    kept = -(-95 * n1 // 100)
    threshold_bin = int((positive.cumsum(0) < kept).sum())
    alarms = negative[: threshold_bin + 1].sum().to(torch.float64)
    return Bounded(alarms / n2, negative[threshold_bin].to(torch.float64) / n2)


def _precision_by_bin(positive: Tensor, negative: Tensor) -> Bounded:
    """Average precision over bins in descending order of evidence for the positive class.

    A bin with P positives above it, p inside, N negatives above and q inside: its i-th positive has a precision of at
    least (P + i) / (P + i + N + q), when all negatives of the bin come first, and at most (P + p) / (P + p + N), when
    none does and the positives are tied. The sum of the lower ends over i is a difference of digammas.
    """
    pos, neg = positive.to(torch.float64), negative.to(torch.float64)
    pos_above, neg_above = pos.cumsum(0) - pos, neg.cumsum(0) - neg
    hits, alarms = pos_above + pos, neg_above + neg
    held = pos > 0
    precision = torch.where(held, hits / (hits + alarms), 0.0)
    highest = torch.where(held, hits / (hits + neg_above), 0.0)
    lowest_sum = pos - alarms * (
        torch.special.digamma(hits + alarms + 1) - torch.special.digamma(pos_above + alarms + 1)
    )
    total = torch.where(neg.sum() > 0, pos.sum(), torch.nan)
    value = (pos * precision).sum() / total
    upper, lower = (pos * highest).sum() / total, torch.where(held, lowest_sum, 0.0).sum() / total
    return Bounded(value, torch.maximum(upper - value, value - lower))


def adaptive_ece_from_cells(cells: BinSums, n_bins: int = 15) -> Bounded:
    """Adaptive ECE (equal-mass bins, l1) from sums over a fine equal-width grid of confidences.

    A cut between two equal-mass bins that falls inside a cell of m samples, a share f of them to its left, divides the
    cell's sums in proportion. Correctness minus confidence varies by at most 1 + w in a cell of width w, so the sums
    left and right of the cut are each off by at most (1 + w) m f (1 - f): with n samples the value is off by at most
    2 (1 + w) / n times the sum of m f (1 - f) over the cuts.

    Args:
        cells: sums ``[K + 1]`` as :func:`~.calibration.equal_width_bin_sums` gives for K cells.
        n_bins: number of equal-mass bins; sizes differ by at most one sample, the larger first.

    Returns:
        The value and its bound; NaN without samples or with a NaN confidence.
    """
    count = cells.count
    n = int(count.sum())
    if n == 0:
        nan = torch.tensor(torch.nan, dtype=torch.float64, device=count.device)
        return Bounded(nan, nan)
    size, larger = divmod(n, n_bins)
    b = torch.arange(1, n_bins, device=count.device)
    cuts = (b * size + b.clamp(max=larger)).to(torch.float64)

    ends = count.cumsum(0)
    cell = torch.searchsorted(ends, cuts).clamp(max=len(count) - 1)
    m = count[cell]
    share = torch.where(m > 0, (cuts - (ends[cell] - m)) / m, 0.0)
    gap = cells.correct - cells.confidence
    before = gap.cumsum(0)[cell] - gap[cell]
    at_cuts = before + share * gap[cell]
    whole = torch.cat([gap.new_zeros(1), at_cuts, gap.sum().unsqueeze(0)])
    width = 1 / (len(count) - 1)
    bound = 2 * (1 + width) * (m * share * (1 - share)).sum() / n
    return Bounded(whole.diff().abs().sum() / n, bound)
