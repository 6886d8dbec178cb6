import copy
import math

import pytest
import torch
from cases.quant import INTEGER_METHODS, build, make_batches
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import VLM
from lightning_vlmq.quant import QuantScheme, quantize, quantized_layers


def similarity(vlm: VLM, scheme: QuantScheme, method: str = "minmax") -> float:
    batches = make_batches(vlm)
    quantized = copy.deepcopy(vlm)
    quantize(quantized, method, scheme, batches)
    with torch.no_grad():
        return (
            (quantized.encode_image(batches[0]["image"]) * vlm.encode_image(batches[0]["image"])).sum(-1).min().item()
        )


@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme(),
        QuantScheme(weight_granularity="per_tensor"),
        QuantScheme(weight_granularity="per_group", group_size=4, weight_symmetric=False),
        QuantScheme(act_dynamic=True, act_granularity="per_token"),
        QuantScheme(act_dynamic=True, act_symmetric=True),
        QuantScheme(weight_bits=16),
        QuantScheme(act_bits=16),
    ],
)
def test_eight_bits_barely_move_the_features(vlm: VLM, scheme: QuantScheme):
    assert similarity(vlm, scheme) > 0.99


def test_fewer_bits_move_them_more(vlm: VLM):
    by_bits = [similarity(vlm, QuantScheme(weight_bits=bits, act_bits=16)) for bits in (8, 6, 4, 2)]
    assert by_bits == sorted(by_bits, reverse=True) and by_bits[0] > 0.999 > by_bits[-1]


def test_static_ranges_are_the_calibration_extremes_of_full_precision_inputs(vit: VLM):
    batches = make_batches(vit, (3, 5))
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=n: seen.setdefault(name, []).append(args[0].clone()))
        for n, m in vit.named_modules()
        if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
    ]
    with torch.no_grad():
        for batch in batches:
            vit.encode_image(batch["image"])
    for hook in hooks:
        hook.remove()
    quantize(vit, "minmax", QuantScheme(), batches)
    for name, layer in quantized_layers(vit).items():
        low, high = min(x.min().item() for x in seen[name]), max(x.max().item() for x in seen[name])
        step = (max(high, 0) - min(low, 0)) / 255
        assert layer.act_fake_quant.scale.item() == pytest.approx(step, rel=1e-5)
        assert layer.act_fake_quant.zero_point.item() == pytest.approx(-min(low, 0) / step, abs=0.51)


def test_same_calibration_same_bits_and_batching_does_not_matter(vit: VLM):
    whole = make_batches(vit, (6,))
    split = [{k: v[i : i + 2] for k, v in whole[0].items()} for i in range(0, 6, 2)]
    models = [copy.deepcopy(vit) for _ in range(3)]
    for model, batches in zip(models, (whole, whole, iter(split))):
        quantize(model, "minmax", QuantScheme(scope="vision_text"), batches)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[2][key], rtol=1e-5, atol=1e-5)


def test_one_sample_is_enough(vlm: VLM):
    quantize(vlm, "minmax", QuantScheme(scope="vision_text"), make_batches(vlm, (1,)))
    with torch.no_grad():
        assert torch.isfinite(vlm.encode_image(make_batches(vlm)[0]["image"])).all()


def test_constant_images(vlm: VLM):
    quantize(vlm, "minmax", QuantScheme(), [{"image": torch.full((2, 3, 32, 32), 7, dtype=torch.uint8)}])
    with torch.no_grad():
        assert torch.isfinite(vlm.encode_image(torch.full((2, 3, 32, 32), 7, dtype=torch.uint8))).all()


def test_training_mode_is_left_as_it_was(vit: VLM):
    quantize(vit.train(), "minmax", QuantScheme(), make_batches(vit))
    assert vit.training and all(layer.training for layer in quantized_layers(vit).values())


def test_bad_calibration_data_are_named(vit: VLM):
    with pytest.raises(VLMQError, match="no batch"):
        quantize(copy.deepcopy(vit), "minmax", QuantScheme(), [])
    with pytest.raises(VLMQError, match="no 'tokens'"):
        images_only = [{"image": make_batches(vit)[0]["image"]}]
        quantize(copy.deepcopy(vit), "minmax", QuantScheme(scope="vision_text"), images_only)
    with pytest.raises(VLMQError, match=r"conv1' got a non-finite input"):
        quantize(copy.deepcopy(vit), "minmax", QuantScheme(), [{"image": torch.full((1, 3, 32, 32), math.nan)}])
    with pytest.raises(VLMQError, match="did you mean minmax"):
        quantize(vit, "minmx", QuantScheme(), make_batches(vit))


def test_a_layer_off_the_encoders_path_is_named(vit: VLM):
    vit.model.visual.unused = torch.nn.Linear(4, 4)
    with pytest.raises(VLMQError, match=r"visual\.unused' got no input"):
        quantize(vit, "minmax", QuantScheme(), make_batches(vit))


@pytest.mark.parametrize("method", [*INTEGER_METHODS, "lowrank_compensation"])
@pytest.mark.parametrize("name", ["vit_clean", "convnext_clean"])
def test_every_method_quantizes_both_towers_at_w4a8(name: str, method: str):
    vlm = build(name)
    batches = make_batches(vlm)
    with torch.no_grad():
        reference = vlm.encode_image(batches[0]["image"])
    report = quantize(vlm, method, QuantScheme(weight_bits=4, scope="vision_text"), batches).coverage
    assert report.weight_share() == 1
    with torch.no_grad():
        image, text = vlm.encode_image(batches[0]["image"]), vlm.encode_text(batches[0]["tokens"])
    assert torch.isfinite(image).all() and torch.isfinite(text).all()
    assert not torch.equal(image, reference) and (image * reference).sum(-1).mean() > 0.7
