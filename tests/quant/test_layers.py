import copy
import math

import pytest
import torch
from cases.quant import make_batches
from timm.layers import Conv2dSame
from torch import Tensor, nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import VLM, Projection
from lightning_vlmq.quant import QuantConv2d, QuantLinear, QuantScheme, quantize, quantized_layers, swap_layers
from lightning_vlmq.quant.rounding import block_range, to_blocks


def fit(layer: QuantLinear | QuantConv2d, x: Tensor) -> None:
    quantizer = layer.weight_fake_quant
    if quantizer.quantizes:
        quantizer.set_range(
            *block_range(to_blocks(layer.weight.detach(), quantizer.granularity), quantizer.granularity)
        )
    if layer.act_fake_quant.quantizes and not layer.act_fake_quant.dynamic:
        layer.act_fake_quant.set_range(x.min().view(1), x.max().view(1))


def convolutions() -> list[nn.Conv2d]:
    return [
        nn.Conv2d(8, 6, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 7, padding=3, groups=8),
        nn.Conv2d(8, 4, 3, groups=2, bias=False),
        nn.Conv2d(8, 5, 3, dilation=2, padding=2, padding_mode="circular"),
        nn.Conv2d(8, 5, 3, padding="same"),
        Conv2dSame(8, 6, 3, stride=2),
        Conv2dSame(8, 8, (5, 2), stride=(3, 2), dilation=2, groups=8),
    ]


@pytest.mark.parametrize("index", range(len(convolutions())))
def test_a_convolution_at_sixteen_bit_weights_differs_by_its_input_only(index: int):
    conv = convolutions()[index]
    x = torch.randn(2, 8, 12, 12)
    layer = QuantConv2d(conv, QuantScheme(weight_bits=16, act_bits=8))
    fit(layer, x)
    torch.testing.assert_close(layer(x), conv(layer.quantized_input(x)))
    assert not torch.equal(layer(x), conv(x))
    torch.testing.assert_close(layer(x), conv(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["linear", "conv", "depthwise"])
def test_weights_lie_on_the_integer_grid(kind: str, bits: int, granularity: str, symmetric: bool):
    source = {"linear": nn.Linear(32, 6), "conv": nn.Conv2d(8, 6, 2), "depthwise": nn.Conv2d(6, 6, 7, groups=6)}[kind]
    scheme = QuantScheme(bits, 8, granularity, group_size=8, weight_symmetric=symmetric)
    layer = (QuantLinear if kind == "linear" else QuantConv2d)(source, scheme)
    fit(layer, torch.randn(2))
    steps = {"per_tensor": 1, "per_channel": 6, "per_group": 6 if kind == "depthwise" else 6 * 32 // 8}[granularity]
    assert layer.weight_fake_quant.scale.numel() == steps
    scale = layer.weight_fake_quant.scale.repeat_interleave(source.weight.numel() // steps)
    zero_point = layer.weight_fake_quant.zero_point.repeat_interleave(source.weight.numel() // steps)
    effective = layer.effective_weight()
    assert effective.shape == source.weight.shape
    levels = effective.flatten() / scale + zero_point
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    low, high = scheme.weight_range
    assert levels.min() >= low - 1e-3 and levels.max() <= high + 1e-3
    assert levels.round().unique().numel() <= 2**bits
    inside = (source.weight.flatten() / scale + zero_point).clamp(low, high) - zero_point
    assert ((effective.flatten() - inside * scale).abs() <= 0.5001 * scale).all()


def test_a_group_size_that_does_not_divide_is_named():
    with pytest.raises(VLMQError, match="group_size 32 does not divide the 48 weights per output; use 24"):
        QuantConv2d(nn.Conv2d(3, 8, 4), QuantScheme(weight_granularity="per_group", group_size=32))


def test_projection_operator_and_bias():
    projection = Projection(8, 5, bias=False)
    layer = QuantLinear(projection, QuantScheme())
    x = torch.randn(3, 8)
    fit(layer, x)
    assert layer.bias is None
    assert torch.equal(x @ layer, layer(x))
    assert layer.weight is projection.weight


def test_zero_channel_gives_zero_not_nan():
    linear = nn.Linear(8, 3)
    with torch.no_grad():
        linear.weight[1] = 0
    layer = QuantLinear(linear, QuantScheme(4, 8))
    x = torch.randn(5, 8)
    fit(layer, x)
    assert torch.equal(layer.effective_weight()[1], torch.zeros(8))
    assert torch.isfinite(layer(x)).all()


def test_cached_weight_follows_every_change():
    layer = QuantLinear(nn.Linear(8, 4), QuantScheme(4, 16)).eval()
    fit(layer, torch.randn(2))
    x = torch.randn(3, 8)
    with torch.no_grad():
        first = layer.effective_weight()
        assert layer.effective_weight() is first  # kept
        layer.weight.mul_(2)  # saturates on the old grid
        assert not torch.equal(layer.effective_weight(), first)
        layer.weight_fake_quant.scale.mul_(2)
        torch.testing.assert_close(layer.effective_weight(), 2 * first)
        before = layer(x)
        twin = copy.deepcopy(layer)
        twin.weight.zero_()
        assert torch.equal(layer(x), before) and torch.equal(twin.effective_weight(), torch.zeros(4, 8))
        layer.load_state_dict({k: v * 0 + 1 for k, v in layer.state_dict().items()})
        assert not torch.equal(layer(x), before)
        layer.double()
        assert layer.effective_weight().dtype == torch.float64
    with torch.inference_mode():
        assert torch.equal(layer.effective_weight(), layer.effective_weight())


def test_scope_limits_the_swap(vlm: VLM):
    names = swap_layers(vlm, QuantScheme(scope="vision"))
    assert names == list(quantized_layers(vlm)) and all(vlm.tower_of(name) == "vision" for name in names)
    left = [n for n, m in vlm.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and n not in names]
    assert left and all(vlm.tower_of(name) == "text" for name in left)
    with pytest.raises(VLMQError, match="quantized already"):
        swap_layers(vlm, QuantScheme())


def test_every_kind_of_layer_is_swapped(vit: VLM):
    names = swap_layers(vit, QuantScheme(scope="vision_text"))
    for part in ("visual.conv1", "attn.q_proj", "attn.out_proj", "mlp.c_fc", "visual.proj", "text_projection"):
        assert any(part in name for name in names), part


def test_a_shared_layer_becomes_one_shared_quantized_layer(vit: VLM):
    blocks = vit.model.visual.transformer.resblocks
    blocks[1].mlp.c_fc = blocks[0].mlp.c_fc
    names = swap_layers(vit, QuantScheme())
    assert isinstance(blocks[0].mlp.c_fc, QuantLinear) and blocks[1].mlp.c_fc is blocks[0].mlp.c_fc
    assert len(names) == len(set(names)) == len(quantized_layers(vit))


def test_a_layer_shared_with_the_other_tower_is_refused(vit: VLM):
    vit.model.text_projection = vit.model.visual.proj
    with pytest.raises(VLMQError, match="shared with a tower outside scope 'vision'"):
        swap_layers(vit, QuantScheme())


def test_layers_with_a_forward_of_their_own_are_refused(vit: VLM):
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    vit.model.visual.transformer.resblocks[0].mlp.c_fc = Odd(96, 384)
    with pytest.raises(VLMQError, match=r"resblocks\.0\.mlp\.c_fc' is a Odd"):
        swap_layers(vit, QuantScheme())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights_are_named(vit: VLM, value: float):
    with torch.no_grad():
        vit.model.visual.transformer.resblocks[1].attn.k_proj.weight[0, 0] = value
    with pytest.raises(VLMQError, match=r"resblocks\.1\.attn\.k_proj' holds non-finite"):
        quantize(vit, "minmax", QuantScheme(), make_batches(vit))


def test_a_quantized_image_encoder_compiles_into_one_graph(vit: VLM):
    batches = make_batches(vit, (3,))
    images = batches[0]["image"]
    quantize(vit, "lsqplus_contrastive", QuantScheme(4, 8), batches)
    with torch.no_grad():
        compiled = torch.compile(vit.encode_image, backend="eager", fullgraph=True)  # raises where a graph breaks
        torch.testing.assert_close(compiled(images), vit.encode_image(images), rtol=1e-5, atol=1e-6)
