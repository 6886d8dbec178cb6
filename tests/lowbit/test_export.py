"""Converted models as programs that need neither this package nor open_clip, and compiled."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases.lowbit import W4A8, layer_of
from cases.quant import build, make_batches
from torch import nn

from lightning_vlmq.lowbit.convert import Conversion, convert_layers
from lightning_vlmq.lowbit.export import PROGRAMS, export_encoder
from lightning_vlmq.lowbit.layers import low_bit_layer
from lightning_vlmq.models import VLM
from lightning_vlmq.quant import (
    QuantScheme,
    quantize,
)


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
