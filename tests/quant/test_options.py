"""Options of methods: from names, texts and command lines into objects, identities and checkpoints."""

import re
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from cases.quant import SEEDS, build, make_batches, outlier_layer, second_moment, squared_output_error
from torch import nn

from lightning_vlmq.core.configs import find_config
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.identity import digest
from lightning_vlmq.experiment import VLMQCLI
from lightning_vlmq.quant import (
    METHODS,
    Quantization,
    QuantLinear,
    QuantScheme,
    find_method,
    load_quantized,
    quantize,
    quantized_layers,
    save_quantized,
)
from lightning_vlmq.quant.ptq.awq import search_clip
from lightning_vlmq.quant.ptq.gptq import GPTQ
from lightning_vlmq.quant.ptq.smoothquant import SmoothQuant
from lightning_vlmq.quant.qat.lsq import LSQ

SIXTEEN = [
    "minmax",
    "percentile",
    "mse",
    "smoothquant",
    "awq",
    "gptq",
    "hqq",
    "quarot",
    "ste_contrastive",
    "ste_feature",
    "lsq_contrastive",
    "lsq_feature",
    "lsqplus_contrastive",
    "lsqplus_feature",
    "rot_lsq_contrastive",
    "rot_lsq_feature",
]


def test_the_names_of_the_study_are_methods_with_default_options():
    for name in SIXTEEN:
        method = METHODS[name]
        assert (method.name, method.options, str(method)) == (name, {}, name)
        assert find_method(name) == method and hash(method) == hash(find_method(name))


def test_a_text_and_a_table_say_the_same():
    by_text = Quantization(method="smoothquant(alpha=0.8)")
    by_table = Quantization(method="smoothquant", options={"alpha": 0.8})
    assert by_text == by_table and by_text.chosen() == SmoothQuant(alpha=0.8)
    assert by_text.variant == "alpha=0.8" and str(by_text.chosen()) == "smoothquant(alpha=0.8)"
    assert digest(by_text) == digest(by_table) != digest(Quantization(method="smoothquant"))
    assert digest(Quantization(method="smoothquant(alpha=0.5)")) == digest(Quantization(method="smoothquant"))


def test_an_option_may_make_it_another_name():
    assert Quantization(method="lsq_contrastive(distillation='feature')").method == "lsq_feature"
    assert LSQ(distillation="feature", feature_weight=10).options == {"feature_weight": 10}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_option_is_part_of_the_identity(name: str):
    method = METHODS[name]
    for option in fields(method):
        value = getattr(method, option.name)
        kind = type(value)
        tried = (
            {bool: [not value], int: [value + 1], float: [value * 0.9, value * 1.1]}
            if not isinstance(value, str)
            else {}
        )
        for other in tried.get(kind, []):
            try:
                changed = find_method(name, {option.name: other})
            except VLMQError:
                continue
            assert digest(changed) != digest(method) and changed.options == {option.name: other}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("smoothquant(alfa=0.8)", "did you mean alpha"),
        ("smoothquant(alpha=2)", "0 to 1"),
        ("smoothquant(alpha='high')", "takes a number"),
        ("gptq(act_order=1)", "true or false"),
        ("gptq(grid='log')", "unknown value of option grid"),
        ("hqq(iterations=2.5)", "a whole number"),
        ("minmax(a=1)", "has no options"),
        ("lsq_contrastive(start='zero')", "unknown value of option start"),
        ("gptq(", "cannot read the method"),
        ("gptq(0.1)", "cannot read the method"),
        ("gptk", "did you mean"),
    ],
)
def test_what_an_option_does_not_take_is_said_in_a_line(text: str, said: str):
    with pytest.raises(VLMQError, match=said) as error:
        Quantization(method=text)
    assert "\n" not in str(error.value)


def test_full_precision_has_no_options():
    with pytest.raises(VLMQError, match="fp32 has none"):
        Quantization(options={"alpha": 1})


def test_checkpoints_hold_every_option_and_training_uses_the_object(tmp_path: Path):
    vlm = build("vit_clean")
    method = LSQ(start="minmax", feature_weight=7, distillation="feature")
    made = quantize(vlm, method, QuantScheme(4, 8), make_batches(vlm))
    assert made.method is method
    save_quantized(vlm, tmp_path, made)
    loaded = load_quantized(build("vit_clean", seed=9), tmp_path)
    assert loaded.method == method and loaded.method.options == {"start": "minmax", "feature_weight": 7.0}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped"])
def test_clip_search_of_awq_lowers_the_output_error(kind: str, granularity: str, seed: int):
    layer, x = outlier_layer(kind, QuantScheme(3, 16, granularity, group_size=6), seed)
    with torch.no_grad():
        METHODS["minmax"].fit_weight(layer)
        plain = squared_output_error(layer, x, layer.effective_weight(), layer.weight)
        layer.weight_fake_quant.set_range(*search_clip(layer, layer.weight, second_moment(layer, x)))
        clipped = squared_output_error(layer, x, layer.effective_weight(), layer.weight)
    # a group is judged by its own inputs alone, whose errors add up only on average
    assert clipped <= plain * (1.1 if granularity == "per_group" else 1 + 1e-4)


def test_layers_that_share_their_input_share_one_scale():
    vlm = build("vit_clean")
    batches = make_batches(vlm)
    for name in ("smoothquant", "awq"):
        for joint in (True, False):
            own = build("vit_clean")
            quantize(own, find_method(name, {"joint": joint}), QuantScheme(4, 8), batches)
            layers = quantized_layers(own)
            prefix = "model.visual.transformer.resblocks.0.attn."
            q, k, v = (layers[f"{prefix}{part}_proj"].input_transform.factor for part in "qkv")
            assert (torch.equal(q, k) and torch.equal(k, v)) == joint


@pytest.mark.parametrize("seed", SEEDS)
def test_act_order_is_gptq_on_permuted_columns(seed: int):
    layer, x = outlier_layer("linear", QuantScheme(4, 16), seed)
    METHODS["minmax"].fit_weight(layer)
    order = x.square().mean(0).argsort(descending=True, stable=True)
    permuted = QuantLinear(nn.Linear(48, 24), QuantScheme(4, 16)).eval()
    with torch.no_grad():
        permuted.weight.copy_(layer.weight[:, order])
        METHODS["minmax"].fit_weight(permuted)
        ours = GPTQ(act_order=True).round_columns(layer, second_moment(layer, x))
        expected = GPTQ().round_columns(permuted, second_moment(permuted, x[:, order]))
    assert (ours[:, order] - expected).abs().gt(1e-5).double().mean() < 0.02  # rounding points aside


@pytest.mark.parametrize("granularity", ["per_channel", "per_group", "per_tensor"])
@pytest.mark.parametrize("options", [{"act_order": True}, {"grid": "mse"}, {"act_order": True, "grid": "mse"}])
def test_gptq_stays_on_its_grid_and_below_round_to_nearest(options: dict, granularity: str):
    layer, x = outlier_layer("linear", QuantScheme(3, 16, granularity, group_size=6))
    method = GPTQ(**options)
    METHODS[method.grid].fit_weight(layer)
    with torch.no_grad():
        plain = squared_output_error(layer, x, layer.effective_weight(), layer.weight)
        rounded = method.round_columns(layer, second_moment(layer, x))
        assert squared_output_error(layer, x, rounded, layer.weight) < plain
        layer.set_weight(rounded)
        torch.testing.assert_close(layer.effective_weight(), rounded, rtol=1e-5, atol=1e-6)


def test_rotated_weights_rounded_by_gptq_lose_less_than_to_nearest():
    errors = {}
    for weights in ("rtn", "gptq"):
        vlm = build("vit_clean")
        batches = make_batches(vlm, (8,))
        with torch.no_grad():
            reference = vlm.encode_image(batches[0]["image"])
            quantize(vlm, f"quarot(weights={weights!r})", QuantScheme(3, 16), batches)
            errors[weights] = (vlm.encode_image(batches[0]["image"]) - reference).square().sum().item()
    assert errors["gptq"] < errors["rtn"]


def test_a_clip_ratio_shortens_activation_ranges_and_percentile_may_leave_weights():
    vlm, other = build("vit_clean"), build("vit_clean")
    batches = make_batches(vlm)
    quantize(vlm, "quarot(clip_ratio=0.9)", QuantScheme(), batches)
    quantize(other, "quarot", QuantScheme(), batches)
    for one, two in zip(quantized_layers(vlm).values(), quantized_layers(other).values()):
        torch.testing.assert_close(one.act_fake_quant.scale, 0.9 * two.act_fake_quant.scale)
    layer, _ = outlier_layer("linear", QuantScheme(4, 8))
    find_method("percentile(clip_weights=False, share=0.6)").fit_weight(layer)
    scale = layer.weight_fake_quant.scale.clone()
    METHODS["minmax"].fit_weight(layer)
    assert torch.equal(scale, layer.weight_fake_quant.scale)


def test_no_gradient_scale_leaves_the_gradient_as_the_formula_has_it():
    gradients = []
    for kind in ("paper", "none"):
        vlm = build("vit_clean")
        quantize(vlm, f"lsq_contrastive(gradient_scale={kind!r})", QuantScheme(4, 8), make_batches(vlm))
        layer = quantized_layers(vlm)["model.visual.transformer.resblocks.0.mlp.c_fc"]
        (layer.effective_weight() ** 2).sum().backward()
        gradients.append(layer.weight_fake_quant.scale.grad)
    torch.testing.assert_close(gradients[0] * (layer.weight.shape[1] * 7) ** 0.5, gradients[1], rtol=1e-4, atol=1e-4)


PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
SAID = [shlex.split(words) for words in re.findall(r"`(--model\.quant\.(?:options\.|method ')[^`]*)`", PAGE)]


@pytest.mark.parametrize(
    "first", [["--model.quant.method=smoothquant"], ["--config", str(find_config("quant/smoothquant"))]]
)
def test_the_page_says_how_options_are_set(first):
    """By name, after a method or its file, or in brackets: it is the same model."""
    assert len(SAID) == 2
    for words in SAID:
        words = ["--config", str(find_config("eval")), *first, *words, "--trainer.logger=false"]
        quant = VLMQCLI(args=words, run=False).model.quant
        assert quant.chosen() == SmoothQuant(alpha=0.8) and quant.options == {"alpha": 0.8}
        assert digest(quant) == digest(replace(quant, method="smoothquant(alpha=0.8)", options={}))
        assert digest(quant) != digest(replace(quant, options={}))
