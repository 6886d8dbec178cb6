"""Outlier channels in the residual stream itself, planted by turning its strongest directions into single channels.

Scaling a channel of a pre-norm transformer's stream changes what every LayerNorm makes of it, whatever is done to gains and
writers: its variance is part of all the others. A rotation R that keeps the mean direction (R 1 = 1) does not: mean and variance
stay, so that a LayerNorm without gain commutes with it, ``LN(R x) = R LN(x)``, and gains belong as well to the layers behind
(Ashkboos et al. 2024, SliceGPT, arXiv 2401.15024, section 3.2). QuaRot (arXiv 2404.00456) takes R random, to spread what is
concentrated; here it is the opposite. How large the channels get is not a choice: the stream's own spectrum says it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.outliers import TOLERANCE, drawn_features
from lightning_vlmq.models.vlm import TOWERS, VLM
from lightning_vlmq.quant.rotation.residual import NoStream, Stream
from lightning_vlmq.quant.rotation.streams import find_stream


@torch.no_grad()
def concentrate_streams(vlm: VLM, channels: int = 2, seed: int = 0) -> dict[str, list[int]]:
    """Turn the strongest directions of each residual stream into channels of their own, in place; no feature changes but by rounding.

    The directions are those of the largest second moments of what the stream's norms read, less gains and biases, on drawn images and
    texts. Names, shapes and classes of all modules stay.

    Args:
        vlm: a full-precision model.
        channels: how many directions, and channels, of each stream.
        seed: of the drawing of channels.

    Returns:
        The channels by tower; a tower whose stream a rotation of weights alone does not reach is left out: one of convolutions (ALIGN's,
        ConvNeXt's) or with a norm at an end that no linear layer follows (CLIP's image tower starts with one).

    Raises:
        VLMQError: no tower has such a stream (with the reasons), or features would change.
    """
    if channels < 1:
        raise VLMQError(f"outliers need at least 1 channel; got {channels!r}")
    before, reasons, planted = drawn_features(vlm), [], {}
    generator = torch.Generator().manual_seed(seed)
    for tower in TOWERS:
        try:
            stream = _reached(find_stream(vlm, tower))
        except NoStream as reason:
            reasons.append(f"{tower}: {reason}")
            continue
        chosen = torch.randperm(stream.width, generator=generator)[:channels]
        _fold(stream, _concentrating(_second_moment(vlm, stream), chosen))
        planted[tower] = sorted(chosen.tolist())
    if not planted:
        raise VLMQError(f"'{vlm.name}' has no residual stream to plant outlier channels in ({'; '.join(reasons)})")
    if not all(bool(((new - old).abs() <= TOLERANCE).all()) for old, new in zip(before, drawn_features(vlm))):
        raise VLMQError(f"outlier channels in the residual streams of '{vlm.name}' would change its features")
    return planted


def _reached(stream: Stream) -> Stream:
    """The stream, if it can be rotated by weights alone."""
    if stream.entries:
        raise NoStream("a norm starts its stream")
    if stream.exits:
        raise NoStream("its stream leaves through a norm that no linear layer follows")
    for (owner, name), layers in stream.readers:
        norm = getattr(owner, name)
        if norm.weight is None:
            raise NoStream(f"its '{name}' has no gains")
        if norm.bias is not None and any(layer.bias is None for layer in layers) and bool((norm.weight == 0).any()):
            raise NoStream(f"its '{name}' has gains of zero")
    return stream


def _second_moment(vlm: VLM, stream: Stream) -> Tensor:
    """Of all that the stream's norms read, centred and of unit variance, ``[width, width]``, float64."""
    moment = torch.zeros(stream.width, stream.width, dtype=torch.float64)

    def add(norm: Any, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].double().cpu().flatten(0, -2)
        x = nn.functional.layer_norm(x, (stream.width,), eps=norm.eps)
        moment.add_(x.T @ x)

    norms = [getattr(*slot) for slot, _ in stream.readers]
    hooks = [norm.register_forward_pre_hook(partial(add, norm)) for norm in norms]
    try:
        drawn_features(vlm)
    finally:
        for hook in hooks:
            hook.remove()
    return moment


def _concentrating(moment: Tensor, chosen: Tensor) -> Tensor:
    """A rotation ``[width, width]`` with R 1 = 1 that takes the strongest directions to the chosen channels, in order.

    A product of Householder reflections, each of which takes a direction to the one nearest to its channel among those that are
    orthogonal to 1 and to the channels before.
    """
    width = len(moment)
    found = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, : len(chosen)]
    kept = [torch.full((width,), width**-0.5, dtype=torch.float64)]
    rotation = torch.eye(width, dtype=torch.float64)
    for column, channel in zip(found.T, chosen.tolist()):
        target = torch.zeros(width, dtype=torch.float64)
        target[channel] = 1
        source = rotation @ column
        for direction in kept:
            target -= (target @ direction) * direction
            source -= (source @ direction) * direction
        target, source = target / target.norm(), source / source.norm()
        mirror = source - target
        if mirror.norm() > 1e-12:
            mirror /= mirror.norm()
            rotation -= 2 * torch.outer(mirror, mirror @ rotation)
        kept.append(target)
    return rotation


def _fold(stream: Stream, rotation: Tensor) -> None:
    """Rotate a stream by the weights of what writes and reads, in place."""
    turn = rotation.to(stream.writers[0][0].weight.device)
    for owner, name in stream.tables:
        table = getattr(owner, name)
        table.copy_(table.double() @ turn.T)
    for writer, slot in stream.writers:
        scale = torch.ones(stream.width, dtype=torch.float64, device=turn.device)
        if slot is not None:
            gamma = getattr(*slot).gamma
            scale = gamma.double()
        writer.weight.copy_((turn @ (scale[:, None] * writer.weight.double().flatten(1))).view_as(writer.weight))
        if writer.bias is not None:
            writer.bias.copy_(turn @ (scale * writer.bias.double()))
        if slot is not None:
            gamma.copy_(torch.ones_like(gamma))
    for (owner, name), layers in stream.readers:
        norm = getattr(owner, name)
        gain, shift = norm.weight.double(), None if norm.bias is None else norm.bias.double()
        has_biases = all(layer.bias is not None for layer in layers)
        for layer in layers:
            if shift is not None and has_biases:
                layer.bias.copy_(layer.bias.double() + layer.weight.double() @ shift)
            layer.weight.copy_(layer.weight.double() * gain @ turn.T)
        norm.weight.copy_(torch.ones_like(norm.weight))
        if shift is not None:  # what no bias takes is the norm's own, seen through gain and rotation
            norm.bias.copy_(torch.zeros_like(shift) if has_biases else turn @ (shift / gain))
