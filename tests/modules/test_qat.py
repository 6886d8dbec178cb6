"""Quantization-aware training in a real Trainer: on two processes, and with steps that are driven too far."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases.qat import train
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.modules import QATModule, Quantization
from lightning_vlmq.quant import quantized_layers
from lightning_vlmq.quant.fake_quant import STEP_FLOOR


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_have_the_loss_and_gradients_of_one(tmp_path, processes):
    """Each process sees its part of the batch; the contrastive loss is still that of every image with every caption."""
    script = Path(__file__).parents[1] / "cases" / "qat.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), "lsqplus_feature(weights='rtn')", str(tmp_path / "several.pt"), str(processes)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    several = torch.load(tmp_path / "several.pt", weights_only=True)
    module, one = train("lsqplus_feature(weights='rtn')")
    assert several["loss"] == pytest.approx(one.losses[0], rel=1e-9)
    assert several["gradients"].keys() == one.gradients.keys()
    assert len(one.gradients) == sum(p.requires_grad for p in module.vlm.parameters())
    largest = max(float(gradient.abs().max()) for gradient in one.gradients.values())
    for name, gradient in one.gradients.items():  # those of key biases are zero up to rounding
        torch.testing.assert_close(several["gradients"][name], gradient, rtol=1e-6, atol=1e-12 * largest)


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


@pytest.mark.parametrize("method", ["ste_feature", "lsqplus_contrastive", "rot_lsq_contrastive"])
def test_a_resumed_fit_gives_the_weights_of_the_undisturbed_one(method, tmp_path):
    def fit(resume=None, disturb=0):
        seed_everything(3, verbose=False)
        torch.rand(disturb)  # what else a process may have drawn by then
        data = EmbeddedData(datasets=["garments"], per_class=1, calibration_pairs=24, train_batch_size=8)
        module = QATModule("vit_clean", quant=Quantization(method=method, scope="vision_text", weight_bits=4))
        keeper = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
        trainer = Trainer(
            accelerator="cpu", max_epochs=3, limit_val_batches=0, logger=False, callbacks=[keeper] if resume is None else [],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=resume is None,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=resume, weights_only=False)
        return module.vlm.state_dict()

    whole = fit()
    resumed = fit(str(tmp_path / "epoch=0.ckpt"), disturb=100)
    different = [name for name, tensor in whole.items() if not torch.equal(tensor, resumed[name])]
    assert different == []
    start = torch.load(tmp_path / "epoch=0.ckpt", weights_only=False)["state_dict"]
    assert any(not torch.equal(start[f"vlm.{name}"], tensor) for name, tensor in whole.items())  # it did go on
