"""Quantized attention products: against torch's attention, against integers, in every family, saved and refused."""

import copy

import pytest
import torch
from cases.quant import build, make_batches, shallow, twin
from torch import Tensor
from torch.nn import functional as F

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import VLM, load_vlm
from lightning_vlmq.quant import QuantScheme, load_quantized, measure_coverage, quantize, save_quantized
from lightning_vlmq.quant.attention import AttentionProducts, attention_products, find_attention
from lightning_vlmq.quant.calibrating import full_precision, run_once

INT8 = QuantScheme(attention="int8", scope="vision_text")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(vlm: VLM) -> list[Tensor]:
    batch = make_batches(vlm, (3,), seed=5)[0]
    with torch.no_grad():
        return [vlm.encode_image(batch["image"]), vlm.encode_text(batch["tokens"])]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.tril(torch.ones(5, 7, dtype=torch.bool))},
        {"attn_mask": draw(2, 4, 5, 7, seed=9)},
        {"enable_gqa": True},
    ],
)
def test_unquantized_products_are_torch_s_attention(settings: dict):
    products = AttentionProducts(INT8).double()
    for quantizer in products.quantizers.values():
        quantizer.enabled = False
    heads = 2 if settings.get("enable_gqa") else 4
    q, k, v = draw(2, 4, 5, 6), draw(2, heads, 7, 6, seed=1), draw(2, heads, 7, 3, seed=2)
    torch.testing.assert_close(products(q, k, v, **settings), F.scaled_dot_product_attention(q, k, v, **settings))
    assert products.macs(q, k, v) == 2 * 4 * 5 * 7 * (6 + 3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_products_are_those_of_integers(symmetric: bool):
    products = AttentionProducts(QuantScheme(attention="int8", act_symmetric=symmetric)).double()
    q, k, v = draw(2, 3, 5, 8), 3 * draw(2, 3, 7, 8, seed=1) + 1, draw(2, 3, 7, 4, seed=2)
    probabilities = (q @ k.mT / 8**0.5).softmax(-1)
    for name, x in {"q": q, "k": k, "v": v, "probabilities": probabilities}.items():
        products.quantizers[name].set_range(x.amin().view(1), x.amax().view(1))

    def integers(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        quantizer = products.quantizers[name]
        level = (x / quantizer.scale + quantizer.zero_point).round().clamp(quantizer.qmin, quantizer.qmax)
        return (level - quantizer.zero_point).long(), quantizer.scale.detach()

    (qi, qs), (ki, ks), (vi, vs) = integers(q, "q"), integers(k, "k"), integers(v, "v")
    assert max(x.abs().max() for x in (qi, ki, vi)) <= 255
    scores = (qi @ ki.mT).double() * (qs * ks / 8**0.5)
    pi, ps = integers(scores.softmax(-1), "probabilities")
    expected = (pi @ vi).double() * (ps * vs)
    torch.testing.assert_close(products(q, k, v), expected, rtol=1e-9, atol=1e-9)
    assert (expected - F.scaled_dot_product_attention(q, k, v)).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["vit", "convnext", "siglip", "coca", "align"])
@pytest.mark.parametrize("method", ["minmax", "quarot"])
def test_all_products_of_every_family_are_quantized(family: str, method: str):
    fresh = shallow(build(f"{family}_clean"))
    plain, vlm = twin(fresh), twin(fresh)
    batches = make_batches(fresh)
    before = quantize(plain, method, QuantScheme(16, 8, scope="vision_text"), batches).coverage
    after = quantize(vlm, method, QuantScheme(16, 8, scope="vision_text", attention="int8"), batches).coverage
    products = [row for row in after.rows if row.layer_type == "activation_product"]
    assert products and all(row.macs == row.macs_quantized > 0 for row in products)
    assert [row for row in before.rows if row.layer_type == "activation_product"] == [
        type(row)(row.tower, row.layer_type, 0, 0, row.macs, 0) for row in products
    ]
    assert after.mac_share() > before.mac_share() and after.weight_share() == before.weight_share()
    attends = [bool(row.macs) for row in products]
    changed = [not torch.equal(ours, theirs) for ours, theirs in zip(outputs(vlm), outputs(plain))]
    assert changed == (
        [False, *attends] if family in ("convnext", "align") else attends
    )  # two families see by convolutions
    for ours, theirs in zip(outputs(vlm), outputs(plain)):
        assert F.cosine_similarity(ours, theirs).min() > 0.99


def test_what_attends_is_found_where_it_attends():
    vlm = build("coca_clean")
    found = find_attention(vlm, lambda: run_once(vlm, QuantScheme(scope="vision_text")))
    kinds = {type(vlm.get_submodule(name)).__name__ for name in found}
    assert kinds == {"ExplicitAttention"} and any(vlm.in_decoder(name) for name in found)
    timm = build("siglip_clean")
    found = find_attention(timm, lambda: run_once(timm, QuantScheme()))
    assert any("attn_pool" in name for name in found)


def test_a_model_that_was_saved_and_one_that_was_copied_give_the_same_bits(tmp_path):
    vlm = build("vit_clean")
    made = quantize(vlm, "quarot", INT8, make_batches(vlm))
    save_quantized(vlm, tmp_path, made)
    loaded = build("vit_clean", seed=3)
    assert load_quantized(loaded, tmp_path).scheme == INT8
    copied = twin(vlm)
    for own, other, third in zip(outputs(vlm), outputs(loaded), outputs(copied)):
        assert torch.equal(own, other) and torch.equal(own, third)
    for products in attention_products(copied).values():
        products.q.set_qparams(products.q.scale.detach() * 8)
    assert all(torch.equal(x, y) for x, y in zip(outputs(vlm), outputs(loaded)))
    assert not torch.equal(outputs(copied)[0], outputs(vlm)[0])


def test_nothing_stays_behind_when_an_attention_fails():
    vlm = build("vit_clean")
    quantize(vlm, "minmax", INT8, make_batches(vlm))
    attention = vlm.model.visual.transformer.resblocks[0].attn
    with pytest.raises(RuntimeError):
        attention(torch.zeros(1, 5, 96), torch.zeros(1, 5, 95), torch.zeros(1, 5, 96))
    q = draw(1, 2, 3, 4)
    expected = (q @ q.mT / 2).softmax(-1) @ q
    torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), expected)
    with full_precision(vlm):
        torch.testing.assert_close(outputs(vlm), outputs(build("vit_clean")), rtol=1e-4, atol=1e-5)


def test_gradients_reach_what_comes_before():
    vlm = build("vit_clean")
    quantize(vlm, "lsq_contrastive", INT8, make_batches(vlm))
    vlm.encode_image(make_batches(vlm)[0]["image"]).sum().backward()
    for name in ("q_proj", "k_proj", "v_proj"):
        gradient = getattr(vlm.model.visual.transformer.resblocks[1].attn, name).weight.grad
        assert gradient is not None and gradient.abs().max() > 0


def test_dynamic_rows_need_no_calibration_and_controls_refuse():
    vlm = build("vit_clean")
    scheme = QuantScheme(attention="int8", act_dynamic=True, act_granularity="per_token")
    report = quantize(vlm, "minmax", scheme, make_batches(vlm)).coverage
    assert report.mac_share(("vision",)) == 1
    with pytest.raises(VLMQError, match="set attention to float"):
        quantize(build("vit_clean"), "matched_noise", QuantScheme(attention="int8"), make_batches(vlm))
    with pytest.raises(VLMQError, match="unknown attention 'int4'"):
        QuantScheme(attention="int4")


def test_share_of_products_in_a_published_tower():
    torch.manual_seed(0)
    vlm = load_vlm("ViT-B-16", "none")
    rows = [row for row in measure_coverage(vlm).rows if row.tower == "vision"]
    share = sum(r.macs for r in rows if r.layer_type == "activation_product") / sum(r.macs for r in rows)
    assert share == pytest.approx(2 * 12 * 197**2 * 768 / sum(r.macs for r in rows)) and 0.03 < share < 0.05
    assert not attention_products(copy.copy(vlm))
