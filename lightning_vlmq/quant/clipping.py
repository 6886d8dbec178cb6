"""How much of what a grid was fitted to lies outside it: clipped shares of weights and layer inputs, and saturated zero points.

A grid made from statistics that do not fit each other can lose most of a layer's input and still look like a grid. So
every quantized model is asked, whatever its method: values further than half a step beyond the outermost levels are clipped.
Inputs are full precision's, from which the grid was made; that the inputs of a quantized model drift away from those is the
quantization's error, not the grid's fault. A trained model's are its own, on which its grids were learned.

Clipping is a trade, whose best is no fault either: the outermost quarter of a layer's values may lie in a range that is not worth a
level. A grid is useless, and refused, where it clips more than :data:`REFUSED` of its values, these lose more than :data:`LOST` of
their energy (as they do when cut to half), and all values together lose more than on the min-max grid of the same bits. So is one whose
zero point is saturated, at more than :data:`COSTLY` times that grid's error: a few large values on one side, which it keeps, are most of
the energy, and all on the other side are zeros. No range, whatever it was fitted to, has such a zero point; statistics of two ranges have.
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
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.layers import static_layers, weight_quantized_layers
from lightning_vlmq.quant.rounding import Clipping, block_range, quantize_dequantize, to_blocks
from lightning_vlmq.quant.scheme import QuantScheme

REPORTED = 0.01
"""A grid that clips more than this share of its values is named in the coverage report."""
COSTLY = 10.0
"""So is one with more than this many times the squared error of the min-max grid: what it clips may be rare and all that counts."""
REFUSED = 0.25
"""A grid may be refused where it clips more than this share of its values: the best 2-bit grid of normal values clips 5 %."""
LOST = 0.25
"""And these lose more than this share of their energy."""
ENOUGH = 1000
"""Inputs that have to be seen before a share of them says something."""


@dataclass(frozen=True)
class ClippedGrid:
    """A grid that clips more than :data:`REPORTED` of its values, or to no good, or has no level on one side of zero where values lie.

    Attributes:
        layer: its name.
        side: ``weight`` or ``input``.
        share: of the values that are clipped, 0 to 1: of all weights, or of the inputs of the first calibration batch.
        saturated: whether the zero point is at an end of the grid though there are values on that end's side: more than
            :data:`REPORTED` of all are cut to zero.
        lost: share of the clipped values' energy that clipping takes, 0 to 1.
        useless: whether the grid is to be refused.
        cost: squared error of all values over that of the min-max grid of the same bits, where it clips any; at most 1 where clipping
            pays.
    """

    layer: str
    side: str
    share: float
    saturated: bool
    lost: float = 0.0
    useless: bool = False
    cost: float = 0.0

    def __str__(self) -> str:
        said = f"{self.layer} {self.side} {self.share:.{1 if self.share > REPORTED else 3}%}"
        said += f", {self.cost:.0f} times min-max's error" if self.cost > COSTLY else ""
        return said + (" (zero point saturated)" if self.saturated else "")


class ClippingObserver:
    """Adds up what a grid does to a layer's inputs, batch by batch.

    Attributes:
        clipping: of all inputs so far.
    """

    def __init__(self, quantizer: FakeQuantizer) -> None:
        self._quantizer = quantizer
        self.clipping = Clipping()

    def observe(self, x: Tensor) -> None:
        """Take in one batch of inputs, any shape."""
        self.clipping = self.clipping + judge(x, self._quantizer)

    @property
    def seen(self) -> int:
        """Number of values."""
        return self.clipping.values


@torch.no_grad()
def count_clipped(x: Tensor, quantizer: FakeQuantizer) -> tuple[Tensor, Tensor]:
    """Number of values more than half a step below the lowest and above the highest level; two int64 scalars."""
    below, above = _outside(to_blocks(quantizer.to_round(x), quantizer.granularity), quantizer)
    return below.sum(), above.sum()


@torch.no_grad()
def judge(x: Tensor, quantizer: FakeQuantizer) -> Clipping:
    """What a quantizer's grid clips of ``x``, a weight or input in its usual shape, and what that costs."""
    blocks = to_blocks(quantizer.to_round(x), quantizer.granularity)
    below, above = _outside(blocks, quantizer)
    low_count, high_count = int(below.sum()), int(above.sum())
    if not low_count + high_count:
        return Clipping(values=x.numel())
    low, high = block_range(blocks, quantizer.granularity)
    change = (quantize_dequantize(blocks, *quantizer.grid(blocks)) - blocks).square()
    unclipped = (quantizer.round_within(blocks, low, high) - blocks).square().sum(dtype=torch.float64).item()
    outside = below | above
    energy, lost = (part[outside].sum(dtype=torch.float64).item() for part in (blocks.square(), change))
    return Clipping(x.numel(), low_count, high_count, energy, lost, change.sum(dtype=torch.float64).item(), unclipped)


def _outside(blocks: Tensor, quantizer: FakeQuantizer) -> tuple[Tensor, Tensor]:
    scale, offset, lo, hi = quantizer.grid(blocks)
    shift = 0.0 if offset is None else offset
    slack = 0.5 + 1e-3  # the extreme value of a min-max range is a rounding point, which float noise must not decide
    return blocks < (lo - slack) * scale + shift, blocks > (hi + slack) * scale + shift


def note_clipping(vlm: VLM, scheme: QuantScheme, batches: Iterable[Batch], is_trained: bool = False) -> None:
    """Note, in each static input quantizer, what its grid clips of full precision's inputs in the first batch with an image.

    To be called when these grids are fitted, before weights are rounded; and of a trained model, whose inputs are then its own, when
    training has ended.
    """
    if is_trained:
        for layer in weight_quantized_layers(vlm).values():
            layer.weight_fake_quant.clipping = None  # of the weights that training began with
    layers = static_layers(vlm)
    if not layers:
        return
    observers = {name: ClippingObserver(layer.act_fake_quant) for name, layer in layers.items()}
    calibrate(vlm, scheme, list(islice(_with_images(batches), 1)), observers, quantizes=is_trained)
    for name, layer in layers.items():
        layer.act_fake_quant.clipping = observers[name].clipping


def measure_clipping(vlm: VLM) -> tuple[ClippedGrid, ...]:
    """The clipping grids of a quantized model: of its weights as they are, and of inputs as :func:`note_clipping` found them.

    Of weights that GPTQ put on the grid: as they were before.
    """
    found = []
    for name, layer in weight_quantized_layers(vlm).items():
        quantizer = layer.weight_fake_quant
        fitted = quantizer.clipping or judge(layer.weight.detach(), quantizer)
        found.append(_grid(name, "weight", fitted, quantizer))
    for name, layer in static_layers(vlm).items():
        clipping = layer.act_fake_quant.clipping
        if clipping is not None and clipping.values >= ENOUGH:
            found.append(_grid(name, "input", clipping, layer.act_fake_quant))
    return tuple(grid for grid in found if grid.share > REPORTED or grid.saturated or grid.cost > COSTLY)


def require_usable(clipped: Iterable[ClippedGrid]) -> None:
    """Raise :class:`VLMQError` for grids that are useless."""
    useless = sorted((grid for grid in clipped if grid.useless), key=lambda grid: -grid.share)
    if useless:
        named = ", ".join(map(str, useless[:3]))
        raise VLMQError(
            f"{len(useless)} quantization grids clip more than {REFUSED:.0%} of their values to less than half, or one side of zero to "
            f"zeros at more than {COSTLY:.0f} times min-max's error: {named}; choose other ranges, e.g. the start 'mse' "
            "or 'minmax', a higher share or a symmetric grid"
        )


def _grid(name: str, side: str, clipping: Clipping, quantizer: FakeQuantizer) -> ClippedGrid:
    _, offset, lo, hi = quantizer.grid(torch.zeros(1, 1))
    # of several zero points, as a weight's blocks have, each end counts where all are at it
    at_low, at_high = bool(torch.as_tensor(lo >= 0).all()), bool(torch.as_tensor(hi <= 0).all())
    below, above = clipping.shares
    saturated = offset is None and ((at_low and below > REPORTED) or (at_high and above > REPORTED))
    cut_off = below + above > REFUSED and clipping.lost > LOST and clipping.error > clipping.minmax_error
    cost = clipping.error / max(clipping.minmax_error, 1e-30)  # no error at all where all values are levels
    return ClippedGrid(
        name, side, below + above, saturated, clipping.lost, cut_off or (saturated and cost > COSTLY), cost
    )


def _with_images(batches: Iterable[Batch]) -> Iterator[Batch]:
    return (batch for batch in batches if "image" not in batch or len(batch["image"]))
