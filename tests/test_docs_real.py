"""The commands of docs/real.md are commands: every option and config of theirs exists."""

import re
import shlex
from pathlib import Path

import pytest

from lightning_vlmq.cli import main
from lightning_vlmq.models import known_vlm, split_name

PAGE = (Path(__file__).parents[1] / "docs" / "real.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.S)
    for line in block.replace("\\\n", " ").splitlines()
]


def test_there_are_commands():
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("vlmq validate", "vlmq fit"))])
def test_options_exist(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*shlex.split(command)[1:], "--print_config"])
    assert end.value.code in (0, None)
    assert "class_path" in capsys.readouterr().out


def test_names_of_the_study_are_known():
    study, paper = [c for c in COMMANDS if c.startswith("vlmq-study")]
    assert "study=paper" in paper
    names = re.search(r"vlm=\[(.*?)\]", study)[1].split(",")
    for name in names:
        known_vlm(*split_name(name))
