"""Reliability diagrams of every labelled, uncorrupted data set after a validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_vlmq.callbacks.figures import ReliabilityPanel, reliability_diagram, tensorboard_writers
from lightning_vlmq.errors import VLMQError
from lightning_vlmq.metrics import calibration_error, reliability_bins


class ReliabilityDiagrams(Callback):
    """Writes ``reliability/<data set>`` figures, full precision beside quantized, to all TensorBoard loggers.

    At the end of every validation (but the sanity check) and test, on rank zero. The Lightning module must have ``records``
    (data set name -> per-sample columns, of which ``confidence`` and ``correct`` are read) and ``eval_sets`` (objects
    with ``name`` and ``role``); ``reference_records`` are the full-precision model's records of the same sets, or
    ``None`` for a diagram of one model.

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
        """Draw one figure per data set whose role is asked for."""
        writers = tensorboard_writers(trainer)
        if trainer.sanity_checking or not trainer.is_global_zero or not writers:
            return
        records = getattr(pl_module, "records", None)
        eval_sets = getattr(pl_module, "eval_sets", None)
        if records is None or eval_sets is None:
            raise VLMQError(f"{type(pl_module).__name__} keeps no per-sample records; remove ReliabilityDiagrams")
        reference_records = getattr(pl_module, "reference_records", None) or {}
        role_of = {eval_set.name: eval_set.role for eval_set in eval_sets}
        for name, columns in records.items():
            if role_of.get(name) not in self.roles:
                continue
            panels = [self._panel("quantized" if name in reference_records else "model", name, columns)]
            if name in reference_records:
                panels.insert(0, self._panel("FP32", name, reference_records[name]))
            for writer in writers:
                figure = reliability_diagram(panels, f"{name}: reliability, n = {len(columns['confidence'])}")
                writer.add_figure(f"reliability/{name}", figure, trainer.global_step)

    on_test_end = on_validation_end

    def _panel(self, label: str, name: str, columns: Mapping[str, Tensor]) -> ReliabilityPanel:
        confidence, correct = columns["confidence"], columns["correct"]
        if len(confidence) == 0:
            raise VLMQError(f"data set '{name}' has no samples to draw a reliability diagram of; leave it out")
        ece = float(calibration_error(confidence, correct, self.n_bins))
        return ReliabilityPanel(label, reliability_bins(confidence, correct, self.n_bins), ece)
