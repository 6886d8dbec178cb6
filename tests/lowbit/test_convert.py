"""Converted models against the fake-quantized ones, on real images; what cannot be converted."""

import copy

import pytest
import torch
from cases.lowbit import PER_TOKEN, W4A8, W8A8
from cases.quant import build, make_batches

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.lowbit.convert import Conversion, convert_layers
from lightning_vlmq.lowbit.pipeline import compare, id_images
from lightning_vlmq.models import VLM, load_vlm
from lightning_vlmq.quant import (
    LayerRule,
    QuantScheme,
    quantize,
    quantized_layers,
)


@pytest.fixture(scope="module")
def data() -> EmbeddedData:
    module = EmbeddedData(datasets=("concepts",), n_concepts=64, batch_size=128, train_batch_size=32)
    module.setup()
    return module


def calibration(vlm: VLM, data: EmbeddedData) -> list[dict[str, torch.Tensor]]:
    batch = data.calibration_batches()[0]
    return [{"image": batch["image"], "tokens": vlm.tokenize(batch["caption"])}]


def quantized(name: str, method: str, scheme: QuantScheme, data: EmbeddedData) -> VLM:
    vlm = load_vlm(name)
    quantize(vlm, method, scheme, calibration(vlm, data))
    return vlm.requires_grad_(False)


def agrees(first: VLM, second: VLM, data: EmbeddedData, top1: float = 0.99) -> bool:
    found = compare(first, second, id_images(data), data.class_names, data.templates)
    assert found.images == 128 and found.lowest_cosine <= found.cosine <= 1 + 1e-9
    return found.cosine >= 0.999 and found.top1 >= top1


METHODS = [
    "minmax",
    "gptq",
    "hqq",
    "smoothquant",
    "awq",
    "quarot",
    "lsq_contrastive",
    "lsqplus_feature",
    "rot_lsq_feature",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit_clean", "convnext_clean"])
def test_a_converted_model_agrees_with_the_fake_quantized_one(name: str, method: str, data: EmbeddedData):
    scheme = W4A8 if name == "vit_clean" else W8A8
    vlm = quantized(name, method, scheme, data)
    converted = copy.deepcopy(vlm)
    layers = convert_layers(converted, Conversion(), scheme)
    assert set(layers) == set(quantized_layers(vlm))
    assert agrees(vlm, converted, data)


STEM = LayerRule("*.visual.conv1.0", weight_granularity="per_channel")
"""The first convolution has 27 weights per output, which eight does not divide."""


@pytest.mark.parametrize("kernels", ["torchao", "own"])
@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(4, 16, "per_group", 8, scope="vision_text", overrides=[STEM]),
        QuantScheme(4, 8, scope="vision_text", **PER_TOKEN),
        QuantScheme(5, 5, scope="vision_text"),
    ],
)
def test_schemes_agree_under_both_kernels(scheme: QuantScheme, kernels: str, data: EmbeddedData):
    vlm = quantized("vit_clean", "minmax", scheme, data)
    converted = copy.deepcopy(vlm)
    convert_layers(converted, Conversion(kernels=kernels), scheme)
    assert agrees(vlm, converted, data)


def test_input_grids_can_be_exchanged(data: EmbeddedData):
    vlm = quantized("vit_clean", "minmax", W8A8, data)
    inputs = {}
    for activations in ("dynamic", "none", "keep"):
        converted = copy.deepcopy(vlm)
        layers = convert_layers(converted, Conversion(activations), W8A8)
        inputs[activations] = {layer["inputs"] for layer in layers.values()}
        assert agrees(vlm, converted, data, top1=0.99 if activations == "keep" else 0.97)  # other grids round otherwise
    assert inputs == {"dynamic": {"dynamic"}, "none": {"none"}, "keep": {"static"}}

    scheme = QuantScheme(8, 16, scope="vision_text")
    weights_only = quantized("vit_clean", "minmax", scheme, data)
    converted = copy.deepcopy(weights_only)
    layers = convert_layers(converted, Conversion("static"), scheme, calibration(vlm, data))
    assert {(layer["inputs"], layer["act_bits"]) for layer in layers.values()} == {("static", 8)}
    assert agrees(vlm, converted, data)


def test_what_cannot_be_converted_is_named():
    vlm = build("vit_clean")
    with pytest.raises(VLMQError, match="no quantized layer"):
        convert_layers(vlm, Conversion(), W8A8)
    quantize(vlm, "minmax", W8A8, make_batches(vlm))
    with pytest.raises(VLMQError, match="float8 needs a GPU"):
        convert_layers(vlm, Conversion(float8=True), W8A8)
    name, layer = next(iter(quantized_layers(vlm).items()))
    layer.act_fake_quant.calibrated = False
    with pytest.raises(VLMQError, match=f"{name}.* no range"):
        convert_layers(vlm, Conversion(), W8A8)


def test_unknown_words_are_refused():
    with pytest.raises(VLMQError, match="unknown activations 'dynamc'; did you mean dynamic"):
        Conversion("dynamc")
    with pytest.raises(VLMQError, match="unknown kernels"):
        Conversion(kernels="mine")
