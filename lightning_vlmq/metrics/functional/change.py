"""Changes against full precision: relative change, relative spurious gap, added vulnerability."""

from __future__ import annotations

import torch
from torch import Tensor


def _relative_drop(reference: Tensor | float, value: Tensor | float) -> Tensor:
    reference = torch.as_tensor(reference, dtype=torch.float64)
    value = torch.as_tensor(value, dtype=torch.float64)
    return torch.where(reference == 0, torch.nan, (reference - value) / reference)


def relative_change(f: Tensor | float, q: Tensor | float) -> Tensor:
    """Relative change (A_f - A_q) / A_f of a metric A: positive where quantization lowered it.

    Args:
        f: the full-precision model's value(s), any shape.
        q: the quantized model's, broadcastable.

    Returns:
        float64, dimensionless; NaN where ``f`` is 0 (no reference to relate to), even if ``q`` is 0 too.
    """
    return _relative_drop(f, q)


def relative_spurious_gap(acc_common: Tensor | float, acc_counter: Tensor | float) -> Tensor:
    """RSG = (A_common - A_counter) / A_common: what share of accuracy is lost off the common background.

    Args:
        acc_common: accuracy on the group with the common (spurious) background, any shape.
        acc_counter: accuracy on the counter group, broadcastable.

    Returns:
        float64; NaN where ``acc_common`` is 0.
    """
    return _relative_drop(acc_common, acc_counter)


def added_vulnerability(delta_counter: Tensor | float, delta_common: Tensor | float) -> Tensor:
    """Vuln_add = delta_counter - delta_common: relative accuracy lost on the counter group beyond the common one's.

    Args:
        delta_counter: :func:`relative_change` of accuracy on the counter group, any shape.
        delta_common: the same on the common group, broadcastable.

    Returns:
        float64; NaN where either is NaN.
    """
    counter = torch.as_tensor(delta_counter, dtype=torch.float64)
    return counter - torch.as_tensor(delta_common, dtype=torch.float64)
