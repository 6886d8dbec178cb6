"""Calibration data that tell a method little or nothing: a clear error, or finite weights by its documented damping."""

import math
import re

import pytest
import torch
from cases.quant import INTEGER_METHODS, build, make_batches, shallow, twin
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import VLM, require_finite
from lightning_vlmq.quant import METHODS, QuantLinear, QuantScheme, quantize, quantized_layers
from lightning_vlmq.quant.fake_quant import unused_steps
from lightning_vlmq.quant.observers import SecondMomentObserver, output_error
from lightning_vlmq.quant.ptq.gptq import GPTQ

EVERY = INTEGER_METHODS
BY_INPUTS = ("awq", "gptq", *(name for name in EVERY if METHODS[name].needs_training))
"""Methods whose weights depend on the calibration inputs even where activations are not quantized."""


def dull_inputs(vlm: VLM) -> None:
    """Make inputs of the first blocks' second MLP layers and attention constant, zero, and equal to one another."""
    with torch.no_grad():
        for tower in (vlm.model.visual, vlm.model):
            block = tower.transformer.resblocks[0]
            block.ln_1.weight[:3] = block.ln_1.bias[0] = 0  # channel 0 always zero
            block.ln_1.bias[1:3] = torch.tensor([7.0, -7.0])  # 1 and 2 constant
            block.mlp.c_fc.weight[5] = block.mlp.c_fc.weight[4]  # the second layer's inputs 4 and 5 always equal
            block.mlp.c_fc.bias[5] = block.mlp.c_fc.bias[4]


def grey(vlm: VLM, n: int) -> list[dict[str, Tensor]]:
    """Images of one colour all over, the same every time, with one caption."""
    image = torch.full((n, 3, vlm.image_size, vlm.image_size), 90, dtype=torch.uint8)
    return [{"image": image, "tokens": vlm.tokenize(["a bag"] * n)}]


@pytest.mark.parametrize("bits", [(4, 8), (4, 16)])
@pytest.mark.parametrize("method", EVERY)
def test_constant_zero_and_equal_channels_of_a_single_grey_image(method: str, bits: tuple[int, int]):
    """Hessians of rank one or so, with zeros on the diagonal, and far fewer samples than channels."""
    vlm = build("vit_clean")
    dull_inputs(vlm)
    quantize(vlm, method, QuantScheme(*bits, scope="vision_text"), grey(vlm, 1))
    batch = make_batches(vlm)[0]
    with torch.no_grad():
        for name, layer in quantized_layers(vlm).items():
            assert torch.isfinite(layer.weight).all() and torch.isfinite(layer.effective_weight()).all(), name
        assert torch.isfinite(vlm.encode_image(batch["image"])).all()
        assert torch.isfinite(vlm.encode_text(batch["tokens"])).all()


@pytest.mark.parametrize("method", EVERY)
def test_constant_channels_of_a_convolutional_tower(method: str):
    vlm = build("convnext_clean")
    with torch.no_grad():
        vlm.model.visual.trunk.stages[0].blocks[0].conv_dw.weight[2] = 0  # a channel that is its bias everywhere
    batches = make_batches(vlm)
    for batch in batches:
        batch["image"][:, 1] = 128
    quantize(vlm, method, QuantScheme(4, 8), batches)
    with torch.no_grad():
        assert torch.isfinite(vlm.encode_image(batches[0]["image"])).all()
        assert all(torch.isfinite(layer.effective_weight()).all() for layer in quantized_layers(vlm).values())


@pytest.mark.parametrize("size", [1e-22, 1e-23])
def test_inputs_that_vanish_round_or_are_named(size: float):
    """Their squares lie where float32 has few digits left, so that the Hessian is not positive definite, or none."""
    vlm = build("vit_clean")
    block = vlm.model.visual.transformer.resblocks[0]
    with torch.no_grad():
        block.ln_2.weight *= size
        block.ln_2.bias.zero_()
    if size == 1e-23:
        quantize(vlm, "gptq", QuantScheme(4, 16), make_batches(vlm))
        assert torch.isfinite(block.mlp.c_fc.weight).all()
        return
    with pytest.raises(VLMQError, match=r"GPTQ cannot round '.*c_fc': .* its inputs, .*e-4\d on average") as error:
        quantize(vlm, "gptq", QuantScheme(4, 16), make_batches(vlm))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", EVERY)
def test_a_channel_that_is_not_finite_is_named(method: str, value: float):
    vlm = build("vit_clean")
    image = torch.rand(4, 3, 32, 32)
    image[2, 1] = value
    with pytest.raises(VLMQError, match=r"'model\.visual\.conv1' got a non-finite input while calibrating") as error:
        quantize(vlm, method, QuantScheme(4, 8), [{"image": image}])
    assert "\n" not in str(error.value)
    assert all(
        torch.isfinite(parameter).all() for name, parameter in vlm.named_parameters() if "fake_quant" not in name
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", ["constant", "zero", "equal", "few", "one"])
def test_singular_hessians_are_damped_and_still_help(case: str, seed: int):
    """GPTQ's output error on the calibration inputs themselves stays below round-to-nearest's."""
    torch.manual_seed(seed)
    layer = QuantLinear(torch.nn.Linear(48, 24), QuantScheme(4, 16)).eval()
    x = torch.randn(400, 48) @ (torch.eye(48) + 0.3 * torch.randn(48, 48))
    if case == "constant":
        x[:, :8] = 3.0
    elif case == "zero":
        x[:, ::3] = 0.0
    elif case == "equal":
        x[:, 24:] = x[:, :24]
    else:
        x = x[: 5 if case == "few" else 1]
    observer = SecondMomentObserver(layer)
    observer.observe(x)
    assert torch.linalg.matrix_rank(observer.moment[0].double(), tol=1e-6) < 48
    METHODS["minmax"].fit_weight(layer)
    with torch.no_grad():
        nearest = output_error(layer, layer.effective_weight(), observer.moment)
        rounded = GPTQ().round_columns(layer, observer.moment)
        assert torch.isfinite(rounded).all()
        assert output_error(layer, rounded, observer.moment) < nearest


@pytest.mark.parametrize("method", EVERY)
def test_without_an_image_there_is_one_line_and_an_empty_batch_among_others_is_nothing(method: str):
    fresh = shallow(build("vit_clean"))
    batch = make_batches(fresh, (3,))[0]
    empty = {key: column[:0] for key, column in batch.items()}
    for nothing in ([], iter(()), [empty]):
        with pytest.raises(VLMQError, match="hold no batch with an image") as error:
            quantize(twin(fresh), method, QuantScheme(4, 8, scope="vision_text"), nothing)
        assert "\n" not in str(error.value)
    states = []
    for batches in ([batch], [empty, batch, empty]):
        vlm = twin(fresh)
        quantize(vlm, method, QuantScheme(4, 8, scope="vision_text"), batches)
        states.append(vlm.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("method", EVERY)
def test_weights_alone_need_data_only_where_the_method_looks_at_inputs(method: str):
    vlm = shallow(build("vit_clean"))
    if method in BY_INPUTS:
        with pytest.raises(VLMQError, match="hold no batch with an image"):
            quantize(vlm, method, QuantScheme(4, 16), [])
    else:
        quantize(vlm, method, QuantScheme(4, 16), [])
        with torch.no_grad():
            assert all(torch.isfinite(layer.effective_weight()).all() for layer in quantized_layers(vlm).values())


@pytest.mark.parametrize("channels", ["all", "one"])
@pytest.mark.parametrize("method", EVERY)
def test_inputs_whose_squares_overflow(method: str, channels: str):
    """The last projection gets inputs near 1e20: float32 holds them and not their squares; nothing after it is a layer."""
    vlm = shallow(build("vit_clean"))
    with torch.no_grad():
        vlm.model.visual.ln_post.weight[slice(None) if channels == "all" else 3] *= 1e20
    for bits in ((4, 8), (4, 16)):
        quantized = twin(vlm)
        if method in BY_INPUTS and not method.startswith("rot"):  # a rotation folds the gains into the weights
            with pytest.raises(VLMQError, match=r"layer 'model\.visual\.proj': the squares .* too large") as error:
                quantize(quantized, method, QuantScheme(*bits), make_batches(vlm))
            assert "\n" not in str(error.value)
        else:
            quantize(quantized, method, QuantScheme(*bits), make_batches(vlm))
        with torch.no_grad():
            layers = quantized_layers(quantized)
            assert layers and all(torch.isfinite(layer.weight).all() for layer in layers.values())
            ready = [la for la in layers.values() if la.weight_fake_quant.dynamic or la.weight_fake_quant.calibrated]
            assert all(torch.isfinite(layer.effective_weight()).all() for layer in ready)


@pytest.mark.parametrize("kind", ["linear", "conv", "depthwise"])
def test_an_overflowing_hessian_is_named_whatever_the_layer(kind: str):
    vlm = build("align_clean" if kind == "depthwise" else "vit_clean")
    with torch.no_grad():  # what the layer makes is small again, so that nothing after it is not finite
        if kind == "linear":
            name = "model.visual.proj"
            vlm.model.visual.ln_post.weight *= 1e20
        elif kind == "conv":
            name = "model.visual.conv1"
            vlm.std /= 1e20
            vlm.model.visual.conv1.weight /= 1e20
        else:
            name = "model.visual.trunk.blocks.1.0.conv_dw"
            norm = vlm.get_submodule("model.visual.trunk.blocks.1.0.bn1")
            norm.weight *= 1e20
            norm.bias *= 1e20
            vlm.get_submodule(name).weight /= 1e20
    with pytest.raises(VLMQError, match=rf"layer '{re.escape(name)}': the squares of its calibration inputs"):
        quantize(vlm, "gptq", QuantScheme(4, 16), make_batches(vlm))


@pytest.mark.parametrize("method", ("awq", "gptq"))
def test_a_bad_channel_is_named_where_weights_alone_are_quantized(method: str):
    image = torch.rand(4, 3, 32, 32)
    image[:, 2] = math.nan
    with pytest.raises(VLMQError, match=r"'model\.visual\.conv1' got a non-finite input"):
        quantize(build("vit_clean"), method, QuantScheme(4, 16), [{"image": image}])


@pytest.mark.parametrize("method", EVERY)
def test_a_bad_channel_of_the_text_tower_is_named(method: str):
    vlm = build("vit_clean")
    with torch.no_grad():
        vlm.model.token_embedding.weight[:, 3] = math.nan
    with pytest.raises(VLMQError, match=r"'model\.transformer\.resblocks\.0\.attn\.q_proj' got a non-finite input"):
        quantize(vlm, method, QuantScheme(4, 8, scope="vision_text"), make_batches(vlm))
    assert all(torch.isfinite(layer.weight).all() for layer in quantized_layers(vlm).values())


@pytest.mark.parametrize("method", EVERY)
def test_a_group_size_that_does_not_divide_names_the_layer(method: str):
    vlm = build("vit_clean")
    with pytest.raises(
        VLMQError, match=r"layer 'model\.visual\.[^']*': group_size 36 does not divide the \d+"
    ) as error:
        quantize(vlm, method, QuantScheme(4, 8, "per_group", group_size=36), make_batches(vlm))
    assert "\n" not in str(error.value) and not quantized_layers(vlm)


@pytest.mark.parametrize(
    "scheme",
    [QuantScheme(4, 16), QuantScheme(16, 8), QuantScheme(8, 8, act_dynamic=True)],
    ids=["inputs in full precision", "weights in full precision", "dynamic ranges"],
)
def test_a_model_is_whole_where_a_side_has_no_step(scheme: QuantScheme):
    """Steps that nothing reads stay undefined; those that are read are judged like weights."""
    vlm = build("vit_clean")
    quantize(vlm, "minmax", scheme, make_batches(vlm))
    require_finite(vlm, unused_steps(vlm))
    layer = vlm.get_submodule("model.visual.conv1")
    used = layer.weight_fake_quant if scheme.weight_bits < 16 else layer.act_fake_quant
    with torch.no_grad():
        used.scale[0] = math.nan
    with pytest.raises(VLMQError, match=r"conv1.*scale' holds non-finite values"):
        require_finite(vlm, unused_steps(vlm))
