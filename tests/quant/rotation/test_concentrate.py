"""Outlier channels in the residual stream: nothing a model computes changes, and the strongest directions are channels."""

from functools import partial

import pytest
import torch
from cases.quant import build, make_batches, twin
from torch import nn
from torch.nn import functional as F

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import VLM, load_vlm
from lightning_vlmq.models.outliers import drawn_features
from lightning_vlmq.quant import QuantScheme, quantize
from lightning_vlmq.quant.rotation.concentrate import concentrate_streams
from lightning_vlmq.quant.rotation.streams import find_stream


def normalised(vlm: VLM, tower: str) -> torch.Tensor:
    """What the stream's norms read, centred and of unit variance, of drawn images and texts: ``[n, width]``."""
    seen: list[torch.Tensor] = []

    def add(norm, module, args) -> None:
        x = args[0].double().flatten(0, -2)
        x = x - x.mean(1, keepdim=True)
        seen.append(x / (x.square().mean(1, keepdim=True) + norm.eps).sqrt())

    norms = [getattr(*slot) for slot, _ in find_stream(vlm, tower).readers]
    hooks = [norm.register_forward_pre_hook(partial(add, norm)) for norm in norms]
    drawn_features(vlm)
    for hook in hooks:
        hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("siglip_clean", ["vision", "text"]),
        ("vit_clean", ["text"]),
        ("coca_clean", ["text"]),
        ("convnext_clean", ["text"]),
    ],
)
def test_no_feature_changes_and_the_strongest_directions_are_channels(name: str, towers: list[str]):
    vlm = build(name, seed=3)
    with torch.no_grad():
        for parameter in vlm.parameters():  # gains that are not all one, biases that are not all zero
            parameter += 0.05 * torch.randn_like(parameter)
    planted = twin(vlm)
    where = concentrate_streams(planted, channels=2, seed=5)
    assert list(where) == towers and all(len(set(channels)) == 2 for channels in where.values())
    batch = make_batches(vlm, (3,), seed=8)[0]
    with torch.no_grad():
        torch.testing.assert_close(
            planted.encode_image(batch["image"]), vlm.encode_image(batch["image"]), rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(
            planted.encode_text(batch["tokens"]), vlm.encode_text(batch["tokens"]), rtol=1e-3, atol=1e-4
        )
    shapes = [{n: (type(m), m.extra_repr()) for n, m in model.named_modules()} for model in (vlm, planted)]
    assert shapes[0] == shapes[1] and vlm.state_dict().keys() == planted.state_dict().keys()
    for tower, channels in where.items():
        before, after = normalised(vlm, tower), normalised(planted, tower)
        strongest = torch.linalg.svdvals(before)[:2].square() / len(before)
        found = after[:, channels].square().mean(0).sort(descending=True).values
        # a channel less its share of the mean is as near as a direction that keeps the mean can come to it
        torch.testing.assert_close(found, strongest, rtol=0.05, atol=0.05)
        torch.testing.assert_close(after.square().mean(), before.square().mean(), rtol=1e-3, atol=0)


def test_what_has_no_stream_is_refused_with_the_reasons():
    vlm = build("vit_clean")
    vlm.model.ln_final = nn.Identity()
    reasons = r"no residual stream to plant.*vision: a norm starts its stream; text: its 'ln_final' is a Identity"
    with pytest.raises(VLMQError, match=reasons):
        concentrate_streams(vlm)
    with pytest.raises(VLMQError, match="at least 1 channel"):
        concentrate_streams(build("siglip_clean"), channels=0)


def test_per_tensor_grids_lose_and_a_rotation_brings_it_back():
    """With 6-bit inputs, as two channels of two hundred do not fill 8 bits; a trained model, whose stream has strong directions."""
    full = load_vlm("siglip_clean").eval()
    planted = twin(full)
    concentrate_streams(planted)
    batches = make_batches(full, (16, 16), seed=2)
    images = make_batches(full, (32,), seed=9)[0]["image"]

    def error(vlm: VLM, method: str) -> float:
        student = twin(vlm)
        quantize(student, method, QuantScheme(8, 6), batches)
        with torch.no_grad():
            return float(1 - F.cosine_similarity(student.encode_image(images), full.encode_image(images)).mean())

    plain, suffers, rescued = error(full, "minmax"), error(planted, "minmax"), error(planted, "quarot")
    assert suffers > 1.2 * plain and rescued < suffers / 1.2, (plain, suffers, rescued)
