"""What training is judged by: pairs that it never sees, the best state on them, and what is told on the way."""

import logging
import math
from fractions import Fraction

import pandas as pd
import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_vlmq.callbacks import GridTrajectories
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.modules import QATModule, Quantization
from lightning_vlmq.modules.qat import held_out_rows
from lightning_vlmq.quant.clipping import count_clipped
from lightning_vlmq.quant.layers import weight_quantized_layers
from lightning_vlmq.quant.training import contrastive_distillation


class Seen(Callback):
    def __init__(self):
        self.rows, self.modes = set(), set()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.rows |= set(batch["index"].tolist())
        self.modes |= {m.training for m in module.vlm.modules() if isinstance(m, _BatchNorm | torch.nn.Dropout)}


def fit(
    method="lsq_contrastive",
    epochs=2,
    vlm="vit_clean",
    pairs=60,
    logger=False,
    callbacks=(),
    resume=None,
    limit_val_batches=0,
    **settings,
):
    seed_everything(0, verbose=False)
    data = EmbeddedData(datasets=["concepts"], n_concepts=8, n_id=8, calibration_pairs=pairs, train_batch_size=16)
    module = QATModule(vlm, quant=Quantization(method=method, weight_bits=settings.pop("bits", 3)), **settings)
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, limit_val_batches=limit_val_batches, num_sanity_val_steps=0,
        logger=logger, callbacks=list(callbacks), log_every_n_steps=2,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        enable_autolog_hparams=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume, weights_only=False)
    return module, data


def held_out_loss(module: QATModule, data: EmbeddedData, rows: list[int]) -> float:
    batches = data.calibration_batches()
    images = torch.cat([b["image"] for b in batches])
    captions = [caption for b in batches for caption in b["caption"]]
    reference = module.reference
    with torch.no_grad():
        texts, teacher = reference.encode_text(reference.tokenize(captions)), reference.encode_image(images)
        own = module.vlm.encode_image(images[rows])
        told_from = (teacher, texts)  # among all pairs, trained on or not
        return float(
            contrastive_distillation(own, texts[rows], teacher[rows], texts[rows], reference.logit_scale(), told_from)
        )


def test_held_out_pairs_are_never_trained_on_and_tell_the_best_state():
    seen = Seen()
    module, data = fit(callbacks=[seen], vlm="align_clean")
    rows = list(range(9, 60, 10))
    assert data.held_out == set(rows) and not seen.rows & data.held_out
    assert len(module.held_out_losses) == 3
    assert held_out_loss(module, data, rows) == pytest.approx(min(module.held_out_losses), rel=1e-4)
    assert seen.modes == {False}  # normalised by full precision's statistics


@pytest.mark.parametrize("share", [0, 0.001, 0.05, 0.1, 0.15, 0.3, 0.4, 0.45, 0.5])
def test_the_share_held_out_is_the_one_asked_for(share):
    for pairs in (0, 7, 60, 997, 1000):
        rows = held_out_rows(pairs, share)
        assert len(rows) == math.floor(pairs * Fraction(str(share))) and rows == sorted(set(rows) & set(range(pairs)))
        gaps = {after - before for before, after in zip([-1, *rows], rows)}
        assert not gaps or max(gaps) - min(gaps) <= 1  # evenly spread
    assert held_out_rows(1003, 0.1) == list(range(9, 1003, 10)) and held_out_rows(9, 0.5) == [1, 3, 5, 7]


def test_the_losses_are_among_the_rows_of_the_validation_that_ends_the_fit():
    module, _ = fit(epochs=1, limit_val_batches=1.0)
    rows = {row.metric: row.value for row in module.rows}
    assert (rows["held_out_loss_start"], rows["held_out_loss"]) == (
        module.held_out_losses[0],
        min(module.held_out_losses),
    )


def test_a_reckless_rate_leaves_the_start_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        module, data = fit(weight_lr=30.0, step_lr=0.5)
    assert min(module.held_out_losses[1:]) > module.held_out_losses[0]
    assert held_out_loss(module, data, sorted(data.held_out)) == pytest.approx(module.held_out_losses[0], rel=1e-4)
    assert "the start is kept" in caplog.text


class Spoiling(Callback):
    """Makes the student's features undefined, before training or after its first epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def spoil(self, module, epoch):
        if epoch == self.epoch:
            with torch.no_grad():
                next(module.vlm.model.visual.parameters()).fill_(torch.nan)

    def on_fit_start(self, trainer, pl_module):
        self.spoil(pl_module, 0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_last_batch:
            self.spoil(pl_module, trainer.current_epoch + 1)


@pytest.mark.parametrize(
    ("epoch", "message"), [(0, "is nan before training"), (1, "training diverged: the loss on held-out")]
)
def test_a_loss_that_is_no_number_is_refused(epoch, message):
    with pytest.raises(VLMQError, match=message):
        fit(callbacks=[Spoiling(epoch)])


def test_none_held_out_trains_on_all_pairs():
    seen = Seen()
    module, _ = fit(callbacks=[seen], epochs=4, held_out=0)
    assert seen.rows == set(range(60)) and module.held_out_losses == []


def test_too_few_pairs_to_hold_out_are_all_trained_on_with_a_word(caplog):
    seen = Seen()
    with caplog.at_level(logging.WARNING):
        module, data = fit(callbacks=[seen], epochs=1, pairs=15)
    assert "leaves 1 to tell training by" in caplog.text
    assert seen.rows == set(range(15)) and module.held_out_losses == [] and not data.held_out
    with pytest.raises(VLMQError, match=r"0 to 0\.5"):
        fit(held_out=0.7)


def test_a_saved_model_is_judged_not_trained(tmp_path):
    """Refused before it is read, let alone trained: nothing of it would learn."""
    with pytest.raises(
        VLMQError, match=r"(?s)model.checkpoint .*saved' is a finished model.*--ckpt_path.*weights='gptq'"
    ):
        fit(checkpoint=str(tmp_path / "saved"))


def test_a_resumed_fit_keeps_the_best_of_both_parts_and_the_start_of_the_whole(tmp_path):
    keeper = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole, _ = fit(epochs=3, callbacks=[keeper], logger=CSVLogger(tmp_path, name="whole", version=""))
    path = tmp_path / "epoch=0.ckpt"
    resumed, _ = fit(epochs=3, resume=str(path), logger=CSVLogger(tmp_path, name="resumed", version=""))
    torch.save(torch.load(path, weights_only=False)["grids"], tmp_path / "grids")
    torch.load(tmp_path / "grids", weights_only=True)  # data alone, as the command line asks for
    assert resumed.trajectory == whole.trajectory and whole.trajectory[-1].largest["weight_steps"] > 0
    logged = [
        pd.read_csv(tmp_path / name / "metrics.csv").filter(regex="^step$|train/change")
        for name in ("whole", "resumed")
    ]
    told = [frame.dropna().set_index("step") for frame in logged]
    assert 0 < len(told[1]) < len(told[0]) and told[1].equals(told[0].loc[told[1].index, told[1].columns])
    assert resumed.held_out_losses == whole.held_out_losses
    assert all(torch.equal(x, y) for x, y in zip(resumed.vlm.state_dict().values(), whole.vlm.state_dict().values()))


def test_what_is_logged(tmp_path):
    logger = CSVLogger(tmp_path, name="log", version="")
    module, _ = fit("lsqplus_feature", epochs=2, logger=logger)
    header = (tmp_path / "log" / "metrics.csv").read_text().splitlines()[0].split(",")
    kinds = ("weight_steps", "activation_steps", "activation_offsets")
    wanted = {f"train/change/{kind}/{what}" for kind in kinds for what in ("median", "largest")}
    wanted |= {f"train/lr/{kind}" for kind in ("weights", "vectors", "matrices", *kinds)}
    wanted |= {"train/clipped/weights", "train/clipped/inputs", "train/loss/contrastive", "train/loss/feature"}
    assert wanted | {"train/loss", "train/held_out_loss"} <= set(header)
    first, *_, last = module.trajectory
    assert first.step == 0 and set(first.largest.values()) == {0.0} and 0 <= first.clipped["inputs"] < 0.2
    for kind in kinds:
        assert 0 < last.medians[kind] <= last.largest[kind] == max(map(abs, last.changes[kind]))
        # Adam moves by the rate at most: no step moves further than the sum of the rates
        assert last.medians[kind] <= module.step_lr * last.step * (2 if kind == "weight_steps" else 1)  # of 3 bits


class Coverage(Callback):
    """Keeps what is said to clip before training."""

    def on_fit_start(self, trainer, pl_module):
        self.clipped = pl_module.coverage.clipped


@pytest.mark.parametrize("held_out", [0, 0.1])
def test_what_clips_is_told_of_the_trained_model(held_out):
    start = Coverage()
    module, _ = fit(epochs=1, callbacks=[start], held_out=held_out, weight_lr=0.3, step_lr=0.05, limit_val_batches=1.0)
    layers = weight_quantized_layers(module.vlm)
    now = {
        name: sum(map(int, count_clipped(layer.weight, layer.weight_fake_quant))) / layer.weight.numel()
        for name, layer in layers.items()
    }
    told = {grid.layer: grid.share for grid in module.coverage.clipped if grid.side == "weight"}
    expected = {name: share for name, share in now.items() if share > 0.01}
    assert expected.items() <= told.items()
    if not held_out:  # the last state, whatever it is: these rates move the grids
        assert expected and told != {grid.layer: grid.share for grid in start.clipped if grid.side == "weight"}
    rows = {row.metric: row.value for row in module.rows}
    assert rows["clipped_layers"] == len({grid.layer for grid in module.coverage.clipped})


def test_the_figure_of_trajectories_reaches_an_image_logger(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit("lsqplus_contrastive", logger=logger, callbacks=[GridTrajectories()])
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert "grids/trajectories" in events.Tags()["images"]
    assert len(events.Images("grids/trajectories")[0].encoded_image_string) > 5000
