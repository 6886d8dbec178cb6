import math

import pytest
import torch
from torch import Tensor
from torchao.quantization.granularity import PerAxis, PerGroup, PerTensor, PerToken

from lightning_vlmq.errors import VLMQError
from lightning_vlmq.quant.fake_quant import STEP_FLOOR, FakeQuantizer, LearnedStep, choose_qparams, quantize_dequantize


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


# --- gradients -------------------------------------------------------------------------------------------------------


def lsq_case(seed: int, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 values of which some are clipped at either end and none is near a rounding or clipping point."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.randint(-12, 12, (rows, 40), generator=generator).double()
    fraction = torch.rand(rows, 40, generator=generator, dtype=torch.float64) * 0.8 - 0.4
    scale = torch.rand(rows, 1, generator=generator, dtype=torch.float64) + 0.2
    return (level + fraction) * scale, scale, torch.rand(rows, 40, generator=generator, dtype=torch.float64) - 0.5


@pytest.mark.parametrize("seed", range(3))
def test_lsq_gradients_follow_the_paper(seed: int):
    x, scale, upstream = lsq_case(seed)
    x.requires_grad_(), scale.requires_grad_()
    g = 0.37
    LearnedStep.apply(x, scale, None, -8, 7, g, 0.0).backward(upstream)
    v = (x / scale).detach()
    by_paper = torch.where(v <= -8, -8.0, torch.where(v >= 7, 7.0, v.round() - v))  # Eq. 3
    torch.testing.assert_close(scale.grad, g * (upstream * by_paper).sum(1, keepdim=True))
    torch.testing.assert_close(x.grad, upstream * ((v > -8) & (v < 7)))  # Eq. 5


@pytest.mark.parametrize("seed", range(3))
def test_gradients_against_finite_differences(seed: int):
    """Rounding is replaced by adding its (frozen) error: the function whose true derivative the estimator is."""
    x, scale, upstream = lsq_case(seed)
    offset = torch.linspace(-0.3, 0.3, 3, dtype=torch.float64)[:, None]
    x = x + offset
    error = (lambda v: v.round() - v)(((x - offset) / scale).clamp(-8, 7))

    def smooth(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return (((x - offset) / scale).clamp(-8, 7) + error) * scale + offset

    leaves = [t.clone().requires_grad_() for t in (x, scale, offset)]
    (LearnedStep.apply(*leaves, -8, 7, 1.0, 0.0) * upstream).sum().backward()
    torch.testing.assert_close(LearnedStep.apply(x, scale, offset, -8, 7, 1.0, 0.0), smooth(x, scale, offset))
    for index, leaf in enumerate(leaves):
        numeric = torch.zeros_like(leaf)
        for place in range(leaf.numel()):
            ends = []
            for sign in (1, -1):
                moved = [t.clone() for t in (x, scale, offset)]
                moved[index].view(-1)[place] += sign * 1e-6
                ends.append((smooth(*moved) * upstream).sum())
            numeric.view(-1)[place] = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close(leaf.grad, numeric, rtol=1e-6, atol=1e-7)


def test_gradient_scale_counts_values_per_step_and_features_of_one_sample():
    weight = FakeQuantizer(4, True, PerAxis(0), blocks=5, values_per_step=12)
    weight.set_qparams(torch.full((5,), 0.1))
    weight.scale.requires_grad_()
    w = torch.randn(5, 12)
    weight(w).sum().backward()
    v = w / 0.1
    raw = torch.where(v <= -8, -8.0, torch.where(v >= 7, 7.0, v.round() - v)).sum(1)
    torch.testing.assert_close(weight.scale.grad, raw / math.sqrt(12 * 7), rtol=1e-4, atol=1e-5)

    act = FakeQuantizer(8, False, PerTensor())
    act.set_qparams(torch.tensor([0.02]), torch.tensor([100.0]))
    act.scale.requires_grad_()
    x = torch.randn(6, 4, 3)
    act(x).sum().backward()
    v = x / 0.02
    raw = torch.where(v <= -100, -100.0, torch.where(v >= 155, 155.0, v.round() - v)).sum()
    torch.testing.assert_close(act.scale.grad[0], raw / math.sqrt(4 * 3 * 255), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_fixed_grid_passes_the_gradients_that_torch_passes(symmetric: bool):
    x = torch.randn(40, 50, requires_grad=True)
    quantizer = FakeQuantizer(4, symmetric, PerTensor())
    quantizer.set_range(torch.tensor([-1.0]), torch.tensor([1.7]))
    upstream = torch.randn(40, 50)
    (ours,) = torch.autograd.grad(quantizer(x), x, upstream)
    theirs = torch.fake_quantize_per_tensor_affine(
        x, quantizer.scale.item(), int(quantizer.zero_point), quantizer.qmin, quantizer.qmax
    )
    assert torch.equal(ours, torch.autograd.grad(theirs, x, upstream)[0])
    assert (ours == 0).any()


def test_training_and_inference_paths_give_the_same_bits():
    for symmetric in (True, False):
        quantizer = FakeQuantizer(4, symmetric, PerTensor())
        quantizer.set_range(torch.tensor([-1.0]), torch.tensor([2.0]))
        x = torch.randn(100, requires_grad=True)
        trained = quantizer(x)
        assert trained.requires_grad
        with torch.no_grad():
            assert torch.equal(trained, quantizer(x))
        assert torch.equal(x, x.detach().clone())


def test_a_step_driven_below_zero_stays_positive_and_can_recover():
    quantizer = FakeQuantizer(4, True, PerTensor())
    quantizer.set_qparams(torch.tensor([0.1]))
    quantizer.scale.requires_grad_()
    with torch.no_grad():
        quantizer.scale.fill_(-0.5)
    x = torch.tensor([1.0, 2.0, -1.0])
    out = quantizer(x)
    assert torch.isfinite(out).all() and (out * x >= 0).all()
    ((out - x) ** 2).sum().backward()
    assert quantizer.scale.grad < 0  # descending raises the step
    quantizer.set_qparams(torch.tensor([0.0]))
    assert quantizer.scale.item() == pytest.approx(STEP_FLOOR)


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
