"""How learned grids move while a model trains: relative changes of steps and offsets, and what grids clip on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.clipping import count_clipped
from lightning_vlmq.quant.layers import QuantizedLayer, act_quantized_layers, weight_quantized_layers
from lightning_vlmq.quant.training import learned_quantizers

SHARES = (0.0, 0.05, 0.5, 0.95, 1.0)
"""Quantiles of the changes that a :class:`GridRecord` keeps."""


@dataclass(frozen=True)
class GridRecord:
    """Learned grids at one update.

    Attributes:
        step: updates made before.
        changes: by kind (``weight_steps``, ``activation_steps``, ``weight_offsets``, ``activation_offsets``), quantiles
            :data:`SHARES` of the change since the start: of a step relative to what it was (-0.1: a tenth smaller), of an
            offset in ranges of its grid at the start.
        medians: by kind, the median size of these changes.
        largest: by kind, the largest size.
        clipped: shares of values beyond their grid, 0 to 1: of ``weights``, and of ``inputs`` in this update's batch.
    """

    step: int
    changes: dict[str, tuple[float, ...]]
    medians: dict[str, float]
    largest: dict[str, float]
    clipped: dict[str, float]

    def scalars(self) -> dict[str, float]:
        """As scalars for a logger, by name."""
        told = {f"train/change/{kind}/median": value for kind, value in self.medians.items()}
        told |= {f"train/change/{kind}/largest": value for kind, value in self.largest.items()}
        return told | {f"train/clipped/{side}": share for side, share in self.clipped.items()}


Grids = list[tuple[Tensor, Tensor | None]]
"""Steps and offsets of learned grids, in the model's order."""


def learned_grids(vlm: VLM) -> Grids:
    """A copy of the learned grids of a model that :meth:`~lightning_vlmq.quant.QATMethod.prepare` returned."""
    return [
        (scale.detach().clone(), None if offset is None else offset.detach().clone())
        for scale, offset in ((q.scale, q.offset) for _, q in learned_quantizers(vlm))
    ]


class GridWatch:
    """Compares a model's learned grids with what they were at the start.

    Args:
        vlm: the model.
        start: what :func:`learned_grids` said of it then, on any device.
    """

    def __init__(self, vlm: VLM, start: Grids) -> None:
        self._vlm = vlm
        self._start = [
            (scale.to(q.scale), None if offset is None else offset.to(q.scale))
            for (_, q), (scale, offset) in zip(learned_quantizers(vlm), start, strict=True)
        ]
        self._inputs = torch.zeros(2, dtype=torch.int64)

    @contextmanager
    def inputs(self) -> Iterator[None]:
        """Count, within the block, which of the layers' inputs are clipped; the next record tells."""
        self._inputs.zero_()
        hooks = [
            layer.register_forward_pre_hook(partial(self._count)) for layer in act_quantized_layers(self._vlm).values()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _count(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, QuantizedLayer)
        x = layer.input_transform(args[0].detach())
        below, above = count_clipped(x, layer.act_fake_quant)
        self._inputs += torch.tensor([int(below + above), x.numel()])

    @torch.no_grad()
    def record(self, step: int) -> GridRecord:
        """The grids as they are after ``step`` updates."""
        parts: dict[str, list[Tensor]] = {}
        for (side, quantizer), (scale, offset) in zip(learned_quantizers(self._vlm), self._start, strict=True):
            parts.setdefault(f"{side}_steps", []).append(quantizer.scale / scale - 1)
            if quantizer.offset is not None and offset is not None and quantizer.offset.requires_grad:
                span = scale * (quantizer.qmax - quantizer.qmin)
                parts.setdefault(f"{side}_offsets", []).append((quantizer.offset - offset) / span)
        changes = {kind: torch.cat(values).float().cpu() for kind, values in parts.items()}
        weights = weight_quantized_layers(self._vlm).values()
        outside = sum(int(sum(count_clipped(layer.weight, layer.weight_fake_quant))) for layer in weights)
        clipped = {"weights": outside / max(sum(layer.weight.numel() for layer in weights), 1)}
        if self._inputs[1]:
            clipped["inputs"] = float(self._inputs[0] / self._inputs[1])
        return GridRecord(
            step,
            {kind: tuple(_quantiles(x)) for kind, x in changes.items()},
            {kind: float(x.abs().median()) for kind, x in changes.items()},
            {kind: float(x.abs().max()) for kind, x in changes.items()},
            clipped,
        )


def _quantiles(x: Tensor) -> list[float]:
    ordered = x.sort().values  # torch.quantile refuses more than 2^24 values
    return [float(ordered[round(share * (len(ordered) - 1))]) for share in SHARES]
