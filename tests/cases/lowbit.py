"""Schemes and layers that tests of low-bit models share."""

import torch
from torch import nn

from lightning_vlmq.quant import (
    QuantConv2d,
    QuantizedLayer,
    QuantLinear,
    QuantScheme,
)
from lightning_vlmq.quant.rounding import block_range, to_blocks

W8A8, W4A8 = QuantScheme(8, 8, scope="vision_text"), QuantScheme(4, 8, scope="vision_text")
PER_TOKEN = {"act_dynamic": True, "act_granularity": "per_token"}


def layer_of(kind: str, scheme: QuantScheme, seed: int, offsets: tuple[bool, bool] = (False, False)):
    """A calibrated layer with lopsided weights, and an input that is clipped at both ends."""
    torch.manual_seed(seed)
    if kind == "linear":
        layer: QuantizedLayer = QuantLinear(nn.Linear(40, 24), scheme)
        x = torch.randn(3, 7, 40) + 0.3
    else:
        groups = 8 if kind == "depthwise" else 1
        layer = QuantConv2d(nn.Conv2d(8, 16, 3, padding=1, stride=2, groups=groups), scheme)
        x = torch.randn(3, 8, 9, 9) + 0.3
    with torch.no_grad():
        layer.weight += 0.05
    weight, act = layer.weight_fake_quant, layer.act_fake_quant
    if weight.quantizes:
        weight.set_range(*block_range(to_blocks(layer.weight.detach(), weight.granularity), weight.granularity))
    if act.quantizes and not act.dynamic:
        act.set_range(torch.tensor([-1.5]), torch.tensor([2.0]))
    for quantizer, has_offset in zip((weight, act), offsets):
        if has_offset:
            quantizer.set_offset(-(quantizer.zero_point + 0.37) * quantizer.scale)
    return layer.eval().requires_grad_(False), x
