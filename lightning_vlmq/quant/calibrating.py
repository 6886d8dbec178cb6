"""Running a VLM over calibration batches and watching what enters each quantized layer.

Observers keep running statistics, never the inputs, so calibration memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.fake_quant import all_finite
from lightning_vlmq.quant.layers import QuantizedLayer, quantized_layers
from lightning_vlmq.quant.scheme import QuantScheme

Batch = Mapping[str, Tensor]


class Observer(Protocol):
    """Running statistics of one layer's input."""

    def observe(self, x: Tensor) -> None:
        """Take in one batch of inputs, ``[batch, ...]``."""

    @property
    def seen(self) -> int:
        """Number of values taken in so far."""


class RangeObserver:
    """Running minimum and maximum of a layer's whole input.

    Attributes:
        minimum: smallest value seen, ``[1]``.
        maximum: largest value seen, ``[1]``.
        seen: number of values.
    """

    def __init__(self) -> None:
        self.minimum = torch.tensor([torch.inf])
        self.maximum = torch.tensor([-torch.inf])
        self.seen = 0

    def observe(self, x: Tensor) -> None:
        """Take in one batch of inputs, any shape."""
        low, high = torch.aminmax(x)
        self.minimum = torch.minimum(self.minimum.to(low.device), low.float())
        self.maximum = torch.maximum(self.maximum.to(high.device), high.float())
        self.seen += x.numel()


def calibrate(
    vlm: VLM, scheme: QuantScheme, batches: Iterable[Batch], observers: Mapping[str, Observer], what: str = "input"
) -> None:
    """Run the model's encoders over the batches while each observer watches one layer's input.

    Where text is in scope, a text decoder (CoCa's) runs too. Quantizers are switched off meanwhile, so that every layer
    sees full-precision inputs; a layer's ``input_transform`` is applied before its observer looks.

    Args:
        vlm: a model with quantized layers.
        scheme: its scope says whether the text tower runs too.
        batches: ``{"image": uint8 [B, 3, H, W], "tokens": int64 [B, L]}``; ``tokens`` only where text is in scope.
            Those without an image (B = 0) are passed over.
        observers: by layer name.
        what: the word for the watched quantity in messages.

    Raises:
        VLMQError: no batch, none with an image, or one without its columns; a layer that the encoders never run; inputs
            that are not finite.
    """
    layers = quantized_layers(vlm)
    device = next(vlm.parameters()).device
    hooks = [layers[name].register_forward_pre_hook(_watch(name, observers[name])) for name in observers]
    count = 0
    try:
        with torch.no_grad(), full_precision(vlm):
            for batch in batches:
                image = _column(batch, "image").to(device)
                if not len(image):
                    continue
                if "text" not in scheme.towers:
                    vlm.encode_image(image)
                elif vlm.has_decoder:  # runs both encoders on the way
                    vlm.caption_logits(vlm.image_tokens(image), _column(batch, "tokens").to(device))
                else:
                    vlm.encode_image(image)
                    vlm.encode_text(_column(batch, "tokens").to(device))
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise VLMQError(
            "the calibration data hold no batch with an image; give at least one image (and caption where text is in scope)"
        )
    unseen = [name for name, observer in observers.items() if not observer.seen]
    if unseen:
        raise VLMQError(
            f"layer '{unseen[0]}' got no {what} while calibrating ({len(unseen)} such); it is not on the encoders' path"
        )


@contextmanager
def full_precision(vlm: nn.Module) -> Iterator[None]:
    """Within the block, every quantizer passes its input through and the model is in evaluation mode."""
    quantizers = [
        q for layer in quantized_layers(vlm).values() for q in (layer.weight_fake_quant, layer.act_fake_quant)
    ]
    training = vlm.training
    try:
        for quantizer in quantizers:
            quantizer.enabled = False
        vlm.eval()
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enabled = quantizer.quantizes
        vlm.train(training)


def _watch(name: str, observer: Observer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, QuantizedLayer)
        x = module.input_transform(args[0])
        if not all_finite(x):
            raise VLMQError(
                f"layer '{name}' got a non-finite input while calibrating; check the weights and the images"
            )
        observer.observe(x)

    return hook


def _column(batch: Batch, key: str) -> Tensor:
    if key not in batch:
        raise VLMQError(
            f"a calibration batch has no '{key}' (it has {', '.join(batch) or 'nothing'}); give images and tokens"
        )
    return batch[key]
