import math

import pytest
import torch
from cases.quant import build, make_batches

from lightning_vlmq.quant import QuantScheme, quantize, quantized_layers
from lightning_vlmq.quant.rotation.rotate import rotate, rotated_towers

BLOCK = "model.visual.transformer.resblocks.1"


def test_steps_start_from_the_rotated_weights_and_rotations_stay_fixed():
    vlm, plain = build("vit_clean"), build("vit_clean")
    quantize(vlm, "rot_lsq_contrastive(start='paper')", QuantScheme(weight_bits=4), make_batches(vlm))
    online = rotate(plain, ("vision",))
    for name in (f"{BLOCK}.attn.q_proj", f"{BLOCK}.attn.out_proj", f"{BLOCK}.mlp.c_proj"):
        layer, rotated = quantized_layers(vlm)[name], plain.get_submodule(name).weight.detach()
        if name in online:
            rotated = online[name].to(rotated.dtype)(rotated)
        torch.testing.assert_close(layer.weight, rotated, rtol=1e-4, atol=1e-6)
        expected = 2 * rotated.abs().mean(1) / math.sqrt(7)
        torch.testing.assert_close(layer.weight_fake_quant.scale.detach(), expected, rtol=1e-4, atol=1e-7)
        assert not list(layer.input_transform.parameters()) and not list(layer.folds.parameters())


@pytest.mark.parametrize("method", ["rot_lsq_contrastive", "rot_lsq_feature"])
def test_the_rotated_model_trains(method: str):
    vlm, teacher = build("siglip_clean"), build("siglip_clean")
    batches = make_batches(vlm)
    made = quantize(vlm, method, QuantScheme(weight_bits=3), batches)
    report, chosen = made.coverage, made.method
    assert report.rotations == {"vision": "residual stream"} and rotated_towers(vlm) == ["vision"]
    fixed = {name: buffer.clone() for name, buffer in vlm.named_buffers() if "rotation" in name or "folds" in name}
    with torch.no_grad():
        image, text = teacher.encode_image(batches[0]["image"]), teacher.encode_text(batches[0]["tokens"])
    optimizer = torch.optim.AdamW(chosen.parameter_groups(vlm.train(), weight_lr=3e-3))
    losses = []
    for _ in range(15):
        loss = chosen.loss(vlm.encode_image(batches[0]["image"]), text, image, text, teacher.logit_scale())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert fixed and all(torch.equal(buffer, fixed[name]) for name, buffer in vlm.named_buffers() if name in fixed)
