"""Band accuracies in a real run, as the command line asks for them."""

import math

import pytest
import torch
from cases.small_data import SMALL_DATA
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_vlmq.callbacks import BandAccuracies, ResultsWriter
from lightning_vlmq.core.configs import find_config
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.experiment import VLMQCLI
from lightning_vlmq.modules import EvaluationModule, Quantization
from lightning_vlmq.results.store import ResultsStore
from lightning_vlmq.spectral import band_accuracy, eigenbasis, own_band_accuracy

BANDS = [[0, 4], [4, None], [4000, None]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("bands")
    seed_everything(0, verbose=False)
    module = EvaluationModule("vit_clean", quant=Quantization(method="minmax", weight_bits=2, act_bits=8))
    callback = BandAccuracies(n_images=10**6, bands=BANDS)
    writer = ResultsWriter(str(root), "run")
    logger = TensorBoardLogger(root, "tensorboard", version=0)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_autolog_hparams": False}
    trainer = Trainer(
        accelerator="cpu", callbacks=[writer, callback], logger=logger, use_distributed_sampler=False, **quiet
    )
    trainer.validate(module, EmbeddedData(**SMALL_DATA), verbose=False)
    return root, module, callback


def test_they_are_those_of_the_features(run):
    """From the run's own features, by another function; everything kept is the accuracy in the run's rows."""
    _, module, callback = run
    judged, reference = module.judged
    inside = next(s for s in module.eval_sets if s.role == "id")
    rows = callback.rows()
    assert set(rows) == {"vision/output"}
    rows = rows["vision/output"]
    target = judged.own.records[inside.name]["target"]
    for model, ending, own in ((judged, "", "own"), (reference, "_full", "full")):
        features, classes = model.features(inside), model.classifier(inside)
        centred = features.double() - features.double().mean(0)
        basis = eigenbasis(centred.T @ centred)[1]
        for mode in ("keep", "drop", "cumulative"):
            expected = band_accuracy(features, classes, target, basis, [(0, 4), (4, None)], mode, features.mean(0))
            found = [rows[f"top1_{mode}_{own}_{band}{ending}"] for band in ("0-4", "4+")]
            assert found == pytest.approx(expected, abs=1.5 / len(target))
        exact = float(model.own.records[inside.name]["correct"].double().mean())
        assert rows[f"top1_cumulative_{own}_4+{ending}"] == pytest.approx(exact, abs=1e-9)
        published = own_band_accuracy(features, classes, target, [(0, 4), (4, None)], around="zero")
        found = [rows[f"top1_keep_{own}_zero_{band}{ending}"] for band in ("0-4", "4+")]
        assert found == pytest.approx(published, abs=1.5 / len(target)) and found != expected
    assert rows["top1_keep_full_0-4"] != rows["top1_keep_full_0-4_full"]
    assert not any("4000+" in name for name in rows)


def test_they_are_filed_and_drawn(run):
    root, _, callback = run
    rows = ResultsStore(root).rows(["run"])
    filed = rows[rows["score"] == "vision/output"].set_index("metric")["value"].to_dict()
    assert filed == pytest.approx(callback.rows()["vision/output"])
    curves = ResultsStore(root).curves("run")
    own = curves[curves["kind"] == "top1_keep_full"].set_index("x")
    assert list(own.index[:2]) == [0, 4] and math.isnan(own.loc[4000, "y"])
    assert own.loc[0, "y_reference"] == callback.rows()["vision/output"]["top1_keep_full_0-4_full"]
    events = EventAccumulator(str(root / "tensorboard" / "version_0")).Reload()
    assert events.Tags()["images"] == ["bands/vision_output"]


def test_the_command_line_takes_it():
    words = ["--config", str(find_config("eval")), "--trainer.callbacks+=BandAccuracies"]
    words += ["--trainer.callbacks.bands=[[0,4],[4,null]]", "--trainer.callbacks.has_blocks=true"]
    cli = VLMQCLI(args=[*words, "--trainer.logger=false"], run=False)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, BandAccuracies))
    assert callback.bands == ((0, 4), (4, None)) and callback.has_blocks
    assert callback.identity() == {"n_images": 1000, "bands": [[0, 4], [4, None]], "has_blocks": True, "seed": 0} | {
        "centres": ("mean", "zero")
    }


def test_without_full_precision_there_is_nothing_to_measure():
    callback = BandAccuracies()
    module = torch.nn.Module()
    module.reference = None
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    callback.on_validation_epoch_start(trainer, module)
    callback.on_validation_batch_end(trainer, module, None, {"image": torch.zeros(2), "target": torch.zeros(2)}, 0, 0)
    callback.on_validation_epoch_end(trainer, module)
    assert callback.rows() == {} and len(callback.curves()) == 0
    with pytest.raises(VLMQError, match="at least 2"):
        BandAccuracies(n_images=1)
    with pytest.raises(VLMQError, match="unknown centre"):
        BandAccuracies(centres=["median"])
