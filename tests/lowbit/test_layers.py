"""Low-bit layers against the formula that they stand for, in float64."""

import pytest
import torch
from cases.lowbit import PER_TOKEN, layer_of
from torch import nn
from torch.nn import functional as F
from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor
from torchao.quantization.granularity import PerTensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.lowbit import layers as lowbit
from lightning_vlmq.lowbit.layers import IntegerConv2d, IntegerLinear, TensorLinear, low_bit_layer
from lightning_vlmq.quant import (
    QuantizedLayer,
    QuantLinear,
    QuantScheme,
)
from lightning_vlmq.quant.rounding import block_range


def reference(layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
    """The layer's formula in float64, from its steps, zero points and offsets."""
    weight, act = layer.weight_fake_quant, layer.act_fake_quant

    def rounded(values: torch.Tensor, quantizer, scale, zero) -> torch.Tensor:
        shift = 0 if quantizer.offset is None or quantizer.dynamic else quantizer.offset.double()
        scale, zero = scale.double(), zero.double()
        if scale.numel() > 1:
            scale, zero = scale[:, None], zero[:, None]
            shift = shift[:, None] if isinstance(shift, torch.Tensor) else shift
        level = torch.round((values - shift) / scale) + zero
        return (level.clamp(quantizer.qmin, quantizer.qmax) - zero) * scale + shift

    w, x = layer.weight.double(), x.double()
    if weight.quantizes:
        blocks = w.reshape(weight.scale.numel(), -1)
        w = rounded(blocks, weight, weight.scale, weight.zero_point).reshape(w.shape)
    if act.quantizes:
        per_tensor = isinstance(act.granularity, PerTensor)
        blocks = x.reshape((1, -1) if per_tensor else (len(x), -1) if x.ndim == 4 else (-1, x.shape[-1]))
        scale, zero = act.scale, act.zero_point
        if act.dynamic:
            low, high = blocks.amin(1).clamp_max(0), blocks.amax(1).clamp_min(0)
            scale, zero = (high - low) / (act.qmax - act.qmin), torch.zeros_like(low)
            zero = torch.round(-low / scale) if not act.symmetric else zero
            scale = torch.maximum(low / act.qmin, high / act.qmax) if act.symmetric else scale
        x = rounded(blocks, act, scale, zero).reshape(x.shape)
    bias = layer.bias.double()
    return layer._conv_forward(x, w, bias) if isinstance(layer, nn.Conv2d) else F.linear(x, w, bias)


LINEAR_CASES = {
    "w8a8": (QuantScheme(8, 8), (False, False), Int8Tensor),
    "w8a8 signed": (QuantScheme(8, 8, act_symmetric=True), (False, False), Int8Tensor),
    "w4a8 per tensor": (QuantScheme(4, 8, "per_tensor"), (False, False), Int8Tensor),
    "w8a8 per token": (QuantScheme(8, 8, **PER_TOKEN), (False, False), Int8Tensor),
    "w3a8 per token, signed": (QuantScheme(3, 8, act_symmetric=True, **PER_TOKEN), (False, False), Int8Tensor),
    "w6a8 dynamic": (QuantScheme(6, 8, act_dynamic=True), (False, False), Int8Tensor),
    "w8a16": (QuantScheme(8, 16), (False, False), Int8Tensor),
    "w4a16": (QuantScheme(4, 16), (False, False), IntxUnpackedToInt8Tensor),
    "w4a16 grouped": (QuantScheme(4, 16, "per_group", 8), (False, False), IntxUnpackedToInt8Tensor),
    "w2a16 unsigned": (QuantScheme(2, 16, weight_symmetric=False), (False, False), IntxUnpackedToInt8Tensor),
    "w5a16 offset": (QuantScheme(5, 16, weight_symmetric=False), (True, False), IntxUnpackedToInt8Tensor),
    "w4a8 grouped per token": (
        QuantScheme(4, 8, "per_group", 8, **PER_TOKEN),
        (False, False),
        IntxUnpackedToInt8Tensor,
    ),
    "w8a8 unsigned weight": (QuantScheme(8, 8, weight_symmetric=False), (False, False), None),
    "w4a8 grouped": (QuantScheme(4, 8, "per_group", 8), (False, False), None),
    "w4a8 input offset": (QuantScheme(4, 8), (False, True), None),
    "w8a4": (QuantScheme(8, 4), (False, False), None),
    "w6a6 signed": (QuantScheme(6, 6, act_symmetric=True), (False, False), None),
    "w7a5 per token": (QuantScheme(7, 5, **PER_TOKEN), (False, False), None),
    "w4a8 both offsets": (QuantScheme(4, 8, weight_symmetric=False), (True, True), None),
}


@pytest.mark.parametrize("case", LINEAR_CASES)
def test_a_linear_layer_computes_its_formula(case: str):
    scheme, offsets, tensor = LINEAR_CASES[case]
    for seed in range(3):
        layer, x = layer_of("linear", scheme, seed, offsets)
        expected = reference(layer, x)
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        for own in (False, True):
            low = low_bit_layer(layer, own=own)
            assert type(low) is (IntegerLinear if own or tensor is None else TensorLinear)
            if isinstance(low, TensorLinear):
                assert type(low.weight.data) is tensor
            torch.testing.assert_close(low(x).double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(x @ low, low(x))


def test_without_exact_integer_products_the_weight_is_dequantized(monkeypatch: pytest.MonkeyPatch):
    layer, x = layer_of("linear", QuantScheme(4, 8), 0)
    low = low_bit_layer(layer, own=True)
    monkeypatch.setattr(lowbit, "EXACT_PRODUCTS", False)
    assert torch.equal(low(x), layer(x))


CONV_CASES = {
    "w8a8": (QuantScheme(8, 8), (False, False)),
    "w4a8 per image": (QuantScheme(4, 8, **PER_TOKEN), (False, False)),
    "w3a6 grouped": (QuantScheme(3, 6, "per_group", 9), (False, False)),
    "w5a16 offset": (QuantScheme(5, 16, weight_symmetric=False), (True, False)),
    "w4a8 both offsets": (QuantScheme(4, 8, weight_symmetric=False), (True, True)),
}


@pytest.mark.parametrize("kind", ["conv", "depthwise"])
@pytest.mark.parametrize("case", CONV_CASES)
def test_a_convolution_computes_its_formula(kind: str, case: str):
    scheme, offsets = CONV_CASES[case]
    for seed in range(3):
        layer, x = layer_of(kind, scheme, seed, offsets)
        low = low_bit_layer(layer)
        assert type(low) is IntegerConv2d
        assert torch.equal(low(x), layer(x))
        torch.testing.assert_close(low(x).double(), reference(layer, x), rtol=1e-5, atol=1e-5)


def test_constant_and_zero_weights_survive():
    for value in (0.0, 0.5):
        for scheme in (QuantScheme(4, 8), QuantScheme(4, 16, weight_symmetric=False)):
            layer, x = layer_of("linear", scheme, 0)
            layer.set_weight(torch.full_like(layer.weight, value))
            low_high = torch.full((24,), value)
            layer.weight_fake_quant.set_range(low_high, low_high)
            for own in (False, True):
                torch.testing.assert_close(low_bit_layer(layer, own=own)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_float8_keeps_three_bits_behind_the_leading_one():
    layer, x = layer_of("linear", QuantScheme(8, 16), 0)
    with pytest.raises(VLMQError, match="multiples of 16"):
        low_bit_layer(layer, float8=True)
    wide = QuantLinear(nn.Linear(48, 32), QuantScheme(8, 16)).eval().requires_grad_(False)
    wide.weight_fake_quant.set_range(*block_range(wide.weight, wide.weight_fake_quant.granularity))
    low = low_bit_layer(wide, float8=True)
    weight, expected = low.weight.dequantize(), wide.effective_weight()
    normal = expected.abs() > expected.abs().amax(1, keepdim=True) / 448 * 2**-6
    assert ((weight - expected).abs() <= expected.abs() / 16 * 1.001)[normal].all()
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(low(x), F.linear(x, weight, wide.bias), rtol=1e-5, atol=1e-5)


def test_below_eight_bits_a_packed_weight_takes_its_bits_and_no_more():
    layer, _ = layer_of("linear", QuantScheme(3, 8), 0)
    low = low_bit_layer(layer, own=True)
    assert low.integers.stored.numel() == 24 * 40 * 3 / 8
    assert not [t for t in [*low.parameters(), *low.buffers()] if t.numel() >= 24 * 40]
