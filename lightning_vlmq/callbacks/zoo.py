"""Writes a pre-trained model of the zoo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

from lightning_vlmq.callbacks.whole import partial_reason, require_place
from lightning_vlmq.core.atomic import write_text
from lightning_vlmq.models import require_finite
from lightning_vlmq.quant.checkpoint import write_tensors
from lightning_vlmq.results.version import code_version


class ZooExport(Callback):
    """Writes a pre-trained zoo model as safetensors with its accuracy, settings and command beside it; of a partial run nothing.

    Args:
        folder: where ``<model>.safetensors`` and ``<model>.json`` go; the package's own zoo folder makes ``--model.vlm`` find it.
        half: store weights in half precision.

    Raises:
        VLMQError: before anything is computed, if the folder cannot be written.
    """

    def __init__(self, folder: str, half: bool = False) -> None:
        self.folder = Path(folder)
        self.half = half
        self.partial = ""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Look whether there is something to write, and whether it can be."""
        self.partial = partial_reason(trainer, f"no model is written to '{self.folder}'") if stage == "fit" else ""
        if stage == "fit" and trainer.is_global_zero and not self.partial:
            require_place(self.folder, "the model")

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write both files, the description last."""
        if self.partial or not trainer.is_global_zero:
            return
        vlm = pl_module.vlm
        require_finite(vlm)
        state = {key: t.half() if self.half and t.is_floating_point() else t for key, t in vlm.state_dict().items()}
        write_tensors(self.folder / f"{vlm.name}.safetensors", state)
        accuracy = {
            key: round(float(value), 4)
            for key, value in sorted(trainer.callback_metrics.items())
            if key.startswith("val/")
        }
        description = {
            "command": f"vlmq fit --config pretrain/{vlm.name}",
            "model": dict(pl_module.hparams),
            "data": dict(trainer.datamodule.hparams),  # type: ignore[attr-defined]
            "epochs": trainer.max_epochs,
            "seed": torch.initial_seed(),
            "parameters": sum(p.numel() for p in vlm.parameters()),
            "code_version": code_version(),
            "accuracy": accuracy,
        }
        write_text(self.folder / f"{vlm.name}.json", json.dumps(description, indent=1, default=list) + "\n")
