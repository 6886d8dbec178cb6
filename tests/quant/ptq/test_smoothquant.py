import copy

import pytest
import torch
from cases.quant import LAYER_KINDS, SEEDS, add_outlier_channels, build, float_output, make_batches, outlier_layer

from lightning_vlmq.models import VLM
from lightning_vlmq.quant import METHODS, LayerRule, QuantScheme, quantize, quantized_layers
from lightning_vlmq.quant.calibrating import RangeObserver, calibrate, full_precision
from lightning_vlmq.quant.observers import ChannelObserver
from lightning_vlmq.quant.ptq.smoothquant import install_channel_scale, smoothing_factor, weight_channel_maximum
from lightning_vlmq.quant.rounding import choose_qparams


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_a_channel_scale_changes_nothing_in_full_precision(kind: str):
    layer, x = outlier_layer(kind, QuantScheme())
    layer.weight_fake_quant.enabled = layer.act_fake_quant.enabled = False
    with torch.no_grad():
        before = layer(x)
        install_channel_scale(layer, torch.rand(x.shape[1]) * 3 + 0.1)
        torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_activation_error_falls_where_there_are_outliers(kind: str, symmetric: bool, seed: int):
    """At the layer's output, with float weights: the error that activation quantization alone makes."""
    layer, x = outlier_layer(kind, QuantScheme(16, 8, act_symmetric=symmetric), seed)
    errors = []
    with torch.no_grad():
        reference = float_output(layer, x, layer.weight)
        for smooth in (False, True):
            if smooth:
                channels = ChannelObserver(layer)
                channels.observe(x)
                install_channel_scale(layer, smoothing_factor([layer], channels.absolute_maximum, 0.5))
            moved = layer.input_transform(x)
            layer.act_fake_quant.set_range(moved.min().view(1), moved.max().view(1))
            errors.append((layer(x) - reference).square().sum().item())
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_weight_maxima_by_input_channel(kind: str):
    layer, x = outlier_layer(kind, QuantScheme())
    maxima = weight_channel_maximum(layer)
    for channel in range(x.shape[1]):
        probe = copy.deepcopy(layer)  # the weights that a channel meets are those whose change it notices
        with torch.no_grad():
            if kind == "linear":
                met = probe.weight[:, channel]
            else:
                per_group = probe.weight.shape[1]
                group, inside = divmod(channel, per_group)
                outputs = probe.weight.shape[0] // probe.groups
                met = probe.weight[group * outputs : (group + 1) * outputs, inside]
            assert maxima[channel] == met.abs().max()


def test_factors_are_equation_four(vit: VLM):
    batches = make_batches(vit)
    float_weights = {n: m.weight.clone() for n, m in vit.named_modules() if isinstance(m, torch.nn.Linear)}
    name = "model.visual.transformer.resblocks.0.mlp.c_proj"
    observer = ChannelObserver(vit.get_submodule(name))
    hook = vit.get_submodule(name).register_forward_pre_hook(lambda _, args: observer.observe(args[0]))
    with torch.no_grad():
        for batch in batches:
            vit.encode_image(batch["image"])
    hook.remove()
    quantize(vit, "smoothquant", QuantScheme(), batches)
    layer = quantized_layers(vit)[name]
    expected = (observer.absolute_maximum / float_weights[name].abs().amax(0)).sqrt()
    torch.testing.assert_close(layer.input_transform.factor, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.weight / layer.input_transform.factor, float_weights[name])


@pytest.mark.parametrize("method", ["smoothquant", "awq"])
def test_activation_ranges_are_those_of_the_scaled_inputs(vlm: VLM, method: str):
    batches = make_batches(vlm)
    scheme = QuantScheme(4, 8, scope="vision_text", overrides=[LayerRule("*.c_fc", weight_bits=16)])
    quantize(vlm, method, scheme, batches)
    observers = {name: RangeObserver() for name in quantized_layers(vlm)}
    calibrate(vlm, scheme, batches, observers)
    for name, layer in quantized_layers(vlm).items():
        seen = observers[name]
        quantizer = layer.act_fake_quant
        scale, zero_point = choose_qparams(seen.minimum, seen.maximum, quantizer.qmin, quantizer.qmax, symmetric=False)
        torch.testing.assert_close(quantizer.scale.detach(), scale, rtol=1e-4, atol=0)
        torch.testing.assert_close(quantizer.zero_point, zero_point, rtol=0, atol=1)


@pytest.mark.parametrize("method", ["smoothquant", "awq", "quarot", "rot_lsq_contrastive(weights='rtn')"])
def test_transforms_keep_the_full_precision_function(vlm: VLM, method: str):
    batches = make_batches(vlm)
    with torch.no_grad():
        before = vlm.encode_image(batches[0]["image"]), vlm.encode_text(batches[0]["tokens"])
        quantize(vlm, method, QuantScheme(4, 8, scope="vision_text"), batches)
        with full_precision(vlm):
            after = vlm.encode_image(batches[0]["image"]), vlm.encode_text(batches[0]["tokens"])
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["smoothquant", "quarot"])
def test_outliers_cost_less_than_with_min_max(method: str):
    vlm = add_outlier_channels(build("vit_clean"))
    batches = make_batches(vlm)
    scheme = QuantScheme(weight_bits=16, act_bits=6)
    errors = {}
    with torch.no_grad():
        reference = vlm.encode_image(batches[0]["image"])
        for name in ("minmax", method):
            quantized = copy.deepcopy(vlm)
            quantize(quantized, name, scheme, batches)
            errors[name] = (quantized.encode_image(batches[0]["image"]) - reference).square().sum().item()
    assert errors[method] < 0.7 * errors["minmax"]


def test_a_dead_channel_gives_finite_factors(vit: VLM):
    with torch.no_grad():
        block = vit.model.visual.transformer.resblocks[0]
        block.ln_2.weight[4] = block.ln_2.bias[4] = 0
        block.mlp.c_fc.weight[:, 5] = 0
    assert "smoothquant" in METHODS
    quantize(vit, "smoothquant", QuantScheme(), make_batches(vit))
    factors = quantized_layers(vit)["model.visual.transformer.resblocks.0.mlp.c_fc"].input_transform.factor
    assert torch.isfinite(factors).all() and (factors > 0).all()
