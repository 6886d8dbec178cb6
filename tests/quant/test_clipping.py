"""Ranges that clip: the starts of learned steps on inputs with an outlier, and what is told and refused."""

import pytest
import torch
from cases.quant import SEEDS, build, make_batches, shallow
from torch import Tensor, nn
from torchao.quantization.granularity import PerTensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.quant import FakeQuantizer, QuantLinear, QuantScheme, quantize, quantized_layers
from lightning_vlmq.quant.clipping import (
    COSTLY,
    LOST,
    REFUSED,
    REPORTED,
    ClippingObserver,
    count_clipped,
    judge,
    measure_clipping,
    note_clipping,
    require_usable,
)
from lightning_vlmq.quant.observers import HistogramObserver
from lightning_vlmq.quant.ptq.mse import search_histogram
from lightning_vlmq.quant.qat.lsq import set_paper_start


def one_outlier_channel(seed: int) -> Tensor:
    x = torch.randn(500, 768, generator=torch.Generator().manual_seed(seed))
    x[:, 7] = -40
    return x


def relative_error(quantizer: FakeQuantizer, x: Tensor) -> float:
    with torch.no_grad():
        return float((quantizer(x) - x).square().sum() / x.square().sum())


@pytest.mark.parametrize("seed", SEEDS)
def test_an_outlier_on_one_side_does_not_cost_the_other_side(seed: int):
    x = one_outlier_channel(seed)
    minmax, mse, paper = (FakeQuantizer(8, False, PerTensor()) for _ in range(3))
    minmax.set_range(x.min().view(1), x.max().view(1))
    histogram = HistogramObserver(x.min().item(), x.max().item())
    histogram.observe(x)
    mse.set_range(*search_histogram(histogram, mse))
    set_paper_start(paper, x.abs().mean().view(1), x.min().view(1))
    assert relative_error(mse, x) <= 1.01 * relative_error(minmax, x) < 0.01
    for quantizer in (mse, paper):
        positive = x[x > 0]
        assert (quantizer(positive) > 0.5 * positive).double().mean() > 0.9  # no side of zero is without levels
        assert 0 < quantizer.zero_point < 255


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipped_values_are_counted_against_a_count_by_hand(symmetric: bool, seed: int):
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    quantizer = FakeQuantizer(4, symmetric, PerTensor()).double()
    quantizer.set_range(torch.tensor([-2.0]).double(), torch.tensor([1.5]).double())
    levels = (x / quantizer.scale + quantizer.zero_point).round()
    below, above = (levels < quantizer.qmin).sum(), (levels > quantizer.qmax).sum()
    found = count_clipped(x, quantizer)
    assert abs(found[0] - below) <= 1 and abs(found[1] - above) <= 1 and found[0] > 50 < found[1]
    observer = ClippingObserver(quantizer)
    for part in x.split(7):
        observer.observe(part)
    assert sum(observer.clipping.shares) == pytest.approx(float(sum(found)) / x.numel())


def test_min_max_clips_nothing_and_says_so():
    vlm = build("vit_clean")
    made = quantize(vlm, "minmax", QuantScheme(4, 4, scope="vision_text"), make_batches(vlm))
    assert made.coverage.clipped == () and "clip" not in made.coverage.table().caption
    assert "clip" not in " ".join(made.coverage.lines())


def test_inconsistent_statistics_are_told_and_refused():
    """A step from the mean magnitude beside a zero point from the minimum: what the grid was once made of."""
    vlm = build("vit_clean")
    batches = make_batches(vlm)
    quantize(vlm, "minmax", QuantScheme(8, 8), batches)
    name = "model.visual.transformer.resblocks.0.mlp.c_fc"
    quantizer = quantized_layers(vlm)[name].act_fake_quant
    quantizer.set_qparams(quantizer.scale.detach() / 20, torch.tensor([255.0]))
    note_clipping(vlm, QuantScheme(), batches)
    found = measure_clipping(vlm)
    assert [(grid.layer, grid.side, grid.saturated) for grid in found] == [(name, "input", True)]
    assert found[0].share > REFUSED and found[0].useless
    with pytest.raises(
        VLMQError,
        match=r"1 quantization grids clip .* c_fc input .*\(zero point saturated\)".replace(" c_fc", ".*c_fc"),
    ):
        require_usable(found)


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_saturated_grid_is_refused_however_much_energy_it_keeps(seed: int, channels: int):
    """Half of the values are zeros; a few large ones, which the grid nearly holds, are most of the energy."""
    x = one_outlier_channel(seed)
    x[:, :channels] = -40
    model = nn.ModuleDict({"layer": QuantLinear(nn.Linear(768, 2), QuantScheme(16, 8, act_symmetric=False))})
    quantizer = model["layer"].act_fake_quant
    quantizer.set_qparams(torch.tensor([0.15]), torch.tensor([255.0]))  # -38.25 to 0
    quantizer.clipping = judge(x, quantizer)
    (grid,) = measure_clipping(model)
    assert grid.saturated and 0.4 < grid.share < 0.5 and grid.lost < LOST and grid.cost > COSTLY
    with pytest.raises(VLMQError, match=r"one side of zero to zeros .* layer input .*\(zero point saturated\)"):
        require_usable([grid])


def test_a_method_that_cuts_a_layer_off_is_refused():
    vlm = build("vit_clean")
    with pytest.raises(VLMQError, match="clip more than 25% of their values"):
        quantize(vlm, "percentile(share=0.6)", QuantScheme(8, 8), make_batches(vlm))


def test_rare_values_that_are_all_that_counts_are_told():
    """A channel in every thousandth place, beyond the percentile: few values, most of the energy."""
    vlm = build("vit_clean")
    name = "model.visual.transformer.resblocks.1.mlp.c_fc"
    with torch.no_grad():
        vlm.get_submodule("model.visual.transformer.resblocks.1.ln_2").weight[5] *= 300
    made = quantize(vlm, "percentile(share=0.9985, clip_weights=False)", QuantScheme(8, 8), make_batches(vlm))
    told = {grid.layer: grid for grid in made.coverage.clipped if grid.side == "input"}
    assert told[name].share < REPORTED and told[name].cost > COSTLY and not told[name].useless
    quantizer = quantized_layers(vlm)[name].act_fake_quant
    assert told[name].cost == quantizer.clipping.error / quantizer.clipping.minmax_error
    assert f"{name} input {told[name].share:.3%}, {told[name].cost:.0f} times" in made.coverage.table().caption


def test_two_bits_from_the_least_squared_error_are_told_not_refused():
    vlm = build("vit_clean")
    made = quantize(vlm, "mse", QuantScheme(2, 8), make_batches(vlm))
    told = [grid for grid in made.coverage.clipped if grid.side == "weight"]
    assert told and all(0.01 < grid.share < REFUSED for grid in told)
    assert "clip more than 1%" in made.coverage.table().caption
    worst = max(told, key=lambda grid: grid.share)
    line = made.coverage.lines()[2]
    assert line.startswith("Layers that clip more than 1% of a grid's values") and str(worst) in line
    assert f": {len({grid.layer for grid in made.coverage.clipped})}; worst" in line


@pytest.mark.parametrize("start", ["mse", "minmax", "paper"])
def test_no_start_of_a_trained_method_is_saturated_by_planted_outliers(start: str):
    vlm = build("vit_clean")
    with torch.no_grad():
        for name, module in vlm.named_modules():
            if isinstance(module, nn.LayerNorm) and "resblocks" in name:
                module.weight[[1, 10]] *= 30
                module.bias[1] -= 20
    made = quantize(vlm, f"lsq_contrastive(start={start!r})", QuantScheme(8, 8), make_batches(vlm))
    assert not any(grid.saturated for grid in made.coverage.clipped)


def test_a_layer_without_values_clips_nothing():
    layer = QuantLinear(nn.Linear(4, 3), QuantScheme())
    layer.act_fake_quant.set_range(torch.tensor([0.0]), torch.tensor([0.0]))
    assert sum(count_clipped(torch.zeros(0, 4), layer.act_fake_quant)) == 0
    assert sum(count_clipped(torch.zeros(5, 4), layer.act_fake_quant)) == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_range_is_never_refused(bits: int, seed: int):
    """Inputs with most of their values near one end, as gates give them: clipping them can be the best there is."""
    x = torch.nn.functional.silu(torch.randn(4000, generator=torch.Generator().manual_seed(seed)) * 3 - 1.5)
    histogram = HistogramObserver(x.min().item(), x.max().item())
    histogram.observe(x)
    quantizer = FakeQuantizer(bits, False, PerTensor())
    quantizer.set_range(*search_histogram(histogram, quantizer))
    found = judge(x, quantizer)
    assert found.error <= 1.01 * found.minmax_error  # both are 0 where nothing is clipped
    worse = FakeQuantizer(bits, False, PerTensor())
    worse.set_range(torch.zeros(1), x.quantile(0.5).clamp_min(0.01).view(1))
    cut = judge(x, worse)
    assert sum(cut.shares) > REFUSED and cut.lost > LOST and (bits == 2 or cut.error > cut.minmax_error)


def test_what_clipping_costs_against_sums_by_hand():
    x = torch.tensor([-3.0, -1.0, 0.0, 0.4, 1.0, 2.0, 9.0])
    quantizer = FakeQuantizer(2, False, PerTensor())
    quantizer.set_qparams(torch.tensor([1.0]), torch.tensor([1.0]))  # levels -1, 0, 1, 2
    found = judge(x, quantizer)
    assert (found.values, found.below, found.above) == (7, 1, 1)
    assert found.energy == 9 + 81 and found.clipped_error == 4 + 49 and found.error == pytest.approx(4 + 49 + 0.16)
    assert found.minmax_error == pytest.approx(1 + 1 + 0.16 + 1 + 4 + 1)  # levels -4, 0, 4, 8: step 4, zero point 1


def test_inputs_that_drift_once_weights_are_rounded_do_not_count():
    """Of what full precision gives the layer min-max clips nothing, however much rounding to 2 bits changes that."""
    vlm = shallow(build("align_clean"))
    made = quantize(vlm, "gptq", QuantScheme(2, 8), make_batches(vlm, (1,)))
    assert not [grid for grid in made.coverage.clipped if grid.side == "input"]


def test_what_gptq_s_grids_clip_is_told_though_its_weights_are_on_them():
    told = {}
    for method in ("mse", "gptq(grid='mse')"):
        vlm = build("vit_clean")
        quantize(vlm, method, QuantScheme(weight_bits=2, act_bits=16), make_batches(vlm))
        told[method] = {grid.layer: grid.share for grid in measure_clipping(vlm) if grid.side == "weight"}
    assert told["mse"] and told["gptq(grid='mse')"] == told["mse"]
