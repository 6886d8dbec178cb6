"""The one verb: :func:`quantize` a model, and what comes of it, :class:`Quantized`, which travels as one object."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch

from lightning_vlmq.core.calls import call_text
from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.calibrating import Batch
from lightning_vlmq.quant.clipping import measure_clipping, note_clipping, require_usable
from lightning_vlmq.quant.coverage import CoverageReport, assert_attention, assert_covered, measure_coverage
from lightning_vlmq.quant.layers import quantized_layers
from lightning_vlmq.quant.methods import METHODS, PTQMethod, find_method
from lightning_vlmq.quant.rounding import all_finite
from lightning_vlmq.quant.scheme import FULL_PRECISION, QuantScheme


@dataclass(frozen=True)
class Quantized:
    """How a model is quantized, and how much of it.

    Attributes:
        method: with its options; the very object that fitted the model and, for one with training, trains it.
        scheme: bits, granularities and scope, with the rules that the method added.
        coverage: what is quantized, and which grids clip.
    """

    method: PTQMethod
    scheme: QuantScheme
    coverage: CoverageReport


def quantize(
    vlm: VLM,
    method: str | PTQMethod,
    scheme: QuantScheme,
    calibration: Iterable[Batch],
    minimum_coverage: float = 0.95,
) -> Quantized:
    """Quantize a model in place, or set it up for quantization-aware training, and prove that it is covered.

    Args:
        vlm: full-precision model; changed in place.
        method: an object, or what :func:`~lightning_vlmq.quant.methods.find_method` takes: ``"minmax"``,
            ``"smoothquant(alpha=0.8)"``.
        scheme: bits, granularities and scope.
        calibration: batches ``{"image": uint8 [B, 3, H, W], "tokens": int64 [B, L]}``. A data loader or list is
            iterated as often as the method needs; a one-shot iterator is read into memory first.
        minimum_coverage: smallest share of the scope's matrix weights that has to be quantized.

    Raises:
        VLMQError: unknown method, weights or calibration data that are not finite, too little covered, a grid that clips
            so much that its layer is useless, products of attention that were to be quantized and are not, or a scheme the
            method does not take.
    """
    chosen = find_method(method) if isinstance(method, str) else method
    batches = cast("list[Batch]", list(calibration) if isinstance(calibration, Iterator) else calibration)
    scheme = chosen.plan(vlm, scheme, batches)
    chosen.prepare(vlm, scheme, batches)
    require_finite_layers(vlm)
    report = measure_coverage(vlm, measure_clipping(vlm))
    require_usable(report.clipped)
    assert_covered(report, scheme.scope, minimum_coverage)
    assert_attention(report, scheme)
    return Quantized(chosen, scheme, report)


def measured_again(vlm: VLM, quantized: Quantized, batches: Iterable[Batch]) -> Quantized:
    """The same quantization of a model that was trained since, with the grids that clip now; ``batches`` as in :func:`quantize`."""
    note_clipping(vlm, quantized.scheme, batches, is_trained=True)
    return replace(quantized, coverage=replace(quantized.coverage, clipped=measure_clipping(vlm)))


def require_finite_layers(vlm: VLM) -> None:
    """Raise :class:`VLMQError` naming the first quantized layer whose weight or static grid is not finite."""
    with torch.no_grad():
        for name, layer in quantized_layers(vlm).items():
            act = layer.act_fake_quant
            static = act.enabled and not act.dynamic
            if not all_finite(layer.effective_weight()) or (static and not all_finite(act.scale)):
                raise VLMQError(
                    f"layer '{name}' is not finite after quantization; check the weights and the calibration data"
                )


@dataclass(frozen=True)
class Quantization(QuantScheme):
    """How to quantize: a method with its options, and a point of the grid (the scheme's fields).

    Attributes:
        method: a name of the methods' table, with options in brackets if need be, ``smoothquant(alpha=0.8)``; or ``fp32`` for
            the model as it is, whatever the scheme says. Kept without the brackets.
        options: the method's options that are not to be what its name stands for, by name. Kept with those from the
            brackets, without those that change nothing.
        minimum_coverage: smallest share of the scope's matrix weights that has to be quantized.

    Raises:
        VLMQError: for an unknown method or option, or a value outside what it or :class:`~lightning_vlmq.quant.QuantScheme`
            takes.
    """

    method: str = FULL_PRECISION
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    minimum_coverage: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == FULL_PRECISION:
            if self.options:
                raise VLMQError(f"options {', '.join(self.options)} are given, but {FULL_PRECISION} has none")
            return
        if self.method.isidentifier() and self.method not in METHODS:
            raise unknown("method", self.method, [FULL_PRECISION, *METHODS])
        found = find_method(self.method, self.options)
        object.__setattr__(self, "method", found.name)
        object.__setattr__(self, "options", found.options)

    def chosen(self) -> PTQMethod:
        """The method with its options. Raises ``VLMQError`` for full precision, which has none."""
        return find_method(self.method, self.options)

    @property
    def text(self) -> str:
        """The method with its options, as :attr:`method` takes it."""
        return call_text(self.method, self.options)

    def identity(self) -> dict[str, Any]:
        """What decides the quantized model: every option of the method, given or not, and the scheme."""
        scheme = self.scheme()
        if scheme is None:
            return {"method": FULL_PRECISION}
        return {"method": self.chosen(), "scheme": scheme, "minimum_coverage": self.minimum_coverage}

    def scheme(self) -> QuantScheme | None:
        """The scheme alone, or ``None`` for full precision."""
        if self.method == FULL_PRECISION:
            return None
        return QuantScheme(**{f.name: getattr(self, f.name) for f in fields(QuantScheme)})

    @property
    def variant(self) -> str:
        """What sets this apart from the plain scheme and the method's own options, in words."""
        scheme = self.scheme()
        own = [f"{name}={value}" for name, value in self.options.items()]
        return ", ".join([*([scheme.variant] if scheme is not None and scheme.variant else []), *own])
