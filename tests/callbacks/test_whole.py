"""Runs under faults: partial runs leave nothing, a fit is judged at its end, disks that are full end nothing but what they must."""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from core.test_atomic import full_disk
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lightning_vlmq.callbacks import (
    PredictionWriter,
    QuantizedModelWriter,
    ReliabilityDiagrams,
    ResultsWriter,
    ZooExport,
)
from lightning_vlmq.callbacks.loggers import forgive, log_text
from lightning_vlmq.cli import main
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.modules import EvaluationModule, PretrainingModule, Quantization
from lightning_vlmq.results.store import ResultsStore

TINY = {"datasets": ["concepts"], "n_concepts": 8, "calibration_pairs": 16, "train_batch_size": 8, "batch_size": 5}
MINMAX = Quantization(method="minmax")


def trainer(*callbacks, **flags):
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    sharded = {"use_distributed_sampler": False, "num_sanity_val_steps": 0}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **sharded, **flags})


def files(folder):
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file() and path.parent.name != "cache")


PARTIAL = [{"limit_val_batches": 1}, {"limit_test_batches": 0.5}, {"fast_dev_run": True}, {"limit_predict_batches": 1}]


@pytest.mark.parametrize("flags", PARTIAL, ids=lambda flags: next(iter(flags)))
def test_partial_runs_write_nothing_and_say_so(flags, tmp_path, caplog):
    (tmp_path / "before").touch()
    made = trainer(
        QuantizedModelWriter(str(tmp_path)), PredictionWriter(str(tmp_path)), ResultsWriter(str(tmp_path)), **flags
    )
    flag = next(iter(flags))
    verb = {"limit_test_batches": made.test, "limit_predict_batches": made.predict}.get(flag, made.validate)
    seed_everything(0, verbose=False)
    verb(EvaluationModule("vit_clean", quant=MINMAX, scores=["msp"]), EmbeddedData(**TINY))
    assert files(tmp_path) == ["before"]
    assert (
        caplog.text.count("the run does not see all data") >= 2 - (flag == "limit_predict_batches")
        and flag in caplog.text
    )


@pytest.mark.parametrize(
    "flags", [{"limit_train_batches": 1}, {"fast_dev_run": True}, {"overfit_batches": 1}], ids=lambda f: next(iter(f))
)
def test_a_partial_training_exports_nothing(flags, tmp_path, caplog):
    made = trainer(ZooExport(str(tmp_path)), max_steps=1, check_val_every_n_epoch=9, **flags)
    made.fit(PretrainingModule("vit_clean"), EmbeddedData(**TINY))
    assert files(tmp_path) == [] and "no model is written" in caplog.text


def test_whole_runs_write_and_the_names_are_files(tmp_path):
    data = EmbeddedData(**TINY)
    made = trainer(PredictionWriter(str(tmp_path / "p")), QuantizedModelWriter(str(tmp_path / "m")))
    module = EvaluationModule("vit_clean", quant=MINMAX, scores=["msp"])
    data.setup()
    data.eval_sets = [replace(data.eval_sets[0], name="../$x/\n")]
    data.setup = lambda stage=None: None
    made.predict(module, data)
    (name,) = files(tmp_path / "p")
    assert name.startswith("_") or (name.startswith("x") and name.endswith(".parquet"))
    assert len(pd.read_parquet(tmp_path / "p" / name)) == len(data.eval_sets[0].images)


@pytest.mark.parametrize("method", ["lowrank_compensation", "matched_noise(seed=1)"])
def test_what_cannot_be_saved_is_refused_before_any_work(method, tmp_path):
    quant = Quantization(method=method, weight_bits=4)
    made = trainer(QuantizedModelWriter(str(tmp_path / "m")), ResultsWriter(str(tmp_path), "run"))
    with pytest.raises(VLMQError, match=r"not integers alone .*; leave QuantizedModelWriter out") as error:
        made.validate(EvaluationModule("vit_clean", quant=quant, scores=["msp"]), EmbeddedData(**TINY), verbose=False)
    assert method in str(error.value) and not (tmp_path / "m").exists()


@pytest.mark.parametrize("writer", [QuantizedModelWriter, PredictionWriter, ResultsWriter, ZooExport])
def test_a_place_that_cannot_be_written_is_said_before_any_work(writer, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(EvaluationModule, "setup", lambda *args: pytest.fail("worked in vain"))
    made = trainer(writer(str(tmp_path / "file" / "below")), max_steps=1)
    module = PretrainingModule("vit_clean") if writer is ZooExport else EvaluationModule("vit_clean", quant=MINMAX)
    verb = {PredictionWriter: made.predict, ZooExport: made.fit}.get(writer, made.validate)
    with pytest.raises(VLMQError, match=r"cannot be written to .*give another folder"):
        verb(module, EmbeddedData(**TINY))


def test_the_command_line_looks_before_it_loads_a_model(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("lightning_vlmq.modules.evaluation.load_vlm", lambda *args: pytest.fail("worked in vain"))
    with pytest.raises(VLMQError, match="results cannot be written to"):
        main(["validate", "--config=eval", f"--results.root={tmp_path / 'file' / 'below'}"])


FIT = [
    "fit",
    "--config=qat",
    "--model.quant.method=lsq_contrastive",
    "--model.quant.weight_bits=4",
    "--model.lst=false",
]
FIT += [f"--data.{name}={value}" for name, value in TINY.items()]
FIT += ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
FIT += ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=3", "--results.run_id=run"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    root = tmp_path_factory.mktemp("fitted")
    keeper = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        f"--trainer.callbacks.dirpath={root / 'kept'}",
    ]
    keeper += [
        "--trainer.callbacks.filename={epoch}",
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.callbacks.every_n_epochs=1",
    ]
    keeper += ["--trainer.callbacks.save_on_train_epoch_end=true", "--trainer.enable_checkpointing=true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        main([*FIT, *keeper, f"--results.root={root / 'whole'}"])
    return root


def test_a_fit_that_never_validates_is_judged_at_its_end(fitted):
    store = ResultsStore(fitted / "whole")
    assert store.has("run") and set(store.rows()["method"]) == {"lsq_contrastive"}
    assert files(fitted / "whole" / "models") == ["model.safetensors", "quant.json"]
    top1 = store.rows().query("metric == 'top1' and dataset == 'concepts' and score == ''")["value"].item()
    args = [word for word in FIT[5:] if "trainer.max" not in word and "check_val" not in word]
    saved = fitted / "whole" / "models" / "run"
    main(
        [
            "validate",
            "--config=eval",
            *args,
            "--model.lst=false",
            f"--model.checkpoint={saved}",
            f"--results.root={fitted / 'again'}",
        ]
    )
    again = ResultsStore(fitted / "again").rows().query("metric == 'top1' and dataset == 'concepts' and score == ''")
    assert again["value"].item() == top1  # what was judged is what was saved, after the last step


def test_a_fit_resumes_from_its_checkpoint_read_as_data(fitted):
    (kept,) = (fitted / "kept").glob("*epoch=0*.ckpt")
    assert "weights_only" not in " ".join(FIT)
    torch.load(kept, weights_only=True)
    assert kept.stat().st_mode & 0o777 == (fitted / "whole" / "models" / "run" / "quant.json").stat().st_mode & 0o777
    main([*FIT, f"--results.root={fitted / 'resumed'}", f"--ckpt_path={kept}"])
    columns = ["dataset", "metric", "score", "value"]
    whole, resumed = (ResultsStore(fitted / name).rows()[columns] for name in ("whole", "resumed"))
    pd.testing.assert_frame_equal(whole, resumed)


def test_loggers_that_cannot_write_end_no_run(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").touch()
    loggers = [
        TensorBoardLogger(tmp_path / "file"),
        CSVLogger(tmp_path / "file"),
        TensorBoardLogger(tmp_path / "board"),
    ]
    made = trainer(ReliabilityDiagrams(), ResultsWriter(str(tmp_path / "root"), "run"), logger=loggers)
    forgive(made)
    forgive(made)
    assert isinstance(made.loggers[0], TensorBoardLogger) and type(made.loggers[0]).__name__ == "TensorBoardLogger"
    assert type(pickle.loads(pickle.dumps(made.loggers[0]))) is type(made.loggers[0])
    monkeypatch.setattr(
        TensorBoardLogger, "log_metrics", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with caplog.at_level(logging.WARNING):
        made.validate(EvaluationModule("vit_clean", scores=["msp"]), EmbeddedData(**TINY), verbose=False)
    said = [record.message for record in caplog.records if "the run goes on without" in record.message]
    assert len(said) == 3 and all(str(tmp_path) in line for line in said)
    assert ResultsStore(tmp_path / "root").has("run")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread says so too
def test_texts_and_figures_that_cannot_be_written_are_warnings(tmp_path, caplog):
    made = trainer(logger=[TensorBoardLogger(tmp_path)])
    forgive(made)
    with full_disk(100):
        for _ in range(3):
            log_text(made, "text", "x" * 10_000)
            made.loggers[0].log_metrics({"a": 1.0})
            made.loggers[0].save()
    made.loggers[0].finalize("success")
    assert "the run goes on without" in caplog.text and "File too large" in caplog.text


def test_a_full_disk_costs_the_cache_and_no_result(tmp_path, caplog):
    cache = tmp_path / "cache"
    cache.mkdir()
    module = EvaluationModule("vit_clean", scores=["msp"], cache=str(cache / "file"))
    (cache / "file").touch()
    trainer(ResultsWriter(str(tmp_path), "run")).validate(module, EmbeddedData(**TINY), verbose=False)
    assert caplog.text.count("features cannot be kept") == 1 and ResultsStore(tmp_path).has("run")


@pytest.mark.parametrize(
    "layer", ["visual.transformer.resblocks.0.mlp.c_fc", "visual.proj", "text_projection", "ln_final"]
)
@pytest.mark.parametrize("quant", [Quantization(), MINMAX], ids=["full", "quantized"])
def test_an_exploded_layer_is_no_result(layer, quant, tmp_path):
    from lightning_vlmq.models import load_vlm

    vlm = load_vlm("vit_clean")
    hit = [p for name, p in vlm.named_parameters() if layer in name and p.ndim]
    assert hit
    with torch.no_grad():
        for parameter in hit:
            parameter.mul_(1e30)
    module = EvaluationModule(vlm, quant=quant, scores=["msp"])
    with pytest.raises(VLMQError, match=r"exploded|overflow|not finite|non-finite"):
        trainer(ResultsWriter(str(tmp_path), "run")).validate(module, EmbeddedData(**TINY), verbose=False)
    assert not ResultsStore(tmp_path).run_ids()


def test_activations_that_overflow_are_no_result(tmp_path):
    from lightning_vlmq.models import load_vlm

    vlm = load_vlm("vit_clean")
    encode = vlm.model.encode_image
    vlm.model.encode_image = lambda x: encode(x) * 1e30
    assert nn.functional.normalize(torch.full((1, 4), 1e30)).sum() == 0  # which is why nothing looks wrong
    with pytest.raises(VLMQError, match=r"no features for 5 of 5 images of 'concepts'"):
        trainer(ResultsWriter(str(tmp_path), "run")).validate(
            EvaluationModule(vlm, scores=["msp"]), EmbeddedData(**TINY)
        )
