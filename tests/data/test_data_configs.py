"""Every config of configs/data: it builds its readers, alone and after others, and its comment's commands are accepted."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_vlmq.cli import main
from lightning_vlmq.commands.data import parser
from lightning_vlmq.core.configs import with_config_files
from lightning_vlmq.data import FileData, readers
from lightning_vlmq.experiment import VLMQCLI

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs" / "data").glob("*.yaml"))
PAIRS = {"cc3m", "yfcc", "sbu"}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def build(*args):
    made = parser()
    return made.instantiate(made.parse_args(with_config_files([str(a) for a in args]))).data


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_builds_what_it_says(path):
    said = yaml.safe_load(path.read_text())["data"]["init_args"]
    data = build("--config", path)
    assert type(data) is FileData
    readers = [type(reader).__name__ for reader in data.readers]
    assert readers == [entry["class_path"].split(".")[-1] for entry in said.get("sets+", [])]
    assert bool(readers) != (path.stem in PAIRS)
    assert (data.pair_reader is not None) == ("pairs" in said)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_commands_in_its_comment_are_accepted(path):
    commands = [shlex.split(line) for line in re.findall(r"^#   vlmq (.*)$", path.read_text(), re.MULTILINE)]
    assert {tuple(command[:1]) for command in commands} == {("data",), ("validate",)}
    for command in commands:
        data = build(*command[2 if command[0] == "data" else 1 :])
        assert data.readers[-1:] == build("--config", path).readers[-1:] or path.stem in PAIRS
        assert data.pair_reader is not None or command[0] == "data", "post-training quantization needs pairs"
        assert str(data.reading.root) == "/datasets"
        if command[0] == "validate":
            assert any(getattr(reader, "role", "") == "id" for reader in data.readers), "there has to be an id set"


def test_there_is_a_config_for_every_published_set():
    named = {entry.split(".")[-1] for p in CONFIGS for entry in re.findall(r"class_path: (\S+)", p.read_text())}
    own = {"ImageList", "Parquet", "TablePairs"}  # told in docs/data.md, with folder.yaml as the example
    known = {n for n in readers.__all__ if issubclass(getattr(readers, n), (readers.Reader, readers.PairReader))}
    assert known - {"Reader", "PairReader"} - own == named - {"FileData"}


def test_several_add_up_behind_an_experiment(tmp_path, monkeypatch):
    configs = [
        REPOSITORY / "configs" / name
        for name in ("eval.yaml", "data/imagenet.yaml", "data/openood.yaml", "data/cc3m.yaml")
    ]
    extra = "{class_path: lightning_vlmq.data.readers.Folder, init_args: {path: x, name: x, role: shift}}"
    args = [arg for path in configs for arg in ("--config", str(path))]
    monkeypatch.chdir(tmp_path)
    cli = VLMQCLI(args=[*args, "--data.root=/r", f"--data.sets+={extra}"], run=False)
    assert [type(r).__name__ for r in cli.datamodule.readers] == ["ImageNet", "OpenOOD", "Folder"]
    assert cli.datamodule.pair_reader == readers.ShardPairs("cc3m") and type(cli.model).__name__ == "EvaluationModule"


def documented():
    found = []
    for block in re.findall(r"```console\n(.*?)```", (REPOSITORY / "docs" / "data.md").read_text(), re.DOTALL):
        found += [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return found


@pytest.mark.parametrize("command", documented(), ids=" ".join)
def test_documented_command_is_accepted(command, capsys):
    assert command[0] == ".venv/bin/vlmq"
    with pytest.raises(SystemExit) as ended:
        main([*command[1:], "--print_config"])
    assert ended.value.code == 0 and "class_path: lightning_vlmq.data.FileData" in capsys.readouterr().out


def test_every_config_is_documented():
    text = (REPOSITORY / "docs" / "data.md").read_text()
    assert not [p.stem for p in CONFIGS if f"`{p.stem}`" not in text]
