"""The configs of the published VLMs, and ViT-B-32 at full size through the command line."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import yaml

from lightning_vlmq.models import known_vlm
from lightning_vlmq.models.recipes import recipe_of_tag

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs" / "vlm").glob("*.yaml"))


def test_there_are_ten():
    assert len(CONFIGS) == 10


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_names_weights_that_are_offered_and_agree_with_their_architecture(path):
    settings = yaml.safe_load(path.read_text())["model"]["init_args"]
    known_vlm(settings["vlm"], settings.get("pretrained"))
    if not settings["vlm"].startswith("hf-hub:"):
        recipe_of_tag(settings["vlm"], settings["pretrained"], open_clip.get_model_config(settings["vlm"]), None)
    assert f"--config vlm/{path.stem}" in path.read_text()


def test_the_script_builds_and_quantizes_at_full_size():
    script = runpy.run_path(str(REPOSITORY / "scripts" / "published_vlms.py"))
    vlm = script["build"](**script["published"]()["clip_vit_b32_wit"])
    assert "QuickGELU" in repr(vlm) and vlm.preprocessing.framing.size == 224
    cells = [cell.strip() for cell in script["row"]("ViT-B-32", vlm, "minmax", 8, images=1).split("|")]
    assert cells[4] == cells[6] == "100.0%" and cells[8] == "none" and float(cells[9]) > 0.99


def test_vit_b_32_through_the_command_line(tmp_path):
    arguments = [
        "validate", "--config", str(REPOSITORY / "configs" / "eval.yaml"), "--model.vlm=ViT-B-32", "--model.pretrained=none",
        "--model.quant.method=minmax", "--model.quant.weight_bits=8", "--model.lst=false", "--data.n_concepts=8", "--data.n_id=8",
        "--data.datasets=[concepts]", "--data.calibration_pairs=2", "--data.train_batch_size=2", "--trainer.logger=false",
        '--trainer.callbacks=[{"class_path":"lightning_vlmq.callbacks.CoveragePrinter"},'
        '{"class_path":"lightning_vlmq.callbacks.HeadlinePrinter"}]', f"--results.root={tmp_path}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_vlmq", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "random weights" in done.stdout and "100.0%" in done.stdout
    assert list(tmp_path.rglob("*.parquet"))
