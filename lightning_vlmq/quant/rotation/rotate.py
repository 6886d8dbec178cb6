"""QuaRot's rotations: of whole residual streams, folded into the weights, and of single layers' inputs, at run time.

A LayerNorm ``g * (x - mean(x)) / std(x) + b`` reads a stream x. Whatever is added to x may be centred beforehand, and g
and b belong as well to the linear layers that follow (Ashkboos et al. 2024, SliceGPT, arXiv 2401.15024, section 3.2);
what is left is ``x / rms(x)``, which commutes with every rotation R (SliceGPT Eq. 2; QuaRot, arXiv 2404.00456, Eq. 3).
So layers that write to the stream become ``R C W``, with C the centring, and layers that read it ``W diag(g) R^T``
(QuaRot Eq. 4), and no output changes (SliceGPT Theorem 1).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import TOWERS, VLM
from lightning_vlmq.quant.layers import QuantizedLayer, quantized_layers
from lightning_vlmq.quant.rotation.folds import InputFold, OutputFold, StreamEntry, StreamExit
from lightning_vlmq.quant.rotation.residual import NoStream, Slot, Stream, Values
from lightning_vlmq.quant.rotation.streams import find_stream
from lightning_vlmq.quant.transforms import HeadRotation, Rotation, randomized_hadamard

SEED = 0


def rotate(vlm: VLM, towers: Iterable[str]) -> dict[str, nn.Module]:
    """Rotate the residual stream of every tower that has one, and draw the rotations that remain for run time.

    Full-precision outputs stay equal up to float32 rounding, in place. A tower whose stream cannot be rotated (see
    :func:`~lightning_vlmq.quant.rotation.streams.find_stream`) keeps its weights, and all its layers that mix input channels are
    to be rotated at run time. Every tower draws from a generator of its own, so that it does not depend on the others.

    Args:
        vlm: the full-precision model.
        towers: ``vision``, ``text`` or both.

    Returns:
        By layer name, the rotation that :func:`rotate_input` is to put before a layer that gets quantized (one that
        does not needs none). In a tower with a rotated stream these are, as in QuaRot (section 4, stages 1b and 1c), the
        one before an MLP's second layer and the half of the values' rotation that goes across heads; furthermore those
        of layers that read neither the stream nor the image, as behind a pooling.

    Raises:
        VLMQError: the model is rotated or quantized already.
    """
    if quantized_layers(vlm) or rotated_towers(vlm):
        raise VLMQError("the model is quantized already; quantize a fresh full-precision copy")
    online: dict[str, nn.Module] = {}
    for tower in towers:
        generator = torch.Generator().manual_seed(SEED)
        given: dict[nn.Module, nn.Module | None] = {}
        with suppress(NoStream):  # found again, and told, by rotation_kinds
            given = _fold(find_stream(vlm, tower), generator)
        for name, layer in vlm.named_modules():
            if vlm.tower_of(name) != tower or not _mixes_channels(layer):
                continue
            rotation = given[layer] if layer in given else _draw(layer.weight.shape[1], generator)
            if rotation is not None:
                online[name] = rotation
    return online


def rotate_input(layer: QuantizedLayer, rotation: nn.Module) -> None:
    """Rotate a layer's input at run time and its weight to match: ``W x = (W R^T)(R x)``.

    Args:
        layer: a quantized linear layer or ungrouped convolution.
        rotation: as :func:`rotate` drew it, float64.
    """
    if isinstance(layer, nn.Conv2d):
        assert isinstance(rotation, Rotation)
        rotation = Rotation(rotation.signs.view(-1, 1, 1), rotation.left, rotation.right)
    rotation = rotation.to(layer.weight.device)
    layer.set_weight(rotation(layer.weight.detach().double()).to(layer.weight.dtype))
    layer.input_transform = rotation.to(layer.weight.dtype)


def restore_rotation(vlm: VLM, towers: Iterable[str]) -> None:
    """Give a full-precision model the structure of one whose streams were rotated, before its tensors are loaded.

    Args:
        vlm: the full-precision model.
        towers: what :func:`rotated_towers` said of the other.

    Raises:
        VLMQError: one of the towers has no stream that could have been rotated.
    """
    for tower in towers:
        try:
            _fold(find_stream(vlm, tower), torch.Generator().manual_seed(SEED))
        except NoStream as reason:
            raise VLMQError(
                f"the {tower} tower of '{vlm.name}' is not the checkpoint's, whose residual stream is rotated: {reason}"
            ) from reason


def rotated_towers(vlm: VLM) -> list[str]:
    """The towers whose residual stream is rotated."""
    towers = {vlm.tower_of(name) for name, module in vlm.named_modules() if hasattr(module, "folds")}
    return [tower for tower in TOWERS if tower in towers]


def rotation_kinds(vlm: VLM) -> dict[str, str]:
    """Where each rotated tower is rotated: ``residual stream``, or ``inside the blocks`` with the reason why only there."""
    kinds = dict.fromkeys(rotated_towers(vlm), "residual stream")
    rotates = {vlm.tower_of(n) for n, q in quantized_layers(vlm).items() if isinstance(q.input_transform, Rotation)}
    for tower in (t for t in TOWERS if t in rotates and t not in kinds):
        try:
            find_stream(vlm, tower)
            kinds[tower] = "inside the blocks"
        except NoStream as reason:
            kinds[tower] = f"inside the blocks ({reason})"
    return kinds


def _fold(stream: Stream, generator: torch.Generator) -> dict[nn.Module, nn.Module | None]:
    """Rotate a stream in place; returns the run-time rotations of the layers that must not have just any of their own."""
    one_weight = stream.writers[0][0].weight
    rotation = _draw(stream.width, generator).to(one_weight.device)
    online: dict[nn.Module, nn.Module | None] = dict.fromkeys(stream.pixels)
    with torch.no_grad():
        for owner, name in stream.tables:
            table = getattr(owner, name)
            _set(owner, name, rotation(table.double() - table.double().mean(-1, keepdim=True)), table)
        for writer, slot in stream.writers:
            scale = None if slot is None else getattr(*slot).gamma.double()
            if slot is not None:
                _replace(slot, nn.Identity())
            _fold_output(writer, rotation, scale, centred=True)
        for slot, layers in stream.readers:
            norm = getattr(*slot)
            for layer in layers:
                _fold_input(layer, rotation, norm)
                online[layer] = None
            _replace(slot, nn.RMSNorm(stream.width, eps=norm.eps, elementwise_affine=False))
        for values in stream.values:
            online[values.out] = _fold_values(values, generator)
        at_run_time = copy.deepcopy(rotation).to(one_weight.dtype)
        for slot in stream.entries:
            _replace(slot, StreamEntry(getattr(*slot), at_run_time))
        for slot in stream.exits:
            _replace(slot, StreamExit(getattr(*slot), at_run_time))
    return online


def _fold_values(values: Values, generator: torch.Generator) -> HeadRotation:
    """Rotate the values within each head, by weights alone, and return the rotation across heads, for run time.

    Together they are ``(H_heads ⊗ H_head) diag(signs)``, a randomized Hadamard rotation of all values (QuaRot Eq. 8, 9).
    """
    width = values.out.in_features
    signs, *_ = randomized_hadamard(width, generator)
    _, left, right = randomized_hadamard(width // values.heads, generator)
    within = Rotation(signs, torch.eye(values.heads).double(), torch.kron(left, right)).to(values.out.weight.device)
    _fold_output(values.source, within, start=values.start)
    _fold_input(values.out, within)
    _, left, right = randomized_hadamard(values.heads, generator)
    return HeadRotation(torch.kron(left, right))


def _fold_input(layer: nn.Linear, rotation: Rotation, norm: Any = None) -> None:
    """Fold a norm's gain and bias and a rotation of the input into a layer; what it reads is then ``R x``."""
    weight = layer.weight.double()
    gain = torch.ones_like(weight[0]) if norm is None or norm.weight is None else norm.weight.double()
    if norm is not None and norm.bias is not None:
        shift = weight @ norm.bias.double()
        _set(layer, "bias", shift if layer.bias is None else layer.bias.double() + shift, layer.weight)
    _set(layer, "weight", rotation(weight * gain), layer.weight)
    _keep(layer, "input", InputFold(rotation, gain))


def _fold_output(
    layer: nn.Linear | nn.Conv2d, rotation: Rotation, scale: Tensor | None = None, centred: bool = False, start: int = 0
) -> None:
    """Fold a scale, centring and a rotation of output channels ``start`` and on into a layer."""
    width = len(rotation.signs)
    scale = torch.ones_like(rotation.signs) if scale is None else scale

    def folded(channels: Tensor) -> tuple[Tensor, Tensor]:
        channels = channels.clone()
        scaled = channels[..., start : start + width] * scale
        mean = scaled.mean(-1, keepdim=True) * centred
        channels[..., start : start + width] = rotation(scaled - mean)
        return channels, mean

    weight, mean = folded(layer.weight.double().flatten(1).T)
    _set(layer, "weight", weight.T.reshape(layer.weight.shape), layer.weight)
    if layer.bias is not None:
        _set(layer, "bias", folded(layer.bias.double())[0], layer.weight)
    _keep(layer, "output", OutputFold(rotation, scale, mean, start))


def _draw(channels: int, generator: torch.Generator) -> Rotation:
    return Rotation(*randomized_hadamard(channels, generator))


def _mixes_channels(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _set(owner: nn.Module, name: str, value: Tensor, like: Tensor) -> None:
    """Put a new parameter of one's own, so that a tied partner keeps the old one."""
    setattr(owner, name, nn.Parameter(value.to(like.dtype), requires_grad=like.requires_grad))


def _keep(layer: nn.Module, side: str, fold: nn.Module) -> None:
    """File what was folded into a layer with the layer, in copies of its dtype."""
    folds = layer._modules.setdefault("folds", nn.ModuleDict())
    assert isinstance(folds, nn.ModuleDict)
    folds[side] = copy.deepcopy(fold).to(layer.weight.dtype)  # type: ignore[arg-type]


def _replace(slot: Slot, module: nn.Module) -> None:
    """Put a module in another one's place."""
    setattr(*slot, module.train(getattr(*slot).training))
