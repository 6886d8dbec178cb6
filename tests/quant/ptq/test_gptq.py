import pytest
import torch
from cases.quant import LAYER_KINDS, SEEDS, build, make_batches, outlier_layer, second_moment, squared_output_error
from torch import Tensor, nn

from lightning_vlmq.quant import METHODS, QuantLinear, QuantScheme, quantize, quantized_layers
from lightning_vlmq.quant.ptq.gptq import GPTQ
from lightning_vlmq.quant.rounding import choose_qparams


def optimal_brain_quantization(weight: Tensor, moment: Tensor, scheme: QuantScheme, group: int) -> Tensor:
    """GPTQ Eq. 2 and 3 as they stand, in float64: the whole inverse Hessian is downdated after each column."""
    weight, hessian = weight.double().clone(), moment.double().clone()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    out = torch.zeros_like(weight)
    qmin, qmax = scheme.weight_range
    for q in range(weight.shape[1]):
        if q % group == 0:
            block = weight[:, q : q + group]
            scale, zero = choose_qparams(block.amin(1), block.amax(1), qmin, qmax, scheme.weight_symmetric)
        out[:, q] = ((weight[:, q] / scale).round().add(zero).clamp(qmin, qmax) - zero) * scale
        error = (weight[:, q] - out[:, q]) / inverse[q, q]
        weight -= error[:, None] * inverse[q][None]
        inverse -= inverse[:, q : q + 1] * inverse[q : q + 1] / inverse[q, q].clone()
        inverse[q, q] = 1.0  # done with; never used again
    return out


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
def test_lazy_cholesky_rounding_is_optimal_brain_quantization(granularity: str, symmetric: bool):
    torch.manual_seed(0)
    columns, group = 150, 30  # more than one lazy block, and a group that lies across two
    scheme = QuantScheme(4, 16, granularity, group_size=group, weight_symmetric=symmetric)
    layer = QuantLinear(nn.Linear(columns, 6), scheme)
    x = torch.randn(400, columns) @ (torch.eye(columns) + 0.1 * torch.randn(columns, columns))
    moment = second_moment(layer, x)
    METHODS["minmax"].fit_weight(layer)
    with torch.no_grad():
        ours = GPTQ().round_columns(layer, moment).double()
    expected = optimal_brain_quantization(
        layer.weight.detach(), moment[0], scheme, group if granularity == "per_group" else columns
    )
    same = (ours - expected).abs() < 1e-5
    assert same.double().mean() > 0.97  # one value that lies on a rounding point sends its row's later ones another way
    errors = [squared_output_error(layer, x, w, layer.weight) for w in (ours, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("bits", [3, 4])
def test_output_error_is_below_min_max(kind: str, granularity: str, bits: int, seed: int):
    layer, x = outlier_layer(kind, QuantScheme(bits, 16, granularity, group_size=6), seed)
    METHODS["minmax"].fit_weight(layer)
    with torch.no_grad():
        plain = squared_output_error(layer, x, layer.effective_weight(), layer.weight)
        rounded = GPTQ().round_columns(layer, second_moment(layer, x))
        assert squared_output_error(layer, x, rounded, layer.weight) < 0.85 * plain  # the inputs are correlated
        layer.set_weight(rounded)
        torch.testing.assert_close(layer.effective_weight(), rounded, rtol=1e-6, atol=1e-8)  # it lies on the grid


def test_uncorrelated_inputs_leave_nothing_to_gain():
    layer, _ = outlier_layer("linear", QuantScheme(4, 16))
    METHODS["minmax"].fit_weight(layer)
    with torch.no_grad():
        rounded = GPTQ().round_columns(layer, torch.eye(48)[None])
        torch.testing.assert_close(rounded, layer.effective_weight(), rtol=1e-6, atol=1e-8)


def test_dead_inputs_and_a_single_sample():
    layer, x = outlier_layer("linear", QuantScheme(4, 16))
    METHODS["minmax"].fit_weight(layer)
    with torch.no_grad():
        x[:, :10] = 0
        assert torch.isfinite(GPTQ().round_columns(layer, second_moment(layer, x))).all()
        assert torch.isfinite(GPTQ().round_columns(layer, second_moment(layer, x[:1]))).all()  # a rank-one Hessian
        assert torch.isfinite(GPTQ().round_columns(layer, torch.zeros(1, 48, 48))).all()


def test_whole_model_beats_min_max_at_three_bits():
    errors = {}
    for method in ("minmax", "gptq"):
        vlm = build("vit_clean")
        batches = make_batches(vlm, (8,))
        with torch.no_grad():
            reference = vlm.encode_image(batches[0]["image"])
            quantize(vlm, method, QuantScheme(3, 16), batches)
            errors[method] = (vlm.encode_image(batches[0]["image"]) - reference).square().sum().item()
    assert errors["gptq"] < errors["minmax"]
    assert all(not torch.isnan(layer.weight).any() for layer in quantized_layers(vlm).values())
