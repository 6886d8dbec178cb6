"""Explicit attention against torch's own, and whole models before and after the rewrite."""

import copy
import runpy
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.modified_resnet import AttentionPool2d
from open_clip.transformer import Attention
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import nn

from lightning_vlmq.core.preprocessing import Framing, Preprocessing
from lightning_vlmq.models import VLM, ExplicitAttention, Projection, make_layers_explicit
from lightning_vlmq.models.attention import ExplicitAttentionPool2d, ExplicitInnerAttention
from lightning_vlmq.quant import QuantScheme, quantize

MODELS = {
    "ViT-B-32": None,
    "convnext_base": None,
    "coca_ViT-B-32": None,
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "per_head", "padding"])
@pytest.mark.parametrize("kdim", [None, 20])
def test_equals_multihead_attention(mask, kdim):
    torch.manual_seed(torch.seed() % 2**31)
    dim, heads, batch, length = 24, 4, 3, 7
    source = length if kdim is None else 5
    original = nn.MultiheadAttention(dim, heads, batch_first=True, kdim=kdim, vdim=kdim).eval()
    nn.init.normal_(original.in_proj_bias)
    query = torch.randn(batch, length, dim)
    memory = query if kdim is None else torch.randn(batch, source, kdim)
    blocked = torch.rand(length, source) < 0.4
    blocked[:, 0] = False
    masks = {
        "none": {},
        "boolean": {"attn_mask": blocked},
        "additive": {"attn_mask": torch.randn(length, source)},
        "per_head": {"attn_mask": torch.randn(batch * heads, length, source)},
        "padding": {"key_padding_mask": torch.arange(source).expand(batch, -1) >= 3},
    }
    expected, _ = original(query, memory, memory, need_weights=False, **masks[mask])
    actual, _ = ExplicitAttention(original)(query, memory, memory, **masks[mask])
    assert relative(actual, expected) < 1e-5


def test_refuses_what_it_cannot_copy():
    with pytest.raises(NotImplementedError):
        ExplicitAttention(nn.MultiheadAttention(8, 2))
    with pytest.raises(NotImplementedError):
        ExplicitAttention(nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True))
    explicit = ExplicitAttention(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.randn(1, 2, 8)
    with pytest.raises(NotImplementedError):
        explicit(x, x, x, need_weights=True)


def test_projection_answers_matmul():
    layer = Projection(5, 3, bias=False)
    x = torch.randn(2, 5)
    assert torch.equal(x @ layer, layer(x))


@pytest.mark.parametrize("name", MODELS)
def test_whole_model_is_unchanged(name):
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None).eval()
    if name.startswith("coca"):  # open_clip leaves this one as uninitialised memory
        nn.init.normal_(model.text_decoder.text_projection, std=0.02)
    explicit = copy.deepcopy(model)
    make_layers_explicit(explicit)
    assert not [m for m in explicit.modules() if isinstance(m, nn.MultiheadAttention)]
    size = model.visual.image_size
    pixels = torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size)))
    tokens = open_clip.get_tokenizer(name)(["a photo of a cat", "two dogs on a sofa, in the evening"])
    with torch.no_grad():
        assert relative(explicit.encode_image(pixels), model.encode_image(pixels)) < 1e-5
        assert relative(explicit.encode_text(tokens), model.encode_text(tokens)) < 1e-5
        if name.startswith("coca"):  # the caption decoder has attention of its own, across to the image too
            assert relative(explicit(pixels, tokens)["logits"], model(pixels, tokens)["logits"]) < 1e-5


def test_attention_pooling_of_resnets():
    torch.manual_seed(torch.seed() % 2**31)
    pool = AttentionPool2d(3, 24, 4, 10).eval()
    x = torch.randn(5, 24, 3, 3)
    with torch.no_grad():
        assert relative(ExplicitAttentionPool2d(pool)(x), pool(x)) < 1e-5


@pytest.mark.parametrize(
    "settings", [{}, {"qk_norm": True}, {"scale_heads": True, "inner_norm": True}, {"qkv_bias": False}]
)
@pytest.mark.parametrize("mask", [None, "boolean", "per_head"])
def test_open_clips_own_attention(settings, mask):
    torch.manual_seed(torch.seed() % 2**31)
    attention = Attention(24, 4, **settings).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 7, 24)
    blocked = torch.rand(7, 7) < 0.4
    blocked[:, 0] = False
    given = {None: None, "boolean": blocked, "per_head": torch.randn(12, 7, 7)}[mask]
    with torch.no_grad():
        assert relative(ExplicitInnerAttention(attention)(x, given), attention(x, given)) < 1e-5


def test_biases_that_timm_adds_by_a_functional():
    torch.manual_seed(torch.seed() % 2**31)
    holder = nn.Sequential(
        EvaAttention(24, 4, qk_norm=False, scale_norm=False), BeitAttention(24, 4, qkv_bias=True)
    ).eval()
    for attention in holder:
        nn.init.normal_(attention.q_bias)
        nn.init.normal_(attention.v_bias)
    plain = copy.deepcopy(holder)
    called = []
    for attention in holder:
        attention.qkv.register_forward_hook(lambda *_: called.append(1))
    make_layers_explicit(holder)
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        assert relative(holder(x), plain(x)) < 1e-5
    assert len(called) == 2


FAMILIES = (
    "RN50",
    "EVA01-g-14",
    "EVA02-B-16",
    "ViTamin-S",
    "MobileCLIP-S1",
    "MobileCLIP-B",
    "PE-Core-T-16-384",
    "swin_base_patch4_window7_224",
    "vit_relpos_medium_patch16_cls_224",
    "ViT-B-16-SigLIP",
    "coca_ViT-B-32",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_weight_is_read_past_its_layer(name):
    """Each family of open_clip's list on the meta device, where its size costs nothing."""
    script = Path(__file__).parents[2] / "scripts" / "find_bypassed_layers.py"
    assert runpy.run_path(str(script))["bypassed"](name) == []


def test_a_clip_resnet_is_covered_to_the_last_weight():
    model = open_clip.CLIP(
        16,
        {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
        {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1},
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # open_clip starts the last norm of each block at zero
            nn.init.normal_(parameter, std=0.1)
    seen = Preprocessing(Framing(64), (0.5,) * 3, (0.25,) * 3)
    vlm = VLM(model, lambda texts: torch.randint(1, 99, (len(texts), 8)), "small RN", "none", seen).eval()
    batch = {"image": torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8), "tokens": torch.randint(1, 99, (4, 8))}
    for method in ("minmax", "gptq", "quarot"):
        quantized = copy.deepcopy(vlm)
        report = quantize(quantized, method, QuantScheme(8, 8, scope="vision_text"), [batch]).coverage
        assert report.weight_share() == 1 and report.unquantized == {}
        with torch.no_grad():
            assert (quantized.encode_image(batch["image"]) * vlm.encode_image(batch["image"])).sum(1).min() > 0.9
