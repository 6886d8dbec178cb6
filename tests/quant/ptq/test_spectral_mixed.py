from dataclasses import replace

import numpy as np
import pytest
import torch
from cases.quant import build, make_batches, shallow, twin

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.lowbit.packing import pack
from lightning_vlmq.quant import (
    METHODS,
    LayerRule,
    QuantScheme,
    find_method,
    load_quantized,
    quantize,
    quantized_layers,
    save_quantized,
)
from lightning_vlmq.quant.ptq.spectral_mixed import WIDTHS, SpectralMixed
from lightning_vlmq.quant.sensitivity import free_layers

KINDS = ("spectral", "sqnr", "hawq_v2")
SCHEME = QuantScheme(4, 8, scope="vision_text")


def weight_bits(vlm):
    return {name: layer.weight_fake_quant.bits for name, layer in quantized_layers(vlm).items()}


@pytest.mark.parametrize(("name", "kind"), [*(("vit_clean", kind) for kind in KINDS), ("convnext_clean", "spectral")])
def test_the_size_is_uniform_s_and_the_cost_no_more(name, kind):
    vlm = shallow(build(name))
    batches = make_batches(vlm)
    method = SpectralMixed(sensitivity=kind, probes=1)
    with torch.no_grad():
        before = vlm.encode_image(batches[0]["image"])
    planned = method.plan(vlm, SCHEME, batches)
    with torch.no_grad():
        assert torch.equal(vlm.encode_image(batches[0]["image"]), before)  # planning leaves the model as it is
    METHODS["minmax"].prepare(vlm, planned, batches)
    bits = weight_bits(vlm)
    sizes = np.array([layer.weight.numel() for layer in quantized_layers(vlm).values()])
    uniform = 4 * sizes.sum()
    assert 0.995 * uniform <= (sizes * list(bits.values())).sum() <= uniform
    assert len(set(bits.values())) > 1 and set(bits.values()) <= set(WIDTHS)
    assert method.plan(shallow(build(name)), planned, batches) == planned  # nothing is left to share out
    costs = method.costs(shallow(build(name)), SCHEME, batches)
    assert sum(costs[n][b] for n, b in bits.items()) <= sum(own[4] for own in costs.values())


def test_it_keeps_the_ranks_that_it_is_asked_to_better_than_uniform_bits():
    """The objective is of layers alone; the whole model has to follow."""
    vlm = shallow(build("vit_clean"))
    batches = make_batches(vlm, (20,))
    images = torch.cat([b["image"] for b in batches])
    with torch.no_grad():
        z = vlm.encode_image(images).double()
    v = torch.linalg.svd(z, full_matrices=False).Vh.T
    scheme = QuantScheme(3, 16)
    noise = {}
    for method in ("minmax", "spectral_mixed(end_rank=8)"):
        own = twin(vlm)
        quantize(own, method, scheme, batches)
        with torch.no_grad():
            d = own.encode_image(images).double() - z
        noise[method] = float(((d @ v).square().sum(0) / (z @ v).square().sum(0))[:8].sum())
    assert noise["spectral_mixed(end_rank=8)"] < noise["minmax"]


def test_files_have_one_size_and_come_back(tmp_path):
    """Weights as conversion packs them; and the checkpoint's rules rebuild the very model."""
    sizes = {}
    for method in ("minmax", "spectral_mixed"):
        vlm = shallow(build("vit_clean"))
        batches = make_batches(vlm)
        made = quantize(vlm, method, SCHEME, batches)
        folder = save_quantized(vlm, tmp_path / method, made)
        fresh = shallow(build("vit_clean", seed=3))
        assert load_quantized(fresh, folder).scheme == made.scheme
        assert weight_bits(fresh) == weight_bits(vlm)
        with torch.no_grad():
            assert torch.equal(fresh.encode_image(batches[0]["image"]), vlm.encode_image(batches[0]["image"]))
        levels = [
            (q.weight_fake_quant.integers(q.weight)[0], q.weight_fake_quant.bits)
            for q in quantized_layers(vlm).values()
        ]
        sizes[method] = sum(v.numel() if bits == 8 else pack(v, bits).numel() for v, bits in levels)
    assert sizes["spectral_mixed"] == pytest.approx(sizes["minmax"], rel=0.005)


def test_what_rules_fix_stays_and_rounding_is_the_method_asked_for():
    vlm = shallow(build("vit_clean"))
    batches = make_batches(vlm)
    scheme = replace(SCHEME, first_last="w8a8", overrides=[LayerRule("*.c_fc", weight_bits=5, act_bits=6)])
    made = quantize(vlm, "spectral_mixed(rounding='gptq')", scheme, batches)
    layers = quantized_layers(vlm)
    assert made.scheme.overrides[0] == scheme.overrides[0] and len(made.scheme.overrides) > 3
    for name, layer in layers.items():
        if name.endswith("c_fc"):
            assert (layer.weight_fake_quant.bits, layer.act_fake_quant.bits) == (5, 6)
    assert layers["model.visual.conv1"].weight_fake_quant.bits == 8
    plain = shallow(build("vit_clean"))
    find_method("gptq").prepare(plain, made.scheme, batches)
    for name, layer in quantized_layers(plain).items():
        assert torch.equal(layer.weight, layers[name].weight)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(VLMQError, match="ranks 8 to 8 are none"):
        SpectralMixed(first_rank=8, end_rank=8)
    vlm = shallow(build("vit_clean"))
    with pytest.raises(VLMQError, match="no size to share out"):
        quantize(vlm, "spectral_mixed", QuantScheme(16, 8), make_batches(vlm))


@pytest.mark.parametrize("name", ["siglip_clean", "coca_clean", "align_clean"])
def test_every_family_is_measured_once_and_covered(name, monkeypatch):
    """All widths cost the same but one layer's: it gets the most, and a caption decoder keeps the width asked for."""
    vlm = shallow(build(name))
    batches = make_batches(vlm, (2,))
    first = next(iter(quantized_layers(METHODS["minmax"].prepare(twin(vlm), SCHEME, batches))))

    def made_up(self, model, scheme, calibration):
        return {
            n: dict.fromkeys(WIDTHS, 0.0) | ({2: 1.0, 3: 1.0, 4: 1.0} if n == first else {})
            for n in free_layers(model, scheme)
        }

    monkeypatch.setattr(SpectralMixed, "costs", made_up)
    report = quantize(vlm, "spectral_mixed", SCHEME, batches).coverage
    bits = weight_bits(vlm)
    assert report.weight_share() == 1 and bits[first] >= 5
    assert {bits[n] for n in bits if vlm.in_decoder(n)} == ({4} if vlm.has_decoder else set())


def test_damage_is_told_by_its_place():
    vlm = shallow(build("vit_clean"))
    batches = make_batches(vlm)
    with torch.no_grad():
        vlm.model.visual.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(VLMQError, match="conv1"):
        quantize(vlm, "spectral_mixed", SCHEME, batches)
    with pytest.raises(VLMQError, match="has no 'tokens'"):
        quantize(shallow(build("vit_clean")), "spectral_mixed", SCHEME, [{"image": b["image"]} for b in batches])
