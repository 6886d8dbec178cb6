import numpy as np
import pytest
import torch
from quant_cases import build, make_batches, outlier_layer
from torch import Tensor

from lightning_vlmq.quant import METHODS, QuantScheme, quantize, quantized_layers


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
def test_weight_ranges_are_the_blocks_quantiles(granularity: str):
    layer, _ = outlier_layer("linear", QuantScheme(4, 8, granularity, group_size=12, weight_symmetric=False))
    METHODS["percentile"]().fit_weight(layer)
    rows = layer.weight.detach().numpy().reshape(layer.weight_fake_quant.scale.numel(), -1)
    low, high = np.quantile(rows, 0.0001, axis=1), np.quantile(rows, 0.9999, axis=1)
    expected = (np.maximum(high, 0) - np.minimum(low, 0)) / 15
    np.testing.assert_allclose(layer.weight_fake_quant.scale.detach().numpy(), expected, rtol=1e-5)


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
