"""Explicit attention against torch's own, and whole models before and after the rewrite."""

import copy

import open_clip
import pytest
import torch
from torch import nn

from lightning_vlmq.models import ExplicitAttention, Projection, make_layers_explicit

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
