"""The same evaluation computed in different ways, each filed under a name of its own; run as a script: ``python … <root>``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SETTINGS = {
    "first": {},
    "again": {},
    "batches of 7": {"batch_size": 7},
    "batches of 64": {"batch_size": 64},
    "2 threads": {"threads": 2},
    "2 workers": {"num_workers": 2},
    "2 processes": {"devices": 2},
    "3 processes": {"devices": 3},
}
DATA = {
    "datasets": ["concepts", "unseen"],
    "n_concepts": 16,
    "calibration_pairs": 32,
    "train_batch_size": 16,
    "batch_size": 16,
}


def evaluate(
    root: Path, run_id: str, quantized: bool, known: str | None = None, lonely: bool = False, **setting
) -> None:
    """One run.

    Args:
        root: of the store.
        run_id: its name.
        quantized: whether to 4 bits.
        known: a run whose features are taken: a forward pass is an error.
        lonely: whether there is a set of a single image too, fewer than processes.
        setting: what is different.
    """
    from unittest.mock import patch

    import torch
    from lightning import Trainer, seed_everything

    from lightning_vlmq.callbacks import ResultsWriter
    from lightning_vlmq.data import EmbeddedData
    from lightning_vlmq.data.sets import EvalSet, TensorImages
    from lightning_vlmq.models import VLM
    from lightning_vlmq.modules import EvaluationModule, Quantization
    from lightning_vlmq.statistics import Statistics

    class Data(EmbeddedData):
        def setup(self, stage=None):
            super().setup(stage)
            if lonely and self.eval_sets[-1].name != "lonely":
                image = TensorImages(torch.full((1, 3, 32, 32), 99, dtype=torch.uint8), target=torch.tensor([-1]))
                self.eval_sets.append(EvalSet("lonely", "far_ood", image))

    torch.set_num_threads(setting.pop("threads", 1))
    devices = setting.pop("devices", 1)
    seed_everything(0, verbose=False)
    quant = Quantization(method="minmax", weight_bits=4, scope="vision_text") if quantized else Quantization()
    few = Statistics(n_resamples=50, n_resamples_ranking=20)
    module = EvaluationModule(
        "vit_clean",
        quant=quant,
        scores=["mcm"],
        lst=True,
        statistics=few,
        cache=str(root / f"features_{known or run_id}"),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[ResultsWriter(str(root), run_id)],
    )
    data = Data(**{**DATA, **setting})
    if known is None:
        trainer.validate(module, data, verbose=False)
    else:
        with patch.object(VLM, "encode_image", side_effect=AssertionError("a forward pass was run again")):
            trainer.validate(module, data, verbose=False)


def main(root: Path) -> None:
    """All of them, those of several processes first: a process that has computed with threads cannot fork safely."""
    evaluate(root, "lonely", False, lonely=True, devices=2)
    evaluate(root, "2_processes-known", False, lonely=True, known="lonely", devices=2)
    for name, setting in sorted(SETTINGS.items(), key=lambda item: -item[1].get("devices", 1)):
        for quantized in (False, True):
            evaluate(root, f"{name.replace(' ', '_')}{'-w4a8' if quantized else ''}", quantized, **setting)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
