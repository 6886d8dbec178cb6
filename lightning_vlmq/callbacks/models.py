"""Saves a quantized model that was only validated or tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from lightning_vlmq.callbacks.protocol import evaluating
from lightning_vlmq.callbacks.whole import partial_reason, require_place
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.quant import save_quantized


class QuantizedModelWriter(Callback):
    """Saves the quantized model when a run ends, for ``--model.checkpoint`` and ``vlmq convert``.

    A training run saves its model anyway (see :class:`~lightning_vlmq.callbacks.ResultsWriter`); this does it for
    ``validate`` and ``test``, and for ``fit`` into a folder of choice. A partial run (some batches alone) saves nothing and says so.

    Args:
        folder: where ``model.safetensors`` and ``quant.json`` go.

    Raises:
        VLMQError: before anything is computed, if the run has no quantized model or one that cannot be saved, or the folder cannot be
            written.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.partial = ""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a run in full precision, and one of a method that leaves more of a weight than integers."""
        quantizes = getattr(pl_module, "scheme", None) is not None or getattr(pl_module, "checkpoint", None) is not None
        if not quantizes:
            raise VLMQError(
                "QuantizedModelWriter has nothing to save in full precision; set quant.method or leave it out"
            )
        quant = getattr(pl_module, "quant", None)
        if quant is not None and getattr(pl_module, "checkpoint", None) is None and not quant.chosen().has_integers:
            raise VLMQError(
                f"the weights of '{quant.text}' are not integers alone and cannot be saved as such; leave QuantizedModelWriter out"
            )
        self.partial = partial_reason(trainer, f"no model is saved in '{self.folder}'")
        if trainer.is_global_zero and not self.partial:
            require_place(self.folder, "the model")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save, unless this is a validation within training."""
        if trainer.state.fn != "fit":
            self._save(trainer, pl_module)

    on_test_end = on_validation_end

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the trained model."""
        self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and not self.partial:
            module = evaluating(pl_module, self)
            assert module.quantized is not None
            save_quantized(module.vlm, self.folder, module.quantized)
