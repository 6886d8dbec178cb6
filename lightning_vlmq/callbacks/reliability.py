"""Reliability diagrams of every labelled, uncorrupted data set after a validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_vlmq.callbacks.loggers import log_figure, takes_figures
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.metrics import calibration_error, reliability_bins, trajectory_bins
from lightning_vlmq.plotting.reliability import ReliabilityPanel, reliability_diagram, trajectory_diagram


class ReliabilityDiagrams(Callback):
    """Writes ``reliability/<data set>`` and ``reliability_trajectory/<data set>`` figures to every logger that takes images.

    The first shows full precision, the quantized model and the one with its logit scale tuned side by side; the second, where
    there are two of them, follows the images of each confidence bin of the first to the others.

    At the end of every validation (but the sanity check) and test, on rank zero. The Lightning module must have ``records``
    (data set name -> per-sample columns, of which ``confidence`` and ``correct`` are read) and ``eval_sets`` (objects
    with ``name`` and ``role``); ``reference_records`` and ``tuned_records`` are the full-precision and the tuned model's records
    of the same sets, or ``None``.

    Args:
        n_bins: number of equal-width confidence bins.
        roles: roles of the data sets to draw; sets of other roles carry no labels or come in many variants.

    Raises:
        VLMQError: if ``n_bins`` is below 1; later, if the module lacks what is read or a data set has no samples.
    """

    def __init__(self, n_bins: int = 15, roles: Sequence[str] = ("id", "shift", "spurious")) -> None:
        if n_bins < 1:
            raise VLMQError(f"n_bins must be 1 or more, not {n_bins}")
        self.n_bins = n_bins
        self.roles = tuple(roles)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figures of each data set whose role is asked for."""
        if trainer.sanity_checking or not trainer.is_global_zero or not takes_figures(trainer):
            return
        records = getattr(pl_module, "records", None)
        eval_sets = getattr(pl_module, "eval_sets", None)
        if records is None or eval_sets is None:
            raise VLMQError(f"{type(pl_module).__name__} keeps no per-sample records; remove ReliabilityDiagrams")
        reference_records = getattr(pl_module, "reference_records", None)
        models = {"FP32": reference_records, "quantized" if reference_records else "model": records}
        models["tuned"] = getattr(pl_module, "tuned_records", None)
        models = {label: own for label, own in models.items() if own is not None}
        role_of = {eval_set.name: eval_set.role for eval_set in eval_sets}
        for name in records:
            if role_of.get(name) not in self.roles:
                continue
            panels = [self._panel(label, name, own[name]) for label, own in models.items()]
            title = f"{name}: reliability, n = {len(records[name]['confidence'])}"
            log_figure(trainer, f"reliability/{name}", reliability_diagram(panels, title))
            if len(models) > 1:
                confidence = torch.stack([own[name]["confidence"] for own in models.values()])
                correct = torch.stack([own[name]["correct"] for own in models.values()])
                figure = trajectory_diagram(trajectory_bins(confidence, correct, self.n_bins), list(models), title)
                log_figure(trainer, f"reliability_trajectory/{name}", figure)

    on_test_end = on_validation_end

    def _panel(self, label: str, name: str, columns: Mapping[str, Tensor]) -> ReliabilityPanel:
        confidence, correct = columns["confidence"], columns["correct"]
        if len(confidence) == 0:
            raise VLMQError(f"data set '{name}' has no samples to draw a reliability diagram of; leave it out")
        ece = float(calibration_error(confidence, correct, self.n_bins))
        return ReliabilityPanel(label, reliability_bins(confidence, correct, self.n_bins), ece)
