"""Quantized attention products in a converted model: as in the fake-quantized one, on disk and in a program."""

from pathlib import Path

import pytest
import torch
from cases.quant import build, make_batches, shallow

from lightning_vlmq.lowbit.convert import Conversion, convert_layers
from lightning_vlmq.lowbit.export import export_encoder
from lightning_vlmq.quant import QuantScheme, quantize
from lightning_vlmq.quant.attention import attention_products

INT8 = QuantScheme(attention="int8", scope="vision_text")


def outputs(vlm) -> list[torch.Tensor]:
    batch = make_batches(vlm, (3,), seed=5)[0]
    with torch.no_grad():
        return [vlm.encode_image(batch["image"]), vlm.encode_text(batch["tokens"])]


@pytest.mark.parametrize("name", ["vit_clean", "siglip_clean"])
def test_products_stay_quantized_beside_integer_layers_and_in_a_program(name: str, tmp_path: Path):
    vlm = shallow(build(name))
    quantize(vlm, "minmax", INT8, make_batches(vlm))
    before = outputs(vlm)
    convert_layers(vlm, Conversion(), INT8)
    after = outputs(vlm)
    for ours, theirs in zip(after, before):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    products = attention_products(vlm)
    assert products and all(part.quantizes for part in products.values())
    batch = make_batches(vlm, (4,), seed=5)[0]
    for tower, x in (("vision", batch["image"]), ("text", batch["tokens"])):
        encode = export_encoder(vlm, tower, tmp_path / "encoder.pt2").module()
        with torch.no_grad():
            own = vlm.encode_image(x) if tower == "vision" else vlm.encode_text(x)
        torch.testing.assert_close(encode(x), own, rtol=1e-4, atol=1e-4)
    for part in products.values():  # the program's products are quantized too: coarser steps change it
        for quantizer in part.quantizers.values():
            quantizer.set_qparams(quantizer.scale.detach() * 30)
    coarse = export_encoder(vlm, "text", tmp_path / "encoder.pt2").module()(batch["tokens"])
    assert (coarse - own).abs().max() > 1e-3
