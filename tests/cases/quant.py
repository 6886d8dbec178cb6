"""Small models and calibration batches for the tests of quantization."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases.towers import small
from lightning_vlmq.models import VLM
from lightning_vlmq.quant import METHODS, QuantConv2d, QuantizedLayer, QuantLinear, QuantScheme
from lightning_vlmq.quant.observers import SecondMomentObserver

INTEGER_METHODS = sorted(name for name in METHODS if METHODS[name].has_integers and name != "spectral_mixed")
"""The methods whose weights are integers of the scheme's bits and nothing else: not the controls, what adds a low-rank part, or what
decides bits itself, which have tests of their own."""


def build(name: str, seed: int = 0) -> VLM:
    """A small model of a zoo model's family, under its name, with random weights."""
    torch.manual_seed(seed)
    return small(name).eval()


def shallow(vlm: VLM) -> VLM:
    """The model with the first of each row of like blocks: every kind of layer is there, in a third of the time."""
    for name, blocks in list(vlm.named_modules()):
        if name.rsplit(".", 1)[-1] in ("resblocks", "blocks") and not isinstance(blocks[0], nn.Sequential):
            del blocks[1:]
    return vlm


def twin(vlm: VLM) -> VLM:
    """A copy that shares the tokenizer, whose tables take longer to copy than a model to quantize."""
    return copy.deepcopy(vlm, {id(vlm._tokenize): vlm._tokenize})


def make_batches(vlm: VLM, sizes: tuple[int, ...] = (4, 4), seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    size = vlm.image_size
    return [
        {
            "image": torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8),
            "tokens": vlm.tokenize([f"a photo of {'very ' * k}red shoes" for k in range(n)]),
        }
        for n in sizes
    ]


SEEDS = range(5)
"""Fresh layers and inputs that a method's promise has to hold on, every one."""
LAYER_KINDS = ("linear", "conv", "grouped", "depthwise")


def outlier_layer(kind: str, scheme: QuantScheme, seed: int = 0) -> tuple[QuantizedLayer, Tensor]:
    """A layer with a few large input channels, and correlated inputs for it that have the same."""
    torch.manual_seed(seed)
    if kind == "linear":
        layer: QuantizedLayer = QuantLinear(nn.Linear(48, 24), scheme)
        x = torch.randn(256, 48) @ (torch.eye(48) + 0.3 * torch.randn(48, 48))
        x[:, [3, 17]] *= 25
        return layer.eval(), x
    shape = {"conv": (16, 24, 3, 1), "grouped": (16, 24, 3, 2), "depthwise": (16, 16, 5, 16)}[kind]
    conv = nn.Conv2d(shape[0], shape[1], shape[2], padding=1, groups=shape[3])
    x = F.avg_pool2d(torch.randn(12, 16, 13, 13), 5, stride=1) * 5 + torch.randn(12, 16, 1, 1)  # neighbours are alike
    x[:, 5] *= 4 if kind == "depthwise" else 25  # there, a channel is an output: one must not be all that counts
    return QuantConv2d(conv, scheme).eval(), x


def second_moment(layer: QuantizedLayer, x: Tensor) -> Tensor:
    observer = SecondMomentObserver(layer)
    for part in x.split(5):
        observer.observe(part)
    return observer.moment


def float_output(layer: QuantizedLayer, x: Tensor, weight: Tensor) -> Tensor:
    """What the layer would give with this weight and nothing quantized, in float64."""
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x.double(), weight.double(), bias)
    return F.linear(x.double(), weight.double(), bias)


def squared_output_error(layer: QuantizedLayer, x: Tensor, weight: Tensor, reference: Tensor) -> float:
    """Sum of squared output differences between two weights, in float64."""
    with torch.no_grad():
        return (float_output(layer, x, weight) - float_output(layer, x, reference)).square().sum().item()


def add_outlier_channels(vlm: VLM) -> VLM:
    """Give the inputs of attention and MLP layers a few channels that are 30 times too large, as large models have them."""
    with torch.no_grad():
        for name, module in vlm.named_modules():
            if isinstance(module, nn.LayerNorm) and vlm.tower_of(name) and "resblocks" in name:
                module.weight[[1, 10]] *= 30
    return vlm
