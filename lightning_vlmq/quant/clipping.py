"""How much of what reaches a grid lies outside it: clipped shares of weights and layer inputs, and saturated zero points.

A grid made from statistics that do not fit each other can lose most of a layer's input and still look like a grid. So
every quantized model is asked, whatever its method: values further than half a step beyond the outermost levels are clipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch, calibrate
from lightning_vlmq.quant.fake_quant import FakeQuantizer, to_blocks
from lightning_vlmq.quant.layers import static_layers, weight_quantized_layers
from lightning_vlmq.quant.scheme import QuantScheme

REPORTED = 0.01
"""A grid that clips more than this share of its values is named in the coverage report."""
REFUSED = 0.25
"""A grid that clips more than this share of its values, is refused: the best 2-bit grid of normal values clips 5 %."""
ENOUGH = 1000
"""Inputs that have to be seen before a share of them says something."""


@dataclass(frozen=True)
class ClippedGrid:
    """A grid that clips more than :data:`REPORTED` of its values, or has no level on one side of zero where values lie.

    Attributes:
        layer: its name.
        side: ``weight`` or ``input``.
        share: of the values that are clipped, 0 to 1: of all weights, or of the inputs of the first calibration batch.
        saturated: whether the zero point is at an end of the grid though there are values on that end's side: more than
            :data:`REPORTED` of all are cut to zero.
    """

    layer: str
    side: str
    share: float
    saturated: bool

    def __str__(self) -> str:
        return f"{self.layer} {self.side} {self.share:.1%}" + (" (zero point saturated)" if self.saturated else "")


class ClippingObserver:
    """Counts which of a layer's inputs lie outside its grid, below and above.

    Attributes:
        seen: number of values.
    """

    def __init__(self, quantizer: FakeQuantizer) -> None:
        self._quantizer = quantizer
        self._counts = torch.zeros(2, dtype=torch.int64)
        self.seen = 0

    def observe(self, x: Tensor) -> None:
        """Take in one batch of inputs, any shape."""
        self._counts += torch.stack(count_clipped(x, self._quantizer)).cpu()
        self.seen += x.numel()

    @property
    def shares(self) -> tuple[float, float]:
        """Of all values, those clipped at the grid's lower and at its upper end."""
        below, above = (self._counts / max(self.seen, 1)).tolist()
        return below, above


@torch.no_grad()
def count_clipped(x: Tensor, quantizer: FakeQuantizer) -> tuple[Tensor, Tensor]:
    """Number of values more than half a step below the lowest and above the highest level; two int64 scalars."""
    blocks = to_blocks(x, quantizer.granularity)
    scale, offset, lo, hi = quantizer.grid(blocks)
    shift = 0.0 if offset is None else offset
    slack = 0.5 + 1e-3  # the extreme value of a min-max range is a rounding point, which float noise must not decide
    return (blocks < (lo - slack) * scale + shift).sum(), (blocks > (hi + slack) * scale + shift).sum()


def measure_clipping(vlm: VLM, scheme: QuantScheme, batches: Iterable[Batch]) -> tuple[ClippedGrid, ...]:
    """The clipping grids of a quantized model, in the model's order.

    Args:
        vlm: a model whose grids are fitted.
        scheme: its scope says whether the text tower runs too.
        batches: calibration batches, of which the first with an image is run through the model.
    """
    found = [_weight_grid(name, q.weight, q.weight_fake_quant) for name, q in weight_quantized_layers(vlm).items()]
    layers = static_layers(vlm)
    if layers:
        observers = {name: ClippingObserver(layer.act_fake_quant) for name, layer in layers.items()}
        calibrate(vlm, scheme, list(islice(_with_images(batches), 1)), observers)
        judged = {name: layer for name, layer in layers.items() if observers[name].seen >= ENOUGH}
        found += [_grid(name, "input", *observers[name].shares, layer.act_fake_quant) for name, layer in judged.items()]
    return tuple(grid for grid in found if grid.share > REPORTED or grid.saturated)


def require_usable(clipped: Iterable[ClippedGrid]) -> None:
    """Raise :class:`VLMQError` for grids that clip more than :data:`REFUSED` of their values."""
    useless = sorted((grid for grid in clipped if grid.share > REFUSED), key=lambda grid: -grid.share)
    if useless:
        named = ", ".join(map(str, useless[:3]))
        raise VLMQError(
            f"{len(useless)} quantization grids clip more than {REFUSED:.0%} of their values: {named}; choose other ranges, "
            "e.g. the start 'mse' or 'minmax', a higher share or a symmetric grid"
        )


def _weight_grid(name: str, weight: Tensor, quantizer: FakeQuantizer) -> ClippedGrid:
    below, above = (count.item() / weight.numel() for count in count_clipped(weight.detach(), quantizer))
    return _grid(name, "weight", below, above, quantizer)


def _grid(name: str, side: str, below: float, above: float, quantizer: FakeQuantizer) -> ClippedGrid:
    _, offset, lo, hi = quantizer.grid(torch.zeros(1, 1))
    # of several zero points, as a weight's blocks have, each end counts where all are at it
    at_low, at_high = bool(torch.as_tensor(lo >= 0).all()), bool(torch.as_tensor(hi <= 0).all())
    saturated = offset is None and ((at_low and below > REPORTED) or (at_high and above > REPORTED))
    return ClippedGrid(name, side, below + above, saturated)


def _with_images(batches: Iterable[Batch]) -> Iterator[Batch]:
    return (batch for batch in batches if "image" not in batch or len(batch["image"]))
