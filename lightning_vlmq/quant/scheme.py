"""What is quantized and how finely: bits, granularity, symmetry, the towers in scope, and what differs layer by layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from lightning_vlmq.core.errors import VLMQError, unknown

WEIGHT_GRANULARITIES = ("per_tensor", "per_channel", "per_group")
ACT_GRANULARITIES = ("per_tensor", "per_token")
SCOPES: dict[str, tuple[str, ...]] = {"vision": ("vision",), "vision_text": ("vision", "text")}
FIRST_LAST = ("same", "w8a8", "skip")
UNQUANTIZED_BITS = 16
_CHOICES: dict[str, Iterable[str]] = {
    "weight_granularity": WEIGHT_GRANULARITIES,
    "act_granularity": ACT_GRANULARITIES,
    "scope": SCOPES,
    "first_last": FIRST_LAST,
    "tower": SCOPES["vision_text"],
    "attention": ("float", "int8"),
}


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest integer level.

    Symmetric quantizers use the signed grid ``-2^(b-1) .. 2^(b-1)-1`` with zero point 0, the others the unsigned grid
    ``0 .. 2^b-1`` with an integer zero point (LSQ section 2 names the same two grids).

    Args:
        bits: number of bits, 2 to 8.
        symmetric: whether zero is fixed to level 0.
    """
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


@dataclass(frozen=True)
class LayerRule:
    """What differs for the layers whose name matches a pattern; a field left at ``None`` changes nothing.

    Attributes:
        pattern: shell-style, on qualified layer names: ``*`` any text, ``?`` any character, ``[ab]`` one of these, e.g.
            ``*.mlp.*`` or ``model.visual.conv1``.
        tower: ``vision`` or ``text``: only layers of this tower.
        weight_bits: 2 to 8, or 16 to leave these weights as they are.
        act_bits: 2 to 8, or 16 to leave these inputs as they are.
        weight_granularity: see :class:`QuantScheme`, like the fields after it.
        group_size: weights per group.
        act_granularity: ``per_tensor`` or ``per_token``.
        weight_symmetric: signed weight grid with zero point 0.
        act_symmetric: signed activation grid with zero point 0.
        act_dynamic: take activation ranges from each input.
        skip: ``true`` leaves the layer in full precision, ``false`` takes an earlier ``true`` back.

    Raises:
        VLMQError: for a value that the scheme would not take, or a rule that changes nothing.
    """

    pattern: str = "*"
    tower: str | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    weight_granularity: str | None = None
    group_size: int | None = None
    act_granularity: str | None = None
    weight_symmetric: bool | None = None
    act_symmetric: bool | None = None
    act_dynamic: bool | None = None
    skip: bool | None = None

    def __post_init__(self) -> None:
        _check_values({name: value for name, value in vars(self).items() if value is not None})
        if not self.changes and self.skip is None:
            raise VLMQError(f"override '{self.pattern}' changes nothing; give it bits, a granularity or skip: true")

    @property
    def changes(self) -> dict[str, Any]:
        """The scheme's fields that the rule sets."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("pattern", "tower", "skip")}
        return {name: value for name, value in values.items() if value is not None}

    def matches(self, names: Sequence[str], tower: str) -> bool:
        """Whether the rule is for a layer of this tower that goes by (one of) these qualified names."""
        return self.tower in (None, tower) and any(fnmatch.fnmatchcase(name, self.pattern) for name in names)

    def __str__(self) -> str:
        settings = self.changes | ({} if self.skip is None else {"skip": self.skip})
        where = self.pattern if self.tower is None else f"{self.tower}:{self.pattern}"
        return " ".join([where, *(f"{name}={value}" for name, value in settings.items())])


@dataclass(frozen=True)
class QuantScheme:
    """One point of the quantization grid.

    Attributes:
        weight_bits: 2 to 8, or 16 to leave weights as they are.
        act_bits: 2 to 8, or 16 to leave activations as they are.
        weight_granularity: what shares one weight step: ``per_tensor``, ``per_channel`` (an output channel) or
            ``per_group`` (``group_size`` consecutive weights of one output channel).
        group_size: weights per group; must divide every layer's weights per output channel, except for depth-wise
            convolutions and layers with fewer weights per channel, which get one group per output channel.
        act_granularity: ``per_tensor``, or ``per_token`` (one step for each token of a linear layer's input, for each
            image of a convolution's: a step has to be constant over what the layer sums). ``per_token`` ranges cannot
            be known beforehand, so they need ``act_dynamic``.
        weight_symmetric: signed weight grid with zero point 0.
        act_symmetric: signed activation grid with zero point 0.
        act_dynamic: take activation ranges from each input instead of from calibration.
        scope: ``vision`` or ``vision_text``.
        first_last: what the first and the last matrix layer of each tower get: ``same`` as the others, ``w8a8`` (at
            least 8 bits on both sides) or ``skip`` (full precision). Which they are:
            :func:`~lightning_vlmq.quant.rules.edge_layers`.
        overrides: what differs for layers picked by name; applied in order after ``first_last``, so that of two rules
            that set the same field the later one counts.
        attention: ``int8`` quantizes the products of attention too, queries, keys, values and probabilities in 8 bits; ``float``
            leaves them as they are. See :class:`~lightning_vlmq.quant.attention.AttentionProducts`.

    Raises:
        VLMQError: for a value outside these, or for both sides unquantized everywhere.
    """

    weight_bits: int = 8
    act_bits: int = 8
    weight_granularity: str = "per_channel"
    group_size: int = 32
    act_granularity: str = "per_tensor"
    weight_symmetric: bool = True
    act_symmetric: bool = False
    act_dynamic: bool = False
    scope: str = "vision"
    first_last: str = "same"
    overrides: Sequence[LayerRule] = ()
    attention: str = "float"

    def __post_init__(self) -> None:
        # lists come from YAML, mappings from JSON; a tuple of rules keeps the scheme hashable
        rules = tuple(LayerRule(**rule) if isinstance(rule, Mapping) else rule for rule in self.overrides)
        object.__setattr__(self, "overrides", rules)
        _check_values(vars(self))
        if not (self.quantizes or self.overrides):
            raise VLMQError("weight_bits and act_bits are both 16: nothing would be quantized; lower one of them")
        static = self.act_bits != UNQUANTIZED_BITS and not self.act_dynamic
        if static and self.act_granularity == "per_token":
            raise VLMQError("act_granularity per_token has no static ranges; set act_dynamic to true or use per_tensor")

    def of_layer(self, names: Sequence[str], tower: str, at_edge: bool = False) -> QuantScheme | None:
        """The scheme of one layer, with the rules that match it applied and none left.

        Args:
            names: the layer's qualified names.
            tower: ``vision`` or ``text``.
            at_edge: whether it is a first or last layer of its tower.

        Returns:
            ``None`` for a layer that stays in full precision: skipped, or with both sides at 16 bits.
        """
        changes: dict[str, Any] = {"first_last": "same", "overrides": ()}
        skip = at_edge and self.first_last == "skip"
        if at_edge and self.first_last == "w8a8":
            changes |= {"weight_bits": max(self.weight_bits, 8), "act_bits": max(self.act_bits, 8)}
        for rule in self.overrides:
            if rule.matches(names, tower):
                changes |= rule.changes
                skip = skip if rule.skip is None else rule.skip
        bits = {changes.get(side, getattr(self, side)) for side in ("weight_bits", "act_bits")}
        return None if skip or bits == {UNQUANTIZED_BITS} else replace(self, **changes)

    @property
    def quantizes(self) -> bool:
        """Whether weights or activations are quantized, rules aside."""
        return not self.weight_bits == self.act_bits == UNQUANTIZED_BITS

    @property
    def towers(self) -> tuple[str, ...]:
        """The towers in scope, ``("vision",)`` or ``("vision", "text")``."""
        return SCOPES[self.scope]

    @property
    def weight_range(self) -> tuple[int, int]:
        """Smallest and largest integer weight level."""
        return integer_range(self.weight_bits, self.weight_symmetric)

    @property
    def act_range(self) -> tuple[int, int]:
        """Smallest and largest integer activation level."""
        return integer_range(self.act_bits, self.act_symmetric)

    @property
    def variant(self) -> str:
        """What sets the scheme apart from the plain one of its bits and scope, in words; empty for that one."""
        plain = {f.name: f.default for f in fields(QuantScheme) if f.name not in ("weight_bits", "act_bits", "scope")}
        own = [
            f"{n}={getattr(self, n)}" for n, value in plain.items() if n != "overrides" and getattr(self, n) != value
        ]
        return ", ".join([*own, *map(str, self.overrides)])


def _check_values(values: Mapping[str, Any]) -> None:
    """Refuse the first value that its field does not take."""
    for side in ("weight_bits", "act_bits"):
        bits = values.get(side, UNQUANTIZED_BITS)
        whole = isinstance(bits, int) and not isinstance(bits, bool)
        if not whole or not (2 <= bits <= 8 or bits == UNQUANTIZED_BITS):
            raise VLMQError(f"{side} must be 2 to 8, or {UNQUANTIZED_BITS} to leave that side as it is; got {bits!r}")
    for name, known in _CHOICES.items():
        if name in values and values[name] not in known:
            raise unknown(name, str(values[name]), known)
    size = values.get("group_size", 2)
    if not isinstance(size, int) or isinstance(size, bool) or size < 2:
        raise VLMQError(f"group_size must be a whole number of at least 2; got {size!r}")


FULL_PRECISION = "fp32"
"""Method name of the model nothing was done to (scope ``"none"``, 32 bits)."""
