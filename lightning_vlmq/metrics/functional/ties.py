"""What becomes of equal scores: every metric here that sorts gives the same value for any order of the samples."""

from __future__ import annotations

import torch
from torch import Tensor


def tie_group_means(sorted_keys: Tensor, values: Tensor) -> Tensor:
    """Replace each value by the mean over the samples whose key is the same.

    A statistic that is linear in ``values`` taken along the sorted order then equals its expectation over all orders of
    tied samples, so that it does not depend on the order the samples came in.

    Args:
        sorted_keys: float ``[..., n]``, sorted along the last dimension (either direction).
        values: ``[..., n]`` in the same order, any dtype.

    Returns:
        float64 ``[..., n]``.
    """
    values = values.to(torch.float64)
    if sorted_keys.shape[-1] == 0:
        return values
    starts = torch.ones_like(sorted_keys, dtype=torch.bool)
    starts[..., 1:] = sorted_keys[..., 1:] != sorted_keys[..., :-1]
    group = starts.long().cumsum(-1) - 1
    sums = torch.zeros_like(values).scatter_add_(-1, group, values)
    counts = torch.zeros_like(values).scatter_add_(-1, group, torch.ones_like(values))
    return (sums / counts.clamp(min=1)).gather(-1, group)
