"""Every command that the documents show is one that the program accepts."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from lightning_vlmq.api import evaluate, load_vlm, quantize
from lightning_vlmq.cli import main
from lightning_vlmq.data.datamodule import ReliabilityDataModule
from lightning_vlmq.evaluation.measures import METRICS
from lightning_vlmq.metrics import OOD_SCORES
from lightning_vlmq.metrics.scores import ScoreInputs
from lightning_vlmq.models import known_vlm
from lightning_vlmq.quant import METHODS
from lightning_vlmq.study.run import grid
from lightning_vlmq.study.run.app import WORDS
from lightning_vlmq.study.run.config import Study
from lightning_vlmq.study.run.inputs import data_of

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = sorted([REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md")])


def commands(program):
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```console\n(.*?)```", document.read_text(), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [
                shlex.split(line, comments=True) for line in lines if re.match(rf"(\.venv/bin/)?{program} ", line)
            ]
    return found


def with_models(words, folder):
    """The words of a command with ``folder`` in place of ``/models``, where the files and folders that they name then lie."""
    for place in re.findall(r"/models/([^\s,\]]+)", " ".join(words)):
        if Path(place).suffix:
            (folder / place).touch()
        else:
            (folder / place).mkdir(parents=True, exist_ok=True)
    return [word.replace("/models", str(folder)) for word in words]


@pytest.mark.parametrize("command", commands("vlmq"), ids=" ".join)
def test_vlmq_command_is_accepted(command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    if "--help" in command:
        pytest.skip("help is tested with the command line")
    if command[1:2] == [] or command[1] not in ("validate", "fit", "test", "predict", "convert", "data"):
        pytest.skip("has no config; docs/first-hour.md runs it")
    with pytest.raises(SystemExit) as ended:
        main([*with_models(command[1:], tmp_path), "--print_config"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    model = (yaml.safe_load(printed).get("model") or {}).get("init_args") or {}
    if "vlm" in model:
        known_vlm(model["vlm"], model.get("pretrained"))
    assert "class_path: lightning_vlmq" in printed or (command[1] == "convert" and "checkpoint: " in printed)


@pytest.mark.parametrize("command", commands("vlmq-study"), ids=" ".join)
def test_study_command_composes(command, tmp_path):
    """Its axes name what there is, and its runs' data can be set up."""
    words = [WORDS.get(word, word) for word in with_models(command[1:], tmp_path)]
    overrides = [word for word in words if not word.startswith(("-", "hydra/"))]
    if "-m" in command:  # commas outside brackets separate the jobs of a multirun: take the first
        overrides = [re.split(r",(?![^\[]*\])", word)[0] for word in overrides]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        config = compose("sweep", overrides)
    plain = OmegaConf.to_container(config, resolve=True)
    study = Study.from_config(plain["study"])
    runs = grid.compose(study, study.seeds_or(plain["seed"]), REPOSITORY / "configs")
    for run in {run.kind: run for run in runs}.values():
        assert isinstance(data_of(run.arguments), ReliabilityDataModule)


@pytest.mark.parametrize("command", commands("python"), ids=" ".join)
def test_scripts_exist(command):
    assert command[1] == "-m" or (REPOSITORY / command[1]).is_file()


def test_the_examples_of_extending_run():
    text = (REPOSITORY / "docs" / "extending.md").read_text()
    names: dict = {"__name__": "extending"}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "extending.md", "exec", dont_inherit=True), names)
    try:
        data = names["Stripes"]()
        data.setup()
        images, vlm = data.eval_sets[0].images, load_vlm("vit_clean")
        quantized = quantize(vlm, "four_sigma", images.images, ["stripes"] * len(images), weight_bits=4)
        table = evaluate(quantized, images.images, images.columns["target"], data.class_names)
        assert table.query("metric == 'agreement'")["value"].between(0, 1).all()
        logits = torch.tensor([[3.0, 1.0, 0.5]])
        assert names["margin"](ScoreInputs(logits, logits)).item() == 2
    finally:
        METHODS._entries.pop("four_sigma", None)


def test_linked_files_exist():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).is_file(), f"{document.name} links to {target}"


def test_every_metric_and_score_is_defined():
    defined = set(re.findall(r"`([^`]+)`", (REPOSITORY / "docs" / "metrics.md").read_text()))
    named = {name.replace("_alexnet", "") for name in METRICS}  # "…_alexnet" is one line
    assert not (named | set(OOD_SCORES)) - defined
