import pytest
import torch
from cases.quant import LAYER_KINDS, SEEDS, outlier_layer
from torch import nn
from torchao.quantization.quant_primitives import optimize_weights_proximal_legacy

from lightning_vlmq.quant import METHODS, QuantLinear, QuantScheme
from lightning_vlmq.quant.ptq.hqq import HQQ
from lightning_vlmq.quant.rounding import to_blocks


def heavy_tailed_error(difference: torch.Tensor) -> float:
    return difference.abs().pow(0.7).sum().item()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_the_fitted_zero_lowers_the_heavy_tailed_error(kind: str, granularity: str, symmetric: bool, seed: int):
    layer, _ = outlier_layer(kind, QuantScheme(3, 16, granularity, weight_symmetric=symmetric), seed)
    with torch.no_grad():
        layer.weight.pow_(3)
        METHODS["hqq"].fit_weight(layer)
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


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_heavy_tailed_error_is_below_round_to_nearest_on_the_same_grid(
    kind: str, granularity: str, bits: int, seed: int
):
    scheme = QuantScheme(bits, 16, granularity, group_size=12, weight_symmetric=False)
    layer, _ = outlier_layer(kind, scheme, seed)
    errors = {}
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight) * layer.weight.exp())
        layer.weight.flatten(1)[:, 1] *= 8  # what the scales of an outlier channel leave in the weights
        for method in ("minmax", "hqq"):
            METHODS[method].fit_weight(layer)
            errors[method] = heavy_tailed_error(layer.effective_weight() - layer.weight)
    assert errors["hqq"] < errors["minmax"]


def test_groups_are_fitted_as_if_each_were_alone():
    layer, _ = outlier_layer("linear", QuantScheme(3, 16, "per_group", group_size=12))
    METHODS["hqq"].fit_weight(layer)
    groups = layer.weight.detach().view(24, 4, 12)
    for place in range(4):
        single = QuantLinear(nn.Linear(12, 24), QuantScheme(3, 16))
        single.set_weight(groups[:, place])
        METHODS["hqq"].fit_weight(single)
        together = layer.effective_weight().view(24, 4, 12)[:, place]
        torch.testing.assert_close(together, single.effective_weight(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_of_the_iterates_of_torchaos_solver(seed: int):
    rows = torch.randn(7, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    start = -rows.amin(1)
    zero, error = HQQ().fit_zero(rows, torch.ones(7, dtype=torch.float64), start, 7)
    settings = {"lp_norm": 0.7, "beta": 10.0, "kappa": 1.01, "early_stop": False}
    tried = []
    for iterations in range(21):
        found = start[:, None]
        if iterations:
            chosen = {**settings, "iters": iterations}
            _, _, found = optimize_weights_proximal_legacy(
                rows, torch.ones(7, 1), found, [0, 7], 1, torch.float64, opt_params=chosen
            )
        level = (rows + found).round().clamp(0, 7)
        tried.append(((level - found - rows).abs().pow(0.7).sum(1), found[:, 0]))
    errors, zeros = (torch.stack(column) for column in zip(*tried))
    least, which = errors.min(0)
    torch.testing.assert_close(error, least)
    torch.testing.assert_close(zero, zeros.gather(0, which[None])[0])


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_channel(value: float):
    layer, x = outlier_layer("linear", QuantScheme(4, 16))
    with torch.no_grad():
        layer.weight[2] = value
        METHODS["hqq"].fit_weight(layer)
        torch.testing.assert_close(layer.effective_weight()[2], layer.weight[2], rtol=1e-3, atol=1e-6)
        assert torch.isfinite(layer(x)).all()
