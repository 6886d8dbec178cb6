"""Converted models on disk: loaded to the last bit, small, whole or refused in one line."""

from pathlib import Path

import pytest
import torch
from cases.lowbit import W4A8, W8A8
from cases.quant import build, make_batches
from torch import nn
from torch.nn import functional as F

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.lowbit.convert import Conversion, convert_layers, flat_state, load_converted, save_converted
from lightning_vlmq.lowbit.layers import TensorLinear
from lightning_vlmq.models import VLM, zoo
from lightning_vlmq.quant import (
    LayerRule,
    QuantScheme,
    quantize,
    save_quantized,
)
from lightning_vlmq.quant.checkpoint import FORMAT, read_description


def saved(vlm: VLM, method: str, scheme: QuantScheme, conversion: Conversion, folder: Path) -> VLM:
    """Quantize, convert and save a model; the converted one comes back."""
    made = quantize(vlm, method, scheme, make_batches(vlm), minimum_coverage=0)
    save_quantized(vlm, folder / "fake", made)
    convert_layers(vlm, conversion, scheme, make_batches(vlm))
    save_converted(vlm, folder, conversion, read_description(folder / "fake" / "quant.json", FORMAT), note=1)
    return vlm


@torch.no_grad()
def outputs(vlm: VLM) -> list[torch.Tensor]:
    batch = make_batches(vlm, seed=5)[0]
    return [vlm.encode_image(batch["image"]), vlm.encode_text(batch["tokens"])]


MIXED = QuantScheme(
    4,
    8,
    scope="vision_text",
    overrides=(
        LayerRule("*q_proj*", weight_bits=8, act_bits=6),
        LayerRule("*c_proj*", skip=True),
        LayerRule("*k_proj*", weight_bits=16),
        LayerRule("*out_proj*", act_bits=16),
    ),
)
DISK_CASES = {
    "torchao": ("minmax", W4A8, Conversion()),
    "own": ("minmax", QuantScheme(3, 8, scope="vision_text"), Conversion(kernels="own")),
    "offsets": ("hqq", QuantScheme(4, 16, "per_group", 4, scope="vision_text"), Conversion()),
    "learned offsets": ("lsqplus_contrastive", W4A8, Conversion()),
    "following weights": ("ste_contrastive(weights='rtn')", W8A8, Conversion()),
    "scales": ("smoothquant", W8A8, Conversion("dynamic")),
    "rotations": ("quarot", QuantScheme(8, 16, scope="vision_text"), Conversion("static")),
    "mixed": ("minmax", MIXED, Conversion()),
}


@pytest.mark.parametrize("case", DISK_CASES)
@pytest.mark.parametrize("name", ["vit_clean", "convnext_clean"])
@pytest.mark.usefixtures("small_zoo")
def test_a_loaded_model_gives_the_same_bits(name: str, case: str, tmp_path: Path):
    vlm = saved(build(name), *DISK_CASES[case], tmp_path)
    state = torch.get_rng_state()
    loaded = load_converted(tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded), outputs(vlm)))
    assert torch.equal(loaded.logit_scale(), vlm.logit_scale())


@pytest.mark.parametrize("tower", zoo.TOWERS)
def test_every_family_converts(tower: str, tmp_path: Path):
    torch.manual_seed(0)
    vlm = saved(zoo.build(f"{tower}_clean").eval(), "minmax", W8A8, Conversion(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(outputs(load_converted(tmp_path)), outputs(vlm)))


def test_layers_are_read_one_by_one(tmp_path: Path):
    vlm = build("vit_clean")
    quantize(vlm, "minmax", MIXED, make_batches(vlm), minimum_coverage=0)
    layers = convert_layers(vlm, Conversion(), MIXED)
    kinds = {name.split(".")[-1]: layer for name, layer in layers.items() if "resblocks.1." in name}
    assert "c_proj" not in kinds
    assert (kinds["c_fc"]["kind"], kinds["c_fc"]["weight_bits"], kinds["c_fc"]["act_bits"]) == ("Int8Tensor", 4, 8)
    assert (kinds["q_proj"]["kind"], kinds["q_proj"]["weight_bits"], kinds["q_proj"]["act_bits"]) == (
        "IntegerLinear",
        8,
        6,
    )
    assert kinds["k_proj"]["kind"] == "QuantLinear" and kinds["k_proj"]["weight_bits"] == 16
    assert kinds["out_proj"]["kind"] == "IntxUnpackedToInt8Tensor" and kinds["out_proj"]["inputs"] == "none"


def test_files_shrink_with_the_bits(tmp_path: Path):
    sizes = {}
    for bits in (8, 4, 2):
        saved(
            build("vit_clean"), "minmax", QuantScheme(bits, 8, scope="vision_text"), Conversion(), tmp_path / str(bits)
        )
        sizes[bits] = (tmp_path / str(bits) / "model.safetensors").stat().st_size
    vlm = build("vit_clean")
    matrices = sum(layer.weight.numel() for layer in vlm.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    for more, less in ((8, 4), (4, 2)):
        assert sizes[more] - sizes[less] == pytest.approx(matrices * (more - less) / 8, rel=0.02)


def test_packed_kernels_take_less_memory_than_a_byte_a_weight():
    memory = {}
    for kernels in ("torchao", "own"):
        vlm = build("vit_clean")
        quantize(vlm, "minmax", W4A8, make_batches(vlm))
        convert_layers(vlm, Conversion(kernels=kernels), W4A8)
        memory[kernels] = sum(t.numel() * t.element_size() for t in flat_state(vlm)[0].values())
    vlm = build("vit_clean")
    linear = sum(layer.weight.numel() for layer in vlm.modules() if isinstance(layer, nn.Linear))
    assert memory["torchao"] - memory["own"] == pytest.approx(linear / 2, rel=0.1)


def test_a_layer_in_several_places_stays_one(tmp_path: Path):
    vlm = build("vit_clean")
    blocks = vlm.model.visual.transformer.resblocks
    blocks[1].mlp.c_fc = blocks[0].mlp.c_fc
    blocks[1].attn.q_proj.weight = blocks[0].attn.q_proj.weight
    quantize(vlm, "minmax", W4A8, make_batches(vlm))
    fake = outputs(vlm)
    convert_layers(vlm, Conversion(), W4A8)
    assert blocks[1].mlp.c_fc is blocks[0].mlp.c_fc and isinstance(blocks[0].mlp.c_fc, TensorLinear)
    for a, b in zip(outputs(vlm), fake):
        assert F.cosine_similarity(a, b).min() > 0.999


@pytest.mark.usefixtures("small_zoo")
def test_bad_folders_are_one_line(tmp_path: Path):
    def message(folder: Path) -> str:
        with pytest.raises(VLMQError) as caught:
            load_converted(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "convert.json" in message(tmp_path / "absent")
    saved(build("vit_clean"), "minmax", W8A8, Conversion(), tmp_path)
    weights, description = (tmp_path / "model.safetensors").read_bytes(), (tmp_path / "convert.json").read_text()
    (tmp_path / "model.safetensors").write_bytes(weights[:5000])
    assert "damaged" in message(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "no such file" in message(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "convert.json").write_text(description.replace('"kernels"', '"kernel"'))
    assert "converted model's description" in message(tmp_path)
    (tmp_path / "convert.json").write_text(description.replace('"torchao",', '"own",', 1))
    assert "does not hold the model" in message(tmp_path)
    (tmp_path / "convert.json").write_text(description[:100])
    assert "damaged" in message(tmp_path)
    (tmp_path / "convert.json").write_text(description)
    load_converted(tmp_path)
