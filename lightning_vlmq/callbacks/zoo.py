"""Writes a pre-trained model of the zoo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from safetensors.torch import save_file

from lightning_vlmq.models import require_finite
from lightning_vlmq.results.store import code_version


class ZooExport(Callback):
    """Writes a pre-trained zoo model as safetensors with its accuracy, settings and command beside it.

    Args:
        folder: where ``<model>.safetensors`` and ``<model>.json`` go; the package's own zoo folder makes ``--model.vlm`` find it.
        half: store weights in half precision.
    """

    def __init__(self, folder: str, half: bool = False) -> None:
        self.folder = Path(folder)
        self.half = half

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write both files, the description last."""
        if not trainer.is_global_zero:
            return
        vlm = pl_module.vlm
        require_finite(vlm)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                key: (t.half() if self.half and t.is_floating_point() else t).detach().cpu().contiguous()
                for key, t in vlm.state_dict().items()
            },
            self.folder / f"{vlm.name}.safetensors",
        )
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
        (self.folder / f"{vlm.name}.json").write_text(json.dumps(description, indent=1, default=list) + "\n")
