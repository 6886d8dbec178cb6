"""Layers that carry the error of a quantization instead of being quantized: what the controls put in a model's place.

A control takes a quantized twin of the model as its pattern, and leaves the twin's grids in its quantizers, so that coverage
and clipping are told as those of the pattern.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.blocks import BlockWatcher, KeptActivations
from lightning_vlmq.quant.calibrating import Batch, calibrate
from lightning_vlmq.quant.fake_quant import FakeQuantizer
from lightning_vlmq.quant.layers import QuantConv2d, QuantizedLayer, quantized_layers
from lightning_vlmq.quant.methods import METHODS
from lightning_vlmq.quant.scheme import QuantScheme
from lightning_vlmq.spectral import TotalMoments, draw_noise
from lightning_vlmq.statistics.resamples import seeded_generator

Pattern = Literal["minmax", "percentile", "mse", "gptq", "hqq"]
"""Methods whose layers keep full precision's coordinates, so that their errors can be carried over layer by layer."""
STREAMS = 100_000
"""Random streams of one draw; a layer has two of them."""


class Imitation(FakeQuantizer):
    """In a quantizer's place: adds noise of the quantizer's power, or a fixed change, to what passes.

    Attributes:
        change: added to a weight, in its shape; or ``None``.
        error: the weight's rounding error, whose rows' norms (or entries' sizes) drawn noise has; or ``None``.
        feedback: what columns owe to those before them, ``[groups, K, K]``, where rounding made up for its errors as GPTQ does;
            noise is drawn in the place of the rounding errors and made up for likewise. Or ``None``.
        power: mean square of an activation's noise, a scalar.
        factor: on all noise and on the change, a scalar.
        distribution: of drawn noise, see :data:`~lightning_vlmq.spectral.DISTRIBUTIONS`.
        is_redrawn: whether every forward draws anew; else the same noise comes each time.
        seed: of all noise.
        stream: which of the seed's streams is this quantizer's.
    """

    change: Tensor | None
    error: Tensor | None
    feedback: Tensor | None
    power: Tensor
    factor: Tensor
    distribution: str
    is_redrawn: bool
    seed: int
    stream: int
    _drawn: int
    has_integers = False

    @classmethod
    def of(cls, quantizer: FakeQuantizer) -> Imitation:
        """One that adds nothing yet, with the grid of a fitted quantizer."""
        made = cls.__new__(cls)
        made.__dict__.update(copy.deepcopy(quantizer).__dict__)
        device = made.scale.device
        for name in ("change", "error", "feedback"):
            made.register_buffer(name, None)
        for name, value in (("power", torch.zeros(())), ("factor", torch.ones(()))):
            made.register_buffer(name, value.to(device))
        made.distribution, made.is_redrawn, made.seed, made.stream, made._drawn = "gaussian", False, 0, 0, 0
        made.enabled = made.quantizes
        return made

    def set_factor(self, factor: Tensor) -> None:
        """Take another factor, a scalar; a layer's weight is then made anew."""
        self.factor.copy_(factor)
        self.zero_point.add_(0)  # a new version: a layer keeps its weight only as long as versions stay

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with the noise or the change added, in its shape and dtype."""
        if not self.enabled:
            return x
        if self.change is not None:
            return x + (self.factor * self.change).to(x.dtype)
        if self.error is None and self.power == 0:
            return x
        generator = seeded_generator(self.seed, self.stream + STREAMS * self._drawn)
        if self.is_redrawn:
            self._drawn += 1
            with torch.no_grad():
                self.zero_point.add_(0)  # a new version: a layer keeps its weight only as long as versions stay
        if self.error is not None:
            noise = draw_noise(self.error.double(), self.distribution, generator)
            if self.feedback is not None:
                noise = made_up_for(noise, self.feedback)
            noise = noise.view(x.shape)
        elif self.distribution == "sign_flip":
            noise = (super().forward(x).double() - x.double()).abs()
            noise = noise * draw_noise(torch.ones_like(noise), "sign_flip", generator)
        else:
            draw = torch.randn if self.distribution == "gaussian" else _unit_uniform
            # in single precision: in double, drawing takes five times as long as the layer's product
            noise = draw(x.shape, generator=generator, dtype=torch.float32).to(x.device) * self.power.sqrt()
        return x + (self.factor * noise).to(x.dtype)


def made_up_for(rounding: Tensor, feedback: Tensor) -> Tensor:
    """What GPTQ's rounding errors ``[outputs, K]`` leave of error on a weight, once later columns have made up for them.

    With a column's error ``e_c`` it rounds ``w_c - sum over j < c of e_j U_jc``, U being the feedback, so that ``e U`` is what
    rounding did.
    """
    by_group = rounding.to(feedback.dtype).view(len(feedback), -1, feedback.shape[-1])
    solved = torch.linalg.solve_triangular(feedback, by_group, upper=True, left=False, unitriangular=True)
    return solved.reshape(rounding.shape)


def _unit_uniform(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return (torch.rand(shape, generator=generator, dtype=dtype) - 0.5) * 12**0.5


def quantized_twin(vlm: VLM, pattern: str, scheme: QuantScheme, calibration: Sequence[Batch]) -> VLM:
    """A copy of the model, quantized; the tokenizer is shared."""
    if scheme.attention != "float":
        raise VLMQError("a control changes layers alone, and no products of attention; set attention to float")
    twin = copy.deepcopy(vlm, {id(vlm._tokenize): vlm._tokenize})
    METHODS[pattern].prepare(twin, scheme, calibration)
    return twin


def imitate(vlm: VLM, twin: VLM) -> dict[str, QuantizedLayer]:
    """Give the quantized layers of a model imitations in place of their quantizers, with the twin's grids; by name."""
    patterns = quantized_layers(twin)
    layers = quantized_layers(vlm)
    for name, layer in layers.items():
        layer.weight_fake_quant = Imitation.of(patterns[name].weight_fake_quant)
        layer.act_fake_quant = Imitation.of(patterns[name].act_fake_quant)
    return layers


class ErrorObserver:
    """Errors of one quantized layer on full-precision inputs.

    Args:
        layer: the quantized layer.
        weight: full precision's weight.

    Attributes:
        seen: values taken in.
    """

    def __init__(self, layer: QuantizedLayer, weight: Tensor) -> None:
        self._layer, self._weight = layer, weight.detach()
        self._input, self._output, self.seen, self._vectors = 0.0, 0.0, 0, 0

    def observe(self, x: Tensor) -> None:
        """Take in one batch of the layer's inputs."""
        layer = self._layer
        rounded = layer.act_fake_quant(x)
        error = _product(layer, rounded, layer.effective_weight()) - _product(layer, x, self._weight)
        self._input += float((rounded.double() - x.double()).square().sum())
        self._output += float(error.double().square().sum())
        self.seen += x.numel()
        self._vectors += error.numel() // len(self._weight)

    @property
    def input_power(self) -> float:
        """Mean square of the input's rounding error."""
        return self._input / self.seen

    @property
    def output_error(self) -> float:
        """Mean squared error of an output vector, summed over outputs, of weight and input together."""
        return self._output / self._vectors


def _product(layer: QuantizedLayer, x: Tensor, weight: Tensor) -> Tensor:
    return layer._conv_forward(x, weight, None) if isinstance(layer, QuantConv2d) else F.linear(x, weight)


def observe_errors(
    twin: VLM, weights: Mapping[str, Tensor], scheme: QuantScheme, calibration: Sequence[Batch]
) -> dict[str, ErrorObserver]:
    """The errors of every quantized layer of the twin, each alone on full-precision inputs, by name.

    Args:
        twin: the quantized model.
        weights: full precision's weights by layer name.
        scheme: its scope says which towers run.
        calibration: batches.
    """
    observers = {name: ErrorObserver(layer, weights[name]) for name, layer in quantized_layers(twin).items()}
    plain = copy.deepcopy(
        twin, {id(twin._tokenize): twin._tokenize}
    )  # observers look at the twin's layers, which stay on
    for name, layer in quantized_layers(plain).items():
        layer.set_weight(
            weights[name]
        )  # a method may have put rounded weights there; inputs are to be full precision's
    calibrate(plain, scheme, calibration, observers)
    return observers


class SiteErrors:
    """SQNR of a model against full precision after every block and at the outputs of the scope's towers, in decibels.

    Full precision is run once, however many models are asked about, where its activations fit into memory.

    Args:
        reference: full precision.
        scheme: its towers are looked at.
        calibration: batches that all models are run over.
    """

    def __init__(self, reference: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        self.reference, self.scheme, self.calibration = reference, scheme, calibration
        self._full = {tower: KeptActivations() for tower in scheme.towers}

    def of(self, vlm: VLM) -> dict[str, float]:
        """By site; infinite where a model has no error."""
        found: dict[str, TotalMoments] = {}
        for tower in self.scheme.towers:
            watcher = BlockWatcher(self.reference, vlm, tower, fourier=False, full=self._full[tower])
            for batch in self.calibration:
                inputs = batch["image" if tower == "vision" else "tokens"]
                for site, (z, q) in watcher.activations(inputs).items() if len(inputs) else ():
                    found.setdefault(site, TotalMoments(z.shape[-1], z.device)).update(z, q)
        return {site: moments.mean_sqnr_db for site, moments in found.items()}


def require_matched(
    pattern: Mapping[str, float], control: Mapping[str, float], tolerance: float, why: str = ""
) -> None:
    """Raise :class:`VLMQError`, naming the worst site, where a control's SQNR is further than the tolerance (dB) from its pattern's.

    Args:
        pattern: SQNR by site when quantized.
        control: SQNR by site with the control.
        tolerance: decibels.
        why: what is known of the cause.
    """
    gaps = {site: control[site] - level for site, level in pattern.items() if control[site] != level}
    worst = max(gaps, key=lambda site: abs(gaps[site]), default=None)
    if worst is not None and not abs(gaps[worst]) <= tolerance:
        raise VLMQError(
            f"the noise is no match: SQNR at {worst} is {control[worst]:.2f} dB, {pattern[worst]:.2f} dB when quantized, and "
            f"{tolerance:g} dB is allowed{f' ({why})' if why else ''}; give more calibration data or another distribution, or raise "
            "tolerance_db"
        )
