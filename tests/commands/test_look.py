"""``vlmq list``, ``show`` and ``doctor``: all that goes by a name, and what is there."""

import re
import shlex

import pytest

from lightning_vlmq.cli import main
from lightning_vlmq.commands import doctor
from lightning_vlmq.commands.look import KINDS
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.models import known_vlm, zoo
from lightning_vlmq.quant import METHODS


@pytest.fixture(scope="module")
def everything():
    return {kind: entries() for kind, entries in KINDS.items()}


def test_everything_has_one_line(everything):
    for kind, entries in everything.items():
        assert entries, kind
        for name, entry in entries.items():
            assert entry.summary and "\n" not in entry.summary and not re.search(r":\w+:`|``", entry.summary), (
                f"{kind}/{name}"
            )
    assert set(everything["methods"]) == set(METHODS) and set(zoo.names()) <= set(everything["models"])


def test_list_prints_a_line_each(everything, capsys):
    main(["list", "methods"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(everything["methods"])
    main(["list", "models"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == zoo.names() and "vlmq list models" in lines[-1]
    main(["list", "metrics", "signed"])
    assert "best at zero" in capsys.readouterr().out
    main(["list", "models", "vit-b-32"])
    assert all("vit-b-32" in line.split()[0].lower() for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    "name", ["gptq", "mcm", "ece", "vit_clean", "ViT-B-32", "data/imagenet", "demo", "gaussian_noise"]
)
def test_show_says_what_it_is_and_how_it_is_used(name, capsys):
    main(["show", name])
    shown = capsys.readouterr().out
    assert (
        re.match(r"(models|methods|scores|metrics|corruptions|data|studies)/\S+: ", shown)
        and len(shown.splitlines()) > 2
    )
    assert not re.search(r":\w+:`|``", shown.split("seed_everything")[0])
    summary = re.sub(r"^\S+: (?:trained, \w+ distillation: |post-training: |control: )?", "", shown.splitlines()[0])
    assert shown.count(summary) == 1 or shown.startswith(
        ("data/", "studies/")
    )  # said once; a config's head says it too


def test_the_command_of_every_model_names_weights_that_it_takes(everything):
    for name, entry in everything["models"].items():
        options = shlex.split(entry.text.splitlines()[-1])
        assert options[options.index("--model.vlm") + 1] == name
        at = options.index("--model.pretrained") + 1 if "--model.pretrained" in options else 0
        known_vlm(name, options[at] if at else None)


def test_parameters_of_a_score_are_options(capsys):
    main(["show", "scores/mcm"])
    assert "temperature = 1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["list", "method"], "did you mean methods"),
        (["list", "methods", "gpqt"], "did you mean gptq"),
        (["show", "gpqt"], "did you mean gptq"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(args, hint):
    with pytest.raises(VLMQError, match=hint):
        main(args)


def test_the_doctor_finds_all_and_says_what_is_missing(capsys, monkeypatch, tmp_path):
    assert not [check for check in (*doctor.machine(), *doctor.files()) if check.todo]
    name = zoo.names()[0]
    monkeypatch.setattr(zoo, "FOLDER", tmp_path)
    none = next(check for check in doctor.files() if check.what == "embedded models")
    assert none.found == "0 of 0" and "install the package again" in none.todo
    (tmp_path / f"{name}.json").write_text("{}")
    missing = next(check for check in doctor.files() if check.what == "embedded models")
    assert missing.found == "0 of 1" and name in missing.todo
    required = ["torch>=99", "no_such_package_at_all>=1", "numpy>=1.0", "pytest>=8; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: required)
    told = {check.what: check for check in doctor.packages()}
    assert told["torch"].todo == "pip install 'torch>=99'" and told["no_such_package_at_all"].found == "missing"
    assert not told["numpy"].todo and "pytest" not in told
    with pytest.raises(VLMQError, match=r"checks failed; first torch"):
        main(["doctor"])
