"""The commands of docs/real.md are commands: every option and config of theirs exists."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from cases.files import encode, random_pixels, write_cifar, write_tar
from safetensors.torch import save_file
from torchvision.datasets import CIFAR10

from lightning_vlmq.cli import main
from lightning_vlmq.models import known_vlm, split_name
from lightning_vlmq.results.store import ResultsStore

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
    study, *papers = [c for c in COMMANDS if c.startswith("vlmq-study")]
    assert papers and all("study=paper" in paper for paper in papers)
    names = re.search(r"vlm=\[(.*?)\]", study)[1].split(",")
    for name in names:
        if name.startswith("local-dir:"):  # somebody's folder, with a sign that is none of weights
            assert split_name(name) == (name, None) and "@" in name
        else:
            known_vlm(*split_name(name))


CIFAR_READER = "lightning_vlmq.data.readers.CIFAR"
RESNET = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A CIFAR-10 of 24 images, 12 captioned ones in a shard, and a small ResNet CLIP in a folder."""
    rng = np.random.default_rng(0)
    _, _, md5 = write_cifar(tmp_path / "datasets" / "cifar", rng, 24)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "train_list", [])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    pairs = [[(f"{k}.png", encode(random_pixels(rng, 40, 30))), (f"{k}.txt", f"photo {k}".encode())] for k in range(12)]
    write_tar(tmp_path / "datasets" / "cc3m" / "00000.tar", [member for pair in pairs for member in pair])
    folder = tmp_path / "models" / "clip"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": RESNET, "preprocess_cfg": {"mean": [0.5] * 3}})
    )
    save_file(open_clip.CLIP(**RESNET).state_dict(), folder / "open_clip_model.safetensors")
    return tmp_path


def test_a_resnet_on_cifar_by_the_pages_commands(places):
    """A folder's ResNet CLIP, checked, evaluated in full precision and in 4 bits, by the commands as they stand there."""
    few = [
        "--data.calibration_pairs=12",
        f"--data.sets=[{{class_path: {CIFAR_READER}, init_args: {{expected: null}}}}]",
    ]
    quick = ["--data.num_workers=2", "--data.train_batch_size=6", "--trainer.logger=false"]
    commands = [shlex.split(c)[1:] for c in COMMANDS if "data/cifar10" in c]
    assert [c[0] for c in commands] == ["data", "validate", "validate"]
    for k, command in enumerate(commands):
        named = [
            word.replace("/datasets", f"{places}/datasets").replace("/models", f"{places}/models") for word in command
        ]
        runs = [*quick, f"--results.root={places}/results", f"--results.run_id=run{k}"]
        main([*named, *few, *(runs if command[0] == "validate" else [])])
    rows = ResultsStore(places / "results").rows(["run2"])
    values = rows.set_index(["dataset", "metric"])["value"]
    assert values["cifar10", "coverage_weights"] == 1 and 0 <= values["cifar10", "top1"] <= 1
    assert "delta_top1" in set(rows["metric"])
