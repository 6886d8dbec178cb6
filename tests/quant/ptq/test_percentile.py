import numpy as np
import pytest
import torch
from cases.quant import SEEDS, build, make_batches, outlier_layer, shallow, twin
from torch import Tensor, nn

from lightning_vlmq.quant import METHODS, QuantLinear, QuantScheme, quantize, quantized_layers


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
def test_weight_ranges_are_the_blocks_quantiles(granularity: str):
    layer, _ = outlier_layer("linear", QuantScheme(4, 8, granularity, group_size=12, weight_symmetric=False))
    METHODS["percentile"].fit_weight(layer)
    rows = layer.weight.detach().numpy().reshape(layer.weight_fake_quant.scale.numel(), -1)
    low, high = np.quantile(rows, 0.0001, axis=1), np.quantile(rows, 0.9999, axis=1)
    expected = (np.maximum(high, 0) - np.minimum(low, 0)) / 15
    np.testing.assert_allclose(layer.weight_fake_quant.scale.detach().numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rare_outliers_are_clipped_and_all_other_weights_gain(symmetric: bool, seed: int):
    """At most 0.01 % of a block at either end is clipped; what is not is rounded with a step as much smaller."""
    torch.manual_seed(seed)
    scheme = QuantScheme(4, 16, "per_tensor", weight_symmetric=symmetric)
    layer = QuantLinear(nn.Linear(200, 250), scheme)
    errors, steps = {}, {}
    with torch.no_grad():
        layer.weight.copy_(torch.randn(250, 200))
        layer.weight.view(-1)[torch.randperm(50_000)[:6]] = torch.tensor([60.0, -50.0, 55.0, -70.0, 40.0, -45.0])
        for method in ("minmax", "percentile"):
            METHODS[method].fit_weight(layer)
            quantizer = layer.weight_fake_quant
            steps[method] = quantizer.scale.item()
            errors[method] = (layer.effective_weight() - layer.weight).abs()
        lo, hi = ((end - quantizer.zero_point) * quantizer.scale for end in (quantizer.qmin, quantizer.qmax))
        half = quantizer.scale / 2
        clipped = (layer.weight < lo - half) | (layer.weight > hi + half)
    assert clipped.sum() <= 2 * 1e-4 * layer.weight.numel() + 1 and clipped[layer.weight.abs() > 30].all()
    assert steps["percentile"] < 0.15 * steps["minmax"]
    assert errors["percentile"][~clipped].mean() < 0.25 * errors["minmax"][~clipped].mean()
    assert errors["percentile"][~clipped].max() <= half * 1.001


def test_activation_ranges_leave_the_rarest_values_out():
    vlm = build("vit_clean")
    batches = make_batches(vlm)
    name = "model.visual.transformer.resblocks.1.mlp.c_fc"
    seen: list[Tensor] = []
    vlm.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            vlm.encode_image(batch["image"])
    quantize(vlm, "percentile", QuantScheme(), batches)
    x = torch.cat([s.flatten() for s in seen]).numpy()
    low, high = np.quantile(x, 0.0001), np.quantile(x, 0.9999)
    quantizer = quantized_layers(vlm)[name].act_fake_quant
    assert quantizer.scale.item() == pytest.approx((high - low) / 255, rel=0.05)  # the tails hold a value or two
    assert quantizer.scale.item() < (x.max() - x.min()) / 255


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_error_falls_where_outliers_are_rare(symmetric: bool, seed: int):
    vlm = shallow(build("vit_clean", seed))
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(20, 3, 32, 32, generator=generator)
    places = torch.randperm(images.numel(), generator=generator)[:4]  # of 61,440 values; 0.01 % are six at either end
    images.view(-1)[places] = torch.tensor([20.0, -18.0, 15.0, -21.0])
    x = vlm.preprocess(images)
    errors, quantizers = {}, {}
    for method in ("minmax", "percentile"):
        quantized = twin(vlm)
        quantize(quantized, method, QuantScheme(16, 4, act_symmetric=symmetric), [{"image": images}])
        quantizers[method] = quantized_layers(quantized)["model.visual.conv1"].act_fake_quant
        with torch.no_grad():
            errors[method] = (quantizers[method](x) - x).square()
    assert errors["percentile"].sum() < 0.5 * errors["minmax"].sum()
    ordinary = torch.ones(images.numel(), dtype=torch.bool)
    ordinary[places] = False
    assert errors["percentile"].view(-1)[ordinary].mean() < 0.05 * errors["minmax"].view(-1)[ordinary].mean()
    assert errors["percentile"].view(-1)[ordinary].sqrt().max() < 1.5 * quantizers["percentile"].scale.item()
