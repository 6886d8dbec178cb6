"""Mixed precision: rules by layer name, by tower, for first and last layers."""

import copy
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.quant import INTEGER_METHODS, build, make_batches
from torch import nn

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
    swap_layers,
)
from lightning_vlmq.quant.rules import edge_layers

PTQ = [name for name in INTEGER_METHODS if not METHODS[name].needs_training]
QAT = sorted(name for name in METHODS if METHODS[name].needs_training)
MIXED = QuantScheme(
    weight_bits=4,
    scope="vision_text",
    first_last="skip",
    overrides=[
        LayerRule("*.mlp.*", weight_bits=8, weight_granularity="per_tensor"),
        LayerRule("*.mlp.*", act_bits=16),
        LayerRule(tower="text", weight_bits=16),
        LayerRule("*.out_proj", act_bits=6, act_symmetric=True),
    ],
)


def bits_of(vlm: VLM) -> dict[str, tuple[int, int]]:
    return {n: (la.weight_fake_quant.bits, la.act_fake_quant.bits) for n, la in quantized_layers(vlm).items()}


def test_later_rules_win_field_by_field(vit: VLM):
    rules = [
        LayerRule("*.mlp.*", weight_bits=8, act_bits=6),
        LayerRule("*.resblocks.[01].mlp.c_?c", weight_bits=3),
        LayerRule("*.k_proj", skip=True),
        LayerRule("*.resblocks.2.*", skip=False, weight_granularity="per_tensor"),
    ]
    vit_names = [n for n, m in vit.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and "visual" in n]
    swap_layers(vit, QuantScheme(weight_bits=4, overrides=rules))
    found = bits_of(vit)
    for name in vit_names:
        block = name.split("resblocks.")[-1][0]
        if name.endswith("k_proj") and block != "2":
            assert name not in found and isinstance(vit.get_submodule(name), nn.Linear)
            continue
        expected = (4, 8)
        if ".mlp." in name:
            expected = (3 if block in "01" and name.endswith("c_fc") else 8, 6)
        assert found[name] == expected, name
        steps = vit.get_submodule(name).weight_fake_quant.scale.numel()
        assert (steps == 1) == (".resblocks.2." in name), name


def test_towers_get_schemes_of_their_own(vlm: VLM):
    swap_layers(vlm, QuantScheme(4, 8, scope="vision_text", overrides=[LayerRule(tower="text", weight_bits=6)]))
    assert {(vlm.tower_of(name), *bits) for name, bits in bits_of(vlm).items()} == {("vision", 4, 8), ("text", 6, 8)}


EDGES = {
    "vit_clean": {"visual.conv1", "visual.proj", "text_projection"}
    | {f"transformer.resblocks.0.attn.{p}_proj" for p in "qkv"},
    "convnext_clean": {"visual.trunk.stem.0", "visual.head.proj", "text_projection"}
    | {f"transformer.resblocks.0.attn.{p}_proj" for p in "qkv"},
}


@pytest.mark.parametrize("name", sorted(EDGES))
def test_first_and_last_layers_are_the_stems_and_the_projections(name: str):
    vlm = build(name).train()
    edges = edge_layers(vlm, ("vision", "text"))
    names = {n.removeprefix("model.") for n, m in vlm.named_modules() if m in edges}
    assert names == EDGES[name]
    assert vlm.training
    assert edge_layers(vlm, ("vision",)) < edges


def test_first_last_rule(vit: VLM):
    edges = {n for n, m in vit.named_modules() if m in edge_layers(vit, ("vision",))}
    models = {kind: copy.deepcopy(vit) for kind in ("same", "w8a8", "skip")}
    for kind, model in models.items():
        swap_layers(model, QuantScheme(4, 6, first_last=kind))
    found = {kind: bits_of(model) for kind, model in models.items()}
    inner = set(found["same"]) - edges
    assert edges < set(found["same"]) and set(found["skip"]) == inner
    assert {found["same"][n] for n in edges} == {(4, 6)} and {found["w8a8"][n] for n in edges} == {(8, 8)}
    assert all({found[kind][n] for n in inner} == {(4, 6)} for kind in found)
    # a side that is left at 16 bits stays there, and overrides come after
    rule = LayerRule("*.visual.proj", weight_bits=3)
    swap_layers(vit, QuantScheme(4, 16, first_last="w8a8", overrides=[rule]))
    assert bits_of(vit)["model.visual.conv1"] == (8, 16) and bits_of(vit)["model.visual.proj"] == (3, 16)


@pytest.mark.parametrize("pattern", ["*.mpl.c_fc", "model.visual.transfomer.resblocks.0.mlp.c_fc", "mlp.c_fc"])
def test_a_rule_that_matches_nothing_names_the_nearest_layers(vit: VLM, pattern: str):
    with pytest.raises(VLMQError, match=r"matches no layer of scope 'vision'; nearest: [^,]*mlp\.c_fc") as error:
        swap_layers(vit, QuantScheme(overrides=[LayerRule("*", act_bits=6), LayerRule(pattern, weight_bits=4)]))
    assert f"'{pattern} weight_bits=4'" in str(error.value) and len(str(error.value)) < 400
    assert not quantized_layers(vit)


def test_rules_for_a_tower_out_of_scope_match_nothing(vit: VLM):
    for rule in (LayerRule(tower="text", weight_bits=4), LayerRule("model.text_projection", weight_bits=4)):
        with pytest.raises(VLMQError, match="matches no layer of scope 'vision'"):
            swap_layers(vit, QuantScheme(overrides=[rule]))


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        ({"weight_bits": 1}, "weight_bits must be 2 to 8"),
        ({"act_bits": "8"}, "act_bits must be 2 to 8"),
        ({"weight_granularity": "per_chanel"}, "did you mean .*per_channel"),
        ({"tower": "visoin", "skip": True}, "did you mean vision"),
        ({"group_size": 1}, "group_size"),
        ({"pattern": "*.mlp.*"}, r"override '\*\.mlp\.\*' changes nothing"),
    ],
)
def test_rules_that_say_nothing_or_nonsense(rule: dict[str, Any], word: str):
    with pytest.raises(VLMQError, match=word):
        LayerRule(**rule)
    with pytest.raises(VLMQError, match=word):
        QuantScheme(overrides=[rule])  # as JSON has it
    with pytest.raises(VLMQError, match="did you mean skip"):
        QuantScheme(first_last="skp")


def test_contradictions_in_a_layer_name_it(vit: VLM):
    rules = [LayerRule("*.visual.proj", act_granularity="per_token")]
    with pytest.raises(VLMQError, match=r"layer 'model\.visual\.proj': act_granularity per_token"):
        swap_layers(copy.deepcopy(vit), QuantScheme(overrides=rules))
    rules = [LayerRule("*.visual.proj", weight_granularity="per_group", group_size=36)]
    with pytest.raises(VLMQError, match=r"layer 'model\.visual\.proj': group_size 36 does not divide the 96"):
        swap_layers(copy.deepcopy(vit), QuantScheme(overrides=rules))
    with pytest.raises(VLMQError, match="nothing would be quantized"):
        swap_layers(copy.deepcopy(vit), QuantScheme(overrides=[LayerRule(skip=True)]))
    with pytest.raises(VLMQError, match=r"layer 'model\.visual\.conv1' has none with act_dynamic"):
        quantize(
            vit, "lsq_contrastive", QuantScheme(overrides=[LayerRule("*.conv1", act_dynamic=True)]), make_batches(vit)
        )


def test_a_rule_alone_can_say_what_is_quantized(vit: VLM):
    scheme = QuantScheme(16, 16, overrides=[LayerRule("*.mlp.*", weight_bits=4)])
    names = swap_layers(vit, scheme)
    assert names and all(".mlp." in name for name in names)


def test_a_layer_in_two_places_is_found_by_either_name(vit: VLM):
    blocks = vit.model.visual.transformer.resblocks
    blocks[1].mlp.c_fc = blocks[0].mlp.c_fc
    swap_layers(vit, QuantScheme(overrides=[LayerRule("*.resblocks.1.mlp.c_fc", weight_bits=3)]))
    assert blocks[0].mlp.c_fc is blocks[1].mlp.c_fc and blocks[0].mlp.c_fc.weight_fake_quant.bits == 3


def test_schemes_hash_and_say_what_is_special():
    twin = QuantScheme(**json.loads(json.dumps(asdict(MIXED))))
    assert twin == MIXED and hash(twin) == hash(MIXED) and len({twin, MIXED, QuantScheme()}) == 2
    assert QuantScheme(4, 6, scope="vision_text").variant == ""
    assert QuantScheme(weight_granularity="per_group", group_size=16).variant == (
        "weight_granularity=per_group, group_size=16"
    )
    assert MIXED.variant == (
        "first_last=skip, *.mlp.* weight_bits=8 weight_granularity=per_tensor, *.mlp.* act_bits=16, "
        "text:* weight_bits=16, *.out_proj act_bits=6 act_symmetric=True"
    )
    variants = [MIXED.variant, twin.variant, QuantScheme(overrides=MIXED.overrides[1:]).variant]
    assert len(set(variants)) == 2


def test_skipped_layers_count_as_not_quantized(vit: VLM):
    scheme = QuantScheme(overrides=[LayerRule("*.resblocks.0.*", skip=True)])
    with pytest.raises(VLMQError, match=r"left out: model\.visual\.transformer\.resblocks\.0\.mlp.*minimum_coverage"):
        quantize(copy.deepcopy(vit), "minmax", scheme, make_batches(vit))
    report = quantize(vit, "minmax", scheme, make_batches(vit), minimum_coverage=0.7).coverage
    inside = sum(size for name, size in report.unquantized.items() if vit.tower_of(name) == "vision")
    assert inside == sum(p.numel() for p in vit.model.visual.transformer.resblocks[0].parameters() if p.ndim > 1)
    rows = [row for row in report.rows if row.tower == "vision"]
    assert (
        sum(row.weights - row.weights_quantized for row in rows) == inside and 0.7 < report.mac_share(("vision",)) < 0.8
    )


@pytest.mark.parametrize("method", [*PTQ, *QAT])
def test_every_method_takes_each_layers_own_bits(method: str, tmp_path: Path):
    """Grids have as many levels as the layer's own bits say, 16-bit sides are untouched, and all survives the disk."""
    vlm = build("vit_clean")
    batches = make_batches(vlm, (6,))
    made = quantize(vlm, method, MIXED, batches, minimum_coverage=0.4)
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_hook(
            lambda module, args, _, name=name: seen.update({name: module.quantized_input(args[0])})
        )
        for name, layer in quantized_layers(vlm).items()
    ]
    with torch.no_grad():
        image, text = vlm.encode_image(batches[0]["image"]), vlm.encode_text(batches[0]["tokens"])
        for hook in hooks:
            hook.remove()
        assert torch.isfinite(image).all() and torch.isfinite(text).all()
        kinds = set()
        for name, layer in quantized_layers(vlm).items():
            weight, act = layer.weight_fake_quant, layer.act_fake_quant
            kinds.add((weight.bits, act.bits))
            rows = layer.effective_weight().reshape(weight.scale.numel(), -1)
            if weight.quantizes:
                assert max(row.unique().numel() for row in rows) <= 2**weight.bits, name
                assert weight.dynamic or torch.isfinite(weight.scale).all()
            else:
                assert torch.equal(layer.effective_weight(), layer.weight) and torch.isnan(weight.scale).all()
                assert not weight.scale.requires_grad
            if act.quantizes:
                assert seen[name].unique().numel() <= 2**act.bits, name
            else:
                assert torch.isnan(act.scale).all() and not act.scale.requires_grad
    # the MLPs of the text tower have both sides at 16 bits, so they are left alone
    assert kinds == {(8, 16), (4, 8), (4, 6), (16, 8), (16, 6)}
    save_quantized(vlm, tmp_path, made)
    fresh = build("vit_clean", seed=9)
    assert load_quantized(fresh, tmp_path).scheme == MIXED
    assert bits_of(fresh) == bits_of(vlm)
    with torch.no_grad():
        assert torch.equal(fresh.encode_image(batches[0]["image"]), image)
        assert torch.equal(fresh.encode_text(batches[0]["tokens"]), text)


@pytest.mark.parametrize("method", [*PTQ, "lsq_contrastive", "lsqplus_contrastive"])
def test_a_rule_for_all_layers_is_the_scheme_that_it_spells(method: str):
    """Bit for bit: nothing of a method may look at the scheme's own bits instead of the layer's."""
    wide = QuantScheme(8, 8, overrides=[LayerRule(weight_bits=4, act_bits=6, weight_symmetric=False)])
    states = []
    for scheme in (wide, QuantScheme(4, 6, weight_symmetric=False)):
        vlm = build("vit_clean")
        quantize(vlm, method, scheme, make_batches(vlm))
        states.append(vlm.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(("method", "bits"), itertools.product([*PTQ, *QAT], [(4, 16), (16, 8)]))
def test_one_sided_schemes(method: str, bits: tuple[int, int]):
    vlm = build("vit_clean")
    batches = make_batches(vlm)
    quantize(vlm, method, QuantScheme(*bits), batches)
    with torch.no_grad():
        assert torch.isfinite(vlm.encode_image(batches[0]["image"])).all()
    for layer in quantized_layers(vlm).values():
        idle = layer.weight_fake_quant if bits[0] == 16 else layer.act_fake_quant
        assert torch.isnan(idle.scale).all() and not idle.scale.requires_grad and idle.offset is None
