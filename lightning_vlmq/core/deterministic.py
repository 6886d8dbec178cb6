"""Operations for which CUDA has no deterministic kernel, in a form that has one."""

from __future__ import annotations

from torch import Tensor


def running_sum(x: Tensor, dim: int = 0) -> Tensor:
    """The cumulative sum along an axis, on the input's device; floating-point numbers are added up on the CPU."""
    return x.cpu().cumsum(dim).to(x.device) if x.is_floating_point() else x.cumsum(dim)
