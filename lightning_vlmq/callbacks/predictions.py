"""Per-sample predictions on request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_vlmq.callbacks.whole import partial_reason, require_place
from lightning_vlmq.core.atomic import replacing
from lightning_vlmq.core.names import file_name
from lightning_vlmq.data.sets import EvalSet


class PredictionWriter(BasePredictionWriter):
    """Writes what ``predict`` returns as one Parquet file per data set, under ``<folder>/<data set>.parquet``.

    A name that is no file name is changed as :func:`~lightning_vlmq.core.names.file_name` does. A partial run (some batches alone)
    writes nothing and says so.

    Args:
        folder: where the files go; each process of a DDP run adds its rank to the name.

    Raises:
        VLMQError: before anything is computed, if the folder cannot be written.
    """

    def __init__(self, folder: str = "logs/predictions") -> None:
        super().__init__(write_interval="epoch")
        self.folder = Path(folder)
        self.partial = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look whether there is something to write, and whether it can be."""
        self.partial = (
            partial_reason(trainer, f"no predictions are written to '{self.folder}'") if stage == "predict" else ""
        )
        if stage == "predict" and not self.partial:
            require_place(self.folder, "predictions")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write this process's columns, batches joined."""
        if self.partial:
            return
        rank = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        sets: Sequence[EvalSet] = pl_module.eval_sets  # type: ignore[assignment]
        of_sets = (
            predictions if len(sets) > 1 else [predictions]
        )  # Lightning hands over the batches of a single set as they are
        for s, batches in zip(sets, of_sets):
            if not batches:  # fewer batches than processes
                continue
            columns: dict[str, Tensor] = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
            frame = pd.DataFrame({key: column.cpu().numpy() for key, column in columns.items()})
            with replacing(self.folder / f"{file_name(s.name)}{rank}.parquet") as partial:
                frame.to_parquet(partial)
