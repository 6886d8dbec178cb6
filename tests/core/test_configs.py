"""Configs are found by name, from anywhere."""

from pathlib import Path

import pytest
import yaml

from lightning_vlmq.core import configs
from lightning_vlmq.core.errors import VLMQError

REPOSITORY = Path(__file__).parents[2]


def test_every_committed_config_has_a_name_and_says_what_it_is_for():
    names = configs.config_names()
    assert names == sorted(
        path.relative_to(REPOSITORY / "configs").with_suffix("").as_posix()
        for path in (REPOSITORY / "configs").rglob("*.yaml")
    )
    for name in names:
        path = configs.find_config(name)
        assert isinstance(yaml.safe_load(path.read_text()), dict)
        assert len(configs.config_summary(path)) > 15, f"{name} has no first line that says what it is for"


@pytest.mark.parametrize("name", ["quant/gptq", "quant/gptq.yaml", "configs/quant/gptq.yaml", "configs/quant/gptq"])
def test_a_config_goes_by_its_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.find_config(name).samefile(REPOSITORY / "configs" / "quant" / "gptq.yaml")


def test_a_file_that_exists_comes_first_then_the_given_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval.yaml").touch()
    assert configs.find_config("eval.yaml") == Path("eval.yaml")
    assert configs.find_config("eval", tmp_path) == tmp_path / "eval.yaml"
    assert configs.find_config("qat", tmp_path) == configs.config_folder() / "qat.yaml"


@pytest.mark.parametrize(
    ("name", "hint"), [("quant/gpqt", "quant/gptq"), ("gptq", "quant/gptq"), ("zzz", "list configs")]
)
def test_an_unknown_name_is_answered_with_the_nearest(name, hint):
    with pytest.raises(VLMQError, match=f"config '{name}' is neither.*{hint}"):
        configs.find_config(name)


def test_an_installed_package_has_them_inside(tmp_path, monkeypatch):
    inside = tmp_path / "lightning_vlmq"
    (inside / "configs").mkdir(parents=True)
    (inside / "configs" / "eval.yaml").touch()
    monkeypatch.setattr(configs, "_PACKAGE", inside)
    assert configs.config_folder() == inside / "configs"
    (inside / "configs" / "eval.yaml").unlink()
    with pytest.raises(VLMQError, match="install lightning_vlmq again"):
        configs.config_folder()


def test_names_in_a_command_line_become_files():
    file = str(configs.find_config("eval"))
    written_out = "{seed_everything: 1}"
    args = ["--config", "eval", "-c=eval", "--model.vlm", "eval", "--config", written_out, "--config"]
    found = configs.with_config_files(args)
    assert found == ["--config", file, f"-c={file}", "--model.vlm", "eval", "--config", written_out, "--config"]


def test_configs_are_utf8_with_or_without_a_mark(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_bytes("a: 1\nname: Übung\n".encode("latin-1"))
    for read in (lambda: configs.read_config(path), lambda: configs.with_config_files(["--config", str(path)])):
        with pytest.raises(VLMQError, match=r"line 2 of '.*own\.yaml' is not in UTF-8; save"):
            read()
    path.write_bytes(b"\xef\xbb\xbfname: \xc3\x9cbung\n")
    assert yaml.safe_load(configs.read_config(path)) == {"name": "Übung"}
    assert configs.with_config_files([f"--config={path}"]) == [f"--config={path}"]
