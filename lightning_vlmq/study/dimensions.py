"""The reliability dimensions, and the one number that stands for each in figures and summaries."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_vlmq.study.measures import Measure


@dataclass(frozen=True)
class Dimension:
    """A reliability dimension.

    Attributes:
        title: what the dimension is called.
        measure: the number that stands for it.
        effect: how its effect is written, with the unit.
        heading: the measure's name where there is little room.
    """

    title: str
    measure: Measure
    effect: str
    heading: str


def dimensions(score: str) -> list[Dimension]:
    """The reliability dimensions in display order; ``score`` is the OOD score that stands for detection."""
    return [
        Dimension("Accuracy", Measure("top1", "id"), "δ top-1, %", "top-1"),
        Dimension("Calibration", Measure("ece", "id"), "δ ECE, %", "ECE"),
        Dimension("Near-OOD detection", Measure("auroc", "near_ood", "", score), "δ AUROC, %", "AUROC near"),
        Dimension("Far-OOD detection", Measure("auroc", "far_ood", "", score), "δ AUROC, %", "AUROC far"),
        Dimension("Corruptions", Measure("top1", "corruption"), "δ top-1, %", "corrupted"),
        Dimension("Semantic shift", Measure("top1", "shift"), "δ top-1, %", "shifted"),
        Dimension("Spurious correlation", Measure("rsg", "spurious"), "ΔRSG, points", "RSG"),
    ]
