"""Linear and convolution layers whose weight and input are fake-quantized, and the swap that puts them into a VLM."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization.granularity import Granularity, PerAxis, PerGroup, PerTensor, PerToken

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.rounding import all_finite
from lightning_vlmq.quant.rules import layer_schemes
from lightning_vlmq.quant.scheme import QuantScheme


class QuantizedLayer(nn.Module):
    """What :class:`QuantLinear` and :class:`QuantConv2d` share; not used on its own.

    Attributes:
        weight_fake_quant: quantizer of the weight.
        act_fake_quant: quantizer of the input.
        input_transform: module applied to the input before it is quantized, whose inverse the weight already holds
            (SmoothQuant's and AWQ's channel scales, QuaRot's rotation); the identity otherwise.
        folds: what was folded into the weight from the layer's neighbours, where something was; see
            :mod:`~lightning_vlmq.quant.rotation.rotate`.
    """

    weight: Tensor
    bias: Tensor | None
    weight_fake_quant: FakeQuantizer
    act_fake_quant: FakeQuantizer
    input_transform: nn.Module

    def _attach(self, source: nn.Linear | nn.Conv2d, scheme: QuantScheme, act_granularity: Granularity) -> None:
        """Take over the float layer's parameters (the very objects, so ties stay) and add the quantizers."""
        self.weight, self.bias = source.weight, source.bias
        granularity = weight_granularity(source, scheme)
        blocks = _number_of_blocks(source.weight, granularity)
        self.weight_fake_quant = FakeQuantizer(
            scheme.weight_bits,
            scheme.weight_symmetric,
            granularity,
            blocks,
            values_per_step=source.weight.numel() // blocks,
        )
        self.act_fake_quant = FakeQuantizer(
            scheme.act_bits, scheme.act_symmetric, act_granularity, dynamic=scheme.act_dynamic
        )
        self.input_transform = nn.Identity()
        if hasattr(source, "folds"):
            self.folds = source.folds
        # in a tuple, as a module would file a bare parameter (a 16-bit side returns the weight itself) among its
        # parameters
        self._weight_cache: tuple[tuple[Any, ...], Tensor] | None = None
        self.train(source.training)
        self.to(source.weight.device)

    def quantized_input(self, x: Tensor) -> Tensor:
        """The layer's input as the matrix product sees it: transformed, then fake-quantized; same shape."""
        return self.act_fake_quant(self.input_transform(x))

    def effective_weight(self) -> Tensor:
        """The dequantized weight that forward uses, in the shape of ``weight``.

        In evaluation without gradients it is computed once and kept until a parameter changes, the layer is moved or
        ``train()`` is called. (Writing through ``.data`` in evaluation mode goes unseen by torch's version counters: do
        that in training mode.) A compiled model computes it in its graph, which cannot ask for versions.
        """
        kept = not (torch.compiler.is_compiling() or self.training or torch.is_grad_enabled())
        if not kept or self.weight.is_inference():
            return self.weight_fake_quant(self.weight)
        quantizer = self.weight_fake_quant
        state = [self.weight, quantizer.scale, quantizer.zero_point, quantizer.offset]
        key = (quantizer.enabled, *((id(t), t._version) for t in state if t is not None))
        if self._weight_cache is None or self._weight_cache[0] != key:
            self._weight_cache = (key, quantizer(self.weight))
        return self._weight_cache[1]

    def set_weight(self, weight: Tensor) -> None:
        """Put a new weight of the same shape in a parameter of its own (a tied partner keeps the old one)."""
        if not all_finite(weight):
            raise VLMQError("a quantization method produced a weight that is not finite; check the calibration data")
        # in the usual layout, which a loaded checkpoint has: another one takes another kernel, which rounds otherwise
        own = weight.detach().clone(memory_format=torch.contiguous_format)
        self.weight = nn.Parameter(own, requires_grad=self.weight.requires_grad)

    def train(self, mode: bool = True) -> QuantizedLayer:
        """As :meth:`torch.nn.Module.train`; training mode also drops the cached weight."""
        if mode:
            self._weight_cache = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLayer:
        self._weight_cache = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weight_cache": None}


class QuantLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """A linear layer with fake-quantized weight and input, made from a float one whose parameters it shares.

    It also answers ``x @ layer``, as open_clip applies its projections.

    Args:
        source: the float layer.
        scheme: bits and granularities.
    """

    def __init__(self, source: nn.Linear, scheme: QuantScheme) -> None:
        nn.Linear.__init__(self, source.in_features, source.out_features, source.bias is not None, device="meta")
        self._attach(source, scheme, PerToken() if scheme.act_granularity == "per_token" else PerTensor())

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return F.linear(self.quantized_input(x), self.effective_weight(), self.bias)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self(x)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """A 2-D convolution with fake-quantized weight and input, made from a float one whose parameters it shares.

    Args:
        source: the float layer; depth-wise, grouped, strided and dilated ones included, and timm's ``Conv2dSame``, which
            pads as TensorFlow does.
        scheme: bits and granularities; ``per_token`` gives each image its own activation step.
    """

    def __init__(self, source: nn.Conv2d, scheme: QuantScheme) -> None:
        nn.Conv2d.__init__(
            self,
            source.in_channels,
            source.out_channels,
            source.kernel_size,  # type: ignore[arg-type]
            stride=source.stride,  # type: ignore[arg-type]
            padding=source.padding,  # type: ignore[arg-type]
            dilation=source.dilation,  # type: ignore[arg-type]
            groups=source.groups,
            bias=source.bias is not None,
            padding_mode=source.padding_mode,
            device="meta",
        )
        self._pads_same = isinstance(source, Conv2dSame)
        self._attach(source, scheme, PerAxis(0) if scheme.act_granularity == "per_token" else PerTensor())

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, in_channels, height, width]`` to ``[batch, out_channels, height', width']``."""
        return self._conv_forward(self.quantized_input(x), self.effective_weight(), self.bias)

    def padded(self, x: Tensor) -> Tensor:
        """The input with the layer's padding around it, ``[batch, in_channels, height + ..., width + ...]``."""
        if self._pads_same:
            return pad_same(x, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]
        if not any(pad := self._reversed_padding_repeated_twice):
            return x
        return F.pad(x, pad, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(self.padded(x) if self._pads_same else x, weight, bias)


def weight_granularity(layer: nn.Linear | nn.Conv2d, scheme: QuantScheme) -> Granularity:
    """What shares one weight step in this layer; the group rule is told in :class:`QuantScheme`.

    Raises:
        VLMQError: when the group size does not divide the layer's weights per output channel.
    """
    if scheme.weight_granularity == "per_tensor":
        return PerTensor()
    per_channel = layer.weight[0].numel()
    depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels and layer.groups > 1
    if scheme.weight_granularity == "per_channel" or depthwise or per_channel <= scheme.group_size:
        return PerAxis(0)
    if per_channel % scheme.group_size:
        fits = [g for g in range(scheme.group_size - 1, 1, -1) if per_channel % g == 0]
        hint = f"use {fits[0]} or less" if fits else "use per_channel"
        raise VLMQError(f"group_size {scheme.group_size} does not divide the {per_channel} weights per output; {hint}")
    return PerGroup(scheme.group_size)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Every quantized layer once, by its qualified name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def weight_quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Those of :func:`quantized_layers` whose weight is quantized (not left at 16 bits)."""
    return {name: layer for name, layer in quantized_layers(model).items() if layer.weight_fake_quant.quantizes}


def act_quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Those of :func:`quantized_layers` whose input is quantized (not left at 16 bits)."""
    return {name: layer for name, layer in quantized_layers(model).items() if layer.act_fake_quant.quantizes}


def static_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Those of :func:`act_quantized_layers` whose input has a range from calibration."""
    return {name: layer for name, layer in quantized_layers(model).items() if layer.act_fake_quant.is_static}


def swap_layers(vlm: VLM, scheme: QuantScheme) -> list[str]:
    """Replace, in place, the linear and convolution layers of the scope's towers by quantized ones.

    Each is made with the scheme that :func:`~lightning_vlmq.quant.rules.layer_schemes` gives it; a layer that this
    leaves in full precision stays what it is. A layer object that sits in several places is replaced by one quantized
    object in all of them.

    Args:
        vlm: the full-precision model.
        scheme: bits, granularities, scope and rules.

    Returns:
        The first qualified name of each replaced layer, in the model's order.

    Raises:
        VLMQError: the model is quantized already; a layer is of a class with a forward of its own, has non-finite
            weights, or does not take the group size; or what :func:`~lightning_vlmq.quant.rules.layer_schemes` refuses.
    """
    if quantized_layers(vlm):
        raise VLMQError("the model is quantized already; quantize a fresh full-precision copy")
    planned = {module: (name, own) for module, (name, own) in layer_schemes(vlm, scheme).items() if own is not None}
    replacement = {module: _quantized(name, module, own) for module, (name, own) in planned.items()}
    for parent in list(vlm.modules()):
        for child_name, child in parent._modules.items():
            if child in replacement:
                parent._modules[child_name] = replacement[child]
    return [name for name, _ in planned.values()]


def _quantized(name: str, module: nn.Module, scheme: QuantScheme) -> QuantizedLayer:
    """The quantized counterpart of one float layer; errors name the layer."""
    if type(module).forward not in (nn.Linear.forward, nn.Conv2d.forward, Conv2dSame.forward):
        raise VLMQError(
            f"layer '{name}' is a {type(module).__name__} with a forward of its own, which cannot be quantized"
        )
    if not all(map(all_finite, module.parameters())):
        raise VLMQError(f"layer '{name}' holds non-finite weights; the checkpoint is damaged, use another")
    try:
        return QuantConv2d(module, scheme) if isinstance(module, nn.Conv2d) else QuantLinear(module, scheme)  # type: ignore[arg-type]
    except VLMQError as error:
        raise VLMQError(f"layer '{name}': {error}") from error


def _number_of_blocks(weight: Tensor, granularity: Granularity) -> int:
    if isinstance(granularity, PerTensor):
        return 1
    return weight.numel() // granularity.group_size if isinstance(granularity, PerGroup) else weight.shape[0]
