"""Planted outlier channels: nothing a model computes changes, and what quantization makes of it does as theory says."""

import copy

import pytest
import torch
from cases.quant import build, make_batches, twin
from timm.layers import LayerNorm2d
from torch import nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.models import VLM, load_vlm
from lightning_vlmq.models.outliers import plant_outliers
from lightning_vlmq.quant import QATMethod, QuantScheme, quantize
from lightning_vlmq.quant.training import contrastive_distillation


@pytest.mark.parametrize("family", ["vit", "convnext", "siglip", "coca", "align"])
def test_a_planted_model_computes_the_same_with_larger_inputs(family: str):
    vlm = build(f"{family}_clean", seed=2)
    planted = twin(vlm)
    where = plant_outliers(planted, 50, channels=3, seed=4)
    assert where and all(len(set(channels)) == 3 for channels in where.values())
    assert plant_outliers(twin(vlm), 50, channels=3, seed=4) == where
    batch = make_batches(vlm, (3,), seed=8)[0]
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: seen.update({name: (*seen.get(name, ()), out)})
        )
        for model in (vlm, planted)
        for name in where
    ]
    with torch.no_grad():
        for encode, x in (("encode_image", batch["image"]), ("encode_text", batch["tokens"])):
            full, own = (getattr(model, encode)(x) for model in (vlm, planted))
            torch.testing.assert_close(own, full, rtol=1e-3, atol=1e-4)
    for hook in hooks:
        hook.remove()
    for name, channels in where.items():
        if name in seen:  # a decoder's norms are not on the encoders' path
            before, after = seen[name][0], seen[name][len(seen[name]) // 2]  # some norms run twice
            axis = 1 if before.ndim == 4 and isinstance(vlm.get_submodule(name), LayerNorm2d) else -1
            before, after = (x.index_select(axis, torch.tensor(channels)) for x in (before, after))
            torch.testing.assert_close(after, 50 * before, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_planted_is_refused_or_left():
    vlm = build("vit_clean")
    with pytest.raises(VLMQError, match="factors of at least 1"):
        plant_outliers(vlm, 0.5)
    block = vlm.model.visual.transformer.resblocks[0]

    class Peeking(nn.Module):  # reads the norm's output beside the layers
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, query, key, value, **kwargs):
            out, weights = self.attention(query, key, value, **kwargs)
            return out + query, weights

    block.attn = Peeking(block.attn)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    where = plant_outliers(vlm, 50)
    assert any(".resblocks.0.ln_2" in name for name in where) and not any(
        ".visual.transformer.resblocks.0.ln_1" in n for n in where
    )
    assert all(torch.equal(tensor, before[n]) for n, tensor in block.state_dict().items() if "ln_1" in n or "attn" in n)


@pytest.fixture(scope="module")
def trained() -> tuple[VLM, list[dict]]:
    data = EmbeddedData(datasets=["concepts"], n_concepts=8, n_id=8, calibration_pairs=256, train_batch_size=64)
    data.setup("fit")
    vlm = load_vlm("vit_clean")
    return vlm, [{"image": b["image"], "tokens": vlm.tokenize(b["caption"])} for b in data.calibration_batches()]


def divergence(vlm: VLM, method: str, batches: list[dict], updates: int = 0) -> float:
    """KL to full precision on the last quarter of the pairs, with W8A8 per tensor fitted to the others."""
    student = copy.deepcopy(vlm, {id(vlm._tokenize): vlm._tokenize})
    chosen = quantize(student, method, QuantScheme(weight_granularity="per_tensor"), batches[:-1]).method
    with torch.no_grad():
        features = [(vlm.encode_image(b["image"]), vlm.encode_text(b["tokens"])) for b in batches]
    if updates:
        assert isinstance(chosen, QATMethod)
        optimizer = torch.optim.AdamW(chosen.parameter_groups(student, 1e-3, 0.0, 1e-2), weight_decay=0.0)
        for update in range(updates):
            k = update % (len(batches) - 1)
            image, text = features[k]
            loss = chosen.loss(student.encode_image(batches[k]["image"]), text, image, text, vlm.logit_scale())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            chosen.keep_steps_positive(student)
    image, text = features[-1]
    with torch.no_grad():
        own = student.eval().encode_image(batches[-1]["image"])
        return float(contrastive_distillation(own, text, image, text, vlm.logit_scale()))


def test_outliers_cost_what_theory_says_and_the_remedies_bring_it_back(trained):
    """W8A8 per tensor: round-to-nearest and weight-only methods lose; scales and rotations of the inputs rescue."""
    vlm, batches = trained
    planted = copy.deepcopy(vlm, {id(vlm._tokenize): vlm._tokenize})
    plant_outliers(planted, 50)
    clean = divergence(vlm, "minmax", batches)
    suffers = {method: divergence(planted, method, batches) for method in ("minmax", "gptq", "hqq")}
    rescued = {method: divergence(planted, method, batches) for method in ("smoothquant", "quarot", "awq")}
    assert min(suffers.values()) > 10 * clean, (clean, suffers)
    assert max(rescued.values()) < min(suffers.values()) / 5, (suffers, rescued)
    start, after = (divergence(planted, "lsq_contrastive", batches, updates) for updates in (0, 15))
    assert after < min(start, *suffers.values())
    turned = divergence(planted, "rot_lsq_contrastive", batches)
    assert turned < min(suffers.values()) / 5
