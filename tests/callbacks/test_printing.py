"""What a run says on the terminal: each dimension once, with its change, and how much is quantized."""

import io
import re

import pytest
from cases.small_data import SMALL_DATA
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from rich.console import Console

from lightning_vlmq.callbacks import CoveragePrinter, HeadlinePrinter, ResultsWriter
from lightning_vlmq.callbacks.printing import clear_bars, headline_table
from lightning_vlmq.data import EmbeddedData
from lightning_vlmq.evaluation.headline import HeadlineLine
from lightning_vlmq.evaluation.measures import dimensions
from lightning_vlmq.modules import EvaluationModule, Quantization
from lightning_vlmq.quant import CoverageReport
from lightning_vlmq.quant.clipping import ClippedGrid


def validate(tmp_path, every_layer_type=False, **kwargs):
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[CoveragePrinter(every_layer_type), HeadlinePrinter(), ResultsWriter(str(tmp_path), "this-one")],
    )
    module = EvaluationModule("vit_clean", **kwargs)
    trainer.validate(module, EmbeddedData(**SMALL_DATA), verbose=False)
    return module


def lines(said):
    """The table's lines by dimension: the cells after it."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in said.splitlines()]
    titles = [dimension.title for dimension in dimensions("mcm")]
    return {row[0]: row[1:] for row in rows if row[0] in titles}


@pytest.mark.parametrize("lst", [False, True])
def test_every_dimension_is_one_line_with_its_change(tmp_path, capsys, monkeypatch, lst):
    monkeypatch.setenv("COLUMNS", "160")
    module = validate(tmp_path, lst=lst, quant=Quantization(method="minmax", weight_bits=3))
    said = capsys.readouterr().out
    told = lines(said)
    assert list(told) == [d.title for d in dimensions("mcm")]
    inside = next(s.name for s in module.eval_sets if s.role == "id")
    before, after = (
        own[inside]["correct"].double().mean().item() for own in (module.reference_records, module.records)
    )
    title, full, quantized, *rest = told["Accuracy"]
    assert (title, full, quantized) == ("top-1", f"{100 * before:.1f}", f"{100 * after:.1f}") and len(rest) == 1 + lst
    number = float(rest[-1].split()[0].replace("−", "-"))
    assert number == pytest.approx(100 * (after - before), abs=0.06)
    assert "run this-one" in said
    assert re.search(r"Quantized: vision \d+\.\d% of weights, \d+\.\d% of MACs; text 0\.0%", said)


@pytest.mark.parametrize("width", [60, 72, 80, 120])
def test_a_narrow_terminal_cuts_no_number(width):
    values = (0.8123, 0.5123, 0.5122)
    lines = [HeadlineLine(d, values, -0.3, 0.12, 0.001, 300) for d in dimensions("mcm")]
    console = Console(width=width, file=io.StringIO())
    console.print(headline_table(lines, ["full precision", "quantized", "tuned"], has_change=True, columns=width))
    said = console.file.getvalue()
    assert said.count("81.2") == said.count("−30.0 ± 12.0*") == len(lines) and "…" not in said
    assert max(map(len, said.splitlines())) <= width and all(d.title.split()[0] in said for d in dimensions("mcm"))


def test_full_precision_covers_nothing_and_changes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    validate(tmp_path)
    said = capsys.readouterr().out
    assert "Quantized:" not in said and "change" not in said
    assert all(len(cells) == 2 for cells in lines(said).values())


def test_the_whole_coverage_on_request(tmp_path, capsys):
    validate(tmp_path, every_layer_type=True, quant=Quantization(method="minmax"))
    assert capsys.readouterr().out.count("Quantization coverage") == 1


def test_the_bar_leaves_no_line(capsys):
    """Lightning's own leaves "1/1 0:00:00 0.00it/s" after the results."""
    said = []
    for clears in (False, True):
        bar = RichProgressBar()
        trainer = Trainer(
            accelerator="cpu", logger=False, callbacks=[bar], enable_checkpointing=False, limit_val_batches=1
        )
        if clears:
            clear_bars(trainer)
        trainer.validate(BoringModel(), verbose=False)
        said.append(capsys.readouterr().out)
    assert "it/s" in said[0] and "it/s" not in said[1]


def test_what_clips_is_said_again_where_training_changed_it(capsys):
    module, printer = BoringModel(), CoveragePrinter()
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    module.coverage = CoverageReport((), {}, {})
    printer.setup(trainer, module, "fit")
    printer.on_validation_start(trainer, module)
    printer.on_fit_end(trainer, module)
    assert "clip" not in capsys.readouterr().out
    module.coverage = CoverageReport((), {}, {}, clipped=(ClippedGrid("mlp.c_fc", "weight", 0.04, False),))
    printer.on_fit_end(trainer, module)
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("After training: Layers that clip") and said.endswith(": 1; worst: mlp.c_fc weight 4.0%")
