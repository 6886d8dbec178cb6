"""Where training starts from: of several fits of the same quantized layers, the one that stays nearest to full precision."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import NO_IMAGE, Batch, column, full_precision
from lightning_vlmq.quant.fits import Fit, Grid
from lightning_vlmq.quant.layers import static_layers
from lightning_vlmq.quant.scheme import QuantScheme

log = logging.getLogger(__name__)

JUDGED = 512
"""Calibration pairs, at least, that fits are judged by, where there are as many."""
MARGIN = 0.1
"""By how much less, as a share, a loss has to be than that of the first fits for others to be chosen: a smaller gain on the pairs that all
fits were made with is as often as not a loss on others."""

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]], Tensor]
"""Of student's image and text features, the teacher's, the logit scale, and the teacher's of all pairs; see ``QATMethod.loss``."""


def keep_best(
    vlm: VLM,
    scheme: QuantScheme,
    calibration: Sequence[Batch],
    loss: Loss,
    inputs: Mapping[str, Callable[[], None]],
    weights: Callable[[], Mapping[str, Fit]],
) -> tuple[str, str]:
    """Fit static input grids and weights in each of several ways, and leave the pair of fits with the least loss.

    That is the first of each, unless another's loss is less by :data:`MARGIN`.

    Args:
        vlm: a model with quantized layers and full precision's weights.
        scheme: bits, granularities and scope.
        calibration: batches; the loss is a mean over the first of them, :data:`JUDGED` pairs or a little more.
        loss: the distillation loss; of images alone where the batches hold no tokens.
        inputs: by name, what fits all static input grids while the weights are full precision's; the plainest first.
        weights: gives fits of all weights and their grids, by name; the plainest first.

    Returns:
        The names of the fits that were left.

    Raises:
        VLMQError: no batch has an image, or no pair of fits has a finite loss.
    """
    device = next(vlm.parameters()).device
    judged = list(_first(calibration, device))
    training = vlm.training
    vlm.eval()
    with torch.no_grad(), full_precision(vlm):
        images = [vlm.encode_image(batch["image"]) for batch in judged]
        texts = [vlm.encode_text(b["tokens"]) if "tokens" in b else image for b, image in zip(judged, images)]
    pairs = torch.cat(images), torch.cat(texts)
    fitted_inputs: dict[str, list[Grid]] = {}
    for name, fit in inputs.items():
        fit()
        fitted_inputs[name] = [Grid(layer.act_fake_quant) for layer in static_layers(vlm).values()]
    fitted_weights = weights()

    def put(chosen: tuple[str, str]) -> None:
        for grid in fitted_inputs[chosen[0]]:
            grid.restore()
        fitted_weights[chosen[1]].restore()

    @torch.no_grad()
    def judge() -> float:
        total = 0.0
        for batch, image, text in zip(judged, images, texts):
            own = vlm.encode_text(column(batch, "tokens")) if "text" in scheme.towers else text
            found = loss(vlm.encode_image(batch["image"]), own, image, text, vlm.logit_scale(), pairs)
            total += float(found) * len(image)
        return total / len(pairs[0])

    losses: dict[tuple[str, str], float] = {}
    for chosen in product(fitted_inputs, fitted_weights):
        put(chosen)
        losses[chosen] = judge()
    vlm.train(training)
    best = min(losses, key=lambda chosen: (math.isnan(losses[chosen]), losses[chosen]))
    if not math.isfinite(losses[best]):
        raise VLMQError(
            "the loss is not a number from any start; check the weights and the calibration data for NaN or inf"
        )
    first = next(iter(losses))
    if not losses[best] < (1 - MARGIN) * losses[first] and math.isfinite(losses[first]):
        best = first
    put(best)
    told = ", ".join(f"{'/'.join(chosen)} {found:.3g}" for chosen, found in losses.items())
    log.info("training starts from %s grids of inputs and %s grids of weights (inputs/weights: %s)", *best, told)
    return best


def _first(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches with an image, on the device, until they hold :data:`JUDGED`."""
    seen = 0
    for batch in batches:
        if len(column(batch, "image")) and seen < JUDGED:
            yield {name: part.to(device) for name, part in batch.items()}
            seen += len(batch["image"])
    if not seen:
        raise VLMQError(NO_IMAGE)
