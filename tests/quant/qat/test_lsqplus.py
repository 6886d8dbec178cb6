import pytest
import torch
from cases.quant import SEEDS, build, make_batches, shallow
from torch import Tensor, nn
from torchao.quantization.granularity import PerTensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import VLM
from lightning_vlmq.quant import METHODS, FakeQuantizer, QuantScheme, quantize, quantized_layers


def test_weight_steps_start_at_three_sigma(vit: VLM):
    quantize(vit, "lsqplus_contrastive(start='paper')", QuantScheme(weight_bits=4), make_batches(vit))
    for layer in quantized_layers(vit).values():
        rows = layer.weight.detach().flatten(1)
        mean, deviation = rows.mean(1), rows.std(1, unbiased=False)
        expected = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / 8
        torch.testing.assert_close(layer.weight_fake_quant.scale.detach(), expected)
        assert layer.weight_fake_quant.offset is None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
def test_an_unsigned_weight_grid_starts_from_three_sigma_below_to_three_above(granularity: str, seed: int):
    vlm = shallow(build("convnext_clean", seed))
    weights = {n: m.weight.detach().clone() for n, m in vlm.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    scheme = QuantScheme(4, 16, granularity, group_size=4, weight_symmetric=False)
    quantize(vlm, "lsqplus_contrastive(start='paper')", scheme, make_batches(vlm))
    for name, layer in quantized_layers(vlm).items():
        quantizer = layer.weight_fake_quant
        rows = weights[name].double().reshape(quantizer.scale.numel(), -1)
        mean, deviation = rows.mean(1), rows.std(1, unbiased=False)
        low, high = (mean - 3 * deviation).clamp_max(0), (mean + 3 * deviation).clamp_min(0)
        torch.testing.assert_close(quantizer.scale.detach().double(), (high - low) / 15, rtol=1e-4, atol=1e-9)
        lowest = -quantizer.zero_point * quantizer.scale.detach()
        assert ((lowest - low).abs() <= 0.501 * quantizer.scale + 1e-7).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_every_input_grid_starts_with_no_more_error_than_min_max(seed: int):
    """Bhalgat et al. 2020, section 3.2: step and offset from the least squared error; by grid search, min-max among it."""
    vlm = shallow(build("vit_clean", seed))
    batches = make_batches(vlm, (6,), seed=seed)
    seen: dict[str, Tensor] = {}
    for name, layer in vlm.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach().clone()}))
    with torch.no_grad():
        vlm.encode_image(batches[0]["image"]), vlm.encode_text(batches[0]["tokens"])
    quantize(vlm, "lsqplus_contrastive(start='mse')", QuantScheme(16, 4, scope="vision_text"), batches)
    gains = []
    for name, layer in quantized_layers(vlm).items():
        x, quantizer = seen[name], layer.act_fake_quant
        position = ((x.double() - quantizer.offset.double()) / quantizer.scale.double()).clamp(0, 15)  # Eq. of 3.1
        level, is_tie = position.round(), (position % 1 - 0.5).abs() < 1e-4
        by_paper = level * quantizer.scale.double() + quantizer.offset.double()
        min_max = FakeQuantizer(4, False, PerTensor())
        min_max.set_range(x.min().view(1), x.max().view(1))
        with torch.no_grad():
            ours = quantizer(x)
            torch.testing.assert_close(ours.double(), by_paper, rtol=0, atol=1.01 * quantizer.scale.item())
            assert not (((ours - by_paper).abs() > 1e-4 * quantizer.scale) & ~is_tie).any()
            gains.append(((ours - x).square().sum() / (min_max(x) - x).square().sum()).item())
    assert max(gains) <= 1.02 and min(gains) < 0.9


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
    groups = METHODS["lsqplus_contrastive"].parameter_groups(vlm, 1e-3)  # type: ignore[attr-defined]
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for layer in quantized_layers(vlm).values():
        act = layer.act_fake_quant
        assert rates[id(act.offset)] == pytest.approx(15 * rates[id(act.scale)])
        assert rates[id(act.scale)] == pytest.approx(0.01 * act.scale.item())
    before = {n: p.detach().clone() for n, p in vlm.named_parameters() if n.endswith(".offset")}
    optimizer = torch.optim.Adam(groups)
    vlm.encode_image(make_batches(vlm)[0]["image"])[:, 0].sum().backward()
    optimizer.step()
    moved = [not torch.equal(p, before[n]) for n, p in vlm.named_parameters() if n in before]
    assert sum(moved) > 0.8 * len(moved)


def test_dynamic_activations_have_nothing_to_learn(vit: VLM):
    with pytest.raises(VLMQError, match="act_dynamic"):
        quantize(vit, "lsqplus_contrastive", QuantScheme(act_dynamic=True), make_batches(vit))
