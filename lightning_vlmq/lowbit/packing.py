"""Integers of 2 to 7 bits without gaps between them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PLANES = (4, 2, 1)
"""Widths of the bit fields that a number of 2 to 7 bits is cut into; each fills whole bytes."""


def pack(levels: Tensor, bits: int) -> Tensor:
    """Store signed integers of ``bits`` bits without gaps.

    Args:
        levels: int8, any shape, within ``-2^(bits-1) .. 2^(bits-1)-1``.
        bits: 2 to 7.

    Returns:
        uint8 ``[bits * ceil(n / 8)]`` for ``n`` levels: all lower fields one after the other, then all higher ones.
    """
    values = F.pad((levels.flatten().short() + 2 ** (bits - 1)).to(torch.uint8), (0, -levels.numel() % 8))
    fields, low = [], 0
    for width in (w for w in PLANES if bits & w):
        field = ((values >> low) & (2**width - 1)).view(-1, 8 // width)
        fields.append((field << torch.arange(0, 8, width, dtype=torch.uint8, device=field.device)).sum(1))
        low += width
    return torch.cat(fields).to(torch.uint8)


def unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """The signed integers that :func:`pack` stored, int8 of the given shape."""
    count = shape.numel()
    values: Tensor | None = None
    start, low = 0, 0
    for width in (w for w in PLANES if bits & w):
        stop = start + -(-count // 8) * width
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        field = (((packed[start:stop, None] >> shifts) & (2**width - 1)) << low).flatten()
        values = field if values is None else values + field
        start, low = stop, low + width
    assert values is not None
    return (values[:count].to(torch.int8) - 2 ** (bits - 1)).view(shape)
