"""The identity of a run, and the columns of what is stored of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from lightning_vlmq.core.names import bits_text
from lightning_vlmq.quant.scheme import FULL_PRECISION

_RUN_COLUMNS = [
    ("model", pa.string()),
    ("pretrained", pa.string()),
    ("scope", pa.string()),
    ("method", pa.string()),
    ("weight_bits", pa.int32()),
    ("act_bits", pa.int32()),
    ("variant", pa.string()),
    ("is_tuned", pa.bool_()),
]


_SET_COLUMNS = [
    ("dataset", pa.string()),
    ("role", pa.string()),
    ("corruption", pa.string()),
    ("severity", pa.int32()),
]


ROW_SCHEMA = pa.schema(
    [
        *_RUN_COLUMNS,
        *_SET_COLUMNS,
        ("score", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("stderr", pa.float64()),
        ("n", pa.int64()),
        ("seed", pa.int64()),
        ("code_version", pa.string()),
        ("run_id", pa.string()),
    ]
)
"""Columns of a results row. ``value`` and ``stderr`` may be NaN (undefined, e.g. AUROC of an empty set)."""


SAMPLE_SCHEMA = pa.schema(
    [
        *_SET_COLUMNS,
        ("group", pa.string()),
        ("index", pa.int64()),
        ("target", pa.int64()),
        ("prediction", pa.int64()),
        ("confidence", pa.float32()),
        ("correct", pa.bool_()),
        ("correct_top5", pa.bool_()),
        ("nll", pa.float32()),
        ("brier", pa.float32()),
        ("kl", pa.float32()),
    ]
)
"""Columns every per-sample record has; each further column is one OOD score (float32, higher = in-distribution).

Sets of one ``group`` are of the same scenes, see :class:`~lightning_vlmq.data.EvalSet`.
"""


CURVE_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("layer", pa.string()),
        ("group", pa.string()),
        ("x", pa.float64()),
        ("y", pa.float64()),
        ("y_reference", pa.float64()),
    ]
)
"""Columns of a point on a curve, e.g. kind ``"singular_values"``: x = rank, y = quantized, reference = FP32."""


@dataclass(frozen=True)
class RunKey:
    """What was evaluated: one VLM, quantized one way, with one seed.

    Attributes:
        model: VLM name, e.g. ``"vit_clean"``.
        pretrained: where its weights come from, e.g. ``"laion2b_s34b_b79k"``.
        scope: which towers are quantized: ``"vision"``, ``"vision_text"``, or ``"none"`` for full precision.
        method: quantization method's name, ``"fp32"`` for full precision.
        weight_bits: bits per weight (32 for full precision).
        act_bits: bits per activation (32 for full precision).
        seed: seed of calibration, training and evaluation.
        variant: what else sets the quantization scheme apart (granularity, rules for layers), empty for the plain one.
        is_tuned: whether the logit scale was tuned on the calibration pairs (LST).
    """

    model: str
    pretrained: str
    scope: str
    method: str
    weight_bits: int
    act_bits: int
    seed: int
    variant: str = ""
    is_tuned: bool = False

    @property
    def bits(self) -> str:
        """The bit-widths the way they are written in papers, e.g. ``"W4A8"``."""
        return bits_text(self.weight_bits, self.act_bits)

    @property
    def is_full_precision(self) -> bool:
        """Whether this is the model nothing was done to."""
        return self.method == FULL_PRECISION and not self.is_tuned

    @property
    def tuned(self) -> RunKey:
        """The same model with its logit scale tuned."""
        return replace(self, is_tuned=True)

    def columns(self) -> dict[str, str | int | bool]:
        """The key as results columns, in the dataclass's order."""
        return asdict(self)
