"""Bounded-memory versions of metrics that rank samples: counts in fixed bins, and how far off the value can be.

The error bounds are not asymptotic: they follow from the counts of the run at hand and hold for every data set that
gives these counts, whatever the order inside a bin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_vlmq.metrics.functional.calibration import BinSums
from lightning_vlmq.metrics.functional.selective import checked_risk, within_risk


@dataclass(frozen=True)
class Bounded:
    """A value with the most it can differ from the exact one.

    Attributes:
        value: float64 scalar tensor.
        error_bound: float64 scalar tensor; ``|value - exact| <= error_bound``, up to float64 rounding.
    """

    value: Tensor
    error_bound: Tensor


def score_bins(scores: Tensor, low: float, high: float, n_bins: int) -> Tensor:
    """The bin of each score, of equal bins over [low, high]; scores outside fall into the first and last bin.

    Args:
        scores: float ``[n]``, none NaN.
        low: lower end of the range.
        high: upper end, above ``low``.
        n_bins: number of bins.

    Returns:
        int64 ``[n]`` in [0, n_bins).
    """
    position = (scores.to(torch.float64) - low) / (high - low) * n_bins
    return position.clamp(0, n_bins - 1).long()


def confidence_cells(confidence: Tensor, cells: int) -> Tensor:
    """The cell of each confidence, of equal ones over [0, 1) and one more for confidences of exactly 1 (and NaN).

    Args:
        confidence: float ``[n]`` in [0, 1].
        cells: number of equal cells.

    Returns:
        int64 ``[n]`` in [0, cells].
    """
    return (confidence.to(torch.float64).nan_to_num(1.0) * cells).long()


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
        cells: sums ``[K + 1]`` over the cells of :func:`confidence_cells`, K of them and one.
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


@dataclass(frozen=True)
class SelectiveCounts:
    """Samples and hits in fine cells of confidence, and selective prediction as if a cell's samples were tied.

    Take the cells from the most confident down. A cell with m samples, e of them wrong, lies below N more confident
    samples with E errors, and nothing is known of the order inside it. Its first i samples hold at most min(i, e)
    errors (all errors first) and at least max(0, i - (m - e)) (all errors last): every order lies between, and so does
    the mean over the orders of tied samples that the exact metrics take. In the last cell all confidences are 1, that
    is tied: there nothing is uncertain.

    Metrics are NaN, with a NaN bound, without samples.

    Attributes:
        count: int64 ``[K + 1]``, samples per cell of :func:`confidence_cells`.
        correct: int64 ``[K + 1]``, how many of them are right.
    """

    count: Tensor
    correct: Tensor

    def _most_confident_first(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Samples and errors in each cell, and above it: m, e, N and E, each float64 ``[K + 1]``."""
        count = self.count.flip(0).to(torch.float64)
        errors = count - self.correct.flip(0)
        return count, errors, count.cumsum(0) - count, errors.cumsum(0) - errors

    def aurc(self) -> Bounded:
        """Area under the risk-coverage curve; see :func:`~.selective.aurc`.

        The risk of the first N + i samples is (E + errors among the cell's first i) / (N + i). With H(a, b) the sum of
        1 / k over a < k <= b, a difference of digammas, a cell adds to n times the area

        - E H(N, N + m) + (e / m) (m - N H(N, N + m)) when it is tied, which is the value;
        - E H(N, N + m) + e - N H(N, N + e) + e H(N + e, N + m) at most, all errors first;
        - E H(N, N + m) + e - (N + m - e) H(N + m - e, N + m) at least, all errors last.

        The bound is the larger of the distances to the two ends: there is an order of the samples that meets it.
        """
        count, errors, above, errors_above = self._most_confident_first()
        covered, right = above + count, count - errors
        whole = _reciprocals(above, covered)
        tied = torch.where(count > 0, errors / count, 0.0) * (count - above * whole)
        first = errors - above * _reciprocals(above, above + errors) + errors * _reciprocals(above + errors, covered)
        last = errors - (above + right) * _reciprocals(above + right, covered)
        n = count.sum()
        too_low, too_high = (first - tied)[1:].sum(), (tied - last)[1:].sum()
        return Bounded((errors_above * whole + tied).sum() / n, torch.maximum(too_low, too_high).clamp(min=0) / n)

    def coverage_at_risk(self, risk: float) -> Bounded:
        """Largest coverage of a threshold at a risk of at most ``risk``; see :func:`~.selective.coverage_at_risk`.

        The value is that of the best threshold between two cells, whose errors are known: the exact one never falls
        below it. Nor does it exceed the largest N + i that some order allows: with the cell's errors last,
        E + max(0, i - (m - e)) <= risk (N + i). Up to i = m - e the left side is constant, beyond it grows faster than
        the right one, so the largest i is the solution of the linear inequality if that is at least m - e, and else
        there is none in the cell. The bound is the distance to the largest such coverage: a data set with these counts
        meets it.

        Args:
            risk: error rate to stay at or below, in [0, 1].

        Raises:
            VLMQError: ``risk`` is outside [0, 1].
        """
        risk = checked_risk(risk)
        count, errors, above, errors_above = self._most_confident_first()
        covered = above + count
        kept = covered.where(within_risk(errors_above + errors, covered, risk), 0.0).amax()

        count, right, above, errors_above = (x[1:] for x in (count, count - errors, above, errors_above))
        solution = ((risk * above + right - errors_above) / max(1 - risk, torch.finfo(torch.float64).eps)).floor()
        most = kept
        for rounding in (-1, 0, 1):  # of the division; what counts is the test that the exact function makes
            inside = torch.clamp(solution + rounding, right, count)
            possible = within_risk(errors_above + inside - right, above + inside, risk)
            most = torch.maximum(most, (above + inside).where(possible, 0.0).amax())
        n = self.count.sum()
        return Bounded(kept / n, (most - kept) / n)


def _reciprocals(start: Tensor, end: Tensor) -> Tensor:
    """The sum of 1 / k over start < k <= end."""
    return torch.special.digamma(end + 1) - torch.special.digamma(start + 1)
