"""Quantization-aware training in a real Trainer: on several processes, broken off and resumed, and with steps that are driven too far."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from cases.qat import EPOCHS, METHOD, small_vit, train
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.modules import QATModule, Quantization
from lightning_vlmq.quant import quantized_layers
from lightning_vlmq.quant.rounding import STEP_FLOOR


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_fit_as_one(tmp_path, processes):
    """Each sees its part of the batch; the contrastive loss is still that of every image with every caption, and so are the weights
    that three epochs end with, though 47 pairs can be shared evenly by neither two processes nor three."""
    script = Path(__file__).parents[1] / "cases" / "qat.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), METHOD, str(tmp_path / "several.pt"), str(processes)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    several = torch.load(tmp_path / "several.pt", weights_only=True)
    module, one = fit_in_one()
    assert several["losses"] == pytest.approx(one.losses, rel=1e-9) and len(one.losses) == EPOCHS
    assert several["held_out"] == pytest.approx(module.held_out_losses, rel=1e-9)
    assert several["first"].keys() == one.first.keys()
    assert len(one.first) == sum(p.requires_grad for p in module.vlm.parameters())
    largest = max(float(gradient.abs().max()) for gradient in one.first.values())
    for name, gradient in one.first.items():  # those of key biases are zero up to rounding
        torch.testing.assert_close(several["first"][name], gradient, rtol=1e-6, atol=1e-12 * largest)
    start = small_vit().double().state_dict()
    moved = 0
    for name, weight in module.vlm.named_parameters():
        if name.endswith("k.bias"):  # Adam makes whole steps of their rounding
            continue
        torch.testing.assert_close(several["weights"][name], weight.data, rtol=1e-6, atol=1e-9)
        moved += name in start and not torch.equal(start[name], weight.data)
    assert moved > 5


@cache
def fit_in_one():
    return train(METHOD, steps=-1, epochs=EPOCHS, held_out=0.1)


@pytest.mark.parametrize("method", ["lsq_contrastive", "lsqplus_feature"])
def test_steps_stay_positive_at_a_reckless_rate(method):
    module, watcher = train(method, steps=4, step_lr=3.0)  # an update moves a step by three times its size
    steps = [
        quantizer.scale.detach()
        for layer in quantized_layers(module.vlm).values()
        for quantizer in (layer.weight_fake_quant, layer.act_fake_quant)
    ]
    every = torch.cat(steps)
    assert torch.isfinite(every).all() and (every >= STEP_FLOOR).all()
    assert (every == STEP_FLOOR).any()  # some were stopped there
    assert all(torch.isfinite(torch.tensor(watcher.losses)))


class Fits:
    """Fits of three epochs of three updates, which keep a checkpoint after every update and after every epoch."""

    def __init__(self, folder, method, **data):
        self.folder, self.method = folder, method
        self.data = {
            "datasets": ["concepts"],
            "n_concepts": 8,
            "n_id": 8,
            "calibration_pairs": 27,
            "train_batch_size": 8,
            **data,
        }

    def fit(self, resume=None, disturb=0):
        seed_everything(3, verbose=False)
        torch.rand(disturb)  # what else a process may have drawn by then
        quantization = Quantization(method=self.method, scope="vision_text", weight_bits=4)
        module = QATModule("vit_clean", quant=quantization, held_out=0.1)
        kept = {"auto_insert_metric_name": False, "save_top_k": -1}
        keepers = [
            ModelCheckpoint(self.folder, "epoch{epoch}", every_n_epochs=1, save_on_train_epoch_end=True, **kept),
            ModelCheckpoint(self.folder, "step{step}", every_n_train_steps=1, **kept),
        ]
        trainer = Trainer(
            accelerator="cpu", max_epochs=3, limit_val_batches=0, logger=False, callbacks=keepers if resume is None else [],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=resume is None,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(
            module,
            EmbeddedData(**self.data),
            ckpt_path=resume and str(self.folder / f"{resume}.ckpt"),
            weights_only=False,
        )
        return {**module.vlm.state_dict(), "losses": torch.tensor(module.held_out_losses)}


@pytest.mark.parametrize(
    ("method", "workers", "checkpoints"),
    [
        ("ste_feature(weights='rtn')", 0, ["epoch0"]),
        ("lsqplus_contrastive", 0, ["epoch1", "step1", "step3", "step5", "step8"]),  # steps 3 and 6 end epochs
        ("rot_lsq_contrastive", 2, ["epoch0", "step3", "step4"]),
    ],
)
def test_a_resumed_fit_gives_the_weights_of_the_undisturbed_one(method, workers, checkpoints, tmp_path):
    """To the bit, wherever it was broken off."""
    fits = Fits(tmp_path, method, num_workers=workers)
    whole = fits.fit()
    assert len(list(tmp_path.glob("step*.ckpt"))) == 9 and len(whole["losses"]) == 4
    for checkpoint in checkpoints:
        resumed = fits.fit(checkpoint, disturb=100)
        different = [name for name, tensor in whole.items() if not torch.equal(tensor, resumed[name])]
        assert different == [], checkpoint  # the losses are among them, one for each epoch that it went on
