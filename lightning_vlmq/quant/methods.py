"""What a quantization method is: a frozen dataclass whose fields are its paper's options, filed under a name.

A method overrides the steps it is about and inherits round-to-nearest with min-max ranges for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch

from lightning_vlmq.core.calls import call_text, parse_call
from lightning_vlmq.core.errors import VLMQError, unknown
from lightning_vlmq.core.registry import Registry
from lightning_vlmq.models.vlm import VLM
from lightning_vlmq.quant.attention import install_attention, static_products
from lightning_vlmq.quant.calibrating import Batch, RangeObserver, calibrate, run_once
from lightning_vlmq.quant.clipping import note_clipping
from lightning_vlmq.quant.layers import QuantizedLayer, static_layers, swap_layers, weight_quantized_layers
from lightning_vlmq.quant.rounding import block_range, to_blocks
from lightning_vlmq.quant.scheme import QuantScheme

METHODS: Registry[PTQMethod] = Registry("method")
"""Every method with its default options, by name."""

Method = TypeVar("Method", bound="type[PTQMethod]")


def register(name: str, **options: Any) -> Callable[[Method], Method]:
    """Class decorator that files a method, with these of its options, under a name; a class may have several."""

    def file(method: Method) -> Method:
        METHODS.register(name)(method(**options))
        return method

    return file


def find_method(text: str, options: Mapping[str, Any] | None = None) -> PTQMethod:
    """The method of a name, with other options than its own where some are given.

    Args:
        text: ``"gptq"``, or with options ``"gptq(damping=0.1)"``.
        options: further ones, which win.

    Raises:
        VLMQError: unknown method or option, or a value that the option does not take.
    """
    name, own = parse_call(text, "method")
    method, options = METHODS[name], own | dict(options or {})
    known = [f.name for f in fields(method)]
    for option in options:
        if option not in known:
            if not known:
                raise VLMQError(f"method '{name}' has no options, so none can be called '{option}'")
            raise unknown(f"option of method '{name}'", option, known)
    return replace(method, **options)


def within(default: float, low: float, high: float = math.inf) -> Any:
    """A numeric option: its default and the smallest and largest value it takes (both included)."""
    return field(default=default, metadata={"within": (low, high)})


@dataclass(frozen=True)
class PTQMethod:
    """Post-training quantization: install quantized layers, fit transforms, activation ranges, weights.

    Attributes:
        needs_training: whether it is only the start of a training.
        is_control: whether it only stands in for a quantization, to be compared with it.
        has_integers: whether all that it leaves of a weight is integers on a grid, as checkpoints and conversion need it.
        sees_batches: whether an image's features depend on its place in a batch, so that the batches are part of a run's identity.

    Raises:
        VLMQError: for an option of the wrong type or out of its range.
    """

    needs_training: ClassVar[bool] = False
    is_control: ClassVar[bool] = False
    has_integers: ClassVar[bool] = True
    sees_batches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            value = _checked(option.name, getattr(self, option.name), hints[option.name], option.metadata)
            object.__setattr__(self, option.name, value)

    @property
    def name(self) -> str:
        """The name that this method is filed under: of several, the one whose options differ least from these."""
        return self._filed()[0]

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from those that the name stands for."""
        return self._filed()[1]

    def __str__(self) -> str:
        return call_text(*self._filed())

    def _filed(self) -> tuple[str, dict[str, Any]]:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        candidates = [
            (name, {key: value for key, value in own.items() if value != getattr(METHODS[name], key)})
            for name in METHODS
            if type(METHODS[name]) is type(self)
        ]
        if not candidates:
            raise VLMQError(f"a {type(self).__name__} has no name; file it with @register")
        return min(candidates, key=lambda candidate: len(candidate[1]))

    def plan(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> QuantScheme:
        """The scheme with what the method decides of it: rules that give layers widths of their own; as given by default.

        Args:
            vlm: the full-precision model; not changed.
            scheme: as asked for.
            calibration: batches, see :meth:`prepare`.
        """
        return scheme

    def prepare(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> VLM:
        """Quantize a model in place (copy it first if the full-precision one is still needed).

        Args:
            vlm: the full-precision model.
            scheme: bits, granularities and scope.
            calibration: batches, run through as often as the method needs;
                ``{"image": uint8 [B, 3, H, W], "tokens": int64 [B, L]}``.

        Returns:
            The same model.

        Raises:
            VLMQError: what :func:`swap_layers` and :func:`calibrate` refuse.
        """
        self.install(vlm, scheme)
        install_attention(vlm, scheme, partial(run_once, vlm, scheme))
        with torch.no_grad():
            self.fit_transforms(vlm, scheme, calibration)
            fit_attention(vlm, scheme, calibration)
            if static_layers(vlm):
                self.fit_activations(vlm, scheme, calibration)
                note_clipping(vlm, scheme, calibration)  # while the weights are full precision's
            self.fit_weights(vlm, scheme, calibration)
        return vlm

    def install(self, vlm: VLM, scheme: QuantScheme) -> None:
        """Put quantized layers in place; a method may change the model into an equivalent one before or after."""
        swap_layers(vlm, scheme)

    def fit_transforms(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Move difficulty between a layer's input and weight before ranges are taken; nothing by default."""

    def fit_activations(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix the static activation grids, of which there is at least one; the extreme values by default."""
        layers = static_layers(vlm)
        observers = {name: RangeObserver() for name in layers}
        calibrate(vlm, scheme, calibration, observers)
        for name, observer in observers.items():
            layers[name].act_fake_quant.set_range(observer.minimum, observer.maximum)

    def fit_weights(self, vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
        """Fix the weight grids (and the weights, where a method rounds them itself); layer by layer by default."""
        for layer in weight_quantized_layers(vlm).values():
            self.fit_weight(layer)

    def fit_weight(self, layer: QuantizedLayer) -> None:
        """Fix one layer's weight grid; the smallest and largest value of each block by default."""
        quantizer = layer.weight_fake_quant
        quantizer.set_range(*block_range(to_blocks(layer.weight, quantizer.granularity), quantizer.granularity))


def fit_attention(vlm: VLM, scheme: QuantScheme, calibration: Sequence[Batch]) -> None:
    """Fix the static grids of attention products, where there are any, by the extreme values."""
    quantizers = static_products(vlm)
    if quantizers:
        observers = {name: RangeObserver() for name in quantizers}
        calibrate(vlm, scheme, calibration, observers)
        for name, observer in observers.items():
            quantizers[name].set_range(observer.minimum, observer.maximum)


def _checked(name: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    """An option's value, numbers as the type that the option has; :class:`VLMQError` for one that it does not take."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise unknown(f"value of option {name}", str(value), map(str, get_args(kind)))
        return value
    takes: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, takes) or (kind is not bool and isinstance(value, bool)):
        article = {float: "a number", int: "a whole number", bool: "true or false"}.get(kind, f"a {kind.__name__}")
        raise VLMQError(f"option {name} takes {article}; got {value!r}")
    low, high = limits.get("within", (-math.inf, math.inf))
    if kind in (int, float) and not low <= value <= high:
        bound = f"{low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
        raise VLMQError(f"option {name} takes {bound}; got {value!r}")
    return kind(value)
