"""One image in a set, one set, one batch, one class: every command on the least data there can be."""

import numpy as np
import pytest
import yaml
from cases.files import write_image

from lightning_vlmq.cli import main
from lightning_vlmq.core.errors import VLMQError
from lightning_vlmq.core.roles import ROLES
from lightning_vlmq.results.store import ResultsStore

CALLBACKS = "lightning_vlmq.callbacks."
COMMANDS = {
    "full precision": ["validate", "--config=eval", "--model.vlm=vit_clean", "--model.lst=true"],
    "quantized": [
        "validate",
        "--config=eval",
        "--model.vlm=vit_clean",
        "--model.quant.method=minmax",
        "--model.lst=true",
    ],
    "test": ["test", "--config=eval", "--model.vlm=vit_clean"],
    "predict": ["predict", "--config=eval", "--model.vlm=vit_clean"],
    "fit": ["fit", "--config=qat", "--model.vlm=vit_clean", "--trainer.max_epochs=1"],
}


SETS = {role: role for role in ROLES if role != "spurious"} | {"bias_common": "spurious", "bias_counter": "spurious"}


def tree(root, rng, classes, n_pairs):
    for folder, role in SETS.items():
        for name in ["any"] if ROLES[role].is_ood else classes:
            write_image(root / folder / name / "one.png", rng, 40, 50)
    for k in range(n_pairs):
        write_image(root / "captioned" / f"{k}.png", rng, 40, 50)
        (root / "captioned" / f"{k}.txt").write_text(f"a photo of number {k}")


def config(path, root, names, n_pairs):
    """A config of these sets, as a file."""
    sets = [
        {
            "class_path": "lightning_vlmq.data.readers.Folder",
            "init_args": {"path": name, "name": name, "role": SETS[name]},
        }
        for name in names
    ]
    pairs = {"class_path": "lightning_vlmq.data.readers.FolderPairs", "init_args": {"path": "captioned"}}
    arguments = {"root": str(root), "sets": sets, "pairs": pairs, "calibration_pairs": n_pairs, "templates": ["a {}."]}
    path.write_text(yaml.safe_dump({"data": {"class_path": "lightning_vlmq.data.FileData", "init_args": arguments}}))
    return f"--config={path}"


def run(command, data, root, *more):
    quiet = [
        "--data.num_workers=0",
        f"--results.root={root}",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
    ]
    places = [] if command == "predict" else ["--results.run_id=one"]
    main([*COMMANDS[command], data, *quiet, *places, *more])


@pytest.mark.parametrize("classes", [["cat"], ["cat", "dog"]], ids=["one class", "two classes"])
@pytest.mark.parametrize("command", COMMANDS)
def test_one_image_a_class_in_every_role(command, classes, tmp_path):
    tree(tmp_path / "data", np.random.default_rng(0), classes, 2)
    run(command, config(tmp_path / "data.yaml", tmp_path / "data", SETS, 2), tmp_path / "results")


@pytest.mark.parametrize("command", COMMANDS)
def test_one_set_with_one_image(command, tmp_path):
    tree(tmp_path / "data", np.random.default_rng(1), ["cat"], 2)
    run(command, config(tmp_path / "data.yaml", tmp_path / "data", ["id"], 2), tmp_path / "results")


@pytest.mark.parametrize("command", COMMANDS)
def test_one_batch_of_each_set(command, small_data_args, tmp_path):
    stage = {"full precision": "val", "quantized": "val", "fit": "val"}.get(command, command)
    limits = [f"--trainer.limit_{stage}_batches=1"] + (["--trainer.limit_train_batches=1"] if command == "fit" else [])
    run(command, small_data_args[0], tmp_path, *small_data_args[1:], *limits)
    assert ResultsStore(tmp_path).run_ids() == []  # a part of the data is no result


def test_a_lonely_spurious_set_is_refused_before_anything_runs(tmp_path):
    tree(tmp_path / "data", np.random.default_rng(2), ["cat"], 2)
    data = config(tmp_path / "data.yaml", tmp_path / "data", ["id", "bias_common"], 2)
    with pytest.raises(VLMQError, match="one of a pair is missing: bias_co"):
        run("full precision", data, tmp_path / "results")
    assert not list((tmp_path / "results").rglob("*.parquet"))
