"""What is quantized and how finely: bits, granularity, symmetry and the towers in scope."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_vlmq.errors import VLMQError, unknown

WEIGHT_GRANULARITIES = ("per_tensor", "per_channel", "per_group")
ACT_GRANULARITIES = ("per_tensor", "per_token")
SCOPES: dict[str, tuple[str, ...]] = {"vision": ("vision",), "vision_text": ("vision", "text")}
UNQUANTIZED_BITS = 16


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

    Raises:
        VLMQError: for a value outside these, or for both sides unquantized.
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

    def __post_init__(self) -> None:
        for side in ("weight_bits", "act_bits"):
            bits = getattr(self, side)
            whole = isinstance(bits, int) and not isinstance(bits, bool)
            if not whole or not (2 <= bits <= 8 or bits == UNQUANTIZED_BITS):
                raise VLMQError(
                    f"{side} must be 2 to 8, or {UNQUANTIZED_BITS} to leave that side as it is; got {bits!r}"
                )
        if not (self.quantizes_weights or self.quantizes_acts):
            raise VLMQError("weight_bits and act_bits are both 16: nothing would be quantized; lower one of them")
        if self.weight_granularity not in WEIGHT_GRANULARITIES:
            raise unknown("weight_granularity", str(self.weight_granularity), WEIGHT_GRANULARITIES)
        if self.act_granularity not in ACT_GRANULARITIES:
            raise unknown("act_granularity", str(self.act_granularity), ACT_GRANULARITIES)
        if self.scope not in SCOPES:
            raise unknown("scope", str(self.scope), SCOPES)
        if not isinstance(self.group_size, int) or isinstance(self.group_size, bool) or self.group_size < 2:
            raise VLMQError(f"group_size must be a whole number of at least 2; got {self.group_size!r}")
        if self.quantizes_acts and self.act_granularity == "per_token" and not self.act_dynamic:
            raise VLMQError("act_granularity per_token has no static ranges; set act_dynamic to true or use per_tensor")

    @property
    def quantizes_weights(self) -> bool:
        """Whether weights are quantized."""
        return self.weight_bits != UNQUANTIZED_BITS

    @property
    def quantizes_acts(self) -> bool:
        """Whether activations are quantized."""
        return self.act_bits != UNQUANTIZED_BITS

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
    def label(self) -> str:
        """Bits in the field's shorthand, e.g. ``W4A8`` (``W4g32A8`` with groups of 32)."""
        group = f"g{self.group_size}" if self.weight_granularity == "per_group" and self.quantizes_weights else ""
        return f"W{self.weight_bits}{group}A{self.act_bits}"
