"""Quantization-aware training on a few pairs; run as a script, on several processes."""

import sys
from pathlib import Path

import torch
from lightning import Callback, Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it finds its neighbours too

from cases.towers import small
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.models import VLM, load_vlm, zoo
from lightning_vlmq.modules import QATModule, Quantization

METHOD = "lsqplus_feature(weights='rtn')"
EPOCHS = 3
PAIRS = 52
"""Five are held out, and 47 trained on: one batch of 24 an epoch, whatever the number of processes."""
BATCH = 24


class Gradients(Callback):
    """Keeps every loss and the gradients of the first update."""

    def on_fit_start(self, trainer, pl_module):
        self.losses, self.first = [], {}

    def on_after_backward(self, trainer, pl_module):
        if not self.first:
            self.first = {n: p.grad.clone() for n, p in pl_module.vlm.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def small_vit() -> VLM:
    """A small model whose weights are drawn in full precision: those of the zoo are half floats, many of which lie half way between two
    steps, where the last bit of a sum decides."""
    build, zoo.build = zoo.build, small
    torch.manual_seed(0)
    try:
        return load_vlm("vit_clean", "none")
    finally:
        zoo.build = build


def train(method: str, devices: int = 1, steps: int = 1, epochs: int = -1, **settings) -> tuple[QATModule, Gradients]:
    """Train on batches that several processes share, in double precision: rounding must not tell runs apart."""
    seed_everything(0, verbose=False)
    watcher = Gradients()
    data = EmbeddedData(
        datasets=["concepts"], n_concepts=8, n_id=8, calibration_pairs=PAIRS, train_batch_size=BATCH // devices
    )
    quantization = Quantization(method=method, scope="vision_text", weight_bits=4)
    module = QATModule(small_vit(), quant=quantization, **{"held_out": 0, **settings})
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="64-true",
        max_steps=steps,
        max_epochs=None if epochs == -1 else epochs,
        limit_val_batches=0,
        logger=False,
        use_distributed_sampler=False,
        callbacks=[watcher],
        **quiet,
    )
    trainer.fit(module, data)
    return module, watcher


if __name__ == "__main__":
    torch.set_num_threads(1)
    module, seen = train(sys.argv[1], devices=int(sys.argv[3]), steps=-1, epochs=EPOCHS, held_out=0.1)
    losses = torch.tensor(seen.losses, dtype=torch.float64)
    if torch.distributed.get_rank() == 0:
        weights = {name: weight.data for name, weight in module.vlm.named_parameters()}
        kept = {"losses": losses.tolist(), "held_out": module.held_out_losses, "first": seen.first, "weights": weights}
        torch.save(kept, sys.argv[2])
