"""One row per evaluated sample: what every later statistic is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_vlmq.core.errors import VLMQError, unknown

_BLOCK = 32
_CACHED = 2**17  # numbers that stay in a processor's cache


class _Softmax:
    """What the columns need of ``logits`` ``[n, C]`` and ``target`` ``[n]``, each computed when it is first asked for."""

    def __init__(self, logits: Tensor, target: Tensor) -> None:
        if logits.ndim != 2 or target.shape != logits.shape[:1] or logits.shape[1] == 0:
            raise VLMQError(
                f"logits must be [n, C] with C > 0 and target [n], got {tuple(logits.shape)} and {tuple(target.shape)}"
            )
        if not logits.is_floating_point():
            raise VLMQError(f"logits must be floating point, got {logits.dtype}")
        n, n_classes = logits.shape
        target = target.long()
        low, high = (int(end) for end in target.aminmax()) if n else (0, 0)
        if low < -1 or high >= n_classes:
            raise VLMQError(f"targets must lie in [-1, {n_classes}), got {low} to {high}")
        self.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self.target = target
        self.column = target.clamp(min=0).unsqueeze(-1)  # 0 where there is no class

    @cached_property
    def probs(self) -> Tensor:
        return self.logits.softmax(-1)

    @cached_property
    def confidence(self) -> Tensor:
        if "probs" in self.__dict__ or self.logits.is_cuda:
            return self.probs.amax(-1)
        # some rows at a time, whose probabilities then never leave the processor's cache
        rows = max(1, _CACHED // self.logits.shape[1])
        return torch.cat([part.softmax(-1).amax(-1) for part in self.logits.split(rows)])

    @cached_property
    def prediction(self) -> Tensor:
        return torch.where(self.confidence.isnan(), -1, _first_highest(self.logits))

    @cached_property
    def labelled(self) -> Tensor:
        """Has a class and a softmax."""
        return (self.target >= 0) & ~self.confidence.isnan()


def _first_highest(logits: Tensor) -> Tensor:
    """As ``logits.argmax(-1)``, of equal logits the first; by blocks, as a CPU's search for the index takes longer than a softmax."""
    n, n_classes = logits.shape
    whole = n_classes - n_classes % _BLOCK
    if whole == 0:
        return logits.argmax(-1)
    blocks = logits[:, :whole].unflatten(1, (-1, _BLOCK))
    highest, block = blocks.amax(-1).max(-1)
    index = block * _BLOCK + blocks[torch.arange(n, device=logits.device), block].argmax(-1)
    if whole < n_classes:
        last, at = logits[:, whole:].max(-1)
        index = torch.where(last > highest, whole + at, index)
    return index


def confidence_and_correct(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The two columns that calibration needs; arguments, NaN rules and errors as :func:`per_sample`.

    Args:
        logits: float ``[n, C]``.
        target: int64 ``[n]``, -1 where there is no class.

    Returns:
        ``confidence`` float ``[n]`` and ``correct`` bool ``[n]``.

    Raises:
        VLMQError: as :func:`per_sample`.
    """
    columns = per_sample(logits, target, ("confidence", "correct"))
    return columns["confidence"], columns["correct"]


def per_sample(logits: Tensor, target: Tensor, columns: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Turn a batch of logits into the per-sample records.

    Args:
        logits: float ``[n, C]``, before the softmax and with the logit scale already applied. Half precision is
            computed in float32.
        target: int64 ``[n]``, the class, or -1 where the sample has no class (out-of-distribution sets).
        columns: names of the columns to compute; all if not given.

    Returns:
        Columns of shape ``[n]``:

        - ``prediction`` int64, the first class with the highest logit;
        - ``confidence`` float, the highest softmax probability;
        - ``correct`` bool; ``correct_top5`` bool, the target is among the first min(5, C) classes (equal logits rank
          in class order). Both False where the target is -1;
        - ``nll`` float, -log p(target) in nats; ``brier`` float, the multi-class sum form
          sum_c (p_c - 1[c = target])^2 (Brier 1950), in [0, 2]. Both NaN where the target is -1.

        A row whose softmax is undefined (a NaN or +inf logit, or all -inf) has prediction -1, is not correct, and has
        NaN in every float column: a broken model never counts as right and its mean metrics show it.

    Raises:
        VLMQError: shapes do not fit, ``C`` is 0, ``logits`` is not floating point, a target is outside [-1, C), or a column is
            unknown.
    """
    p = _Softmax(logits, target)
    found: dict[str, Tensor] = {}
    for name in _COLUMNS if columns is None else columns:
        if name not in _COLUMNS:
            raise unknown("column", name, _COLUMNS)
        found[name] = _COLUMNS[name](p)
    return found


def _nll(p: _Softmax) -> Tensor:
    # not -log of the target's probability, which can underflow
    return torch.where(p.target >= 0, cross_entropy(p.logits, p.column.squeeze(-1), reduction="none"), torch.nan)


def _brier(p: _Softmax) -> Tensor:
    brier = torch.linalg.vecdot(p.probs, p.probs) - 2 * p.probs.gather(-1, p.column).squeeze(-1) + 1
    return torch.where(p.labelled, brier, torch.nan)


def _correct_top5(p: _Softmax) -> Tensor:
    logits = p.logits.detach()  # nothing here has a gradient, and torch wants that said
    logit, first = logits.gather(-1, p.column), min(5, logits.shape[1])
    # compared into floats, which add up three times as fast as booleans on a CPU
    higher, at_least = (
        compare(logits, logit, out=torch.empty_like(logits)).sum(-1) for compare in (torch.gt, torch.ge)
    )
    found = at_least <= first
    tied = (higher < first) & ~found
    if bool(tied.any()):  # of the classes with the target's logit, those before it rank higher
        before = torch.arange(logits.shape[1], device=logits.device) < p.column[tied]
        found[tied] = higher[tied] + ((logits[tied] == logit[tied]) & before).count_nonzero(-1) < first
    return p.labelled & found


_COLUMNS: Mapping[str, Callable[[_Softmax], Tensor]] = {
    "prediction": lambda p: p.prediction,
    "confidence": lambda p: p.confidence,
    "correct": lambda p: p.labelled & (p.prediction == p.target),
    "correct_top5": _correct_top5,
    "nll": _nll,
    "brier": _brier,
}


def kl_divergence(logits_f: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p_f || p_q) of each sample: what it costs to take the second model's class probabilities for the first's.

    Unlike agreement it sees changes that leave every prediction as it is (Dutta et al. 2024, arXiv 2407.09141).

    Args:
        logits_f: float ``[n, C]``, logit scale applied; the model to keep to, full precision's.
        logits_q: float ``[n, C]``.

    Returns:
        ``[n]``, float64, in nats: at least 0, infinite where the second rules out what the first does not, NaN where a softmax is
        undefined. Computed in float64, as the terms cancel to a small part of themselves.

    Raises:
        VLMQError: the shapes differ or are not ``[n, C]``.
    """
    if logits_f.ndim != 2 or logits_f.shape != logits_q.shape:
        raise VLMQError(
            f"kl_divergence needs logits [n, C] of the same samples, got {tuple(logits_f.shape)} and {tuple(logits_q.shape)}"
        )
    if logits_f is logits_q:  # a model beside itself, which every full precision is
        return torch.where(logits_q.softmax(-1).isnan().any(-1), torch.nan, torch.zeros((), dtype=torch.float64))
    log_f, log_q = (logits.double().log_softmax(-1) for logits in (logits_f, logits_q))
    p_f = log_f.exp()
    terms = torch.where(p_f == 0, 0.0, p_f * (log_f - log_q))
    return torch.where(
        log_q.isnan().any(-1), torch.nan, terms.sum(-1).clamp(min=0)
    )  # of rounding alone it may be below 0


def agreement(prediction_f: Tensor, prediction_q: Tensor) -> Tensor:
    """Share of samples whose prediction two models share; one minus it is the share of flips (Dutta et al. 2024).

    Args:
        prediction_f: int64 ``[..., n]``, classes; -1 marks a sample for which a model has no prediction.
        prediction_q: int64 ``[..., n]``.

    Returns:
        float64 ``[...]``; NaN where ``n`` is 0. A sample without prediction never counts as agreed.

    Raises:
        VLMQError: the last dimensions differ.
    """
    if prediction_f.shape[-1:] != prediction_q.shape[-1:]:
        raise VLMQError(
            f"agreement needs predictions on the same samples, got {tuple(prediction_f.shape)}"
            f" and {tuple(prediction_q.shape)}"
        )
    return ((prediction_f == prediction_q) & (prediction_f >= 0)).to(torch.float64).mean(-1)
