"""One way to quantize, as tables, figures and claims name it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, replace
from functools import cached_property

from lightning_vlmq.core.names import bits_text
from lightning_vlmq.quant.methods import METHODS
from lightning_vlmq.quant.scheme import SCOPES


@dataclass(frozen=True, order=True)
class Setting:
    """One way to quantize: a row of every table, a line of every figure.

    Attributes:
        method: method's name, ``"fp32"`` for full precision.
        weight_bits: bits per weight.
        act_bits: bits per activation.
        scope: which towers.
        variant: what else sets the scheme apart, empty for the plain one; see :class:`~lightning_vlmq.results.schema.RunKey`.
        is_tuned: whether the logit scale was tuned (LST).
    """

    method: str
    weight_bits: int
    act_bits: int
    scope: str
    variant: str = ""
    is_tuned: bool = False

    @property
    def tuned(self) -> Setting:
        """The same with the logit scale tuned."""
        return replace(self, is_tuned=True)

    @property
    def bits(self) -> str:
        """E.g. ``"W4A8"``."""
        return bits_text(self.weight_bits, self.act_bits)

    @property
    def surgery(self) -> str:
        """What was done to the error afterwards, e.g. ``"heal 0-8"``; empty for the model as it is."""
        return self.variant.rpartition("surgery=")[2] if "surgery=" in self.variant else ""

    @cached_property
    def is_quantization(self) -> bool:
        """Whether it is a model as it came or as a method made it: no control, and no surgery on its error."""
        return not self.surgery and not self.is_control

    @cached_property
    def is_control(self) -> bool:
        """Whether its method is a control of the study; a method that is not registered here is none."""
        return self.method in METHODS and METHODS[self.method].is_control

    @cached_property
    def is_trained(self) -> bool:
        """Whether its method trains; likewise."""
        return self.method in METHODS and METHODS[self.method].needs_training

    @property
    def details(self) -> str:
        """Everything but the method, e.g. ``"W4A8 vision"``; a long variant is cut."""
        return textwrap.shorten(f"{self.bits} {self.scope} {self.variant}", 70, placeholder=" …")

    @property
    def label(self) -> str:
        """E.g. ``"minmax W4A8 vision"``, ``"minmax+lst W4A8 vision"`` with a tuned logit scale."""
        return f"{self.method}{'+lst' if self.is_tuned else ''} {self.details}"

    @cached_property
    def sort_key(self) -> tuple[int, str, bool, int, int, str, int]:
        """Methods as the registry lists them, from many bits to few, small scopes first."""
        order = list(METHODS)
        known = order.index(self.method) if self.method in order else len(order)
        scopes = list(SCOPES)
        scope = scopes.index(self.scope) if self.scope in scopes else len(scopes)
        return known, self.method, self.is_tuned, -self.weight_bits, -self.act_bits, self.variant, scope
