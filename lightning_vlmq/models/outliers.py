"""Outlier channels planted in a model whose function stays the same: what large models have and small ones lack.

A few channels of the activations of large transformers are tens of times larger than the others (Dettmers et al. 2022, LLM.int8(),
arXiv 2208.07339, section 4), and per-tensor grids of layer inputs have to span them. They can be had anywhere: a LayerNorm's gain and
bias times ``f`` in one channel, and the weights of the layers that read this channel divided by ``f``, change no output.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import VLM

TOLERANCE = 1e-3
"""Largest change of a feature (unit norm) that rounding explains."""


@torch.no_grad()
def plant_outliers(vlm: VLM, factor: float, channels: int = 2, seed: int = 0) -> dict[str, list[int]]:
    """Make a few channels of every normalised layer input ``factor`` times as large, in place; no feature changes but by rounding.

    Norms whose output goes to linear layers and convolutions alone are found by running the model on drawn images and texts; one
    whose output is used otherwise too, so that features change, is left as it was.

    Args:
        vlm: a full-precision model.
        factor: at least 1; 1 changes nothing.
        channels: how many of each norm's channels, drawn for each norm.
        seed: of the drawing.

    Returns:
        The channels by the norm's name.

    Raises:
        VLMQError: a factor below 1, or no such norm.
    """
    if not (factor >= 1 and channels >= 1):
        raise VLMQError(f"outliers are factors of at least 1 in at least 1 channel; got {factor!r} in {channels!r}")
    before = drawn_features(vlm)
    generator = torch.Generator().manual_seed(seed)
    planted = {}
    for name, layers in _readers(vlm).items():
        norm = vlm.get_submodule(name)
        assert isinstance(norm, nn.LayerNorm)
        chosen = torch.randperm(norm.weight.numel(), generator=generator)[:channels].to(norm.weight.device)
        changed = [p for p in (norm.weight, norm.bias, *(layer.weight for layer in layers)) if p is not None]
        kept = [p.clone() for p in changed]
        norm.weight[chosen] *= factor
        if norm.bias is not None:
            norm.bias[chosen] *= factor
        for layer in layers:
            layer.weight[:, chosen] /= factor
        if all(bool(((new - old).abs() <= TOLERANCE).all()) for old, new in zip(before, drawn_features(vlm))):
            planted[name] = sorted(chosen.tolist())
        else:
            for parameter, old in zip(changed, kept):
                parameter.copy_(old)
    if not planted:
        raise VLMQError(f"'{vlm.name}' has no LayerNorm read by layers alone, so no outlier channels can be planted")
    return planted


def _readers(vlm: VLM) -> dict[str, list[nn.Linear | nn.Conv2d]]:
    """The layers that take each LayerNorm's very output, by the norm's name; norms that no layer reads are left out."""
    outputs: dict[str, Tensor] = {}
    readers: dict[str, list[nn.Linear | nn.Conv2d]] = {}

    def produced(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[name] = output

    def consumed(module: nn.Linear | nn.Conv2d, args: Sequence[Any]) -> None:
        for name, output in outputs.items():
            if args[0] is output and module not in readers.setdefault(name, []):
                readers[name].append(module)

    hooks = []
    for name, module in vlm.named_modules():
        if isinstance(module, nn.LayerNorm) and module.weight is not None and vlm.tower_of(name) is not None:
            hooks.append(module.register_forward_hook(partial(produced, name)))
        elif isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            hooks.append(module.register_forward_pre_hook(consumed))
    try:
        drawn_features(vlm)
    finally:
        for hook in hooks:
            hook.remove()
    return readers


@torch.no_grad()
def drawn_features(vlm: VLM) -> list[Tensor]:
    """Features of a drawn image and a text, and a decoder's logits (relative to the largest) where there is one."""
    device = next(vlm.parameters()).device
    shape = (2, 3, vlm.image_size, vlm.image_size)
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8).to(device)
    tokens = vlm.tokenize(["a photo", "a drawing of a shoe"]).to(device)
    training = vlm.training
    vlm.eval()
    found = [vlm.encode_image(images), vlm.encode_text(tokens)]
    if vlm.has_decoder:
        logits = vlm.caption_logits(vlm.image_tokens(images), tokens)
        found.append(logits / logits.abs().max())
    vlm.train(training)
    return found
