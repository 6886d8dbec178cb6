import math

import pytest
import torch
from torch import Tensor
from torchao.quantization.granularity import PerAxis, PerGroup, PerTensor, PerToken

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.rounding import choose_qparams, quantize_dequantize


def reference(x: Tensor, bits: int, symmetric: bool, low: Tensor, high: Tensor) -> Tensor:
    """Min-max fake quantization written anew in float64; low and high broadcast against x."""
    x, low, high = x.double(), low.double().clamp(max=0), high.double().clamp(min=0)
    levels = 2**bits - 1
    if symmetric:
        step = torch.maximum(-low / 2 ** (bits - 1), high / (2 ** (bits - 1) - 1))
        level = torch.round(x / step).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return torch.where(step > 0, level * step, torch.zeros_like(x))
    step = (high - low) / levels
    zero = torch.round(-low / step).clamp(0, levels)
    return torch.where(step > 0, ((torch.round(x / step) + zero).clamp(0, levels) - zero) * step, torch.zeros_like(x))


def assert_close_but_for_ties(ours: Tensor, expected: Tensor, step: Tensor | float) -> None:
    """Equal up to float32 rounding, except where float32 and float64 fall on different sides of a rounding point."""
    difference = (ours.double() - expected).abs()
    assert (difference <= 1.01 * torch.as_tensor(step).double()).all()
    assert (difference > 1e-5 * expected.abs().max().clamp_min(1e-30)).double().mean() < 2e-3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_per_tensor_against_float64_and_torch(bits: int, symmetric: bool):
    x = torch.randn(7, 5, 33) * 3 + 0.4
    quantizer = FakeQuantizer(bits, symmetric, PerTensor())
    quantizer.set_range(x.min().view(1), x.max().view(1))
    ours = quantizer(x)
    assert_close_but_for_ties(ours, reference(x, bits, symmetric, x.min(), x.max()), quantizer.scale)
    theirs = torch.fake_quantize_per_tensor_affine(
        x, quantizer.scale.item(), int(quantizer.zero_point), quantizer.qmin, quantizer.qmax
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_per_channel_against_float64_and_torch(symmetric: bool):
    w = torch.randn(16, 24) * torch.logspace(-3, 2, 16)[:, None]
    quantizer = FakeQuantizer(4, symmetric, PerAxis(0), blocks=16)
    quantizer.set_range(w.amin(1), w.amax(1))
    ours = quantizer(w)
    expected = reference(w, 4, symmetric, w.amin(1, keepdim=True), w.amax(1, keepdim=True))
    assert_close_but_for_ties(ours, expected, quantizer.scale[:, None])
    theirs = torch.fake_quantize_per_channel_affine(
        w, quantizer.scale.detach(), quantizer.zero_point, 0, quantizer.qmin, quantizer.qmax
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_are_quantized_as_if_each_were_alone(symmetric: bool):
    w = torch.randn(6, 4, 2, 2) * 10
    quantizer = FakeQuantizer(3, symmetric, PerGroup(8), blocks=12)
    rows = w.reshape(12, 8)
    quantizer.set_range(rows.amin(1), rows.amax(1))
    alone = []
    for row in rows:
        single = FakeQuantizer(3, symmetric, PerTensor())
        single.set_range(row.min().view(1), row.max().view(1))
        alone.append(single(row))
    torch.testing.assert_close(quantizer(w), torch.stack(alone).view_as(w), rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_tokens_do_not_depend_on_each_other(symmetric: bool):
    x = torch.randn(3, 4, 10) * torch.logspace(-2, 2, 4)[:, None]
    quantizer = FakeQuantizer(8, symmetric, PerToken(), dynamic=True)
    together = quantizer(x)
    assert torch.equal(together[1:2, 2:3], quantizer(x[1:2, 2:3]))
    expected = reference(x, 8, symmetric, x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
    assert_close_but_for_ties(together, expected, x.abs().max() / 100)


def test_images_of_a_convolution_input_do_not_depend_on_each_other():
    x = torch.randn(3, 4, 5, 5) * torch.tensor([0.01, 1.0, 100.0]).view(3, 1, 1, 1)
    quantizer = FakeQuantizer(8, False, PerAxis(0), dynamic=True)
    assert torch.equal(quantizer(x)[2:], quantizer(x[2:]))


def test_dynamic_follows_its_input_and_static_does_not():
    x = torch.randn(50)
    static = FakeQuantizer(8, False, PerTensor())
    static.set_range(x.min().view(1), x.max().view(1))
    dynamic = FakeQuantizer(8, False, PerTensor(), dynamic=True)
    assert torch.equal(static(x), dynamic(x))
    assert static(100 * x).abs().max() < 1.1 * x.abs().max()
    torch.testing.assert_close(dynamic(100 * x), 100 * dynamic(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("constant", [0.0, 3.7, -2.5])
@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_input(constant: float, symmetric: bool):
    x = torch.full((2, 9), constant)
    quantizer = FakeQuantizer(8, symmetric, PerTensor())
    quantizer.set_range(x.min().view(1), x.max().view(1))
    assert torch.isfinite(quantizer(x)).all()
    torch.testing.assert_close(quantizer(x), x, rtol=0.005, atol=0)
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))


def test_zero_is_a_level_of_every_min_max_grid():
    for low, high in ((0.5, 3.0), (-4.0, -1.0), (-1.0, 2.0), (0.0, 0.0)):
        scale, zero_point = choose_qparams(torch.tensor([low]), torch.tensor([high]), 0, 15, False)
        assert torch.equal(
            quantize_dequantize(torch.zeros(1), scale, None, 0 - zero_point, 15 - zero_point), torch.zeros(1)
        )
        assert zero_point == zero_point.round()


def test_nan_is_not_hidden_and_infinity_saturates():
    quantizer = FakeQuantizer(8, True, PerTensor())
    quantizer.set_range(torch.tensor([-1.0]), torch.tensor([1.0]))
    out = quantizer(torch.tensor([math.nan, math.inf, -math.inf, 0.5]))
    assert out[0].isnan()
    assert 0.9 < out[1] <= 1.01 and -1.01 <= out[2] < -0.9


def test_misuse_is_named():
    quantizer = FakeQuantizer(8, True, PerTensor())
    with pytest.raises(VLMQError, match="no range yet"):
        quantizer(torch.ones(3))
    with pytest.raises(VLMQError, match="not finite"):
        quantizer.set_range(torch.tensor([math.nan]), torch.tensor([1.0]))
    with pytest.raises(VLMQError, match="2 quantization steps for 1"):
        quantizer.set_qparams(torch.ones(2))


def test_sixteen_bits_pass_through():
    x = torch.randn(4, 4)
    assert FakeQuantizer(16, True, PerTensor())(x) is x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype):
    quantizer = FakeQuantizer(8, False, PerTensor())
    quantizer.set_range(torch.tensor([-1.0]), torch.tensor([2.0]))
    assert quantizer(torch.rand(5, dtype=dtype)).dtype == dtype


def test_the_input_is_never_written_to():
    x = torch.randn(4, 8)
    kept = x.clone()
    for granularity, blocks in ((PerTensor(), 1), (PerAxis(0), 4), (PerGroup(4), 8)):
        quantizer = FakeQuantizer(4, False, granularity, blocks)
        quantizer.set_qparams(torch.full((blocks,), 0.1), torch.full((blocks,), 3.0))
        quantizer(x)
        quantizer.set_offset(torch.full((blocks,), -0.2))
        quantizer(x)
    assert torch.equal(x, kept)
