import math

import torch
from quant_cases import build, make_batches

from lightning_vlmq.quant import QuantScheme, quantize, quantized_layers
from lightning_vlmq.quant.transforms import Rotation


def test_steps_start_from_the_rotated_weights_and_rotations_stay_fixed():
    vlm = build("vit_clean")
    plain = build("vit_clean")
    quantize(vlm, "rot_lsq_contrastive", QuantScheme(weight_bits=4), make_batches(vlm))
    name = "model.visual.transformer.resblocks.1.attn.q_proj"
    layer = quantized_layers(vlm)[name]
    assert isinstance(layer.input_transform, Rotation)
    assert not list(layer.input_transform.parameters())
    rotated = layer.input_transform(plain.get_submodule(name).weight)
    torch.testing.assert_close(layer.weight, rotated, rtol=1e-4, atol=1e-6)
    expected = 2 * rotated.abs().mean(1) / math.sqrt(7)
    torch.testing.assert_close(layer.weight_fake_quant.scale.detach(), expected.detach(), rtol=1e-4, atol=1e-7)
