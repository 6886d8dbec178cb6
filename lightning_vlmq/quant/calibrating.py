"""Running a VLM over calibration batches and watching what enters each quantized layer.

Observers keep running statistics, never the inputs, so calibration memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.layers import QuantizedLayer, quantized_layers
from lightning_vlmq.quant.rounding import all_finite
from lightning_vlmq.quant.scheme import QuantScheme

Batch = Mapping[str, Tensor]
NO_IMAGE = (
    "the calibration data hold no batch with an image; give at least one image (and caption where text is in scope)"
)


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
    vlm: VLM,
    scheme: QuantScheme,
    batches: Iterable[Batch],
    observers: Mapping[str, Observer],
    what: str = "input",
    quantizes: bool = False,
) -> None:
    """Run the model's encoders over the batches while each observer watches the input of one layer, or of one quantizer.

    Where text is in scope, a text decoder (CoCa's) runs too. Quantizers are switched off meanwhile, so that every layer
    sees full-precision inputs, unless asked otherwise; a layer's ``input_transform`` is applied before its observer looks.

    Args:
        vlm: a model with quantized layers.
        scheme: its scope says whether the text tower runs too.
        batches: ``{"image": uint8 [B, 3, H, W], "tokens": int64 [B, L]}``; ``tokens`` only where text is in scope.
            Those without an image (B = 0) are passed over.
        observers: by the qualified name of a quantized layer, or of a quantizer on its own.
        what: the word for the watched quantity in messages.
        quantizes: whether quantizers stay on; the model is then to be in evaluation mode.

    Raises:
        VLMQError: no batch, none with an image, or one without its columns; a layer that the encoders never run; inputs
            that are not finite.
    """
    device = next(vlm.parameters()).device
    hooks = [vlm.get_submodule(name).register_forward_pre_hook(_watch(name, observers[name])) for name in observers]
    count = 0
    try:
        with torch.no_grad(), nullcontext() if quantizes else full_precision(vlm):
            for batch in batches:
                image = column(batch, "image").to(device)
                if not len(image):
                    continue
                tokens = column(batch, "tokens").to(device) if "text" in scheme.towers else None
                _run_encoders(vlm, image, tokens)
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise VLMQError(NO_IMAGE)
    unseen = [name for name, observer in observers.items() if not observer.seen]
    if unseen:
        raise VLMQError(
            f"layer '{unseen[0]}' got no {what} while calibrating ({len(unseen)} such); it is not on the encoders' path"
        )


def shared_inputs(vlm: VLM, scheme: QuantScheme) -> dict[str, list[str]]:
    """Quantized linear layers by whose input is the very same tensor, as that of a block's query, key and value layers.

    Found by one run on a blank image and a short text. Layers that already change their input at run time, each in a way
    of its own, share nothing; neither do convolutions.

    Returns:
        For the first quantized layer of each such set, in the model's order, the names of all of the set, itself first. A layer
        that shares its input with no other is a set of one.
    """
    layers = quantized_layers(vlm)
    inputs: dict[str, Tensor] = {}  # the tensors are kept, so that none takes the place of another

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: None if name in inputs else inputs.update({name: args[0]})

    alike = {n: q for n, q in layers.items() if isinstance(q, nn.Linear) and isinstance(q.input_transform, nn.Identity)}
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in alike.items()]
    try:
        run_once(vlm, scheme)
    finally:
        for hook in hooks:
            hook.remove()
    sets: dict[object, list[str]] = {}
    for name in layers:
        sets.setdefault(id(inputs[name]) if name in inputs else name, []).append(name)
    return {members[0]: members for members in sets.values()}


def run_once(vlm: VLM, scheme: QuantScheme) -> None:
    """Run the encoders in scope, in full precision, on a blank image and a short text."""
    device = next(vlm.parameters()).device
    image = torch.zeros(1, 3, vlm.image_size, vlm.image_size, dtype=torch.uint8, device=device)
    with torch.no_grad(), full_precision(vlm):
        _run_encoders(vlm, image, vlm.tokenize(["a photo"]).to(device) if "text" in scheme.towers else None)


def _run_encoders(vlm: VLM, image: Tensor, tokens: Tensor | None) -> None:
    """Run the image encoder and, given tokens, the text encoder, with a text decoder (CoCa's) where there is one."""
    if tokens is not None and vlm.has_decoder:  # runs both encoders on the way
        vlm.caption_logits(vlm.image_tokens(image), tokens)
        return
    vlm.encode_image(image)
    if tokens is not None:
        vlm.encode_text(tokens)


@contextmanager
def full_precision(vlm: nn.Module) -> Iterator[None]:
    """Within the block, every quantizer passes its input through and the model is in evaluation mode."""
    quantizers = [module for module in vlm.modules() if isinstance(module, FakeQuantizer)]
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
        x = module.input_transform(args[0]) if isinstance(module, QuantizedLayer) else args[0]
        if not all_finite(x):
            raise VLMQError(
                f"layer '{name}' got a non-finite input while calibrating; check the weights and the images"
            )
        observer.observe(x)

    return hook


def column(batch: Batch, key: str) -> Tensor:
    """A column of a batch. Raises :class:`VLMQError` where it has none of that name."""
    if key not in batch:
        raise VLMQError(
            f"a calibration batch has no '{key}' (it has {', '.join(batch) or 'nothing'}); give images and tokens"
        )
    return batch[key]
