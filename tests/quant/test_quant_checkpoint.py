import json
from pathlib import Path

import pytest
import torch
from quant_cases import build, make_batches

from lightning_vlmq.errors import VLMQError
from lightning_vlmq.models import VLM
from lightning_vlmq.quant import METHODS, QuantScheme, load_quantized, quantize, quantized_layers, save_quantized


def saved(vlm: VLM, folder: Path, method: str, scheme: QuantScheme) -> list[torch.Tensor]:
    batches = make_batches(vlm)
    report = quantize(vlm, method, scheme, batches)
    save_quantized(vlm, folder, method, scheme, report, {"note": "x"})
    with torch.no_grad():
        return [vlm.encode_image(batches[0]["image"]), vlm.encode_text(batches[0]["tokens"])]


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("name", ["vit_clean", "convnext_clean"])
def test_outputs_are_bit_identical_after_loading(tmp_path: Path, name: str, method: str):
    scheme = QuantScheme(4, 8, scope="vision_text")
    before = saved(build(name), tmp_path, method, scheme)
    fresh = build(name, seed=9)
    checkpoint = load_quantized(fresh, tmp_path)
    assert checkpoint.method == method and checkpoint.scheme == scheme and checkpoint.extra == {"note": "x"}
    assert checkpoint.coverage.weight_share() == 1
    batch = make_batches(fresh)[0]
    with torch.no_grad():
        assert torch.equal(fresh.encode_image(batch["image"]), before[0])
        assert torch.equal(fresh.encode_text(batch["tokens"]), before[1])
    assert (tmp_path / "quant.json").stat().st_size < 100_000


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
