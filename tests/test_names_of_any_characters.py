"""Class and data set names of any characters through the command line: prompts, store, terminal, TensorBoard's tags and figures."""

import numpy as np
import pytest
import yaml
from cases.files import write_image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_vlmq.cli import main
from lightning_vlmq.results.store import ResultsStore

CLASSES = ["$x_{", "=a<b>", "模型 🦊 '\"", "{0}%s\\frac"]
NAMES = {"id": "$my {set} = <b>", "shift": "[red]=1+1 🦊'\""}


@pytest.fixture
def data(tmp_path):
    rng, sets = np.random.default_rng(0), []
    for role, name in NAMES.items():
        for label in CLASSES:
            write_image(tmp_path / role / label / "one.png", rng, 40, 50)
        sets.append(
            {
                "class_path": "lightning_vlmq.data.readers.Folder",
                "init_args": {"path": role, "name": name, "role": role},
            }
        )
    arguments = {"root": str(tmp_path), "sets": sets, "templates": ["a {}."]}
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump({"data": {"class_path": "lightning_vlmq.data.FileData", "init_args": arguments}}))
    return path


def test_a_run_shows_them_and_files_them_as_they_are(data, tmp_path, capsys):
    logs = tmp_path / "tensorboard"
    places = [
        f"--results.root={tmp_path / 'results'}",
        "--results.run_id=run",
        f"--trainer.logger.init_args.save_dir={logs}",
    ]
    main(
        [
            *("validate", "--config=eval", f"--config={data}", "--model.vlm=vit_clean", "--model.lst=false", *places),
            *("--data.num_workers=0", "--trainer.enable_progress_bar=false"),
            "--trainer.callbacks+=lightning_vlmq.callbacks.ReliabilityDiagrams",
        ]
    )
    assert "Accuracy" in capsys.readouterr().out
    store = ResultsStore(tmp_path / "results")
    assert set(NAMES.values()) <= set(store.rows()["dataset"]) and set(store.samples("run")["dataset"]) == set(
        NAMES.values()
    )
    (events,) = logs.rglob("events.out.*")
    found = EventAccumulator(str(events.parent), size_guidance={"images": 0}).Reload().Tags()
    assert found["images"] and found["scalars"]
