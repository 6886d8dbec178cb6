import pytest
import torch
from cases.quant import LAYER_KINDS, SEEDS, outlier_layer
from torchao.quantization.granularity import PerTensor

from lightning_vlmq.quant import METHODS, FakeQuantizer, QuantScheme
from lightning_vlmq.quant.observers import HistogramObserver
from lightning_vlmq.quant.ptq.mse import FRACTIONS, search_histogram
from lightning_vlmq.quant.rounding import to_blocks


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_no_block_is_worse_than_min_max_and_the_whole_is_better(
    kind: str, granularity: str, symmetric: bool, seed: int
):
    scheme = QuantScheme(3, 8, granularity, group_size=6, weight_symmetric=symmetric)
    layer, _ = outlier_layer(kind, scheme, seed)
    with torch.no_grad():
        layer.weight.pow_(3)  # heavy tails
    errors = {}
    for method in ("minmax", "mse"):
        METHODS[method].fit_weight(layer)
        difference = to_blocks((layer.effective_weight() - layer.weight).detach(), layer.weight_fake_quant.granularity)
        errors[method] = difference.square().sum() if granularity == "per_tensor" else difference.square().sum(1)
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-5) + 1e-12).all()
    assert errors["mse"].sum() < errors["minmax"].sum()


def test_weight_range_against_brute_force():
    layer, _ = outlier_layer("linear", QuantScheme(3, 8, weight_symmetric=False))
    METHODS["mse"].fit_weight(layer)
    for row, scale in zip(layer.weight.detach(), layer.weight_fake_quant.scale):
        errors = []
        for fraction in FRACTIONS:
            alone = FakeQuantizer(3, False, PerTensor())
            alone.set_range(row.min().view(1) * fraction, row.max().view(1) * fraction)
            errors.append(((alone(row) - row).square().sum().item(), alone.scale.item()))
        assert scale.item() == pytest.approx(min(errors)[1], rel=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_range_clips_outliers_where_that_pays(symmetric: bool, seed: int):
    torch.manual_seed(seed)
    x = torch.cat([torch.randn(20_000), torch.tensor([60.0])])
    histogram = HistogramObserver(x.min().item(), x.max().item())
    histogram.observe(x)
    found, full = (FakeQuantizer(4, symmetric, PerTensor()) for _ in range(2))
    found.set_range(*search_histogram(histogram, found))
    full.set_range(x.min().view(1), x.max().view(1))
    errors = [(q(x) - x).square().mean() for q in (found, full)]
    assert errors[0] < 0.9 * errors[1]
    even = torch.rand(20_000)  # nothing to clip in a uniform distribution
    histogram = HistogramObserver(0.0, 1.0)
    histogram.observe(even)
    _, high = search_histogram(histogram, found)
    assert high.item() > 0.9
