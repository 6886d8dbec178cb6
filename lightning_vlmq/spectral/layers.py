"""The matrix weights of a whole model, layer by layer, with the group each layer belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.spectral.weights import Spectrum, as_matrix, log_ratio, stacked_singular_values

STACK = 8
"""Weights of one shape decomposed at a time: bounds what their float64 copies take."""
_MLP = {"mlp", "fc1", "fc2", "c_fc", "ffn", "intermediate"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "out_proj", "qkv"}


def matrix_weights(model: nn.Module) -> dict[str, Tensor]:
    """What every layer multiplies its input with, by qualified layer name, in the order of the model.

    Args:
        model: any module. Layers with an ``effective_weight()`` method (quantized ones) give that, with their
            ``input_transform`` folded back in where they have one: scales and rotations that a method has moved between
            weight and input then cancel, and what differs from full precision is the quantization. Other
            ``nn.Linear`` and ``nn.Conv2d`` (and subclasses) give their ``weight``. From either, what a method has
            folded in from the layer's neighbours (``folds``, each with an ``original(weight)``) is taken out again, last
            first; channels that a gain of zero shuts out come back as zeros.

    Returns:
        float ``[out, in]`` or ``[out, in / groups, kh, kw]`` each, detached, on the model's device.

    Raises:
        VLMQError: if the input transform of a grouped convolution mixes channels of different groups.
    """
    weights = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if callable(effective := getattr(module, "effective_weight", None)):
                weight, transform = effective().detach(), getattr(module, "input_transform", None)
                if transform is not None and not isinstance(transform, nn.Identity):
                    weight = _fold_input_transform(name, weight, transform, getattr(module, "groups", 1))
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                weight = module.weight.detach()
            else:
                continue
            folds: Any = getattr(module, "folds", nn.ModuleDict())
            for fold in reversed(list(folds.values())):
                weight = fold.original(weight)
            weights[name] = weight
    return weights


def _fold_input_transform(name: str, weight: Tensor, transform: nn.Module, groups: int) -> Tensor:
    """The weight W' with ``W' x = W T(x)`` for a transform T that is linear in the input channels."""
    spatial = weight.ndim - 2
    unit = torch.eye(weight.shape[1] * groups, dtype=weight.dtype, device=weight.device)
    images = transform(unit.reshape(*unit.shape, *[1] * spatial)).flatten(1)  # row i is T applied to input channel i
    blocks = images.reshape(groups, len(unit) // groups, groups, -1).diagonal(dim1=0, dim2=2)  # [from, to, group]
    if blocks.count_nonzero() != images.count_nonzero():
        raise VLMQError(f"layer '{name}': its input transform mixes the convolution's groups and cannot be folded back")
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return torch.einsum("gok...,ikg->goi...", grouped, blocks).reshape(weight.shape)


def layer_group(name: str, weight: Tensor, tower: str | None) -> str:
    """The group whose spectra a layer is shown and averaged with: ``<tower>/<kind>``.

    Args:
        name: qualified name, e.g. ``"model.visual.transformer.resblocks.0.mlp.c_fc"``. The kind is read from its
            parts as open_clip, timm and transformers name them.
        weight: the layer's weight; four dimensions make a convolution.
        tower: ``"vision"``, ``"text"`` or ``None`` for neither (reported as ``"joint"``).

    Returns:
        kind ``"mlp"``, ``"attention"``, ``"conv"`` or ``"projection"`` (whatever is none of the others) after the
        tower; an MLP made of 1x1 convolutions is ``"mlp"``.
    """
    parts = name.split(".")
    if not _MLP.isdisjoint(parts):
        kind = "mlp"
    elif any("attn" in part or "attention" in part for part in parts) or not _ATTENTION.isdisjoint(parts):
        kind = "attention"
    elif weight.ndim == 4:
        kind = "conv"
    elif "output" in parts:  # BERT: attention.output is caught above, the other "output" ends the MLP
        kind = "mlp"
    else:
        kind = "projection"
    return f"{tower or 'joint'}/{kind}"


def weight_spectra(weights: Mapping[str, Tensor]) -> dict[str, Spectrum]:
    """Decompose every weight, those of one shape together.

    Args:
        weights: by layer name, see :func:`matrix_weights`.

    Returns:
        By layer name, in the order of ``weights``. A convolution's is that of its unrolled kernel matrix.

    Raises:
        VLMQError: naming the layer whose weight is no finite matrix.
    """
    alike: dict[tuple[torch.Size, torch.device], list[str]] = {}
    for name, weight in weights.items():
        try:
            alike.setdefault((as_matrix(weight).shape, weight.device), []).append(name)
        except VLMQError as error:
            raise VLMQError(f"layer '{name}': {error}") from error
    found: dict[str, Spectrum] = {}
    for names in alike.values():
        for start in range(0, len(names), STACK):
            part = names[start : start + STACK]
            values = stacked_singular_values([weights[name] for name in part])
            found |= {name: Spectrum(own) for name, own in zip(part, values)}
    return {name: found[name] for name in weights}


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """One layer's spectrum beside its reference.

    Args:
        name: qualified layer name.
        group: see :func:`layer_group`.
        spectrum: of the weight as the model uses it.
        reference: of the full-precision (or initial) weight; ``None`` where there is no layer of that name and number
            of singular values to compare with.
    """

    name: str
    group: str
    spectrum: Spectrum
    reference: Spectrum | None

    def log_ratio(self) -> Tensor:
        """``log2`` of the spectrum over its reference, ``[r]``, see :func:`~lightning_vlmq.spectral.log_ratio`.

        Raises:
            VLMQError: if there is no reference.
        """
        if self.reference is None:
            raise VLMQError(f"layer '{self.name}' has no reference spectrum; evaluate beside a full-precision model")
        return log_ratio(self.spectrum.singular_values, self.reference.singular_values)
