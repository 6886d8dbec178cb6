import pytest
import torch
from quant_cases import LAYER_KINDS, outlier_layer

from lightning_vlmq.quant import METHODS, QuantScheme
from lightning_vlmq.quant.fake_quant import to_blocks


def heavy_tailed_error(difference: torch.Tensor) -> float:
    return difference.abs().pow(0.7).sum().item()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_the_fitted_zero_lowers_the_heavy_tailed_error(kind: str, granularity: str, symmetric: bool):
    layer, _ = outlier_layer(kind, QuantScheme(3, 16, granularity, weight_symmetric=symmetric))
    with torch.no_grad():
        layer.weight.pow_(3)
        METHODS["hqq"]().fit_weight(layer)
        fitted = heavy_tailed_error(layer.effective_weight() - layer.weight)
        blocks = to_blocks(layer.weight, layer.weight_fake_quant.granularity)
        rows = blocks.reshape(layer.weight_fake_quant.scale.numel(), -1)
        low, scale = rows.amin(1, keepdim=True), layer.weight_fake_quant.scale[:, None]
        torch.testing.assert_close(scale, (rows.amax(1, keepdim=True) - low) / 7)
        unfitted = heavy_tailed_error(((rows - low) / scale).round() * scale + low - rows)  # zero at the range's end
        assert fitted < unfitted
        levels = to_blocks(layer.effective_weight(), layer.weight_fake_quant.granularity).reshape(rows.shape)
        levels = (levels - layer.weight_fake_quant.offset[:, None]) / scale
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
        assert levels.round().unique().numel() <= 8


def test_groups_are_fitted_as_if_each_were_alone():
    """But for the solver's early stop, which looks at the error of all; so on one group here, and the others its copies."""
    layer, _ = outlier_layer("linear", QuantScheme(3, 16, "per_group", group_size=12))
    single, _ = outlier_layer("linear", QuantScheme(3, 16))
    with torch.no_grad():
        layer.weight.copy_(layer.weight[:1, :12].repeat(24, 4))
        METHODS["hqq"]().fit_weight(layer)
        single.weight.copy_(layer.weight)
        METHODS["hqq"]().fit_weight(single)
        torch.testing.assert_close(layer.effective_weight(), single.effective_weight())


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_channel(value: float):
    layer, x = outlier_layer("linear", QuantScheme(4, 16))
    with torch.no_grad():
        layer.weight[2] = value
        METHODS["hqq"]().fit_weight(layer)
        torch.testing.assert_close(layer.effective_weight()[2], layer.weight[2], rtol=1e-3, atol=1e-6)
        assert torch.isfinite(layer(x)).all()
