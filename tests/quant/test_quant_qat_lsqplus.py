import pytest
import torch
from quant_cases import build, make_batches
from torchao.quantization.granularity import PerTensor

from lightning_vlmq.errors import VLMQError
from lightning_vlmq.models import VLM
from lightning_vlmq.quant import METHODS, FakeQuantizer, QuantScheme, quantize, quantized_layers


def test_weight_steps_start_at_three_sigma(vit: VLM):
    quantize(vit, "lsqplus_contrastive", QuantScheme(weight_bits=4), make_batches(vit))
    for layer in quantized_layers(vit).values():
        rows = layer.weight.detach().flatten(1)
        mean, deviation = rows.mean(1), rows.std(1, unbiased=False)
        expected = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / 8
        torch.testing.assert_close(layer.weight_fake_quant.scale.detach(), expected)
        assert layer.weight_fake_quant.offset is None


def test_activations_start_near_the_least_squared_error_and_zero_is_on_the_grid(vit: VLM):
    batches = make_batches(vit)
    quantize(vit, "lsqplus_contrastive", QuantScheme(), batches)
    quantizer = quantized_layers(vit)["model.visual.conv1"].act_fake_quant
    assert quantizer.offset is not None and quantizer.offset.requires_grad and quantizer.scale.requires_grad
    x = torch.cat([(b["image"] / 255 - vit.mean) / vit.std for b in batches])
    with torch.no_grad():
        error = (quantizer(x) - x).square().mean()
        min_max = FakeQuantizer(8, False, PerTensor())
        min_max.set_range(x.min().view(1), x.max().view(1))
        assert error <= (min_max(x) - x).square().mean() * 1.01
        zero_level = -quantizer.offset / quantizer.scale
    torch.testing.assert_close(zero_level, zero_level.round(), rtol=0, atol=1e-3)


def test_offsets_learn_at_a_pace_of_their_range():
    vlm = build("vit_clean")
    quantize(vlm, "lsqplus_contrastive", QuantScheme(act_bits=4), make_batches(vlm))
    groups = {g["name"]: g for g in METHODS["lsqplus_contrastive"]().parameter_groups(vlm, 1e-3)}  # type: ignore[attr-defined]
    assert set(groups) == {"matrices", "vectors", "weight8_steps", "activation4_steps", "activation4_offsets"}
    assert groups["activation4_offsets"]["lr"] == pytest.approx(15 * groups["activation4_steps"]["lr"])
    before = {n: p.detach().clone() for n, p in vlm.named_parameters() if n.endswith(".offset")}
    optimizer = torch.optim.Adam(list(groups.values()))
    vlm.encode_image(make_batches(vlm)[0]["image"])[:, 0].sum().backward()
    optimizer.step()
    moved = [not torch.equal(p, before[n]) for n, p in vlm.named_parameters() if n in before]
    assert sum(moved) > 0.8 * len(moved)


def test_dynamic_activations_have_nothing_to_learn(vit: VLM):
    with pytest.raises(VLMQError, match="act_dynamic"):
        quantize(vit, "lsqplus_contrastive", QuantScheme(act_dynamic=True), make_batches(vit))
