"""Figures, texts and hyperparameters reach the loggers that take them; what cannot take them is left alone."""

import numpy as np
import pytest
from cases.small_data import SMALL_DATA
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_vlmq.callbacks import ReliabilityDiagrams, RunSummary
from lightning_vlmq.callbacks.loggers import forgive, log_figure, log_text, takes_figures
from lightning_vlmq.callbacks.summary import markdown_table
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.modules import EvaluationModule, Quantization


class ImageLogger(DummyLogger):
    """The interface of Lightning's W&B logger: ``log_image`` and ``log_text``."""

    def __init__(self):
        super().__init__()
        self.images, self.texts = [], []

    def log_image(self, key, images, step=None, **kwargs):
        self.images.append((key, images, step))

    def log_text(self, key, columns=None, data=None, **kwargs):
        self.texts.append((key, data))


def figure():
    made = Figure(figsize=(3, 2))
    made.subplots().plot([0, 1], [1, 0])
    return made


def quiet(*loggers, **options):
    kwargs = {"enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
    return Trainer(accelerator="cpu", logger=list(loggers), enable_autolog_hparams=False, **kwargs, **options)


def test_figures_and_texts_reach_what_takes_them(tmp_path):
    own, board = ImageLogger(), TensorBoardLogger(tmp_path, name="", version="run")
    trainer = quiet(own, board, CSVLogger(tmp_path))
    assert takes_figures(trainer) and not takes_figures(quiet(CSVLogger(tmp_path)))
    log_figure(trainer, "a/b", figure(), 7)
    log_text(trainer, "note", "**so**")
    ((key, (image,), step),) = own.images
    assert (key, step) == ("a/b", 7) and image.size[0] > 200 and np.asarray(image).std() > 5
    assert own.texts == [("note", [["**so**"]])]
    board.experiment.flush()
    read = EventAccumulator(str(tmp_path / "run")).Reload()
    assert read.Images("a/b")[0].step == 7
    assert read.Tensors("note/text_summary")[0].tensor_proto.string_val[0] == b"**so**"


def test_mlflow_takes_both(tmp_path):
    pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/runs.db", artifact_location=str(tmp_path / "artifacts"))
    log_figure(quiet(logger), "a/b", figure(), 7)
    log_text(quiet(logger), "note", "**so**")
    kept = {path.relative_to(tmp_path / "artifacts").parts[-1] for path in (tmp_path / "artifacts").rglob("*.*")}
    assert {"b_7.png", "note.md"} <= kept


def test_weights_and_biases_take_figures(tmp_path):
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=str(tmp_path), offline=True, project="vlmq")
    log_figure(quiet(logger), "a/b", figure(), 7)
    log_text(quiet(logger), "note", "**so**")
    logger.experiment.finish()
    assert list(tmp_path.rglob("*.png")) and list(tmp_path.rglob("*.table.json"))


@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_a_whole_run_reaches_them(tmp_path, kind):
    """As the command does it: settings, headline metrics, config, coverage and a reliability diagram, through a logger that may fail."""
    pytest.importorskip(kind)
    from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

    if kind == "mlflow":
        made = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/runs.db", artifact_location=str(tmp_path / "artifacts"))
    else:
        made = WandbLogger(save_dir=str(tmp_path), offline=True, project="vlmq")
    trainer = quiet(made, callbacks=[RunSummary(), ReliabilityDiagrams(roles=("id",))])
    forgive(trainer)
    seed_everything(0, verbose=False)
    module = EvaluationModule("vit_clean", quant=Quantization(method="minmax", weight_bits=4))
    trainer.validate(module, EmbeddedData(**SMALL_DATA), verbose=False)
    top1 = next(row.value for row in module.rows if (row.role, row.dataset, row.metric) == ("id", "", "top1"))
    inside = next(s.name for s in module.eval_sets if s.role == "id")
    if kind == "mlflow":
        run = made.experiment.get_run(made.run_id)
        assert run.data.params["method"] == "minmax" and run.data.metrics["id/top1"] == pytest.approx(top1)
        kept = {str(path.relative_to(tmp_path)) for path in (tmp_path / "artifacts").rglob("*.*")}
    else:
        assert made.experiment.config["method"] == "minmax"
        assert made.experiment.summary["id/top1"] == pytest.approx(top1)
        made.experiment.finish()
        kept = {str(path) for path in tmp_path.rglob("*.*")}
    for name in (f"reliability/{inside}", "config", "coverage"):
        assert any(f"/{name}" in path for path in kept), (name, kept)


@pytest.mark.parametrize("every_row", [False, True])
def test_a_run_is_one_line_of_hparams_with_few_scalars(tmp_path, every_row):
    seed_everything(0, verbose=False)
    board = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    trainer = quiet(board, callbacks=[RunSummary(every_row)])
    module = EvaluationModule("vit_clean", quant=Quantization(method="minmax", weight_bits=4))
    trainer.validate(module, EmbeddedData(**SMALL_DATA), verbose=False)
    board.experiment.flush()
    read = EventAccumulator(str(tmp_path / "run")).Reload()
    metadata = read.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(metadata).session_start_info
    assert start.hparams["method"].string_value == "minmax" and start.hparams["weight_bits"].number_value == 4
    assert sorted(start.hparams)[:5] == [
        "bits",
        "method",
        "model",
        "pretrained",
        "scope",
    ]  # what the page shows at first
    assert start.hparams["bits"].string_value == "W4A8"
    scalars = set(read.Tags()["scalars"])
    named = {f"{row.dataset or row.role}/{row.metric}" for row in module.rows if not row.score}
    assert "id/top1" in scalars and named.issubset(scalars) == every_row
    assert every_row or len(scalars) < 60
    texts = {
        tag: read.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in read.Tags()["tensors"] if "text" in tag
    }
    assert "vlm: vit_clean" in texts["config/text_summary"] and "| vision | linear |" in texts["coverage/text_summary"]


def test_markdown_table():
    assert markdown_table([{"a": 1234, "b": "x"}]) == "| a | b |\n| --- | --- |\n| 1,234 | x |"
    assert markdown_table([]) == "|  |\n|  |"
