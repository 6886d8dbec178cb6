import json
from pathlib import Path

import pytest
import torch
from cases.quant import INTEGER_METHODS, build, make_batches

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import VLM
from lightning_vlmq.quant import (
    METHODS,
    LayerRule,
    QuantScheme,
    load_quantized,
    quantize,
    quantized_layers,
    save_quantized,
)
from lightning_vlmq.quant.rotation.rotate import rotated_towers


def saved(vlm: VLM, folder: Path, method: str, scheme: QuantScheme) -> list[torch.Tensor]:
    batches = make_batches(vlm)
    save_quantized(vlm, folder, quantize(vlm, method, scheme, batches), {"note": "x"})
    with torch.no_grad():
        return [vlm.encode_image(batches[0]["image"]), vlm.encode_text(batches[0]["tokens"])]


@pytest.mark.parametrize("method", INTEGER_METHODS)
@pytest.mark.parametrize("name", ["vit_clean", "convnext_clean"])
def test_outputs_are_bit_identical_after_loading(tmp_path: Path, name: str, method: str):
    scheme = QuantScheme(4, 8, scope="vision_text")
    before = saved(build(name), tmp_path, method, scheme)
    fresh = build(name, seed=9)
    checkpoint = load_quantized(fresh, tmp_path)
    assert checkpoint.method == METHODS[method] and checkpoint.scheme == scheme and checkpoint.extra == {"note": "x"}
    assert checkpoint.coverage.weight_share() == 1
    batch = make_batches(fresh)[0]
    with torch.no_grad():
        assert torch.equal(fresh.encode_image(batch["image"]), before[0])
        assert torch.equal(fresh.encode_text(batch["tokens"]), before[1])
    assert (tmp_path / "quant.json").stat().st_size < 100_000


MIXED_GROUPS = QuantScheme(
    4,
    8,
    "per_group",
    group_size=16,
    scope="vision_text",
    overrides=[
        LayerRule("*.mlp.*", weight_bits=8, group_size=32),
        LayerRule("*.k_proj", weight_granularity="per_channel", weight_symmetric=False, act_bits=6),
        LayerRule("*.v_proj", act_bits=16),
        LayerRule("*.c_proj", tower="text", skip=True),
    ],
)


@pytest.mark.parametrize("method", INTEGER_METHODS)
@pytest.mark.parametrize("name", ["vit_clean", "convnext_clean"])
def test_mixed_bits_groups_and_rotated_streams_survive_together(tmp_path: Path, name: str, method: str):
    vlm = build(name)
    quantized = quantize(vlm, method, MIXED_GROUPS, make_batches(vlm), minimum_coverage=0.8)
    with torch.no_grad():  # training ends elsewhere than where it starts: nothing may be derived anew from the start
        for index, learned in enumerate(
            p for p in vlm.parameters() if p.requires_grad and METHODS[method].needs_training
        ):
            learned.mul_(1 + 0.01 * (index % 5))
    save_quantized(vlm, tmp_path, quantized)
    fresh = build(name, seed=9)
    load_quantized(fresh, tmp_path)
    rotates = method in ("quarot", "rot_lsq_contrastive", "rot_lsq_feature")
    assert rotated_towers(fresh) == (["vision", "text"][name != "vit_clean" :] if rotates else [])
    layers, loaded = quantized_layers(vlm), quantized_layers(fresh)
    assert layers.keys() == loaded.keys()
    in_groups = 0
    for layer, other in zip(layers.values(), loaded.values()):
        sides = [(la.weight_fake_quant, la.act_fake_quant) for la in (layer, other)]
        assert [(q.bits, q.granularity) for q in sides[0]] == [(q.bits, q.granularity) for q in sides[1]]
        assert torch.equal(layer.effective_weight(), other.effective_weight())
        in_groups += sides[1][0].scale.numel() > len(layer.weight)
    assert in_groups > 10 and {q.weight_fake_quant.bits for q in loaded.values()} == {4, 8}
    batch = make_batches(vlm, seed=5)[0]
    with torch.no_grad():
        logits = [
            m.zero_shot_logits(m.encode_image(batch["image"]), m.encode_text(batch["tokens"])) for m in (vlm, fresh)
        ]
    assert torch.equal(*logits) and torch.isfinite(logits[0]).all()


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(4, 8, "per_group", group_size=4, weight_symmetric=False),
        QuantScheme(3, 8, act_dynamic=True, act_granularity="per_token"),
        QuantScheme(16, 8, act_symmetric=True),
        QuantScheme(8, 16, "per_tensor"),
    ],
)
def test_every_scheme_survives(tmp_path: Path, scheme: QuantScheme):
    before = saved(build("convnext_clean"), tmp_path, "minmax", scheme)
    fresh = build("convnext_clean", seed=9)
    load_quantized(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh.encode_image(make_batches(fresh)[0]["image"]), before[0])


def test_a_tied_weight_is_saved_and_loaded(tmp_path: Path, vit: VLM):
    blocks = vit.model.visual.transformer.resblocks
    blocks[1].mlp.c_fc.weight = blocks[0].mlp.c_fc.weight
    before = saved(vit, tmp_path, "minmax", QuantScheme())
    fresh = build("vit_clean", seed=9)
    load_quantized(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh.encode_image(make_batches(fresh)[0]["image"]), before[0])


def message(vlm: VLM, folder: Path) -> str:
    with pytest.raises(VLMQError) as error:
        load_quantized(vlm, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_and_damaged_files_give_one_line(tmp_path: Path, vit: VLM):
    assert "quant.json" in message(vit, tmp_path / "absent")
    folder = tmp_path / "q"
    saved(build("vit_clean"), folder, "minmax", QuantScheme())
    weights, description = (folder / "model.safetensors").read_bytes(), (folder / "quant.json").read_text()

    for cut in (0, 5, 1000, len(weights) - 3):
        (folder / "model.safetensors").write_bytes(weights[:cut])
        assert "model.safetensors' is damaged" in message(vit, folder)
    (folder / "model.safetensors").unlink()
    assert "no such file" in message(vit, folder)
    (folder / "model.safetensors").write_bytes(weights)

    for cut in (0, 10, len(description) // 2):
        (folder / "quant.json").write_text(description[:cut])
        assert "quant.json' is damaged" in message(vit, folder)
    (folder / "quant.json").write_text("[]")
    assert "format" in message(vit, folder)
    content = json.loads(description)
    (folder / "quant.json").write_text(json.dumps({**content, "scheme": {**content["scheme"], "weight_bits": 77}}))
    assert "weight_bits" in message(vit, folder)
    (folder / "quant.json").write_text(json.dumps({k: v for k, v in content.items() if k != "layers"}))
    assert "layers" in message(vit, folder)
    assert not quantized_layers(vit), "a refused checkpoint must leave the model as it was"

    (folder / "quant.json").write_text(description)
    load_quantized(vit, folder)


def test_another_architecture_is_refused(tmp_path: Path):
    saved(build("vit_clean"), tmp_path, "minmax", QuantScheme())
    assert "vit_clean" in message(build("convnext_clean"), tmp_path)
