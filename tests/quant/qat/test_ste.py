import copy

import pytest
import torch
from cases.quant import make_batches

from lightning_vlmq.models import VLM
from lightning_vlmq.quant import QuantScheme, quantize, quantized_layers


def test_weight_ranges_follow_the_weights(vit: VLM):
    quantize(vit, "ste_contrastive(weights='rtn')", QuantScheme(weight_bits=4), make_batches(vit))
    layer = quantized_layers(vit)["model.visual.transformer.resblocks.0.mlp.c_fc"]
    with torch.no_grad():
        before = layer.effective_weight().clone()
        layer.weight.mul_(10)
        torch.testing.assert_close(layer.effective_weight(), 10 * before)


@pytest.mark.parametrize(("start", "same_as"), [("rtn", "minmax"), ("gptq", "gptq")])
def test_it_starts_as_the_untrained_method_and_learns_no_steps(vit: VLM, start: str, same_as: str):
    batches = make_batches(vit)
    images = batches[0]["image"]
    outputs = []
    for method in (same_as, f"ste_contrastive(weights={start!r})"):
        model = copy.deepcopy(vit)
        quantize(model, method, QuantScheme(weight_bits=4), batches)
        with torch.no_grad():
            outputs.append(model.encode_image(images))
    assert torch.equal(*outputs)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "fake_quant" in n)


def test_the_gradient_passes_straight_through(vit: VLM):
    quantize(vit, "ste_contrastive", QuantScheme(weight_bits=4), make_batches(vit))
    layer = quantized_layers(vit)["model.visual.transformer.resblocks.0.mlp.c_fc"]
    upstream = torch.randn_like(layer.weight)
    layer.effective_weight().backward(upstream)
    torch.testing.assert_close(layer.weight.grad, upstream)  # min-max clips nothing
