import pytest
import torch
from cases.quant import LAYER_KINDS, SEEDS, outlier_layer, second_moment, squared_output_error

from lightning_vlmq.quant import METHODS, QuantScheme
from lightning_vlmq.quant.observers import MagnitudeObserver
from lightning_vlmq.quant.ptq.awq import minmax_rounded, search_scale
from lightning_vlmq.quant.transforms import scale_input_channels


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_output_error_is_at_most_min_max_and_the_least_on_the_grid(kind: str, granularity: str, seed: int):
    layer, x = outlier_layer(kind, QuantScheme(4, 16, granularity, group_size=6), seed)
    channels = MagnitudeObserver(layer)
    channels.observe(x)
    with torch.no_grad():
        factor = search_scale([layer], channels.mean_magnitude, second_moment(layer, x))

        def error(s: torch.Tensor) -> float:
            rounded = minmax_rounded(layer, scale_input_channels(layer, layer.weight, s))
            return squared_output_error(layer, x, scale_input_channels(layer, rounded, 1 / s), layer.weight)

        found = error(factor)
        METHODS["minmax"].fit_weight(layer)
        assert found <= squared_output_error(layer, x, layer.effective_weight(), layer.weight) * (1 + 1e-4)
        for step in range(20):
            s = channels.mean_magnitude ** (step / 20)
            assert found <= error(s / (s.max() * s.min()).sqrt()) * (1 + 1e-3)
    if kind == "linear" and granularity != "per_tensor":
        assert found < 0.8 * error(torch.ones_like(factor))
        assert factor[3] > factor.median() and factor[17] > factor.median()


def test_a_silent_channel_does_not_upset_the_search():
    layer, x = outlier_layer("linear", QuantScheme(4, 16))
    x[:, 7] = 0
    channels = MagnitudeObserver(layer)
    channels.observe(x)
    with torch.no_grad():
        factor = search_scale([layer], channels.mean_magnitude, second_moment(layer, x))
    assert torch.isfinite(factor).all() and (factor > 0).all()
