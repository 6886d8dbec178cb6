"""The command line as a user runs it: help, configs, bad input, predictions, and two processes."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import lightning_vlmq
from lightning_vlmq.cli import main
from lightning_vlmq.commands import COMMANDS
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import zoo
from lightning_vlmq.quant import METHODS
from lightning_vlmq.results.store import ResultsStore

REPOSITORY = Path(__file__).parents[1]
EVAL = ["validate", "--config", "configs/eval.yaml"]
MINMAX = ["--model.quant.method=minmax", "--model.quant.scope=vision_text", "--model.quant.weight_bits=4"]


def quiet(root):
    return [f"--results.root={root}", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]


def test_the_program_answers_before_torch_is_imported(vlmq):
    """``vlmq``, ``vlmq --help``, ``vlmq --version``: all commands, by group, from modules that take no time to import."""
    bare, told = vlmq(), vlmq("--help")
    assert bare.returncode == told.returncode == 0 and bare.stdout == told.stdout and not told.stderr
    for name, command in ((name, COMMANDS[name]) for name in COMMANDS):
        assert f"  {name} " in told.stdout and command.summary in told.stdout and command.group in told.stdout
    assert max(map(len, told.stdout.splitlines())) <= 120
    assert f"vlmq {lightning_vlmq.__version__} (torch {torch.__version__.split('+')[0]}" in vlmq("--version").stdout
    script = "import sys; from lightning_vlmq.cli import main; main([]); sys.exit(len({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize(
    "words",
    [["compare", "one"], ["power", "a", "b", "--change", "x"], ["doctor", "--all"], ["list", "models", "a", "b"]],
)
def test_a_command_s_own_words_are_refused_in_one_line(words, capsys):
    with pytest.raises(VLMQError, match=f"vlmq {words[0]} --help says what it takes") as error:
        main(words)
    said = capsys.readouterr()
    assert "\n" not in str(error.value) and not said.out and not said.err


def test_help_says_the_model_first_and_the_trainer_last(vlmq):
    done = vlmq("validate", "--help")
    assert done.returncode == 0 and not done.stderr and "usage: vlmq validate --config eval" in done.stdout
    places = [
        done.stdout.index(word) for word in ("gptq", "--model.vlm", "--data.", "--results.root", "--trainer.devices")
    ]
    assert places == sorted(places)
    assert not re.search(r":\w+:`|``", done.stdout) and len(done.stdout.splitlines()) < 310
    fit = vlmq("fit", "--help").stdout
    assert "--model.weight_lr" in fit
    for method in METHODS:  # by name, with its options
        said = re.search(
            rf"^  {method}\(([^)]*(\([^)]*\))?[^)]*)\)?",
            fit if METHODS[method].needs_training else done.stdout,
            re.MULTILINE,
        )
        assert said and all(f"{f.name}=" in said[1] for f in dataclasses.fields(METHODS[method])), method
    assert "--trainer.gradient_clip_val" in vlmq("validate", "--help-all").stdout
    model = vlmq("validate", "--model.help", "EvaluationModule").stdout
    assert "--model.quant.weight_bits" in model and "2 to 8" in model


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ([], "add --config eval"),
        (["--model.quant.method=minmax"], "--model.quant.method belongs to .* add --config eval"),
        (["--config=eval", "--data.root=/x"], "--data.root .* --config data/"),
        (["--config=eval", "--model.weight_lr=1"], "--model.weight_lr .* --config qat"),
        (["--config=eval", "--trainer.callbacks.folder=x"], "callbacks.QuantizedModelWriter"),
    ],
)
def test_an_option_without_its_config_says_which(args, hint):
    with pytest.raises(VLMQError, match=hint):
        main(["validate", *args])


@pytest.mark.parametrize(
    ("args", "hint"), [(["valdate"], "did you mean validate"), (["--config", "eval"], "after a command")]
)
def test_what_is_no_command(args, hint):
    with pytest.raises(VLMQError, match=hint):
        main(args)


def test_printed_config_round_trips(vlmq, tmp_path, small_data_args):
    first = vlmq(*EVAL, *MINMAX, *small_data_args, "--print_config")
    assert first.returncode == 0, first.stderr
    (tmp_path / "config.yaml").write_text(first.stdout)
    second = vlmq("validate", "--config", tmp_path / "config.yaml", "--print_config")
    assert yaml.safe_load(second.stdout) == yaml.safe_load(first.stdout)
    assert yaml.safe_load(first.stdout)["model"]["init_args"]["quant"]["method"] == "minmax"


def test_configs_compose(vlmq, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {init_args: {vlm: convnext_noisy}}\ntrainer: {precision: 64-true}\n")
    done = vlmq(*EVAL, "--config", tmp_path / "mine.yaml", "--print_config")
    config = yaml.safe_load(done.stdout)
    assert config["model"]["init_args"]["vlm"] == "convnext_noisy" and config["trainer"]["precision"] == "64-true"
    assert config["data"]["class_path"] == "lightning_vlmq.data.EmbeddedData"


BAD = {
    "unknown method": (["--model.quant.method=minmx"], "minmax"),
    "unknown model": (["--model.vlm=vit_claen"], "vit_clean"),
    "unknown data set": (["--data.datasets=[concept]"], "concepts"),
    "no bits": ([*MINMAX, "--model.quant.weight_bits=0"], "weight_bits must be 2 to 8"),
    "17 bits": ([*MINMAX, "--model.quant.act_bits=17"], "act_bits must be 2 to 8"),
    "bits that are no number": ([*MINMAX, "--model.quant.act_bits=eight"], "act_bits"),
    "missing checkpoint": (["--model.pretrained=no/such.safetensors"], "does not exist"),
    "truncated checkpoint": (["--model.pretrained={cut}"], "damaged"),
    "no ID data": (["--data.datasets=[digits]"], "role id"),
    "missing data": (["--data.path=no/such/file"], "does not exist"),
    "unknown argument": (["--model.quant.methd=minmax"], "methd"),
    "unknown config file": (["--config", "no/such.yaml"], "no/such.yaml"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    args, word = BAD[case]
    (tmp_path / "cut.safetensors").write_bytes((zoo.FOLDER / "vit_clean.safetensors").read_bytes()[:5000])
    args = [a.replace("{cut}", str(tmp_path / "cut.safetensors")) for a in args]
    with pytest.raises(VLMQError) as caught:
        main([*EVAL, *args, *quiet(tmp_path / "results")])
    assert word in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not list((tmp_path / "results").rglob("*.parquet"))


def test_bad_input_exits_with_2_and_no_traceback(vlmq, tmp_path):
    done = vlmq(*EVAL, "--model.quant.method=minmx", *quiet(tmp_path))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("vlmq: error: ")
    assert "Traceback" not in done.stderr


def test_test_and_predict(vlmq, tmp_path, small_data_args):
    done = vlmq("test", "--config", "configs/eval.yaml", *small_data_args, *quiet(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = ResultsStore(tmp_path).rows()
    assert {"top1", "auroc", "rsg"} <= set(rows["metric"])
    writer = "--trainer.callbacks+=lightning_vlmq.callbacks.PredictionWriter"
    folder = f"--trainer.callbacks.folder={tmp_path / 'predictions'}"
    done = vlmq("predict", "--config", "configs/eval.yaml", *small_data_args, *quiet(tmp_path), writer, folder)
    assert done.returncode == 0, done.stderr
    predictions = pd.read_parquet(tmp_path / "predictions" / "concepts.parquet")
    top1 = rows.query("dataset == 'concepts' and metric == 'top1' and not is_tuned")["value"].item()
    assert (predictions["prediction"] == predictions["target"]).mean() == pytest.approx(top1)


def test_two_processes_give_the_numbers_of_one(vlmq, tmp_path, small_data_args):
    # 48 images over 2 processes in batches of 7; 21 digits and 21 textures, which two does not divide
    args = [
        *EVAL,
        *MINMAX,
        "--model.quant.act_bits=16",  # rounded inputs magnify last digits: tests/test_determinism.py says by how much
        *small_data_args,
        "--data.batch_size=7",
        "--trainer.accelerator=cpu",
        "--results.run_id=run",
    ]
    one = vlmq(*args, *quiet(tmp_path / "one"))
    two = vlmq(*args, *quiet(tmp_path / "two"), "--trainer.devices=2", "--trainer.strategy=ddp")
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    key = ["dataset", "role", "corruption", "severity", "score", "metric", "is_tuned"]
    rows = [ResultsStore(tmp_path / name).rows().set_index(key).sort_index() for name in ("one", "two")]
    assert rows[0].index.equals(rows[1].index)
    assert (rows[0]["n"] == rows[1]["n"]).all()
    for column in ("value", "stderr"):
        far = ~np.isclose(rows[0][column], rows[1][column], atol=1e-5, rtol=1e-5, equal_nan=True)
        assert not far.any(), rows[0][far].index.tolist()
    digits = ResultsStore(tmp_path / "two").samples("run").query("dataset == 'digits'")
    assert digits["index"].tolist() == list(range(21))
