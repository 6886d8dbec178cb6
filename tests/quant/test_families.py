"""Every method on the embedded towers beyond ViT and ConvNeXt: SigLIP's pooling head, CoCa's pooler and decoder, ALIGN's batch norm."""

import copy
from pathlib import Path

import pytest
import torch
from cases.quant import INTEGER_METHODS, build, make_batches
from torch import Tensor, nn

from lightning_vlmq.models import VLM
from lightning_vlmq.quant import (
    METHODS,
    QATMethod,
    QuantScheme,
    load_quantized,
    quantize,
    quantized_layers,
    save_quantized,
)
from lightning_vlmq.quant.calibrating import full_precision

FAMILIES = ("siglip_clean", "coca_clean", "align_clean")


def outputs(vlm: VLM) -> list[Tensor]:
    """Everything a model computes for four images and captions."""
    batch = make_batches(vlm)[0]
    with torch.no_grad():
        image, text = vlm.encode_image(batch["image"]), vlm.encode_text(batch["tokens"])
        logits = [vlm.zero_shot_logits(image, text)]
        if vlm.has_decoder:
            logits.append(vlm.caption_logits(vlm.image_tokens(batch["image"]), batch["tokens"]))
    return [image, text, *logits]


def train_step(vlm: VLM, teacher: VLM, method: QATMethod) -> None:
    """One backward pass and a step large enough to move every parameter that learns."""
    batch = make_batches(vlm)[0]
    optimizer = torch.optim.SGD(method.parameter_groups(vlm, 1e-3))
    with torch.no_grad():
        target = teacher.encode_image(batch["image"]), teacher.encode_text(batch["tokens"])
    loss = method.loss(
        vlm.encode_image(batch["image"]), vlm.encode_text(batch["tokens"]), *target, teacher.logit_scale()
    )
    loss.backward()
    for name, parameter in vlm.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, (
            name
        )  # DDP asks for the gradient of all that learn
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    optimizer.step()


@pytest.mark.parametrize("method", INTEGER_METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_method_covers_trains_and_saves(tmp_path: Path, name: str, method: str):
    vlm, scheme = build(name), QuantScheme(4, 8, scope="vision_text")
    teacher = copy.deepcopy(vlm)
    made = quantize(vlm, method, scheme, make_batches(vlm))
    report = made.coverage
    assert report.weight_share() == 1 and report.mac_share() > 0.8
    if METHODS[method].needs_training:
        chosen = METHODS[method]
        assert isinstance(chosen, QATMethod)
        train_step(vlm, teacher, chosen)
    expected = outputs(vlm)
    assert all(x.isfinite().all() for x in expected)
    save_quantized(vlm, tmp_path, made)
    fresh = build(name, seed=9)
    load_quantized(fresh, tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(outputs(fresh), expected, strict=True))


@pytest.mark.parametrize(("method", "bits"), [("minmax", 8), ("lsq_contrastive", 4)])
@pytest.mark.parametrize("name", FAMILIES)
def test_vision_scope_leaves_the_text_tower_alone(name: str, method: str, bits: int):
    vlm = build(name)
    before = outputs(vlm)[1]
    report = quantize(vlm, method, QuantScheme(bits, 8, scope="vision"), make_batches(vlm)).coverage
    assert report.weight_share(("vision",)) == 1 and report.weight_share(("text",)) == 0
    assert all(vlm.tower_of(layer) == "vision" for layer in quantized_layers(vlm))
    assert torch.equal(outputs(vlm)[1], before)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rotated_model_is_the_same_function(name: str):
    """QuaRot's rotations and SmoothQuant's scales cancel in every kind of layer that these families have."""
    vlm = build(name)
    before = outputs(vlm)
    for method in ("quarot", "smoothquant"):
        changed = copy.deepcopy(vlm)
        quantize(changed, method, QuantScheme(8, 8, scope="vision_text"), make_batches(vlm))
        with full_precision(changed):
            after = outputs(changed)
        assert all(torch.allclose(x, y, atol=1e-3) for x, y in zip(after, before, strict=True)), method


def test_the_decoder_of_coca_is_quantized_counted_and_not_trained():
    vlm = build("coca_clean")
    decoder = {name for name, m in vlm.named_modules() if isinstance(m, nn.Linear) and vlm.in_decoder(name)}
    text = sum(p.numel() for n, p in vlm.named_parameters() if n.startswith("model.text.") and p.ndim > 1)
    report = quantize(vlm, "lsqplus_contrastive", QuantScheme(scope="vision_text"), make_batches(vlm)).coverage
    assert decoder and decoder <= set(quantized_layers(vlm))
    row = next(r for r in report.rows if (r.tower, r.layer_type) == ("text", "linear"))
    assert row.weights == row.weights_quantized > text - sum(report.excluded.values())
    assert {vlm.in_decoder(name) for name, p in vlm.named_parameters() if p.requires_grad} == {False}
    assert any(p.requires_grad for name, p in vlm.named_parameters() if vlm.tower_of(name) == "text")


def test_macs_of_a_decoder_against_a_count_by_hand():
    vlm = build("coca_clean")
    report = quantize(vlm, "minmax", QuantScheme(scope="vision_text"), make_batches(vlm)).coverage
    macs = {r.layer_type: r.macs for r in report.rows if r.tower == "text"}
    width, length, shown, vocabulary = 64, 24, 7, vlm.model.text_decoder.text_projection.out_features
    block = 12 * width * width  # four attention matrices and an MLP of eight
    encoder = 2 * (length + 1) * block + width * 64
    decoder = length * block + (length * 10 + shown * 2) * width * width + length * width * vocabulary
    assert macs["linear"] == encoder + decoder
    products = 2 * (2 * (length + 1) ** 2 * width) + 2 * length**2 * width + 2 * length * shown * width
    assert macs["activation_product"] == products
