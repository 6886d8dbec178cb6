"""Layers that hold their weight as integers: torchao's tensors where it has one for a layer, own modules elsewhere.

torchao 0.18 covers linear layers. Its :class:`Int8Tensor` multiplies int8 inputs (static, or dynamic per tensor or token)
with int8 weights that have one symmetric step an output channel or a tensor; fewer bits are a part of that grid. Its
:class:`IntxUnpackedToInt8Tensor` takes every weight grid, but no input grid except 8-bit asymmetric per token. Its
packed int4 tensors need CUDA and bfloat16, or a product of torch's for CPUs (``_weight_int4pack_mm_for_cpu``) that is
many times slower than float32's where it is given float32. All else is for :class:`IntegerLinear` and
:class:`IntegerConv2d`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int8Tensor,
    IntxUnpackedToInt8Tensor,
    MappingType,
    quantize_,
)
from torchao.quantization.granularity import PerGroup, PerRow, PerTensor, PerToken
from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.lowbit.packing import pack, unpack
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.layers import QuantConv2d, QuantizedLayer, QuantLinear
from lightning_vlmq.quant.rounding import STEP_FLOOR, to_blocks


def _multiplies_unsigned() -> bool:
    """Whether torch multiplies unsigned with signed integers, which 2.11 does not."""
    try:
        torch._int_mm(torch.zeros(32, 32, dtype=torch.uint8), torch.zeros(32, 32, dtype=torch.int8))
    except RuntimeError:
        return False
    return True


EXACT_PRODUCTS: bool = getattr(torch.cpu, "_is_vnni_supported", lambda: False)() and _multiplies_unsigned()
"""Whether 8-bit integers are multiplied here without overflow: CPUs before VNNI add pairs of products in 16 bits."""


class IntegerWeight(nn.Module):
    """A weight as integers, packed below 8 bits, with the steps that give it back.

    Args:
        weight: the float weight.
        quantizer: its quantizer, of 2 to 8 bits.

    Attributes:
        stored: int8 in the weight's shape (8 bits), or what :func:`pack` makes of it.
        scale: ``[blocks]``.
        zero_point: int8 ``[blocks]``.
        offset: ``[blocks]`` or None.
    """

    stored: Tensor
    scale: Tensor
    zero_point: Tensor
    offset: Tensor | None

    def __init__(self, weight: Tensor, quantizer: FakeQuantizer) -> None:
        super().__init__()
        self.bits, self.granularity, self.shape = quantizer.bits, quantizer.granularity, weight.shape
        levels, scale, zero_point, offset = quantizer.integers(weight)
        self.register_buffer("stored", levels if self.bits == 8 else pack(levels, self.bits))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("offset", offset)

    def levels(self) -> Tensor:
        """The integers, int8 in the weight's shape."""
        return self.stored if self.bits == 8 else unpack(self.stored, self.bits, self.shape)

    def forward(self) -> Tensor:
        """The dequantized weight, to the last bit what the fake quantizer gave."""
        blocks = to_blocks(self.levels(), self.granularity)
        column = (-1,) if isinstance(self.granularity, PerTensor) else (-1, 1)
        weight = (blocks.to(self.scale.dtype) - self.zero_point.view(column)) * self.scale.view(column)
        if self.offset is not None:
            weight = weight + self.offset.view(column)
        return weight.view(self.shape)


class _IntegerLayer(QuantizedLayer):
    """What :class:`IntegerLinear` and :class:`IntegerConv2d` share: the fake-quantized layer with its float weight gone."""

    integers: IntegerWeight

    def __init__(self, layer: QuantizedLayer) -> None:
        vars(self).update(vars(layer))  # the layer's geometry, and what nn.Module keeps
        self._buffers, self._parameters, self._weight_cache = {}, {"bias": layer._parameters["bias"]}, None
        self._modules = {"input_transform": layer.input_transform, "act_fake_quant": layer.act_fake_quant}
        self.integers = IntegerWeight(layer.weight, layer.weight_fake_quant)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight, made anew at each call."""
        return self.integers()

    def effective_weight(self) -> Tensor:
        """The same; nothing is kept, so that no float weight takes memory between calls."""
        return self.integers()


class IntegerLinear(_IntegerLayer, QuantLinear):  # type: ignore[misc, override]
    """A linear layer with an integer weight, for what none of torchao's tensors computes, or in their place.

    torchao has nothing for an input of fewer than 8 bits or with a real-valued offset (LSQ+), nor for static or symmetric
    inputs together with group-wise, asymmetric or offset weights. And its asymmetric products sum every row of the weight
    anew at each call; here the sums are stored, and weights below 8 bits stay packed in memory.

    Where inputs are quantized and the weight has one symmetric step an output channel or a tensor, the product is one of
    integers, where CPU and torch make it exact. Elsewhere the weight is dequantized at each call.

    Attributes:
        row_sums: ``[out_features]``, sums of the dequantized weight's rows; None where products are not of integers.
    """

    row_sums: Tensor | None

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__(layer)
        self.register_buffer("row_sums", None)
        if layer.act_fake_quant.quantizes and _is_plain(layer.weight_fake_quant):
            self.row_sums = self.integers.levels().sum(1, dtype=torch.int32) * self.integers.scale

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        if self.row_sums is None or x.device.type != "cpu" or not EXACT_PRODUCTS:
            return super().forward(x)
        rows = self.input_transform(x).reshape(-1, self.in_features)
        scale, offset, lo, hi = self.act_fake_quant.grid(rows)
        scale = scale.clamp_min(STEP_FLOOR)
        levels = (rows if offset is None else rows - offset) * scale.reciprocal()
        # from 0: processors multiply unsigned inputs with signed weights
        unsigned = levels.round_().clamp_(lo, hi).sub_(lo).to(torch.uint8)  # type: ignore[arg-type]
        product = torch._int_mm(unsigned, self.integers.levels().t())
        lowest = lo * scale if offset is None else lo * scale + offset
        shift = lowest * self.row_sums
        out = product.to(scale.dtype).mul_(scale * self.integers.scale)
        out.add_(shift if self.bias is None else shift + self.bias)
        return out.view(*x.shape[:-1], self.out_features)


class IntegerConv2d(_IntegerLayer, QuantConv2d):  # type: ignore[override]
    """A 2-D convolution with an integer weight: torchao has none.

    The input is rounded onto its grid and the weight dequantized at each call, as neither torch nor torchao convolves
    integers outside of a compiler: the same function as the fake-quantized layer's.
    """


class TensorLinear(nn.Linear):
    """A linear layer whose weight is one of torchao's tensors, which knows how to quantize the input.

    Args:
        layer: the fake-quantized layer; its input transform and bias are taken over.
        weight: the tensor that stands for its weight.

    Attributes:
        bits: 2 to 8, of the integers that the tensor holds in a byte each.
    """

    def __init__(self, layer: QuantLinear, weight: Tensor) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.bits = 8 if isinstance(weight, Float8Tensor) else layer.weight_fake_quant.bits
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", layer._parameters["bias"])
        self.input_transform = layer.input_transform

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        x = self.input_transform(x)
        rows = x.reshape(-1, self.in_features)  # a static step has as many axes as the input it is for: two
        return F.linear(rows, self.weight, self.bias).reshape(*x.shape[:-1], self.out_features)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self(x)


def low_bit_layer(layer: QuantizedLayer, own: bool = False, float8: bool = False) -> nn.Module:
    """The low-bit layer that computes what a fake-quantized one does.

    Which kind it becomes is decided by its quantizers' bits and grids alone, not by their values.

    Args:
        layer: with calibrated quantizers; not changed.
        own: :class:`IntegerLinear` for linear layers that torchao has a tensor for, too.
        float8: turn linear layers into 8-bit floating point instead.

    Returns:
        :class:`TensorLinear`, :class:`IntegerLinear` or :class:`IntegerConv2d`; a layer whose weight is not quantized comes
        back as it is.

    Raises:
        VLMQError: a shape that float8 products do not take.
    """
    if not layer.weight_fake_quant.quantizes:
        return layer
    if isinstance(layer, QuantConv2d):
        return IntegerConv2d(layer)
    assert isinstance(layer, QuantLinear)
    tensor = _float8_tensor(layer) if float8 else None if own else _integer_tensor(layer)
    return IntegerLinear(layer) if tensor is None else TensorLinear(layer, tensor)


def _integer_tensor(layer: QuantLinear) -> Tensor | None:
    """The torchao tensor that computes a linear layer's product, or None where it has none."""
    weight, act = layer.weight_fake_quant, layer.act_fake_quant
    if act.quantizes and (act.bits != 8 or (act.offset is not None and not act.dynamic)):
        return None
    block = _block_size(layer.weight.shape, weight)
    steps = [size // length for size, length in zip(layer.weight.shape, block)]
    per_token = act.dynamic and isinstance(act.granularity, PerToken) and not act.symmetric
    if _is_plain(weight) and (act.quantizes or weight.bits == 8):
        levels, scale, _, _ = weight.integers(layer.weight)
        settings = _input_grid(act) if act.quantizes else {}
        return Int8Tensor(levels, scale.reshape(steps), block, layer.weight.dtype, **settings)
    if act.quantizes and not per_token:
        return None
    levels, scale, zero_point, offset = weight.integers(layer.weight)
    if offset is not None:  # level * scale + offset = (level - zero) * scale
        zero_point = zero_point.to(scale.dtype) - offset / scale
    return IntxUnpackedToInt8Tensor(
        levels,
        scale.reshape(steps),
        zero_point.reshape(steps),
        getattr(torch, f"int{weight.bits}"),
        block,
        layer.weight.dtype,
        "int8_asym_per_token" if act.quantizes else None,
    )


def _is_plain(weight: FakeQuantizer) -> bool:
    """Whether integers times one factor an output channel, or a tensor, are the weight."""
    return weight.symmetric and weight.offset is None and not isinstance(weight.granularity, PerGroup)


def _block_size(shape: torch.Size, quantizer: FakeQuantizer) -> list[int]:
    """How many rows and columns of a linear layer's weight share one step."""
    if isinstance(quantizer.granularity, PerTensor):
        return list(shape)
    return [1, quantizer.granularity.group_size if isinstance(quantizer.granularity, PerGroup) else shape[1]]


def _input_grid(act: FakeQuantizer) -> dict[str, Any]:
    """An 8-bit input quantizer in :class:`Int8Tensor`'s terms; the unsigned grid 0..255 moves down to -128..127."""
    per_tensor = isinstance(act.granularity, PerTensor)
    mapping = MappingType.SYMMETRIC_NO_CLIPPING_ERR if act.symmetric else MappingType.ASYMMETRIC
    settings: dict[str, Any] = {
        "act_quant_kwargs": QuantizeTensorToInt8Kwargs(PerTensor() if per_tensor else PerRow(), mapping)
    }
    if not act.dynamic:
        settings["act_quant_scale"] = act.scale.detach().clamp_min(STEP_FLOOR).reshape(1, 1)
        if not act.symmetric:
            settings["act_quant_zero_point"] = (act.zero_point - 128).reshape(1, 1).to(torch.int8)
    return settings


def _float8_tensor(layer: QuantLinear) -> Tensor:
    """A linear layer's dequantized weight in e4m3; inputs become e4m3 at run time where the layer quantizes them."""
    if layer.in_features % 16 or layer.out_features % 16:
        raise VLMQError(
            f"float8 products take multiples of 16 features, not {layer.in_features} to {layer.out_features}"
        )
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    with torch.no_grad():
        linear.weight = nn.Parameter(layer.effective_weight().clone(), requires_grad=False)
    if layer.act_fake_quant.quantizes:  # torchao takes one scale a row only from bfloat16 weights
        quantize_(linear, Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor(), set_inductor_config=False))
    else:
        quantize_(linear, Float8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False))
    return linear.weight
