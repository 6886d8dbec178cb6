"""Converted layers against the formula they stand for, converted models against the fake-quantized ones."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases.quant import build, make_batches
from torch import nn
from torch.nn import functional as F
from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor
from torchao.quantization.granularity import PerTensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.lowbit import layers as lowbit
from lightning_vlmq.lowbit.convert import Conversion, convert_layers, flat_state, load_converted, save_converted
from lightning_vlmq.lowbit.export import PROGRAMS, export_encoder
from lightning_vlmq.lowbit.layers import IntegerConv2d, IntegerLinear, TensorLinear, low_bit_layer
from lightning_vlmq.lowbit.packing import pack, unpack
from lightning_vlmq.lowbit.pipeline import compare, id_images
from lightning_vlmq.models import VLM, load_vlm, zoo
from lightning_vlmq.quant import (
    LayerRule,
    QuantConv2d,
    QuantizedLayer,
    QuantLinear,
    QuantScheme,
    quantize,
    quantized_layers,
    save_quantized,
)
from lightning_vlmq.quant.checkpoint import FORMAT, read_description
from lightning_vlmq.quant.rounding import block_range, to_blocks

W8A8, W4A8 = QuantScheme(8, 8, scope="vision_text"), QuantScheme(4, 8, scope="vision_text")


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (4, 2, 3, 3)])
def test_packing_keeps_every_integer_in_its_bits(bits: int, shape: tuple[int, ...]):
    levels = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    packed = pack(levels, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == bits * -(-levels.numel() // 8)
    assert torch.equal(unpack(packed, bits, levels.shape), levels)


def layer_of(kind: str, scheme: QuantScheme, seed: int, offsets: tuple[bool, bool] = (False, False)):
    """A calibrated layer with lopsided weights, and an input that is clipped at both ends."""
    torch.manual_seed(seed)
    if kind == "linear":
        layer: QuantizedLayer = QuantLinear(nn.Linear(40, 24), scheme)
        x = torch.randn(3, 7, 40) + 0.3
    else:
        groups = 8 if kind == "depthwise" else 1
        layer = QuantConv2d(nn.Conv2d(8, 16, 3, padding=1, stride=2, groups=groups), scheme)
        x = torch.randn(3, 8, 9, 9) + 0.3
    with torch.no_grad():
        layer.weight += 0.05
    weight, act = layer.weight_fake_quant, layer.act_fake_quant
    if weight.quantizes:
        weight.set_range(*block_range(to_blocks(layer.weight.detach(), weight.granularity), weight.granularity))
    if act.quantizes and not act.dynamic:
        act.set_range(torch.tensor([-1.5]), torch.tensor([2.0]))
    for quantizer, has_offset in zip((weight, act), offsets):
        if has_offset:
            quantizer.set_offset(-(quantizer.zero_point + 0.37) * quantizer.scale)
    return layer.eval().requires_grad_(False), x


def reference(layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
    """The layer's formula in float64, from its steps, zero points and offsets."""
    weight, act = layer.weight_fake_quant, layer.act_fake_quant

    def rounded(values: torch.Tensor, quantizer, scale, zero) -> torch.Tensor:
        shift = 0 if quantizer.offset is None or quantizer.dynamic else quantizer.offset.double()
        scale, zero = scale.double(), zero.double()
        if scale.numel() > 1:
            scale, zero = scale[:, None], zero[:, None]
            shift = shift[:, None] if isinstance(shift, torch.Tensor) else shift
        level = torch.round((values - shift) / scale) + zero
        return (level.clamp(quantizer.qmin, quantizer.qmax) - zero) * scale + shift

    w, x = layer.weight.double(), x.double()
    if weight.quantizes:
        blocks = w.reshape(weight.scale.numel(), -1)
        w = rounded(blocks, weight, weight.scale, weight.zero_point).reshape(w.shape)
    if act.quantizes:
        per_tensor = isinstance(act.granularity, PerTensor)
        blocks = x.reshape((1, -1) if per_tensor else (len(x), -1) if x.ndim == 4 else (-1, x.shape[-1]))
        scale, zero = act.scale, act.zero_point
        if act.dynamic:
            low, high = blocks.amin(1).clamp_max(0), blocks.amax(1).clamp_min(0)
            scale, zero = (high - low) / (act.qmax - act.qmin), torch.zeros_like(low)
            zero = torch.round(-low / scale) if not act.symmetric else zero
            scale = torch.maximum(low / act.qmin, high / act.qmax) if act.symmetric else scale
        x = rounded(blocks, act, scale, zero).reshape(x.shape)
    bias = layer.bias.double()
    return layer._conv_forward(x, w, bias) if isinstance(layer, nn.Conv2d) else F.linear(x, w, bias)


PER_TOKEN = {"act_dynamic": True, "act_granularity": "per_token"}
LINEAR_CASES = {
    "w8a8": (QuantScheme(8, 8), (False, False), Int8Tensor),
    "w8a8 signed": (QuantScheme(8, 8, act_symmetric=True), (False, False), Int8Tensor),
    "w4a8 per tensor": (QuantScheme(4, 8, "per_tensor"), (False, False), Int8Tensor),
    "w8a8 per token": (QuantScheme(8, 8, **PER_TOKEN), (False, False), Int8Tensor),
    "w3a8 per token, signed": (QuantScheme(3, 8, act_symmetric=True, **PER_TOKEN), (False, False), Int8Tensor),
    "w6a8 dynamic": (QuantScheme(6, 8, act_dynamic=True), (False, False), Int8Tensor),
    "w8a16": (QuantScheme(8, 16), (False, False), Int8Tensor),
    "w4a16": (QuantScheme(4, 16), (False, False), IntxUnpackedToInt8Tensor),
    "w4a16 grouped": (QuantScheme(4, 16, "per_group", 8), (False, False), IntxUnpackedToInt8Tensor),
    "w2a16 unsigned": (QuantScheme(2, 16, weight_symmetric=False), (False, False), IntxUnpackedToInt8Tensor),
    "w5a16 offset": (QuantScheme(5, 16, weight_symmetric=False), (True, False), IntxUnpackedToInt8Tensor),
    "w4a8 grouped per token": (
        QuantScheme(4, 8, "per_group", 8, **PER_TOKEN),
        (False, False),
        IntxUnpackedToInt8Tensor,
    ),
    "w8a8 unsigned weight": (QuantScheme(8, 8, weight_symmetric=False), (False, False), None),
    "w4a8 grouped": (QuantScheme(4, 8, "per_group", 8), (False, False), None),
    "w4a8 input offset": (QuantScheme(4, 8), (False, True), None),
    "w8a4": (QuantScheme(8, 4), (False, False), None),
    "w6a6 signed": (QuantScheme(6, 6, act_symmetric=True), (False, False), None),
    "w7a5 per token": (QuantScheme(7, 5, **PER_TOKEN), (False, False), None),
    "w4a8 both offsets": (QuantScheme(4, 8, weight_symmetric=False), (True, True), None),
}


@pytest.mark.parametrize("case", LINEAR_CASES)
def test_a_linear_layer_computes_its_formula(case: str):
    scheme, offsets, tensor = LINEAR_CASES[case]
    for seed in range(3):
        layer, x = layer_of("linear", scheme, seed, offsets)
        expected = reference(layer, x)
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        for own in (False, True):
            low = low_bit_layer(layer, own=own)
            assert type(low) is (IntegerLinear if own or tensor is None else TensorLinear)
            if isinstance(low, TensorLinear):
                assert type(low.weight.data) is tensor
            torch.testing.assert_close(low(x).double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(x @ low, low(x))


def test_without_exact_integer_products_the_weight_is_dequantized(monkeypatch: pytest.MonkeyPatch):
    layer, x = layer_of("linear", QuantScheme(4, 8), 0)
    low = low_bit_layer(layer, own=True)
    monkeypatch.setattr(lowbit, "EXACT_PRODUCTS", False)
    assert torch.equal(low(x), layer(x))


CONV_CASES = {
    "w8a8": (QuantScheme(8, 8), (False, False)),
    "w4a8 per image": (QuantScheme(4, 8, **PER_TOKEN), (False, False)),
    "w3a6 grouped": (QuantScheme(3, 6, "per_group", 9), (False, False)),
    "w5a16 offset": (QuantScheme(5, 16, weight_symmetric=False), (True, False)),
    "w4a8 both offsets": (QuantScheme(4, 8, weight_symmetric=False), (True, True)),
}


@pytest.mark.parametrize("kind", ["conv", "depthwise"])
@pytest.mark.parametrize("case", CONV_CASES)
def test_a_convolution_computes_its_formula(kind: str, case: str):
    scheme, offsets = CONV_CASES[case]
    for seed in range(3):
        layer, x = layer_of(kind, scheme, seed, offsets)
        low = low_bit_layer(layer)
        assert type(low) is IntegerConv2d
        assert torch.equal(low(x), layer(x))
        torch.testing.assert_close(low(x).double(), reference(layer, x), rtol=1e-5, atol=1e-5)


def test_constant_and_zero_weights_survive():
    for value in (0.0, 0.5):
        for scheme in (QuantScheme(4, 8), QuantScheme(4, 16, weight_symmetric=False)):
            layer, x = layer_of("linear", scheme, 0)
            layer.set_weight(torch.full_like(layer.weight, value))
            low_high = torch.full((24,), value)
            layer.weight_fake_quant.set_range(low_high, low_high)
            for own in (False, True):
                torch.testing.assert_close(low_bit_layer(layer, own=own)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_float8_keeps_three_bits_behind_the_leading_one():
    layer, x = layer_of("linear", QuantScheme(8, 16), 0)
    with pytest.raises(VLMQError, match="multiples of 16"):
        low_bit_layer(layer, float8=True)
    wide = QuantLinear(nn.Linear(48, 32), QuantScheme(8, 16)).eval().requires_grad_(False)
    wide.weight_fake_quant.set_range(*block_range(wide.weight, wide.weight_fake_quant.granularity))
    low = low_bit_layer(wide, float8=True)
    weight, expected = low.weight.dequantize(), wide.effective_weight()
    normal = expected.abs() > expected.abs().amax(1, keepdim=True) / 448 * 2**-6
    assert ((weight - expected).abs() <= expected.abs() / 16 * 1.001)[normal].all()
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(low(x), F.linear(x, weight, wide.bias), rtol=1e-5, atol=1e-5)


def test_below_eight_bits_a_packed_weight_takes_its_bits_and_no_more():
    layer, _ = layer_of("linear", QuantScheme(3, 8), 0)
    low = low_bit_layer(layer, own=True)
    assert low.integers.stored.numel() == 24 * 40 * 3 / 8
    assert not [t for t in [*low.parameters(), *low.buffers()] if t.numel() >= 24 * 40]


# whole models, on real images ------------------------------------------------------------------------------------


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


def agrees(first: VLM, second: VLM, data: EmbeddedData) -> bool:
    found = compare(first, second, id_images(data), data.class_names, data.templates)
    assert found.images == 128 and found.lowest_cosine <= found.cosine <= 1 + 1e-9
    return found.cosine >= 0.999 and found.top1 >= 0.99


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
        assert agrees(vlm, converted, data)
    assert inputs == {"dynamic": {"dynamic"}, "none": {"none"}, "keep": {"static"}}

    scheme = QuantScheme(8, 16, scope="vision_text")
    weights_only = quantized("vit_clean", "minmax", scheme, data)
    converted = copy.deepcopy(weights_only)
    layers = convert_layers(converted, Conversion("static"), scheme, calibration(vlm, data))
    assert {(layer["inputs"], layer["act_bits"]) for layer in layers.values()} == {("static", 8)}
    assert agrees(vlm, converted, data)


# on disk ----------------------------------------------------------------------------------------------------------


def saved(vlm: VLM, method: str, scheme: QuantScheme, conversion: Conversion, folder: Path) -> VLM:
    """Quantize, convert and save a model; the converted one comes back."""
    made = quantize(vlm, method, scheme, make_batches(vlm), minimum_coverage=0)
    save_quantized(vlm, folder / "fake", made)
    convert_layers(vlm, conversion, scheme, make_batches(vlm))
    save_converted(vlm, folder, conversion, read_description(folder / "fake" / "quant.json", FORMAT), note=1)
    return vlm


@torch.no_grad()
def outputs(vlm: VLM) -> list[torch.Tensor]:
    batch = make_batches(vlm, seed=5)[0]
    return [vlm.encode_image(batch["image"]), vlm.encode_text(batch["tokens"])]


MIXED = QuantScheme(
    4,
    8,
    scope="vision_text",
    overrides=(
        LayerRule("*q_proj*", weight_bits=8, act_bits=6),
        LayerRule("*c_proj*", skip=True),
        LayerRule("*k_proj*", weight_bits=16),
        LayerRule("*out_proj*", act_bits=16),
    ),
)
DISK_CASES = {
    "torchao": ("minmax", W4A8, Conversion()),
    "own": ("minmax", QuantScheme(3, 8, scope="vision_text"), Conversion(kernels="own")),
    "offsets": ("hqq", QuantScheme(4, 16, "per_group", 4, scope="vision_text"), Conversion()),
    "learned offsets": ("lsqplus_contrastive", W4A8, Conversion()),
    "following weights": ("ste_contrastive(weights='rtn')", W8A8, Conversion()),
    "scales": ("smoothquant", W8A8, Conversion("dynamic")),
    "rotations": ("quarot", QuantScheme(8, 16, scope="vision_text"), Conversion("static")),
    "mixed": ("minmax", MIXED, Conversion()),
}


@pytest.mark.parametrize("case", DISK_CASES)
@pytest.mark.parametrize("name", ["vit_clean", "convnext_clean"])
@pytest.mark.usefixtures("small_zoo")
def test_a_loaded_model_gives_the_same_bits(name: str, case: str, tmp_path: Path):
    vlm = saved(build(name), *DISK_CASES[case], tmp_path)
    state = torch.get_rng_state()
    loaded = load_converted(tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded), outputs(vlm)))
    assert torch.equal(loaded.logit_scale(), vlm.logit_scale())


@pytest.mark.parametrize("tower", zoo.TOWERS)
def test_every_family_converts(tower: str, tmp_path: Path):
    torch.manual_seed(0)
    vlm = saved(zoo.build(f"{tower}_clean").eval(), "minmax", W8A8, Conversion(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(outputs(load_converted(tmp_path)), outputs(vlm)))


def test_layers_are_read_one_by_one(tmp_path: Path):
    vlm = build("vit_clean")
    quantize(vlm, "minmax", MIXED, make_batches(vlm), minimum_coverage=0)
    layers = convert_layers(vlm, Conversion(), MIXED)
    kinds = {name.split(".")[-1]: layer for name, layer in layers.items() if "resblocks.1." in name}
    assert "c_proj" not in kinds
    assert (kinds["c_fc"]["kind"], kinds["c_fc"]["weight_bits"], kinds["c_fc"]["act_bits"]) == ("Int8Tensor", 4, 8)
    assert (kinds["q_proj"]["kind"], kinds["q_proj"]["weight_bits"], kinds["q_proj"]["act_bits"]) == (
        "IntegerLinear",
        8,
        6,
    )
    assert kinds["k_proj"]["kind"] == "QuantLinear" and kinds["k_proj"]["weight_bits"] == 16
    assert kinds["out_proj"]["kind"] == "IntxUnpackedToInt8Tensor" and kinds["out_proj"]["inputs"] == "none"


def test_files_shrink_with_the_bits(tmp_path: Path):
    sizes = {}
    for bits in (8, 4, 2):
        saved(
            build("vit_clean"), "minmax", QuantScheme(bits, 8, scope="vision_text"), Conversion(), tmp_path / str(bits)
        )
        sizes[bits] = (tmp_path / str(bits) / "model.safetensors").stat().st_size
    vlm = build("vit_clean")
    matrices = sum(layer.weight.numel() for layer in vlm.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    for more, less in ((8, 4), (4, 2)):
        assert sizes[more] - sizes[less] == pytest.approx(matrices * (more - less) / 8, rel=0.02)


def test_packed_kernels_take_less_memory_than_a_byte_a_weight():
    memory = {}
    for kernels in ("torchao", "own"):
        vlm = build("vit_clean")
        quantize(vlm, "minmax", W4A8, make_batches(vlm))
        convert_layers(vlm, Conversion(kernels=kernels), W4A8)
        memory[kernels] = sum(t.numel() * t.element_size() for t in flat_state(vlm)[0].values())
    vlm = build("vit_clean")
    linear = sum(layer.weight.numel() for layer in vlm.modules() if isinstance(layer, nn.Linear))
    assert memory["torchao"] - memory["own"] == pytest.approx(linear / 2, rel=0.1)


def test_a_layer_in_several_places_stays_one(tmp_path: Path):
    vlm = build("vit_clean")
    blocks = vlm.model.visual.transformer.resblocks
    blocks[1].mlp.c_fc = blocks[0].mlp.c_fc
    blocks[1].attn.q_proj.weight = blocks[0].attn.q_proj.weight
    quantize(vlm, "minmax", W4A8, make_batches(vlm))
    fake = outputs(vlm)
    convert_layers(vlm, Conversion(), W4A8)
    assert blocks[1].mlp.c_fc is blocks[0].mlp.c_fc and isinstance(blocks[0].mlp.c_fc, TensorLinear)
    for a, b in zip(outputs(vlm), fake):
        assert F.cosine_similarity(a, b).min() > 0.999


# as programs ------------------------------------------------------------------------------------------------------


def shallow(vlm: VLM) -> VLM:
    """The model with one transformer block a tower: tracing and compiling take seconds a block."""
    for transformer in (vlm.model.transformer, getattr(vlm.model.visual, "transformer", None)):
        if transformer is not None:
            del transformer.resblocks[1:]
    return vlm


RUN = """
import sys, torch, torchao
io = torch.load(sys.argv[1] + "/io.pt", weights_only=True)
for tower, file in io["programs"].items():
    encode = torch.export.load(sys.argv[1] + "/" + file).module()
    for x, y in io[tower]:
        assert torch.equal(encode(x), y), (tower, x.shape)
assert not {"lightning_vlmq", "open_clip", "timm", "lightning"} & set(sys.modules)
print("same")
"""


@pytest.mark.parametrize(
    ("name", "kernels", "pixels"), [("vit_clean", "torchao", "uint8"), ("convnext_clean", "own", "float32")]
)
@torch.no_grad()
def test_programs_run_with_torch_and_torchao_alone(name: str, kernels: str, pixels: str, tmp_path: Path):
    vlm = shallow(build(name))
    quantize(vlm, "minmax", W4A8, make_batches(vlm))
    convert_layers(vlm, Conversion(kernels=kernels), W4A8)
    children = [dict(vlm.model.named_children()), dict(vlm.named_children())]
    io: dict[str, object] = {"programs": PROGRAMS, "vision": [], "text": []}
    batches = make_batches(vlm, (1, 2, 5), seed=3)
    for tower, file in PROGRAMS.items():
        program = export_encoder(vlm, tower, tmp_path / file, pixels)
        assert not any("stack_trace" in node.meta for node in program.graph.nodes)
        for batch in batches:
            image = batch["image"] if pixels == "uint8" else batch["image"] / 255
            x = image if tower == "vision" else batch["tokens"]
            io[tower].append((x, vlm.encode_image(x) if tower == "vision" else vlm.encode_text(x)))
        towers = {vlm.tower_of(key.removeprefix("vlm.")) for key in program.state_dict}
        assert towers == {tower}, "a program holds its own tower only"
    assert children == [dict(vlm.model.named_children()), dict(vlm.named_children())], "the model stays whole"
    torch.save(io, tmp_path / "io.pt")
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.stdout == "same\n", done.stderr


class Model(nn.Module):
    """A layer of each kind."""

    def __init__(self, kernels: str) -> None:
        super().__init__()
        conv, self.x = layer_of("conv", QuantScheme(4, 8), 0)
        linear, _ = layer_of("linear", QuantScheme(4, 8), 0)
        self.conv, self.linear = low_bit_layer(conv), low_bit_layer(linear, own=kernels == "own")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).flatten(1)[:, :40])


@pytest.mark.parametrize("kernels", ["torchao", "own"])
@torch.no_grad()
def test_converted_layers_compile(kernels: str):
    model = Model(kernels)
    expected = model(model.x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(model.x), expected)
    if not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler, which this machine lacks")
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(model.x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_converted_model_compiles():
    vlm = shallow(build("vit_clean"))
    quantize(vlm, "minmax", QuantScheme(8, 8), make_batches(vlm))
    convert_layers(vlm, Conversion(), QuantScheme(8, 8))
    pixels = make_batches(vlm)[0]["image"]
    torch._dynamo.reset()
    assert torch.equal(torch.compile(vlm.encode_image, backend="aot_eager")(pixels), vlm.encode_image(pixels))


# refusals ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.usefixtures("small_zoo")
def test_bad_folders_are_one_line(tmp_path: Path):
    def message(folder: Path) -> str:
        with pytest.raises(VLMQError) as caught:
            load_converted(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "convert.json" in message(tmp_path / "absent")
    saved(build("vit_clean"), "minmax", W8A8, Conversion(), tmp_path)
    weights, description = (tmp_path / "model.safetensors").read_bytes(), (tmp_path / "convert.json").read_text()
    (tmp_path / "model.safetensors").write_bytes(weights[:5000])
    assert "damaged" in message(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "no such file" in message(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "convert.json").write_text(description.replace('"kernels"', '"kernel"'))
    assert "converted model's description" in message(tmp_path)
    (tmp_path / "convert.json").write_text(description.replace('"torchao",', '"own",', 1))
    assert "does not hold the model" in message(tmp_path)
    (tmp_path / "convert.json").write_text(description[:100])
    assert "damaged" in message(tmp_path)
    (tmp_path / "convert.json").write_text(description)
    load_converted(tmp_path)
