"""Integers of two to seven bits, packed into bytes and back."""

import pytest
import torch

from lightning_vlmq.lowbit.packing import pack, unpack


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (4, 2, 3, 3)])
def test_packing_keeps_every_integer_in_its_bits(bits: int, shape: tuple[int, ...]):
    levels = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    packed = pack(levels, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == bits * -(-levels.numel() // 8)
    assert torch.equal(unpack(packed, bits, levels.shape), levels)
