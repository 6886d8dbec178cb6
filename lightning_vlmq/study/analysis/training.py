"""What training was worth: losses on held-out pairs before and after, and divergences beside those of methods that do not train."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from lightning_vlmq.quant.methods import METHODS
from lightning_vlmq.study.analysis.runs import StudyResults

BESIDE = ("minmax", "gptq")
"""Methods without training that trained ones are held against."""
START, END = "held_out_loss_start", "held_out_loss"
SAME = ("model", "pretrained", "scope", "weight_bits", "act_bits", "variant", "seed")
"""What two runs share that differ in their method alone."""


@dataclass(frozen=True)
class TrainingWorth:
    """What training came to in some runs.

    Attributes:
        trained: number of runs that were trained and measured it on held-out pairs.
        lowered: of these, how many ended with less loss than they started with; the others keep their start.
        ratios: least, median and largest ratio of loss after to loss before.
        below: by method of :data:`BESIDE`, how many ended with less divergence from full precision (KL, on images that chose
            nothing) than it, and how many have such a run beside them.
    """

    trained: int
    lowered: int
    ratios: tuple[float, float, float]
    below: dict[str, tuple[int, int]]


def measured_runs(results: StudyResults) -> pd.DataFrame:
    """One line per run with its logit scale as it came: ``method``, :data:`SAME`, the losses, and ``kl`` on the in-distribution sets."""
    rows = results.about(START, END, "kl")
    rows = rows[(rows["role"] == "id") & (rows["dataset"] != "") & ~rows["is_tuned"]]
    wide = rows.pivot_table(index=["run_id", "method", *SAME], columns="metric", values="value", aggfunc="mean")
    return wide.reindex(columns=[START, END, "kl"]).reset_index()


def training_worth(runs: pd.DataFrame) -> TrainingWorth | None:
    """Judge the trained ones of some runs; ``None`` where none is.

    Args:
        runs: one line per run, with ``method``, the columns of :data:`SAME` that tell them apart, the losses and ``kl``, in any unit.
    """
    same = [name for name in SAME if name in runs]
    is_trained = [name in METHODS and METHODS[name].needs_training for name in runs["method"]]
    trained = runs[is_trained].dropna(subset=[START, END])
    if trained.empty:
        return None
    ratio = trained[END] / trained[START]
    below = {}
    for name in BESIDE:
        other = runs.loc[runs["method"] == name, [*same, "kl"]].dropna()
        pairs = trained.merge(other, on=same, suffixes=("", "_beside"))
        below[name] = int((pairs["kl"] < pairs["kl_beside"]).sum()), len(pairs)
    return TrainingWorth(
        len(trained), int((ratio < 1).sum()), (float(ratio.min()), float(ratio.median()), float(ratio.max())), below
    )


def worth_by_setting(results: StudyResults) -> dict[tuple[int, int, str], TrainingWorth]:
    """By bits of weights and activations, from many to few, and scope; those alone in which something was trained."""
    runs = measured_runs(results)
    found = {}
    for (weight_bits, act_bits, scope), own in runs.groupby(["weight_bits", "act_bits", "scope"]):
        if (worth := training_worth(own)) is not None:
            found[int(weight_bits), int(act_bits), str(scope)] = worth
    return dict(sorted(found.items(), key=lambda item: (-item[0][0], -item[0][1], item[0][2])))


def worth_cells(worth: TrainingWorth) -> list[str]:
    """As tables write it: trained, lowered, least, median and largest ratio, and below each method of :data:`BESIDE`."""
    counts = [f"{less} of {of}" if of else "–" for less, of in worth.below.values()]
    return [str(worth.trained), str(worth.lowered), *(f"{x:.3f}" for x in worth.ratios), *counts]


WORTH_HEAD = ("trained", "lowered their loss", "least", "median", "largest", *(f"below {name}'s KL" for name in BESIDE))
"""The columns of :func:`worth_cells`."""

WORTH_NOTE = (
    "Of the trained methods: how many ended with less loss on held-out pairs than they started with (the others keep their start), the "
    "least, median and largest ratio of loss after to loss before, and how many ended with less KL to full precision, on images that "
    "chose nothing, than methods that do not train."
)
"""What is said above a table of these columns."""
