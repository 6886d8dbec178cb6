"""What a run says on the terminal: the numbers that were logged, once."""

import re

import pytest
from cases.small_data import SMALL_DATA
from lightning import Trainer, seed_everything

from lightning_vlmq.callbacks import CoveragePrinter, HeadlinePrinter, ResultsWriter
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.modules import EvaluationModule, Quantization


def validate(tmp_path, **kwargs):
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[CoveragePrinter(), HeadlinePrinter(), ResultsWriter(str(tmp_path), "this-one")],
    )
    trainer.validate(EvaluationModule("vit_clean", **kwargs), EmbeddedData(**SMALL_DATA), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("lst", [False, True])
def test_each_number_is_said_once(tmp_path, capsys, lst):
    logged = validate(tmp_path, lst=lst, quant=Quantization(method="minmax", weight_bits=4))
    said = capsys.readouterr().out
    assert said.count("Quantization coverage") == 1
    cells = [re.findall(r"[^\s│]+", line) for line in said.split("Means over")[1].splitlines() if line.startswith("│")]
    expected = {name for name in logged if not name.startswith("lst/")}
    assert {"/".join(line[:2]) for line in cells} == expected and len(cells) == len(expected) > 10
    for role, metric, *numbers in cells:
        names = [f"{role}/{metric}", f"lst/{role}/{metric}"][: 1 + lst]
        assert numbers == [f"{logged[name]:.4f}" for name in names]
    assert "run this-one" in " ".join(said.split())


def test_full_precision_covers_nothing(tmp_path, capsys):
    validate(tmp_path)
    said = capsys.readouterr().out
    assert "Quantization coverage" not in said and "top1" in said and "agreement" not in said
