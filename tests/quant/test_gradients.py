"""Gradients through weights, inputs, steps and offsets, against the papers' formulas, finite differences and torch."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization.granularity import PerAxis, PerTensor

from lightning_vlmq.quant import QuantConv2d, QuantizedLayer, QuantLinear, QuantScheme
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.learned_step import LearnedStep
from lightning_vlmq.quant.rounding import STEP_FLOOR


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


@pytest.mark.parametrize("seed", range(3))
def test_gradients_on_an_unsigned_grid_with_zero_points_of_its_own_against_finite_differences(seed: int):
    """LSQ on an asymmetric grid: channels clip at ends of their own, and the zero points, whole numbers, do not learn."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(5, generator=generator, dtype=torch.float64) + 0.2
    zero_point = torch.tensor([0.0, 3.0, 8.0, 12.0, 15.0], dtype=torch.float64)
    x = off_grid((5, 30), 4, steps, generator) + ((8 - zero_point) * steps)[:, None]
    upstream = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    quantizer = FakeQuantizer(4, False, PerAxis(0), blocks=5, values_per_step=30).double()
    quantizer.set_qparams(steps, zero_point)
    quantizer.scale.requires_grad_()
    leaf = x.clone().requires_grad_()
    (quantizer(leaf) * upstream).sum().backward()

    lo, hi = (-zero_point)[:, None], (15 - zero_point)[:, None]
    error = (lambda v: v.round() - v)((x / steps[:, None]).clamp(lo, hi))

    def smooth(x: Tensor, steps: Tensor) -> Tensor:
        return (((x / steps[:, None]).clamp(lo, hi) + error) * steps[:, None] * upstream).sum()

    assert quantizer.scale.grad is not None and leaf.grad is not None
    for index, found in enumerate((leaf.grad, quantizer.scale.grad * math.sqrt(30 * 15))):
        numeric = torch.zeros_like(found)
        for place in range(found.numel()):
            ends = []
            for sign in (1, -1):
                moved = [x.clone(), steps.clone()]
                moved[index].view(-1)[place] += sign * 1e-6
                ends.append(smooth(*moved))
            numeric.view(-1)[place] = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close(found, numeric, rtol=1e-6, atol=1e-7)
    clipped = leaf.grad == 0
    assert 0.05 < clipped.double().mean() < 0.5


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


def off_grid(shape: tuple[int, ...], bits: int, steps: Tensor, generator: torch.Generator) -> Tensor:
    """Float64 values, a fifth of them beyond the grid's ends, none near a rounding or clipping point; blocks share steps."""
    half = 2 ** (bits - 1)
    level = torch.randint(-half - half // 4, half + half // 4, shape, generator=generator).double()
    fraction = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 - 0.4
    return ((level + fraction).reshape(len(steps), -1) * steps[:, None]).reshape(shape)


def frozen_rounding(x: Tensor, steps: Tensor, offset: Tensor | float, lo: int, hi: int) -> Tensor:
    """The rounding error in units of a step, by block: what a straight-through estimator takes for a constant."""
    v = ((x.reshape(len(steps), -1) - offset) / steps[:, None]).clamp(lo, hi)
    return v.round() - v


def smooth_quantizer(x: Tensor, steps: Tensor, offset: Tensor | float, lo: int, hi: int, error: Tensor) -> Tensor:
    v = ((x.reshape(len(steps), -1) - offset) / steps[:, None]).clamp(lo, hi) + error
    return (v * steps[:, None] + offset).reshape(x.shape)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layers_gradients_against_finite_differences(kind: str, granularity: str, seed: int):
    """Of everything that LSQ+ trains: weights, weight steps, activation step and offset, bias; and of the input."""
    generator = torch.Generator().manual_seed(seed)
    source = nn.Linear(8, 5) if kind == "linear" else nn.Conv2d(4, 6, 2, stride=2, groups=2)
    scheme = QuantScheme(4, 4, granularity, group_size=4, act_symmetric=False)
    layer: QuantizedLayer = (QuantLinear if kind == "linear" else QuantConv2d)(source, scheme)  # type: ignore[arg-type]
    layer.double()
    weight, act = layer.weight_fake_quant, layer.act_fake_quant
    blocks = weight.scale.numel()
    assert (
        blocks
        == {"per_tensor": 1, "per_channel": source.weight.shape[0], "per_group": source.weight.numel() // 4}[
            granularity
        ]
    )
    steps = torch.rand(blocks, generator=generator, dtype=torch.float64) + 0.2
    offset = torch.tensor([-0.37], dtype=torch.float64)
    step = torch.tensor([0.11], dtype=torch.float64)
    shape = (3, 8) if kind == "linear" else (2, 4, 4, 4)
    values = {
        "weight": off_grid(tuple(source.weight.shape), 4, steps, generator),
        "steps": steps,
        # unsigned levels 0..15: the signed ones moved up by eight steps
        "x": off_grid(shape, 4, step, generator) + offset + 8 * step,
        "step": step,
        "offset": offset,
        "bias": torch.randn(source.weight.shape[0], generator=generator, dtype=torch.float64),
    }
    with torch.no_grad():
        layer.weight.copy_(values["weight"])
        layer.bias.copy_(values["bias"])  # type: ignore[union-attr]
    weight.set_qparams(values["steps"])
    act.set_qparams(values["step"])
    act.set_offset(values["offset"])
    weight.scale.requires_grad_(), act.scale.requires_grad_(), act.offset.requires_grad_()  # type: ignore[union-attr]
    x = values["x"].clone().requires_grad_()
    out = layer(x)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (out * upstream).sum().backward()

    errors = (
        frozen_rounding(values["weight"], values["steps"], 0.0, -8, 7),
        frozen_rounding(values["x"], values["step"], values["offset"], 0, 15),
    )

    def smooth(v: dict[str, Tensor]) -> Tensor:
        w = smooth_quantizer(v["weight"], v["steps"], 0.0, -8, 7, errors[0])
        a = smooth_quantizer(v["x"], v["step"], v["offset"], 0, 15, errors[1])
        return F.linear(a, w, v["bias"]) if kind == "linear" else F.conv2d(a, w, v["bias"], stride=2, groups=2)

    torch.testing.assert_close(out, smooth(values))
    # LSQ section 2.2: steps and offsets learn at 1 / sqrt(N Qp) of their gradient
    of_weight = 1 / math.sqrt(source.weight.numel() / blocks * 7)
    of_act = 1 / math.sqrt(values["x"][0].numel() * 15)
    found = {
        "weight": layer.weight.grad,
        "steps": weight.scale.grad / of_weight,  # type: ignore[operator]
        "x": x.grad,
        "step": act.scale.grad / of_act,  # type: ignore[operator]
        "offset": act.offset.grad / of_act,  # type: ignore[union-attr, operator]
        "bias": layer.bias.grad,  # type: ignore[union-attr]
    }
    for name, value in values.items():
        numeric = torch.zeros_like(value)
        for place in range(value.numel()):
            ends = []
            for sign in (1, -1):
                moved = {**values, name: value.clone()}
                moved[name].view(-1)[place] += sign * 1e-6
                ends.append((smooth(moved) * upstream).sum())
            numeric.view(-1)[place] = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close(
            found[name], numeric, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert numeric.abs().max() > 0.01
